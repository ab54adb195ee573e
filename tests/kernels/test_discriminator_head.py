"""discriminator_head, its loss and its reward; interpreted.py runs the Triton form through the same functions."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from ril_kernels import DiscriminatorOutput, _native, discriminator_head, discriminator_loss, similarity_reward
from ril_kernels.discriminator_head.reference import CASES, make_inputs

LEAVES = ("hidden", "weight", "bias", "norm_weight", "norm_bias")
LN3 = math.log(3)


def exact(inputs: dict) -> dict:
    return {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}


def with_leaves(inputs: dict, names: tuple[str, ...] = LEAVES) -> tuple[dict, list[Tensor]]:
    leaves = {name: inputs[name].clone().requires_grad_() for name in names if inputs[name] is not None}
    return {**inputs, **leaves}, list(leaves.values())


def results(inputs: dict, backend: str, names: tuple[str, ...] = LEAVES, parts: str = "both") -> list[Tensor]:
    """Logits, scores and loss, and the gradients of a sum of them that weighs each logit differently."""
    inputs, leaves = with_leaves(inputs, names)
    out = discriminator_head(**inputs, backend=backend)
    pushes = torch.linspace(-1, 2, len(out.logits)).to(out.logits) / 3
    total = {"loss": out.loss, "logits": out.logits @ pushes, "both": 2 * out.loss + out.logits @ pushes}[parts]
    return [out.logits.detach(), out.scores, out.loss.detach(), *torch.autograd.grad(total, leaves)]


def check(inputs: dict, backend: str, assert_accurate, **options) -> None:
    """Within the tolerance rule; the peer is the definition in the same dtype."""
    truth, peer = results(exact(inputs), "reference", **options), results(inputs, "reference", **options)
    for got, true, usual in zip(results(inputs, backend, **options), truth, peer, strict=True):
        assert_accurate(got, true, usual)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    inputs, leaves = with_leaves(make_inputs(case, torch.float64))
    names = [name for name in LEAVES if inputs[name] is not None]

    def function(*values):
        out = discriminator_head(**{**inputs, **dict(zip(names, values, strict=True))})
        return out.logits, out.loss

    assert torch.autograd.gradcheck(function, leaves, fast_mode=inputs["hidden"].numel() > 200)


def test_hand_computed():
    # T = 3 rows, the last tokens are rows 1 and 2; weight (1, 2), bias ln 3 - 1.
    # logits: 1*1 + 2*0 + ln 3 - 1 = ln 3 (student for sure 3/4);  1*1 + 2*(-ln 3) + ln 3 - 1 = -ln 3 (1/4).
    hidden = torch.tensor([[9.0, 9.0], [1.0, 0.0], [1.0, -LN3]], requires_grad=True)
    weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([LN3 - 1])
    labels = torch.tensor([True, True])
    out = discriminator_head(hidden, torch.tensor([1, 2]), weight, bias, labels=labels, norm=4)
    torch.testing.assert_close(out.logits, torch.tensor([LN3, -LN3]))
    torch.testing.assert_close(out.scores, torch.tensor([0.75, 0.25]))
    # Labels student, student: -ln(3/4) - ln(1/4), over norm 4 (two more responses in another micro-batch).
    torch.testing.assert_close(out.loss, torch.tensor(math.log(16 / 3) / 4))
    torch.testing.assert_close(discriminator_loss(out.logits, labels, norm=4), out.loss)
    # d loss / d logit = (sigmoid - label) / norm = -1/16, -3/16; times the weight; row 0 is no last token.
    out.loss.backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[0, 0], [-1 / 16, -1 / 8], [-3 / 16, -3 / 8]]))
    # Only the second is taken for a teacher's.
    assert out.similarity_rewards.tolist() == similarity_reward(out.logits).tolist() == [0.0, 1.0]
    # Exactly 1/2 is no teacher: 1[D < 0.5].
    assert similarity_reward(torch.tensor([0.0, -1e-9])).tolist() == [0.0, 1.0]
    assert not out.scores.requires_grad and not out.similarity_rewards.requires_grad


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_hand_computed_norms(backend):
    # rms of (1, 7) is 5: x_hat = (1/5, 7/5); times (5 ln 3, 0): ln 3; times the weight 4, by temperature 2: 2 ln 3.
    hidden, index = torch.tensor([[1.0, 7.0]], requires_grad=True), torch.tensor([0])
    weight, gamma = torch.tensor([[4.0, 1.0]], requires_grad=True), torch.tensor([5 * LN3, 0.0], requires_grad=True)
    options = {"eps": 0.0, "backend": backend, "temperature": 2.0, "norm": 1.0}
    options |= {"labels": torch.tensor([0.0]), "label_weights": torch.tensor([0.5]), "label_smoothing": 0.1}
    out = discriminator_head(hidden, index, weight, final_norm="rms", norm_weight=gamma, **options)
    torch.testing.assert_close(out.logits, torch.tensor([2 * LN3]))
    # p = 9/10, label 0.1: 0.5 (0.1 ln(10/9) + 0.9 ln 10)
    torch.testing.assert_close(out.loss, torch.tensor(0.5 * (0.1 * math.log(10 / 9) + 0.9 * math.log(10))))
    out.loss.backward()
    # d loss / d sum = 0.5 (0.9 - 0.1) / 2 = 0.2
    torch.testing.assert_close(weight.grad, 0.2 * torch.tensor([[LN3, 0.0]]))
    torch.testing.assert_close(gamma.grad, 0.2 * torch.tensor([0.8, 1.4]))
    # g = (20 ln 3, 0), mean(g x_hat) = 2 ln 3: (g - x_hat 2 ln 3) / 5 = ln 3 (20 - 2/5, -14/5) / 5
    torch.testing.assert_close(hidden.grad, 0.2 * LN3 * torch.tensor([[3.92, -0.56]]))
    # Layer norm of (1, 7): mean 4, deviation 3, x_hat = (-1, 1): weight (4, 1), gamma (2, 1), beta (1, 0.5).
    values = {"norm_weight": torch.tensor([2.0, 1.0]), "norm_bias": torch.tensor([1.0, 0.5])}
    out = discriminator_head(hidden, index, weight, final_norm="layer", **values, eps=0.0, backend=backend)
    torch.testing.assert_close(out.logits.detach(), torch.tensor([4 * (-2 + 1) + 1 * (1 + 0.5)]))
    assert out.loss is None and out.similarity_rewards.tolist() == [1.0]


@pytest.mark.parametrize("isa", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_accuracy(case, dtype, isa, assert_accurate, native_calls, monkeypatch):
    monkeypatch.setattr(_native, "ISA", isa)
    check(make_inputs(case, dtype), "auto", assert_accurate)
    suffix = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    assert native_calls == [f"ril_discriminator_{each}_{suffix}" for each in ("forward", "backward")]


def large(dtype: torch.dtype = torch.float32, num_responses: int = 300, num_hidden: int = 700) -> dict:
    """So many rows that threads share them, with repeated ones."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(400, num_hidden, generator=generator) + 3
    return {
        **make_inputs("repeated", dtype),
        "hidden": hidden.to(dtype),
        "last_index": torch.randint(400, (num_responses,), generator=generator),
        "weight": torch.randn(1, num_hidden, generator=generator).to(dtype) / num_hidden**0.5,
        "norm_weight": torch.randn(num_hidden, generator=generator).to(dtype),
        "labels": torch.rand(num_responses, generator=generator),
        "label_weights": torch.rand(num_responses, generator=generator),
    }


@pytest.mark.parametrize("final_norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_with_a_large_mean(dtype, final_norm, assert_accurate):
    check({**large(dtype), "final_norm": final_norm}, "cpu", assert_accurate)


def test_threads_change_nothing():
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(results(large(), "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_wrong_result_fails_the_tolerance(assert_accurate):
    inputs = make_inputs("odd")
    truth = results(exact(inputs), "reference")
    for place, got in enumerate(results({**inputs, "eps": 1e-3}, "cpu")[3:], 3):
        with pytest.raises(AssertionError, match="above the allowed"):
            assert_accurate(got, truth[place])


@pytest.mark.parametrize("parts", ["loss", "logits"])
def test_one_of_two_outputs_has_a_gradient(parts, assert_accurate):
    check(make_inputs("layer"), "cpu", assert_accurate, parts=parts)


@pytest.mark.parametrize("names", [each for n in (1, 2) for each in itertools.combinations(LEAVES, n)])
def test_frozen_inputs(names, assert_accurate):
    check(make_inputs("layer"), "cpu", assert_accurate, names=names)


def test_frozen_inputs_get_no_memory():
    inputs = make_inputs("layer")
    inputs, leaves = with_leaves(inputs, ("weight",))
    with torch.profiler.profile(profile_memory=True) as profile:
        discriminator_head(**inputs).loss.backward()
    assert leaves[0].grad is not None and inputs["hidden"].grad is None
    most = max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    assert most < inputs["hidden"].nbytes


def test_strides():
    inputs = make_inputs("odd")
    expected = results(inputs, "cpu")
    wide = {name: inputs[name].repeat_interleave(2, -1)[..., ::2] for name in ("hidden", "weight", "norm_weight")}
    wide |= {name: inputs[name].repeat_interleave(3)[::3] for name in ("last_index", "labels", "label_weights")}
    assert not any(value.is_contiguous() for value in wide.values())
    padded = torch.full((101, 24), math.nan)[:, :17].copy_(inputs["hidden"])  # rows apart: read where they lie
    for other in ({**inputs, **wide}, {**inputs, "hidden": padded}):
        leaf = other["hidden"].requires_grad_()
        out = discriminator_head(**other)
        torch.testing.assert_close(out.logits, expected[0], rtol=0, atol=0)
        out.logits.sum().backward()  # a gradient of stride 0
        want, (hidden,) = with_leaves(inputs, ("hidden",))
        discriminator_head(**want).logits.backward(torch.ones(13))
        torch.testing.assert_close(leaf.grad, hidden.grad, rtol=0, atol=0)
    inputs, (hidden,) = with_leaves(inputs, ("hidden",))
    gradients = [
        torch.autograd.grad(discriminator_head(**inputs).logits, hidden, pushes)[0]
        for pushes in (torch.arange(26.0)[::2], torch.arange(26.0)[::2].clone())
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_is_kept_without_a_gradient(backend):
    inputs, _ = with_leaves(make_inputs("odd"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each), lambda each: each):
        with torch.no_grad():
            out = discriminator_head(**inputs, backend=backend)
        frozen = discriminator_head(**make_inputs("odd"), backend=backend)
        assert saved == [] and not any(value.requires_grad for value in (*out, *frozen))
        trained = discriminator_head(**inputs, backend=backend)
    assert saved and trained.logits.requires_grad
    for ours, theirs in zip(out, trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_large_and_infinite_logits(backend):
    hidden = torch.tensor([[1e4], [-1e4], [math.inf], [math.nan]], requires_grad=True)
    labels, index = torch.tensor([False, True]), torch.arange(2)
    out = discriminator_head(hidden, index, torch.ones(1, 1), labels=labels, norm=2.0, backend=backend)
    torch.testing.assert_close(out.loss, torch.tensor(1e4))
    out.loss.backward()
    assert hidden.grad[:, 0].tolist() == [0.5, -0.5, 0.0, 0.0]
    with torch.no_grad():
        out = discriminator_head(hidden, torch.arange(4), torch.ones(1, 1), backend=backend)
    assert out.scores[:3].tolist() == [1.0, 0.0, 1.0] and out.scores[3].isnan()
    assert out.similarity_rewards[:2].tolist() == [0.0, 1.0] and out.similarity_rewards[2:].isnan().all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_norm_of_transformers(dtype, backend, assert_accurate):
    generator = torch.Generator().manual_seed(0)
    hidden, index = 3 * torch.randn(20, 64, generator=generator), torch.tensor([3, 19, 7])
    norm, score = Qwen2RMSNorm(64, eps=1e-5), torch.nn.Linear(64, 1)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(64, generator=generator))
        norm, score, hidden = norm.to(dtype), score.to(dtype), hidden.to(dtype)
        peer = score(norm(hidden))[index, 0]
        values = {"hidden": hidden, "weight": score.weight, "bias": score.bias, "norm_weight": norm.weight}
        options = {"last_index": index, "final_norm": "rms", "eps": 1e-5}
        out = discriminator_head(**values, **options, backend=backend)
        truth = discriminator_head(**exact(values), **options)
    assert_accurate(out.logits, truth.logits, peer)
    if dtype == torch.float32:
        torch.testing.assert_close(out.logits, peer, rtol=0, atol=1e-6)


def test_auto_is_a_function_of_device_and_dtype(native_calls):
    for dtype in (torch.float16, torch.float64):
        out = discriminator_head(**make_inputs("odd", dtype))
        assert out.logits.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert native_calls == []
    for dtype in (torch.float32, torch.bfloat16):
        assert discriminator_head(**make_inputs("odd", dtype)).logits.dtype == torch.float32
    assert len(native_calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["tiny", "layer"])
def test_opcheck(case, dtype):
    inputs = make_inputs(case, dtype)
    tensors = [inputs[name] for name in ("hidden", "last_index", "weight", "bias", "norm_weight", "norm_bias")]
    numbers = (inputs["final_norm"] or "none", 1e-6, 1.7, 0.1, 3.0)
    ops = torch.ops.ril_kernels
    for labels, weights, keep in ((inputs["labels"], inputs["label_weights"], True), (None, None, False)):
        torch.library.opcheck(ops.discriminator_head.default, (*tensors, labels, weights, *numbers, keep, "cpu"))
    tensors = [*tensors[:3], *tensors[4:], inputs["labels"], inputs["label_weights"]]
    num = len(inputs["labels"])
    rows = (torch.rand(num), torch.rand(num, 4), torch.rand(num), torch.rand(()))
    for needs in ([True] * 5, [False, True, False, False, False]):
        torch.library.opcheck(ops.discriminator_head_grad.default, (*tensors, *rows, 1.7, 0.1, 3.0, needs, "cpu"))


@pytest.mark.parametrize("case", ["tiny", "layer"])
def test_compiles_without_a_graph_break(case):
    inputs, leaves = with_leaves(make_inputs(case))

    def function(*values):
        out = discriminator_head(**{**inputs, **dict(zip(LEAVES, values, strict=True))})
        return out.loss + out.logits.sum(), out.similarity_rewards

    values = [inputs[name] for name in LEAVES]
    expected, compiled = function(*values), torch.compile(function, fullgraph=True, backend="aot_eager")(*values)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=0)
    gradients = [torch.autograd.grad(total, leaves) for total, _ in (expected, compiled)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


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


def test_label_smoothing():
    logits = torch.tensor([LN3])
    # 0.9 of ln(4/3) and 0.1 of ln 4
    expected = torch.tensor(0.9 * math.log(4 / 3) + 0.1 * math.log(4))
    torch.testing.assert_close(discriminator_loss(logits, torch.tensor([0.9]), norm=1), expected)
    hidden, index, weight = logits[:, None], torch.tensor([0]), torch.ones(1, 1)
    for labels, smoothing in ((torch.tensor([True]), 0.1), (torch.tensor([0.9]), 0.0)):
        out = discriminator_head(hidden, index, weight, labels=labels, label_smoothing=smoothing, norm=1)
        assert isinstance(out, DiscriminatorOutput)
        torch.testing.assert_close(out.loss, expected)


def error_cases() -> list:
    hidden, last, weight = torch.zeros(4, 3), torch.tensor([1, 3]), torch.zeros(1, 3)
    labels, three, meta = torch.tensor([True, False]), torch.zeros(3), {"device": "meta"}
    rms, with_loss = {"final_norm": "rms"}, {"labels": labels, "norm": 2.0}
    value = ValueError

    def case(error, message, **changes):
        return {"hidden": hidden, "last_index": last, "weight": weight, **changes}, error, message

    return [
        case(TypeError, r"hidden: got list, expected a torch\.Tensor\. Pass the states before the", hidden=[]),
        case(value, r"hidden: got shape \(1, 4, 3\), expected \(T, H\)\. Pack", hidden=hidden[None]),
        case(TypeError, r"hidden: got dtype int32", hidden=hidden.int()),
        case(TypeError, r"last_index: got dtype float32, expected int64", last_index=last.float()),
        case(value, r"last_index: got the value 4, .*\[0, 4\) where T = 4\. It c", last_index=last + 1),
        case(value, r"last_index: got the value -1, .*\[0, 4\)", last_index=last - 2),
        case(value, r"last_index: got shape \(0,\).*An empty batch", last_index=last[:0]),
        case(value, r"last_index: got device meta, expected cpu, where hidden", last_index=last.to("meta")),
        case(value, r"weight: got shape \(3,\), expected \(1, H\) with H = 3 as in h", weight=weight[0]),
        case(value, r"weight: got shape \(2, 3\), expected \(1, H\)", weight=torch.zeros(2, 3)),
        case(TypeError, r"weight: got dtype float16, expected float32\. Cast it", weight=weight.half()),
        case(TypeError, r"weight: got NoneType, expected a torch\.Tensor", weight=None),
        case(value, r"bias: got shape \(2,\), expected \(1,\)", bias=torch.zeros(2)),
        case(value, r"bias: got device meta, expected cpu", bias=torch.zeros(1, **meta)),
        case(value, r"final_norm: got 'batch', expected 'rms', 'layer' or None\. None is", final_norm="batch"),
        case(value, r"norm_weight: got a tensor with final_norm None, expected None\. Pass final_n", norm_weight=three),
        case(value, r"norm_weight: got shape \(4,\), expected \(H,\) with H = 3 as in hidden\. Pass the final norm's",
             norm_weight=torch.zeros(4), **rms),
        case(TypeError, r"norm_weight: got dtype float64, expected float32\. Cast", norm_weight=three.double(), **rms),
        case(value, r"norm_bias: got a tensor with final_norm 'rms', expected None\. Only", norm_bias=three, **rms),
        case(value, r"norm_bias: got a tensor with final_norm None, expected None\. Only", norm_bias=three),
        case(value, r"eps: got -1e-06, expected a finite number of at least 0\. Pass the final", eps=-1e-6),
        case(value, r"temperature: got 0\.0, expected a finite number above 0\. 1 leaves", temperature=0.0),
        case(value, r"label_smoothing: got 0\.5, expected a number below 0\.5", label_smoothing=0.5, **with_loss),
        case(value, r"label_smoothing: got -0\.1, expected a finite number of at", label_smoothing=-0.1, **with_loss),
        case(value, r"label_smoothing: got a value without labels, expected labels with it", label_smoothing=0.1),
        case(value, r"label_weights: got a value without labels, expected labels", label_weights=torch.ones(2)),
        case(value, r"norm: got a value without labels, expected labels with it\. Without", norm=2.0),
        case(value, r"norm: got None with labels, expected a number above 0\. Pass the number", labels=labels),
        case(value, r"norm: got 0, expected a finite number above 0\. Pass the number of", labels=labels, norm=0),
        case(value, r"labels: got shape \(3,\), expected \(N,\) with N = 2", labels=three, norm=2.0),
        case(TypeError, r"labels: got dtype int64, expected bool or", labels=last, norm=2.0),
        case(value, r"labels: got a value outside of \[0, 1\]", labels=torch.tensor([0, 1.5]), norm=2.0),
        case(value, r"labels: got a value outside of \[0, 1\]", labels=torch.tensor([0, math.nan]), norm=2.0),
        case(value, r"labels: got device meta, expected cpu", labels=labels.to("meta"), norm=2.0),
        case(value, r"label_weights: got values from -1 to 1, expected finite values of at least 0\. 0 leaves",
             label_weights=torch.tensor([-1.0, 1.0]), **with_loss),
        case(value, r"label_weights: got values from nan", label_weights=torch.tensor([math.nan, 1.0]), **with_loss),
        case(value, r"label_weights: got values from 1 to inf", label_weights=torch.tensor([1, math.inf]), **with_loss),
        case(value, r"label_weights: got shape \(3,\), expected \(N,\)", label_weights=three, **with_loss),
        case(TypeError, r"label_weights: got dtype int64", label_weights=last, **with_loss),
        case(value, r"label_weights: got device meta", label_weights=torch.ones(2, **meta), **with_loss),
        case(value, r"backend: got 'gpu', expected one of 'auto'", backend="gpu"),
        case(value, r"backend: got 'triton' for float32 on cpu, expected", backend="triton"),
        case(value, r"backend: got 'cpu' for float64 on cpu, expected float32 or", backend="cpu",
             hidden=hidden.double(), weight=weight.double()),
    ]  # fmt: skip


@pytest.mark.parametrize(("inputs", "error", "message"), error_cases())
def test_head_errors(inputs, error, message, native_calls):
    with pytest.raises(error, match=message):
        discriminator_head(**inputs)
    assert native_calls == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(2).half()}, TypeError, r"logits: got dtype float16, expected float32 or float64"),
        ({"labels": torch.zeros(3)}, ValueError, r"labels: got shape \(3,\), expected \(N,\) with N = 2 as in log"),
        ({"labels": torch.tensor([0, 1])}, TypeError, r"labels: got dtype int64, expected bool or float32"),
        ({"labels": torch.tensor([0.0, 1.5])}, ValueError, r"labels: got a value outside of \[0, 1\]"),
        ({"labels": torch.zeros(2, device="meta")}, ValueError, r"labels: got device meta, expected cpu, where logits"),
        ({"norm": 0}, ValueError, r"norm: got 0, expected a finite number above 0\. Pass the number of responses"),
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
