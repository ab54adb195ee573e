"""Run by test_plan.py: the peak bytes of real training steps, counted by torch's profiler.

Each case gets processes of its own, one per rank, since DeepSpeed keeps an engine's memory until its process ends. They
are forks of this one, which has imported everything once.
"""

import json
import multiprocessing
import os
import socket
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForImageTextToText

from ril_engine.config import DeepSpeedConfig
from ril_engine.engine import Engine, init_distributed
from ril_engine.families import adapt, language_model, look_once
from ril_engine.plan_models import Questions
from ril_engine.policy import Policy


def run(case: dict, begun: list[int]) -> None:
    """Two steps: AdamW has no states in the first one. `begun`: when each forward and each update began."""
    config = AutoConfig.from_pretrained(case["model"])
    dtype = torch.bfloat16 if case["bf16"] else torch.float32
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.model.visual.requires_grad_(False)
    look = look_once(model)
    adapt(language_model(model), case["packing"], torch.device("cpu"))
    questions = Questions(config, model.base_model, case["text_tokens"], case["image_tokens"])
    questions.see(look)
    rates = {"steps": 4, "learning_rate": 1e-5, "whole": model.model.visual}
    engine = Engine(Policy(model), config=DeepSpeedConfig(zero_stage=case["zero_stage"], bf16=case["bf16"]), **rates)
    count = case["responses"]
    for _ in range(2):
        begun.append(time.time_ns())
        batch = questions.batch([{}] * count, [[1] * case["length"]] * count, case["packing"])
        loss, _ = engine(batch, advantages=torch.linspace(-1, 1, count), norm=float(count))
        engine.backward(loss, last=True)
        begun.append(time.time_ns())
        engine.step()


def peaks(profiler, begun: list[int]) -> dict[str, int]:
    """Of the second step: bytes live at most until its update began, and from then on until its end."""
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    live, most = 0, {"policy": 0, "optimiser step": 0}
    for each in sorted(events, key=lambda event: event.start_ns()):
        live += each.nbytes()
        if each.start_ns() >= begun[2]:
            name = "policy" if each.start_ns() < begun[3] else "optimiser step"
            most[name] = max(most[name], live)
    return most


def rank(case: dict, number: int, port: int, results) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(case["ranks"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    init_distributed()
    begun: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(case, begun)
    results.put(peaks(profiler, begun))


def measured(case: dict) -> dict[str, int]:
    """The largest of its ranks'."""
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [fork.Process(target=rank, args=(case, number, port, results)) for number in range(case["ranks"])]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    if any(each.exitcode for each in ranks):
        sys.exit(f"{case}: its ranks ended with {[each.exitcode for each in ranks]}")
    found = [results.get() for _ in ranks]
    return {name: max(each[name] for each in found) for name in found[0]}


def main() -> None:
    torch.set_num_threads(1)
    for case in json.loads(sys.argv[1]):
        print(json.dumps(measured(case)), flush=True)


if __name__ == "__main__":
    main()
