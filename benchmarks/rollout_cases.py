"""rollout: greedy answers to Q questions of P prompt tokens with a picture, G each, R tokens long, by the 19M
Qwen2.5-VL of packing_cases.py. The baseline is Hugging Face's own generate with a row per answer.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.case import BASELINE, NO_GRAD, Case
from benchmarks.packing_cases import FIRST_WORD, PAD, gemms, linear_layers, prompt, qwen2_5_vl
from ril_engine.config import SamplingConfig
from ril_engine.rollout import Rollout

# name -> tokens of the picture (rows, columns), P
SIZES = {"14 x 14 picture": ((14, 14), 256), "4 x 4 picture": ((4, 4), 32)}
QUESTIONS, SAMPLES, LENGTH = 16, 4, 32
BANNED = list(range(FIRST_WORD))  # no end: all answers are as long


def _encoder(model: nn.Module, prompts: list[dict[str, Tensor]]) -> SimpleNamespace:
    """What a rollout asks of an Encoder; its questions are their numbers."""
    return SimpleNamespace(
        prompt=prompts.__getitem__,
        decode=lambda ids, strip: "",
        rope_index=model.base_model.get_rope_index,
        eos_ids=[],
        banned_ids=BANNED,
    )


def _by_hugging_face(model: nn.Module, inputs: dict[str, Tensor], keep: dict) -> Tensor:
    settings = {"max_new_tokens": LENGTH, "do_sample": False, "suppress_tokens": BANNED, "pad_token_id": PAD}
    out = model.generate(**inputs, **settings, eos_token_id=None, return_dict_in_generate=True)
    layers = out.past_key_values.layers
    keep["cache_mib"] = sum(each.keys.nbytes + each.values.nbytes for each in layers) / 2**20
    return out.sequences[:, inputs["input_ids"].shape[1] :].float()


def _by_rollout(rollout: Rollout, keep: dict) -> Tensor:
    rollout.seconds.clear()
    begun = time.perf_counter()
    out = rollout.generate([(i, i) for i in range(QUESTIONS)], SAMPLES, seed=0, greedy=True)
    whole = time.perf_counter() - begun
    shares = {name: seconds / whole for name, seconds in rollout.seconds.items()}
    keep["cache_mib"] = sum(each.nbytes for each in rollout.cache.all) / 2**20
    keep["phase_share"] = shares | {"python": 1 - sum(shares.values())}
    return torch.tensor([each.ids for some in out for each in some]).float()


def rollout_case(name: str, picture: tuple[int, int], num_tokens: int, model: Callable) -> Case:
    plain = model().eval()
    prompts = [prompt(picture, num_tokens, seed) for seed in range(QUESTIONS)]
    rows = [each for each in prompts for _ in range(SAMPLES)]
    inputs = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    own = copy.deepcopy(plain)
    sampling = SamplingConfig(max_new_tokens=LENGTH, batch_size=QUESTIONS * SAMPLES)
    rollout = Rollout(own, _encoder(own, prompts), sampling)
    notes: dict[str, dict] = {BASELINE: {}, "ril_engine": {}}
    candidates = {
        BASELINE: partial(_by_hugging_face, plain, inputs, notes[BASELINE]),
        "ril_engine": partial(_by_rollout, rollout, notes["ril_engine"]),
    }
    layers = linear_layers(own, candidates["ril_engine"])
    return Case(
        "rollout",
        f"rollout {name} P={num_tokens} R={LENGTH} Q={QUESTIONS} G={SAMPLES}",
        {},
        candidates,
        {NO_GRAD: [gemms(layers, training=False)]},
        "the GEMMs of every linear layer, prompts and pictures once",
        {NO_GRAD: sum(2 * rows * width * out * count for (rows, width, out), count in layers.items())},
        notes=notes,
    )


def all_cases(device: str) -> list[tuple[str, str, Callable[[], Case]]]:
    if device != "cpu":
        return []
    return [("rollout", name, partial(rollout_case, name, *size, qwen2_5_vl)) for name, size in SIZES.items()]
