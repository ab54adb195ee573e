"""The definition of sample in plain PyTorch, any dtype. B rows (sequences), V vocabulary, W = ceil(V / 32) words of
bits: bit i % 32 of word i // 32 is token i's.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ril_kernels._checks import result_dtype


class Sample(NamedTuple):
    """A drawn token per row. Log-probs are float32 (float64 for float64 logits); both NaN where nothing could be
    drawn."""

    token: Tensor  # (B,) int64
    policy_logprob: Tensor  # (B,) of the logits as they came: no ban, penalty or temperature
    sampling_logprob: Tensor  # (B,) of the distribution that the token was drawn from; 0 where greedy


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., 2011): four words of 32 bits from a counter of four and a key of two, each in an
    int64. The product of two words wraps around in int64, with the right bits."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) & low ^ c1 ^ k0, b & low, (a >> 32) & low ^ c3 ^ k1, a & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


def uniform(seed: Tensor, question: Tensor, sample_number: Tensor, position: Tensor) -> Tensor:
    """(B,) float64 in (0, 1), a function of its row's four numbers alone."""
    words = (position, sample_number, question, question >> 32)
    counter, key = ((word & 0xFFFFFFFF for word in each) for each in (words, (seed, seed >> 32)))
    return (philox(tuple(counter), tuple(key))[0].double() + 0.5) * 2.0**-32


def unpack_bits(words: Tensor, vocab: int) -> Tensor:
    """(..., W) int32 -> (..., V) bool."""
    bits = words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    return bits.flatten(-2)[..., :vocab].bool()


def sample_reference(
    logits: Tensor,  # (B, V)
    seed: Tensor,  # () int64, and the next three (B,)
    question: Tensor,
    sample_number: Tensor,
    position: Tensor,
    temperature: float,  # above 0: greedy is top_k 1
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    banned: Tensor | None,  # (W,) int32
    seen: Tensor | None,  # (B, W) int32, in and out
) -> Sample:
    """y = the logits with banned tokens at -inf and seen ones divided by the penalty where positive, multiplied where
    not. The top_k largest y are kept, lower ids first among equals; of these, in the same order, each token whose
    predecessors' probabilities under softmax(y / temperature) sum to less than top_p. The token is the first, in
    order of ids, up to which the kept probabilities, renormalised, sum to more than u.
    """
    vocab = logits.shape[1]
    x = y = logits.to(result_dtype(logits.dtype))
    if seen is not None:
        penalty = x.new_full((), repetition_penalty)  # a tensor: CUDA multiplies by the inverse of a number
        y = torch.where(unpack_bits(seen, vocab), torch.where(x > 0, x / penalty, x * penalty), x)
    allowed = ~unpack_bits(x.new_zeros(-(-vocab // 32), dtype=torch.int32) if banned is None else banned, vocab)
    y = y.masked_fill(~allowed, -torch.inf)
    ordered, ids = y.sort(dim=1, descending=True, stable=True)
    weights = ((ordered - ordered[:, :1]) / temperature).exp().double()
    if top_k > 0:
        weights[:, top_k:] = 0.0
    sums = weights.cumsum(1)
    if top_p < 1.0:
        weights = weights.masked_fill(F.pad(sums, (1, -1)) >= top_p * sums[:, -1:], 0.0)
    weights = torch.zeros_like(weights).scatter(1, ids, weights)
    sums = weights.cumsum(1)
    target = uniform(seed, question, sample_number, position) * sums[:, -1]
    token = torch.searchsorted(sums, target[:, None], right=True)  # (B, 1)
    nothing = (x.isnan() | (x == torch.inf)).any(1) | ~ordered[:, 0].isfinite()
    token = torch.where(nothing[:, None], allowed.int().argmax(), token)
    policy = x.log_softmax(1).gather(1, token)[:, 0].masked_fill(nothing, torch.nan)
    drawn = weights.gather(1, token)[:, 0].div(sums[:, -1]).log().to(x.dtype).masked_fill(nothing, torch.nan)
    if seen is not None:
        word, bit = token // 32, (1 << token % 32).to(torch.int32)
        seen.scatter_(1, word, seen.gather(1, word) | bit)
    return Sample(token[:, 0], policy, drawn)
