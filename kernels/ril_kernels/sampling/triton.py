"""sample on a GPU, one program per row; the definition is sample_reference. B rows, V vocabulary, W = ceil(V / 32).

    first read of the row    log-sum-exp of the logits and, of y (the logits with bans and penalty), the largest, the
                             sum of exp((y - top) / temperature), and the largest of each of BLOCK columns
    second read              with top-k or top-p: the ids of the candidates, those not below a bound, to the row's list.
                             The bound of top-k is the k-th of the columns' largest, so there are little more than k
                             candidates; that of top-p alone is the weight below which all tokens together fit in what
                             it leaves out
    threshold                by bisection over the candidates: first of top-k, then of top-p
    draw                     the first token up to which the kept weights sum to more than u times their total

Without top-k and top-p the draw itself is the second read. A value is compared as an integer in the order of float32,
so that a bisection ends after at most 32 steps. Sums of weights are float64 and run in one order; nothing is atomic.
Row offsets are int64: B x V passes 2^31.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ril_kernels.token_logprob.triton import LOG2_E, _padded, _width

BLOCK = 4096  # logits of a row that are in registers at a time
LIST = 1024  # candidates that are
NUM_WARPS = 8
LOWEST = tl.constexpr(-2139095041)  # _order of -inf
NO_TOKEN = tl.constexpr(2**31 - 1)
HAS_BANNED, HAS_SEEN = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _order(value):
    """int32 in the order of float32; 0.0 and -0.0 are equal."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(order):
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _has_bit(words, columns, inside):
    return ((tl.load(words + columns // 32, mask=inside, other=0) >> (columns % 32)) & 1) != 0


@triton.jit
def _changed(logit, columns, inside, banned, seen, penalty, flags):
    """y of these columns: -inf where banned, or not inside."""
    y = logit
    if flags & HAS_SEEN:
        penalised = tl.where(logit > 0, tl.div_rn(logit, penalty), logit * penalty)
        y = tl.where(_has_bit(seen, columns, inside), penalised, logit)
    if flags & HAS_BANNED:
        y = tl.where(_has_bit(banned, columns, inside), float("-inf"), y)
    return tl.where(inside, y, float("-inf"))


@triton.jit
def _next(start, line, num_vocab, width, banned, seen, penalty, flags, BLOCK: tl.constexpr):
    """The next logits of a row: their ids, themselves and y, -inf past its end."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < num_vocab
    logit = tl.load(line + columns, mask=columns < width, other=0.0).to(tl.float32)
    logit = tl.where(inside, logit, float("-inf"))
    return columns, logit, _changed(logit, columns, inside, banned, seen, penalty, flags)


@triton.jit
def _listed(start, count, ids, line, banned, seen, penalty, flags, LIST: tl.constexpr):
    """The next candidates of a list: their ids and y, -inf past its end."""
    places = start + tl.arange(0, LIST)
    inside = places < count
    columns = tl.load(ids + places, mask=inside, other=0)
    logit = tl.load(line + columns, mask=inside, other=0.0).to(tl.float32)
    return columns, _changed(logit, columns, inside, banned, seen, penalty, flags)


@triton.jit
def _around(order, top, rate, count, ids, line, banned, seen, penalty, flags, LIST: tl.constexpr):
    """How many candidates are not below `order` (an int64) and what they weigh; the same of those above it."""
    number, more = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    mass, above = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    for start in range(0, count, LIST):
        _columns, y = _listed(start, count, ids, line, banned, seen, penalty, flags, LIST)
        weights = tl.exp2((y - top) * rate).to(tl.float64)
        from_on, higher = _order(y).to(tl.int64) >= order, _order(y).to(tl.int64) > order
        number += tl.sum(from_on.to(tl.int32), 0)
        more += tl.sum(higher.to(tl.int32), 0)
        mass += tl.sum(tl.where(from_on, weights, 0.0), 0)
        above += tl.sum(tl.where(higher, weights, 0.0), 0)
    return number, mass, more, above


@triton.jit
def _threshold(low, most, least, top, rate, count, ids, line, banned, seen, penalty, flags, LIST: tl.constexpr):
    """The highest order from which on there are at least `most` candidates of at least `least` weight, `low` if none
    is higher; how many equal it; and how many are above it, with their weight."""
    high = _order(top).to(tl.int64)
    number, more = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    above = tl.full((), 0.0, tl.float64)
    looks = tl.full((), 1, tl.int32)
    while looks > 0:  # the last time at `low` itself
        looks = (low < high).to(tl.int32)
        middle = (low + high + 1) >> 1
        number, mass, more, above = _around(middle, top, rate, count, ids, line, banned, seen, penalty, flags, LIST)
        enough = (number >= most) & (mass >= least)
        high = tl.where(enough, high, tl.maximum(middle - 1, low))
        low = tl.where(enough, middle, low)
    return low, number - more, more, above


@triton.jit
def _kth_largest(values, k, top):
    """Order of the k-th largest of a block's values, that of -inf where there are fewer."""
    orders = _order(values).to(tl.int64)
    low, high = tl.full((), LOWEST, tl.int64), _order(top).to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        enough = tl.sum((orders >= middle).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _first_above(target, below, weights, columns, token):
    """The first token up to which `below` and the weights sum to more than the target, the last of any weight where
    rounding leaves none; `token` where the target is not reached here. And the sum."""
    here = tl.sum(weights, 0)
    if below + here > target:
        sums = below + tl.cumsum(weights, 0)
        passed = (sums > target) & (weights > 0.0)
        token = tl.min(tl.where(passed, columns, NO_TOKEN), 0)
        if token == NO_TOKEN:
            token = tl.max(tl.where(weights > 0.0, columns, -1), 0)
    return token, below + here


@triton.jit
def sample_kernel(
    logits,  # (B, V)
    seed,  # () int64
    question,  # (B,) int64, and the next two
    sample_number,
    position,
    banned,  # (W,) int32; any pointer without its flag
    seen,  # (B, W) int32 in and out; any pointer without its flag
    ids,  # (B, V) int32 scratch: the candidates of each row; any pointer without top_k and top_p
    token,  # (B,) int64 out
    policy_logprob,  # (B,) float32 out
    sampling_logprob,  # (B,) float32 out
    tau,  # the temperature
    rate,  # log2(e) / tau
    top_k,  # 0: all
    top_p: tl.float64,
    penalty,
    flags,  # HAS_BANNED, HAS_SEEN
    stride,  # of a row, in elements
    num_vocab,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    ids += row * num_vocab
    seen += row * ((num_vocab + 31) // 32)
    width = _width(num_vocab, PADDED)

    largest = tl.full((), float("-inf"), tl.float32)  # of the logits
    policy_mass = tl.full((), 0.0, tl.float32)  # sum of exp(logit - largest)
    top = tl.full((), float("-inf"), tl.float32)  # of y
    mass = tl.full((), 0.0, tl.float64)  # sum of exp((y - top) / temperature)
    column_tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, num_vocab, BLOCK):
        columns, logit, y = _next(start, line, num_vocab, width, banned, seen, penalty, flags, BLOCK)
        # Rows of nothing but -inf so far keep 0 as their origin.
        highest = tl.maximum(largest, tl.max(logit, 0))
        origin = tl.where(highest == float("-inf"), 0.0, highest)
        policy_mass = policy_mass * tl.exp2((largest - origin) * LOG2_E) + tl.sum(tl.exp2((logit - origin) * LOG2_E), 0)
        largest = highest
        highest = tl.maximum(top, tl.max(y, 0))
        origin = tl.where(highest == float("-inf"), 0.0, highest)
        here = tl.sum(tl.exp2((y - origin) * rate), 0)
        mass = mass * tl.exp2((top - origin) * rate).to(tl.float64) + here.to(tl.float64)
        top = highest
        column_tops = tl.maximum(column_tops, y)

    # NaN and +inf have made the mass NaN; an infinite top is one that only a penalty made, or nothing left to draw.
    if (policy_mass != policy_mass) | (tl.abs(top) == float("inf")):
        lowest = tl.full((), NO_TOKEN, tl.int32)
        for start in range(0, num_vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < num_vocab
            taken = _has_bit(banned, columns, inside & ((flags & HAS_BANNED) != 0))
            lowest = tl.minimum(lowest, tl.min(tl.where(inside & ~taken, columns, NO_TOKEN), 0))
        drawn = tl.where(lowest == NO_TOKEN, 0, lowest)
        tl.store(policy_logprob + row, float("nan"))
        tl.store(sampling_logprob + row, float("nan"))
    else:
        # Philox4x32-10: the key is the seed, the counter the row's three numbers.
        who = tl.load(question + row)
        c0, c1 = tl.load(position + row).to(tl.uint32), tl.load(sample_number + row).to(tl.uint32)
        word, _1, _2, _3 = tl.philox(tl.load(seed), c0, c1, who.to(tl.uint32), (who >> 32).to(tl.uint32))
        uniform = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
        drawn = tl.full((), -1, tl.int32)
        below = tl.full((), 0.0, tl.float64)
        last = tl.full((), -1, tl.int32)  # the last token of any weight, should rounding leave none that passes
        start = tl.full((), 0, tl.int32)
        if (top_k > 0) | (top_p < 1.0):
            # 1. The bound, and the list.
            if top_k > 0:
                low = _kth_largest(column_tops, top_k, top)
            else:  # with margins for rounding
                share = ((1.0 - top_p) * mass / num_vocab).to(tl.float32)
                low = _order(top + tau * (tl.log(share) - 0.01)).to(tl.int64) - 1
            count = tl.full((), 0, tl.int32)
            for begin in range(0, num_vocab, BLOCK):
                columns, _logit, y = _next(begin, line, num_vocab, width, banned, seen, penalty, flags, BLOCK)
                chosen = (_order(y).to(tl.int64) >= low) & (y > float("-inf"))
                here = tl.sum(chosen.to(tl.int32), 0)
                if here > 0:
                    tl.store(ids + count + tl.cumsum(chosen.to(tl.int32), 0) - 1, columns, mask=chosen)
                    count += here
            tl.debug_barrier()  # the list is read by other threads than wrote it

            # 2. The threshold: all above it are kept, and of its equals the first `equals`.
            equals = tl.full((), 0, tl.int32)
            if top_k > 0:
                low, equals, more, above = _threshold(
                    low, top_k, 0.0, top, rate, count, ids, line, banned, seen, penalty, flags, LIST
                )
                equals = tl.minimum(equals, top_k - more)
                mass = above + equals * tl.exp2((_value(low.to(tl.int32)) - top) * rate).to(tl.float64)
            if top_p < 1.0:
                least, kth, of_kth = top_p * mass, low, equals
                low, equals, more, above = _threshold(
                    low, 0, least, top, rate, count, ids, line, banned, seen, penalty, flags, LIST
                )
                equals = tl.where((top_k > 0) & (low == kth), of_kth, equals)
                # Equal tokens stay while those before them sum to less than is wanted.
                weight = tl.exp2((_value(low.to(tl.int32)) - top) * rate).to(tl.float64)
                stay = tl.minimum(tl.ceil((least - above) / weight), equals.to(tl.float64))
                equals = tl.maximum(stay, 1.0).to(tl.int32)
                mass = above + equals * weight

            # 3. The draw.
            before = tl.full((), 0, tl.int32)  # equals of the threshold so far
            while (drawn < 0) & (start < count):
                columns, y = _listed(start, count, ids, line, banned, seen, penalty, flags, LIST)
                order = _order(y).to(tl.int64)
                equal = (order == low).to(tl.int32)
                rank = before + tl.cumsum(equal, 0)
                kept = (order > low) | ((equal > 0) & (rank <= equals))
                weights = tl.where(kept, tl.exp2((y - top) * rate), 0.0).to(tl.float64)
                last = tl.maximum(last, tl.max(tl.where(weights > 0.0, columns, -1), 0))
                drawn, below = _first_above(uniform * mass, below, weights, columns, drawn)
                before += tl.sum(equal, 0)
                start += LIST
        else:
            while (drawn < 0) & (start < num_vocab):
                columns, _logit, y = _next(start, line, num_vocab, width, banned, seen, penalty, flags, BLOCK)
                weights = tl.exp2((y - top) * rate).to(tl.float64)
                last = tl.maximum(last, tl.max(tl.where(weights > 0.0, columns, -1), 0))
                drawn, below = _first_above(uniform * mass, below, weights, columns, drawn)
                start += BLOCK
        drawn = tl.where(drawn < 0, last, drawn)
        logit = tl.load(line + drawn).to(tl.float32)
        # Relative to the top: the difference of two large float32 would lose digits.
        tl.store(policy_logprob + row, logit - largest - tl.log(policy_mass))
        y = _changed(logit, drawn, drawn >= 0, banned, seen, penalty, flags)
        tl.store(sampling_logprob + row, tl.div_rn(y - top, tau) - tl.log(mass.to(tl.float32)))

    tl.store(token + row, drawn.to(tl.int64))
    if flags & HAS_SEEN:
        word = seen + drawn // 32
        tl.store(word, tl.load(word) | (1 << (drawn % 32)))


def sample(
    logits, seed, question, sample_number, position, temperature, top_k, top_p, repetition_penalty, banned, seen
) -> tuple[Tensor, Tensor, Tensor]:
    """As sample_reference, on the device of `logits`."""
    rows, vocab = logits.shape
    token, policy = torch.empty_like(question), torch.empty_like(question, dtype=torch.float32)
    sampling = torch.empty_like(policy)
    selects = top_k > 0 or top_p < 1.0
    ids = torch.empty((rows, vocab) if selects else (1, 1), dtype=torch.int32, device=logits.device)
    sample_kernel[(rows,)](
        logits, seed, question, sample_number, position, ids if banned is None else banned,
        ids if seen is None else seen, ids, token, policy, sampling,
        temperature, LOG2_E.value / temperature, top_k, top_p, repetition_penalty,
        HAS_BANNED.value * (banned is not None) + HAS_SEEN.value * (seen is not None), logits.stride(0), vocab,
        PADDED=_padded(logits) and logits.stride(0) >= vocab, BLOCK=BLOCK, LIST=LIST, num_warps=NUM_WARPS,
    )  # fmt: skip
    return token, policy, sampling
