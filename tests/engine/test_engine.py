"""The engine's own parts: the learning-rate schedule, and updates that are left out."""

import math

import pytest
import torch
from torch.utils._pytree import tree_leaves

from ril_engine.config import DeepSpeedConfig
from ril_engine.engine import Engine
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
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
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
            weights.append(module.weight.detach().clone())
        return weights, seen, engine.engine.optimizer.state_dict()

    weights, seen, state = train([[0.0, 0.0], [0.0, bad], [bad, 0.0], [0.0, 0.0], [0.0, 0.0]])
    expected, finite, expected_state = train([[0.0, 0.0]] * 3)
    assert [math.isfinite(each["grad_norm"]) for each in seen] == [True, False, False, True, True]
    assert weights[0].equal(weights[1]) and weights[0].equal(weights[2]) and not weights[0].equal(weights[3])
    assert weights[4].equal(expected[2]) and seen[4] == finite[2]
    assert torch.equal(flat(state), flat(expected_state))


def flat(state) -> torch.Tensor:
    """All tensors of a nested state, one after another."""
    return torch.cat([leaf.double().flatten() for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)])
