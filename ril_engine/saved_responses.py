"""The stage of saved responses: of the student and each teacher, made here, asked of a server or read from a file."""

from __future__ import annotations

import functools
import json
from collections import Counter, defaultdict
from pathlib import Path

import torch.distributed as dist

from ril_engine.config import Config, ModelConfig, TeacherConfig
from ril_engine.engine import device
from ril_engine.errors import UserError
from ril_engine.models import Encoder, image_url, load, load_tokenizer
from ril_engine.questions import json_lines, parts, read_jsonl, text_of, training_questions
from ril_engine.rollout import rollout, seed_of
from ril_engine.runlog import progress, warn
from ril_engine.server import chat, collect, request_seed
from ril_engine.stages import barrier, digest, is_main, key_of, on_rank_0, stage, teacher
from ril_engine.teachers import needed

SHOWN_CHARACTERS = 60  # of an id in a message
NOTE = "left_out.txt"


def all_responses(
    config: Config, student_path: str, student_key: str, data_dir: Path, data_key: str
) -> dict[str, Path]:
    """Source ("student" or a teacher's name) -> its saved responses."""
    student = config.student.model_copy(update={"path": student_path})
    files = {"student": responses(config, "student", student, student_key, data_dir, data_key)}
    for each in config.teachers:
        if each.server is not None:
            files[each.name] = served_responses(config, each, data_dir, data_key)
        elif each.responses is not None:
            files[each.name] = file_responses(config, each, student_path, data_dir, data_key)
        else:
            path, key = teacher(config, each, data_dir, data_key)
            source = each.model_copy(update={"path": path})
            files[each.name] = responses(config, each.name, source, key, data_dir, data_key)
    return files


def taught_questions(config: Config, student_path: str, data_dir: Path, data_key: str) -> list[dict]:
    """The questions of the loop, whatever its algorithm, so that runs compare: those with a reference and with as many
    responses of each teacher's file as a step may want."""
    rows = training_questions(config, data_dir)
    for each in config.teachers:
        if each.responses is not None:
            file = file_responses(config, each, student_path, data_dir, data_key)
            found = Counter(row["id"] for row in read_jsonl(file, ("id",)))
            rows = [row for row in rows if found[row["id"]] >= needed(config)[each.name]]
    if not rows:
        raise UserError(
            "teachers: no question has enough responses in all of their files; give the files responses to the same "
            "questions"
        )
    return rows


def responses(config: Config, source: str, which: ModelConfig, model_key: str, data_dir: Path, data_key: str) -> Path:
    """N saved responses per training question: responses.jsonl with provenance."""
    rows, per = training_questions(config, data_dir), config.responses.per_question
    settings = (config.responses, config.sampling, config.seed)
    key = key_of("responses", source, model_key, *settings, data_key, _ids(rows))

    def build(out: Path) -> None:
        model, processor = load(which)
        encoder = Encoder(model.to(device()).eval(), processor, data_dir, config.data.max_image_pixels)
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
                        file.write(_record(row["id"], source, n, each.text, each.truncated, which.path))
        barrier()
        if is_main():
            parts = sorted(out.glob("part-*.jsonl"))
            (out / "responses.jsonl").write_text("".join(part.read_text() for part in parts))
            for part in parts:
                part.unlink()

    return stage(config, f"responses_{source}", key, build) / "responses.jsonl"


def _ids(rows: list[dict]) -> list[str]:
    return [row["id"] for row in rows]


def _record(question: str, source: str, sample: int, text: str, truncated: bool, model: str) -> str:
    record = {"id": question, "source": source, "sample": sample, "text": text, "truncated": truncated, "model": model}
    return json.dumps(record) + "\n"


def served_responses(config: Config, which: TeacherConfig, data_dir: Path, data_key: str) -> Path:
    """What `responses` makes, from a server. Rank 0 asks; each answer outlives a crash in a file beside the stage."""
    rows, server = training_questions(config, data_dir), which.server
    # Where and how fast the server answers is not in the key, so that a moved one goes on with the same answers.
    sampling = config.sampling.model_dump(exclude={"batch_size", "cache_tokens"})
    settings = (config.responses, sampling, config.seed)
    key = key_of("served responses", which.name, server.model, *settings, data_key, _ids(rows))
    saved = config.work_dir / "stages" / f"responses_{which.name}-{key}.answers.jsonl"
    keys = [(i, n) for i in range(len(rows)) for n in range(config.responses.per_question)]

    @functools.lru_cache(maxsize=1)  # the samples of a question are asked for one after another
    def asked(i: int) -> list[tuple[str, str]]:
        limit = config.data.max_image_pixels
        return [(kind, image_url(data_dir, x, limit) if kind == "image" else x) for kind, x in parts(rows[i])]

    def body(key: tuple[int, int]) -> dict:
        seed = request_seed(config.seed, key)
        return chat(server, asked(key[0]), config.sampling, seed)

    def rank_0(out: Path) -> None:
        answers = collect(server, keys, body, saved, f"responses of {which.name}")
        lines = [_record(rows[i]["id"], which.name, n, *answer, server.model) for (i, n), answer in answers.items()]
        (out / "responses.jsonl").write_text("".join(lines))

    folder = stage(config, f"responses_{which.name}", key, lambda out: on_rank_0(lambda: rank_0(out)))
    if is_main():
        saved.unlink(missing_ok=True)  # all of it is in the stage now
    return folder / "responses.jsonl"


def file_responses(config: Config, which: TeacherConfig, student_path: str, data_dir: Path, data_key: str) -> Path:
    """What `responses` makes, from a file of responses made elsewhere. Rank 0 reads and checks it.

    Raises:
        UserError: no such file, or bad rows with on_bad_data "stop"; with "skip" they are left out with a warning.
    """
    rows, count = training_questions(config, data_dir), needed(config)[which.name]
    contents = on_rank_0(lambda: _digest(which))
    # Of the student only the tokenizer counts, and D's instruction is in the corpus of a tiny one's.
    tokenizer = (config.student, config.discriminator.instruction)
    settings = (count, config.sampling.max_new_tokens, config.on_bad_data)
    key = key_of("responses of a file", which.name, contents, *tokenizer, *settings, data_key, _ids(rows))

    def rank_0(out: Path) -> None:
        every = set(_ids(read_jsonl(data_dir / "train.jsonl", ("id",))))
        student = config.student.model_copy(update={"path": student_path})
        kept, bad = _checked(which.responses, every, load_tokenizer(student), config.sampling.max_new_tokens)
        few = [row["id"] for row in rows if len(kept[row["id"]]) < count]
        if few:
            bad[f"questions with fewer than {count} responses"] = [f"{_shown(q)} with {len(kept[q])}" for q in few]
        if bad:
            said = ", ".join(f"{what}: {len(some)} (first: {some[0]})" for what, some in bad.items())
            said = f"teacher {which.name}, file {which.responses}: {said}"
            if config.on_bad_data == "stop":
                raise UserError(f"{said}; mend the file, or set on_bad_data: skip to leave these out")
            if len(few) == len(rows):
                raise UserError(f"{said}, so that on_bad_data: skip leaves no question; mend the file")
            (out / NOTE).write_text(f"{said}; over-long texts are cut and the others left out (on_bad_data: skip)")
        model = f"{which.responses}, sha256 {contents}"
        some = [(row["id"], n, *each) for row in rows for n, each in enumerate(kept[row["id"]])]
        lines = [_record(question, which.name, n, *each, model) for question, n, *each in some]
        (out / "responses.jsonl").write_text("".join(lines))

    folder = stage(config, f"responses_{which.name}", key, lambda out: on_rank_0(lambda: rank_0(out)))
    if (folder / NOTE).exists():
        warn((folder / NOTE).read_text())
    return folder / "responses.jsonl"


def _digest(which: TeacherConfig) -> str:
    try:
        return digest(which.responses)
    except OSError as error:
        raise UserError(
            f"teacher {which.name}, file {which.responses}: {error.strerror}; give a JSONL file of responses"
        ) from error


def _shown(question: str) -> str:
    return repr(question[:SHOWN_CHARACTERS])


def _checked(
    path: Path, questions: set[str], tokenizer, max_tokens: int
) -> tuple[dict[str, list[tuple[str, bool]]], dict[str, list[str]]]:
    """Question -> (text, truncated) of its good rows; and what is wrong -> where, a line's number first."""
    kept: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    bad: dict[str, list[str]] = defaultdict(list)
    lines: dict[tuple[str, str], int] = {}
    for number, row in json_lines(path):
        if isinstance(row, str):
            bad["lines that are no object"].append(f"line {number}, {row}")
            continue
        question, text, truncated = text_of(row.get("id")), row.get("text"), row.get("truncated", False)
        if question is None or not isinstance(text, str) or not isinstance(truncated, bool):
            field = "id" if question is None else "text" if not isinstance(text, str) else "truncated"
            bad["lines without id, text or a good truncated"].append(f"line {number}, {field}")
            continue
        where = f"line {number}, id {_shown(question)}"
        text = (text_of(text) or "").strip()
        if question not in questions:
            bad["responses to no training question"].append(where)
        elif not text:
            bad["empty texts"].append(where)
        elif (first := lines.setdefault((question, text), number)) != number:
            bad["duplicates"].append(f"{where}, as in line {first}")
        else:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(tokens) + (not truncated) > max_tokens:  # a whole response ends in EOS
                bad[f"texts of more than sampling.max_new_tokens {max_tokens}"].append(f"{where}, {len(tokens)} tokens")
                text, truncated = tokenizer.decode(tokens[:max_tokens], skip_special_tokens=True).strip(), True
            kept[question].append((text, truncated))
    return kept, bad
