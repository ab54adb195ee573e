"""The stages before the loop. Each writes a folder named by the hash of what it depends on, and is then reused."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import ril_kernels
from ril_engine import __version__, digits, tiny_models
from ril_engine.config import Config, ModelConfig, TeacherConfig, TrainingConfig
from ril_engine.engine import Engine
from ril_engine.errors import UserError, require_free_disk
from ril_engine.families import language_model
from ril_engine.models import Encoder, image_url, load
from ril_engine.policy import Discriminator, Policy, discriminator_batch, encode_for_discriminator
from ril_engine.rewards import answer_reward
from ril_engine.rollout import rollout, seed_of
from ril_engine.runlog import progress
from ril_engine.server import chat, collect, request_seed
from ril_kernels import discriminator_loss

DONE = "done.json"
CODE = ("digits", "engine", "families", "models", "packing", "policy", "rewards", "server", "stages", "tiny_models")


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@functools.cache
def _code() -> str:
    """A hash of the code that stage output depends on: another version of it builds its own."""
    files = [Path(__file__).with_name(f"{name}.py") for name in CODE]
    files += sorted(Path(__file__).with_name("rollout").glob("*.py"))
    for room in ("prefix_attention", "sampling"):  # what the tokens of a response hang on
        files += sorted((Path(ril_kernels.__file__).parent / room).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def key_of(*parts) -> str:
    text = json.dumps(
        [__version__, _code(), *parts], sort_keys=True, default=lambda value: value.model_dump(mode="json")
    )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stage(config: Config, name: str, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of a finished stage, built first if it is missing. All ranks call it; `build` may be collective."""
    folder = config.work_dir / "stages" / f"{name}-{key}"
    partial = folder.with_name(folder.name + ".partial")
    missing = [not (folder / DONE).exists()]
    if dist.is_initialized():
        dist.broadcast_object_list(missing, src=0)
    if missing[0]:
        require_free_disk(config.work_dir, config.min_free_disk_gib)
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            partial.mkdir(parents=True)
        _barrier()
        build(partial)
        _barrier()
        if is_main():
            (partial / DONE).write_text(json.dumps({"stage": name, "key": key, "version": __version__}))
            os.replace(partial, folder)
        _barrier()
    return folder


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def read_jsonl(path: Path, required: tuple[str, ...]) -> list[dict]:
    """The rows of a JSONL file, each with non-empty `required` fields."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"data {path}: {error.strerror}; data.dir must hold this file") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"data {path}, line {number}: not JSON ({error.msg}); expected one object per line"
            ) from error
        for field in required:
            if not isinstance(row, dict) or not str(row.get(field, "")).strip():
                raise UserError(f"data {path}, line {number}: no {field!r}; every line needs {', '.join(required)}")
        rows.append(row)
    if not rows:
        raise UserError(f"data {path}: no rows; expected one JSON object per line")
    return rows


def data(config: Config) -> tuple[Path, str]:
    """The dataset folder and the hash of its text files."""
    if config.data.dir == "digits":
        styles = {
            teacher.name: tiny_models.recipe(teacher.path)[3]
            for teacher in config.teachers
            if teacher.path.startswith("tiny:")
        }
        key = key_of("data", config.data.digits, styles)

        def build(folder: Path) -> None:
            if is_main():
                digits.build(folder, config.data.digits, styles)

        return stage(config, "data", key, build), key
    folder = Path(config.data.dir)
    read_jsonl(folder / "train.jsonl", ("id", "question", "answer"))
    return folder, key_of("files", {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.jsonl")})


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
        _barrier()
        start = start.model_copy(update={"path": str(out)})
    model, processor = load(start)
    rows = read_jsonl(data_dir / file, ("id", "question", "response"))
    encoder = Encoder(model, processor, data_dir, config.data.max_image_pixels)
    engine = Engine(Policy(model.train()), config=config.deepspeed, **_rates(settings))
    rank, world = dist.get_rank(), dist.get_world_size()
    with progress(settings.steps, title, enabled=is_main()) as advance:
        for step in range(settings.steps):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            picks = torch.randint(len(rows), (settings.batch_size,), generator=generator).tolist()
            responses = [encoder.response(rows[i]["response"]) for i in picks]
            tokens = sum(map(len, responses))
            mine = list(range(rank, settings.batch_size, world))
            chunks = [mine[i : i + settings.micro_batch_size] for i in range(0, len(mine), settings.micro_batch_size)]
            total = 0.0
            for chunk in chunks:
                batch = encoder.batch([rows[picks[i]] for i in chunk], [responses[i] for i in chunk])
                loss = -engine(batch).sum() / tokens
                engine.backward(loss, last=chunk is chunks[-1])
                total += float(loss.detach())
            engine.step()
            advance(1)
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
    file = f"sft_{which.name}.jsonl"

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


def all_responses(
    config: Config, student_path: str, student_key: str, data_dir: Path, data_key: str
) -> dict[str, Path]:
    """Source ("student" or a teacher's name) -> its saved responses."""
    student = config.student.model_copy(update={"path": student_path})
    files = {"student": responses(config, "student", student, student_key, data_dir, data_key)}
    for each in config.teachers:
        if each.server is not None:
            files[each.name] = served_responses(config, each, data_dir, data_key)
            continue
        path, key = teacher(config, each, data_dir, data_key)
        source = each.model_copy(update={"path": path})
        files[each.name] = responses(config, each.name, source, key, data_dir, data_key)
    return files


def responses(config: Config, source: str, which: ModelConfig, model_key: str, data_dir: Path, data_key: str) -> Path:
    """N saved responses per training question, judged once: responses.jsonl with provenance."""
    rows, per = _asked(config, data_dir), config.responses.per_question
    key = key_of("responses", source, model_key, config.responses, config.sampling, config.seed, data_key)

    def build(out: Path) -> None:
        model, processor = load(which)
        encoder = Encoder(model.eval(), processor, data_dir, config.data.max_image_pixels)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = [(i, rows[i]) for i in range(rank, len(rows), world)]
        sampler, size = rollout(model, encoder, config.sampling), config.sampling.batch_size
        with (
            progress(len(mine) * per, f"responses of {source}", enabled=is_main()) as advance,
            open(out / f"part-{rank}.jsonl", "w", encoding="utf-8") as file,
        ):
            for start in range(0, len(mine), size):
                part = mine[start : start + size]
                drawn = sampler.generate(part, per, seed=seed_of(config.seed, 1), advance=advance)
                for (_, row), some in zip(part, drawn, strict=True):
                    for n, each in enumerate(some):
                        file.write(_record(row, source, n, each.text, each.truncated, which.path))
        _barrier()
        if is_main():
            parts = sorted(out.glob("part-*.jsonl"))
            (out / "responses.jsonl").write_text("".join(part.read_text() for part in parts))
            for part in parts:
                part.unlink()

    return stage(config, f"responses_{source}", key, build) / "responses.jsonl"


def _asked(config: Config, data_dir: Path) -> list[dict]:
    rows = read_jsonl(data_dir / "train.jsonl", ("id", "question", "answer"))
    return rows[: config.responses.questions or None]


def _record(row: dict, source: str, sample: int, text: str, truncated: bool, model: str) -> str:
    reward = 0.0 if truncated else answer_reward(text, row["answer"])
    record = {"id": row["id"], "source": source, "sample": sample, "text": text, "truncated": truncated}
    return json.dumps({**record, "answer_reward": reward, "model": model}) + "\n"


def served_responses(config: Config, which: TeacherConfig, data_dir: Path, data_key: str) -> Path:
    """What `responses` makes, from a server. Rank 0 asks; each answer outlives a crash in a file beside the stage."""
    rows, server = _asked(config, data_dir), which.server
    # Where and how fast the server answers is not in the key, so that a moved one goes on with the same answers.
    sampling = config.sampling.model_dump(exclude={"batch_size", "cache_tokens"})
    key = key_of("served responses", which.name, server.model, config.responses, sampling, config.seed, data_key)
    saved = config.work_dir / "stages" / f"responses_{which.name}-{key}.answers.jsonl"
    keys = [(i, n) for i in range(len(rows)) for n in range(config.responses.per_question)]

    @functools.lru_cache(maxsize=1)  # the samples of a question are asked for one after another
    def picture(i: int) -> str | None:
        name = rows[i].get("image")
        return image_url(data_dir, name, config.data.max_image_pixels) if name else None

    def body(key: tuple[int, int]) -> dict:
        seed = request_seed(config.seed, key)
        return chat(server, rows[key[0]]["question"], picture(key[0]), config.sampling, seed)

    def rank_0(out: Path) -> None:
        answers = collect(server, keys, body, saved, f"responses of {which.name}")
        lines = [_record(rows[i], which.name, n, *answer, server.model) for (i, n), answer in answers.items()]
        (out / "responses.jsonl").write_text("".join(lines))

    folder = stage(config, f"responses_{which.name}", key, lambda out: _on_rank_0(lambda: rank_0(out)))
    if is_main():
        saved.unlink(missing_ok=True)  # all of it is in the stage now
    return folder / "responses.jsonl"


def _on_rank_0(work: Callable[[], None]) -> None:
    """Work of hours that waits for others: the ranks meet in a group of their own, since _barrier's gives up early."""
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if dist.is_initialized() else None
    message: list[str | None] = [None]
    if is_main():
        try:
            work()
        except UserError as error:
            message = [str(error)]
    if group is not None:
        dist.broadcast_object_list(message, src=0, group=group)
        dist.destroy_process_group(group)
    if message[0] is not None:
        raise UserError(message[0])  # on every rank, so that none waits for one that has left


def new_discriminator(student: ModelConfig):
    """D as it starts: the SFT student's language model and a zero score head; and the student's tokenizer."""
    model, processor = load(student)
    return Discriminator(language_model(model)), processor.tokenizer


def discriminator(config: Config, student_path: str, saved: dict[str, Path], key: str) -> Path:
    """D pre-trained on the saved responses, half of each batch the student's; held-out accuracy in metrics.json."""
    from safetensors.torch import save_file

    settings = config.discriminator.pretrain
    parts = (config.discriminator, config.deepspeed, config.seed, key, sorted(map(str, saved.values())))
    key = key_of("discriminator", *parts)

    def build(out: Path) -> None:
        texts: dict[bool, list] = {True: [], False: []}
        held: dict[bool, list] = {True: [], False: []}
        for source, path in saved.items():
            for row in read_jsonl(path, ("id",)):
                bucket = int(hashlib.sha256(row["id"].encode()).hexdigest(), 16) % 1000
                side = held if bucket < 1000 * config.discriminator.validation_share else texts
                side[source == "student"].append(row["text"])
        for side in (texts, held):
            for student, some in side.items():
                if not some:
                    raise UserError(
                        f"D pre-training: no saved responses of {'the student' if student else 'teachers'} in "
                        f"{'its held-out part' if side is held else 'training'}; raise responses.questions or set "
                        "another discriminator.validation_share"
                    )
        module, tokenizer = new_discriminator(config.student.model_copy(update={"path": student_path}))
        engine = Engine(module.train(), config=config.deepspeed, **_rates(settings))
        rank, world, instruction = dist.get_rank(), dist.get_world_size(), config.discriminator.instruction

        def inputs(some: list[str]):
            return discriminator_batch(encode_for_discriminator(tokenizer, instruction, some), tokenizer.pad_token_id)

        with progress(settings.steps, "D pre-training", enabled=is_main()) as advance:
            for step in range(settings.steps):
                generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
                half = settings.batch_size // 2
                batch = [
                    (texts[student][i], student)
                    for student in (True, False)
                    for i in torch.randint(len(texts[student]), (half,), generator=generator).tolist()
                ][rank::world]
                size = settings.micro_batch_size
                for start in range(0, len(batch), size):
                    some, labels = zip(*batch[start : start + size], strict=True)
                    logits = engine(*inputs(list(some)))
                    loss = discriminator_loss(logits, torch.tensor(labels), norm=2 * half)
                    engine.backward(loss, last=start + size >= len(batch))
                engine.step()
                advance(1)
        if is_main():
            module.eval()
            right = []
            with torch.no_grad():
                for student in (True, False):
                    some = held[student][:200]
                    logits = module(*inputs(some))
                    right += ((logits > 0) == student).tolist()
            metrics = {"held_out_accuracy": sum(right) / len(right), "held_out_responses": len(right)}
            (out / "metrics.json").write_text(json.dumps(metrics))
            save_file(
                {k: v.detach().clone() for k, v in module.state_dict().items()}, out / "discriminator.safetensors"
            )

    return stage(config, "discriminator", key, build)
