"""verl's own fused forwards and policy losses, with and without this project's ops behind them."""

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("verl", reason="verl (requirements.peers.txt) is not installed")
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.experimental import torch_functional
from verl.utils.kernel import linear_cross_entropy as triton_backend

THEIRS = torch_functional.FusedLinearForPPO.forward
adapter = importlib.import_module("ril_engine.integrations.verl")  # changes what verl calls, as it does in a job
OURS = torch_functional.FusedLinearForPPO.forward
B, S = 3, 8
CONFIG = {"clip_ratio": 0.2, "clip_ratio_low": 0.1, "clip_ratio_high": 0.3}


class Actor(SimpleNamespace):
    """What the losses read of verl's ActorConfig."""

    def get(self, name, default):
        return getattr(self, name, default)


@pytest.fixture
def model(monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = Qwen2ForCausalLM(Qwen2Config(vocab_size=37, num_key_value_heads=1, initializer_range=0.3, **sizes))
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", Qwen2ForCausalLM.forward)  # verl changes the class
    return made


def results(model) -> list[torch.Tensor]:
    ids = torch.randint(37, (1, 11), generator=torch.Generator().manual_seed(0))
    out = model(input_ids=ids, temperature=0.7, return_dict=True)
    total = (out.log_probs.flatten() * torch.linspace(-1, 1, 11)).sum() - 0.1 * out.entropy.sum()
    values = [out.log_probs.detach().flatten(), out.entropy.detach().flatten()]
    return values + list(torch.autograd.grad(total, list(model.parameters())))


def test_its_fused_forwards_give_what_they_gave(model, monkeypatch):
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    monkeypatch.setattr(torch_functional.FusedLinearForPPO, "forward", THEIRS)
    expected = results(model)
    monkeypatch.setattr(torch_functional.FusedLinearForPPO, "forward", OURS)
    for backend in ("torch", "triton"):
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
        for got, true in zip(results(model), expected, strict=True):
            assert float(true.abs().max()) > 1e-3
            torch.testing.assert_close(got, true, rtol=0, atol=1e-5 * max(1.0, float(true.abs().max())))


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(B, S, generator=generator) for name in ("log_prob", "old_log_prob", "advantages")}
    made["old_log_prob"] = made["log_prob"] + 0.3 * made["old_log_prob"]
    made["response_mask"] = (torch.arange(S) < torch.tensor([[8], [5], [2]])).float()
    return made


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("mode", "batch"),
    [
        ("token-mean", {}),
        ("token-mean", {"dp_size": 2, "batch_num_tokens": 40}),
        ("seq-mean-token-mean", {}),
        ("seq-mean-token-sum", {"dp_size": 2, "global_batch_size": 6}),
        ("seq-mean-token-sum-norm", {"loss_scale_factor": 512}),
    ],
)
def test_the_loss_is_vanilla_without_its_dual_clip(mode, batch, weighted):
    actor = Actor(**CONFIG, clip_ratio_c=1e6, global_batch_info=batch)
    weights = torch.rand(B, S, generator=torch.Generator().manual_seed(1)) if weighted else None
    found = []
    for name in ("vanilla", "ril"):
        given = inputs()
        given["log_prob"].requires_grad_()
        loss, metrics = get_policy_loss_fn(name)(**given, loss_agg_mode=mode, config=actor, rollout_is_weights=weights)
        (gradient,) = torch.autograd.grad(loss, given["log_prob"])
        assert 0 < metrics["actor/pg_clipfrac"] < 1
        found.append((loss.detach(), gradient, metrics["actor/ppo_kl"]))
    for got, true in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(true), rtol=1e-5, atol=1e-6)


def test_a_teachers_token_has_a_ratio_of_one():
    actor, given = Actor(**CONFIG, global_batch_info={}), inputs()
    given["old_log_prob"][1] = float("nan")
    given["log_prob"].requires_grad_()
    loss, _ = get_policy_loss_fn("ril")(**given, loss_agg_mode="seq-mean-token-sum", config=actor)
    loss.backward()
    expected = -given["advantages"][1] * given["response_mask"][1] / B
    torch.testing.assert_close(given["log_prob"].grad[1], expected)


def test_a_head_that_is_split_over_ranks_is_left_to_verl(monkeypatch):
    """Megatron models give their group, also where it is of one rank."""
    given = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]), 1.0, "none"
    calls = []
    monkeypatch.setattr(adapter, "_theirs", lambda *args: calls.append(args))
    one, two = (SimpleNamespace(size=lambda count=count: count) for count in (1, 2))
    logprobs, _ = triton_backend.linear_cross_entropy(*given, one)
    torch.testing.assert_close(logprobs, torch.full((2,), 0.25).log())
    assert not calls
    triton_backend.linear_cross_entropy(*given, two)
    assert calls == [(*given, two)]


def test_verl_itself_loads_it():
    script = (
        "import verl; from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY;print('ril' in POLICY_LOSS_REGISTRY)"
    )
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "ril_engine.integrations.verl"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr[-2000:]
