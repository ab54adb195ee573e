"""What a step tells of the discriminator, by hand, and when it warns."""

import json
import math

import pytest
import torch

from ril_engine.health import auc, calibration_error, explained_by_length, health
from ril_engine.runlog import RunLog
from ril_engine.watch import Watch


def test_auc_counts_pairs_and_halves_ties():
    scores, labels = torch.tensor([0.9, 0.4, 0.4, 0.1, 0.4]), torch.tensor([True, True, False, False, False])
    # 0.9 beats all three; 0.4 ties with two and beats one: (3 + 2) / 6.
    assert auc(scores, labels) == pytest.approx(5 / 6)
    assert auc(1 - scores, labels) == pytest.approx(1 / 6)
    assert auc(torch.full((4,), 0.3), torch.tensor([True, False, True, False])) == 0.5
    assert math.isnan(auc(torch.tensor([0.1, 0.2]), torch.tensor([True, True])))


def test_calibration_error():
    # Bin 0.2..0.3: scores 0.2 and 0.28, one of two is the student's: |0.24 - 0.5|. Bin 0.9..1: 0.95 and 1, both: 0.025.
    scores, labels = torch.tensor([0.2, 0.28, 0.95, 1.0]), torch.tensor([True, False, True, True])
    assert calibration_error(scores, labels) == pytest.approx((0.26 + 0.025) / 2)
    assert calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([True, False])) == 0.0


def test_what_length_explains():
    lengths = torch.tensor([1, 2, 3, 4, 5])
    assert explained_by_length(2.0 * lengths - 7, lengths) == pytest.approx(1)
    assert explained_by_length((lengths - 3.0) ** 2, lengths) == pytest.approx(1)  # the middle is preferred
    # Two of each length: the fit gives their means 1/2, 1/2 and 1. Of the spread 4/3, 1 is left.
    rewards = torch.tensor([0.0, 1, 1, 0, 1, 1])
    assert explained_by_length(rewards, torch.tensor([1, 1, 2, 2, 3, 3])) == pytest.approx(1 / 4)
    assert explained_by_length(rewards, torch.tensor([1, 1, 1, 2, 2, 2])) == pytest.approx(0)  # 2/3 both: two lengths
    assert explained_by_length(torch.ones(3), torch.tensor([1, 2, 3])) == 0.0
    assert explained_by_length(rewards, torch.full((6,), 4)) == 0.0


def test_a_steps_metrics():
    sources = ["student", "a", "b", "student", "b", "b"]
    before = torch.tensor([0.9, 0.6, 0.5, 0.2, 0.1, 0.1])
    scores = torch.tensor([0.8, 0.5, 0.3, 0.6, 0.2, 0.1])
    rewards = torch.tensor([0.0, 0, 1, 0, 1, 1])
    found = health(before, scores, rewards, sources, torch.tensor([3, 9, 9, 3, 9, 9]))
    assert found == pytest.approx(
        {
            "discriminator/accuracy": 4 / 6,  # a's first and the student's second are wrong
            "discriminator/auc": 6 / 8,
            # bins 0.1 (two of 0.1, b's), 0.2, 0.5, 0.6, 0.9: 0.2 + |0.2 - 1| + 0.5 + 0.6 + |0.9 - 1|, over 6
            "discriminator/calibration_error": 2.2 / 6,
            # The sides differ in length, so R^2 is between the sides: means 0.7 and 0.275, of 5/12 in all.
            "discriminator/score_by_length": (2 * (0.7 - 2.5 / 6) ** 2 + 4 * (0.275 - 2.5 / 6) ** 2) / 0.348333333,
            "reward/similarity_by_length": (2 * 0.5**2 + 4 * 0.25**2) / 1.5,
            "discriminator/student_score": 0.7,
            "discriminator/teacher_score": 0.275,
            "discriminator/score/a": 0.5,
            "discriminator/score/b": 0.2,
            "reward/student_similarity": 0.0,
            "reward/teacher_similarity": 0.75,
            "reward/similarity/a": 0.0,
            "reward/similarity/b": 1.0,
        },
        rel=1e-5,
    )


def warned(watch: Watch, accuracies: list[float]) -> list[int]:
    """The steps, from 0, of which the watch warns."""
    return [step for step, each in enumerate(accuracies) if watch({"discriminator/accuracy": each}) is not None]


def test_a_warning_comes_once_per_row_of_50_steps():
    assert warned(Watch(), [0.96] * 200) == [49]
    assert warned(Watch(), [0.95] * 100 + [0.55] * 100) == []
    assert warned(Watch(), [0.96] * 49 + [0.9] + [0.96] * 50) == [99]
    assert warned(Watch(), [0.96] * 60 + [0.54] * 60 + [0.8] + [0.96] * 50) == [49, 109, 170]
    watch = Watch()
    for _ in range(50):
        saturated = watch({"discriminator/accuracy": 0.97})
    for _ in range(50):
        fooled = watch({"discriminator/accuracy": 0.5})
    for word in ("label_smoothing", "temperature", "a lower discriminator.learning_rate", "max_accuracy", "fewer"):
        assert word in saturated
    for word in ("below 0.55 for 50", "a higher discriminator.learning_rate", "more rl.updates_per_step", "student"):
        assert word in fooled
    assert watch({"kl": 0.1}) is None  # a run without D


def test_the_log_warns_and_does_not_repeat_itself_after_a_resume(tmp_path, capsys):
    def steps(first: int, last: int):
        with RunLog(tmp_path, resume_step=first - 1, total_steps=80) as log:
            for step in range(first, last + 1):
                log.step(step, {"discriminator/accuracy": 1.0}, {"step": 0.1})
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        found = [row["step"] for row in lines if "is saturated" in row.get("warning", "")]
        return found, capsys.readouterr().err.count("warning: discriminator/accuracy was above 0.95 for 50 steps")

    assert steps(1, 45) == ([], 0)
    assert steps(41, 60) == ([50], 1)  # killed after step 45, saved at 40
    assert steps(56, 80) == ([50], 0)
    assert steps(46, 80) == ([50], 1)  # the warning came after that checkpoint
