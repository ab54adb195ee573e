"""What the candidates of a whole step share: the task, its sizes, the clock."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import nn

from ril_engine import digits, tiny_models
from ril_engine.config import Config
from ril_engine.engine import device as engine_device
from ril_engine.engine import init_distributed
from ril_engine.errors import UserError
from ril_engine.families import language_model
from ril_engine.loop import Loop
from ril_engine.models import Encoder
from ril_engine.runlog import PhaseTimer
from ril_kernels import token_bits

PATCH = 28  # pixels of a side of what becomes one token
# P -> tokens of the picture (rows, columns)
SIZES = {64: (4, 7), 256: (14, 14), 1024: (28, 32)}
QUESTIONS, SAMPLES, LENGTH, ROUNDS = 2, 8, 32, 3
HIDDEN, LAYERS, VOCABULARY = 448, 4, 8192
BETA, RATE = 0.04, 1e-6
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
Found = tuple[float, float]  # loss, norm of its gradient


class Task:
    """Checkpoint, pictures and questions of exactly P tokens, in a folder of its own, and where and in which dtype all
    candidates run."""

    def __init__(self, num_tokens: int, picture: tuple[int, int], questions: int, dtype: torch.dtype, device: str):
        if engine_device().type != device:
            raise UserError(
                f"--device {device}: DeepSpeed would run on {engine_device().type}; set DS_ACCELERATOR={device}"
            )
        self.dtype, self.device, self.bf16 = dtype, torch.device(device), dtype == torch.bfloat16
        self.folder = Path(tempfile.mkdtemp(prefix="step-"))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.student = str(self.folder / "student")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, processor = tiny_models._qwen2_5_vl(HIDDEN, LAYERS, digits.corpus())
            model.resize_token_embeddings(VOCABULARY)
        for each in (processor.image_processor, processor.video_processor):
            each.size = {"shortest_edge": PATCH**2, "longest_edge": 2**20}
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        model.save_pretrained(self.student)
        processor.save_pretrained(self.student)
        self.rows = [self._row(number, picture, num_tokens, processor) for number in range(questions)]

    def _row(self, number: int, picture: tuple[int, int], num_tokens: int, processor) -> dict:
        from PIL import Image

        generator = torch.Generator().manual_seed(number)
        noise = torch.randint(256, (PATCH * picture[0], PATCH * picture[1], 3), generator=generator, dtype=torch.uint8)
        name = f"{number}.png"
        Image.fromarray(noise.numpy()).save(self.folder / name)
        with Image.open(self.folder / name) as image:
            for text in ("What" + " the" * count + end for count in range(num_tokens) for end in ("", "?")):
                messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
                rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                if len(processor(text=[rendered], images=[image])["input_ids"][0]) == num_tokens:
                    break
            else:
                raise ValueError(f"no question of {num_tokens} tokens with a picture of {picture}")
        return {"id": str(number), "question": text, "answer": "7", "image": name, "kind": "left"}

    def config(self, **changes) -> Config:
        settings = {
            "work_dir": self.folder / "runs",
            "student": {"path": self.student},
            "deepspeed": {"bf16": self.bf16},
            "data": {"dir": str(self.folder)},
            "sampling": {"max_new_tokens": LENGTH, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0},
        }
        return Config.model_validate(settings | changes)

    def loop(self, algorithm: str, group: int, saved: dict, d_path: Path | None, **changes) -> Loop:
        init_distributed()
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, also where a job of one was there before
        rl = {"algorithm": algorithm, "questions_per_step": len(self.rows), "group_size": group, "beta": BETA}
        loop = Loop(self.config(rl=rl | {"learning_rate": RATE}, **changes), self.folder, self.student, saved, d_path)
        encoder = loop.encoder
        banned = token_bits(torch.tensor(encoder.banned_ids + encoder.eos_ids), VOCABULARY)
        loop.sampler.banned = banned.to(self.device)
        sharpened(loop.reference.model)
        return loop


class Phases:
    """Seconds by phase over all steps, as shares in `note`. The host waits for a GPU where a phase begins and ends."""

    def __init__(self) -> None:
        self.timer, self.seconds, self.note = PhaseTimer(), Counter(), {}

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return self.timer.phase(name)

    @contextmanager
    def step(self, rest: str) -> Iterator[None]:
        """A step; `rest` is what no other phase in it has."""
        self.timer.pop()
        with self(rest):
            yield
        self.seconds.update(self.timer.pop())
        whole = self.seconds["step"]
        self.note["phase_share"] = {name: value / whole for name, value in self.seconds.items() if name != "step"}


def forget(encoder: Encoder) -> None:
    """Each step of an epoch has new questions: their pictures are read and looked at in it."""
    encoder._prompts.clear()
    encoder._cached_bytes = 0


def frozen(model: nn.Module) -> nn.Module:
    model.model.visual.requires_grad_(False)
    return model


def sharpened(reference: nn.Module) -> None:
    """Larger logits: the KL to a reference that equals the student is 0, and the loss of its own roll-outs then says
    nothing of log-probs."""
    language_model(reference).norm.weight.data *= 1.5
