"""The stage of saved responses: of the student and of each teacher, generated here or asked of a server."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ril_engine.config import Config, ModelConfig, TeacherConfig
from ril_engine.errors import UserError
from ril_engine.models import Encoder, image_url, load
from ril_engine.rewards import answer_reward
from ril_engine.rollout import rollout, seed_of
from ril_engine.runlog import progress
from ril_engine.server import chat, collect, request_seed
from ril_engine.stages import barrier, is_main, key_of, read_jsonl, stage, teacher


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
        barrier()
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
    """Work of hours that waits for others: the ranks meet in a group of their own, since barrier's gives up early."""
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
