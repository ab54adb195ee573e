import math

import pytest
import torch

from ril_kernels import discriminator_head, discriminator_loss, similarity_reward
from ril_kernels.discriminator_head.reference import CASES, make_inputs


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    inputs = make_inputs(case, torch.float64)
    labels = torch.arange(inputs["last_index"].numel()) % 2 == 0
    names = [name for name in ("hidden", "weight", "bias") if inputs[name] is not None]

    def function(*values):
        logits = discriminator_head(**{**inputs, **dict(zip(names, values, strict=True))})
        return discriminator_loss(logits, labels, norm=3.0)

    fast = inputs["hidden"].numel() > 200
    assert torch.autograd.gradcheck(function, [inputs[n].requires_grad_() for n in names], fast_mode=fast)


def test_hand_computed():
    # T = 3 rows, the last tokens are rows 1 and 2; weight (1, 2), bias ln 3 - 1.
    # logits: 1*1 + 2*0 + ln 3 - 1 = ln 3 (student for sure 3/4);  1*1 + 2*(-ln 3) + ln 3 - 1 = -ln 3 (1/4).
    hidden = torch.tensor([[9.0, 9.0], [1.0, 0.0], [1.0, -math.log(3)]], requires_grad=True)
    weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([math.log(3) - 1])
    logits = discriminator_head(hidden, torch.tensor([1, 2]), weight, bias)
    torch.testing.assert_close(logits, torch.tensor([math.log(3), -math.log(3)]))
    # Labels student, student: -ln(3/4) - ln(1/4), over norm 4 (two more responses in another micro-batch).
    loss = discriminator_loss(logits, torch.tensor([True, True]), norm=4)
    torch.testing.assert_close(loss, torch.tensor(math.log(16 / 3) / 4))
    # d loss / d logit = (sigmoid - label) / norm = -1/16, -3/16; times the weight; row 0 is no last token.
    loss.backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[0, 0], [-1 / 16, -1 / 8], [-3 / 16, -3 / 8]]))
    # Only the second is taken for a teacher's.
    assert similarity_reward(logits).tolist() == [0.0, 1.0]
    # Exactly 1/2 is no teacher: 1[D < 0.5].
    assert similarity_reward(torch.tensor([0.0, -1e-9])).tolist() == [0.0, 1.0]


def test_similarity_in_more_steps():
    # D is 3/4, 1/4, 1/2 and, as good as, 0 and 1.
    logits = torch.tensor([math.log(3), -math.log(3), 0.0, -50.0, 50.0])
    # 1 - D in four quarters: 1/4 ends the first, 3/4 the third, 1/2 the second.
    torch.testing.assert_close(similarity_reward(logits + 1e-6, levels=4), torch.tensor([0, 2 / 3, 1 / 3, 1, 0]))
    # In thirds 1/4 lies in the first, 3/4 in the last, 1/2 in the one between.
    assert similarity_reward(logits, levels=3).tolist() == [0.0, 1.0, 0.5, 1.0, 0.0]
    torch.testing.assert_close(similarity_reward(logits, levels=0), torch.tensor([0.25, 0.75, 0.5, 1, 0]))
    assert similarity_reward(logits, levels=2).tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert similarity_reward(torch.tensor([1e4]), levels=5).tolist() == [0.0]  # 1 - D is 0, whose ceiling is no level


def test_label_smoothing_and_bfloat16():
    logits = torch.tensor([math.log(3)])
    # 0.9 of ln(4/3) and 0.1 of ln 4
    expected = torch.tensor(0.9 * math.log(4 / 3) + 0.1 * math.log(4))
    torch.testing.assert_close(discriminator_loss(logits, torch.tensor([0.9]), norm=1), expected)
    inputs = make_inputs("odd", torch.bfloat16)
    logits = discriminator_head(**inputs)
    truth = discriminator_head(**{n: v.double() if v.is_floating_point() else v for n, v in inputs.items()})
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), truth, rtol=1e-6, atol=1e-5)  # inputs exact, sums in float32


def error_cases() -> list:
    hidden, last, weight = torch.zeros(4, 3), torch.tensor([1, 3]), torch.zeros(1, 3)
    base = {"hidden": hidden, "last_index": last, "weight": weight}
    return [
        (
            {**base, "hidden": hidden[None]},
            ValueError,
            r"hidden: got shape \(1, 4, 3\), expected \(T, H\)\. Pack",
        ),
        ({**base, "hidden": hidden.int()}, TypeError, r"hidden: got dtype int32"),
        ({**base, "last_index": last.float()}, TypeError, r"last_index: got dtype float32, expected int64"),
        (
            {**base, "last_index": last + 1},
            ValueError,
            r"last_index: got the value 4, .*\[0, 4\) where T = 4\. It c",
        ),
        ({**base, "last_index": last[:0]}, ValueError, r"last_index: got shape \(0,\).*An empty batch"),
        (
            {**base, "weight": weight[0]},
            ValueError,
            r"weight: got shape \(3,\), expected \(1, H\) with H = 3 as in h",
        ),
        ({**base, "weight": torch.zeros(2, 3)}, ValueError, r"weight: got shape \(2, 3\), expected \(1, H\)"),
        (
            {**base, "weight": weight.half()},
            TypeError,
            r"weight: got dtype float16, expected float32\. Cast it",
        ),
        ({**base, "bias": torch.zeros(2)}, ValueError, r"bias: got shape \(2,\), expected \(1,\)"),
    ]


@pytest.mark.parametrize(("inputs", "error", "message"), error_cases())
def test_head_errors(inputs, error, message):
    with pytest.raises(error, match=message):
        discriminator_head(**inputs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"logits": torch.zeros(2).half()},
            TypeError,
            r"logits: got dtype float16, expected float32 or float64",
        ),
        (
            {"labels": torch.zeros(3)},
            ValueError,
            r"labels: got shape \(3,\), expected \(N,\) with N = 2 as in log",
        ),
        ({"labels": torch.tensor([0, 1])}, TypeError, r"labels: got dtype int64, expected bool or float32"),
        ({"labels": torch.tensor([0.0, 1.5])}, ValueError, r"labels: got a value outside of \[0, 1\]"),
        (
            {"norm": 0},
            ValueError,
            r"norm: got 0, expected a finite number above 0\. Pass the number of responses",
        ),
    ],
)
def test_loss_errors(changes, error, message):
    with pytest.raises(error, match=message):
        discriminator_loss(**{"logits": torch.zeros(2), "labels": torch.zeros(2), "norm": 1.0, **changes})


def test_reward_errors():
    with pytest.raises(ValueError, match=r"logits: got nan at index 1, expected finite values\. The discriminator"):
        similarity_reward(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match=r"logits: got shape \(2, 1\), expected \(N,\)"):
        similarity_reward(torch.zeros(2, 1))
    for levels in (1, -2, 2.5):
        with pytest.raises(ValueError, match=rf"levels: got {levels}, expected 0, or an integer of 2 or more\."):
            similarity_reward(torch.zeros(2), levels=levels)
