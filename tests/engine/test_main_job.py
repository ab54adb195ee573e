"""The main job through the real launcher: two ranks, a second run that reuses the stages, and bad input."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ril_engine import tiny_models
from ril_engine.config import LoraConfig, ModelConfig
from ril_engine.export import export
from ril_engine.judge import INSTRUCTIONS
from ril_engine.lora import add_adapters
from ril_engine.models import Encoder, load
from ril_engine.policy import Policy
from tests.engine.jobs import ROOT, SETTINGS, last_json, metrics, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two ranks from nothing: its config file, its stages with their times, its result."""
    folder = tmp_path_factory.mktemp("job")
    config = folder / "config.yaml"
    config.write_text(SETTINGS.format(work_dir=folder / "runs"))
    result = last_json(run("--config", config, ranks=2))
    return config, stage_times(folder), result


def stage_times(folder: Path) -> dict[Path, int]:
    return {path: (path / "done.json").stat().st_mtime_ns for path in (folder / "runs" / "stages").iterdir()}


@pytest.mark.distributed
def test_one_rank_computes_what_two_do_and_reuses_the_stages(finished):
    config, stages, first = finished
    assert len(stages) == 10
    second = last_json(run("--config", config))
    assert stage_times(config.parent) == stages
    assert second["run_dir"] != first["run_dir"]
    assert len(metrics(first)) == len(metrics(second)) == 2
    for one, two in zip(metrics(first), metrics(second), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    assert second["evaluation"] == first["evaluation"]


@pytest.mark.distributed
def test_a_resumed_run_ends_as_the_whole_one(finished, tmp_path):
    first = finished[2]
    stopped = tmp_path / "stopped"
    shutil.copytree(first["run_dir"], stopped)
    (stopped / "result.json").unlink()  # as if it had died in step 2
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    shutil.rmtree(stopped / "checkpoints" / "step-000002")
    (stopped / "metrics.jsonl").write_text((stopped / "metrics.jsonl").read_text()[:-40])
    resumed = last_json(run("--resume", stopped, ranks=2))
    assert metrics(resumed) == metrics(first)
    assert resumed["evaluation"] == first["evaluation"] and resumed["run_dir"] == str(stopped)
    answers = [(Path(result["run_dir"]) / "evaluation_after.jsonl").read_text() for result in (first, resumed)]
    assert answers[0] == answers[1] and answers[0].count("greedy_text") == 9


@pytest.mark.distributed
def test_zero_3_trains_resumes_and_ends_with_a_whole_student(finished, tmp_path):
    """All stages anew: SFT and D are sharded, too. Nothing is small enough to stay whole on each rank."""
    from transformers import AutoModelForImageTextToText

    sharded = "deepspeed.extra={zero_optimization: {stage3_param_persistence_threshold: 0}}"
    settings = ["deepspeed.zero_stage=3", sharded, f"work_dir={tmp_path}"]
    result = last_json(run("--config", finished[0], *(part for each in settings for part in ("--set", each)), ranks=2))
    for one, two in zip(metrics(result), metrics(finished[2]), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    student = AutoModelForImageTextToText.from_pretrained(result["student"]).state_dict()
    expected = AutoModelForImageTextToText.from_pretrained(finished[2]["student"]).state_dict()
    (start,) = (
        AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in tmp_path.glob("stages/sft-*")
    )
    assert student.keys() == expected.keys()
    assert any((student[name] - start[name]).abs().max() > 1e-4 for name in student)
    for name in student:
        # 2 % of learning rate times steps, of SFT and of the loop
        torch.testing.assert_close(student[name], expected[name], atol=0.02 * (2 * 2e-3 + 4 * 1e-4), rtol=0)
    run_dir = Path(result["run_dir"])
    (run_dir / "result.json").unlink()  # as if it had died in step 2
    shutil.rmtree(run_dir / "checkpoints" / "step-000002")
    shutil.rmtree(run_dir / "student")
    (run_dir / "metrics.jsonl").rename(tmp_path / "metrics.jsonl")
    (run_dir / "metrics.jsonl").write_text((tmp_path / "metrics.jsonl").read_text()[:-40])
    resumed = last_json(run("--resume", run_dir, ranks=2))
    assert metrics(resumed) == metrics({"run_dir": tmp_path}) and resumed["evaluation"] == result["evaluation"]
    again = AutoModelForImageTextToText.from_pretrained(resumed["student"]).state_dict()
    assert all(again[name].equal(student[name]) for name in student)


@pytest.mark.parametrize(("stage", "lora"), [(2, "null"), (3, "{}")])
def test_ranks_that_would_wait_for_one_another_are_refused(ril, tmp_path, stage, lora):
    """A projector, which is no part of the vision tower, is trained where there is a picture only; with adapters it is
    not trained, but at stage 3 gathered there."""
    tiny_models.build(tmp_path / "student", "tiny:internvl_teacher", ["What is it?"], 0)
    for split in ("train", "test"):
        rows = [QUESTION, {**QUESTION, "id": "b", "image": "a.png"}]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"rl: {{algorithm: grpo, questions_per_step: 2, lora: {lora}}}\ndata: {{dir: {tmp_path}}}\n"
        f"work_dir: {tmp_path}\nstudent: {{path: {tmp_path}/student}}\nsft: {{steps: 0}}\n"
        f"deepspeed: {{zero_stage: {stage}}}\n"
    )
    code, _, err = ril("train", "--config", config)
    expected = (
        f"error: deepspeed.zero_stage is {stage}, and 1 of 2 questions have a picture, .*multi_modal_projector is"
    )
    assert code == 2 and re.search(expected, err), err[-2000:]


JUDGE = """
import os, pathlib

def last_digit(questions, references, responses, **columns):
    seen = pathlib.Path(__file__).with_name("calls of rank " + os.environ["RANK"])
    calls = int(seen.read_text()) + 1 if seen.exists() else 1
    seen.write_text(str(calls))
    if calls == FAILS and os.environ["RANK"] == "1":
        raise ConnectionError("the judge is gone")
    return [float(each[-1:].isdigit()) if each else None for each in responses]
"""


@pytest.mark.distributed
def test_a_judge_that_fails_loses_no_step(finished, tmp_path, monkeypatch):
    """On one of two ranks. Dr.GRPO has no teachers, so that its third call is step 3."""
    config = tmp_path / "config.yaml"
    settings = SETTINGS.format(work_dir=finished[0].parent / "runs").replace("rl: {steps: 2", "rl: {steps: 4")
    settings = settings.replace("sampling: {", "sampling: {stop: [a, e, i, ' ', '1'], ")  # else all would be truncated
    config.write_text(settings.replace("save_every: 1", "save_every: 0, algorithm: dr_grpo"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rewards = "answer_rewards=[{kind: verifier}, {kind: function, function: 'my_judge:last_digit', weight: 0.5}]"
    (tmp_path / "my_judge.py").write_text(JUDGE.replace("FAILS", "0"))
    whole = last_json(run("--config", config, "--set", rewards, ranks=2))
    for calls in tmp_path.glob("calls*"):
        assert calls.read_text() == "4"
        calls.unlink()
    (tmp_path / "my_judge.py").write_text(JUDGE.replace("FAILS", "3"))
    failed = run("--config", config, "--set", rewards, ranks=2)
    assert failed.returncode != 0
    (message,) = (line for line in failed.stderr.splitlines() if line.startswith("error: "))
    found = re.match(
        r"error: step 3: .*my_judge:last_digit.*the judge is gone.*; the 2 steps .*: --resume (\S+) goes", message
    )
    assert found, message
    resumed = last_json(run("--resume", found[1], ranks=2))
    assert metrics(resumed) == metrics(whole) and len(metrics(whole)) == 4
    assert {"reward/student/verifier", "reward/student/last_digit", "reward/unscored"} <= set(metrics(whole)[0])


@pytest.mark.distributed
def test_a_lora_student_resumes_and_is_exported_merged(finished, ril, tmp_path):
    """Its checkpoints hold adapters alone: with the student after SFT they are what the run has exported."""
    config, stages, _ = finished
    first = last_json(run("--config", config, "--set", "rl.lora={rank: 4}", ranks=2))
    assert 0 < metrics(first)[0]["kl"] < metrics(first)[1]["kl"]  # after the first of a step's two updates
    stopped = tmp_path / "stopped"
    shutil.copytree(first["run_dir"], stopped)
    (stopped / "result.json").unlink()
    state = stopped / "checkpoints" / "step-000002" / "student" / "state" / "mp_rank_00_model_states.pt"
    adapters = torch.load(state, weights_only=False)["module"]
    shutil.rmtree(stopped / "checkpoints" / "step-000002")
    resumed = last_json(run("--resume", stopped, ranks=2))
    assert metrics(resumed) == metrics(first) and resumed["evaluation"] == first["evaluation"]
    start = next(path for path in stages if path.name.startswith("sft-"))
    adapted, processor = load(ModelConfig(path=str(start)))
    add_adapters(adapted, LoraConfig(rank=4), seed=0)
    policy = Policy(adapted).eval()
    missing, unexpected = policy.load_state_dict(adapters, strict=False)
    assert not unexpected and not any("lora" in name for name in missing)
    exported, _ = load(ModelConfig(path=resumed["student"]))
    code, (line,), err = ril("export", resumed["run_dir"], "--out", tmp_path / "out")
    assert code == 0, err
    by_command = load(ModelConfig(path=json.loads(line)["student"]))[0].state_dict()
    assert all(torch.equal(value, by_command[name]) for name, value in exported.state_dict().items())
    encoder = Encoder(adapted, processor, tmp_path, 10_000)
    batch = encoder.batch([{"id": "a", "question": "What is it?"}], [encoder.response("I see 7 and 8.")])
    with torch.no_grad():
        torch.testing.assert_close(Policy(exported).eval()(batch), policy(batch), rtol=1e-5, atol=1e-5)
    assert_exports_its_student(resumed, tmp_path)


def assert_exports_its_student(result: dict, folder: Path) -> None:
    """`ril export` of the last step's checkpoint gives what the run itself has left."""
    export(Path(result["run_dir"]), None, folder / "exported")
    one, two = (load_file(Path(path) / "model.safetensors") for path in (folder / "exported", result["student"]))
    assert one.keys() == two.keys() and all(value.equal(two[name]) for name, value in one.items())


@pytest.mark.distributed
def test_what_a_run_leaves(finished, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _, stages, first = finished
    rows = (Path(first["run_dir"]) / "samples.jsonl").read_text().splitlines()
    sources = [each["source"] for each in json.loads(rows[0])["responses"]]
    assert sorted(sources) == ["internvl"] * 2 + ["qwen"] * 2 + ["student"] * 4
    advantages = [each["advantage"] for each in json.loads(rows[0])["responses"]]
    assert abs(sum(advantages)) < 1e-5
    assert Path(first["report"]).read_text().count("data:image/png;base64,") >= 2
    assert_exports_its_student(first, tmp_path)
    AutoProcessor.from_pretrained(first["student"])
    trained = AutoModelForImageTextToText.from_pretrained(first["student"]).state_dict()
    start = next(path for path in stages if path.name.startswith("sft-"))
    before = AutoModelForImageTextToText.from_pretrained(start).state_dict()
    moved = {name for name in trained if not trained[name].equal(before[name])}
    assert moved and not any("visual" in name for name in moved)  # the vision tower is frozen by default


def test_every_subcommand_ends_with_its_results(finished, ril):
    config, stages, first = finished
    keys = {"data": "questions", "sft": "student", "responses": "answer_reward", "discriminator": "held_out_accuracy"}
    for command, key in keys.items():
        code, (line,), _ = ril(command, "--config", config)
        assert code == 0 and key in json.loads(line)
    code, (line,), _ = ril("evaluate", "--config", config, "--student", first["student"])
    assert json.loads(line).items() >= first["evaluation"]["after"].items()
    _, (line,), _ = ril("evaluate", "--config", config, "--set", "evaluation.split=validation")
    assert json.loads(line)["questions"] == 9
    code, (line,), _ = ril("compare", "--runs", first["run_dir"], "--against", first["run_dir"])
    assert json.loads(line)["greedy"]["runs"] == [first["accuracy"]["after"]]
    report = Path(first["report"])
    report.unlink()
    code, _, err = ril("report", config.parent)
    assert code == 2 and "no result.json there; expected the folder of a run that has ended" in err
    code, (line,), _ = ril("report", first["run_dir"])
    assert code == 0 and json.loads(line) == {"report": str(report)} and report.exists()
    assert stage_times(config.parent) == stages


def mean_of(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


@pytest.mark.parametrize(
    ("settings", "holds"),
    [
        (["discriminator.use=none"], lambda rows: not any("imilarity" in name for name in rows[0])),
        (["discriminator.use=fixed"], lambda rows: mean_of(rows, "discriminator/updates") == 0),
        (
            ["answer_rewards=[]"],
            lambda rows: mean_of(rows, "reward/student_answer") == 0 == rows[0]["reward/answer/qwen"],
        ),
        (["answer_rewards=[{kind: judge, path: JUDGE}]"], lambda rows: mean_of(rows, "reward/unscored") == 0),
        (
            ["answer_rewards=[{kind: verifier}, {kind: judge, path: JUDGE, weight: 0.5}]"],
            lambda rows: {"reward/student/verifier", "reward/student/judge"} <= set(rows[0]),
        ),
        (["rl.beta=0"], lambda rows: "kl" not in rows[0]),
        (["rl.updates_per_step=4"], lambda rows: mean_of(rows, "discriminator/updates") == 4),
        (["discriminator.similarity_levels=5"], lambda rows: True),
        (["discriminator.similarity_levels=0"], lambda rows: 0 < rows[0]["reward/student_similarity"] < 1),
        (["discriminator.objective=bradley_terry"], lambda rows: 0 < rows[0]["discriminator/student_score"] < 1),
        (
            ["teachers=[{name: qwen, path: 'tiny:qwen_teacher'}]", "rl.group_size=2"],
            lambda rows: "reward/answer/internvl" not in rows[0] and "reward/answer/qwen" in rows[0],
        ),
    ],
    ids=lambda each: each[0].split(".")[-1][:40] if isinstance(each, list) else "",
)
def test_every_ablation_runs_to_its_end(finished, ril, tmp_path, settings, holds):
    """From the stages that are there; whatever a switch needs besides is built beside them."""
    shutil.copytree(finished[0].parent / "runs" / "stages", tmp_path / "stages")
    tiny_models.build(tmp_path / "judge", "tiny:judge", [INSTRUCTIONS["yes_no"], "yes no"], 0)
    settings = [each.replace("JUDGE", str(tmp_path / "judge")) for each in settings]
    asks = any("kind: judge" in each for each in settings)
    # Models that have hardly learnt end no response by themselves, and a truncated one is shown to no judge.
    settings = [f"work_dir={tmp_path}", "sampling.stop=[a, e, i, ' ', '1']", *settings]
    code, (line,), err = ril("train", "--config", finished[0], *(part for each in settings for part in ("--set", each)))
    assert code == 0, err[-3000:]
    rows = metrics(json.loads(line))
    assert len(rows) == 2 and all(math.isfinite(value) for row in rows for value in row.values())
    assert holds(rows), rows
    assert rows[0]["truncated"] < 1
    assert bool([path for path in (tmp_path / "judged").rglob("judge*.jsonl") if path.stat().st_size]) == asks


def test_a_stage_needs_free_disk(ril, tmp_path):
    settings = ("--set", f"work_dir={tmp_path}", "--set", "min_free_disk_gib=1e9")
    code, _, err = ril("data", "--config", ROOT / "configs/digits.yaml", *settings)
    assert code == 2 and err.count("\n") == 1
    assert re.match(
        r"error: work_dir .*: no free disk, .* GiB left, expected min_free_disk_gib 1e\+09 or more; free", err
    )


def test_a_disk_that_fills_up_is_one_line(finished, ril):
    report = Path(finished[2]["report"])
    kept = report.rename(report.with_suffix(".kept"))
    report.symlink_to("/dev/full")
    code, _, err = ril("report", finished[2]["run_dir"])
    report.unlink()
    kept.rename(report)
    assert code == 2 and re.search(r"^error: no free disk.*No space left on device.*; free some space", err, re.M)


@pytest.mark.distributed
def test_ranks_that_do_not_divide_the_questions_make_nothing(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(SETTINGS.format(work_dir=tmp_path / "runs"))
    done = run("--config", config, "--set", "rl.questions_per_step=3", ranks=2)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: rl.questions_per_step is 3, not a multiple of the 2 ranks: set it to 4, or start")
    assert done.returncode != 0 and not list((tmp_path / "runs").iterdir())


QUESTION = {"id": "a", "question": "What is it?", "answer": "7"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "error: data .*train.jsonl: no rows; expected one JSON object per line"),
        (
            [{"id": "a", "question": "What is it?"}],
            "error: data .*train.jsonl, line 1: no 'answer' for question 'a'; give each",
        ),
        ([QUESTION, {**QUESTION, "id": "b", "answer": " "}], "error: data .*train.jsonl, line 2: no 'answer' for"),
        ([QUESTION, QUESTION], "error: data .*train.jsonl, lines 1 and 2: both have the id 'a'; give each"),
        ("{", "error: data .*train.jsonl, line 1: not JSON"),
        ([{**QUESTION, "image": "a.png"}], "error: image .*a.png: not a readable picture; expected PNG, JPEG or WebP"),
        ([{**QUESTION, "image": "no.png"}], "error: image .*no.png: no such file; its question names it"),
        ([{**QUESTION, "image": "../a.png"}], "error: image '../a.png': outside the dataset folder"),
    ],
)
def test_bad_data_is_one_line_and_a_failure(finished, ril, tmp_path, rows, message):
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(text)
    (tmp_path / "a.png").write_text("no picture")
    start = next(path for path in finished[1] if path.name.startswith("sft-"))
    settings = (f"data.dir={tmp_path}", f"work_dir={tmp_path}", f"student.path={start}", "sft.steps=0")
    code, _, err = ril(
        "train",
        "--config",
        finished[0],
        *(part for each in (*settings, "rl.algorithm=grpo") for part in ("--set", each)),
    )
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.match(message, errors[0]), err[-2000:]
    assert "Traceback" not in err


def test_a_run_goes_on_without_what_is_bad(finished, ril, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(finished[2]["data"], data)
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    texts = [
        json.dumps({"id": row["id"], "text": form.format(row["answer"])}) + "\n"
        for row in rows[:-1]
        for form in ("{}", "{}.", "is {}", "is {}.")
    ]
    (tmp_path / "teacher.jsonl").write_text("".join(texts) + "{\n")
    (data / "train.jsonl").write_text("".join(json.dumps({**row, "answer": None}) + "\n" for row in rows[:1]))
    with (data / "train.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[1:])
    start = next(path for path in finished[1] if path.name.startswith("sft-"))
    settings = [f"data.dir={data}", f"work_dir={tmp_path}", f"student.path={start}", "sft.steps=0"]
    settings += [f"teachers=[{{name: elsewhere, responses: {tmp_path / 'teacher.jsonl'}}}]", "rl.algorithm=sft"]
    settings += ["rl.steps=1", "evaluation.questions=2", "sampling.max_new_tokens=16"]

    def train(*more: str) -> tuple[int, list[str], list[str]]:
        sets = [part for each in (*settings, *more) for part in ("--set", each)]
        code, out, err = ril("train", "--config", finished[0], *sets)
        assert "Traceback" not in err
        return code, out, [line for line in err.splitlines() if line.startswith(("error", "warning"))]

    code, _, (line,) = train()
    assert code == 2 and re.match(r"error: data .*train.jsonl, line 1: no 'answer' for question", line)
    code, _, (line,) = train("answer_rewards=[]")
    assert code == 2 and re.match(
        r"error: teacher elsewhere, file .*teacher.jsonl: lines that are no object: 1 .*"
        r"questions with fewer than 4 responses: 1 \(first: .* with 0\); mend the file",
        line,
    )
    code, (line,), warnings = train("on_bad_data=skip")
    assert code == 0 and [line.split(" ")[1] for line in warnings] == ["data", "teacher"]
    samples = (Path(json.loads(line)["run_dir"]) / "samples.jsonl").read_text().splitlines()
    assert {each["source"] for each in json.loads(samples[0])["responses"]} == {"elsewhere"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "error: config .*: No such file or directory"),
        ("rl: {stps: 1}", "error: config .*: unknown key rl.stps: did you mean 'steps'"),
        ("rl: {algorithm: dr_grpo}\ndata: {dir: /none}", "error: data /none/train.jsonl: No such file or directory"),
        ("rl: {steps: 1", "error: config .*: malformed YAML at line 1"),
        (
            "rl: {algorithm: dr_grpo}\nsft: {steps: 0}\nstudent: {path: GPT}\ndata: {dir: DATA}",
            "error: model .*: not loadable as an image-text-to-text checkpoint",
        ),
        (
            "rl: {algorithm: dr_grpo}\nsft: {steps: 0}\nstudent: {path: HYBRID}\ndata: {dir: DATA}",
            "error: rl.packing: qwen3_5_text has linear_attention layers, expected .*; set rl.packing: padded",
        ),
    ],
)
def test_bad_input_is_one_line_and_a_failure(tmp_path, text, message):
    config = tmp_path / "config.yaml"
    if text is not None:
        for name in ("train", "test"):
            (tmp_path / f"{name}.jsonl").write_text(json.dumps(QUESTION))
        (tmp_path / "gpt").mkdir()
        (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
        (tmp_path / "hybrid").mkdir()
        (tmp_path / "hybrid" / "config.json").write_text('{"model_type": "qwen3_5"}')
        folders = {"GPT": "gpt", "HYBRID": "hybrid", "DATA": ""}
        for name, path in ((name, tmp_path / folder) for name, folder in folders.items()):
            text = text.replace(name, str(path))
        config.write_text(text)
    done = subprocess.run(
        [sys.executable, "ril_engine/train.py", "--config", config],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.match(message, lines[0]), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
