"""`ril`: one subcommand per stage of RIL. The last line on stdout is one JSON object with results and paths.

Each builds what it needs and is missing, and reuses what is there. Several ranks:
`deepspeed --module ril_engine.cli sft --config configs/digits.yaml`.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from ril_engine.errors import UserError, exit_code, leave, require_free_disk


def _data(config, _) -> dict:
    from ril_engine import stages

    folder, _ = stages.data(config)
    return {"data": str(folder), "questions": len(stages.read_jsonl(folder / "train.jsonl", ("id",)))}


def _sft(config, _) -> dict:
    from ril_engine import stages

    return {"student": stages.sft(config, *stages.data(config))[0]}


def _responses(config, _) -> dict:
    from ril_engine import stages
    from ril_engine.saved_responses import all_responses
    from ril_engine.teacher_scores import scored_responses
    from ril_engine.tiny_judge import with_judges

    data_dir, data_key = stages.data(config)
    student_path, student_key = stages.sft(config, data_dir, data_key)
    files = all_responses(config, student_path, student_key, data_dir, data_key)
    rewards = {}
    for name, by_id in scored_responses(with_judges(config), files, data_dir).items():
        some = [each["answer_reward"] for responses in by_id.values() for each in responses]
        rewards[name] = sum(some) / len(some)
    paths = {source: str(path) for source, path in files.items()}
    return {"data": str(data_dir), "responses": paths, "answer_reward": rewards}


def _discriminator(config, _) -> dict:
    import json

    from ril_engine import stages
    from ril_engine.saved_responses import all_responses

    data_dir, data_key = stages.data(config)
    student_path, student_key = stages.sft(config, data_dir, data_key)
    files = all_responses(config, student_path, student_key, data_dir, data_key)
    folder = stages.discriminator(config, student_path, files, student_key)
    return {"discriminator": str(folder), **json.loads((folder / "metrics.json").read_text())}


def _evaluate(config, arguments) -> dict:
    from ril_engine import stages
    from ril_engine.engine import device
    from ril_engine.evaluation import evaluate
    from ril_engine.models import Encoder, load
    from ril_engine.questions import evaluation_questions

    if arguments.data:
        return _evaluate_file(config, arguments)
    data_dir, data_key = stages.data(config)
    path = arguments.student or stages.sft(config, data_dir, data_key)[0]
    model, processor = load(config.student.model_copy(update={"path": path}))
    model.to(device())
    encoder = Encoder(model, processor, data_dir, config.data.max_image_pixels)
    questions = evaluation_questions(config, data_dir)
    result = evaluate(config, model, encoder, questions, f"evaluation of {path}")
    return {"student": path, "split": config.evaluation.split, **result}


def _evaluate_file(config, arguments) -> dict:
    """On any file of questions, by the config's answer rewards."""
    import time
    from contextlib import closing

    from ril_engine import stages
    from ril_engine.engine import device
    from ril_engine.evaluation import evaluate
    from ril_engine.models import Encoder, load
    from ril_engine.questions import read_questions
    from ril_engine.rewards import AnswerRewards
    from ril_engine.tiny_judge import with_judges

    path, file = arguments.student, arguments.data
    if not path:
        raise UserError("--data without --student: name the checkpoint to evaluate, such as RUN_DIR/student")
    if not config.answer_rewards:
        raise UserError("answer_rewards is empty: --data measures by them; name one, such as [{kind: verifier}]")
    if not file.exists():
        raise UserError(f"--data {file}: no such file; give a .jsonl or .parquet file of questions")
    if file.suffix == ".parquet":
        folder, _ = stages.unpacked(config, {"test": [file]})
        file = folder / "test.jsonl"
    questions = read_questions(file, config.on_bad_data, referenced=True, named=False)
    questions = questions[: config.evaluation.questions or None]
    model, processor = load(config.student.model_copy(update={"path": path}))
    model.to(device())
    encoder = Encoder(model, processor, file.parent, config.data.max_image_pixels)
    rewards = AnswerRewards(with_judges(config))

    def score(*some: list) -> list[float]:
        return [each.reward for each in rewards.score(*some)]

    answers = config.work_dir / "evaluations" / f"{arguments.data.stem}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    answers.parent.mkdir(parents=True, exist_ok=True)
    with closing(rewards):
        result = evaluate(config, model, encoder, questions, f"evaluation of {path}", answers, score)
    return {"student": path, "data": str(arguments.data), "answers": str(answers), **result}


def _data_check(arguments) -> dict:
    import json

    from ril_engine.config_file import load_config
    from ril_engine.user_data import check

    if arguments.set and not arguments.config:
        raise UserError(f"--set {arguments.set[0]}: no effect without --config; name the file that it changes")
    config = load_config(arguments.config, arguments.set) if arguments.config else None
    result = check(arguments.data, config)
    if result["bad"]:
        print(json.dumps(result))
        raise UserError(
            f"data {arguments.data}: {result['bad']} faults in {result['rows']} rows, told above; mend them"
        )
    return result


def _report(arguments) -> dict:
    import json

    from ril_engine.report import write_report

    result = arguments.run_dir / "result.json"
    if not result.exists():
        raise UserError(f"run {arguments.run_dir}: no result.json there; expected the folder of a run that has ended")
    return {"report": str(write_report(arguments.run_dir, Path(json.loads(result.read_text())["data"])))}


def _compare(arguments) -> dict:
    from ril_engine.evaluation import compare

    return compare(arguments.runs, arguments.against)


def _export(arguments) -> dict:
    from ril_engine.export import export

    return export(arguments.run_dir, arguments.checkpoint, arguments.out)


def _plan(arguments) -> dict:
    from ril_engine.config_file import load_config
    from ril_engine.gpus import gpu_named
    from ril_engine.plan import plan
    from ril_engine.plan_layouts import layouts
    from ril_engine.plan_table import show

    config = load_config(arguments.config, arguments.set)
    for name, value in (("--gpus", arguments.gpus), ("--gpu-memory", arguments.gpu_memory)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} {value:g}: expected a number above 0; give what one node or the whole job has")
    if arguments.layouts and arguments.gpus < 3:
        raise UserError(
            f"--layouts with --gpus {arguments.gpus}: expected 3 or more, one of which judges and one samples"
        )
    result = plan(config, gpus=arguments.gpus, gpu_memory_gib=arguments.gpu_memory, gpu=arguments.gpu)
    if arguments.layouts:
        result["layouts"] = layouts(config, arguments.gpus, gpu_named(arguments.gpu))
    show(result)
    return result


STAGES = {
    "data": (_data, "build the digits task, or check a folder of data"),
    "sft": (_sft, "supervised training of the student"),
    "responses": (_responses, "saved responses of student and teachers, the teachers' judged"),
    "discriminator": (_discriminator, "pre-training of the discriminator on saved responses"),
    "evaluate": (_evaluate, "accuracy of a student on held-out questions, greedy and sampled"),
}


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What `ril train` and train.py take."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", help="a YAML file, such as configs/digits.yaml")
    source.add_argument("--resume", metavar="RUN_DIR", type=Path, help="go on with a run from its last checkpoint")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    text = "a trace and a table of where the time and memory of rank 0's steps go, in RUN_DIR/profile"
    parser.add_argument("--profile", action="store_true", help=text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ril", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in STAGES.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", required=True, help="a YAML file, such as configs/digits.yaml")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
        if name == "evaluate":
            command.add_argument("--student", metavar="PATH", help="a checkpoint; default: the student after SFT")
            text = "a .jsonl or .parquet file of questions instead of the config's; measured by answer_rewards"
            command.add_argument("--data", metavar="FILE", type=Path, help=text)
    train = commands.add_parser("train", help="everything above, then the RIL loop (train.py)")
    add_run_arguments(train)
    plan = commands.add_parser("plan", help="whether a config fits its GPUs, and the least time of a step")
    plan.add_argument("--config", required=True, help="a YAML file, such as configs/digits.yaml")
    plan.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    plan.add_argument("--gpus", type=int, required=True, help="ranks of the job, one GPU each")
    plan.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="of each GPU")
    plan.add_argument("--gpu", default="h100", metavar="NAME", help="a100, h100, h200 or b200; default: h100")
    plan.add_argument("--layouts", action="store_true", help="compare ways to share the GPUs out among roles")
    text = "tell of every bad row of a data set, and count what there is; exit code 2 if any is bad"
    check = commands.add_parser("data-check", help=text, description=text)
    check.add_argument("data", type=Path, help="a folder of data, or a .jsonl or .parquet file of questions")
    check.add_argument("--config", help="a YAML file: what it needs is looked for, and its student counts tokens")
    check.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    report = commands.add_parser("report", help="draw report.html of a run again")
    report.add_argument("run_dir", type=Path)
    text = "a checkpoint's student in Hugging Face's format; its files are read with pickle: of runs that you trust"
    export = commands.add_parser("export", help=text, description=text)
    export.add_argument("run_dir", type=Path)
    export.add_argument("--checkpoint", metavar="NAME", help="step-N, or best on validation questions; default: newest")
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    compare = commands.add_parser("compare", help="held-out accuracy of runs against others, with an interval")
    compare.add_argument("--runs", nargs="+", required=True, type=Path, metavar="RUN_DIR")
    compare.add_argument("--against", nargs="+", required=True, type=Path, metavar="RUN_DIR")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher passes it
    return parser


def _run(arguments: argparse.Namespace) -> dict:
    alone = {"plan": _plan, "report": _report, "compare": _compare, "export": _export, "data-check": _data_check}
    if arguments.command in alone:
        return alone[arguments.command](arguments)
    if arguments.command == "train":
        from ril_engine.train import run

        return run(arguments)
    from ril_engine.config_file import load_config
    from ril_engine.engine import init_distributed

    config = load_config(arguments.config, arguments.set)
    require_free_disk(config.work_dir, config.min_free_disk_gib)
    init_distributed()
    return STAGES[arguments.command][0](config, arguments)


def main() -> int:
    arguments = _parser().parse_args()
    return leave(exit_code(lambda: _run(arguments)))


if __name__ == "__main__":
    sys.exit(main())
