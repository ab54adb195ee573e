"""The stages before the loop. Each writes a folder named by the hash of what it depends on, and is then reused."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

import ril_kernels
from ril_engine import __version__, digits, tiny_models
from ril_engine.adversary import pretrain
from ril_engine.config import Config, ModelConfig, TeacherConfig, TrainingConfig
from ril_engine.engine import Engine, device, training_dtype
from ril_engine.errors import UserError, require_free_disk
from ril_engine.locks import held
from ril_engine.models import Encoder, load
from ril_engine.placement import to_device
from ril_engine.policy import Policy
from ril_engine.questions import SPLITS, data_files, pictures, read_jsonl, require_images, training_questions
from ril_engine.runlog import Skipped, progress, warn
from ril_engine.user_data import unpack

T = TypeVar("T")
DONE = "done.json"
_MODELS = ("families", "models", "packing", "questions", "stages", "tiny_models")
_TRAINING = ("engine", "policy", *_MODELS)
# What the output of a stage hangs on, besides the stages that it reads: modules and packages of this one, and rooms of
# ril_kernels. The first part of a key names its entry.
CODE: dict[str, tuple[str, ...]] = {
    "data": ("digits", "stages"),
    "files": (),
    "unpacked": ("models", "questions", "stages", "user_data"),
    "model": (),
    "teacher": ("digits", "token_logprob", *_TRAINING),
    "sft": ("digits", "token_logprob", *_TRAINING),
    "responses": ("saved_responses", "rollout", "prefix_attention", "sampling", *_MODELS),
    "served responses": ("saved_responses", "server", *_MODELS),
    "responses of a file": ("saved_responses", "teachers", *_MODELS),
    "judge": ("digits", "judge", "local_judge", "tiny_judge", "prefix_attention", *_TRAINING),
    "scores": ("judge", "local_judge", "questions", "rewards", "server", "teacher_scores", "verifier"),
    "discriminator": (
        "adversary",
        "discriminator",
        "health",
        "discriminator_head",
        "prefix_attention",
        *_TRAINING,
    ),
}


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@functools.cache
def _code(name: str) -> str:
    """A hash of the code that a stage's output depends on: another version of it builds its own."""
    own, rooms, files = Path(__file__).parent, Path(ril_kernels.__file__).parent, []
    for each in CODE[name]:
        if (file := own / f"{each}.py").exists():
            files.append(file)
            continue
        folder = own / each if (own / each).is_dir() else rooms / each
        found = sorted(path for path in folder.iterdir() if path.suffix in (".py", ".cpp", ".h"))
        assert found, each
        files += found
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def key_of(name: str, *parts) -> str:
    """The key of a stage: `name` is its entry in CODE, `parts` are its settings and the keys of what it reads."""
    text = json.dumps(
        [__version__, _code(name), name, *parts], sort_keys=True, default=lambda value: value.model_dump(mode="json")
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stage(config: Config, name: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of a finished stage, built first if it is missing. All ranks call it; `build` may be collective.

    Where another job builds the same one, this job waits for it.
    """
    folder = config.work_dir / "stages" / f"{name}-{key}"
    missing = [not (folder / DONE).exists()]
    if dist.is_initialized():
        dist.broadcast_object_list(missing, src=0)
    if not missing[0]:
        return folder
    with ExitStack() as claims:

        def claim() -> bool:
            def busy(holder: str) -> None:
                warn(f"stage {folder.name} is being built by {holder}: waiting for it")

            claims.enter_context(held(config.work_dir / "locks" / folder.name, busy))
            return not (folder / DONE).exists()  # the other job may have finished it

        if on_rank_0(claim):
            require_free_disk(config.work_dir, config.min_free_disk_gib)
            _build(folder, {"stage": name, "key": key, "version": __version__}, build)
    return folder


def _build(folder: Path, about: dict, build: Callable[[Path], None]) -> None:
    """Built beside its place and renamed, so that a folder with DONE is whole."""
    partial = folder.with_name(folder.name + ".partial")
    if is_main():
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    build(partial)
    barrier()
    if is_main():
        (partial / DONE).write_text(json.dumps(about))
        os.replace(partial, folder)
    barrier()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def together(work: Callable[[], T]) -> list[T]:
    """What `work` returned on each rank, on every rank; a UserError of one is raised on all, so that none waits.

    For work of hours: the ranks meet in a group of their own, since barrier's gives up early.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if dist.is_initialized() else None
    value, message = None, None
    try:
        value = work()
    except UserError as error:
        message = str(error)
    everyone = [(value, message)]
    if group is not None:
        everyone *= dist.get_world_size()
        dist.all_gather_object(everyone, (value, message), group=group)
        dist.destroy_process_group(group)
    for _, message in everyone:
        if message is not None:
            raise UserError(message)
    return [value for value, _ in everyone]


def on_rank_0(work: Callable[[], T]) -> T:
    """What rank 0's `work` returned, or the UserError that it ended with, on every rank."""
    return together(lambda: work() if is_main() else None)[0]


def data(config: Config) -> tuple[Path, str]:
    """The dataset folder and the hash of its text files."""
    if config.data.dir == "digits":
        key = key_of("data", config.data.digits)

        def build(folder: Path) -> None:
            if is_main():
                digits.build(folder, config.data.digits)

        return stage(config, "data", key, build), key
    folder = Path(config.data.dir)
    found = {name: data_files(folder, name) for name in SPLITS}
    if any(path.suffix == ".parquet" for files in found.values() for path in files):
        folder, key = unpacked(config, {name: files for name, files in found.items() if files[0].exists()})
        training_questions(config, folder)
        return folder, key
    require_images(folder, training_questions(config, folder))
    files = [folder / f"{split}.jsonl" for split in ("train", "validation", "test")] + sorted(folder.glob("sft*.jsonl"))
    return folder, key_of("files", {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.exists()})


def unpacked(config: Config, splits: dict[str, list[Path]]) -> tuple[Path, str]:
    """What `data` gives, of Parquet files: a stage with JSON lines and pictures."""
    digests = on_rank_0(lambda: {name: [digest(path) for path in files] for name, files in splits.items()})
    key = key_of("unpacked", digests, config.data.max_image_pixels)

    def build(out: Path) -> None:
        on_rank_0(lambda: unpack(splits, out, config.data.max_image_pixels))

    return stage(config, "data", key, build), key


def digest(path: Path) -> str:
    """SHA-256 of a file, which is read piece by piece."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def train_supervised(
    config: Config,
    settings: TrainingConfig,
    start: ModelConfig,
    data_dir: Path,
    file: str,
    out: Path,
    title: str,
    seed: int,
) -> None:
    """SFT on a JSONL file's responses: the mean negative log-prob of the response tokens of the global batch."""
    if settings.batch_size < dist.get_world_size():
        raise UserError(f"{title}: batch_size is {settings.batch_size}, fewer than the {dist.get_world_size()} ranks")
    if start.path.startswith("tiny:"):
        if is_main():
            instruction = config.discriminator.instruction
            tiny_models.build(out, start.path, [instruction, "<response></response>"], config.data.digits.seed)
        barrier()
        start = start.model_copy(update={"path": str(out)})
    model, processor = load(start, training_dtype(config.deepspeed))
    rows = read_jsonl(data_dir / file, ("id", "question", "response"))
    encoder = Encoder(model, processor, data_dir, config.data.max_image_pixels)
    engine = Engine(Policy(model.train()), config=config.deepspeed, **_rates(settings))
    rank, world = dist.get_rank(), dist.get_world_size()
    skipped = Skipped(title, config.rl.max_skipped_steps)
    with progress(settings.steps, title, enabled=is_main()) as advance:
        for step in range(settings.steps):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            picks = torch.randint(len(rows), (settings.batch_size,), generator=generator).tolist()
            responses = [encoder.response(rows[i]["response"]) for i in picks]
            tokens = sum(map(len, responses))
            count = settings.micro_batch_size * world
            for start in range(0, settings.batch_size, count):
                every = range(start, min(start + count, settings.batch_size))  # over all ranks
                mine = every[rank::world]
                # All ranks run the model as often, and its vision tower, too, since with ZeRO they wait for one
                # another: examples that do not count stand in.
                some = list(mine) or [start]
                pictured = [i for i in every if pictures(rows[picks[i]])]
                if pictured and not set(pictured) & set(some):
                    some.append(pictured[0])
                batch = encoder.batch([rows[picks[i]] for i in some], [responses[i] for i in some])
                counts = batch.response_index < len(mine)
                loss = -(engine(batch.to(device())) * to_device(counts, device())).sum() / tokens
                engine.backward(loss, last=start + count >= settings.batch_size)
            skipped(step + 1, engine.step()["grad_norm"])
            advance(1)
    with engine.gathered():
        if is_main():
            model.save_pretrained(out)
            processor.save_pretrained(out)


def _rates(settings: TrainingConfig) -> dict:
    return settings.model_dump(exclude={"batch_size", "micro_batch_size"})


def _shared(config: Config) -> tuple:
    """What else a training depends on: D's instruction is in the corpus of the tiny tokenizers."""
    return config.discriminator.instruction, config.deepspeed


def teacher(config: Config, which: TeacherConfig, data_dir: Path, data_key: str) -> tuple[str, str]:
    """A teacher's checkpoint and key; a "tiny:" one is trained first on reasoned answers."""
    if not which.path.startswith("tiny:"):
        return which.path, key_of("model", which)
    key = key_of("teacher", which, config.teacher_sft, *_shared(config), data_key)
    file = f"sft_{tiny_models.recipe(which.path)[3]}.jsonl"

    def build(out: Path) -> None:
        # A teacher belongs to the task, as a downloaded one would: it is the same for every seed of a study.
        seed = config.data.digits.seed
        train_supervised(config, config.teacher_sft, which, data_dir, file, out, f"teacher {which.name}", seed)

    return str(stage(config, f"teacher_{which.name}", key, build)), key


def sft(config: Config, data_dir: Path, data_key: str) -> tuple[str, str]:
    """The student after SFT, and its key."""
    key = key_of("sft", config.student, config.sft, config.seed, *_shared(config), data_key)
    if config.sft.steps == 0:
        return config.student.path, key

    def build(out: Path) -> None:
        train_supervised(config, config.sft, config.student, data_dir, "sft.jsonl", out, "SFT student", config.seed)

    return str(stage(config, "sft", key, build)), key


def discriminator(config: Config, student_path: str, saved: dict[str, Path], key: str) -> Path:
    """D pre-trained on the saved responses; its held-out accuracy is in metrics.json."""
    settings = config.discriminator.model_dump(
        include={"pretrain", "validation_share", "objective", "label_smoothing", "temperature", "instruction"}
    )
    weights = {each.name: each.weight for each in config.teachers}
    parts = (settings, weights, config.deepspeed, config.seed, key, sorted(path.parent.name for path in saved.values()))
    student = config.student.model_copy(update={"path": student_path})

    def build(out: Path) -> None:
        responses = {source: read_jsonl(path, ("id",)) for source, path in saved.items()}
        pretrain(config, student, responses, out)

    return stage(config, "discriminator", key_of("discriminator", *parts), build)
