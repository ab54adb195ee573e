"""policy_pack: the policy's forward and backward over one question group: a row per response, packed, and shared.

P prompt tokens, R response tokens, N responses. The baseline is Hugging Face's own forward of a row per response, with
the loss op and the head on response positions only, as `packing: padded` has it; all rows are as long: none is padded.
On a GPU, too, candidates differ in their packing alone: none has Liger's kernels, which the engine adds to packs there.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.case import BOTH, Case
from ril_engine.families import attend_over_packs, language_model
from ril_engine.models import Batch, Encoder
from ril_engine.placement import place
from ril_engine.policy import Policy
from ril_engine.rollout.graphs import Graphs

PAD, IMAGE, VIDEO, VISION_START, VISION_END, FIRST_WORD = range(6)
VOCABULARY = 8192
PATCH = 28  # pixels of a side of what becomes one token
# name -> tokens of the picture (rows, columns) or none, P, R. A policy's first token is never predicted, so text alone
# has P=1 at least, and there is nothing else to share.
SIZES: dict[str, tuple[tuple[int, int], int, int]] = {
    "text only": ((0, 0), 1, 32),
    "14 x 14 picture": ((14, 14), 256, 32),
    "28 x 32 picture": ((28, 32), 1024, 64),
}
WIDE = "14 x 14 picture"  # the size that has a wide model, too; the check's float64 of a larger one is tens of GB
RESPONSES = 8
# Of language model and vision tower: in the proportions of Qwen2.5-VL-3B, and its own.
SMALL = (
    {"hidden_size": 384, "intermediate_size": 2048, "num_attention_heads": 6, "num_key_value_heads": 2},
    {"hidden_size": 256, "intermediate_size": 684, "num_heads": 4},
)
OF_3B = (
    {"hidden_size": 2048, "intermediate_size": 11_008, "num_attention_heads": 16, "num_key_value_heads": 2},
    {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
)


def qwen2_5_vl(layers: int = 4, widths: tuple[dict, dict] = SMALL) -> nn.Module:
    """Random weights, with four layers 19M (5M of them in the vision tower), or 440M of the 3B's own widths."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text, vision = widths
    size = text["hidden_size"] // text["num_attention_heads"]
    sections = [size // 8, 3 * size // 16, 3 * size // 16]
    config = Qwen2_5_VLConfig(
        text_config={
            **text,
            "vocab_size": VOCABULARY,
            "num_hidden_layers": layers,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": PAD,
        },
        vision_config={
            **vision,
            "depth": layers,
            "out_hidden_size": text["hidden_size"],
            "fullatt_block_indexes": [layers - 1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config)


def prompt(picture: tuple[int, int], num_tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """As a processor makes it: random words, and a picture of noise, (rows, columns) in tokens."""
    from transformers import Qwen2VLImageProcessor

    generator = torch.Generator().manual_seed(seed)
    rows, columns = picture
    head = [VISION_START, *[IMAGE] * (rows * columns), VISION_END] if rows else []
    words = torch.randint(FIRST_WORD, VOCABULARY, (num_tokens - len(head),), generator=generator)
    ids = torch.cat([torch.tensor(head, dtype=torch.int64), words])[None]
    encoded = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if rows:
        noise = torch.randint(256, (3, PATCH * rows, PATCH * columns), generator=generator, dtype=torch.uint8)
        encoded |= dict(Qwen2VLImageProcessor()(images=[noise], return_tensors="pt"))
        encoded["mm_token_type_ids"] = (ids == IMAGE).long()
    return encoded


class Questions(Encoder):
    """An encoder of questions that are the numbers of prompts."""

    def __init__(self, model: nn.Module, prompts: Sequence[dict[str, Tensor]]):
        self.rope_index, self.pad_id, self.prompt = model.base_model.get_rope_index, PAD, prompts.__getitem__


def _candidate(policy: Policy, batch: Batch, parameters: Sequence[str]) -> Callable[..., Tensor]:
    """Takes the parameters by name, and the settings of policy_loss."""

    def candidate(**inputs) -> Tensor:
        weights = {name: inputs.pop(name) for name in parameters}
        return functional_call(policy, weights, (batch,), inputs)[0]

    return candidate


@contextmanager
def without_graphs() -> Iterator[None]:
    """Within it a rollout's decode steps just run: a hook sees nothing of a CUDA graph's replay."""
    run, Graphs.run = Graphs.run, lambda self, key, step, state: step()
    try:
        yield
    finally:
        Graphs.run = run


def linear_layers(model: nn.Module, run: Callable[[], object]) -> Counter[tuple[int, int, int]]:
    """(rows, in, out) of the product of every linear layer that a run calls, and how often."""
    found: Counter[tuple[int, int, int]] = Counter()

    def note(layer: nn.Linear, inputs: tuple[Tensor], _) -> None:
        found[inputs[0].numel() // layer.in_features, layer.in_features, layer.out_features] += 1

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad(), without_graphs():
        run()
    for hook in hooks:
        hook.remove()
    return found


def gemms(layers: Counter[tuple[int, int, int]], training: bool, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Their output, and for training d(input) and d(weight), in buffers that exist."""
    buffers = {}
    for rows, width, out in layers:
        x, weight = (torch.randn(size, width, dtype=dtype, device=device) for size in (rows, out))
        weight /= width**0.5
        buffers[rows, width, out] = (x, weight, x @ weight.T, torch.empty_like(x), torch.empty_like(weight))

    def run() -> None:
        for size, count in layers.items():
            x, weight, y, grad_x, grad_weight = buffers[size]
            for _ in range(count):
                torch.mm(x, weight.T, out=y)
                if training:
                    torch.mm(y, weight, out=grad_x)
                    torch.mm(y.T, x, out=grad_weight)

    return run


def policy_pack_case(
    name: str,
    picture: tuple[int, int],
    num_prompt: int,
    response: int,
    model: Callable[[], nn.Module],
    dtype: torch.dtype,
    device: str,
) -> Case:
    where = torch.device(device)
    plain = Policy(place(model(), where, dtype))
    packed = copy.deepcopy(plain)
    attend_over_packs(language_model(packed.model))
    encoder = Questions(plain.model, [prompt(picture, num_prompt)])
    generator = torch.Generator().manual_seed(1)
    responses = torch.randint(FIRST_WORD, VOCABULARY, (RESPONSES, response), generator=generator).tolist()
    kinds = ("padded", "packed", "shared")
    batches = {kind: encoder.batch([0] * RESPONSES, responses, kind).to(where) for kind in kinds}
    parameters = {name: each.detach() for name, each in plain.named_parameters()}
    candidates = {
        kind: _candidate(plain if kind == "padded" else packed, batch, list(parameters))
        for kind, batch in batches.items()
    }
    with torch.no_grad():
        logprobs = packed(batches["shared"])
    noise = torch.randn(2, *logprobs.shape, generator=generator).to(logprobs) * 0.2
    settings = {
        "rewards": torch.randint(3, (RESPONSES,), generator=generator).float(),
        "groups": torch.zeros(RESPONSES, dtype=torch.int64),
        "behavior_logprobs": logprobs + noise[0],
        "reference_logprobs": logprobs + noise[1],
        "beta": 0.01,
        "norm": 1.0,  # a gradient that the check's absolute floor does not hide
    }
    layers = linear_layers(packed, lambda: packed.hidden(batches["shared"]))
    out, width = packed.head.weight.shape
    layers[len(batches["shared"].target), width, out] += 1
    tokens = {kind: batch.inputs["input_ids"].numel() for kind, batch in batches.items()}
    return Case(
        "policy_pack",
        f"policy_pack {name} P={num_prompt} R={response} N={RESPONSES}",
        parameters | settings,
        candidates,
        {BOTH: [gemms(layers, True, dtype, device)]},
        f"3 GEMMs of every linear layer for the {tokens['shared']} tokens of the shared pack and its picture, once",
        {BOTH: sum(6 * rows * width * out * count for (rows, width, out), count in layers.items())},
        grad=tuple(each for each in parameters if picture[0] or ".visual." not in each),
        no_grad=False,
        tokens=tokens,
        max_rounds=3,
    )


def models(names: Sequence[str], device: str) -> list[tuple[str, str, Callable[[], nn.Module]]]:
    """(case, size, model): of each size the small model, and on a GPU one that has work for it."""
    cases = [(name, name, qwen2_5_vl) for name in names]
    if device == "cuda":
        cases.append((f"{WIDE}, widths of 3B", WIDE, partial(qwen2_5_vl, widths=OF_3B)))
    return cases


def all_cases(dtype: torch.dtype, device: str, full: bool) -> list[tuple[str, str, Callable[[], Case]]]:
    names = list(SIZES) if full or device == "cuda" else list(SIZES)[:2]
    return [
        ("policy_pack", name, partial(policy_pack_case, name, *SIZES[size], model, dtype, device))
        for name, size, model in models(names, device)
    ]
