import math

import pytest
import torch

from ril_kernels import token_logprob
from ril_kernels.token_logprob.reference import CASES, make_inputs


def leaves(inputs: dict) -> tuple[str, ...]:
    return tuple(name for name in ("hidden", "lm_head", "bias") if name in inputs)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    inputs = make_inputs(case, torch.float64)
    names = leaves(inputs)

    def function(*values):
        return token_logprob(**{**inputs, **dict(zip(names, values, strict=True))}, return_entropy=True)

    values = tuple(inputs[name].requires_grad_() for name in names)
    # The peaked and the odd case have hundreds of inputs: random directions instead of each one.
    assert torch.autograd.gradcheck(function, values, fast_mode=inputs["lm_head"].numel() > 200)


def test_hand_computed():
    # H = 2, lm_head = identity, so logits = hidden. Row 0: logits (ln 3, 0), p = (3/4, 1/4).
    # Row 1: logits (0, 0), p = (1/2, 1/2). Row 2 is ignored.
    hidden = torch.tensor([[math.log(3), 0.0], [0.0, 0.0], [5.0, -5.0]], requires_grad=True)
    target = torch.tensor([1, 0, -100])
    logprobs, entropy = token_logprob(hidden, torch.eye(2), target, return_entropy=True)
    expected = torch.tensor([-math.log(4), -math.log(2), 0.0])
    # H(3/4, 1/4) = 3/4 ln(4/3) + 1/4 ln 4 = ln 4 - 3/4 ln 3
    expected_entropy = torch.tensor([math.log(4) - 0.75 * math.log(3), math.log(2), 0.0])
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    # d log p[target] / d logits = onehot - p
    logprobs.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[-0.75, 0.75], [0.5, -0.5], [0.0, 0.0]]))


def test_hand_computed_temperature_bias_softcap():
    # p(0) = sigmoid(d), d the logit difference. Bias (ln 9, 0), temperature 2: d = ln 9 / 2 = ln 3, p = 3/4.
    head, target, bias = torch.eye(2), torch.tensor([0, 0]), torch.tensor([math.log(9), 0.0])
    logprobs = token_logprob(torch.zeros(2, 2), head, target, bias=bias, temperature=2.0)
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.75)] * 2))
    # Per token: row 0 at 2 as above, row 1 at 1, d = ln 9, p = 9/10.
    logprobs = token_logprob(torch.zeros(2, 2), head, target, bias=bias, temperature=torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.75), math.log(0.9)]))
    # softcap 1 of a logit atanh(1/2) * 1 is 1/2; temperature 1/2 acts after it: d = 1, p = 1 / (1 + 1/e).
    hidden = torch.tensor([[math.atanh(0.5), 0.0]])
    logprobs = token_logprob(hidden, head, target[:1], softcap=1.0, temperature=0.5)
    torch.testing.assert_close(logprobs, torch.tensor([-math.log(1 + math.exp(-1))]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_accuracy_against_cross_entropy(case, dtype, assert_accurate):
    # The peer is PyTorch's own: linear in the dtype, then cross_entropy of float32 logits.
    inputs = make_inputs(case, dtype)
    if "softcap" in inputs:
        del inputs["softcap"]  # the peer has none
    temperature = inputs.get("temperature", torch.ones(1))
    exact = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
    truth = token_logprob(**exact)
    logits = torch.nn.functional.linear(inputs["hidden"], inputs["lm_head"], inputs.get("bias")).float()
    peer = -torch.nn.functional.cross_entropy(
        logits / temperature[:, None], inputs["target"], reduction="none", ignore_index=-100
    )
    actual = token_logprob(**inputs)
    assert actual.dtype == torch.float32
    assert_accurate(actual, truth, peer)


def test_a_wrong_result_fails_the_tolerance(assert_accurate):
    inputs = make_inputs("odd")
    truth = token_logprob(**{name: v.double() if v.is_floating_point() else v for name, v in inputs.items()})
    wrong = token_logprob(**{**inputs, "temperature": 1.0001})
    with pytest.raises(AssertionError, match="above the allowed"):
        assert_accurate(wrong, truth)


def test_ignored_rows_have_no_effect_whatever_they_hold():
    inputs = make_inputs("everything")
    ignored = inputs["target"] == -100
    assert ignored.any() and not ignored.all()
    gradients = []
    for poison in (0.0, math.nan):
        hidden = inputs["hidden"].masked_fill(ignored[:, None], poison).requires_grad_()
        lm_head = inputs["lm_head"].clone().requires_grad_()
        logprobs, entropy = token_logprob(**{**inputs, "hidden": hidden, "lm_head": lm_head}, return_entropy=True)
        (logprobs.sum() + entropy.sum()).backward()
        assert (logprobs[ignored] == 0).all() and (entropy[ignored] == 0).all()
        assert (hidden.grad[ignored] == 0).all()
        gradients.append((hidden.grad, lm_head.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_forbidden_entries_add_nothing():
    # A bias of -inf takes entry 2 out: what is left is the softmax over entries 0 and 1.
    hidden = torch.tensor([[math.log(3), 0.0, 7.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, -math.inf])
    logprobs, entropy = token_logprob(hidden, torch.eye(3), torch.tensor([0]), bias=bias, return_entropy=True)
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.75)]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(4) - 0.75 * math.log(3)]))
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all() and hidden.grad[0, 2] == 0


def test_frozen_inputs_and_strided_inputs():
    inputs = make_inputs("odd")
    expected = token_logprob(**inputs)
    hidden = inputs["hidden"].repeat_interleave(2, dim=1)[:, ::2].requires_grad_()
    assert not hidden.is_contiguous()
    actual = token_logprob(**{**inputs, "hidden": hidden})
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    actual.sum().backward()  # a stride-0 gradient
    assert hidden.grad is not None and inputs["lm_head"].grad is None


def error_cases() -> list:
    hidden, head, target = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
    base = {"hidden": hidden, "lm_head": head, "target": target}
    return [
        ({**base, "hidden": [[1.0]]}, TypeError, r"hidden: got list, expected a torch\.Tensor"),
        ({**base, "hidden": hidden.long()}, TypeError, r"hidden: got dtype int64, expected float32 or"),
        (
            {**base, "hidden": hidden[None]},
            ValueError,
            r"hidden: got shape \(1, 3, 4\), expected \(T, H\)\. Pack",
        ),
        (
            {**base, "hidden": hidden[:0]},
            ValueError,
            r"hidden: got shape \(0, 4\), .* no size of 0\. An empty batch",
        ),
        (
            {**base, "lm_head": head.T},
            ValueError,
            r"lm_head: got shape \(4, 5\), expected \(V, H\) with H = 4 as in hidden\. .*not transposed",
        ),
        (
            {**base, "lm_head": head.bfloat16()},
            TypeError,
            r"lm_head: got dtype bfloat16, expected float32\. Cast",
        ),
        (
            {**base, "lm_head": head.to("meta")},
            ValueError,
            r"lm_head: got device meta, expected cpu, where hidden",
        ),
        (
            {**base, "lm_head": torch.zeros(4, 5).T},
            ValueError,
            r"lm_head: got strides \(1, 5\), expected a contiguous \(V, H\) weight\. Call",
        ),
        ({**base, "bias": torch.zeros(5).half()}, TypeError, r"bias: got dtype float16, expected float32\. Cast"),
        (
            {**base, "bias": torch.zeros(5, device="meta")},
            ValueError,
            r"bias: got device meta, expected cpu, where hidden is\. Move",
        ),
        (
            {**base, "target": target.to("meta")},
            ValueError,
            r"target: got device meta, expected cpu, where hidden is\. Move",
        ),
        (
            {**base, "temperature": torch.ones(3, device="meta")},
            ValueError,
            r"temperature: got device meta, expected cpu, where hidden is\. Move",
        ),
        (
            {**base, "temperature": torch.ones(3, dtype=torch.int64)},
            TypeError,
            r"temperature: got dtype int64, expected float32 or",
        ),
        (
            {**base, "temperature": torch.tensor([1.0, math.nan, 1.0])},
            ValueError,
            r"temperature: got the value nan, expected values above 0",
        ),
        ({**base, "bias": torch.zeros(4)}, ValueError, r"bias: got shape \(4,\), expected \(V,\) with V = 5"),
        ({**base, "target": target.int()}, TypeError, r"target: got dtype int32, expected int64"),
        ({**base, "target": target[:2]}, ValueError, r"target: got shape \(2,\), expected \(T,\) with T = 3"),
        (
            {**base, "target": target + 5},
            ValueError,
            r"target: got the value 5, .*\[0, 5\) where V = 5\. Use ignore",
        ),
        (
            {**base, "target": target - 1},
            ValueError,
            r"target: got the value -1, expected values in \[0, 5\)",
        ),
        (
            {**base, "temperature": 0.0},
            ValueError,
            r"temperature: got 0\.0, expected a finite number above 0",
        ),
        ({**base, "temperature": "1"}, TypeError, r"temperature: got str, expected a finite number above 0"),
        (
            {**base, "temperature": torch.ones(2)},
            ValueError,
            r"temperature: got shape \(2,\), expected \(T,\)",
        ),
        (
            {**base, "temperature": torch.zeros(3)},
            ValueError,
            r"temperature: got the value 0\.0, expected values abo",
        ),
        ({**base, "softcap": -1.0}, ValueError, r"softcap: got -1\.0, expected a finite number above 0"),
        ({**base, "ignore_index": None}, TypeError, r"ignore_index: got None, expected an int"),
    ]


@pytest.mark.parametrize(("inputs", "error", "message"), error_cases())
def test_errors(inputs, error, message, native_calls):
    with pytest.raises(error, match=message):
        token_logprob(**inputs)
    assert native_calls == []
