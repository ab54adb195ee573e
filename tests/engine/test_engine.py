"""The engine's own parts: the learning-rate schedule, and updates that are left out."""

import gc
import math

import pytest
import torch
from torch.utils._pytree import tree_leaves

from ril_engine.config import DeepSpeedConfig
from ril_engine.engine import Engine, to_deepspeed
from ril_engine.errors import UserError


@pytest.mark.usefixtures("alone")
def test_learning_rate_warms_up_falls_and_stays(tmp_path):
    module = torch.nn.Linear(2, 1)
    rates = {"learning_rate": 1.0, "final_learning_rate": 0.2, "warmup_steps": 2, "final_steps": 3}
    engine = Engine(module, config=DeepSpeedConfig(), steps=10, **rates)
    seen = []
    for _ in range(10):
        engine.backward(engine(torch.ones(1, 2)).sum(), last=True)
        seen.append(engine.step()["learning_rate"])
    with pytest.raises(UserError, match=r"checkpoint .*none: no state/\*.pt there; start a new run"):
        engine.load(tmp_path / "none")
    assert seen == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2, 0.2])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_update_that_is_not_finite_changes_nothing(zero_stage, bf16, bad):
    """Losses of the micro-batches of five updates, the second and third bad; the others end where they end alone."""
    inputs = torch.linspace(-1, 1, 6).view(3, 2)

    def train(updates: list[list[float]]) -> tuple[list[float], list[dict], dict]:
        torch.manual_seed(0)
        module = torch.nn.Linear(2, 1)
        settings = DeepSpeedConfig(zero_stage=zero_stage, bf16=bf16)
        engine = Engine(module, config=settings, steps=10, learning_rate=0.1, final_learning_rate=0.01)
        weights, seen = [], []
        for factors in updates:
            for i, factor in enumerate(factors):
                rows = inputs[i : i + 1].to(module.weight.dtype)
                engine.backward(engine(rows).float().square().sum() + factor, last=i == len(factors) - 1)
            seen.append(engine.step())
            with engine.gathered():
                weights.append(module.weight.detach().clone())
        return weights, seen, engine.engine.optimizer.state_dict()

    weights, seen, state = train([[0.0, 0.0], [0.0, bad], [bad, 0.0], [0.0, 0.0], [0.0, 0.0]])
    expected, finite, expected_state = train([[0.0, 0.0]] * 3)
    assert [math.isfinite(each["grad_norm"]) for each in seen] == [True, False, False, True, True]
    assert weights[0].equal(weights[1]) and weights[0].equal(weights[2]) and not weights[0].equal(weights[3])
    assert weights[4].equal(expected[2]) and seen[4] == finite[2]
    assert torch.equal(flat(state), flat(expected_state))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_states_come_back_from_the_host_as_they_went(zero_stage, tmp_path, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # DeepSpeed collects garbage at each move, which takes a second here
    inputs = torch.linspace(-1, 1, 6).view(3, 2)

    def train(offload_idle: bool, steps: int, engine: Engine | None = None) -> Engine:
        torch.manual_seed(0)
        settings = DeepSpeedConfig(zero_stage=zero_stage, offload_idle=offload_idle)
        engine = engine or Engine(torch.nn.Linear(2, 1), config=settings, steps=10, learning_rate=0.1)
        if offload_idle:  # DeepSpeed's Adam, too
            assert type(engine.engine.basic_optimizer).__name__ == "FusedAdam"
        for _ in range(steps):
            engine.wake()
            engine.backward(engine(inputs).square().sum(), last=True)
            engine.step()
            engine.rest()
        return engine

    def weights(engine: Engine) -> torch.Tensor:
        with engine.gathered():
            return flat({name: each.clone() for name, each in engine.module.state_dict().items()})

    def found(engine: Engine) -> torch.Tensor:
        return torch.cat([weights(engine), flat(engine.engine.optimizer.state_dict())])

    kept, moved = train(False, 3), train(True, 3)
    assert moved.resting and not kept.resting
    moved.save(tmp_path)
    assert moved.resting
    saved = [repr(torch.load(path, weights_only=False)) for path in tmp_path.glob("state/*.pt")]
    assert len(saved) == 2 and not any("offload_buffer" in each for each in saved)
    moved.wake()
    before = found(moved)
    moved.rest()
    moved.wake()
    assert found(moved).equal(before)
    torch.testing.assert_close(weights(moved), weights(kept))  # torch's AdamW and DeepSpeed's
    other = train(True, 1)
    other.load(tmp_path)
    whole, resumed = train(True, 2, moved), train(True, 2, other)
    assert found(whole).equal(found(resumed)) and not found(whole).equal(before)


@pytest.mark.usefixtures("alone")
def test_further_settings_reach_deepspeed():
    extra = {"zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    settings = to_deepspeed(DeepSpeedConfig(zero_stage=2, extra=extra), max_grad_norm=0.5)
    zero = {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1000}
    assert settings["zero_optimization"] == zero and settings["wall_clock_breakdown"]
    assert settings["gradient_clipping"] == 0.5 and settings["bf16"] == {"enabled": False}
    engine = Engine(
        torch.nn.Linear(2, 1), config=DeepSpeedConfig(zero_stage=2, extra=extra), steps=1, learning_rate=0.1
    )
    assert engine.engine.zero_reduce_bucket_size() == 1000
    for wrong, message in (
        ({"overlap_com": False}, "overlap_com Extra inputs are not permitted"),
        ({"reduce_bucket_size": -1}, "reduce_bucket_size Input should be greater than 0"),
    ):
        with pytest.raises(UserError, match=rf"^deepspeed.extra: DeepSpeed refuses .*{message}.*; mend or remove it$"):
            to_deepspeed(DeepSpeedConfig(extra={"zero_optimization": wrong}), max_grad_norm=1.0)


def flat(state) -> torch.Tensor:
    """All tensors of a nested state, one after another."""
    return torch.cat([leaf.double().flatten() for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)])
