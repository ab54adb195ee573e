"""sample against distributions that are enumerated here from its description; interpreted.py runs the Triton form
through the same functions."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ril_kernels
from ril_kernels import Sample, _native, sample, token_bits, token_logprob
from ril_kernels.sampling.reference import philox, uniform, unpack_bits

INF, NAN = torch.inf, torch.nan
OPTIONS = {
    "policy": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 1.7},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 5},
    "top_1": {"top_k": 1},
    "top_p": {"top_p": 0.83},
    "little top_p": {"top_p": 0.011},
    "penalty": {"repetition_penalty": 1.35},
    "reward": {"repetition_penalty": 0.6},
    "banned": {"banned": True},
    "all": {"temperature": 0.8, "top_k": 7, "top_p": 0.87, "repetition_penalty": 1.15, "banned": True},
    "all, greedy": {"temperature": 0.0, "top_p": 0.9, "repetition_penalty": 1.5, "banned": True},
}


def numbers(rows: int) -> dict[str, Tensor]:
    """A seed, and the numbers of rows that are all different."""
    row = torch.arange(rows)
    return {"seed": torch.tensor(7), "question": row * 2**33 - 5, "sample_number": row % 8, "position": row // 8}


def with_bits(logits: Tensor, options: dict) -> tuple[dict, Tensor, Tensor]:
    """The arguments of a case; what is banned (V,), and seen (B, V)."""
    rows, vocab = logits.shape
    generator = torch.Generator().manual_seed(1)
    banned = torch.arange(vocab) % 5 == (3 if options.get("banned") else 5)
    ids = torch.randint(vocab, (rows, vocab // 3 + 1), generator=generator)
    seen = torch.zeros(rows, vocab, dtype=torch.bool).scatter(1, ids, True)
    arguments = {**options, **numbers(rows)}
    arguments["banned"] = token_bits(banned.nonzero()[:, 0], vocab) if options.get("banned") else None
    arguments["seen"] = token_bits(ids, vocab) if "repetition_penalty" in options else None
    return arguments, banned, seen


def enumerated(
    logits: Tensor,
    banned: Tensor,
    seen: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Probability of each token (B, V) float64, by comparing every token with every other; and how far the nearest
    cut of top-p is from where it would keep another token (B,)."""
    if temperature == 0:
        temperature, top_k, top_p = 1.0, 1, 1.0
    y = logits.float()
    y = torch.where(seen, torch.where(y > 0, y / repetition_penalty, y * repetition_penalty), y) if seen.any() else y
    y = y.masked_fill(banned, -INF).double()
    ids = torch.arange(y.shape[1])
    goes_first = (y[:, None] > y[..., None]) | ((y[:, None] == y[..., None]) & (ids < ids[:, None]))  # [row, i, j]: j
    kept = y > -INF
    if top_k:
        kept &= goes_first.sum(-1) < top_k
    weights = ((y - y.max(1, keepdim=True).values) / temperature).exp() * kept
    p = weights / weights.sum(1, keepdim=True)
    margin = torch.full((len(y),), INF, dtype=torch.float64)
    if top_p < 1:
        sums = (goes_first * p[:, None]).sum(-1)
        margin = (sums - top_p).abs().masked_fill(~kept, INF).min(1).values
        p = p * (sums < top_p)
    return p / p.sum(1, keepdim=True), margin


def check(logits: Tensor, options: dict, backend: str) -> int:
    """Token, log-probs and bits of every row against the enumeration, but for draws within 1e-6 of another token's;
    gives how many rows those are."""
    arguments, banned, seen = with_bits(logits, options)
    settings = {name: value for name, value in options.items() if name != "banned"}
    p, margin = enumerated(logits, banned, seen & ("repetition_penalty" in options), **settings)
    before = None if arguments["seen"] is None else unpack_bits(arguments["seen"], logits.shape[1])
    token, policy, drawn = sample(logits, **arguments, backend=backend)
    u = uniform(*(arguments[name] for name in ("seed", "question", "sample_number", "position")))[:, None]
    sums = p.cumsum(1)
    expected = torch.searchsorted(sums, u * sums[:, -1:], right=True)
    # The end of the last token is none that a draw can pass.
    ends = (sums - u).abs().masked_fill((p == 0) | (sums > 1 - 1e-12), INF)
    clear = (ends.min(1).values > 1e-6) & (margin > 1e-6)
    torch.testing.assert_close(token[clear], expected[clear, 0], rtol=0, atol=0)
    chosen = token[:, None]
    assert policy.dtype == drawn.dtype == torch.float32
    truth = logits.double().log_softmax(1).gather(1, chosen)[:, 0]
    torch.testing.assert_close(policy.double(), truth, rtol=1e-6, atol=2e-6)
    truth = p.gather(1, chosen)[:, 0].log()
    torch.testing.assert_close(drawn[clear].double(), truth[clear], rtol=1e-6, atol=4e-6)
    if before is not None:
        after = before.scatter(1, chosen, True)
        assert torch.equal(unpack_bits(arguments["seen"], logits.shape[1]), after)
    return int((~clear).sum())


def logits_of(case: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    rows, vocab, scale = CASES[case]
    logits = scale * torch.randn(rows, vocab, generator=generator)
    if case == "ties":
        logits = logits.round()
    if case == "holes":
        logits[torch.rand(rows, vocab, generator=generator) < 0.6] = -INF
        logits[:, 1] = 0.0
    if case == "zeros":
        logits = torch.where(logits > 0.0, 0.0, -0.0)
    return logits.to(dtype)


# (B, V, scale)
CASES = {
    "odd": (24, 37, 2.0),
    "one token": (2, 1, 1.0),
    "two tokens": (24, 2, 1.0),
    "a word": (16, 32, 2.0),
    "ties": (24, 67, 1.0),
    "zeros": (24, 41, 1.0),
    "holes": (24, 67, 2.0),
    "peaked": (24, 67, 30.0),
    "large": (24, 33, 3000.0),
    "blocks": (2, 1029, 2.0),
}


@pytest.fixture(params=["reference", "vectors", "scalar"])
def backend(request, monkeypatch) -> str:
    if request.param == "reference":
        return "reference"
    monkeypatch.setattr(_native, "ISA", ["vectors", "scalar"].index(request.param))
    return "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_form_draws_what_is_enumerated(case, dtype, backend):
    logits = logits_of(case, dtype)
    near = [check(logits, options, backend) for options in OPTIONS.values()]
    assert sum(near) <= 1 + 0.01 * len(near) * len(logits)


def test_a_wrong_form_fails(monkeypatch):
    wrong = {"temperature": lambda x: x * 1.02, "top_k": lambda x: x + 1, "top_p": lambda x: x * 0.9}
    for name, change in wrong.items():

        def slightly_off(logits, name=name, change=change, right=sample, **given):
            return right(logits, **{**given, name: change(given[name])})

        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setitem(check.__globals__, "sample", slightly_off)
            check(logits_of("odd"), OPTIONS["all"], "reference")


def chi_square(tokens: Tensor, p: Tensor) -> float:
    """Probability of counts at least so far from what is expected, given that they come from `p` (V,)."""
    counts, expected = tokens.bincount(minlength=len(p)).double(), len(tokens) * p
    assert (counts[p == 0] == 0).all() and (expected[p > 0] >= 5).all()
    if (p > 0).sum() == 1:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected)[p > 0].sum()
    return float(torch.special.gammaincc(((p > 0).sum() - 1) / 2, statistic / 2))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_chi_square(name, backend):
    # One row of logits; the draws differ in question, sample number and position.
    line = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.7, -0.4, 1.2, 0.1, 0.9, -0.2, 0.5])
    logits = line.expand(20_000, -1)
    arguments, banned, _ = with_bits(logits, OPTIONS[name])
    ids, seen = torch.tensor([2, 5, 9]), torch.zeros(1, 11, dtype=torch.bool)
    if arguments["seen"] is not None:
        arguments["seen"] = token_bits(ids.expand(len(logits), -1), 11)
        seen[0, ids] = True
    settings = {name: value for name, value in OPTIONS[name].items() if name != "banned"}
    p = enumerated(line[None], banned, seen, **settings)[0][0]
    tokens = sample(logits, **arguments, backend=backend).token
    assert chi_square(tokens, p) > 1e-3
    if int((p > 0).sum()) > 1:  # and it would be seen if they came from a slightly other distribution
        other = p.sqrt() * (p > 0)
        assert chi_square(tokens, other / other.sum()) < 1e-3


VECTORS = [  # Random123's known answers of philox4x32 10: counter, key, result
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(low: int, high: int) -> Tensor:
    value = high << 32 | low
    return torch.tensor(value - 2**64 if value >= 2**63 else value)


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_philox_vectors(counter, key, result):
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, words)) == result


def drawn_bits(counter: tuple, key: tuple, vocab: int, backend: str) -> int:
    """The token drawn from equal logits: the top bits of the first word, as many as the vocabulary has."""
    position, sample_number = (torch.tensor([word]) for word in counter[:2])
    named = {"position": position, "sample_number": sample_number, "question": signed(*counter[2:])[None]}
    return int(sample(torch.zeros(1, vocab), seed=signed(*key), **named, backend=backend).token)


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_every_form_draws_by_philox(counter, key, result, backend):
    assert drawn_bits(counter, key, 2**16, backend) == result[0] >> 16


def test_uniform_is_never_0_or_1(monkeypatch):
    for word, expected in ((0, 2.0**-33), (2**32 - 1, 1 - 2.0**-33)):
        monkeypatch.setattr("ril_kernels.sampling.reference.philox", lambda *_, word=word: (torch.tensor([word]),))
        zero = torch.zeros(1, dtype=torch.int64)
        assert float(uniform(zero, zero, zero, zero)) == expected


def test_hand_computed(backend):
    # Probabilities 0.4, 0.3, 0.2, 0.1; every row draws from them.
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0]).log().expand(600, -1)
    expected = {
        (): [0.4, 0.3, 0.2, 0.1],
        (("temperature", 0.5),): [16 / 30, 9 / 30, 4 / 30, 1 / 30],
        (("top_k", 3),): [4 / 9, 3 / 9, 2 / 9, 0],
        (("top_p", 0.65),): [4 / 7, 3 / 7, 0, 0],  # 0 and 0.4 are below 0.65, 0.7 is not
        (("top_k", 3), ("top_p", 0.8)): [4 / 9, 3 / 9, 2 / 9, 0],  # 7/9 of the top 3 is below 0.8
        (("temperature", 0.0),): [1, 0, 0, 0],
        (("top_p", 1e-6),): [1, 0, 0, 0],
        (("banned", token_bits(torch.tensor([0]), 4)),): [0, 1 / 2, 1 / 3, 1 / 6],
    }
    for options, p in expected.items():
        token, policy, drawn = sample(logits, **numbers(600), **dict(options), backend=backend)
        torch.testing.assert_close(policy, logits[0].log_softmax(0)[token])
        torch.testing.assert_close(drawn, torch.tensor(p).log()[token])
        assert set(token.tolist()) == {i for i, each in enumerate(p) if each > 0}


def test_hand_computed_penalty_and_bits(backend):
    # Penalty 2 on tokens 0 and 2: 2 becomes 1, and -1 becomes -2.
    logits = torch.tensor([[2.0, 0.5, -1.0, -INF]]).expand(3, -1)
    seen = token_bits(torch.tensor([[0, 2]] * 3), 4)
    token, policy, drawn = sample(logits, **numbers(3), repetition_penalty=2.0, seen=seen, backend=backend)
    torch.testing.assert_close(policy, logits[0].log_softmax(0)[token])
    torch.testing.assert_close(drawn, torch.tensor([1.0, 0.5, -2.0]).log_softmax(0)[token])
    assert seen[:, 0].tolist() == [5 | 1 << int(each) for each in token]


def test_equal_logits_stay_by_their_ids(backend):
    # Exactly two of the four largest, the lower ids, where Hugging Face's top-k keeps all four.
    logits = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0, 2.0]).expand(40, -1)
    for options in ({"top_k": 2}, {"top_p": 0.3}):
        token, _, drawn = sample(logits, **numbers(40), **options, backend=backend)
        assert set(token.tolist()) == {1, 2}
        torch.testing.assert_close(drawn, torch.full((40,), math.log(0.5)))
    assert (sample(logits, **numbers(40), temperature=0.0, backend=backend).token == 1).all()


def test_the_last_bit_of_a_word_and_of_the_vocabulary(backend):
    for vocab, ids in ((32, [31]), (33, [31, 32]), (64, [31, 32, 63]), (65, [0, 64])):
        bits = token_bits(torch.tensor(ids), vocab)
        assert bits.shape == (-(-vocab // 32),) and unpack_bits(bits, vocab).nonzero()[:, 0].tolist() == ids
        others = [i for i in range(vocab) if i not in ids]
        logits = torch.zeros(4, vocab)
        allowed = token_bits(torch.tensor(others), vocab)
        assert set(sample(logits, **numbers(4), banned=allowed, backend=backend).token.tolist()) <= set(ids)
        seen = torch.zeros(4, len(bits), dtype=torch.int32)
        token = sample(logits, **numbers(4), banned=allowed, repetition_penalty=2.0, seen=seen, backend=backend).token
        assert torch.equal(seen, token_bits(token[:, None], vocab))


def invalid(vocab: int) -> Tensor:
    """Rows from which nothing can be drawn; the last one is sound."""
    logits = torch.zeros(6, vocab)
    logits[0, 3] = NAN
    logits[1, vocab - 1] = INF
    logits[2] = -INF
    logits[3] = NAN
    logits[4, 2:] = -INF  # 0 and 1 are banned
    return logits


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}])
@pytest.mark.parametrize("vocab", [7, 1100])
def test_rows_without_a_draw(vocab, options, backend):
    check_invalid(vocab, options, backend)


def check_invalid(vocab: int, options: dict, backend: str) -> None:
    banned = token_bits(torch.tensor([0, 1]), vocab)
    token, policy, drawn = sample(invalid(vocab), **numbers(6), **options, banned=banned, backend=backend)
    assert token[:5].tolist() == [2] * 5 and policy[:5].isnan().all() and drawn[:5].isnan().all()
    assert token[5] >= 2 and policy[5].isfinite() and drawn[5].isfinite()
    everything = token_bits(torch.arange(vocab), vocab)
    token, policy, drawn = sample(torch.zeros(1, vocab), **numbers(1), **options, banned=everything, backend=backend)
    assert token == 0 and policy.isnan() and drawn.isnan()


def test_a_penalty_that_makes_an_infinity(backend):
    seen = token_bits(torch.tensor([[0]]), 3)
    logits = torch.tensor([[3e38, 0.0, 0.0]])
    token, policy, drawn = sample(logits, **numbers(1), repetition_penalty=0.5, seen=seen, backend=backend)
    assert token == 0 and policy.isnan() and drawn.isnan()


@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_does_not_depend_on_its_batch(name, backend):
    logits = logits_of("ties")
    arguments, _, _ = with_bits(logits, OPTIONS[name])
    fixed = {key: value for key, value in arguments.items() if key in ("seed", "banned") or key in OPTIONS[name]}
    fixed["banned"] = arguments["banned"]
    by_row = {key: arguments[key] for key in ("question", "sample_number", "position")}

    def run(rows: Tensor) -> Sample:
        seen = None if arguments["seen"] is None else arguments["seen"][rows].clone()
        own = {key: value[rows] for key, value in by_row.items()}
        return sample(logits[rows], **{**fixed, **own}, seen=seen, backend=backend)

    whole = run(torch.arange(24))
    for rows in ([5], [23, 0, 7], list(range(23, -1, -1)), [3] * 9 + [4] * 8):  # padded to a bucket
        for got, expected in zip(run(torch.tensor(rows)), whole, strict=True):
            assert torch.equal(got, expected[rows])


def test_draws_of_other_seeds_questions_and_positions_differ(backend):
    logits = torch.zeros(1, 4096)
    base = {"seed": 1, "question": 2, "sample_number": 3, "position": 4}
    tokens = []
    for name in (None, *base):
        for shift in (0, 32) if name in ("seed", "question") else (0,):
            values = {**base, **({} if name is None else {name: base[name] + (1 << shift)})}
            own = {key: torch.tensor(value if key == "seed" else [value]) for key, value in values.items()}
            tokens.append(int(sample(logits, **own, backend=backend).token))
    assert len(set(tokens)) == len(tokens) == 7


def test_strided_logits(backend):
    logits = logits_of("odd")
    expected = sample(logits, **numbers(24), top_k=5, backend=backend)
    wide = torch.full((24, 3, 50), NAN)
    wide[:, 1, :37] = logits
    columns = logits.T.contiguous().T
    for other in (wide[:, 1, :37], columns):
        assert other.stride() != logits.stride()
        actual = sample(other, **numbers(24), top_k=5, backend=backend)
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_policy_logprob_is_token_logprobs():
    logits = logits_of("peaked")
    token, policy, _ = sample(logits, **numbers(24), temperature=0.5, top_k=9)
    torch.testing.assert_close(policy, token_logprob(logits, torch.eye(67), token), rtol=0, atol=1e-6)


def test_float64_is_the_references():
    result = sample(logits_of("odd").double(), **numbers(24), top_p=0.9)
    assert result.policy_logprob.dtype == result.sampling_logprob.dtype == torch.float64
    assert sample(logits_of("odd").half(), **numbers(24)).policy_logprob.dtype == torch.float32


def test_token_bits():
    ids = torch.tensor([[0, 31, 31, 5], [64, 69, 32, 1]])
    bits = token_bits(ids, 70)
    assert bits.dtype == torch.int32 and bits.shape == (2, 3)
    assert bits.tolist() == [[-(2**31) + 33, 0, 0], [2, 1, 33]]
    assert token_bits(ids[1], 70).tolist() == bits[1].tolist()
    assert token_bits(torch.empty(0, dtype=torch.int64), 33).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    logits = torch.randn(3, 37).to(dtype)
    row = torch.arange(3)
    arguments = (logits, torch.tensor(1), row, row, row, 0.7, 5, 0.9)
    banned, seen = token_bits(torch.tensor([1, 2]), 37), token_bits(row[:, None], 37)
    torch.library.opcheck(torch.ops.ril_kernels.sample.default, (*arguments, 1.2, banned, seen, "cpu"))
    torch.library.opcheck(torch.ops.ril_kernels.sample.default, (*arguments, 1.0, None, None, "cpu"))


def test_compiles_without_a_graph_break():
    logits = logits_of("odd")
    arguments, _, _ = with_bits(logits, OPTIONS["all"])
    eager_seen = arguments.pop("seen")
    seen = eager_seen.clone()
    expected = sample(logits, **arguments, seen=eager_seen)
    compiled = torch.compile(lambda x, seen: sample(x, **arguments, seen=seen), fullgraph=True, backend="aot_eager")
    actual = compiled(logits, seen)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True)) and torch.equal(seen, eager_seen)


def test_nothing_waits_for_a_gpu():
    # Fake tensors have a device and no values: reading one raises.
    with FakeTensorMode():
        row = torch.zeros(4, dtype=torch.int64, device="cuda")
        banned, seen = token_bits(row, 70), token_bits(row[:, None], 70)
        own = dict.fromkeys(("question", "sample_number", "position"), row)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            logits = torch.zeros(4, 70, device="cuda", dtype=dtype)
            options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1}
            result = sample(logits, seed=row[0], **own, **options, banned=banned, seen=seen)
            assert [each.device.type for each in result] == ["cuda"] * 3 and result.token.dtype == torch.int64
            assert [each.shape for each in result] == [(4,)] * 3
        with pytest.raises(RuntimeError):
            bool((row > 0).any())


def error_cases() -> list:
    base = {"logits": torch.zeros(3, 40), **numbers(3)}
    bits = torch.zeros(3, 2, dtype=torch.int32)
    penalty = {**base, "repetition_penalty": 1.1}
    return [
        ({**base, "logits": [[1.0]]}, TypeError, r"logits: got list, expected a torch\.Tensor\. Pass the logits"),
        ({**base, "logits": bits}, TypeError, r"logits: got dtype int32, expected float32 or"),
        ({**base, "logits": torch.zeros(40)}, ValueError, r"logits: got shape \(40,\), expected \(B, V\)\. Pass one r"),
        ({**base, "seed": 1}, TypeError, r"seed: got int, expected a torch\.Tensor\. Pass torch\.tensor\(seed"),
        ({**base, "seed": torch.tensor(1.0)}, TypeError, r"seed: got dtype float32, expected int64"),
        ({**base, "seed": torch.tensor([1])}, ValueError, r"seed: got shape \(1,\), expected a tensor of shape"),
        ({**base, "seed": torch.tensor(1, device="meta")}, ValueError, r"seed: got device meta, expected cpu, where l"),
        ({**base, "question": [0, 1, 2]}, TypeError, r"question: got list, expected a torch\.Tensor\. One number per"),
        ({**base, "question": torch.zeros(2).long()}, ValueError, r"question: got shape \(2,\), expected \(B,\) with"),
        ({**base, "position": torch.zeros(3)}, TypeError, r"position: got dtype float32, expected int64\. One number"),
        (
            {**base, "position": torch.tensor([0, -1, 0])},
            ValueError,
            r"position: got the value -1, expected values in \[0, 4294967296\) where 2\^32 = 4294967296\. It is 32 bit",
        ),
        (
            {**base, "sample_number": torch.tensor([0, 2**32, 0])},
            ValueError,
            r"sample_number: got the value 4294967296, expected values in \[0, 4294967296\)",
        ),
        ({**base, "temperature": -1.0}, ValueError, r"temperature: got -1\.0, expected a finite number of at least 0"),
        ({**base, "temperature": 1e-5}, ValueError, r"temperature: got 1e-05, expected 0 or at least 0\.0001\. 0 is g"),
        ({**base, "temperature": None}, TypeError, r"temperature: got NoneType, expected a finite number of at least"),
        ({**base, "top_k": -1}, ValueError, r"top_k: got -1, expected an int of at least 0\. 0 keeps all tokens"),
        ({**base, "top_k": 2.0}, TypeError, r"top_k: got float, expected an int of at least 0\. 0 keeps all tokens"),
        ({**base, "top_p": 0.0}, ValueError, r"top_p: got 0\.0, expected a finite number above 0\. 1 keeps all tokens"),
        ({**base, "top_p": 1.5}, ValueError, r"top_p: got 1\.5, expected a number above 0 and at most 1\. 1 keeps all"),
        ({**base, "repetition_penalty": 0.0}, ValueError, r"repetition_penalty: got 0\.0, expected a finite number ab"),
        ({**base, "repetition_penalty": 1e9}, ValueError, r"repetition_penalty: got .*, expected a number from 0\.01"),
        (penalty, ValueError, r"seen: got None with repetition_penalty 1\.1, expected \(B, W\) int32 bits with a pen"),
        ({**base, "seen": bits}, ValueError, r"seen: got a tensor with repetition_penalty 1\.0, expected .* leave bot"),
        ({**penalty, "seen": bits.long()}, TypeError, r"seen: got dtype int64, expected int32\. Make it with token_bi"),
        ({**penalty, "seen": bits[:, :1]}, ValueError, r"seen: got shape \(3, 1\), expected \(B, 2\) with B = 3"),
        ({**penalty, "seen": bits.to("meta")}, ValueError, r"seen: got device meta, expected cpu, where logits is"),
        ({**penalty, "seen": bits.T.contiguous().T}, ValueError, r"seen: got strides \(1, 3\), expected contiguous .*"),
        ({**base, "banned": bits}, ValueError, r"banned: got shape \(3, 2\), expected \(2,\)\. Make it with token_bit"),
        ({**base, "banned": bits[0, :1]}, ValueError, r"banned: got shape \(1,\), expected \(2,\)\. Make it with toke"),
        ({**base, "banned": [1]}, TypeError, r"banned: got list, expected a torch\.Tensor\. Make it with token_bits"),
        ({**base, "backend": "cuda"}, ValueError, r"backend: got 'cuda', expected one of 'auto', 'reference', 'cpu',"),
        ({**base, "backend": "triton"}, ValueError, r"backend: got 'triton' for float32 on cpu, expected float32, bfl"),
        (
            {**base, "logits": torch.zeros(3, 40).half(), "backend": "cpu"},
            ValueError,
            r"backend: got 'cpu' for float16 on cpu, expected float32 or bfloat16 on a CPU",
        ),
    ]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), error_cases())
def test_errors(arguments, error, message, native_calls):
    with pytest.raises(error, match=message):
        sample(**arguments)
    assert native_calls == []


@pytest.mark.parametrize(
    ("ids", "vocab", "error", "message"),
    [
        ([1], 4, TypeError, r"ids: got list, expected a torch\.Tensor\. Pass token ids"),
        (torch.zeros(2), 4, TypeError, r"ids: got dtype float32, expected int64\. Pass token ids"),
        (torch.tensor(1), 4, ValueError, r"ids: got shape \(\), expected \(n,\) or \(B, n\)\. Pass token ids"),
        (torch.tensor([4]), 4, ValueError, r"ids: got the value 4, expected values in \[0, 4\) .* Leave padding out"),
        (torch.tensor([-1]), 4, ValueError, r"ids: got the value -1, expected values in \[0, 4\)"),
        (torch.tensor([1]), 0, ValueError, r"vocab: got 0, expected an int above 0\. Pass logits\.shape\[1\]"),
        (torch.tensor([1]), "4", TypeError, r"vocab: got str, expected an int above 0\. Pass logits\.shape\[1\]"),
    ],
)
def test_errors_of_token_bits(ids, vocab, error, message):
    with pytest.raises(error, match=message):
        token_bits(ids, vocab)


def test_the_catalogue_has_it():
    assert {"Sample", "sample", "token_bits"} <= set(ril_kernels.__all__)
