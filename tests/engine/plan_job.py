"""Run by test_plan.py in a process of its own: the peak bytes of real training steps, counted by torch's profiler."""

import json
import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForImageTextToText

from ril_engine.config import DeepSpeedConfig
from ril_engine.engine import Engine, init_distributed
from ril_engine.families import adapt, language_model
from ril_engine.plan_models import Questions
from ril_engine.policy import Policy


def run(case: dict, begun: list[int]) -> None:
    """Two steps: AdamW has no states in the first one. `begun`: when each forward and each update began."""
    config = AutoConfig.from_pretrained(case["model"])
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    adapt(language_model(model), case["packing"], torch.device("cpu"))
    questions = Questions(config, model.base_model, case["text_tokens"], case["image_tokens"])
    rates = {"steps": 4, "learning_rate": 1e-5}
    engine = Engine(Policy(model), config=DeepSpeedConfig(zero_stage=case["zero_stage"]), **rates)
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


def main() -> None:
    init_distributed()
    torch.set_num_threads(1)
    begun: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(json.loads(sys.argv[1]), begun)
    print(json.dumps(peaks(profiler, begun)))


if __name__ == "__main__":
    main()
