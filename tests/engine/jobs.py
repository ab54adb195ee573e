"""Small main jobs through the real launcher."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

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
rl: {{steps: 2, questions_per_step: 4, learning_rate: 1.0e-4, updates_per_step: 2, samples_every: 1, save_every: 1}}
"""


def launched(ranks: int) -> list[str]:
    """DeepSpeed's launcher, at a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [str(DEEPSPEED), "--num_accelerators", str(ranks), "--master_port", str(port)]


def command(*arguments: str | Path, ranks: int = 1) -> list[str]:
    return [*launched(ranks), "ril_engine/train.py", *map(str, arguments)]


def run(*arguments: str | Path, ranks: int = 1, gpu: bool = False) -> subprocess.CompletedProcess:
    words = command(*arguments, ranks=ranks)
    environment = {name: value for name, value in os.environ.items() if not (gpu and name == "DS_ACCELERATOR")}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    port = words[words.index("--master_port") + 1]
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))  # 66 MiB of memory a rank
    return done


def last_json(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])


def metrics(result: dict) -> list[dict]:
    lines = (Path(result["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line)["metrics"] for line in lines]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
