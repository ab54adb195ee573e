"""Run by test_triton.py in a process of its own with TRITON_INTERPRET=1: the Triton kernels on CPU tensors."""

import importlib

import numpy as np
import pytest
import torch
from test_discriminator_head import check as check_head
from test_discriminator_head import large, results
from test_fused import exact, grad, logprob_results, loss_results, stats
from test_group_advantages import KINDS, ragged
from test_sampling import OPTIONS, VECTORS, check, check_invalid, drawn_bits, logits_of
from triton.runtime.interpreter import InterpreterBuilder

from ril_kernels import discriminator_head, policy_loss
from ril_kernels.discriminator_head import triton as head
from ril_kernels.discriminator_head.reference import CASES as HEAD_CASES
from ril_kernels.discriminator_head.reference import make_inputs as head_inputs
from ril_kernels.policy_loss import triton as advantages
from ril_kernels.policy_loss.reference import CASES as LOSS_CASES
from ril_kernels.policy_loss.reference import group_advantages_reference
from ril_kernels.policy_loss.reference import make_inputs as loss_inputs
from ril_kernels.sampling import triton as sampling
from ril_kernels.token_logprob.reference import CASES, make_inputs

# `import ... as` would find the function token_logprob, which hides the package of its name.
kernels = importlib.import_module("ril_kernels.token_logprob.triton")


@pytest.fixture(autouse=True, params=[16, 64, 8192], ids=lambda block: f"block {block}")
def block(request, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", request.param)
    monkeypatch.setattr(advantages, "COLUMNS", request.param)
    monkeypatch.setattr(head, "BLOCK", request.param)
    monkeypatch.setattr(head, "ROWS", min(request.param, 32))
    monkeypatch.setattr(head, "COLUMNS", min(request.param, 32))
    monkeypatch.setattr(sampling, "BLOCK", request.param)
    monkeypatch.setattr(sampling, "LIST", min(request.param, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # bfloat16: see test_bfloat16
@pytest.mark.parametrize("case", CASES)
def test_token_logprob(case, dtype, assert_accurate):
    inputs = make_inputs(case, dtype)
    truth, peer = logprob_results(exact(inputs), "reference"), logprob_results(inputs, "reference")
    for got, true, usual in zip(logprob_results(inputs, "triton"), truth, peer, strict=True):
        assert_accurate(got, true.double(), usual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", LOSS_CASES)
def test_policy_loss(case, dtype, assert_accurate):
    inputs = loss_inputs(case, dtype)
    truth, peer = loss_results(exact(inputs), "reference")[0], loss_results(inputs, "reference")[0]
    for got, true, usual in zip(loss_results(inputs, "triton")[0], truth, peer, strict=True):
        assert_accurate(got, true.double(), usual)


def test_float16_gradients_survive_a_loss_scaler():
    # A denominator of real size: without the scaler's factor the gradient of a logit is below what float16 holds.
    inputs = {**loss_inputs("ragged", torch.float16), "norm": 16.0 * 64 * 1024}
    gradients = []
    for backend in ("triton", "reference"):
        leaves = [inputs[name].clone().requires_grad_() for name in ("hidden", "lm_head")]
        loss, _ = policy_loss(**{**inputs, "hidden": leaves[0], "lm_head": leaves[1]}, backend=backend)
        gradients.append(torch.autograd.grad(65536 * loss, leaves))
    for ours, theirs in zip(*gradients, strict=True):
        assert float(theirs.abs().max()) > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


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
    expected = stats(copy, target, temperature, softcap)
    actual = kernels.logits_stats(logits, target, temperature, softcap)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
    grad(copy, target, temperature, softcap, expected[2], expected[1], *grads)
    kernels.logits_grad(logits, target, temperature, softcap, actual[2], actual[1], *grads)
    torch.testing.assert_close(logits, copy, rtol=2e-6, atol=2e-6)
    assert (logits[2] == 0).all() and (logits[5] == 0).all()


def test_infinities_and_nan_against_cpp():
    inf = torch.inf
    logits = torch.full((5, 37), -inf)
    logits[0, 5] = 2.0  # a certainty
    logits[1, [3, 36]] = 700.0  # far above what exp can hold
    logits[2] = -3e38
    logits[3, :20] = torch.nan
    logits[4] = torch.nan  # does not count
    target, grads = torch.tensor([5, 36, 7, 3, -1]), torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0], [0.5] * 5])
    grads[1, 3] = 0.0  # idle: zeros whatever the row holds
    ones, copy = torch.ones(5), logits.clone()
    expected = stats(copy, target, ones, 0.0)
    actual = kernels.logits_stats(logits, target, ones, 0.0)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6, equal_nan=True)
    assert actual[0][3].isnan() and actual[2][3].isnan() and not actual[0][[0, 1, 2, 4]].isnan().any()
    grad(copy, target, ones, 0.0, expected[2], expected[1], *grads)
    kernels.logits_grad(logits, target, ones, 0.0, actual[2], actual[1], *grads)
    torch.testing.assert_close(logits, copy, rtol=2e-6, atol=2e-6)
    assert (logits[[0, 3, 4]] == 0).all() and (logits[1, [3, 36]] != 0).all()


def test_bfloat16():
    # The interpreter truncates float32 to bfloat16 where a GPU rounds: one unit in the last place, 2^-7 relative.
    logits, target, temperature, grads = rows(37, torch.bfloat16, 48)
    wide = logits.float().contiguous()
    expected = stats(wide, target, temperature, 0.0)
    actual = kernels.logits_stats(logits, target, temperature, 0.0)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
    grad(wide, target, temperature, 0.0, expected[2], expected[1], *grads)
    kernels.logits_grad(logits, target, temperature, 0.0, actual[2], actual[1], *grads)
    torch.testing.assert_close(logits.float(), wide, rtol=2**-7, atol=1e-38)


def count_traffic(monkeypatch, of: torch.Tensor) -> dict[str, int]:
    """How many elements of a tensor's memory the kernels read and write from now on."""
    first, last = of.data_ptr(), of.data_ptr() + of.untyped_storage().nbytes()
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
    return count


def test_traffic(monkeypatch):
    """Global traffic of the logits: one read in the no-grad pass, two reads and one write in the training pass."""
    num_vocab = 150
    logits, target, temperature, grads = rows(num_vocab, torch.float32, 160)
    count = count_traffic(monkeypatch, logits)
    _, entropy, lse = kernels.logits_stats(logits, target, temperature, 0.0)
    padding, chosen, live = 10, 1, 5  # of 16 elements per row; the target's logit is read again; rows that count
    assert count == {"read": live * (num_vocab + padding + chosen), "write": 0}
    count.update(read=0)
    kernels.logits_grad(logits, target, temperature, 0.0, lse, entropy, *grads)
    assert count == {"read": (live - 1) * (num_vocab + padding), "write": 6 * (num_vocab + padding)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", HEAD_CASES)
def test_discriminator_head(case, dtype, assert_accurate):
    check_head(head_inputs(case, dtype), "triton", assert_accurate)


@pytest.mark.parametrize("final_norm", ["rms", "layer"])
def test_discriminator_head_of_many_rows(final_norm, assert_accurate):
    check_head({**large(num_responses=40, num_hidden=80), "final_norm": final_norm}, "triton", assert_accurate)


@pytest.mark.parametrize("names", [("hidden",), ("weight", "norm_bias"), ("bias",), ("norm_weight",)])
@pytest.mark.parametrize("parts", ["loss", "logits"])
def test_discriminator_head_with_frozen_inputs(names, parts, assert_accurate):
    check_head(head_inputs("layer"), "triton", assert_accurate, names=names, parts=parts)


def test_discriminator_head_repeats_bit_by_bit():
    first, second = (results(head_inputs("repeated"), "triton") for _ in range(2))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_discriminator_head_of_infinite_and_strided_rows():
    padded = torch.full((4, 16), torch.nan)[:, :1]  # what lies between the rows must not matter
    padded.copy_(torch.tensor([[1e4], [-1e4], [torch.inf], [torch.nan]]))
    ours, theirs = (
        discriminator_head(padded, torch.arange(4), torch.ones(1, 1), backend=each) for each in ("triton", "reference")
    )
    torch.testing.assert_close(ours[:3], theirs[:3], equal_nan=True)
    assert ours.similarity_rewards[:2].tolist() == [0.0, 1.0] and ours.similarity_rewards[2:].isnan().all()


def test_traffic_of_discriminator_head(monkeypatch):
    """A gathered row is read once forward and once backward, and its gradient is written once; no other row is."""
    inputs = head_inputs("odd")
    hidden = inputs["hidden"].requires_grad_()
    count = count_traffic(monkeypatch, hidden)
    out = discriminator_head(**inputs, backend="triton")
    gathered = len(inputs["last_index"]) * hidden.shape[1]
    assert count == {"read": gathered, "write": 0}
    gradients, make = [], head.backward

    def backward(*arguments):
        gradients.append(count_traffic(monkeypatch, arguments[-5]))
        make(*arguments)

    monkeypatch.setattr(head, "backward", backward)
    out.loss.backward()
    assert count == {"read": 2 * gathered, "write": 0} and gradients == [{"read": 0, "write": gathered}]


@KINDS
@pytest.mark.parametrize(("num_responses", "num_groups"), [(2, 1), (3, 1), (7, 2), (101, 17), (257, 3)])
def test_group_advantages(num_responses, num_groups, kind, monkeypatch, assert_accurate):
    rewards, groups = ragged(num_responses, num_groups)
    poisoned = torch.full((num_responses + 2,), torch.nan)  # a guard on both sides
    monkeypatch.setattr(torch, "empty_like", lambda like: poisoned[1:-1])
    actual = advantages.group_advantages(rewards, groups, kind)
    assert poisoned[0].isnan() and poisoned[-1].isnan()
    peer = group_advantages_reference(rewards, groups, kind)
    assert_accurate(actual, group_advantages_reference(rewards.double(), groups, kind), peer)


@KINDS
def test_group_advantages_of_values_that_only_a_cpu_refuses(kind):
    # Ids below 0 are ids. NaN stays in its group. A lone response has no baseline.
    rewards = torch.tensor([1.0, torch.nan, 0.0, 2.0, 5.0])
    groups = torch.tensor([0, 7, 0, 7, -1])
    actual = advantages.group_advantages(rewards, groups, kind)
    torch.testing.assert_close(actual, group_advantages_reference(rewards, groups, kind), equal_nan=True)
    assert actual[[1, 3]].isnan().all() and actual[[0, 2]].isfinite().all()
    assert actual[4] == 0 if kind == "dr_grpo" else actual[4].isnan()


@KINDS
def test_group_advantages_of_equal_rewards_are_exact_zeros(kind):
    # Tokens of advantage 0 are left out of everything: a rounding error in its place would cost three GEMMs.
    rewards, groups = torch.full((30,), 0.1), torch.arange(30) % 2
    assert (advantages.group_advantages(rewards, groups, kind) == 0).all()


def test_group_advantages_of_strided_inputs():
    rewards, groups = ragged(101, 17)
    expected = advantages.group_advantages(rewards, groups, "grpo")
    strided = rewards.repeat_interleave(2)[::2], groups.repeat_interleave(3)[::3]
    assert torch.equal(advantages.group_advantages(*strided, "grpo"), expected)


# Every option on one case, every case with what takes another way through the kernel.
WAYS = [("odd", name) for name in OPTIONS]
WAYS += [
    (case, name) for case in ("one token", "ties", "zeros", "holes", "peaked", "large") for name in ("all", "top_p")
]


@pytest.mark.parametrize(("case", "name"), WAYS)
def test_sample(case, name):
    dtype = torch.bfloat16 if name == "top_p" else torch.float32
    assert check(logits_of(case, dtype)[:2], OPTIONS[name], "triton") <= 1


def test_sample_reads_no_padding():
    logits = torch.full((3, 48), torch.nan)[:, :37]
    logits.copy_(logits_of("odd")[:3])
    for name in ("all", "policy", "top_p"):
        assert check(logits, OPTIONS[name], "triton") == 0


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_sample_of_rows_without_a_draw(options):
    check_invalid(19, options, "triton")


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_sample_draws_by_philox(counter, key, result):
    assert drawn_bits(counter, key, 2**9, "triton") == result[0] >> 23
