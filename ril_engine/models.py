"""Checkpoints by the Auto classes, and the batches their forward wants: padded, or packs.

B sequences, S padded length, T packed response tokens, N responses.
"""

from __future__ import annotations

import base64
import io
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from ril_engine.config import ModelConfig
from ril_engine.errors import UserError
from ril_engine.families import require_packable
from ril_engine.packing import TOKEN_KEYS, pack
from ril_engine.placement import to_device
from ril_engine.questions import image_path, parts, pictures

CACHED_PROMPTS = 4096
CACHED_BYTES = 2**30  # 20 MB of pixels are usual for a picture of a million; what Qwen's tower makes of them is less
IMAGE_BYTES = 2**26  # of a picture's file; a larger one is refused


@dataclass
class Batch:
    """A forward's inputs and, for each response token, the row of the flat hidden states that predicts it.

    On a GPU response_index stays on the CPU, where `policy_loss` wants it."""

    inputs: dict[str, Tensor]
    row: Tensor  # (T,) int64 into B * S; where responses share a prompt its last row predicts each one's first token
    target: Tensor  # (T,) int64
    response_index: Tensor  # (T,) int64 in [0, N)

    def to(self, device: torch.device) -> Batch:
        inputs, row, target = to_device((self.inputs, self.row, self.target), device)
        return replace(self, inputs=inputs, row=row, target=target)


def load(config: ModelConfig, dtype: torch.dtype = torch.float32, *, weights: bool = True):
    """A model and its processor. Without weights its tensors have shapes alone.

    Raises:
        UserError: no such checkpoint, not one of an image-text-to-text model, or one that lacks weights.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    folder = Path(config.path)
    if (folder.is_absolute() or folder.exists()) and not (folder / "config.json").exists():
        what = "no config.json in this folder" if folder.is_dir() else "no such folder"
        raise UserError(f"model {config.path}: {what}; give a Hugging Face checkpoint")
    options = {"trust_remote_code": config.trust_remote_code}
    try:
        if weights:
            model, found = AutoModelForImageTextToText.from_pretrained(
                config.path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        else:
            found = {"missing_keys": set(), "mismatched_keys": set()}
            with torch.device("meta"):
                shape = AutoConfig.from_pretrained(config.path, **options)
                model = AutoModelForImageTextToText.from_config(shape, **options)
        processor = AutoProcessor.from_pretrained(config.path, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model {config.path}: not loadable as an image-text-to-text checkpoint ({reason}); give a folder or hub "
            "name such as Qwen/Qwen2.5-VL-3B-Instruct"
        ) from error
    require_whole(f"model {config.path}", found)
    if not processor.tokenizer("0", add_special_tokens=False)["input_ids"]:
        raise UserError(f"model {config.path}: no tokenizer in its files; give a whole checkpoint")
    return model, processor


def require_whole(what: str, found: dict[str, set]) -> None:
    """Refuse a model some of whose weights `from_pretrained` has not found, and drawn at random."""
    if lacking := sorted(found["missing_keys"] | {name for name, *_ in found["mismatched_keys"]}):
        raise UserError(
            f"{what}: {len(lacking)} weights are not in its files (first: {lacking[0]}); give a whole checkpoint"
        )


def load_tokenizer(config: ModelConfig):
    """A checkpoint's tokenizer alone.

    Raises:
        UserError: no such checkpoint, or none with a tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {config.path}: no tokenizer ({reason}); give a Hugging Face checkpoint") from error


def require_packable_student(config: ModelConfig) -> None:
    """Before anything slow: what `load` cannot load is left for it to refuse, and "tiny:" models are packable."""
    from transformers import AutoConfig

    if config.path.startswith("tiny:"):
        return
    try:
        found = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError):
        return
    if hasattr(found, "text_config"):
        require_packable(found.text_config)


def image_bytes(folder: Path, name: str | bytes) -> bytes:
    """The file of a picture that lies inside `folder`; bytes, which a Parquet file brings, are one already."""
    if isinstance(name, bytes):
        return name
    path = image_path(folder, name)
    try:
        with path.open("rb") as file:
            return file.read(IMAGE_BYTES + 1)
    except OSError as error:
        raise UserError(f"image {path}: {error.strerror}; expected a PNG, JPEG or WebP file") from error


def open_image(data: bytes, name: str, max_pixels: int):
    """An RGB picture and its media type.

    Raises:
        UserError: too many bytes or pixels, or no picture; `name` says which.
    """
    from PIL import Image

    if len(data) > IMAGE_BYTES:
        raise UserError(f"image {name}: more than {IMAGE_BYTES} bytes; make it smaller")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > max_pixels:
                raise UserError(
                    f"image {name}: {image.width} x {image.height} pixels, more than data.max_image_pixels {max_pixels}"
                )
            return image.convert("RGB"), Image.MIME.get(image.format, "application/octet-stream")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"image {name}: not a readable picture; expected PNG, JPEG or WebP") from error


def read_image(folder: Path, name: str | bytes, max_pixels: int):
    """An RGB picture that lies inside `folder`."""
    shown = "in the row" if isinstance(name, bytes) else str(folder / name)
    return open_image(image_bytes(folder, name), shown, max_pixels)[0]


def image_url(folder: Path, name: str, max_pixels: int) -> str:
    """A picture's file as a data URL, byte by byte, where `read_image` takes it."""
    data = image_bytes(folder, name)
    _, media_type = open_image(data, str(folder / name), max_pixels)
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


class Encoder:
    """Questions and responses -> token ids and pixels of one model family; with `look` (`families.look_once`), what a
    frozen vision tower makes of the pixels, which is kept for as long as they would be."""

    def __init__(self, model, processor, folder: Path, max_pixels: int, look: Callable | None = None):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.rope_index = getattr(model.base_model, "get_rope_index", None)
        self.folder, self.max_pixels, self.look = Path(folder), max_pixels, look
        eos = model.generation_config.eos_token_id
        self.eos_ids = list(eos) if isinstance(eos, (list, tuple)) else [eos]
        self.pad_id = self.tokenizer.pad_token_id
        # A sampled image placeholder makes the next forward fail, so no special token but EOS is ever a response's.
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        self.banned_ids = sorted(special - set(self.eos_ids))
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.banned_ids += range(len(self.tokenizer), vocabulary)
        self._prompts: OrderedDict[tuple, dict[str, Tensor]] = OrderedDict()
        self._cached_bytes = 0

    def prompt(self, question: dict) -> dict[str, Tensor]:
        """The chat prompt of a question with its pictures: tokens (1, S) and pixels."""
        asked = parts(question)
        key = tuple(asked)  # an id may come again in another split
        if key in self._prompts:
            self._prompts.move_to_end(key)
            return self._prompts[key]
        if any(token in text for kind, text in asked for token in self.tokenizer.all_special_tokens if kind == "text"):
            raise UserError(f"question {question['id']}: its text holds a special token of the model; remove it")
        content = [{"type": kind} | ({"text": text} if kind == "text" else {}) for kind, text in asked]
        images = [read_image(self.folder, name, self.max_pixels) for name in pictures(question)] or None
        rendered = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        encoded = dict(self.processor(text=[rendered], images=images, return_tensors="pt"))
        if self.look is not None and images:
            encoded["pixel_values"] = self.look(encoded).cpu()
        self._prompts[key] = encoded
        self._cached_bytes += _size(encoded)
        while len(self._prompts) > CACHED_PROMPTS or (self._cached_bytes > CACHED_BYTES and len(self._prompts) > 1):
            self._cached_bytes -= _size(self._prompts.popitem(last=False)[1])
        return encoded

    def response(self, text: str, *, eos: bool = True) -> list[int]:
        """A text as response tokens; placeholders in it are dropped, EOS is added."""
        banned = set(self.banned_ids) | set(self.eos_ids)
        ids = [i for i in self.tokenizer(text, add_special_tokens=False)["input_ids"] if i not in banned]
        return ids + self.eos_ids[:1] if eos else ids

    def decode(self, ids: list[int], *, strip: bool = True) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip() if strip else text

    def prompts(self, questions: list[dict]) -> dict[str, Tensor]:
        """Left-padded prompts, for generation."""
        encoded = [self.prompt(question) for question in questions]
        return _pad([(each, []) for each in encoded], self.pad_id, left=True)

    def batch(self, questions: list[dict], responses: list[list[int]], packing: str = "padded") -> Batch:
        """Each question followed by its response. The shift by one token happens here, only here.

        Args:
            packing: "padded": right-padded rows; "packed": one pack, each response with its question; "shared": one
                pack, in which responses side by side share their question if it is the same.
        """
        if packing == "padded":
            encoded = [self.prompt(question) for question in questions]
            inputs = _pad(list(zip(encoded, responses, strict=True)), self.pad_id, left=False)
            length = inputs["input_ids"].shape[1]
            first = [i * length + each["input_ids"].shape[1] - 1 for i, each in enumerate(encoded)]
            rows = [torch.arange(start, start + len(ids)) for start, ids in zip(first, responses, strict=True)]
        else:
            # The last token of a response predicts nothing.
            pairs = [(q, ids[:-1]) for q, ids in zip(questions, responses, strict=True)]
            if packing == "shared":
                sides = [list(some) for _, some in groupby(pairs, key=lambda pair: pair[0])]
            else:
                sides = [[pair] for pair in pairs]
            groups = [(self.prompt(some[0][0]), [ids for _, ids in some]) for some in sides]
            inputs, spans = pack(groups, self.rope_index)
            rows = [torch.tensor([last, *range(start, start + count)]) for last, start, count in spans]
        counts = torch.tensor([len(ids) for ids in responses])
        return Batch(
            inputs=inputs,
            row=torch.cat(rows),
            target=torch.tensor([i for ids in responses for i in ids]),
            response_index=torch.repeat_interleave(torch.arange(len(responses)), counts),
        )


def _size(encoded: dict[str, Tensor]) -> int:
    return sum(value.nbytes for value in encoded.values())


def _pad(pairs: list[tuple[dict[str, Tensor], list[int]]], pad_id: int, *, left: bool) -> dict[str, Tensor]:
    length = max(prompt["input_ids"].shape[1] + len(response) for prompt, response in pairs)
    out: dict[str, list[Tensor]] = {}
    for prompt, response in pairs:
        fills = {"input_ids": pad_id, "attention_mask": 0, "mm_token_type_ids": 0}
        tails = {"input_ids": response, "attention_mask": [1] * len(response), "mm_token_type_ids": [0] * len(response)}
        for key, value in prompt.items():
            if key in TOKEN_KEYS:
                row = torch.cat([value[0], value.new_tensor(tails[key])])
                padding = row.new_full((length - row.numel(),), fills[key])
                value = torch.cat([padding, row] if left else [row, padding])[None]
            out.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in out.items()}
