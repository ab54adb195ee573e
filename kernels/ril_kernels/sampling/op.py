"""sample and token_bits: the public functions and their validation. B rows, V vocabulary, W = ceil(V / 32)."""

import torch
from torch import Tensor

from ril_kernels import _native
from ril_kernels._checks import (
    FLOAT_DTYPES,
    Shapes,
    check_choice,
    check_device,
    check_index_range,
    check_number,
    check_tensor,
    refuse,
)
from ril_kernels.sampling.reference import Sample, sample_reference
from ril_kernels.token_logprob.head import BACKENDS, resolve_backend

LOWEST_TEMPERATURE = 1e-4


@torch.library.custom_op("ril_kernels::sample", mutates_args=("seen",))
def _sample(
    logits: Tensor,
    seed: Tensor,
    question: Tensor,
    sample_number: Tensor,
    position: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    banned: Tensor | None,
    seen: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As sample_reference: the C++ or the Triton form."""
    rows, vocab = logits.shape
    words = -(-vocab // 32)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    numbers = [each.contiguous() for each in (question, sample_number, position)]
    banned = None if banned is None else banned.contiguous()
    assert seed.dim() == 0 and all(each.dtype == torch.int64 for each in (seed, *numbers))
    assert all(each.shape == (rows,) for each in numbers) and (banned is None or banned.shape == (words,))
    assert seen is None or (seen.shape == (rows, words) and seen.is_contiguous())
    settings = (temperature, top_k, top_p, repetition_penalty, banned, seen)
    if backend == "triton":
        from ril_kernels.sampling.triton import sample as launch

        return launch(logits, seed, *numbers, *settings)
    token, policy = torch.empty_like(numbers[0]), torch.empty(rows)
    sampling = torch.empty_like(policy)
    _native.call(
        "ril_sample_f32" if logits.dtype == torch.float32 else "ril_sample_bf16",
        logits.data_ptr(),
        logits.stride(0),
        rows,
        vocab,
        *(each.data_ptr() for each in (seed, *numbers)),
        *settings[:4],
        *(None if each is None else each.data_ptr() for each in (banned, seen)),
        _native.ISA,
        *(each.data_ptr() for each in (token, policy, sampling)),
    )
    return token, policy, sampling


@_sample.register_fake
def _(logits, seed, question, *_) -> tuple[Tensor, Tensor, Tensor]:
    empty = torch.empty_like(question, dtype=torch.float32, memory_format=torch.contiguous_format)
    return torch.empty_like(empty, dtype=torch.int64), empty, torch.empty_like(empty)


def _check_settings(temperature: float, top_k: int, top_p: float, repetition_penalty: float) -> None:
    check_number("temperature", temperature, "0 is greedy, 1 is the policy itself.", low_open=False)
    if 0 < temperature < LOWEST_TEMPERATURE:
        refuse("temperature", temperature, f"0 or at least {LOWEST_TEMPERATURE:g}", "0 is greedy.")
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        refuse("top_k", type(top_k).__name__, "an int of at least 0", "0 keeps all tokens.", error=TypeError)
    if top_k < 0:
        refuse("top_k", top_k, "an int of at least 0", "0 keeps all tokens.")
    check_number("top_p", top_p, "1 keeps all tokens.")
    if top_p > 1:
        refuse("top_p", top_p, "a number above 0 and at most 1", "1 keeps all tokens.")
    remedy = "1 is none, above 1 makes repetitions less probable."
    check_number("repetition_penalty", repetition_penalty, remedy)
    if not 0.01 <= repetition_penalty <= 100:
        refuse("repetition_penalty", repetition_penalty, "a number from 0.01 to 100", remedy)


def _check_bits(
    shapes: Shapes, device: torch.device, repetition_penalty: float, banned: Tensor | None, seen: Tensor | None
) -> None:
    words = -(-shapes.size["V"] // 32)
    if (seen is None) != (repetition_penalty == 1):
        got = f"{'None' if seen is None else 'a tensor'} with repetition_penalty {repetition_penalty}"
        remedy = "Make it with token_bits(prompts, V), or leave both out."
        refuse("seen", got, "(B, W) int32 bits with a penalty other than 1, else None", remedy)
    for name, value, letters in (("banned", banned, f"{words}"), ("seen", seen, f"B {words}")):
        if value is not None:
            check_tensor(name, value, (torch.int32,), "Make it with token_bits(ids, V).")
            check_device(name, value, "logits", device)
            shapes.check(name, value, letters, "Make it with token_bits(ids, V).")
    if seen is not None and not seen.is_contiguous():
        refuse("seen", f"strides {seen.stride()}", "contiguous (B, W) bits", "It is written to: keep it contiguous.")


def sample(
    logits: Tensor,  # (B, V)
    *,
    seed: Tensor,  # () int64 on logits' device: a tensor, so that a captured graph can be replayed with another
    question: Tensor,  # (B,) int64
    sample_number: Tensor,  # (B,) int64
    position: Tensor,  # (B,) int64, number of the token in its response
    temperature: float = 1.0,  # 0: greedy, the largest logit (lowest id among equals)
    top_k: int = 0,  # 0: all
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    banned: Tensor | None = None,  # (W,) int32 bits: tokens never drawn
    seen: Tensor | None = None,  # (B, W) int32 bits: tokens that the penalty applies to; the drawn token's is set
    backend: str = "auto",
) -> Sample:
    """Draws a token per row and says how probable it was: to the policy, and to the distribution drawn from.

    In Hugging Face's order: banned tokens out, penalty, temperature, top-k, top-p. Top-k keeps exactly k tokens, and
    top-p as few as reach it: lower ids first among equal logits, where Hugging Face's top-k keeps every token that
    equals the k-th. Logits of -inf are never drawn.

    The draw is the inverse of the cumulative distribution, in order of ids, at one uniform number that Philox4x32-10
    makes of (seed, question, sample_number, position): a response does not depend on what shares its batch.
    sample_number and position count from 0 to below 2^32.

    A row with NaN or +inf, or with nothing left to draw, gives NaN for both log-probs and the lowest id that is not
    banned (0 where all are), so that a next forward can run; no error, which the host would have to wait for. `seen`
    is written to in place, and belongs to a penalty other than 1. `backend`: auto is "cpu" (C++) for float32 and
    bfloat16 on a CPU, "triton" on a GPU (not float64) and "reference" for everything else.
    """
    shapes = Shapes()
    check_tensor("logits", logits, FLOAT_DTYPES, "Pass the logits of each sequence's next token.")
    shapes.check("logits", logits, "B V", "Pass one row per sequence, logits[:, -1].")
    device = logits.device
    check_tensor("seed", seed, (torch.int64,), "Pass torch.tensor(seed, device=logits.device).")
    check_device("seed", seed, "logits", device)
    if seed.dim() != 0:
        refuse("seed", f"shape {tuple(seed.shape)}", "a tensor of shape ()", "One seed serves all rows.")
    numbers = {"question": question, "sample_number": sample_number, "position": position}
    for name, value in numbers.items():
        check_tensor(name, value, (torch.int64,), "One number per row of logits.")
        check_device(name, value, "logits", device)
        shapes.check(name, value, "B", "One number per row of logits.")
    _check_settings(temperature, top_k, top_p, repetition_penalty)
    _check_bits(shapes, device, repetition_penalty, banned, seen)
    check_choice("backend", backend, BACKENDS, "Leave the default, 'auto'.")
    if not torch.compiler.is_compiling():
        for name in ("sample_number", "position"):
            check_index_range(name, numbers[name], 2**32, "2^32", "It is 32 bits of the counter: count from 0.")
    if temperature == 0:
        temperature, top_k, top_p = 1.0, 1, 1.0
    top_k = 0 if top_k >= logits.shape[1] else top_k
    settings = (float(temperature), top_k, float(top_p), float(repetition_penalty), banned, seen)
    arguments = (logits.detach(), seed, *numbers.values(), *settings)
    backend = resolve_backend(backend, logits)
    if backend == "reference":
        return sample_reference(*arguments)
    return Sample(*_sample(*arguments, backend))


def token_bits(
    ids: Tensor,  # (n,) or (B, n) int64
    vocab: int,
) -> Tensor:  # (W,) or (B, W) int32
    """Sets of token ids as sample takes them: bit i % 32 of word i // 32 is set where i is among the ids.

    On a GPU nothing waits, and ids are not looked at; on a CPU those outside [0, vocab) are refused.
    """
    remedy = "Pass token ids, (n,) for one set or (B, n) for one per row."
    check_tensor("ids", ids, (torch.int64,), remedy)
    if ids.dim() not in (1, 2):
        refuse("ids", f"shape {tuple(ids.shape)}", "(n,) or (B, n)", remedy)
    if isinstance(vocab, bool) or not isinstance(vocab, int):
        refuse("vocab", type(vocab).__name__, "an int above 0", "Pass logits.shape[1].", error=TypeError)
    if vocab <= 0:
        refuse("vocab", vocab, "an int above 0", "Pass logits.shape[1].")
    if not torch.compiler.is_compiling():
        check_index_range("ids", ids, vocab, "vocab", "Leave padding out, or repeat an id.")
    words = -(-vocab // 32)
    flags = ids.new_zeros(*ids.shape[:-1], 32 * words, dtype=torch.uint8).scatter(-1, ids, 1)
    # Four bytes are a word: the lowest first, as every device that PyTorch runs on has them.
    bits = flags.unflatten(-1, (4 * words, 8)) << torch.arange(8, dtype=torch.uint8, device=ids.device)
    return bits.sum(-1, dtype=torch.uint8).view(torch.int32)
