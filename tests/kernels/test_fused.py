"""The fused forms of token_logprob and policy_loss against the reference in float64: every loss, both dtypes of the
C++ epilogue, vectorised and scalar, whole and in chunks."""

import math

import pytest
import torch
import torch.utils.checkpoint

from ril_kernels import _native, policy_loss, token_logprob
from ril_kernels.policy_loss.reference import CASES as LOSS_CASES
from ril_kernels.policy_loss.reference import LOSS_TYPES
from ril_kernels.policy_loss.reference import make_inputs as loss_inputs
from ril_kernels.token_logprob import memory, tiles
from ril_kernels.token_logprob.head import Head, spans
from ril_kernels.token_logprob.reference import CASES, make_inputs

NAMES = ("hidden", "lm_head", "bias")


@pytest.fixture(params=["vectors", "scalar"])
def isa(request, monkeypatch):
    monkeypatch.setattr(_native, "ISA", ["vectors", "scalar"].index(request.param))


# Budgets in bytes. Cases have up to 257 columns: 1 KiB a row.
BUDGETS = {
    "whole": {},
    "row by row": {"WORK_BYTES": 1, "MAX_ROWS": 1, "CACHE_BYTES": 1},
    "a few rows and columns": {"WORK_BYTES": 2000, "TILE_BYTES": 100, "MAX_ROWS": 3},
    "columns one by one": {"TILE_BYTES": 1},
    "a later tile is the largest": {"TILE_BYTES": 2500, "MAX_ROWS": 3},
}


@pytest.fixture(params=BUDGETS)
def budget(request, monkeypatch):
    for name, value in BUDGETS[request.param].items():
        monkeypatch.setattr(tiles, name, value)


def exact(inputs: dict) -> dict:
    return {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in inputs.items()}


def logprob_results(inputs: dict, backend: str) -> list[torch.Tensor]:
    values = {name: inputs[name].detach().clone().requires_grad_() for name in NAMES if name in inputs}
    logprob, entropy = token_logprob(**{**inputs, **values}, return_entropy=True, backend=backend)
    weights = torch.linspace(-1, 1, len(logprob))
    total = (weights * logprob + 0.3 * weights.flip(0) * entropy).sum()
    return [logprob.detach(), entropy.detach(), *torch.autograd.grad(total, values.values())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_token_logprob(case, dtype, isa, budget, assert_accurate):
    inputs = make_inputs(case, dtype)
    truth, peer = logprob_results(exact(inputs), "reference"), logprob_results(inputs, "reference")
    for got, true, usual in zip(logprob_results(inputs, "cpu"), truth, peer, strict=True):
        assert got.dtype == usual.dtype
        assert_accurate(got, true.double(), usual)


def test_a_wrong_gradient_fails_the_tolerance(assert_accurate):
    inputs = make_inputs("everything")
    truth = logprob_results(exact(inputs), "reference")
    counted = int((inputs["target"] >= 0).nonzero()[0])
    wrong = [{"temperature": inputs["temperature"] * 1.0001}, {"softcap": 5.001}]
    wrong += [{"target": inputs["target"].index_fill(0, torch.tensor([counted]), -100)}]  # one row left out
    for change in wrong:
        for got, true in list(zip(logprob_results({**inputs, **change}, "cpu"), truth, strict=True))[2:]:
            with pytest.raises(AssertionError, match="above the allowed"):
                assert_accurate(got, true.double())


@pytest.mark.parametrize("stride", [0, 2])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=["log-prob", "entropy", "both"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_that_are_not_contiguous(backend, which, stride):
    inputs = make_inputs("odd")  # every row counts, so that nothing is gathered on the way
    values = {name: inputs[name].clone().requires_grad_() for name in NAMES}
    outputs = token_logprob(**{**inputs, **values}, return_entropy=True, backend=backend)
    num_tokens = len(inputs["target"])
    line = torch.linspace(-1, 1, 2 * num_tokens)
    strided = torch.as_strided(line, (num_tokens,), (stride,), 0)
    assert strided.stride() == (stride,)

    def gradients(of_each: torch.Tensor) -> tuple:
        return torch.autograd.grad(
            [outputs[i] for i in which], values.values(), [of_each for _ in which], retain_graph=True
        )

    expected = gradients(strided.contiguous())
    assert all(float(gradient.abs().max()) > 1e-3 for gradient in expected)
    for got, want in zip(gradients(strided), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_odd_vocabulary(dtype, isa, assert_accurate):
    # Several blocks of the C++ loop with a tail, logits far apart, a soft-cap and a temperature per row.
    generator = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(5, 32, generator=generator)).to(dtype)
    inputs = {"hidden": hidden, "lm_head": torch.randn(5003, 32, generator=generator).to(dtype)}
    inputs |= {"target": torch.tensor([0, 5002, 17, 1024, 1023]), "softcap": 30.0}
    inputs["temperature"] = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.1])
    truth, peer = logprob_results(exact(inputs), "reference"), logprob_results(inputs, "reference")
    for got, true, usual in zip(logprob_results(inputs, "cpu"), truth, peer, strict=True):
        assert_accurate(got, true.double(), usual)


def stats(logits, target, temperature, softcap=0.0, columns=None, tops=None) -> list[torch.Tensor]:
    """Log-prob, entropy and log-sum-exp by tile_stats, tile by tile where `columns` are given."""
    count, num_vocab = logits.shape
    known = [
        torch.empty(count, 4, dtype=torch.float64),
        *torch.empty(2, count),
        torch.empty(count, dtype=torch.float64),
    ]
    for i, each in enumerate(columns or [slice(0, num_vocab)]):
        tile = logits[:, each] if columns is None else logits[:, each].contiguous()
        torch.ops.ril_kernels.tile_stats(
            tile,
            each.start,
            num_vocab,
            target,
            temperature,
            softcap,
            known[0],
            tops and tile,
            tops and tops[i],
            *known[1:],
        )
        if tops is not None:
            logits[:, each] = tile
    return known[1:]


def grad(logits, target, temperature, softcap, lse, entropy, grad_logprob, grad_entropy) -> None:
    """d(logits) in place by tile_grad."""
    rows = lse, entropy, grad_logprob, grad_entropy
    torch.ops.ril_kernels.tile_grad(logits, logits, 0, logits.shape[1], target, temperature, softcap, None, *rows)


def test_infinities_and_nan(isa):
    inf = math.inf
    logits = torch.full((4, 37), -inf)
    logits[0, 5] = 2.0  # a certainty: log-prob 0, entropy 0
    logits[1, [3, 36]] = 700.0  # two entries share it, far above what exp can hold
    logits[2] = -3e38  # as masked vocabularies have it, and all equal
    logits[3, :20] = math.nan
    ones = torch.ones(4)
    logprob, entropy, lse = stats(logits, torch.tensor([5, 36, 7, 3]), ones)
    torch.testing.assert_close(logprob[:3], torch.tensor([0.0, -math.log(2), -math.log(37)]))
    torch.testing.assert_close(entropy[:3], torch.tensor([0.0, math.log(2), math.log(37)]))
    assert logprob[3].isnan() and lse[3].isnan()  # a NaN is never made to look like a number
    before = logits.clone()
    grad(logits, torch.tensor([5, 36, 7, -1]), ones, 0.0, lse, entropy, ones, 0.5 * ones)
    assert (logits[0] == 0).all() and (logits[3] == 0).all() and before[3].isnan().any()
    torch.testing.assert_close(logits[1, [3, 36]], torch.tensor([-0.5, 0.5]))
    assert (logits[1, :3] == 0).all() and logits[2].isfinite().all()


def test_every_element_is_written_and_nothing_else(isa):
    storage = torch.full((4, 50), math.nan)
    logits = storage[:, :43]  # a row stride larger than V: what lies between the rows is not ours
    logits.copy_(torch.randn(4, 43, generator=torch.Generator().manual_seed(0)))
    target, ones = torch.tensor([0, -1, 42, 7]), torch.ones(4)
    logprob, entropy, lse = stats(logits, target, ones)
    assert logprob[1] == entropy[1] == 0 and not (logprob + entropy + lse).isnan().any()
    grads = torch.tensor([1.0, 1.0, 0.0, -2.0]), torch.zeros(4)
    grad(logits, target, ones, 0.0, lse, entropy, *grads)
    assert not logits.isnan().any() and storage[:, 43:].isnan().all()
    assert (logits[1] == 0).all() and (logits[2] == 0).all()
    torch.testing.assert_close(logits.sum(1), torch.zeros(4), rtol=0, atol=1e-6)


def test_tiles_of_a_row_and_what_is_kept_of_it(isa):
    # The largest logit comes late, so that the tops of earlier blocks differ; masked columns; a target in each part.
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(4, 5003, generator=generator)
    logits[0, :2000] -= 100.0  # exp of the distance to the last top is 0
    logits[1, 17:4000] = -math.inf
    target, temperature = torch.tensor([4000, 16, 1023, 5002]), torch.tensor([1.0, 1.0, 0.7, 1.0])
    whole = stats(logits, target, temperature)
    exact_z = logits.double() / temperature.double()[:, None]
    torch.testing.assert_close(whole[2], exact_z.logsumexp(1), rtol=1e-6, atol=0)
    columns = spans(5003, 1200)
    tops = [torch.empty(4, -(-(each.stop - each.start) // tiles.BLOCK)) for each in columns]
    kept = logits.clone()
    for ours, theirs in zip(stats(kept, target, temperature, columns=columns, tops=tops), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    pushes, out = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.full_like(logits, math.nan)
    for each, top in zip(columns, tops, strict=True):
        tile, part = kept[:, each].contiguous(), out[:, each].contiguous()
        torch.ops.ril_kernels.tile_grad(
            tile, part, each.start, 5003, target, temperature, 0.0, top, whole[2], whole[1], pushes, None
        )
        out[:, each] = part
    onehot = torch.nn.functional.one_hot(target, 5003)
    expected = (pushes / temperature)[:, None] * (onehot - exact_z.softmax(1))
    torch.testing.assert_close(out.double(), expected, rtol=3e-6, atol=1e-9)
    assert (out[3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [19, 32])
def test_opcheck(dtype, stride):
    logits, target, ones = torch.randn(3, stride, dtype=dtype)[:, :19], torch.tensor([1, -1, 18]), torch.ones(3)
    sums, lse, tops = torch.zeros(3, 4, dtype=torch.float64), ones.double(), torch.ones(3, 1)
    keeps = dtype == torch.float32
    options = (target, ones, 0.0 if keeps else 4.0)
    kept = (torch.empty_like(logits), tops) if keeps else (None, None)
    arguments = (logits, 0, 19, *options, sums, *kept, ones.clone(), ones.clone(), lse.clone())
    torch.library.opcheck(torch.ops.ril_kernels.tile_stats.default, arguments)
    for kept in (True, False) if keeps else (False,):
        arguments = (logits, torch.empty_like(logits), 0, 19, *options, tops if kept else None, lse, ones, ones)
        torch.library.opcheck(torch.ops.ril_kernels.tile_grad.default, (*arguments, None if kept else ones))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["odd", "everything"])
def test_compiles_without_a_graph_break(case, dtype):
    inputs = make_inputs(case, dtype)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(**inputs):
        with torch.no_grad():
            return token_logprob(**inputs, return_entropy=True)

    expected = token_logprob(**inputs, return_entropy=True)
    # Compiled, rows that do not count are not left out: a GEMM of another shape, so another rounding.
    bound = 1e-6 if "some_ignored" in CASES[case][-1] and dtype == torch.float32 else 0
    torch.testing.assert_close(function(**inputs), expected, rtol=bound, atol=bound)


def loss_results(inputs: dict, backend: str) -> tuple[list[torch.Tensor], tuple]:
    values = {name: inputs[name].detach().clone().requires_grad_() for name in NAMES if name in inputs}
    loss, metrics = policy_loss(**{**inputs, **values}, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, values.values())], metrics


SETTINGS = [{"loss_type": name} for name in LOSS_TYPES] + [
    {"loss_type": "grpo", "ratio_level": "sequence"},
    {"loss_type": "dapo", "ratio_level": "sequence", "clip_max": 2.0},
    {"clip_max": 1.3},
    {"entropy_coef": 0.01},
    {"loss_type": "cispo", "clip_high": 1.1, "sampler": True},
    {"sampler": True, "importance_cap": 1.05, "weights": True},
    {"kl_estimator": "k1"},
    {"kl_estimator": "k2"},
]


def with_settings(case: str, dtype: torch.dtype, settings: dict) -> dict:
    settings = dict(settings)
    inputs = loss_inputs(case, dtype)
    per_token = torch.float64 if dtype == torch.float64 else torch.float32
    noise = torch.randn(2, len(inputs["target"]), generator=torch.Generator().manual_seed(5)).to(per_token) * 0.2
    if settings.pop("sampler", False):
        behavior = inputs.get("behavior_logprobs", torch.full_like(noise[0], -2.0))
        inputs["sampler_logprobs"] = behavior + noise[0]
    if settings.pop("weights", False):
        inputs["importance_weights"] = noise[1].exp()
    if "kl_estimator" in settings and "reference_logprobs" not in inputs:
        inputs |= {"reference_logprobs": noise[0] - 2, "beta": 0.1}
    return {**inputs, **settings}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("case", LOSS_CASES)
def test_policy_loss(case, settings, budget, assert_accurate):
    inputs = with_settings(case, torch.float32, settings)
    truth, _ = loss_results(exact(inputs), "reference")
    peer, expected = loss_results(inputs, "reference")
    actual, metrics = loss_results(inputs, "cpu")
    for got, true, usual in zip(actual, truth, peer, strict=True):
        assert_accurate(got, true.double(), usual)
    for name in metrics._fields:
        if getattr(expected, name) is not None:
            torch.testing.assert_close(getattr(metrics, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_token_that_was_not_sampled_keeps_its_weight(backend):
    inputs = with_settings("everything", torch.float32, {"sampler": True})
    own, teachers = inputs["sampler_logprobs"], torch.arange(len(inputs["target"])) % 2 == 0
    unknown = {**inputs, "sampler_logprobs": own.masked_fill(teachers, torch.nan)}
    equal = {**inputs, "sampler_logprobs": torch.where(teachers, inputs["behavior_logprobs"], own)}
    for got, want in zip(loss_results(unknown, backend)[0], loss_results(equal, backend)[0], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("settings", [{}, {"ratio_level": "sequence"}, {"entropy_coef": 0.01}], ids=str)
@pytest.mark.parametrize("case", LOSS_CASES)
def test_policy_loss_in_bfloat16(case, settings, isa, assert_accurate):
    inputs = with_settings(case, torch.bfloat16, settings)
    truth, _ = loss_results(exact(inputs), "reference")
    peer, _ = loss_results(inputs, "reference")
    for got, true, usual in zip(loss_results(inputs, "cpu")[0], truth, peer, strict=True):
        assert got.dtype == usual.dtype
        assert_accurate(got, true.double(), usual)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_policy_terms_gradcheck(settings):
    inputs = with_settings("everything", torch.float64, settings)

    def function(*values):
        return policy_loss(**{**inputs, **dict(zip(NAMES, values, strict=True))}, backend="reference")[0]

    if settings.get("loss_type") == "cispo":
        # Its factor is a constant: gradcheck cannot apply. d loss / d log-prob is -factor x A x importance / norm.
        inputs |= {"beta": 0.0, "reference_logprobs": None, "kl_mask": None, "kl_norm": None}
        token = next(i for i in range(len(inputs["target"])) if inputs["mask"][i])
        _, metrics = loss_results(inputs, "reference")
        hidden = inputs["hidden"].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(policy_loss(**{**inputs, "hidden": hidden})[0], hidden)
        head = {name: inputs[name] for name in ("lm_head", "target", "bias", "temperature", "softcap")}
        (per_logprob,) = torch.autograd.grad(token_logprob(hidden, **head)[token], hidden)
        ratio = (metrics.logprobs - inputs["behavior_logprobs"]).exp()[token].clamp(max=inputs.get("clip_high", 0.2))
        if "sampler_logprobs" in inputs:
            ratio = ratio * (inputs["behavior_logprobs"] - inputs["sampler_logprobs"]).exp()[token].clamp(max=2.0)
        rewards, groups = inputs["rewards"].double(), inputs["groups"]
        response = inputs["response_index"][token]
        advantage = rewards[response] - rewards[groups == groups[response]].mean()
        expected = -ratio * advantage / inputs["norm"] * per_logprob[token]
        torch.testing.assert_close(gradient[token], expected, rtol=1e-6, atol=1e-9)
        return
    assert torch.autograd.gradcheck(function, tuple(inputs[name].requires_grad_() for name in NAMES))


def test_tokens_without_a_gradient_cost_nothing(monkeypatch):
    inputs = loss_inputs("ragged")
    inputs |= {"beta": 0.0, "reference_logprobs": None, "kl_mask": None, "kl_norm": None}
    inputs["rewards"] = torch.tensor([1.0, 0.5, 1.0, 0.5, 0.0])  # group 2 (responses 1 and 3) is of one mind
    idle = (inputs["response_index"] == 1) | (inputs["response_index"] == 3)
    seen = []
    product = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, rows, *rest: seen.append(rows) or product(self, rows, *rest))
    loss, metrics = policy_loss(**{**inputs, "hidden": inputs["hidden"].requires_grad_()})
    assert sum(rows.stop - rows.start for rows in seen) == int(
        (~idle).sum()
    ) == metrics.num_computed and metrics.num_tokens == len(idle)
    (gradient,) = torch.autograd.grad(loss, inputs["hidden"])
    pushed = (gradient != 0).any(dim=1)  # clipped tokens have no gradient either, and that takes their log-prob to know
    assert not pushed[idle].any() and 0 < int(pushed.sum()) < int((~idle).sum())
    torch.testing.assert_close(metrics.gradient_fraction, pushed.float().mean())
    assert (metrics.logprobs[idle] == 0).all() and (metrics.logprobs[~idle] < 0).all()


def test_logits_held_in_the_memory_of_their_gradient(monkeypatch, assert_accurate):
    """More rows than the budget holds: d(lm_head) lends its memory to the logits of H of them."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_hidden, num_vocab = 60, 20, 2500
    inputs = {"hidden": 3 * torch.randn(num_tokens, num_hidden, generator=generator)}
    inputs |= {"lm_head": torch.randn(num_vocab, num_hidden, generator=generator)}
    inputs |= {"target": torch.randint(num_vocab, (num_tokens,), generator=generator), "norm": 60.0}
    inputs |= {"response_index": torch.arange(num_tokens) // 6, "advantages": torch.linspace(-1, 1, 10)}
    inputs |= {"bias": torch.randn(num_vocab, generator=generator)}
    monkeypatch.setattr(tiles, "TILE_BYTES", 32 * 600 * 4)
    monkeypatch.setattr(tiles, "WORK_BYTES", 15 * num_vocab * 4 + tiles.TILE_BYTES)
    plans, chunks = [], tiles.TiledPass._chunks
    monkeypatch.setattr(tiles.TiledPass, "_chunks", lambda self, lends: plans.append(chunks(self, lends)) or plans[-1])
    for settings in ({}, {"entropy_coef": 0.1}, {"softcap": 20.0}):  # the last two cannot keep exp(z - top)
        given = {**inputs, **settings}
        truth, peer = loss_results(exact(given), "reference")[0], loss_results(given, "reference")[0]
        for got, true, usual in zip(loss_results(given, "cpu")[0], truth, peer, strict=True):
            assert_accurate(got, true.double(), usual)
    expected = [(slice(0, 35), 20), (slice(35, 48), 0), (slice(48, 60), 0)]
    assert [[(chunk.rows, chunk.lent) for chunk in plan] for plan in plans] == [expected] * 3


@pytest.mark.parametrize("early_stop", [True, False])
def test_inside_a_checkpoint(early_stop, monkeypatch):
    """The checkpoint's hooks must not see the graph inside the forward: it would be replayed there, over the memory
    that the call is using."""
    inputs = loss_inputs("ragged")
    plain, _ = loss_results(inputs, "cpu")
    monkeypatch.setattr(tiles, "WORK_BYTES", 1)
    monkeypatch.setattr(tiles, "CACHE_BYTES", 1)
    hidden, calls = inputs["hidden"].clone().requires_grad_(), []
    lm_head = inputs["lm_head"].clone().requires_grad_()

    def region(hidden, lm_head):
        calls.append(1)
        return policy_loss(**{**inputs, "hidden": (hidden / 2).exp().log() * 2, "lm_head": lm_head})[0]

    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        loss = torch.utils.checkpoint.checkpoint(region, hidden, lm_head, use_reentrant=False)
        assert len(calls) == 1
        loss.backward()
    assert len(calls) == 2
    torch.testing.assert_close([loss.detach(), hidden.grad, lm_head.grad], plain, rtol=1e-5, atol=1e-6)


def test_under_another_default_device():
    inputs = make_inputs("odd")
    expected = token_logprob(**inputs)
    memory.release()
    with torch.device("meta"):
        torch.testing.assert_close(token_logprob(**inputs), expected)
    torch.testing.assert_close(token_logprob(**inputs), expected)


def test_memory_of_a_gradient_is_used_again_only_when_nothing_holds_it(monkeypatch):
    monkeypatch.setattr(memory, "HUGE_FROM", 0)
    inputs = make_inputs("odd")

    def gradient() -> torch.Tensor:
        lm_head = inputs["lm_head"].detach().clone().requires_grad_()
        token_logprob(**{**inputs, "lm_head": lm_head}).sum().backward()
        return lm_head.grad

    held = gradient()
    expected, address = held.clone(), held.data_ptr()
    for hold in (lambda x: x, lambda x: x.detach(), lambda x: x[1:].T, lambda x: x.numpy(), lambda x: x.data):
        memory.release()
        held = gradient()
        address, part = held.data_ptr(), hold(held)
        del held
        other = gradient()
        assert other.data_ptr() != address and torch.equal(other, expected)
        del part, other
        assert memory.num_holders(memory._kept.gradient) == 1
        address = memory._kept.gradient.data_ptr()
        again = gradient()
        assert again.data_ptr() == address and torch.equal(again, expected)
        del again


def test_repeated_runs_are_bitwise_equal():
    inputs = with_settings("everything", torch.float32, {"loss_type": "grpo"})
    first, second = (loss_results(inputs, "cpu")[0] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_frozen_inputs_scaled_loss_and_second_backward():
    inputs = loss_inputs("ragged")
    full, _ = loss_results(inputs, "cpu")
    hidden = inputs["hidden"].clone().requires_grad_()
    loss, _ = policy_loss(**{**inputs, "hidden": hidden})
    (3 * loss).backward()
    torch.testing.assert_close(hidden.grad, 3 * full[1])
    with pytest.raises(RuntimeError, match="policy_loss: backward ran before, expected once"):
        loss.backward()
    lm_head = inputs["lm_head"].clone().requires_grad_()
    loss, _ = policy_loss(**{**inputs, "lm_head": lm_head})
    loss.backward()
    torch.testing.assert_close(lm_head.grad, full[2])
    with torch.no_grad():
        torch.testing.assert_close(policy_loss(**inputs)[0], full[0])
    assert not policy_loss(**inputs)[0].requires_grad


def test_tied_weights_add_up():
    # hidden comes from the same matrix as the head does: both gradients meet in one leaf.
    inputs = loss_inputs("ragged")
    embedding = inputs["lm_head"].clone().requires_grad_()
    gradients = []
    for backend in ("reference", "cpu"):
        tied = {**inputs, "hidden": torch.tanh(embedding[inputs["target"]]), "lm_head": embedding}
        gradients += torch.autograd.grad(policy_loss(**tied, backend=backend)[0], embedding)
    torch.testing.assert_close(*gradients)


def test_named_backends_that_cannot_run_raise():
    inputs = make_inputs("tiny", torch.float16)
    with pytest.raises(ValueError, match="backend: got 'cpu' for float16 on cpu, expected float32 or bfloat16"):
        token_logprob(**inputs, backend="cpu")
    with pytest.raises(ValueError, match="backend: got 'triton' for float16 on cpu, expected float32, bfloat16 or"):
        token_logprob(**inputs, backend="triton")
    with pytest.raises(ValueError, match="backend: got 'gpu', expected one of 'auto', 'reference', 'cpu', 'triton'"):
        token_logprob(**inputs, backend="gpu")
