"""The models of a plan, without weights, and prompts as a processor would give them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn import functional

from ril_engine.config import ModelConfig
from ril_engine.errors import UserError
from ril_engine.ledger import Ledger
from ril_engine.models import Encoder
from ril_engine.rollout.engine import Rollout

aten = torch.ops.aten
LIGER_KERNELS = {
    "rms_norm": (
        "_rms_norm_forward_kernel",
        "_rms_norm_backward_kernel",
        "_block_rms_norm_forward_kernel",
        "_block_rms_norm_backward_kernel",
    ),
    "swiglu": (
        "_swiglu_forward_kernel",
        "_swiglu_backward_kernel",
        "_swiglu_forward_kernel_tiled",
        "_swiglu_backward_kernel_tiled",
    ),
    "rope": ("_triton_rope",),
}


def model_config(model: ModelConfig):
    """The config of a checkpoint; its weights are not read.

    Raises:
        UserError: no such checkpoint.
    """
    from transformers import AutoConfig

    if model.path.startswith("tiny:"):
        from ril_engine import tiny_models

        with TemporaryDirectory() as folder:
            tiny_models.build(Path(folder), model.path, [], seed=0)
            return AutoConfig.from_pretrained(folder)
    try:
        return AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model {model.path}: no config.json to plan from ({reason}); give a folder that holds one, or a hub name"
        ) from error


def fake_model(config, ledger: Ledger, dtype: torch.dtype) -> nn.Module:
    """An image-text-to-text model whose weights have no contents. The ledger does not hold them yet."""
    from transformers import AutoModelForImageTextToText

    with ledger.fake, torch.device(ledger.device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


class Questions(Encoder):
    """In the place of an Encoder: prompts with as many tokens and pixels as real ones, of no meaning."""

    def __init__(self, config, base_model, text_tokens: int, image_tokens: int):
        self.rope_index = getattr(base_model, "get_rope_index", None)
        self.eos_ids, self.banned_ids, self.pad_id = [0], [2], 0
        self._prompt = _prompt(config, text_tokens, image_tokens)

    def prompt(self, question: dict) -> dict[str, Tensor]:
        return self._prompt

    def see(self, look: Callable[[dict[str, Tensor]], Tensor]) -> None:
        """From now on the prompt holds what a frozen vision tower makes of its pixels (`families.look_once`)."""
        if "pixel_values" in self._prompt:
            seen = look(self._prompt)
            self._prompt = {**self._prompt, "pixel_values": torch.zeros(seen.shape, dtype=seen.dtype)}


def _prompt(config, text_tokens: int, image_tokens: int) -> dict[str, Tensor]:
    """Text and a picture of about so many tokens, as the processor of a model's family gives them; 0: no picture."""
    vision = getattr(config, "vision_config", None)
    pictured, pixels = 0, {}
    if image_tokens and hasattr(vision, "spatial_merge_size"):  # Qwen's: a row of pixels for each patch of a grid
        merge = vision.spatial_merge_size
        height = int(image_tokens**0.5)
        width = image_tokens // height
        pictured = height * width
        channels = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
        pixels["image_grid_thw"] = torch.tensor([[1, height * merge, width * merge]])
        pixels["pixel_values"] = torch.zeros(pictured * merge**2, channels)
    elif image_tokens and config.model_type == "internvl":  # its: tiles of one size
        tiles = -(-image_tokens // config.image_seq_length)
        pictured = tiles * config.image_seq_length
        pixels["pixel_values"] = torch.zeros(tiles, vision.num_channels, *vision.image_size)
    elif image_tokens:
        raise UserError(
            f"model {config.model_type}: its pictures are of a form that is not known here, expected those of Qwen-VL "
            "or InternVL; set plan.image_tokens=0 to plan for text alone"
        )
    types = torch.zeros(1, text_tokens + pictured, dtype=torch.int64)
    types[0, 1 : 1 + pictured] = 1
    ids = types * getattr(config, "image_token_id", 0)
    ids[types == 0] = 1
    rest = {"mm_token_type_ids": types} if "image_grid_thw" in pixels else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | rest | pixels


class _Launch:
    """In the place of a Triton kernel: what its launcher allocates is counted, and nothing runs."""

    def __getitem__(self, grid):
        return lambda *arguments, **settings: None


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def as_on_gpu(decoders: list[nn.Module]) -> Iterator[None]:
    """Within it the ops take meta tensors for those on a GPU, and Liger's functions allocate and launch nothing. What
    `use_liger` changes in a modeling file is taken back at the end."""
    with ExitStack() as stack:
        for op in ("discriminator_head", "policy_loss", "token_logprob", "sampling"):
            home = import_module(f"ril_kernels.{op}.op")
            stack.enter_context(replaced(home, "resolve_backend", lambda backend, rows: "triton"))
        home = import_module("ril_kernels.prefix_attention.op")
        stack.enter_context(replaced(home, "resolve_backend", _attention_backend))
        stack.enter_context(replaced(Rollout, "_to", lambda self, value: value.to(self.device)))
        stack.enter_context(replaced(functional, "scaled_dot_product_attention", _attend))
        tolist, tensor_of = Tensor.tolist, torch.tensor
        stack.enter_context(replaced(Tensor, "tolist", lambda tensor: tolist(getattr(tensor, "value", tensor))))
        stack.enter_context(replaced(torch, "tensor", _with_values(tensor_of)))
        for module, names in LIGER_KERNELS.items():
            home = import_module(f"liger_kernel.ops.{module}")
            for name in names:
                stack.enter_context(replaced(home, name, _Launch()))
        for decoder in decoders:
            modeling = sys.modules[type(decoder).__module__]
            stack.enter_context(replaced(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb))
        yield


def _attention_backend(backend: str, query: Tensor) -> str:
    return "torch" if query.dtype in (torch.bfloat16, torch.float16) else "reference"


def _attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
    """scaled_dot_product_attention, which on the meta device would hold all weights, by the kernel that a GPU takes."""
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if key.shape[-3] != query.shape[-3]:  # the other kernel takes no groups of heads
        key, value = (each.repeat_interleave(query.shape[-3] // each.shape[-3], -3) for each in (key, value))
    if attn_mask is not None:  # its bias is in query's dtype
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device=query.device)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[-2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


def _with_values(tensor_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor, which forgets its numbers on the meta device."""

    def tensor(data, *, device=None, **settings) -> Tensor:
        made = tensor_of(data, **settings)
        return made if device is None else made.to(device)

    return tensor
