"""A long run keeps its memory, its open files and its threads. `pytest -m soak` takes 500 steps, CI fewer."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.engine.jobs import ROOT, launched

SETTINGS = """
work_dir: {folder}
teachers: [{{name: qwen, path: "tiny:qwen_teacher"}}]
data: {{digits: {{train_questions: 18, validation_questions: 2, test_questions: 2, sft_questions: 60}}}}
sft: {{steps: 1, batch_size: 2}}
teacher_sft: {{steps: 1, batch_size: 2}}
sampling: {{max_new_tokens: 3}}
responses: {{per_question: 2}}
discriminator: {{pretrain: {{steps: 1, batch_size: 2}}}}
rl: {{steps: {steps}, questions_per_step: 1, group_size: 2, samples_every: 10, save_every: {save_every}}}
"""
WARM_UP = 20  # steps


@pytest.mark.parametrize("steps", [80, pytest.param(500, marks=pytest.mark.soak)])
def test_memory_files_and_threads_stay(tmp_path, steps):
    window = min(100, (steps - WARM_UP) // 3)
    (tmp_path / "config.yaml").write_text(SETTINGS.format(folder=tmp_path, steps=steps, save_every=steps // 4))
    job = [Path(__file__).parent / "soak_job.py", tmp_path / "config.yaml", tmp_path / "seen.json"]
    words = [*launched(1), "--no_local_rank", *job]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert len(seen) == steps
    (first, files, threads), (last, files_then, threads_then) = (
        [sum(values) / window for values in zip(*some, strict=True)]
        for some in (seen[WARM_UP : WARM_UP + window], seen[-window:])
    )
    print(f"\n{steps} steps: {first / 2**20:.1f} -> {last / 2**20:.1f} MiB, files {files} -> {files_then}")
    assert last <= 1.02 * first
    assert files_then < files + 0.5 and threads_then < threads + 0.5  # a file may just be open where a step is counted
