"""TRL 1.16 with the fused log-probs: results as with TRL's own head, and a tiny VLM that GRPOTrainer trains."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL (extra `dev`, Python 3.11 or later) is not installed")
from datasets import Dataset
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from benchmarks.runner import peak_mib
from ril_engine import digits, tiny_models
from ril_engine.adversary import WEIGHTS
from ril_engine.config import ModelConfig
from ril_engine.discriminator import new_discriminator
from ril_engine.integrations.trl import RILMixin, use_fused_head
from tests.integrations.ril_trainer_job import STEPS as JOB_STEPS
from tests.integrations.ril_trainer_job import TEACHER
from tests.test_readme import python_blocks

ROOT = Path(__file__).parents[2]

H, V, STEPS = 16, 37, 10


def tiny(tied: bool = False, bias: bool = False, **settings) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    for name, value in settings.items():
        setattr(config, name, value)
    model = Qwen2ForCausalLM(config).train()
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(V))
    return model


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (3, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :3] = labels[1, 5:] = -100  # a prompt, and padding
    return ids, labels


def results(model: nn.Module, **settings) -> list[Tensor]:
    """Log-probs, entropies, loss, and the gradients of a sum of both."""
    ids, labels = batch()
    out = model(input_ids=ids, labels=labels, fused_lm_head=True, **settings)
    total = out.loss if out.entropy is None else out.loss - 0.1 * out.entropy.sum()
    assert torch.equal(out.label_mask, labels[:, 1:] != -100)
    values = [each.detach() for each in (out.log_probs, out.entropy, out.loss) if each is not None]
    return values + list(torch.autograd.grad(total, list(model.parameters())))


@pytest.mark.parametrize("outputs", [("log_probs", "entropy"), ("log_probs",)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tied": True, "logit_scale": 0.5},
        {"bias": True, "final_logit_softcapping": 3.0},
        {"bias": True, "final_logit_softcapping": 3.0, "logit_scale": 2.0},
    ],
    ids=str,
)
def test_a_model_gives_what_it_gives_with_trls_head(settings, outputs):
    model = tiny(**settings)
    add_fused_lm_head(model, temperature=0.9, outputs=outputs)
    ids, labels = batch()
    calls = [{}, {"num_items_in_batch": torch.tensor(5)}]
    expected = [results(model, **call) for call in calls]
    plain = model(input_ids=ids, labels=labels)
    use_fused_head(model)
    for call, before in zip(calls, expected, strict=True):
        for ours, theirs in zip(results(model, **call), before, strict=True):
            assert float(theirs.abs().max()) > 1e-3
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))
    again = model(input_ids=ids, labels=labels)
    assert torch.equal(again.logits, plain.logits) and torch.equal(again.loss, plain.loss)


@pytest.mark.parametrize(("dtype", "autocast"), [("bfloat16", False), ("float32", True)])
@pytest.mark.parametrize("exact", [False, True], ids=["", "cast_lm_head_to_fp32"])
def test_dtypes_are_trls(dtype, autocast, exact):
    model = tiny().to(getattr(torch, dtype))
    add_fused_lm_head(model, outputs=("log_probs", "entropy"), cast_lm_head_to_fp32=exact)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = results(model)
        use_fused_head(model)
        actual = results(model)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * float(theirs.abs().max()))


def test_no_token_that_counts_is_a_loss_of_zero_with_a_graph():
    model = tiny()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    use_fused_head(model)
    ids, labels = batch()
    loss = model(input_ids=ids, labels=torch.full_like(labels, -100), fused_lm_head=True).loss
    loss.backward()
    assert float(loss.detach()) == 0 and all(float(each.grad.abs().max()) == 0 for each in model.parameters())


def test_what_cannot_be_replaced_is_refused():
    model = tiny()
    with pytest.raises(TypeError, match=r"Qwen2ForCausalLM\.forward, expected one with TRL 1\.16's fused head"):
        use_fused_head(model)
    add_fused_lm_head(model, outputs=("log_probs", "mean_logits", "is_top1"))
    with pytest.raises(ValueError, match="loss reads is_top1 and mean_logits, expected log_probs and entropy alone"):
        use_fused_head(model)


def digits_share(completions, **columns) -> list[float]:
    """A reward that differs among the answers of a model with random weights."""
    return [sum(c.isdigit() for c in each[0]["content"]) / max(1, len(each[0]["content"])) for each in completions]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    tiny_models.build(folder, "tiny:student", [], seed=0)
    return folder


def grpo(student, out) -> GRPOTrainer:
    pictures = torch.randint(0, 256, (8, 28, 56, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    questions = [*digits.QUESTIONS.values()][:4] * 2
    rows = {
        "prompt": [[{"role": "user", "content": question}] for question in questions],
        "image": [Image.fromarray(each.numpy()) for each in pictures],
    }
    arguments = GRPOConfig(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        seed=0,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=12,
        beta=0.04,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    return GRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(student),
        processing_class=AutoProcessor.from_pretrained(student),
        reward_funcs=digits_share,
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
    )


def a_pass(model: nn.Module) -> None:
    """Forward and backward of 8 sequences, a quarter of their tokens scored."""
    ids = torch.ones(8, 256, dtype=torch.int64)
    labels = ids.masked_fill(torch.arange(256) < 192, -100)
    model(input_ids=ids, labels=labels, fused_lm_head=True).loss.backward()


def test_ten_steps_of_a_vlm_are_trls_own_with_less_memory(student, tmp_path):
    histories, peaks = [], []
    for fused in (False, True):
        trainer = grpo(student, tmp_path / str(fused))
        if fused:
            (block,) = (each for each in python_blocks("use_fused_logprob(trainer)"))
            exec(block, {"trainer": trainer})
        trainer.train()
        histories.append([row for row in trainer.state.log_history if "loss" in row])
        peaks.append(peak_mib(partial(a_pass, trainer.model.train()), "cpu"))
    theirs, ours = histories
    assert len(theirs) == len(ours) == STEPS
    for name in ("loss", "kl", "entropy", "reward", "grad_norm"):
        values = torch.tensor([[row[name] for row in rows] for rows in (theirs, ours)], dtype=torch.float64)
        assert len(set(values[0].tolist())) > STEPS // 2
        torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-5 if name != "grad_norm" else 1e-4)
    assert peaks[1] < 0.8 * peaks[0], peaks


@pytest.mark.parametrize("room", [-1, 0, 1])
def test_a_teachers_text_ends_as_a_students_would(student, room):
    """With an EOS, or cut at the limit and without one; D and the rewards read the same."""
    tokenizer = AutoProcessor.from_pretrained(student).tokenizer
    ids = tokenizer("It shows 1 2", add_special_tokens=False)["input_ids"]
    limit = len(ids) + room
    trainer = SimpleNamespace(_tokenizer=tokenizer, max_completion_length=limit)
    text, got = RILMixin._response(trainer, "It shows 1 2")
    assert got == ([*ids, tokenizer.eos_token_id] if room == 1 else ids[:limit])
    assert text == tokenizer.decode(ids[:limit])


def test_a_checkpoint_without_d_is_refused(tmp_path):
    class Loads:
        def _load_optimizer_and_scheduler(self, checkpoint) -> None: ...

    class Trainer(RILMixin, Loads):
        def __init__(self):
            self._adversary = SimpleNamespace(engine=object())

    with pytest.raises(ValueError, match="which has no discriminator, expected a checkpoint of a RIL trainer"):
        Trainer()._load_optimizer_and_scheduler(str(tmp_path))
    Trainer()._load_optimizer_and_scheduler(None)  # a new run


def test_too_few_teacher_responses_are_refused():
    trainer = SimpleNamespace(_rows=[{"teacher_responses": [["a"], ["b"]]}])
    with pytest.raises(ValueError, match="teacher_responses: got 2 texts for a question, expected at least 3"):
        RILMixin._teachers(trainer, 0, 3)


@pytest.mark.distributed
def test_ril_on_two_ranks(tmp_path):
    """Half of each group is the teacher's, D learns the same on both ranks to tell the halves apart, and pays."""
    tiny_models.build(tmp_path / "student", "tiny:student", [], seed=0)
    module, _ = new_discriminator(ModelConfig(path=str(tmp_path / "student")))
    save_file({name: value.clone() for name, value in module.state_dict().items()}, tmp_path / WEIGHTS)
    job, environment = Path(__file__).with_name("ril_trainer_job.py"), {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", job, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert one["discriminator"] == other["discriminator"] == one["loaded"]  # from the trainer's checkpoint
    places = [(rank, step) for rank in (one, other) for step in range(JOB_STEPS)]
    for rank in (one, other):
        assert len(rank["seen"]) == JOB_STEPS
        for texts in rank["seen"]:  # of two groups of four
            sides = [text in TEACHER for text in texts]
            assert sides == [False, False, True, True] * 2
            for pair in (texts[2:4], texts[6:8]):  # of two teachers, one each
                assert sum(text in TEACHER[:2] for text in pair) == 1
    picks = [[TEACHER.index(text) for text in rank["seen"][step] if text in TEACHER[:2]] for rank, step in places]
    assert {pick for some in picks for pick in some} == {0, 1}
    assert any(some[0] != some[1] for some in picks)  # groups of a step draw for themselves
    steps = [row for row in one["history"] if "loss" in row]
    assert [row["discriminator/updates"] for row in steps] == [1.0] * JOB_STEPS
    assert steps[-1]["discriminator/accuracy"] > 0.9 and steps[-1]["loss/discriminator"] < 0.65
    assert all(row["reward/teacher_similarity"] == 1.0 for row in steps[1:])
    for row in steps:
        paid = (row["reward/student_similarity"] + row["reward/teacher_similarity"]) / 2
        assert row["rewards/similarity/mean"] == pytest.approx(paid)
        assert row["reward"] == pytest.approx(row["rewards/digits_share/mean"] + paid, abs=1e-4)
