"""The GPU path waits for nothing: meta tensors stand for those on a GPU, and no value can be read from them."""

import importlib

import pytest
import torch

from ril_kernels import discriminator_head, policy_loss, token_logprob
from ril_kernels.token_logprob import chunks

T, H, V = 6, 16, 50


@pytest.fixture
def gpu(monkeypatch):
    """A device whose tensors have shapes and dtypes only, on which the ops run as on a GPU."""
    for op in ("discriminator_head", "policy_loss", "token_logprob"):
        module = importlib.import_module(f"ril_kernels.{op}.op")
        monkeypatch.setattr(module, "resolve_backend", lambda backend, hidden: "triton")
    advantages = importlib.import_module("ril_kernels.policy_loss.advantages")
    monkeypatch.setattr(advantages, "_resolve_backend", lambda backend, rewards: "triton")
    monkeypatch.setattr(chunks, "MAX_CHUNK_ROWS", 4)  # more than one chunk
    return torch.device("meta")


@pytest.mark.parametrize(
    "sync",
    [
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.to("cpu", non_blocking=True),
    ],
)
def test_a_sync_is_seen(gpu, sync):
    with pytest.raises((RuntimeError, NotImplementedError)):
        sync(torch.ones(3, device=gpu))


def head(gpu: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    hidden = torch.zeros(T, H, device=gpu, dtype=dtype, requires_grad=True)
    return hidden, torch.zeros(V, H, device=gpu, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("options", [{}, {"loss_type": "grpo", "beta": 0.1}, {"loss_type": "cispo", "clip_high": 2.0}])
@pytest.mark.parametrize("host_side", [True, False])
def test_policy_loss(gpu, options, level, host_side):
    if level == "sequence" and options.get("loss_type") == "cispo":
        options = {"loss_type": "bnpo"}
    hidden, lm_head = head(gpu)
    side = torch.device("cpu") if host_side else gpu
    index = torch.arange(T).to(side) // 3
    given = {"rewards": torch.tensor([1.0, 0.0]).to(side), "groups": torch.zeros(2, dtype=torch.int64).to(side)}
    if options.get("beta"):
        given["reference_logprobs"] = torch.zeros(T, device=gpu)
    loss, metrics = policy_loss(
        hidden,
        lm_head,
        torch.zeros(T, dtype=torch.int64, device=gpu),
        response_index=index,
        mask=(torch.arange(T) != 2).to(side),
        behavior_logprobs=torch.zeros(T, device=gpu),
        norm=6.0,
        ratio_level=level,
        **given,
        **options,
    )
    loss.backward()
    assert hidden.grad.shape == (T, H) and lm_head.grad.shape == (V, H) and metrics.logprobs.shape == (T,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_logprob(gpu, dtype):
    hidden, lm_head = head(gpu, dtype)
    target = torch.zeros(T, dtype=torch.int64, device=gpu)
    logprob, entropy = token_logprob(hidden, lm_head, target, return_entropy=True, softcap=5.0)
    (logprob.sum() + entropy.sum()).backward()
    assert logprob.shape == (T,) and hidden.grad.shape == (T, H) and lm_head.grad.dtype == dtype


@pytest.mark.parametrize("final_norm", ["rms", "layer", None])
def test_discriminator_head(gpu, final_norm):
    hidden = torch.zeros(T, H, device=gpu, requires_grad=True)
    names = {"rms": ("norm_weight",), "layer": ("norm_weight", "norm_bias"), None: ()}[final_norm]
    head = {name: torch.zeros(H, device=gpu, requires_grad=True) for name in names}
    head |= {"weight": torch.zeros(1, H, device=gpu, requires_grad=True), "bias": torch.zeros(1, device=gpu)}
    rows = {"last_index": torch.zeros(3, dtype=torch.int64, device=gpu), "labels": torch.zeros(3, device=gpu)}
    rows["label_weights"] = torch.ones(3, device=gpu)
    out = discriminator_head(hidden, **head, **rows, final_norm=final_norm, norm=3.0)
    (out.loss + out.logits.sum()).backward()
    assert hidden.grad.shape == (T, H) and head["weight"].grad.shape == (1, H) and out.scores.shape == (3,)
