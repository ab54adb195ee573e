"""The definition of token_logprob in plain PyTorch, any dtype. T packed tokens, H hidden, V vocabulary."""

import torch
from torch import Tensor

from ril_kernels._checks import result_dtype

IGNORE_INDEX = -100


def token_logprob_reference(
    hidden: Tensor,  # (T, H)
    lm_head: Tensor,  # (V, H)
    target: Tensor,  # (T,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # or (T,)
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:  # log-prob (T,), entropy (T,)
    """logits = hidden @ lm_head.T + bias;  z = softcap * tanh(logits / softcap) / temperature
    p = softmax(z);  log-prob_t = log p[t, target_t];  entropy_t = -sum_v p[t, v] log p[t, v]

    Logits in the input's dtype, everything after them in float32 (float64 for a float64 input). Rows whose
    target is ignore_index give 0, and no gradient whatever they hold. p = 0 adds 0 to the entropy.
    """
    counts = target != ignore_index
    logits = hidden.masked_fill(~counts[:, None], 0.0) @ lm_head.T
    if bias is not None:
        logits = logits + bias
    logits = logits.to(result_dtype(hidden.dtype))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(logits.dtype)[:, None]
    logprobs = torch.log_softmax(logits / temperature, dim=-1)  # (T, V)
    chosen = logprobs.gather(1, target.masked_fill(~counts, 0)[:, None]).squeeze(1)
    finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    entropy = -(logprobs.exp() * finite).sum(dim=-1)
    return chosen.masked_fill(~counts, 0.0), entropy.masked_fill(~counts, 0.0)


# name -> (T, H, V, scale of the logits, options)
CASES = {
    "tiny": (5, 4, 7, 1.0, ()),
    "odd": (13, 11, 101, 1.0, ("bias",)),
    "one_token": (1, 3, 2, 1.0, ()),
    "all_ignored": (6, 5, 9, 1.0, ("all_ignored",)),
    "peaked": (17, 16, 257, 30.0, ("some_ignored",)),
    "everything": (9, 6, 23, 3.0, ("bias", "temperature", "softcap", "some_ignored")),
}


def make_inputs(case: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict:
    """Arguments of token_logprob for a case of CASES, the same problem in every dtype but for rounding."""
    num_tokens, num_hidden, num_vocab, scale, options = CASES[case]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lm_head = normal(num_vocab, num_hidden)
    target = torch.randint(num_vocab, (num_tokens,), generator=generator)
    # Half of the rows point at their target's head row: correlated, peaked logits, as a trained model has.
    hidden = normal(num_tokens, num_hidden)
    hidden[::2] += lm_head[target[::2]]
    inputs = {"hidden": hidden * scale / num_hidden**0.5, "lm_head": lm_head}
    if "bias" in options:
        inputs["bias"] = normal(num_vocab)
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    if "temperature" in options:
        inputs["temperature"] = torch.rand(num_tokens, generator=generator).add(0.5)
    if "softcap" in options:
        inputs["softcap"] = 5.0
    if "some_ignored" in options:
        target[1::3] = IGNORE_INDEX
    if "all_ignored" in options:
        target[:] = IGNORE_INDEX
    return {**inputs, "target": target}
