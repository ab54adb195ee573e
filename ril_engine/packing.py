"""Packs: flat micro-batches [prefix | response 1 | ... | response n], group after group, under a token budget.

`plan` decides which responses go into which micro-batch of which rank, `pack` builds the inputs of a model's forward.

T tokens of a pack, P of a prefix.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Sequence
from heapq import heapify, heapreplace
from itertools import takewhile

import torch
from torch import Tensor

from ril_kernels import PackLayout

Group = tuple[int, Sequence[int]]  # tokens of the prefix, tokens of each response
Piece = tuple[int, Sequence[int]]  # number of a group, numbers of some of its responses
TOKEN_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids")  # (1, S); everything else is per picture
# The layout says who reads whom. transformers hands a mask of four dimensions on as it is; None would make it build a
# (T, T) one wherever positions begin anew.
NO_MASK = torch.empty(1, 1, 0, 0)


def plan(groups: Sequence[Group], budget: int, ranks: int = 1) -> list[list[list[Piece]]]:
    """Micro-batches of at most `budget` tokens, as many on each rank: plan[rank][micro-batch] is a list of pieces.

    A group is split only where it is larger than the budget, or where a micro-batch would stay empty; each piece
    repeats the prefix. A response that is too long on its own gets a micro-batch of its own. A micro-batch is empty
    only where there are too few responses. Ranks' sums of tokens are within 2 % of one another from about a hundred
    groups per rank on; with a handful, whole groups decide. Depends on nothing but the arguments. O(n log n).
    """
    pieces: list[Piece] = []
    tokens = []
    for number, (prefix, responses) in enumerate(groups):
        total = prefix + sum(responses)
        if total <= budget:
            pieces.append((number, range(len(responses))))
            tokens.append(total)
            continue
        for part in _best_fit(responses, budget - prefix):
            pieces.append((number, part))
            tokens.append(prefix + sum(responses[i] for i in part))
    packs = _best_fit(tokens, budget)
    count = max(1, -(-len(packs) // ranks)) * ranks
    if len(pieces) < count:
        _split(pieces, tokens, groups, count)
    even = _even(tokens, count)
    if max(sum(map(tokens.__getitem__, pack)) for pack in even) <= max([budget, *tokens]):
        packs = even
    packs += [[] for _ in range(count - len(packs))]
    while not all(packs) and len(donor := max(packs, key=len)) > 1:
        packs[packs.index([])].append(donor.pop())
    # The i-th micro-batches of all ranks are about as large, so that no rank waits for another, and so are their sums.
    packs.sort(key=lambda pack: -sum(map(tokens.__getitem__, pack)))
    out: list[list[list[Piece]]] = [[] for _ in range(ranks)]
    for start in range(0, count, ranks):
        row = packs[start : start + ranks]
        for rank, pack in enumerate(row if start // ranks % 2 == 0 else reversed(row)):
            out[rank].append([pieces[i] for i in pack])
    return out


def _best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Each item, the largest first, into the bin that it fills best; a new one where none has room."""
    bins: list[list[int]] = []
    rooms: list[int] = []  # what bins have left, sorted, each once
    having: dict[int, list[int]] = {}  # bins by what they have left
    for item in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[item]
        at = bisect_left(rooms, size)
        if at == len(rooms):
            left, chosen = room - size, len(bins)
            bins.append([item])
        else:
            before = rooms[at]
            left, chosen = before - size, having[before].pop()
            bins[chosen].append(item)
            if not having[before]:
                del rooms[at], having[before]
        if left >= 0:
            if left not in having:
                insort(rooms, left)
                having[left] = []
            having[left].append(chosen)
    return bins


def _even(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Each item, the largest first, into the emptiest of `count` bins."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    heapify(loads)
    for item in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        load, number = loads[0]
        bins[number].append(item)
        heapreplace(loads, (load + sizes[item], number))
    return bins


def _split(pieces: list[Piece], tokens: list[int], groups: Sequence[Group], count: int) -> None:
    """Halve the largest piece, in place, until there are `count` or none has two responses."""
    while len(pieces) < count:
        halves = [i for i, (_, part) in enumerate(pieces) if len(part) > 1]
        if not halves:
            return
        largest = max(halves, key=tokens.__getitem__)
        number, part = pieces.pop(largest)
        del tokens[largest]
        prefix, responses = groups[number]
        for half in _even([responses[i] for i in part], 2):
            pieces.append((number, [part[i] for i in half]))
            tokens.append(prefix + sum(responses[i] for i in pieces[-1][1]))


def micro_batches(
    packing: str,
    keys: Sequence[Hashable],
    prefix: Sequence[int],
    own: Sequence[int],
    *,
    budget: int,
    ranks: int = 1,
) -> list[list[list[int]]]:
    """The responses of each rank's micro-batches; those of one prefix lie side by side.

    Args:
        packing: "shared": responses with the same key share a prefix; "packed": each repeats it; "padded": each counts
            as many tokens as the longest.
        keys, prefix, own: of each response: what it answers, tokens of that prefix, tokens after it.
    """
    members: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        members.setdefault(key if packing == "shared" else place, []).append(place)
    groups = [(prefix[part[0]], [own[i] for i in part]) for part in members.values()]
    if packing == "padded":
        longest = max(first + rest for first, rest in zip(prefix, own, strict=True))
        groups = [(0, [longest])] * len(groups)
    parts = list(members.values())
    planned = plan(groups, budget, ranks)
    return [[[parts[g][i] for g, some in pack for i in some] for pack in packs] for packs in planned]


def shared_tokens(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with. Each row keeps at least one of its own, at which it is read."""
    first, last = min(rows), max(rows)  # what these two begin with, all rows do
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return min(common, *(len(row) - 1 for row in rows))


def padded(rows: Sequence[list[int]], pad_id: int, *, left: bool = False) -> dict[str, Tensor]:
    """Rows of text as input_ids and attention_mask (B, S), padded on one side."""
    length = max(map(len, rows))
    out: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    for row in rows:
        padding = length - len(row)
        for name, own, fill in (("input_ids", row, pad_id), ("attention_mask", [1] * len(row), 0)):
            out[name].append([fill] * padding + own if left else own + [fill] * padding)
    return {name: torch.tensor(each) for name, each in out.items()}


def pack(
    groups: Sequence[tuple[dict[str, Tensor], Sequence[Sequence[int]]]], rope_index: Callable | None = None
) -> tuple[dict[str, Tensor], list[tuple[int, int, int]]]:
    """The inputs of a model's forward for a pack, positions as if each response stood alone after its prompt.

    Args:
        groups: a prompt as its processor gave it, tokens (1, P) and pixels, and the tokens of each response.
        rope_index: the model's own get_rope_index, where it has one (M-RoPE).

    Raises:
        ValueError: an empty prompt, or pictures whose tokens are not marked.

    Returns:
        inputs with tokens (1, T), and for each response the row of its prompt's last token, the row of its own first
        token, and how many tokens it has.
    """
    tokens, positions, layout, spans = [], [], [], []
    pixels: dict[str, list[Tensor]] = {}
    row = 0
    for prompt, responses in groups:
        ids = prompt["input_ids"][0]
        if not len(ids):
            raise ValueError("groups: got a prompt without tokens, expected one or more. Its last predicts a response.")
        if rope_index is not None and "image_grid_thw" in prompt and "mm_token_type_ids" not in prompt:
            raise ValueError(
                "groups: got a prompt with a picture and without mm_token_type_ids, expected both. Ask the processor "
                "for them: without them the model would place the picture's tokens as text."
            )
        place = torch.arange(len(ids))  # (P,), or (3, P)
        if rope_index is not None:
            place = rope_index(**prompt)[0][:, 0] if "mm_token_type_ids" in prompt else place.expand(3, -1)
        tokens.append(ids)
        positions.append(place)
        row += len(ids)
        last = row - 1
        for response in responses:
            tokens.append(ids.new_tensor(response))
            positions.append(place[..., -1:] + 1 + torch.arange(len(response)))
            spans.append((last, row, len(response)))
            row += len(response)
        layout.append((len(ids), [len(response) for response in responses if len(response)]))
        for key, value in prompt.items():
            if key not in TOKEN_KEYS:
                pixels.setdefault(key, []).append(value)
    inputs = {
        "input_ids": torch.cat(tokens)[None],
        "position_ids": torch.cat(positions, dim=-1).unsqueeze(-2),  # (1, T), or (3, 1, T)
        "attention_mask": NO_MASK,
        "pack_layout": PackLayout.from_groups(layout),
    }
    return inputs | {key: torch.cat(values) for key, values in pixels.items()}, spans
