"""What this engine changes in a Hugging Face model: attention over packs, Liger's kernels, rows of the final norm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ril_engine.errors import UserError
from ril_kernels import prefix_attention

ATTENTION = "ril_prefix_attention"
# Language models whose layers hand their keyword arguments on to the attention function, each tested.
PACKED = ("llama", "qwen2", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3")


def language_model(model) -> nn.Module:
    """The decoder of a causal LM or of a VLM.

    Raises:
        UserError: it has no final norm under the usual name.
    """
    decoder = model.get_decoder()
    if not hasattr(decoder, "norm"):
        raise UserError(
            f"model {model.config.model_type}: its language model ({type(decoder).__name__}) has no final norm called "
            "norm, expected a decoder laid out as Llama's or Qwen's; choose another student"
        )
    return decoder


def attend_over_packs(decoder) -> None:
    """Make a language model, and nothing around it, read packs. Without a pack its attention is torch's, as before.

    Raises:
        UserError: its family cannot.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = decoder.config
    other = sorted(set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"})
    found = None
    if other:
        found = f"{' and '.join(other)} layers"
    elif config.model_type not in PACKED:
        found = "a family that packs were never tried with"
    elif config.attention_dropout:
        found = f"attention_dropout {config.attention_dropout}"
    if found:
        raise UserError(
            f"rl.packing: {config.model_type} has {found}, expected full attention without dropout in one of "
            f"{', '.join(PACKED)}; set rl.packing: padded"
        )
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    decoder.set_attn_implementation(ATTENTION)


def _attention(
    module: nn.Module,
    query: Tensor,  # (1, Hq, T, D)
    key: Tensor,  # (1, Hkv, T, D)
    value: Tensor,  # (1, Hkv, T, D)
    attention_mask: Tensor | None,
    *,
    pack_layout=None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:  # (1, T, Hq, D)
    if pack_layout is None:  # generation and padded batches
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    heads_last = (each[0].transpose(0, 1) for each in (query, key, value))
    return prefix_attention(*heads_last, layout=pack_layout, scale=scaling)[None], None


@contextmanager
def only_rows(norm: nn.Module, row: Tensor) -> Iterator[None]:
    """Within it, a final norm takes (B, S, H) and gives its rows `row` (T,) of B * S only: (T, H)."""
    hook = norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].flatten(0, 1)[row],))
    try:
        yield
    finally:
        hook.remove()


def use_liger(model) -> None:
    """Liger's kernels for norms, rotary embedding and MLP, as far as it has them for this family; a GPU is needed.

    Its fused losses stay off: they would replace the forward, and the loss is ours.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if apply is not None:
        apply(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
