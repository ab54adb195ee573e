"""rollout: greedy answers to Q questions of P prompt tokens with a picture, G each, R tokens long, by the Qwen2.5-VL of
packing_cases.py. The baseline is Hugging Face's own generate with a row per answer.

An answer is right if each of its tokens is the likeliest after those before it, in float64: in bfloat16 tokens that are
about as likely may part two right answers, and all that follows.
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
from benchmarks.packing_cases import FIRST_WORD, PAD, Questions, gemms, linear_layers, models, prompt
from ril_engine.config import SamplingConfig
from ril_engine.placement import place, to_device
from ril_engine.policy import Policy
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
    if rollout.device.type == "cpu":
        keep["phase_share"] = shares | {"python": 1 - sum(shares.values())}
    return torch.tensor([each.ids for some in out for each in some]).float()


def _regret(model: nn.Module, prompts: list[dict[str, Tensor]], dtype: torch.dtype, answers: Tensor) -> Tensor:  # ()
    """How far the logit of a token is below the largest one that was allowed after what the answer has before it, at
    most, by the model in float64."""
    question = torch.arange(len(prompts)).repeat_interleave(SAMPLES)
    rows = torch.cat([question[:, None], answers.cpu().long()], dim=1).unique(dim=0).tolist()  # most are the same
    exact = Policy(place(copy.deepcopy(model), model.device, torch.float64))
    batch = Questions(model, prompts).batch([number for number, *_ in rows], [ids for _, *ids in rows])
    batch = batch.to(model.device)
    with torch.no_grad():
        logits = exact.model.lm_head(exact.hidden(batch))
    logits[:, BANNED] = -torch.inf
    return (logits.amax(1) - logits.gather(1, batch.target[:, None])[:, 0]).max().to(dtype)


def rollout_case(
    name: str,
    picture: tuple[int, int],
    num_tokens: int,
    model: Callable[[], nn.Module],
    dtype: torch.dtype,
    device: str,
) -> Case:
    where = torch.device(device)
    plain = place(model().eval(), where, dtype)
    prompts = [prompt(picture, num_tokens, seed) for seed in range(QUESTIONS)]
    rows = [each for each in prompts for _ in range(SAMPLES)]
    inputs = to_device({key: torch.cat([row[key] for row in rows]) for key in rows[0]}, where)
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
        {NO_GRAD: [gemms(layers, False, dtype, device)]},
        "the GEMMs of every linear layer, prompts and pictures once",
        {NO_GRAD: sum(2 * rows * width * out * count for (rows, width, out), count in layers.items())},
        notes=notes,
        max_rounds=3,
        judge=partial(_regret, plain, prompts, dtype),
        dtype=dtype,
    )


def all_cases(dtype: torch.dtype, device: str) -> list[tuple[str, str, Callable[[], Case]]]:
    return [
        ("rollout", name, partial(rollout_case, name, *SIZES[size], model, dtype, device))
        for name, size, model in models(list(SIZES), device)
    ]
