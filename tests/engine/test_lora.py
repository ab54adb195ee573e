"""LoRA students: without their adapters they are the reference, and what they leave is a plain checkpoint."""

import copy
import math

import pytest
import torch

from ril_engine import checkpoints, tiny_models
from ril_engine.config import LoraConfig, ModelConfig, SamplingConfig
from ril_engine.errors import UserError
from ril_engine.families import adapt, language_model
from ril_engine.loop import average
from ril_engine.lora import add_adapters, merged, without
from ril_engine.models import Encoder, load
from ril_engine.policy import Policy
from ril_engine.rollout import PaddedRollout, Rollout
from ril_engine.runlog import PhaseTimer

CPU = torch.device("cpu")
QUESTIONS = [
    {"id": str(i), "question": text} for i, text in enumerate(("What is it?", "left digit", "the sum of both"))
]


def moved(model) -> None:
    """As after some updates: adapters that begin at 0 do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1, generator=generator)


@pytest.fixture(scope="module", params=["student", "internvl_teacher"])
def adapted(request, tmp_path_factory):
    """The model without adapters, with them, their handle, an encoder, and the model that was exported."""
    folder = tmp_path_factory.mktemp("model")
    tiny_models.build(folder / "start", f"tiny:{request.param}", [], seed=0)
    model, processor = load(ModelConfig(path=str(folder / "start")))
    plain = copy.deepcopy(model)
    adapters = add_adapters(model, LoraConfig(rank=4, alpha=8), seed=1)
    moved(model)
    model.save_pretrained(folder / "out", state_dict=merged(model))
    processor.save_pretrained(folder / "out")
    exported, _ = load(ModelConfig(path=str(folder / "out")))
    for each in (plain, model, exported):
        adapt(language_model(each.eval()), "shared", CPU)
    return plain, model, adapters, Encoder(plain, processor, folder, 10_000), exported


def logprobs(model, encoder: Encoder, packing: str) -> torch.Tensor:
    rows, ids = [row for row in QUESTIONS for _ in range(2)], [[5 + i, 6, 7 + i] for i in range(6)]
    with torch.no_grad():
        return Policy(model)(encoder.batch(rows, ids, packing))


@pytest.mark.parametrize("packing", ["shared", "packed", "padded"])
def test_off_it_is_the_model_it_began_as_and_merged_it_is_the_same(adapted, packing):
    plain, model, adapters, encoder, exported = adapted
    on, want = logprobs(model, encoder, packing), logprobs(plain, encoder, packing)
    assert (on - want).abs().min() > 1e-3
    with without(adapters):
        assert torch.equal(logprobs(model, encoder, packing), want)
    assert torch.equal(logprobs(model, encoder, packing), on)
    torch.testing.assert_close(logprobs(exported, encoder, packing), on, rtol=1e-5, atol=1e-5)
    assert exported.state_dict().keys() == plain.state_dict().keys()


def test_it_generates_with_its_adapters(adapted):
    plain, model, _, encoder, exported = adapted
    asked, settings = list(enumerate(QUESTIONS)), SamplingConfig(max_new_tokens=8)

    def greedy(make, model) -> list[list[int]]:
        return [each.ids for (each,) in make(model, encoder, settings).generate(asked, 1, seed=0, greedy=True)]

    want = greedy(Rollout, exported)
    assert greedy(Rollout, model) == greedy(PaddedRollout, model) == want != greedy(Rollout, plain)


def test_only_adapters_of_the_language_model_are_trained(adapted):
    _, model, _, encoder, _ = adapted
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = model.config.text_config.num_hidden_layers
    assert len(trained) == layers * 7 * 2 and all(".language_model.layers." in name for name in trained)
    policy = Policy(model)
    policy(encoder.batch(QUESTIONS, [[5, 6]] * 3, "shared")).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)
    policy.zero_grad()


def test_a_layer_that_is_not_there_is_named(adapted):
    plain = copy.deepcopy(adapted[0])
    with pytest.raises(UserError, match=r"no linear layer 'c_attn' in .*; expected some of .*k_proj, o_proj"):
        add_adapters(plain, LoraConfig(target_modules=["q_proj", "c_attn"]), 0)
    add_adapters(plain, LoraConfig(target_modules=["q_proj"]), 0)
    layers = plain.config.text_config.num_hidden_layers
    assert sum(each.requires_grad for each in plain.parameters()) == 2 * layers


@pytest.mark.parametrize("deepspeed", [{}, {"zero_stage": 2}, {"zero_stage": 1, "bf16": True}], ids=str)
def test_the_loop_trains_adapters_and_resumes(job, tmp_path, deepspeed):
    make, questions = job
    changes = {"lora": {"rank": 4, "dropout": 0.1}, "updates_per_step": 1, "micro_batch_tokens": 300}
    start = make(beta=0.0).policy.model.state_dict()
    loop = make(deepspeed=deepspeed, **changes)
    metrics, _ = loop.step(0, questions, PhaseTimer())
    assert average(metrics)["kl"] == 0 and not isinstance(loop.reference, torch.nn.Module)
    metrics, _ = loop.step(1, questions, PhaseTimer())
    assert average(metrics)["kl"] > 0 and metrics["grad_norm/student"] > 0
    (tmp_path / "config.yaml").touch()
    checkpoints.save(tmp_path, 2, loop.engines, {}, keep=1)
    (saved,) = tmp_path.glob("checkpoints/*/student/state/mp_rank_00_model_states.pt")
    weights = torch.load(saved, weights_only=False)["module"]
    assert weights and all(".lora_" in name for name in weights)
    expected = average(loop.step(2, questions, PhaseTimer())[0])
    fresh = make(deepspeed=deepspeed, **changes)
    checkpoints.load(checkpoints.newest_whole(tmp_path), fresh.engines)
    assert average(fresh.step(2, questions, PhaseTimer())[0]) == expected
    assert all(math.isfinite(value) for value in expected.values())
    for name, value in merged(loop.policy.model).items():
        assert value.dtype == (torch.bfloat16 if "bf16" in deepspeed else torch.float32)
        adapted = ".language_model.layers." in name and name.endswith("_proj.weight")
        assert torch.equal(value, start[name].to(value.dtype)) != adapted, name
