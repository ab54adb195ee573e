"""What several files share: a small job of one rank, the `ril` command, and an HTTP server on loopback, which tests
make behave like any OpenAI-compatible one, or misbehave."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ril_engine import cli, digits, tiny_models
from ril_engine import server as backend
from ril_engine.config import Config, ModelConfig
from ril_engine.errors import exit_code


class Loopback(ThreadingHTTPServer):
    """`behave(handler, seed, attempt)` answers; a body's seed, or handler.body, tells which request it is."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.lock = behave, threading.Lock()
        self.attempts: Counter = Counter()
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.times: dict[int, list[float]] = {}
        self.under_way = self.most_under_way = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_):
        pass  # a client that was killed or lost patience


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.body = body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        seen, seed = self.server, body["seed"]
        with seen.lock:
            seen.attempts[seed] += 1
            seen.bodies.append(body)
            seen.headers.append({**self.headers, "path": self.path})
            seen.times.setdefault(seed, []).append(time.monotonic())
            seen.under_way += 1
            seen.most_under_way = max(seen.most_under_way, seen.under_way)
            attempt = seen.attempts[seed]
        try:
            seen.behave(self, seed, attempt)
        finally:
            with seen.lock:
                seen.under_way -= 1

    def answer(self, body: bytes, status: int = 200, length: int | None = None, **headers: str):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def complete(self, text: str, finish_reason: str = "stop"):
        self.answer(json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish_reason}]}).encode())

    def drop(self):
        self.close_connection = True
        self.connection.close()


@pytest.fixture
def loopback(monkeypatch) -> Iterator[Callable[..., Loopback]]:
    """Start a server with a behaviour; pauses between attempts are short."""
    monkeypatch.setattr(backend, "BACKOFF_S", 0.01)
    monkeypatch.setattr(backend, "MAX_BACKOFF_S", 1.5)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = []

    def start(behave: Callable) -> Loopback:
        started.append(Loopback(behave))
        threading.Thread(target=started[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return started[-1]

    yield start
    for each in started:
        each.shutdown()
        each.server_close()


@pytest.fixture(scope="module")
def job(tmp_path_factory, alone):
    """A student, data, saved responses of two teachers and a fresh D, in a job of one rank."""
    from safetensors.torch import save_file

    from ril_engine.adversary import WEIGHTS
    from ril_engine.discriminator import new_discriminator
    from ril_engine.loop import Loop

    folder = tmp_path_factory.mktemp("job")
    settings = {
        "work_dir": folder / "runs",
        "teachers": [{"name": "a", "path": "tiny:qwen_teacher"}, {"name": "b", "path": "tiny:internvl_teacher"}],
        "sampling": {"max_new_tokens": 6},
        "rl": {"steps": 4, "questions_per_step": 3, "learning_rate": 1e-3, "updates_per_step": 2, "beta": 0.1},
        "discriminator": {"learning_rate": 2e-3},
        "data": {"digits": {"train_questions": 9, "validation_questions": 1, "test_questions": 1, "sft_questions": 4}},
    }
    config = Config.model_validate(settings)
    student, data_dir, d_path = folder / "student", folder / "data", folder / "d"
    data_dir.mkdir()
    d_path.mkdir()
    tiny_models.build(student, "tiny:student", [config.discriminator.instruction], 0)
    digits.build(data_dir, config.data.digits)
    rows = [json.loads(line) for line in (data_dir / "train.jsonl").read_text().splitlines()]
    saved: dict = {}
    for name, style in (("a", "sentences"), ("b", "clauses")):
        for row in rows:
            text = digits.reasoned_answer(row["kind"], *row["digits"], *row["numbers"], style)
            record = {"source": name, "text": text, "truncated": False, "answer_reward": 1.0}
            saved.setdefault(name, {})[row["id"]] = [record] * 4
    module, _ = new_discriminator(ModelConfig(path=str(student)))
    save_file({k: v.clone() for k, v in module.state_dict().items()}, d_path / WEIGHTS)

    def make(discriminator: dict | None = None, deepspeed: dict | None = None, **rl) -> Loop:
        changes = {"discriminator": {**settings["discriminator"], **(discriminator or {})}}
        changes["deepspeed"] = deepspeed or {}
        changed = Config.model_validate({**settings, **changes, "rl": {**settings["rl"], **rl}})
        return Loop(changed, data_dir, str(student), saved, d_path)

    return make, list(enumerate(rows))[:3]


@pytest.fixture
def ril(capfd, alone):
    """Run `ril ...` in this process; returns the exit code, the last line of stdout and stderr."""

    def call(*arguments: str | Path):
        parsed = cli._parser().parse_args([*map(str, arguments)])
        code = exit_code(lambda: cli._run(parsed))
        out, err = capfd.readouterr()
        return code, out.rstrip().splitlines()[-1:], err

    return call
