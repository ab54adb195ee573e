"""Run by test_triton.py in a process of its own with TRITON_INTERPRET=1: the Triton kernels on CPU tensors."""

import importlib

import numpy as np
import pytest
import torch
from test_fused import exact, logprob_results, loss_results
from triton.runtime.interpreter import InterpreterBuilder

from ril_kernels.policy_loss.reference import CASES as LOSS_CASES
from ril_kernels.policy_loss.reference import make_inputs as loss_inputs
from ril_kernels.token_logprob.reference import CASES, make_inputs

# `import ... as` would find the function token_logprob, which hides the package of its name.
kernels = importlib.import_module("ril_kernels.token_logprob.triton")


@pytest.fixture(autouse=True, params=[16, 64, 8192], ids=lambda block: f"block {block}")
def block(request, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # bfloat16: see test_bfloat16
@pytest.mark.parametrize("case", CASES)
def test_token_logprob(case, dtype, assert_accurate):
    inputs = make_inputs(case, dtype)
    truth, peer = logprob_results(exact(inputs), "reference"), logprob_results(inputs, "reference")
    for got, true, usual in zip(logprob_results(inputs, "triton"), truth, peer, strict=True):
        assert_accurate(got, true.double(), usual)


@pytest.mark.parametrize("case", LOSS_CASES)
def test_policy_loss(case, assert_accurate):
    inputs = loss_inputs(case)
    truth, peer = loss_results(exact(inputs), "reference")[0], loss_results(inputs, "reference")[0]
    for got, true, usual in zip(loss_results(inputs, "triton")[0], truth, peer, strict=True):
        assert_accurate(got, true.double(), usual)


def rows(num_vocab: int, dtype: torch.dtype, stride: int) -> tuple:
    """Logits with rows that do not count, that are idle and that hold infinities; gradients for them."""
    generator = torch.Generator().manual_seed(0)
    buffer = torch.full((6, stride), float("nan"), dtype=dtype)  # padding: what lies there must not matter
    logits = buffer[:, :num_vocab]
    logits.copy_(4 * torch.randn(6, num_vocab, generator=generator))
    logits[3, 2:] = -torch.inf
    logits[4, : num_vocab // 2] = -torch.inf
    target = torch.tensor([0, num_vocab - 1, -1, 1, num_vocab - 2, 5])
    grads = torch.randn(2, 6, generator=generator)
    grads[:, 5] = 0.0
    return logits, target, torch.rand(6, generator=generator) + 0.5, grads


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("num_vocab", [7, 37, 150])
def test_rows_against_cpp(num_vocab, softcap, padded):
    stride = -(-num_vocab // 16) * 16 if padded else num_vocab
    logits, target, temperature, grads = rows(num_vocab, torch.float32, stride)
    copy = logits.contiguous()
    expected = torch.ops.ril_kernels.logits_stats(copy, target, temperature, softcap)
    actual = kernels.logits_stats(logits, target, temperature, softcap)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
    torch.ops.ril_kernels.logits_grad(copy, target, temperature, softcap, expected[2], expected[1], *grads)
    kernels.logits_grad(logits, target, temperature, softcap, actual[2], actual[1], *grads)
    torch.testing.assert_close(logits, copy, rtol=2e-6, atol=2e-6)
    assert (logits[2] == 0).all() and (logits[5] == 0).all()


def test_bfloat16():
    # The interpreter truncates float32 to bfloat16 where a GPU rounds: one unit in the last place, 2^-7 relative.
    logits, target, temperature, grads = rows(37, torch.bfloat16, 48)
    wide = logits.float().contiguous()
    expected = torch.ops.ril_kernels.logits_stats(wide, target, temperature, 0.0)
    actual = kernels.logits_stats(logits, target, temperature, 0.0)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
    torch.ops.ril_kernels.logits_grad(wide, target, temperature, 0.0, expected[2], expected[1], *grads)
    kernels.logits_grad(logits, target, temperature, 0.0, actual[2], actual[1], *grads)
    torch.testing.assert_close(logits.float(), wide, rtol=2**-7, atol=1e-38)


def test_traffic(monkeypatch):
    """Global traffic of the logits: one read in the no-grad pass, two reads and one write in the training pass."""
    num_vocab = 150
    logits, target, temperature, grads = rows(num_vocab, torch.float32, 160)
    first, last = logits.data_ptr(), logits.data_ptr() + logits.untyped_storage().nbytes()
    count = {"read": 0, "write": 0}

    def counted(kind: str, function):
        def run(self, pointers, *arguments):
            mask = arguments[0 if kind == "read" else 1]
            inside = (pointers.data >= first) & (pointers.data < last)
            count[kind] += int(np.count_nonzero(inside & mask.data.astype(bool)))
            return function(self, pointers, *arguments)

        return run

    for kind, name in (("read", "create_masked_load"), ("write", "create_masked_store")):
        monkeypatch.setattr(InterpreterBuilder, name, counted(kind, getattr(InterpreterBuilder, name)))
    _, entropy, lse = kernels.logits_stats(logits, target, temperature, 0.0)
    padding, chosen, live = 10, 1, 5  # of 16 elements per row; the target's logit is read again; rows that count
    assert count == {"read": live * (num_vocab + padding + chosen), "write": 0}
    count.update(read=0)
    kernels.logits_grad(logits, target, temperature, 0.0, lse, entropy, *grads)
    assert count == {"read": (live - 1) * (num_vocab + padding), "write": 6 * (num_vocab + padding)}
