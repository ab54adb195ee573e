"""One step of Algorithm 2 with real engines: labels, micro-batches, averages, checkpoints."""

import math
import random

import numpy as np
import pytest
import torch

from ril_engine import adversary, checkpoints
from ril_engine.config import Config
from ril_engine.errors import UserError
from ril_engine.loop import average, scheduled
from ril_engine.runlog import PhaseTimer


def test_the_policy_gradient_does_not_depend_on_packing_or_micro_batches(job):
    make, questions = job
    gradients, losses = [], []
    for packing, budget in (("padded", 8192), ("padded", 400), ("packed", 200), ("shared", 8192), ("shared", 100)):
        loop = make(packing=packing, micro_batch_tokens=budget, updates_per_step=1)
        responses = loop.rollout(0, questions)
        advantages = torch.linspace(-1, 1, len(responses))  # random students are all wrong: no spread of their own

        def keep(loop=loop):
            gradients.append({n: p.grad.clone() for n, p in loop.policy.named_parameters() if p.grad is not None})
            return {"grad_norm": 0.0, "learning_rate": 0.0}

        loop.student.step = keep
        metrics = loop.update_policy(responses, advantages, PhaseTimer())
        losses.append(metrics["loss/policy"])
        gap, count = metrics["sampler/gap"]
        assert count == sum(len(each["ids"]) for each in responses if each["source"] == "student")
        assert gap / count < 1e-5
    assert losses == pytest.approx([losses[0]] * 5, abs=1e-7) and abs(losses[0]) > 1e-4
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=2e-7, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 1e-4


def test_importance_weights_are_cut_and_the_students_alone(job):
    make, questions = job
    loop = make(updates_per_step=1, beta=0.0, importance_cap=1.5)
    responses = loop.rollout(0, questions)
    students = torch.tensor([each["source"] == "student" for each in responses])

    def loss(advantages: torch.Tensor) -> float:
        return loop.update_policy(responses, advantages.float(), PhaseTimer())["loss/policy"]

    # On-policy every ratio is 1, so the loss counts tokens.
    own, teachers = loss(students), loss(~students)
    for each in responses:
        if each["source"] == "student":  # as if the sampler had found them far less probable
            each["sampler_logprobs"] = [value - 5.0 for value in each["sampler_logprobs"]]
    assert loss(students) == pytest.approx(1.5 * own, rel=1e-5)
    assert loss(~students) == pytest.approx(teachers, rel=1e-5)


def test_a_rank_without_a_response_adds_nothing(job, monkeypatch):
    make, questions = job
    loop = make(updates_per_step=1)
    responses = loop.rollout(0, questions)
    advantages = torch.linspace(-1, 1, len(responses))
    planned, planned_d, kept = loop._micro_batches, adversary.micro_batches, {}
    gradients = []
    for empty in ([], [[]]):
        loop._micro_batches = lambda *sizes, empty=empty: planned(*sizes) + empty
        monkeypatch.setattr(
            adversary, "micro_batches", lambda *sizes, empty=empty, **rest: [planned_d(*sizes, **rest)[0] + empty]
        )
        for engine in loop.engines.values():
            engine.module.zero_grad()

        def keep(engine, name):
            kept[name] = {n: p.grad.clone() for n, p in engine.module.named_parameters() if p.grad is not None}
            return {"grad_norm": 0.0, "learning_rate": 0.0}

        for name, engine in loop.engines.items():
            engine.step = lambda engine=engine, name=name: keep(engine, name)
        copies = [dict(each) for each in responses]
        metrics = loop.adversary.update(copies) | loop.update_policy(copies, advantages, PhaseTimer())
        gradients.append((metrics, dict(kept), [each["score"] for each in copies]))
    assert gradients[0][0] == gradients[1][0] and gradients[0][2] == gradients[1][2]
    for name in loop.engines:
        assert max(gradient.abs().max() for gradient in gradients[0][1][name].values()) > 1e-4
        for parameter, gradient in gradients[0][1][name].items():
            torch.testing.assert_close(gradients[1][1][name][parameter], gradient, atol=0, rtol=0)


def test_packings_give_the_same_curves(job):
    """The same roll-outs, 20 steps of D and student from the same weights."""
    make, questions = job
    settings = {"steps": 20, "micro_batch_tokens": 700}
    first = make(**settings)
    recorded = [first.rollout(step, questions[step % 2 :][:2]) for step in range(20)]
    for responses in recorded:
        first.judge(responses)
    curves = {}
    for packing in ("padded", "packed", "shared"):
        loop = make(packing=packing, **settings)
        for rollout in recorded:
            responses = [dict(each) for each in rollout]
            metrics = loop.adversary.update(responses)
            advantages = loop.advantages(responses)
            metrics |= loop.update_policy(responses, advantages, PhaseTimer())
            names = ("loss/policy", "loss/discriminator", "grad_norm/student", "grad_norm/discriminator")
            curves.setdefault(packing, []).append([metrics[name] for name in names] + [metrics["kl"][0]])
    padded, packed, shared = (torch.tensor(curves[name], dtype=torch.float64) for name in curves)
    assert padded.std(0).min() > 1e-4  # all of them move
    for other in (packed, shared):
        torch.testing.assert_close(other, padded, rtol=1e-4, atol=1e-8)


def test_d_learns_that_the_student_is_1_and_pays_for_teacher_text(job):
    make, questions = job
    loop = make()
    responses = loop.rollout(0, questions)
    loop.judge(responses)
    assert [each["source"] == "student" for each in responses] == ([True] * 4 + [False] * 4) * 3
    for _ in range(15):
        metrics = loop.adversary.update(responses)
    assert metrics["discriminator/accuracy"] == 1.0
    for each in responses:
        own = each["source"] == "student"
        assert (each["score"] > 0.5) == own and each["similarity_reward"] == (0.0 if own else 1.0)
    # R = R_sim + R_ans: all student's rewards are below all teachers', and groups sum to 0.
    advantages = loop.advantages(responses)
    own = torch.tensor([each["source"] == "student" for each in responses])
    assert (advantages[own] < 0).all() and (advantages[~own] > 0).all()
    assert advantages.view(3, 8).sum(1).abs().max() < 1e-6


def test_teacher_answers_are_imitated(job):
    make, questions = job
    loop = make(beta=0.0)
    metrics = []
    for step in range(4):
        step_metrics, responses = loop.step(step, questions, PhaseTimer())
        metrics.append(average(step_metrics))
    assert responses[4]["source"] in "ab"
    batch = loop.encoder.batch([each["row"] for each in responses], [each["ids"] for each in responses])
    before = make()
    with torch.no_grad():
        gain = loop.policy(batch) - before.policy(batch)
    from_teacher = torch.tensor([each["source"] != "student" for each in responses])[batch.response_index]
    assert gain[from_teacher].mean() > 0.1
    assert metrics[0]["reward/teacher_answer"] == 1.0 and metrics[0]["length/student"] <= 6


def test_teachers_give_shares_by_weight(job):
    make, questions = job
    loop = make()
    teachers = [{"name": "a", "path": "p", "weight": 1}, {"name": "b", "path": "p", "weight": 7}]
    loop.config = Config.model_validate({**loop.config.model_dump(), "teachers": teachers})

    def drawn() -> list[list[str]]:
        return [[each["source"] for each in loop._teachers(step, 0, *questions[0])] for step in range(400)]

    groups = drawn()
    assert groups == drawn() and {len(group) for group in groups} == {4}
    assert {group.count("a") for group in groups} == {0, 1}
    assert sum(group.count("a") for group in groups) / 400 == pytest.approx(0.5, abs=0.1)


def test_every_teacher_has_its_own_means(job):
    make, questions = job
    loop = make()
    loop.saved = {
        **loop.saved,
        "b": {id: [{**some[0], "answer_reward": 0.0}] * 4 for id, some in loop.saved["b"].items()},
    }
    metrics, responses = loop.step(0, questions, PhaseTimer())
    metrics = average(metrics)
    for name, reward in (("a", 1.0), ("b", 0.0)):
        some = [each for each in responses if each["source"] == name]
        assert len(some) == 6 and metrics[f"reward/answer/{name}"] == reward
        assert metrics[f"length/{name}"] == pytest.approx(sum(len(each["ids"]) for each in some) / 6)
        assert metrics[f"advantage/{name}"] == pytest.approx(sum(each["advantage"] for each in some) / 6, abs=1e-6)
    assert metrics["length/a"] != metrics["length/b"] and metrics["advantage/a"] > metrics["advantage/b"] + 0.5


def test_a_reward_is_the_sum_of_both_and_teacher_texts_come_once_and_as_they_end(job):
    make, questions = job
    loop = make()
    rewards = [(0, 1.0, 0.0), (0, 0.0, 1.0), (0, 1.0, 1.0), (0, 0.0, 0.0), (1, 0.0, 0.0), (1, 0.0, 1.0)]
    responses = [{"slot": slot, "answer_reward": answer, "similarity_reward": sim} for slot, answer, sim in rewards]
    assert loop.advantages(responses).tolist() == [0.0, 0.0, 1.0, -1.0, -0.5, 0.5]
    for each in responses:
        del each["similarity_reward"]  # without a D
    assert loop.advantages(responses).tolist() == [0.5, -0.5, 0.5, -0.5, 0.0, 0.0]
    number, row = questions[0]
    record = {"text": "7", "answer_reward": 0.0}
    pools = {name: [record | {"source": name, "truncated": cut} for cut in (True, False)] for name in "ab"}
    loop.saved = {name: {row["id"]: pool} for name, pool in pools.items()}
    for step in range(10):
        drawn = loop._teachers(step, 0, number, row)
        found = {(each["source"], each["truncated"]) for each in drawn}
        assert len(drawn) == 4 == len(found)  # without replacement: all there are
        assert all((each["ids"][-1] in loop.encoder.eos_ids) != each["truncated"] for each in drawn)


def test_masked_truncated_responses_count_nothing(job):
    make, questions = job
    loop = make(updates_per_step=1, beta=0.0, mask_truncated=True)
    responses = loop.rollout(0, questions)
    for place, each in enumerate(responses):
        each["truncated"] = place % 2 == 0
    cut = torch.tensor([each["truncated"] for each in responses])
    kept = sum(len(each["ids"]) for each in responses if not each["truncated"])
    metrics = loop.update_policy(responses, cut.float(), PhaseTimer())
    assert (metrics["loss/policy"], metrics["tokens"]) == (0.0, kept)
    norm = len(responses) * loop.config.sampling.max_new_tokens
    metrics = loop.update_policy(responses, (~cut).float(), PhaseTimer())  # on-policy every ratio is 1
    assert metrics["loss/policy"] == pytest.approx(-kept / norm, rel=1e-5)


@pytest.mark.parametrize("kl_on", ["student", "all"])
def test_the_kl_term_is_divided_by_what_it_is_summed_over(job, kl_on):
    make, questions = job
    loop = make(updates_per_step=1, kl_on=kl_on)
    responses = loop.rollout(0, questions)
    with torch.no_grad():
        for parameter in loop.policy.parameters():
            parameter.mul_(1.02)  # away from the reference
    metrics = loop.update_policy(responses, torch.zeros(len(responses)), PhaseTimer())
    some = [each for each in responses if kl_on == "all" or each["source"] == "student"]
    total, count = metrics["kl"]
    assert count == sum(len(each["ids"]) for each in some) and total / count > 1e-5
    limit = loop.config.sampling.max_new_tokens
    assert metrics["loss/policy"] == pytest.approx(0.1 * total / (len(some) * limit), rel=1e-4)


def test_an_empty_teacher_text_and_a_question_without_a_reference(job):
    make, questions = job
    loop = make()
    texts = [("", False), ("", True), ("<|im_end|>", True), ("7", False)]
    records = [{"source": "a", "text": text, "truncated": cut, "answer_reward": 0.0} for text, cut in texts]
    loop.saved = {name: {row["id"]: records for _, row in questions} for name in "ab"}
    asked = [(i, {**row, "answer": None}) for i, row in questions]
    for step in range(3):
        metrics, responses = loop.step(step, asked, PhaseTimer())
        assert all(math.isfinite(value) for value in average(metrics).values())
        assert all(each["ids"] for each in responses)
        assert {each["answer_reward"] for each in responses} == {0.0}
        empty = [each["ids"] for each in responses if each["source"] == "a" and each["text"] == ""]
        assert all(ids == loop.encoder.eos_ids[:1] for ids in empty)


def test_sft_on_saved_responses_is_the_gradient_of_their_log_prob(job):
    make, questions = job
    loop = make(algorithm="sft", updates_per_step=1, beta=0.1)
    assert loop.reference is None  # no student response, so no KL
    responses = loop.rollout(0, questions)
    assert [each["source"] in "ab" for each in responses] == [True] * 4 * 3
    loop.student.step = lambda: {"grad_norm": 0.0, "learning_rate": 0.0}
    loop.update_policy(responses, loop.advantages(responses), PhaseTimer())
    got = {n: p.grad.clone() for n, p in loop.policy.named_parameters() if p.grad is not None}
    loop.policy.zero_grad()
    batch = loop.encoder.batch([each["row"] for each in responses], [each["ids"] for each in responses])
    (-loop.policy(batch).sum() / (len(responses) * loop.config.sampling.max_new_tokens)).backward()
    for name, parameter in loop.policy.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, atol=2e-7, rtol=1e-4)


@pytest.mark.usefixtures("job")
def test_metrics_are_averaged_by_what_they_count():
    means = average({"tokens": 7, "ratio/max": 1.5, "advantage/spread": (8.0, 2), "kl": (6.0, 4), "truncated": 0.25})
    expected = {"tokens": 7.0, "ratio/max": 1.5, "advantage/spread": 2.0, "kl": 1.5, "truncated": 0.25}
    assert means == expected


def test_every_question_comes_once_per_epoch(job):
    config, rows = job[0]().config, [{}] * 9
    epoch = [pick for step in range(3) for pick in scheduled(config, rows, step)]
    assert sorted(epoch) == list(range(9))
    assert epoch != [pick for step in range(3, 6) for pick in scheduled(config, rows, step)]


def test_a_checkpoint_brings_both_engines_back(job, tmp_path):
    make, questions = job
    loop = make()
    loop.step(0, questions, PhaseTimer())
    (tmp_path / "config.yaml").touch()
    checkpoints.save(tmp_path, 1, loop.engines, {"greedy": 0.5}, keep=1)

    def draws() -> tuple:  # what a dropout or a reward function of the user's may draw from
        return random.random(), np.random.random(), float(torch.rand(()))

    expected = average(loop.step(1, questions, PhaseTimer())[0]), draws()
    fresh = make()
    assert checkpoints.load(checkpoints.newest_whole(tmp_path), fresh.engines) == (1, {"greedy": 0.5})
    got = average(fresh.step(1, questions, PhaseTimer())[0]), draws()
    assert got == expected
    checkpoints.save(tmp_path, 2, fresh.engines, {"greedy": 0.5}, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


@pytest.mark.usefixtures("alone")
def test_what_cannot_be_resumed_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no config.yaml there; expected the folder of a run"):
        checkpoints.require_unfinished(tmp_path)
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints" / "partial").mkdir(parents=True)  # a crash while saving
    with pytest.raises(UserError, match=r"no checkpoint was saved \(rl.save_every\)"):
        checkpoints.newest_whole(tmp_path)
    (tmp_path / "result.json").touch()
    with pytest.raises(UserError, match="this run has ended"):
        checkpoints.require_unfinished(tmp_path)
