"""The README's code runs as it stands there; tests/integrations runs what concerns TRL."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def python_blocks(about: str) -> list[str]:
    """The README's blocks of Python that hold `about`."""
    return [block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if about in block]


def test_the_loss_in_a_users_trainer():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(11, 4, generator=generator))
    given = {
        "hidden": torch.randn(6, 4, generator=generator, requires_grad=True),
        "model": SimpleNamespace(lm_head=SimpleNamespace(weight=weight)),
        "target": torch.randint(11, (6,), generator=generator),
        "response_index": torch.tensor([0, 0, 1, 1, 1, 1]),
        "rewards": torch.tensor([1.0, 0.0]),
        "groups": torch.tensor([0, 0]),
        "behavior_logprobs": None,
        "num_responses": 2,
        "max_new_tokens": 8,
    }
    (block,) = python_blocks("from ril_kernels import policy_loss")
    exec(block, given)
    # At a ratio of 1: -(2 tokens of +0.5 and 4 of -0.5) / (2 x 8).
    assert float(given["loss"].detach()) == pytest.approx((4 - 2) * 0.5 / 16)
    assert float(weight.grad.abs().sum()) > 0 and float(given["hidden"].grad.abs().sum()) > 0


def test_every_block_is_run_by_some_test():
    assert len(python_blocks("")) == len(python_blocks("ril_kernels import")) + len(python_blocks("integrations.trl"))


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", README.read_text())
    assert links and not [each for each in links if "://" not in each and not (README.parent / each).exists()]
