"""The main job through the real launcher: two ranks, a second run that reuses the stages, and bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
SETTINGS = """
work_dir: {work_dir}
teachers:
  - {{name: qwen, path: "tiny:qwen_teacher"}}
  - {{name: internvl, path: "tiny:internvl_teacher"}}
data: {{digits: {{train_questions: 18, validation_questions: 9, test_questions: 9, sft_questions: 60}}}}
sft: {{steps: 2, batch_size: 8, learning_rate: 2.0e-3}}
teacher_sft: {{steps: 2, batch_size: 8, learning_rate: 2.0e-3}}
sampling: {{max_new_tokens: 8, batch_size: 64}}
responses: {{per_question: 2}}
discriminator: {{pretrain: {{steps: 2, batch_size: 8, learning_rate: 3.0e-4}}, learning_rate: 1.0e-4}}
rl: {{steps: 2, questions_per_step: 4, learning_rate: 1.0e-4, updates_per_step: 2, samples_every: 1}}
"""


def run(config: Path, *more: str, ranks: int = 1) -> subprocess.CompletedProcess:
    launcher = [DEEPSPEED, "--num_accelerators", str(ranks), "--master_port", "29711", "ril_engine/train.py"]
    return subprocess.run([*launcher, "--config", config, *more], cwd=ROOT, capture_output=True, text=True, timeout=600)


def last_json(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])


def metrics(result: dict) -> list[dict]:
    lines = (Path(result["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line)["metrics"] for line in lines]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


@pytest.mark.distributed
def test_two_ranks_train_and_a_second_run_reuses_the_stages(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    config = tmp_path / "config.yaml"
    config.write_text(SETTINGS.format(work_dir=tmp_path / "runs"))
    first = last_json(run(config, ranks=2))
    stages = {path: (path / "done.json").stat().st_mtime_ns for path in (tmp_path / "runs" / "stages").iterdir()}
    assert len(stages) == 8
    second = last_json(run(config, ranks=2))
    assert {path: (path / "done.json").stat().st_mtime_ns for path in stages} == stages
    assert second["run_dir"] != first["run_dir"]
    assert metrics(second) == metrics(first) and len(metrics(first)) == 2
    assert second["evaluation"] == first["evaluation"]

    rows = (Path(first["run_dir"]) / "samples.jsonl").read_text().splitlines()
    sources = [each["source"] for each in json.loads(rows[0])["responses"]]
    assert sorted(sources) == ["internvl"] * 2 + ["qwen"] * 2 + ["student"] * 4
    advantages = [each["advantage"] for each in json.loads(rows[0])["responses"]]
    assert abs(sum(advantages)) < 1e-5
    assert Path(first["report"]).read_text().count("data:image/png;base64,") >= 2
    AutoProcessor.from_pretrained(first["student"])
    trained = AutoModelForImageTextToText.from_pretrained(first["student"]).state_dict()
    start = next(path for path in stages if path.name.startswith("sft-"))
    before = AutoModelForImageTextToText.from_pretrained(start).state_dict()
    moved = {name for name in trained if not trained[name].equal(before[name])}
    assert moved and not any("visual" in name for name in moved)  # the vision tower is frozen by default


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "error: config .*: No such file or directory"),
        ("rl: {stps: 1}", "error: config .*: unknown key rl.stps: did you mean 'steps'"),
        ("rl: {algorithm: dr_grpo}\ndata: {dir: /none}", "error: data /none/train.jsonl: No such file or directory"),
        (
            "rl: {algorithm: dr_grpo}\nstudent: {path: 'tiny:nobody'}\nwork_dir: WORK\n"
            "data: {digits: {train_questions: 1, validation_questions: 1, test_questions: 1, sft_questions: 1}}",
            "error: model 'tiny:nobody': no such tiny model",
        ),
    ],
)
def test_bad_input_is_one_line_and_a_failure(tmp_path, text, message):
    import re

    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_text(text.replace("WORK", str(tmp_path / "runs")))
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
