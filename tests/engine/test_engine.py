"""The engine's own parts: the learning-rate schedule."""

import pytest
import torch

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
