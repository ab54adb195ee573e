"""Run by test_plan.py in a process of its own: the peak bytes of real training steps, counted by torch's profiler."""

import gc
import json
import sys

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForImageTextToText

from ril_engine.config import DeepSpeedConfig
from ril_engine.engine import Engine, init_distributed
from ril_engine.families import adapt, language_model
from ril_engine.plan_models import Questions
from ril_engine.policy import Policy
from ril_kernels.token_logprob import memory


def run(case: dict) -> None:
    """Two steps: AdamW has no states in the first one."""
    config = AutoConfig.from_pretrained(case["model"])
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.model.visual.requires_grad_(False)
    adapt(language_model(model), case["packing"])
    questions = Questions(config, model.base_model, case["text_tokens"], case["image_tokens"])
    rates = {"steps": 4, "learning_rate": 1e-5}
    engine = Engine(Policy(model), config=DeepSpeedConfig(zero_stage=case["zero_stage"]), **rates)
    count = case["responses"]
    for _ in range(2):
        batch = questions.batch([{}] * count, [[1] * case["length"]] * count, case["packing"])
        loss, _ = engine(batch, advantages=torch.linspace(-1, 1, count), norm=float(count))
        engine.backward(loss, last=True)
        engine.step()


def peak(profiler) -> int:
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    live = most = 0
    for each in sorted(events, key=lambda event: event.start_ns()):
        live += each.nbytes()
        most = max(most, live)
    return most


def main() -> None:
    init_distributed()
    torch.set_num_threads(1)
    peaks = []
    for case in json.loads(sys.argv[1]):
        memory.release()
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run(case)
        peaks.append(peak(profiler))
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
