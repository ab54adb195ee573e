"""The main job: `deepspeed ril_engine/train.py --config configs/digits.yaml`.

Builds whatever stage output is missing, then runs Algorithm 2 of RIL (arXiv 2510.19307, loop.py) with one DeepSpeed
engine for the student and one for the discriminator. The last line on stdout is one JSON object with results and paths.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

import torch.distributed as dist
import yaml

from ril_engine import checkpoints, stages
from ril_engine.cli import add_run_arguments
from ril_engine.config import Config
from ril_engine.config_file import load_config
from ril_engine.engine import init_distributed, to_deepspeed
from ril_engine.errors import OutsideError, UserError, exit_code, leave, require_free_disk
from ril_engine.evaluation import evaluate
from ril_engine.families import language_model, vision_tower
from ril_engine.locks import held
from ril_engine.loop import Loop, average, scheduled
from ril_engine.lora import merged
from ril_engine.models import require_packable_student
from ril_engine.profiling import Profile
from ril_engine.questions import evaluation_questions, pictures, validation_questions
from ril_engine.report import write_report
from ril_engine.rewards import require_rewards
from ril_engine.runlog import PhaseTimer, RunLog, accuracy_table, progress
from ril_engine.saved_responses import all_responses, taught_questions
from ril_engine.stopping import Stop
from ril_engine.teacher_scores import scored_responses
from ril_engine.tiny_judge import with_judges


def prepare(config: Config, data_dir: Path, data_key: str):
    """Stages 1 to 3, each built where it is missing: student path, questions, scored responses by teacher and id, D."""
    student_path, student_key = stages.sft(config, data_dir, data_key)
    rows = taught_questions(config, student_path, data_dir, data_key)
    if config.rl.algorithm in ("dr_grpo", "grpo"):
        return student_path, rows, {}, None
    files = all_responses(config, student_path, student_key, data_dir, data_key)
    saved = scored_responses(config, files, data_dir)
    adversarial = config.rl.algorithm == "ril" and config.discriminator.use != "none"
    d_path = stages.discriminator(config, student_path, files, student_key) if adversarial else None
    return student_path, rows, saved, d_path


def train(config: Config, resume: Path | None = None, *, profile: bool = False) -> dict:
    """The whole job, or the rest of the one in the folder `resume`; returns what is printed as the last line."""
    init_distributed()
    with ExitStack() as claims:  # the run's folder is this process's until the end
        return _train(config, resume, claims, profile)


def _train(config: Config, resume: Path | None, claims: ExitStack, profile: bool) -> dict:
    began, rank, world, rl = time.time(), dist.get_rank(), dist.get_world_size(), config.rl
    require_free_disk(config.work_dir, config.min_free_disk_gib)
    if rl.questions_per_step % world:
        raise UserError(
            f"rl.questions_per_step is {rl.questions_per_step}, not a multiple of the {world} ranks: set it to "
            f"{-(-rl.questions_per_step // world) * world}, or start another number of ranks"
        )
    if rl.packing != "padded":
        require_packable_student(config.student)
    require_rewards(config)
    to_deepspeed(config.deepspeed, rl.max_grad_norm)  # refuses what DeepSpeed does not take
    if resume:
        _claim(resume, claims)
        checkpoints.require_unfinished(resume)  # it may have ended just now
        checkpoint = checkpoints.newest_whole(resume)
    data_dir, data_key = stages.data(config)
    test = evaluation_questions(config, data_dir)  # before anything slow
    validation = validation_questions(config, data_dir)
    trained = with_judges(config)  # not in the run's own settings, which name no stage
    student_path, rows, saved, d_path = prepare(trained, data_dir, data_key)

    loop = Loop(trained, data_dir, student_path, saved, d_path)
    _require_alike(config, loop.policy.model, rows)
    run_dir = resume or _new_run(config, claims)
    done, about = checkpoints.load(checkpoint, loop.engines) if resume else (0, {})
    judged, best = (config, loop.policy.model, loop.encoder), checkpoints.best(run_dir)
    before = about.get("before")
    if before is None:
        with loop.student.gathered():
            before = evaluate(*judged, test, "evaluation before", run_dir / "evaluation_before.jsonl")
    timer, stopped, skipped = PhaseTimer(), None, 0

    def keep(step: int, seen: dict | None = None) -> None:
        about = {"before": before, "validation": seen, "student": student_path}
        with timer.phase("save"):
            checkpoints.save(run_dir, step, loop.engines, about, rl.keep_checkpoints)

    with (
        closing(loop.rewards),
        Stop() as stop,
        RunLog(run_dir, resume_step=done, total_steps=rl.steps, enabled=rank == 0) as log,
        progress(rl.steps, rl.algorithm, completed=done, enabled=rank == 0) as advance,
        Profile(run_dir, timer, enabled=profile and rank == 0) as watched,
    ):
        for step in range(done, rl.steps):
            mine = scheduled(config, rows, step)[rank::world]
            try:
                metrics, responses = loop.step(step, [(i, rows[i]) for i in mine], timer)
            except OutsideError as error:
                keep(step)
                raise UserError(f"{error}; the {step} steps before it are saved: --resume {run_dir} goes on") from error
            metrics, seen = average(metrics), None
            seconds, tokens = timer.pop(), metrics.pop("tokens")
            metrics["tokens_per_second"] = tokens / seconds["step"]
            watched.step(seconds, tokens)
            if rl.evaluate_every and (step + 1) % rl.evaluate_every == 0:
                with timer.phase("validation"), loop.student.gathered():
                    seen = evaluate(*judged, validation, f"validation after step {step + 1}")
                metrics |= {f"validation/{way}": seen[way] for way in ("greedy", "sampled")}
            log.step(step + 1, metrics, seconds)
            if step % rl.samples_every == 0 or step == rl.steps - 1:
                log.samples([_sample(step + 1, responses)])
            updates = [name for name in loop.engines if metrics[f"skipped/{name}"]]
            skipped = skipped + 1 if updates else 0
            if updates:
                log.skipped(step + 1, updates, [rows[i]["id"] for i in scheduled(config, rows, step)])
            leads = seen is not None and (best is None or seen["greedy"] > best[1])
            due = rl.save_every and (step + 1) % rl.save_every == 0
            if leads or due:
                require_free_disk(config.work_dir, config.min_free_disk_gib)
                keep(step + 1, seen)
                best = checkpoints.best(run_dir)
            if seen or due:
                timer.pop()  # no phase of the next step
            advance(1)
            stopped = stop.agreed()
            if stopped or skipped == rl.max_skipped_steps:
                keep(step + 1, seen)
                break
    if stopped:
        if rank == 0:
            print(
                f"{stopped}: stopped after step {step + 1} of {rl.steps}: --resume {run_dir} goes on", file=sys.stderr
            )
        return {"stopped": stopped, "steps": step + 1, "run_dir": str(run_dir)}
    if skipped == rl.max_skipped_steps:
        raise UserError(
            f"{skipped} steps in a row (rl.max_skipped_steps) without an update of {' and '.join(updates)}, whose loss "
            f"or gradient was not finite; their questions are in {run_dir / 'skipped.jsonl'}; lower the learning rate "
            f"or look at these questions; --resume {run_dir} goes on after step {step + 1}"
        )
    with loop.student.gathered():
        after = evaluate(*judged, test, "evaluation after", run_dir / "evaluation_after.jsonl")
    if rank == 0:
        require_free_disk(config.work_dir, config.min_free_disk_gib)
    result = {
        "algorithm": rl.algorithm,
        "seed": config.seed,
        "steps": rl.steps,
        "teachers": [each.name for each in config.teachers] if saved else [],
        "seconds": round(time.time() - began, 1),
        "accuracy": {"before": before["greedy"], "after": after["greedy"]},
        "evaluation": {"before": before, "after": after},
        "run_dir": str(run_dir),
        "student": str(run_dir / "student"),
        "report": str(run_dir / "report.html"),
        "data": str(data_dir),
    }
    if best is not None:
        result["best"] = {"checkpoint": best[0].name, "validation": best[1]}
    with loop.student.gathered():
        if rank == 0:
            loop.policy.model.save_pretrained(run_dir / "student", state_dict=merged(loop.policy.model))
    if rank == 0:
        loop.encoder.processor.save_pretrained(run_dir / "student")
        (run_dir / "result.tmp").write_text(json.dumps(result, indent=1))
        os.replace(run_dir / "result.tmp", run_dir / "result.json")  # what says that the run has ended is whole
        write_report(run_dir, data_dir)
        accuracy_table(before, after)
    return result


def _require_alike(config: Config, model, rows: list[dict]) -> None:
    """With ZeRO ranks wait for one another to reduce gradients, at stage 3 also to gather parameters, so all of them or
    none read pictures with what is trained or divided. The tower, where frozen, is neither."""
    decoder = {id(each) for each in language_model(model).parameters()}
    tower = set() if config.rl.train_vision_tower else {id(each) for each in vision_tower(model).parameters()}
    divided = config.deepspeed.zero_stage == 3
    shared = [
        name
        for name, each in model.base_model.named_parameters()
        if id(each) not in decoder and (each.requires_grad or (divided and id(each) not in tower))
    ]
    pictured = sum(bool(pictures(row)) for row in rows)
    if config.deepspeed.zero_stage and shared and 0 < pictured < len(rows):
        raise UserError(
            f"deepspeed.zero_stage is {config.deepspeed.zero_stage}, and {pictured} of {len(rows)} questions have a "
            f"picture, expected all or none of them where {shared[0].split('.')[0]} is trained or divided: set "
            "deepspeed.zero_stage: 0, or rl.train_vision_tower: false if it is true"
        )


def _claim(run_dir: Path, claims: ExitStack) -> None:
    """Refuse a folder that another process works in."""

    def busy(holder: str) -> None:
        raise UserError(f"run {run_dir}: in use by {holder}; let it end, or stop it by SIGTERM and --resume then")

    stages.on_rank_0(lambda: claims.enter_context(held(run_dir / "lock", busy)))


def _new_run(config: Config, claims: ExitStack) -> Path:
    """A folder of its own for this run, with the resolved settings; the same on all ranks."""
    made = [None]
    if dist.get_rank() == 0:
        config.work_dir.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        made[0] = Path(tempfile.mkdtemp("", f"{stamp}-{config.rl.algorithm}-seed{config.seed}-", config.work_dir))
        made[0].chmod(0o755)
        (made[0] / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    dist.broadcast_object_list(made, src=0)
    _claim(made[0], claims)
    return made[0]


def _sample(step: int, responses: list[dict]) -> dict:
    row = responses[0]["row"]
    names = ("source", "text", "answer_reward", "advantage")
    shown = [
        {**{n: each[n] for n in names}, "similarity_reward": each.get("similarity_reward")}
        for each in responses
        if each["slot"] == 0
    ]
    return {"step": step, "image": None, "kind": None, **row, "responses": shown}


def run(arguments: argparse.Namespace) -> dict:
    if arguments.resume is None:
        return train(load_config(arguments.config, arguments.set), profile=arguments.profile)
    if arguments.set:
        raise UserError(f"--set {arguments.set[0]}: a resumed run keeps its settings; start a new one with --config")
    checkpoints.require_unfinished(arguments.resume)
    return train(load_config(arguments.resume / "config.yaml"), arguments.resume, profile=arguments.profile)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_run_arguments(parser)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    arguments = parser.parse_args()
    return leave(exit_code(lambda: run(arguments)))


if __name__ == "__main__":
    sys.exit(main())
