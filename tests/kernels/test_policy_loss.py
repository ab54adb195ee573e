import math

import pytest
import torch

from ril_kernels import policy_loss, token_logprob
from ril_kernels.policy_loss.reference import CASES, make_inputs

LN2, LN3 = math.log(2), math.log(3)


def loss_and_gradients(inputs: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    names = [name for name in ("hidden", "lm_head", "bias") if name in inputs]
    values = {name: inputs[name].detach().clone().requires_grad_() for name in names}
    loss, _ = policy_loss(**{**inputs, **values})
    return loss.detach(), list(torch.autograd.grad(loss, values.values()))


@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo"])
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case, loss_type):
    inputs = {**make_inputs(case, torch.float64), "loss_type": loss_type}
    names = [name for name in ("hidden", "lm_head", "bias") if name in inputs]
    _, metrics = policy_loss(**inputs)
    if case == "everything":
        assert metrics.clip_low_fraction > 0 and metrics.clip_high_fraction > 0  # both clips act
        assert 0 < metrics.clip_low_fraction + metrics.clip_high_fraction < 1

    def function(*values):
        return policy_loss(**{**inputs, **dict(zip(names, values, strict=True))})[0]

    if "behavior_logprobs" not in inputs:
        # On-policy the ratio is policy / policy.detach(), whose finite difference is 0. The same loss with
        # the behavior fixed at the present policy has the same gradient, and that one is checked.
        fixed = {**inputs, "behavior_logprobs": metrics.logprobs}
        for on, off in zip(loss_and_gradients(inputs)[1], loss_and_gradients(fixed)[1], strict=True):
            torch.testing.assert_close(on, off, rtol=0, atol=1e-14)
        inputs = fixed
    assert torch.autograd.gradcheck(function, tuple(inputs[name].requires_grad_() for name in names))


# The hand-computed question. V = 2, lm_head = identity, so logits = hidden. Two responses: a student's of two
# tokens (t0, t1) with reward 2, a teacher's of one token (t2) with reward 0. Mean 1, so A = +1, +1, -1.
# G = 1, Q = 1, L = 4: norm = 2G Q L = 8, and kl_norm = G Q L = 4 for KL on the student's own tokens.
#   t0: logits (0, 0),    target 0: p = 1/2      onehot - p = (1/2, -1/2)
#   t1: logits (ln 3, 0), target 1: p = 1/4      onehot - p = (-3/4, 3/4)
#   t2: logits (0, ln 3), target 1: p = 3/4      onehot - p = (-1/4, 1/4)
def question() -> dict:
    return {
        "hidden": torch.tensor([[0.0, 0.0], [LN3, 0.0], [0.0, LN3]], dtype=torch.float64, requires_grad=True),
        "lm_head": torch.eye(2, dtype=torch.float64, requires_grad=True),
        "target": torch.tensor([0, 1, 1]),
        "response_index": torch.tensor([0, 0, 1]),
        "rewards": torch.tensor([2.0, 0.0]),
        "groups": torch.tensor([6, 6]),
        "norm": 8.0,
    }


def close(actual: torch.Tensor, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def test_hand_computed_on_policy_without_kl():
    inputs = question()
    loss, metrics = policy_loss(**inputs)
    # Ratio 1: loss = -(1 + 1 - 1) / 8
    close(loss, -1 / 8)
    loss.backward()
    # d loss / d logits_t = -A_t (onehot - p) / 8, and hidden = logits
    close(inputs["hidden"].grad, [[-1 / 16, 1 / 16], [3 / 32, -3 / 32], [-1 / 32, 1 / 32]])
    # d loss / d lm_head[v, h] = sum_t d loss / d logits[t, v] * hidden[t, h]:
    # h = 0 is only in t1 (ln 3), h = 1 only in t2 (ln 3)
    close(inputs["lm_head"].grad, [[3 / 32 * LN3, -1 / 32 * LN3], [-3 / 32 * LN3, 1 / 32 * LN3]])
    close(metrics.logprobs, [-LN2, -2 * LN2, LN3 - 2 * LN2])
    # Entropies: ln 2; H(1/4, 3/4) = 2 ln 2 - 3/4 ln 3, twice
    close(metrics.entropy, (LN2 + 2 * (2 * LN2 - 0.75 * LN3)) / 3)
    close(torch.stack([metrics.ratio_mean, metrics.ratio_max]), [1.0, 1.0])
    close(torch.stack([metrics.clip_low_fraction, metrics.clip_high_fraction]), [0.0, 0.0])
    assert metrics.kl is None and metrics.num_tokens == 3 and metrics.num_kl_tokens == 0
    assert not any(value.requires_grad for value in metrics if value is not None)


def test_hand_computed_on_policy_with_kl():
    # Reference: 1/2 everywhere. d = ln(reference / policy): 0, ln 2, ln(2/3).
    # k3 = exp(d) - d - 1: 0; 2 - ln 2 - 1 = 1 - ln 2; 2/3 + ln(3/2) - 1 = ln(3/2) - 1/3.
    # d k3 / d log policy = 1 - exp(d): 0, -1, 1/3.
    reference = torch.full((3,), -LN2, dtype=torch.float64)
    inputs = question()
    student_only = {"kl_mask": torch.tensor([True, True, False]), "kl_norm": 4.0}
    loss, metrics = policy_loss(**inputs, **student_only, reference_logprobs=reference, beta=0.1)
    close(loss, -1 / 8 + 0.1 * (1 - LN2) / 4)
    close(metrics.kl, (1 - LN2) / 2)
    assert metrics.num_kl_tokens == 2
    loss.backward()
    # t1 gets beta / 4 * -1 * (onehot - p) = -1/40 * (-3/4, 3/4) more
    extra = 3 / 160
    close(inputs["hidden"].grad, [[-1 / 16, 1 / 16], [3 / 32 + extra, -3 / 32 - extra], [-1 / 32, 1 / 32]])

    # KL on all tokens, under norm: t1 and t2 get beta / 8 * (-1 and 1/3) * (onehot - p)
    inputs = question()
    loss, metrics = policy_loss(**inputs, reference_logprobs=reference, beta=0.1)
    close(loss, -1 / 8 + 0.1 * (1 - LN2 + math.log(1.5) - 1 / 3) / 8)
    loss.backward()
    more = [[0, 0], [3 / 320, -3 / 320], [-1 / 960, 1 / 960]]
    base = [[-1 / 16, 1 / 16], [3 / 32, -3 / 32], [-1 / 32, 1 / 32]]
    close(
        inputs["hidden"].grad,
        [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(base, more, strict=True)],
    )

    # beta 0 reports the KL and leaves the loss alone
    loss, metrics = policy_loss(**question(), reference_logprobs=reference)
    close(loss, -1 / 8)
    close(metrics.kl, (1 - LN2 + math.log(1.5) - 1 / 3) / 3)


def test_hand_computed_second_update():
    # mu = 2. The first update is plain gradient descent on the logits at rate 8 ln 3:
    #   t0: (0, 0) - 8 ln 3 (-1/16, 1/16): p(0) = sigmoid(ln 3) = 3/4,          ratio (3/4) / (1/2) = 1.5
    #   t1: logit 1 - logit 0 = -ln 3 + 8 ln 3 * 3/16 = ln 3 / 2: p(1) = s,     ratio s / (1/4) = 4 s
    #   t2: logit 1 - logit 0 = ln 3 - 8 ln 3 / 16 = ln 3 / 2:    p(1) = s,     ratio s / (3/4) = 4 s / 3
    # with s = sigmoid(ln 3 / 2) = sqrt 3 / (1 + sqrt 3) = 0.6340: ratios 1.5, 2.536, 0.8453.
    inputs = question()
    loss, first = policy_loss(**inputs)
    (gradient,) = torch.autograd.grad(loss, inputs["hidden"])
    inputs["hidden"] = (inputs["hidden"] - 8 * LN3 * gradient).detach().requires_grad_()
    s = math.sqrt(3) / (1 + math.sqrt(3))
    loss, second = policy_loss(**inputs, behavior_logprobs=first.logprobs)
    # A = +1 and ratio above 1.2: clipped, 1.2 without gradient, for t0 and t1. t2 lies within [0.8, 1.2].
    close(loss, -(1.2 + 1.2 - 4 * s / 3) / 8)
    close(torch.stack([second.clip_low_fraction, second.clip_high_fraction]), [0.0, 2 / 3])
    close(second.ratio_mean, (1.5 + 4 * s + 4 * s / 3) / 3)
    close(second.ratio_max, 4 * s)
    loss.backward()
    # t2: -A r (onehot - p) / 8 = (4 s / 3) / 8 * (-(1 - s), 1 - s)
    g = s * (1 - s) / 6
    close(inputs["hidden"].grad, [[0, 0], [0, 0], [-g, g]])

    # The clip lets an increase through where the advantage is negative: rewards swapped, A = -1, -1, +1.
    # t0, t1: min(-r, -1.2) = -r with gradient; t2: min(r, clip(r)) = r with gradient.
    inputs = {
        **inputs,
        "hidden": inputs["hidden"].detach().requires_grad_(),
        "rewards": torch.tensor([0.0, 2.0]),
    }
    loss, third = policy_loss(**inputs, behavior_logprobs=first.logprobs)
    close(loss, (1.5 + 4 * s - 4 * s / 3) / 8)
    close(torch.stack([third.clip_low_fraction, third.clip_high_fraction]), [0.0, 0.0])
    loss.backward()
    # t0: r (onehot - p) / 8 = 1.5 / 8 * (1/4, -1/4); t1: 4 s / 8 * (-(1 - s), 1 - s); t2: minus the above
    h = s * (1 - s) / 2
    close(inputs["hidden"].grad, [[3 / 64, -3 / 64], [-h, h], [g, -g]])


def test_hand_computed_second_update_with_kl_and_low_clip():
    # One token each, p: behavior 1/2 -> policy 1/4, ratio 1/2, below 0.8. A = +1 keeps its gradient
    # (min(r, 0.8) = r), A = -1 is clipped (min(-r, -0.8) = -0.8). Reference 1/2: d = ln 2, k3 = 1 - ln 2.
    hidden = torch.tensor([[LN3, 0.0], [LN3, 0.0]], dtype=torch.float64, requires_grad=True)
    half = torch.full((2,), -LN2, dtype=torch.float64)
    loss, metrics = policy_loss(
        hidden,
        torch.eye(2, dtype=torch.float64),
        torch.tensor([1, 1]),
        response_index=torch.tensor([0, 1]),
        advantages=torch.tensor([1.0, -1.0], dtype=torch.float64),
        behavior_logprobs=half,
        reference_logprobs=half,
        beta=0.01,
        norm=2.0,
    )
    close(loss, -(0.5 - 0.8) / 2 + 0.01 * 2 * (1 - LN2) / 2)
    close(torch.stack([metrics.clip_low_fraction, metrics.clip_high_fraction]), [0.5, 0.0])
    loss.backward()
    # onehot - p = (-3/4, 3/4). Policy term of the first: -1 * 1/2 / 2; KL of both: 0.01 * -1 / 2.
    a, b = -0.25 - 0.005, -0.005
    close(hidden.grad, [[-0.75 * a, 0.75 * a], [-0.75 * b, 0.75 * b]])


def test_hand_computed_grpo():
    # loss_type grpo: t0 and t1 weigh 1/2, t2 weighs 1; norm = the 2 responses. Rewards 2, 0: std sqrt 2,
    # A = +-1 / (sqrt 2 + 1e-4) = +-a. Loss = -(a/2 + a/2 - a) / 2 = 0; gradients -w A (onehot - p) / 2.
    inputs = question()
    loss, _ = policy_loss(**{**inputs, "norm": 2.0}, advantage="grpo", loss_type="grpo")
    a = 1 / (math.sqrt(2) + 1e-4)
    close(loss, 0.0, 1e-7)  # advantages are float32
    loss.backward()
    expected = [[-a / 8, a / 8], [3 * a / 16, -3 * a / 16], [-a / 8, a / 8]]
    close(inputs["hidden"].grad, expected, 1e-7)


def test_equal_rewards_leave_only_the_kl():
    inputs = {**make_inputs("ragged", torch.float64), "rewards": torch.full((5,), 0.7)}
    loss, gradients = loss_and_gradients({**inputs, "beta": 0.0})
    assert loss == 0 and all(gradient.abs().max() == 0 for gradient in gradients)
    _, metrics = policy_loss(**inputs)
    expected = inputs["beta"] * metrics.kl * metrics.num_kl_tokens / inputs["kl_norm"]
    torch.testing.assert_close(loss_and_gradients(inputs)[0], expected)


def part_of(inputs: dict, tokens: torch.Tensor) -> dict:
    per_token = [
        "hidden",
        "target",
        "response_index",
        "behavior_logprobs",
        "reference_logprobs",
        "mask",
        "kl_mask",
    ]
    per_token += ["temperature"]
    return {name: value[tokens] if name in per_token else value for name, value in inputs.items()}


def sum_of_parts(inputs: dict, parts: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients over several calls; hidden's rows put back in place."""
    total, hidden, others = torch.zeros(()), torch.zeros_like(inputs["hidden"]), None
    for tokens in parts:
        loss, (grad_hidden, *rest) = loss_and_gradients(part_of(inputs, tokens))
        total = total + loss
        hidden[tokens] = grad_hidden
        others = rest if others is None else [a + b for a, b in zip(others, rest, strict=True)]
    return total, [hidden, *others]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["ragged", "everything"])
def test_any_split_of_the_tokens_adds_up(case, dtype):
    inputs = make_inputs(case, dtype)
    num_tokens = inputs["target"].numel()
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))
    loss, gradients = loss_and_gradients(inputs)
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 1e-14}
    for parts in (
        torch.arange(num_tokens).split(1),
        torch.arange(num_tokens).split(4),
        order.split(5),
        [order],
    ):
        actual_loss, actual = sum_of_parts(inputs, list(parts))
        torch.testing.assert_close(actual_loss.to(dtype), loss, **tolerance)
        torch.testing.assert_close(actual, gradients, **tolerance)


def test_grpo_splits_between_responses():
    inputs = {**make_inputs("everything", torch.float64), "loss_type": "grpo"}
    loss, gradients = loss_and_gradients(inputs)
    parts = [(inputs["response_index"] // 2 == half).nonzero()[:, 0] for half in (0, 1)]
    actual_loss, actual = sum_of_parts(inputs, parts)
    torch.testing.assert_close(actual_loss, loss, rtol=0, atol=1e-14)
    torch.testing.assert_close(actual, gradients, rtol=0, atol=1e-14)


def test_masked_tokens_have_no_effect_whatever_they_hold():
    inputs = make_inputs("everything", torch.float64)
    counted = inputs["mask"] | inputs["kl_mask"]
    assert not counted.all()
    expected = loss_and_gradients(inputs)
    for name in ("hidden", "behavior_logprobs", "reference_logprobs"):
        poisoned = inputs[name].clone()
        poisoned[~counted] = math.nan
        inputs[name] = poisoned
    inputs["behavior_logprobs"][~inputs["mask"]] = math.inf
    inputs["target"] = inputs["target"].masked_fill(~counted, -100)
    torch.testing.assert_close(loss_and_gradients(inputs), expected, rtol=0, atol=0)


def test_all_masked():
    inputs = make_inputs("all_masked")
    loss, gradients = loss_and_gradients(inputs)
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients)
    _, metrics = policy_loss(**inputs)
    assert metrics.num_tokens == 0 and metrics.kl == 0 and metrics.ratio_max == 0 and metrics.entropy == 0


def test_the_three_forms_of_advantage_agree():
    inputs = make_inputs("everything", torch.float64)
    expected = loss_and_gradients(inputs)
    rewards, groups = inputs.pop("rewards").double(), inputs.pop("groups")
    mean = torch.stack([rewards[groups == group].mean() for group in groups])
    per_response = rewards - mean
    torch.testing.assert_close(loss_and_gradients({**inputs, "advantages": per_response}), expected, rtol=0, atol=1e-7)
    per_token = per_response[inputs["response_index"]]
    torch.testing.assert_close(
        loss_and_gradients({**inputs, "token_advantages": per_token}), expected, rtol=0, atol=1e-7
    )
    both = {**inputs, "loss_type": "grpo"}
    torch.testing.assert_close(
        loss_and_gradients({**both, "advantages": per_response}),
        loss_and_gradients({**both, "token_advantages": per_token}),
        rtol=0,
        atol=0,
    )


def test_bfloat16_and_frozen_head(assert_accurate):
    inputs = make_inputs("ragged", torch.bfloat16)
    hidden = inputs["hidden"].requires_grad_()
    loss, metrics = policy_loss(**inputs)
    assert loss.dtype == metrics.logprobs.dtype == torch.float32
    exact = {n: v.detach().double() if v.is_floating_point() else v for n, v in inputs.items() if torch.is_tensor(v)}
    truth, _ = policy_loss(**{**inputs, **exact})
    assert_accurate(loss.detach().to(torch.bfloat16), truth)
    loss.backward()
    assert hidden.grad.dtype == torch.bfloat16 and inputs["lm_head"].grad is None


def test_a_wrong_result_fails_the_tolerance(assert_accurate):
    inputs = make_inputs("everything")
    truth, _ = loss_and_gradients(make_inputs("everything", torch.float64))
    assert_accurate(loss_and_gradients(inputs)[0], truth)
    wrong = [{"clip_high": 0.21}, {"beta": 0.1001}, {"norm": inputs["norm"] + 1e-2}, {"loss_type": "grpo"}]
    for change in wrong:
        with pytest.raises(AssertionError, match="above the allowed"):
            assert_accurate(loss_and_gradients({**inputs, **change})[0], truth)


def test_logprobs_are_the_behavior_of_the_next_update():
    inputs = make_inputs("tiny")
    _, metrics = policy_loss(**inputs)
    expected = token_logprob(inputs["hidden"], inputs["lm_head"], inputs["target"])
    torch.testing.assert_close(metrics.logprobs, expected, rtol=0, atol=0)
    _, second = policy_loss(**inputs, behavior_logprobs=metrics.logprobs)
    assert second.ratio_mean == 1 and second.ratio_max == 1


def error_cases() -> list:
    def case(error: type, message: str, *, without: tuple[str, ...] = (), **changes: object):
        return pytest.param(without, changes, error, message, id=message[:40])

    value = ValueError
    three = torch.zeros(3)
    meta = {"device": "meta"}
    return [
        case(value, r"lm_head: got shape \(3, 5\), expected \(V, H\) with H = 4", lm_head=torch.zeros(3, 5)),
        case(value, r"target: got the value 5, expected values in \[0, 5\) where V = 5\. Every token",
             target=torch.full((5,), 5)),
        case(TypeError, r"response_index: got NoneType, expected a torch\.Tensor", response_index=None),
        case(value, r"response_index: got shape \(3,\), expected \(T,\) with T = 5 as in hidden",
             response_index=three.long()),
        case(value, r"response_index: got the value 2, expected values in \[0, 2\) where N = 2\. It numbers",
             response_index=torch.tensor([0, 0, 1, 1, 2])),
        case(value, r"rewards, advantages, token_advantages: got none, expected exactly one",
             without=("rewards", "groups")),
        case(value, r"got rewards and advantages, expected exactly one of them", advantages=torch.zeros(2)),
        case(value, r"groups: got rewards without groups, expected both or neither", without=("groups",)),
        case(value, r"groups: got groups without rewards", without=("rewards",), advantages=torch.zeros(2)),
        case(value, r"groups: got a single response in group 0, expected", groups=torch.tensor([0, 1])),
        case(value, r"rewards: got nan at index 0, expected", rewards=torch.tensor([math.nan, 1.0])),
        case(value, r"advantages: got inf at index 1, expected finite", without=("rewards", "groups"),
             advantages=torch.tensor([1.0, math.inf])),
        case(TypeError, r"advantages: got dtype float64, expected float32", without=("rewards", "groups"),
             advantages=torch.zeros(2).double()),
        case(value, r"advantages: got shape \(2, 1\), expected \(N,\)\. advantages is per response",
             without=("rewards", "groups"), advantages=torch.zeros(2, 1)),
        case(value, r"token_advantages: got shape \(2,\), expected \(T,\) with T = 5",
             without=("rewards", "groups"), token_advantages=torch.zeros(2)),
        case(value, r"response_index: got the value -1", without=("rewards", "groups"),
             token_advantages=torch.zeros(5), response_index=torch.tensor([0, 0, 1, 1, -1])),
        case(value, r"advantage: got 'none', expected one of 'dr_grpo'", advantage="none"),
        case(value, r"loss_type: got 'luspo', expected one of 'dr_grpo', 'bnpo'", loss_type="luspo"),
        case(value, r"ratio_level: got 'sequence' with loss_type 'cispo', expected 'token'", loss_type="cispo",
             ratio_level="sequence"),
        case(value, r"ratio_level: got 'word', expected one of 'token', 'sequence'", ratio_level="word"),
        case(value, r"kl_estimator: got 'k4', expected one of 'k3', 'k1', 'k2'", kl_estimator="k4"),
        case(value, r"clip_max: got 1\.1 with loss_type 'dr_grpo' and clip_high 0\.2, expected", clip_max=1.1),
        case(value, r"entropy_coef: got -1, expected a finite number of at least 0", entropy_coef=-1),
        case(value, r"importance_cap: got 0, expected a finite number above 0", importance_cap=0),
        case(value, r"sapo_temperature_neg: got 0, expected a finite number above 0", sapo_temperature_neg=0),
        case(value, r"sampler_logprobs: got shape \(3,\), expected \(T,\)", sampler_logprobs=three),
        case(value, r"importance_weights: got shape \(3,\), expected \(T,\)", importance_weights=three),
        case(value, r"lm_head: got strides \(1, 5\), expected a contiguous", lm_head=torch.zeros(4, 5).T),
        case(value, r"backend: got 'gpu', expected one of 'auto'", backend="gpu"),
        case(TypeError, r"behavior_logprobs: got dtype float64, expected", behavior_logprobs=three.double()),
        case(value, r"behavior_logprobs: got shape \(3,\), expected \(T,\)", behavior_logprobs=three),
        case(TypeError, r"reference_logprobs: got dtype float16", reference_logprobs=torch.zeros(5).half()),
        case(TypeError, r"mask: got dtype int64, expected bool", mask=torch.ones(5, dtype=torch.int64)),
        case(value, r"kl_mask: got shape \(1, 5\)", kl_mask=torch.ones(1, 5, dtype=torch.bool)),
        case(value, r"mask: got device meta, expec", mask=torch.ones(5, dtype=torch.bool, device="meta")),
        case(value, r"target: got device meta, expected cpu, where hidden", target=torch.zeros(5, **meta).long()),
        case(value, r"behavior_logprobs: got device meta, expected cpu", behavior_logprobs=torch.zeros(5, **meta)),
        case(value, r"advantages: got device meta, expected cpu, where hidden", without=("rewards", "groups"),
             advantages=torch.zeros(2, **meta)),
        case(value, r"groups: got device meta, expected cpu, where rewards", groups=torch.zeros(2, **meta).long()),
        case(value, r"reference_logprobs: got None with beta above 0, expected a \(T,\)", beta=0.01),
        case(value, r"reference_logprobs: got None with kl_mask", kl_mask=torch.ones(5, dtype=torch.bool)),
        case(value, r"reference_logprobs: got None with kl_norm", kl_norm=4.0),
        case(value, r"beta: got -0\.1, expected a finite number of at least 0", beta=-0.1),
        case(value, r"clip_low: got 1\.5, expected at most 1", clip_low=1.5),
        case(value, r"clip_high: got -0\.2, expected a finite number of at least 0", clip_high=-0.2),
        case(value, r"norm: got 0, expected a finite number above 0\. Pass the global denominator", norm=0),
        case(TypeError, r"norm: got bool, expected a finite number above 0", norm=True),
        case(value, r"kl_norm: got inf, expected a finite number above 0", kl_norm=math.inf),
        case(value, r"temperature: got -1, expected a finite number above 0", temperature=-1),
    ]  # fmt: skip


@pytest.mark.parametrize(("without", "changes", "error", "message"), error_cases())
def test_errors(without, changes, error, message, native_calls):
    inputs = {name: value for name, value in make_inputs("tiny").items() if name not in without}
    with pytest.raises(error, match=message):
        policy_loss(**{**inputs, **changes})
    assert set(native_calls) <= {"ril_group_advantages_f32"}  # of rewards that are right; the fault comes after them


def test_empty_batch():
    inputs = make_inputs("tiny")
    with pytest.raises(ValueError, match=r"hidden: got shape \(0, 4\), .*An empty batch has no loss: skip the call"):
        policy_loss(**part_of(inputs, torch.arange(0)))
