"""Keys and values of the questions in flight, in buffers that never move: each prompt once, and what its samples add.

Q question slots, G samples of each, P prompt and R response tokens at most, B rows of a decode step, Hq query heads,
Hkv key heads, D head size. A sample's row is slot * G + its number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ril_kernels import PackLayout, prefix_attention


class Cache:
    """One slot per question; decode steps read views of it, cut to what is in use.

    Contiguous slots, not pages: a step reads a slot's prompt in one product for all of its samples, which pages would
    have to be gathered for, in every layer of every step (LOG.md has the measurement).
    """

    def __init__(self, decoder: nn.Module, questions: int, samples: int, prompt: int, response: int):
        config, weight = decoder.config, decoder.embed_tokens.weight
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = (config.num_hidden_layers, 2, questions, config.num_key_value_heads)
        # Zeros, for a weight of 0 times what uninitialised memory may hold can be NaN.
        self.prompts = weight.new_zeros(*heads, prompt, size)
        self.responses = weight.new_zeros(*heads, samples, response, size)

    @property
    def all(self) -> list[Tensor]:
        return [self.prompts, self.responses]


@dataclass
class Prefill:
    """Attention of a pack of prompts, which keeps their keys and values."""

    cache: Cache
    layout: PackLayout
    slot: Tensor  # (T,) of each packed token
    place: Tensor  # (T,) of the token in its prompt

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))  # (T, heads, D)
        for kept, each in zip(self.cache.prompts[layer], (key, value), strict=True):
            kept[self.slot, :, self.place] = each
        return prefix_attention(query, key, value, layout=self.layout, scale=scale)[None]


@dataclass
class Decode:
    """Attention of one new token per row to its prompt and to what its sample has so far.

    The queries of a question's samples are one block against its prompt, which is so read once for all of them. Rows
    may come twice (they then write the same), and samples without a row are computed and left.
    """

    cache: Cache
    slot: Tensor  # (B,) question slot of a row
    sample: Tensor  # (B,)
    place: Tensor  # (B,) of the row's token in its response
    mask: Tensor  # (Q, 1, G, 1, P + R) float: 0 for what is there, -inf for what is not
    num_prompt: int  # P of this step, and what remains of the mask's last axis is R

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        num_own = self.mask.shape[-1] - self.num_prompt
        prompt_key, prompt_value = self.cache.prompts[layer, :, :, :, : self.num_prompt]  # (Q, Hkv, P, D)
        own_key, own_value = self.cache.responses[layer, :, :, :, :, :num_own]  # (Q, Hkv, G, R, D)
        heads = own_key.shape[1]
        query, key, value = (each[0].transpose(0, 1) for each in (query * scale, key, value))  # (B, heads, D)
        own_key[self.slot, :, self.sample, self.place] = key
        own_value[self.slot, :, self.sample, self.place] = value
        query = query.unflatten(1, (heads, -1))
        grouped = query.new_zeros(*own_key.shape[:3], *query.shape[2:])  # (Q, Hkv, G, Hq / Hkv, D)
        grouped[self.slot, :, self.sample] = query
        shared = (grouped.flatten(2, 3) @ prompt_key.mT).unflatten(2, grouped.shape[2:4])
        scores = torch.cat([shared, grouped @ own_key.mT], dim=-1) + self.mask
        weight = scores.softmax(-1).to(query.dtype)
        out = (weight[..., : self.num_prompt].flatten(2, 3) @ prompt_value).view_as(grouped)
        out = out + weight[..., self.num_prompt :] @ own_value
        return out[self.slot, :, self.sample].flatten(1, 2)[None]  # (1, B, Hq, D)


def visible(prompt_length: Tensor, own_length: Tensor, num_prompt: int, num_own: int, dtype: torch.dtype) -> Tensor:
    """The mask of `Decode`, for prompts of (Q,) tokens and samples that have (Q * G,) tokens, this step's included.

    A slot that nothing is in has at least one key, so that no softmax is over nothing.
    """
    questions = len(prompt_length)
    own = own_length.clamp(min=1).view(questions, -1, 1)
    prompt = prompt_length.view(questions, 1, 1).expand(-1, own.shape[1], -1)
    place = torch.arange(max(num_prompt, num_own), device=own.device)
    seen = torch.cat([place[:num_prompt] < prompt, place[:num_own] < own], dim=-1)  # (Q, G, P + R)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
    return mask[:, None, :, None]
