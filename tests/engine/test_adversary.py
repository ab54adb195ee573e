"""The discriminator's objectives, its part in a step and its pre-training, on a decoder of one layer."""

import copy
import json
import math

import pytest
import torch

from ril_engine import adversary as ril_adversary
from ril_engine import tiny_models
from ril_engine.adversary import WEIGHTS, Adversary, HeldOut, bradley_terry_loss, by_question, centred, draw, pretrain
from ril_engine.config import Config, ModelConfig
from ril_engine.discriminator import new_discriminator
from ril_engine.engine import Engine
from ril_engine.errors import UserError

INSTRUCTION = "Who?"


@pytest.fixture(scope="module")
def student(tmp_path_factory, alone):
    """A causal LM of one layer with the tiny student's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("student")
    tiny_models.build(folder / "vlm", "tiny:student", [INSTRUCTION, "<response></response>"], 0)
    AutoTokenizer.from_pretrained(folder / "vlm").save_pretrained(folder / "text")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 528}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", initializer_range=0.1, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "text")
    return ModelConfig(path=str(folder / "text"))


def settings(discriminator: dict | None = None, **rl) -> Config:
    tree = {"teachers": [{"name": "a", "path": "x"}, {"name": "b", "path": "x", "weight": 3.0}], "rl": rl}
    tree["discriminator"] = {"instruction": INSTRUCTION, "learning_rate": 3e-3, **(discriminator or {})}
    return Config.model_validate(tree)


def adversary(student: ModelConfig, config: Config, *, head: float = 0.0) -> Adversary:
    """One to be trained, its score's weights of size `head`."""
    module, tokenizer = new_discriminator(student, config.rl.packing, config.discriminator.temperature)
    torch.nn.init.normal_(module.score.weight, std=head, generator=torch.Generator().manual_seed(0))
    rate = config.discriminator.learning_rate
    return Adversary(config, module, tokenizer, Engine(module, config=config.deepspeed, steps=100, learning_rate=rate))


def rollout(questions: int = 4) -> list[dict]:
    """Two responses of the student and two of the teachers for each question: sides differ in their words."""
    out = []
    for slot in range(questions):
        texts = [
            ("student", f"{slot + 3}"),
            ("student", f"it is {slot}"),
            ("a", f"I see {slot} and 7. The answer is 8."),
        ]
        for source, text in [*texts, ("b", f"the digits are {slot} and 1, so it is odd.")]:
            out.append({"slot": slot, "source": source, "text": text, "ids": [0] * len(text)})
    return out


def test_bradley_terry_by_hand():
    # Group 0: student 1 and 0, teacher 0: softplus(-1) and ln 2. Group 1: student 2, teachers 2 and 5.
    logits = torch.tensor([1.0, 0.0, 0.0, 2.0, 2.0, 5.0])
    labels = torch.tensor([True, True, False, True, False, False])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    by_hand = (math.log1p(math.exp(-1)) + math.log(2) + math.log(2) + math.log1p(math.exp(3))) / 4
    assert float(bradley_terry_loss(logits, labels, groups)) == pytest.approx(by_hand)
    torch.testing.assert_close(
        centred(logits, torch.tensor([7, 7, 7, 4, 4, 4])), torch.tensor([2 / 3, -1 / 3, -1 / 3, -1, -1, 2])
    )


@pytest.mark.parametrize(
    "objective", [{"label_smoothing": 0.1, "temperature": 2.0}, {"objective": "bradley_terry", "temperature": 0.5}]
)
def test_the_gradient_does_not_depend_on_micro_batches(student, objective):
    responses = rollout()
    labels = torch.tensor([each["source"] == "student" for each in responses])
    groups = torch.tensor([each["slot"] for each in responses])
    texts = [each["text"] for each in responses]
    found = []
    for packing, budget in (("padded", 8192), ("padded", 200), ("shared", 8192), ("shared", 60), ("packed", 100)):
        d = adversary(student, settings(objective, packing=packing, micro_batch_tokens=budget), head=0.1)
        batches = d.encode(texts)
        assert (len(batches) == 1) == (budget == 8192)
        whole = copy.deepcopy(d.module)
        kept = {}

        def keep(d=d, kept=kept):
            kept.update({name: p.grad.clone() for name, p in d.module.named_parameters()})
            return {"grad_norm": 0.0}

        d.engine.step = keep
        logits, _ = d.train(batches, labels, groups)
        found.append((logits, kept))
        if len(batches) == 1:  # by hand, from one forward of all
            (part, inputs) = batches[0]
            order = torch.tensor(part)
            out = whole(*inputs).logits
            if d.settings.objective == "bce":
                p = out.sigmoid()
                y = torch.where(labels[order], 0.9, 0.1)
                loss = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
            else:
                pairs = [
                    (i, j)
                    for i in range(len(part))
                    for j in range(len(part))
                    if labels[order[i]] and not labels[order[j]] and groups[order[i]] == groups[order[j]]
                ]
                assert len(pairs) == 16
                loss = -sum((out[i] - out[j]).sigmoid().log() for i, j in pairs) / 16
            loss.backward()
            for name, parameter in whole.named_parameters():
                torch.testing.assert_close(kept[name], parameter.grad, atol=1e-6, rtol=1e-4)
    for logits, kept in found[1:]:
        torch.testing.assert_close(logits, found[0][0], atol=1e-5, rtol=0)
        for name in kept:
            torch.testing.assert_close(kept[name], found[0][1][name], atol=1e-6, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in found[0][1].values()) > 1e-3


@pytest.mark.parametrize("objective", ["bce", "bradley_terry"])
def test_d_learns_that_the_student_is_1(student, objective):
    d, responses = adversary(student, settings({"objective": objective}, updates_per_step=2)), rollout()
    first = d.update(responses)
    # The metrics are from before the update, when D knew nothing; scores and rewards from after it.
    assert first["loss/discriminator"] == pytest.approx(math.log(2)) and first["discriminator/accuracy"] == 0.5
    assert first["discriminator/auc"] == 0.5 and first["discriminator/calibration_error"] == 0.0
    assert first["discriminator/student_score"] > 0.5 > first["discriminator/teacher_score"]
    assert first["discriminator/updates"] == 2
    for _ in range(20):
        metrics = d.update(responses)
    assert metrics["discriminator/accuracy"] == metrics["discriminator/auc"] == 1.0
    assert metrics["loss/discriminator"] < 0.3 and metrics["grad_norm/discriminator"] > 0
    for each in responses:
        own = each["source"] == "student"
        assert (each["score"] > 0.5) == own and each["similarity_reward"] == (0.0 if own else 1.0)
    assert metrics["discriminator/score/b"] == pytest.approx(
        sum(each["score"] for each in responses if each["source"] == "b") / 4
    )


def test_an_accurate_d_rests(student):
    d, responses = adversary(student, settings({"max_accuracy": 0.9})), rollout()
    updates, accuracies = [], []
    for _ in range(20):
        before = [parameter.clone() for parameter in d.module.parameters()]
        metrics = d.update(responses)
        moved = not all(map(torch.equal, before, d.module.parameters()))
        assert moved == (metrics["discriminator/accuracy"] < 0.9) == ("grad_norm/discriminator" in metrics)
        updates.append(metrics["discriminator/updates"])
        accuracies.append(metrics["discriminator/accuracy"])
    assert updates[0] == 1 and updates[-1] == 0
    assert accuracies[-1] >= 0.9


def test_a_fixed_d_only_scores(student, tmp_path):
    from safetensors.torch import save_file

    trained = adversary(student, settings(), head=0.3)
    save_file({name: value.clone() for name, value in trained.module.state_dict().items()}, tmp_path / WEIGHTS)
    want = trained.logits(trained.encode([each["text"] for each in rollout()]), 16).sigmoid()
    fixed = Adversary.pretrained(settings({"use": "fixed", "similarity_levels": 0}), student, tmp_path)
    assert fixed.engine is None
    for _ in range(2):
        responses = rollout()
        metrics = fixed.update(responses)
        assert metrics["discriminator/updates"] == 0
        for each, score in zip(responses, want.tolist(), strict=True):
            assert each["score"] == pytest.approx(score, abs=1e-5)
            assert each["similarity_reward"] == pytest.approx(1 - score, abs=1e-5)
    updated = Adversary.pretrained(settings(), student, tmp_path)
    assert updated.engine is not None and updated.engine.module is updated.module


def test_questions_that_one_side_answered_are_left_out():
    rows = {
        "student": [{"id": f"q{i}", "text": f"s{i}"} for i in range(60)],
        "a": [{"id": f"q{i}", "text": f"a{i}"} for i in range(30)],
        "b": [{"id": f"q{i}", "text": f"b{i}"} for i in range(20, 90)],
    }
    rows["a"] = [row for row in rows["a"] if row["id"] != "q7"]
    training, held = by_question(rows, 0.3)
    assert len(training) + len(held) == 59 and 8 <= len(held) <= 28
    assert not any(question["student"] == ["s7"] for question in training + held)
    assert by_question(rows, 0.3) == (training, held)
    with pytest.raises(UserError, match="no question in its held-out part has saved responses of the student and"):
        by_question(rows, 1e-6)


def test_teachers_are_drawn_by_weight():
    questions = [{"student": ["s", "t"], "a": ["u"], "b": ["v", "w"]}] * 3 + [{"student": ["x"], "a": ["y"]}]
    sources, texts = draw(questions, {"a": 1.0, "b": 3.0}, 4000, torch.Generator().manual_seed(0))
    assert sources[::2] == ["student"] * 4000
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    assert all((mine == "x") == (other == "y") for mine, other in pairs)  # of the same question
    share = {text: texts.count(text) / 4000 for text in "stuvwxy"}
    # of 3/4 of the draws: a gets 1/4, b 3/4
    assert share == pytest.approx(
        {"s": 3 / 8, "t": 3 / 8, "u": 3 / 16, "v": 9 / 32, "w": 9 / 32, "x": 1 / 4, "y": 1 / 4}, abs=0.03
    )


def saved(seed: int, *, differ: bool, questions: int = 1200) -> dict[str, list[dict]]:
    """One response per question and source; where sides differ, the student says odd more often than a teacher."""
    generator = torch.Generator().manual_seed(seed)

    def text(odd: float) -> str:
        left, right, digit = torch.randint(10, (3,), generator=generator).tolist()
        word = "odd" if torch.rand((), generator=generator) < odd else "even"
        return f"I see {left} and {right}. So {digit} it is {word}."

    shares = {"student": 0.95, "a": 0.05, "b": 0.05} if differ else dict.fromkeys(("student", "a", "b"), 0.5)
    return {source: [{"id": f"q{i}", "text": text(odd)} for i in range(questions)] for source, odd in shares.items()}


def pretrained(student, out, seed=0, *, differ, share=0.5, **changes) -> tuple[Config, dict]:
    rates = {"learning_rate": 3e-3, "final_learning_rate": 1e-3, "batch_size": 32, **changes}
    config = settings({"validation_share": share, "pretrain": rates}).model_copy(update={"seed": seed})
    pretrain(config, student, saved(seed, differ=differ), out)
    return config, json.loads((out / "metrics.json").read_text())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sides_that_do_not_differ_are_not_told_apart(student, tmp_path, seed):
    _, metrics = pretrained(student, tmp_path, seed, differ=False, steps=60)
    assert metrics["held_out_responses"] > 1500 and metrics["steps"] == 60
    assert abs(metrics["held_out_accuracy"] - 0.5) < 0.05 and abs(metrics["held_out_auc"] - 0.5) < 0.05


def test_the_best_weights_are_kept_and_training_ends_early(student, tmp_path, monkeypatch):
    config, metrics = pretrained(student, tmp_path, differ=True, share=0.2, steps=400, validate_every=15, patience=2)
    history = metrics["history"]
    assert metrics["held_out_accuracy"] > 0.9 and metrics["held_out_auc"] > 0.9
    assert metrics["steps"] < 400 and metrics["steps"] == history[-1]["step"] == metrics["best_step"] + 30
    assert [look["step"] for look in history] == list(range(15, metrics["steps"] + 1, 15))
    best = max(history, key=lambda look: (look["accuracy"], look["auc"]))
    assert best["step"] == metrics["best_step"] and best["accuracy"] == metrics["held_out_accuracy"]
    by_source = metrics["held_out_accuracy_by_source"]
    assert by_source.keys() == {"student", "a", "b"}
    teachers = (by_source["a"] + by_source["b"]) / 2  # as many of each
    assert metrics["held_out_accuracy"] == pytest.approx((by_source["student"] + teachers) / 2)
    again = Adversary.pretrained(config, student, tmp_path)
    held = by_question(saved(0, differ=True), 0.2)[1]
    look = HeldOut(again, held).look()
    assert {"step": best["step"], **look} == best
    monkeypatch.setattr(ril_adversary, "HELD_OUT", 5)  # of many a look takes the first
    some = HeldOut(again, held)
    assert len(some.sources) == 5 and set(some.sources) == {"student", "a", "b"} and 0 <= some.look()["auc"] <= 1


def test_no_step_leaves_d_as_it_starts(student, tmp_path):
    _, metrics = pretrained(student, tmp_path, differ=True, steps=0)
    assert metrics["held_out_accuracy"] == metrics["held_out_auc"] == 0.5 and metrics["steps"] == 0
