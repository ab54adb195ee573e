"""token_logprob behind TRL 1.16's fused LM head, which all its trainers call: results and gradients as TRL's own.

`Seam` is the whole adapter: in a training script, `trl.trainer.utils._ChunkedLogProbFunction = Seam` before the trainer
is made. It has no gathering for a ZeRO-3 backward, as TRL's has.
"""

import pytest
import torch

from ril_kernels import token_logprob

pytest.importorskip("trl", reason="TRL (extra `dev`, Python 3.11 or later) is not installed")
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS
from trl.trainer import utils as trl_utils

H, V = 16, 37


class Seam:
    @staticmethod
    def apply(
        hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0, outputs=OPTIONAL_OUTPUTS
    ):
        missing = set(outputs) - {"log_probs", "entropy"}
        if missing:
            raise ValueError(f"outputs: got {sorted(missing)}, expected log_probs and entropy. Use TRL's own function.")
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        hidden, weight = (hidden * logit_scale).to(dtype), weight.to(dtype)
        bias = None if bias is None else (bias * logit_scale).to(dtype)
        options = {"bias": bias, "temperature": temperature, "softcap": softcap}
        logprob, entropy = token_logprob(hidden, weight, targets, **options, return_entropy=True)
        return logprob, entropy if "entropy" in outputs else None, None, None, None


def results(function: type, arguments: tuple, outputs: tuple[str, ...]) -> list[torch.Tensor]:
    """Log-probs, entropies and the gradients of a weighted sum of both; fresh leaves each time."""
    leaves = [None if value is None else value.clone().requires_grad_() for value in arguments[:3]]
    logprob, entropy, *rest = function.apply(*leaves, *arguments[3:], outputs)
    assert rest == [None] * 3 and (entropy is None) == ("entropy" not in outputs)
    weights = torch.linspace(-1, 1, len(logprob))
    total = (weights * logprob).sum()
    values = [logprob.detach()]
    if entropy is not None:
        total, values = total + 0.3 * (weights.flip(0) * entropy).sum(), [*values, entropy.detach()]
    return [*values, *torch.autograd.grad(total, [leaf for leaf in leaves if leaf is not None])]


@pytest.mark.parametrize("outputs", [("log_probs", "entropy"), ("log_probs",)], ids=str)
@pytest.mark.parametrize(("softcap", "logit_scale"), [(None, 1.0), (3.0, 1.0), (None, 0.5), (3.0, 2.0)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_function(with_bias, softcap, logit_scale, outputs):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((23, H), (V, H), (V,)))
    targets = torch.randint(V, (23,), generator=generator)
    arguments = (hidden, weight, bias if with_bias else None, targets, 0.9, 8, softcap, logit_scale)
    expected = results(ChunkedLogProbFunction, arguments, outputs)
    for ours, theirs in zip(results(Seam, arguments, outputs), expected, strict=True):
        assert float(theirs.abs().max()) > 1e-2
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes_that_differ(autocast):
    """float32 weights beside bfloat16 states, and all of them float32 under autocast: TRL multiplies in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((23, H), (V, H)))
    targets = torch.randint(V, (23,), generator=generator)
    arguments = (hidden if autocast else hidden.bfloat16(), weight, None, targets, 0.9, 8, None, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = results(ChunkedLogProbFunction, arguments, ("log_probs", "entropy"))
        actual = results(Seam, arguments, ("log_probs", "entropy"))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * float(theirs.abs().max()))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_with_trls_head(tied, monkeypatch):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    model = Qwen2ForCausalLM(config).train()
    trl_utils.add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    ids = torch.randint(V, (3, 7))
    labels = ids.clone()
    labels[:, :3] = labels[1, 5:] = -100  # a prompt, and padding

    def run() -> list[torch.Tensor]:
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        loss = out.loss - 0.1 * out.entropy.sum()
        return [out.log_probs.detach(), out.entropy.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    expected, calls = run(), []
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Seam)
    monkeypatch.setattr(Seam, "apply", lambda *args, call=Seam.apply: (calls.append(args), call(*args))[1])
    for ours, theirs in zip(run(), expected, strict=True):
        assert float(theirs.abs().max()) > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))
    assert len(calls) == 1


@pytest.mark.parametrize("name", [name for name in OPTIONAL_OUTPUTS if name != "entropy"])
def test_what_is_missing_is_refused(name):
    arguments = (torch.zeros(2, 3), torch.zeros(4, 3), None, torch.tensor([0, 1]), 1.0, 8)
    with pytest.raises(ValueError, match=rf"outputs: got \['{name}'\], expected log_probs and entropy"):
        Seam.apply(*arguments, outputs=("log_probs", name))
