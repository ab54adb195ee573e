"""What this engine changes in a Hugging Face model: attention over packs, Liger's kernels, rows of the final norm."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn

from ril_engine.errors import UserError
from ril_engine.placement import to_device
from ril_kernels import prefix_attention

ATTENTION = "ril_prefix_attention"
# Language models whose layers hand their keyword arguments on to the attention function, each tested.
PACKED = ("llama", "qwen2", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3")
# Of what a vision tower gives the one thing that its model reads, by the model's type.
SEEN = {"qwen2_vl": "pooler_output", "qwen2_5_vl": "pooler_output", "internvl": "last_hidden_state"}


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


def vision_tower(model) -> nn.Module:
    name = next(name for name in ("visual", "vision_tower", "vision_model") if hasattr(model.model, name))
    return getattr(model.model, name)


def look_once(model) -> Callable[[dict[str, Tensor]], Tensor] | None:
    """Let a frozen vision tower's forward give what it is given in the place of pixels, and return what looks: it takes
    a prompt's tensors and gives what the tower makes of their pixels, on the tower's device. So rollout, reference and
    policy, which have the same tower, need one look at a picture. None, and nothing changed, where the model reads more
    of its tower's output than SEEN knows of.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    name = SEEN.get(model.config.model_type)
    if name is None or getattr(model.config, "vision_feature_layer", -1) != -1:
        return None
    tower = vision_tower(model)
    theirs = tower.forward

    @torch.no_grad()
    def look(prompt: dict[str, Tensor]) -> Tensor:
        weight = next(tower.parameters())
        pixels = to_device(prompt["pixel_values"], weight.device).to(weight.dtype)
        grid = {"grid_thw": to_device(prompt["image_grid_thw"], weight.device)} if "image_grid_thw" in prompt else {}
        return theirs(pixels, **grid)[name]

    tower.forward = lambda pixel_values, *args, **kwargs: BaseModelOutputWithPooling(**{name: pixel_values})
    return look


def why_not_packable(config) -> str | None:
    """What a language model, by its config, has that cannot read packs; None where it can."""
    other = sorted(set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"})
    if other:
        return f"{' and '.join(other)} layers"
    if config.model_type not in PACKED:
        return "layers that packs were never tried with"
    return f"attention_dropout {config.attention_dropout}" if config.attention_dropout else None


def require_packable(config) -> None:
    """Refuse a language model, by its config, whose layers cannot read packs.

    Raises:
        UserError: not all of its layers have full attention, or its family is not one of PACKED.
    """
    if found := why_not_packable(config):
        raise UserError(
            f"rl.packing: {config.model_type} has {found}, expected full attention without dropout in one of "
            f"{', '.join(PACKED)}; set rl.packing: padded"
        )


def adapt(decoder, packing: str, device: torch.device) -> None:
    """Make a language model read packs, where it will get any, with Liger's kernels where it is to run on a GPU."""
    if packing != "padded":
        attend_over_packs(decoder)
        if device.type == "cuda":
            use_liger(decoder)


def attend_over_packs(decoder) -> None:
    """Make a language model, and nothing around it, read packs. Without a pack its attention is torch's, as before."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    require_packable(decoder.config)
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
    kv_cache=None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:  # (1, T, Hq, D)
    if kv_cache is not None:  # a rollout's prompts or decode step
        return kv_cache.attend(module.layer_idx, query, key, value, scaling), None
    if pack_layout is None:  # padded batches
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


@contextmanager
def without_final_norm(norm: nn.Module) -> Iterator[None]:
    """Within it, a final norm gives what it takes, for an op that normalises only the rows which it reads."""
    own = norm.__dict__.get("forward")  # Liger's, say
    norm.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del norm.forward
        if own is not None:
            norm.forward = own


def rms_epsilon(norm: nn.Module) -> float | None:
    """The epsilon of a plain RMSNorm, x / rms(x) * weight; None for any other norm, such as Gemma's of 1 + weight."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if weight is None or eps is None:
        return None
    probe = torch.linspace(-2, 3, len(weight), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        plain = nn.functional.rms_norm(probe, (len(weight),), weight, eps)
        return eps if torch.allclose(norm(probe), plain, rtol=1e-2, atol=1e-2) else None


def use_liger(decoder) -> None:
    """Liger's kernels for norms, MLP and rotary embedding in a language model of a packed family, in place; they need a
    GPU. The rotary embedding is a function of the family's modeling file, so it changes for every model of the family.

    Liger's own patches for Qwen2-VL and Qwen2.5-VL import what transformers 5.23 no longer has, and bring a loss.
    """
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb

    norms, mlps = [decoder.norm], []
    for layer in decoder.layers:
        heads = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
        norms += [layer.input_layernorm, layer.post_attention_layernorm, *(each for each in heads if each is not None)]
        mlps.append(layer.mlp)
    for norm in norms:
        # Not in place: the gradient that its backward would overwrite may be the fused loss's own buffer.
        norm.offset, norm.casting_mode, norm.in_place, norm.row_mode = 0.0, "llama", False, None
        norm.forward = MethodType(LigerRMSNorm.forward, norm)
    for mlp in mlps:
        mlp.forward = MethodType(LigerSwiGLUMLP.forward, mlp)
    sys.modules[type(decoder).__module__].apply_rotary_pos_emb = liger_rotary_pos_emb
