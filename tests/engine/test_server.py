"""Server backend against a real HTTP server on loopback that misbehaves in every way that servers do."""

import base64
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest

from ril_engine import saved_responses, stages
from ril_engine import server as backend
from ril_engine.config import Config, SamplingConfig, ServerConfig
from ril_engine.errors import UserError

ROOT = Path(__file__).parents[2]
SECRET = "sk-very-secret"


def completion(text, finish_reason="stop") -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": finish_reason}]}).encode()


def echo(handler, seed, attempt):
    handler.answer(completion(f"text {seed}"))


def ask(server, count: int, **settings) -> dict:
    """What `ask` obtains for requests 0 to count - 1, each of them once."""
    config = ServerConfig(url=server.url, model="m", **{"concurrency": 4, "timeout_s": 60, **settings})
    got = {}

    def keep(key, answer):
        assert key not in got
        got[key] = answer

    requests = (((i,), backend.chat(config, [("text", "hello")], SamplingConfig(), i)) for i in range(count))
    try:
        backend.ask(config, requests, keep)
    finally:
        server.got = {key[0]: answer.text for key, answer in got.items()}
    return got


def stall(handler, *_):
    time.sleep(1.5)
    handler.drop()


def drip(handler, *_):
    handler.answer(b"", length=1000)
    for _ in range(30):  # never silent for long, never done
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def cut_body(handler, *_):
    handler.answer(completion("text")[:20], length=500)
    handler.drop()


def chunks_cut(handler, *_):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b'5\r\n{"cho\r\n')
    handler.drop()


MISHAPS = {
    "stalls": (stall, "no whole response within timeout_s 1"),
    "drips": (drip, "no whole response within timeout_s 1"),
    "drops": (lambda handler, *_: handler.drop(), "RemoteProtocolError Server disconnected without sending a response"),
    "drops in the body": (cut_body, "RemoteProtocolError peer closed connection"),
    "drops in the chunks": (chunks_cut, "RemoteProtocolError peer closed connection"),
    "no HTTP": (lambda handler, *_: handler.wfile.write(b"SSH-2.0\r\n\r\n"), "RemoteProtocolError"),
    "408": (lambda handler, *_: handler.answer(b"", 408), "408"),
    "409": (lambda handler, *_: handler.answer(b"", 409), "409"),
    "425": (lambda handler, *_: handler.answer(b"", 425), "425"),
    "429": (lambda handler, *_: handler.answer(b'{"error": {"message": "slow"}}', 429), "429 slow"),
    "500": (lambda handler, *_: handler.answer(b"<html>\noops", 500), "500 <html>"),
    "503": (lambda handler, *_: handler.answer(b'{"detail": "loading"}', 503), "503 loading"),
    "half JSON": (lambda handler, *_: handler.answer(completion("text")[:-3]), r"malformed JSON \(JSONDecodeError\)"),
    "deep JSON": (lambda handler, *_: handler.answer(b"[" * 500_000), r"malformed JSON \(RecursionError\)"),
    "no UTF-8": (lambda handler, *_: handler.answer(b'{"a": "\xff"}'), r"malformed JSON \(UnicodeDecodeError\)"),
    "no choices": (lambda handler, *_: handler.answer(b'{"choices": []}'), "JSON without choices"),
    "a list": (lambda handler, *_: handler.answer(b"[1]"), "JSON without choices"),
    "no text": (lambda handler, *_: handler.answer(completion(None)), "a message whose content is NoneType, not text"),
    "text in parts": (
        lambda handler, *_: handler.answer(completion([{"text": "a"}])),
        "a message whose content is list, not text",
    ),
    "aborted": (lambda handler, *_: handler.answer(completion("te", "abort")), "finish_reason 'abort', not 'stop'"),
}


@pytest.mark.parametrize(("mishap", "reason"), MISHAPS.values(), ids=MISHAPS)
def test_what_passes_is_asked_again_and_what_stays_is_reported(loopback, mishap, reason):
    """Of eight requests 1 fails once and then succeeds, 2 always fails, and the others are none the worse for it."""

    def behave(handler, seed, attempt):
        (mishap if seed == 2 or (seed == 1 and attempt < 2) else echo)(handler, seed, attempt)

    server = loopback(behave)
    slow = mishap in (stall, drip)
    with pytest.raises(
        UserError,
        match=rf"^server {server.url}: 1 of 8 responses are missing, the first, \(2,\), because of: {reason}.*; "
        "start again: only missing ones are asked for$",
    ):
        ask(server, 8, attempts=2, timeout_s=1 if slow else 60)
    assert server.got == {i: f"text {i}" for i in range(8) if i != 2}
    assert server.attempts == {i: 2 if i in (1, 2) else 1 for i in range(8)}


def test_a_large_response_is_refused_once(loopback):
    server = loopback(lambda handler, seed, _: handler.answer(completion("a" * (5000 if seed == 1 else 900))))
    with pytest.raises(UserError, match=r"1 of 3 .* more than max_response_bytes 2000; raise it; start again"):
        ask(server, 3, max_response_bytes=2000)
    assert sorted(server.got) == [0, 2] and set(server.attempts.values()) == {1}


def test_a_compressed_response_is_not_unpacked(loopback):
    server = loopback(lambda handler, *_: handler.answer(b"\x1f\x8b\x08\x00", Content_Encoding="gzip"))
    with pytest.raises(UserError, match="malformed JSON"):
        ask(server, 1, attempts=1)
    assert server.headers[0]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("header", "pause"),
    [("1", 1.0), ("9000", 1.5), ("soon", 0.0), (lambda: formatdate(time.time() + 2, usegmt=True), 1.0)],
    ids=["seconds", "capped", "nonsense", "date"],
)
def test_retry_after(loopback, header, pause):
    def behave(handler, seed, attempt):
        if attempt > 1:
            return echo(handler, seed, attempt)
        handler.answer(b"", 429, Retry_After=header if isinstance(header, str) else header())

    server = loopback(behave)
    assert len(ask(server, 1)) == 1
    first, second = server.times[0]
    assert pause <= second - first < pause + 5.0


def test_pauses_grow(loopback, monkeypatch):
    monkeypatch.setattr(backend, "BACKOFF_S", 0.1)
    server = loopback(lambda handler, *_: handler.answer(b"", 500))
    with pytest.raises(UserError, match="1 of 1 responses are missing"):
        ask(server, 1, attempts=4)
    pauses = [b - a for a, b in itertools.pairwise(server.times[0])]
    assert all(pause >= 0.05 * 2**i for i, pause in enumerate(pauses)), pauses


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, {"error": {"message": f"bad key {SECRET}\nmore"}}, r"401 bad key \*\*\*; name the environment variable"),
        (404, {"object": "error", "message": "no model m"}, "404 no model m; check url, whose path often is /v1, and"),
        (400, {"error": "no\x1b[31m top_k"}, r"400 no \[31m top_k; check that model and sampling suit this server"),
        (422, {"detail": "nonsense"}, "422 nonsense; check url and model"),
        (307, {}, "307 {}; give the address that it leads to"),
    ],
)
def test_a_refusal_ends_it_at_once(loopback, monkeypatch, status, body, message):
    monkeypatch.setenv("SOME_KEY", SECRET)
    elsewhere = loopback(echo)
    answer = json.dumps(body).encode()
    server = loopback(lambda handler, *_: handler.answer(answer, status, Location=elsewhere.url + "/chat/completions"))
    with pytest.raises(UserError, match=rf"^server {server.url}: {message}") as caught:
        ask(server, 50, api_key_env="SOME_KEY")
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)
    assert len(server.bodies) <= 4 and not elsewhere.bodies
    assert server.headers[0]["Authorization"] == f"Bearer {SECRET}"
    assert server.headers[0]["path"] == "/v1/chat/completions"


def test_what_is_under_way_at_a_refusal_is_kept_and_pauses_end(loopback, monkeypatch):
    monkeypatch.setattr(backend, "MAX_BACKOFF_S", 60.0)

    def behave(handler, seed, attempt):
        if seed == 1:
            time.sleep(0.2)
            handler.answer(b"", 404)
        elif seed == 2:
            handler.answer(b"", 429, Retry_After="60")
        else:
            time.sleep(0.4)
            echo(handler, seed, attempt)

    server = loopback(behave)
    start = time.monotonic()
    with pytest.raises(UserError, match="404"):
        ask(server, 50)
    assert server.got == {0: "text 0", 3: "text 3"} and len(server.bodies) == 4
    assert time.monotonic() - start < 30


def test_a_server_that_is_gone_is_not_asked_forever(loopback):
    def behave(handler, seed, attempt):
        (echo if seed < 20 else MISHAPS["500"][0])(handler, seed, attempt)

    server = loopback(behave)
    with pytest.raises(UserError, match=r"12 requests failed one after another, the last with: 500 .* start again"):
        ask(server, 1000, attempts=2)
    assert sorted(server.got) == list(range(20))
    assert len(server.bodies) <= 20 + 2 * (12 + 4)


def test_nobody_listens(loopback):
    server = loopback(echo)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"2 of 2 responses are missing.*ConnectError"):
        ask(server, 2, attempts=2)


@pytest.mark.parametrize(("value", "got"), [(None, "not set"), ("a\nb", "no printable ASCII text")])
def test_the_key_comes_from_the_environment(loopback, monkeypatch, value, got):
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value:
        monkeypatch.setenv("SOME_KEY", value)
    server = loopback(echo)
    with pytest.raises(UserError, match=f"api_key_env names is {got}; export the API key in it"):
        ask(server, 1, api_key_env="SOME_KEY")
    assert not server.bodies


def test_requests_are_bounded_and_read_as_they_are_asked(loopback):
    def behave(handler, seed, attempt):
        time.sleep(0.05)
        echo(handler, seed, attempt)

    server, ahead = loopback(behave), []

    def requests(config):
        for i in range(40):
            ahead.append(i - len(got))
            yield (i,), backend.chat(config, [("text", "hello")], SamplingConfig(), i)

    got, config = {}, ServerConfig(url=server.url, model="m", concurrency=5)
    backend.ask(config, requests(config), got.__setitem__)
    assert len(got) == 40 and server.most_under_way == 5 and max(ahead) < 5


def test_an_error_of_the_caller_passes_through(loopback):
    def requests():
        yield (0,), {"seed": 0}
        raise UserError("image no.png: no such file")

    server, got = loopback(echo), {}
    with pytest.raises(UserError, match="no such file"):
        backend.ask(ServerConfig(url=server.url, model="m"), requests(), got.__setitem__)
    assert list(got) == [(0,)]


def test_text_is_cleaned_and_length_is_truncation(loopback):
    answers = [completion(" a \ud800 b\n"), completion("cut", "length"), completion("")]
    got = ask(loopback(lambda handler, seed, _: handler.answer(answers[seed])), 3)
    assert got == {(0,): ("a ? b", False), (1,): ("cut", True), (2,): ("", False)}


def test_sampling_reaches_the_server():
    server = ServerConfig(url="http://host:8000/v1/", model="m")
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, top_k=0, repetition_penalty=1.1, max_new_tokens=9)
    assert server.url == "http://host:8000/v1"
    assert backend.chat(server, [("image", "data:image/png;base64,AA=="), ("text", "What?")], sampling, 3) == {
        "model": "m",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                    {"type": "text", "text": "What?"},
                ],
            }
        ],
        **{
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "repetition_penalty": 1.1,
            "max_tokens": 9,
            "stop": None,
            "seed": 3,
            "n": 1,
        },
    }
    assert backend.chat(server, [("text", "What?")], SamplingConfig(), 3)["top_k"] == 50


def test_seeds_differ_and_fit_31_bits():
    seeds = {backend.request_seed(s, (i, n)) for s in range(3) for i in range(20) for n in range(4)}
    assert len(seeds) == 240 and max(seeds) < 2**31 and min(seeds) >= 0
    assert backend.request_seed(0, (1, 2)) == 1970305078


COLLECT = """
import sys
from pathlib import Path
from ril_engine import server
from ril_engine.config import SamplingConfig, ServerConfig
config = ServerConfig(url=sys.argv[1], model="m", concurrency=4)
keys = [(i, n) for i in range(10) for n in range(4)]
body = lambda key: server.chat(config, [("text", "hello")], SamplingConfig(), 4 * key[0] + key[1])
found = server.collect(config, keys, body, Path(sys.argv[2]), "responses")
assert list(found) == keys
"""


def test_a_killed_process_goes_on_and_pays_for_none_twice(loopback, tmp_path):
    """kill -9 after 12 answers, while the server keeps all further ones back; then half a line at the end."""
    killed, twelve = threading.Event(), threading.Event()
    answered = itertools.count(1)

    def behave(handler, seed, attempt):
        if not killed.is_set() and next(answered) > 12:
            twelve.set()
            killed.wait(10)
            return handler.drop()
        echo(handler, seed, attempt)

    server, saved = loopback(behave), tmp_path / "saved.jsonl"
    command = [sys.executable, "-c", COLLECT, server.url, str(saved)]
    first = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert twelve.wait(30)
    deadline = time.monotonic() + 10
    while (len(saved.read_text().splitlines()) < 12 or len(server.attempts) < 16) and time.monotonic() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    assert first.wait(10) == -signal.SIGKILL
    killed.set()
    kept = [4 * row["key"][0] + row["key"][1] for row in map(json.loads, saved.read_text().splitlines())]
    assert len(kept) == 12
    lost = set(server.attempts) - set(kept)  # asked for when the process died, and never answered
    assert len(lost) == 4
    with saved.open("a") as file:
        file.write('{"key": [9, 3], "text": "text 3')

    second = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, timeout=60)
    assert second.returncode == 0
    assert server.attempts == {seed: 2 if seed in lost else 1 for seed in range(40)}
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert sorted(row["key"] for row in rows) == [[i, n] for i in range(10) for n in range(4)]
    assert all(row["text"] == f"text {4 * row['key'][0] + row['key'][1]}" for row in rows)

    third = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, timeout=60)
    assert third.returncode == 0 and server.attempts.total() == 44


@pytest.fixture
def served(tmp_path):
    """A job whose only teacher is behind `server`, its data folder and key."""

    def make(server, **changes):
        settings = {
            "work_dir": tmp_path / "runs",
            "teachers": [{"name": "a", "server": {"url": server.url, "model": "big", "concurrency": 4, **changes}}],
            "data": {"digits": {"train_questions": 9, "validation_questions": 9, "test_questions": 9}},
            "responses": {"per_question": 4, "questions": 5},
        }
        settings["data"]["digits"]["sft_questions"] = 9
        config = Config.model_validate(settings)
        return config, *stages.data(config)

    return make


def test_the_stage_from_end_to_end(loopback, served):
    down = threading.Event()
    down.set()

    def behave(handler, seed, attempt):
        number = len(handler.server.attempts)
        if down.is_set() and number % 5 == 0:
            return handler.answer(b"", 503)
        handler.answer(completion(f"The answer is {seed % 10}.", "length" if seed % 3 == 0 else "stop"))

    server = loopback(behave)
    config, data_dir, data_key = served(server, attempts=1)
    teacher = config.teachers[0]
    with pytest.raises(UserError, match=r"of 20 responses are missing, .*: 503; start again"):
        saved_responses.served_responses(config, teacher, data_dir, data_key)
    (saved,) = (config.work_dir / "stages").glob("responses_a-*.answers.jsonl")
    paid = len(saved.read_text().splitlines())
    assert 10 <= paid < 20 and len(server.bodies) == 20

    down.clear()
    moved, *_ = served(loopback(behave), concurrency=2, timeout_s=9)  # another address: the same answers
    path = saved_responses.served_responses(moved, moved.teachers[0], data_dir, data_key)
    assert not saved.exists() and path.parent.name == saved.name.removesuffix(".answers.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    questions = stages.read_jsonl(data_dir / "train.jsonl", ("id",))[:5]
    assert [(row["id"], row["sample"]) for row in rows] == [(q["id"], n) for q in questions for n in range(4)]
    for i, row in enumerate(rows):
        seed = backend.request_seed(0, divmod(i, 4))
        assert row == {
            "id": questions[i // 4]["id"],
            "source": "a",
            "sample": i % 4,
            "text": f"The answer is {seed % 10}.",
            "truncated": seed % 3 == 0,
            "model": "big",
        }
    body = server.bodies[0]
    picture, text = body["messages"][0]["content"]
    question = next(
        q for i, q in enumerate(questions) if body["seed"] in {backend.request_seed(0, (i, n)) for n in range(4)}
    )
    start, _, data = picture["image_url"]["url"].partition(",")
    assert start == "data:image/png;base64" and text["text"] == question["question"]
    assert base64.b64decode(data) == (data_dir / question["image"]).read_bytes()

    asked = len(server.bodies)
    assert saved_responses.served_responses(config, teacher, data_dir, data_key) == path and len(server.bodies) == asked


def test_another_sampling_or_model_asks_anew(loopback, served):
    server = loopback(echo)
    config, data_dir, data_key = served(server)
    paths = {saved_responses.served_responses(config, config.teachers[0], data_dir, data_key)}
    for settings, same in (
        ({"sampling": {"batch_size": 4}}, True),
        ({"sampling": {"top_p": 0.5}}, False),
        ({"seed": 1}, False),
    ):
        other = Config.model_validate({**config.model_dump(), **settings})
        path = saved_responses.served_responses(other, other.teachers[0], data_dir, data_key)
        assert (path in paths) is same
        paths.add(path)
    assert len(server.bodies) == 60


def test_a_picture_outside_the_data_folder_is_not_sent(loopback, served, tmp_path):
    server = loopback(echo)
    config, *_ = served(server)
    (tmp_path / "train.jsonl").write_text(json.dumps({"id": "q", "question": "?", "answer": "1", "image": "../a.png"}))
    with pytest.raises(UserError, match=r"image '../a.png': outside the dataset folder"):
        saved_responses.served_responses(config, config.teachers[0], tmp_path, "key")
    assert not server.bodies


RANK = """
import sys
from datetime import timedelta
import torch.distributed as dist
from pathlib import Path
from ril_engine import saved_responses
from ril_engine.config_file import load_config
from ril_engine.errors import UserError
config = load_config(sys.argv[1])
rank = int(sys.argv[3])
store = dist.TCPStore("127.0.0.1", int(sys.argv[2]), 2, rank == 0, timedelta(seconds=200))  # the imports differ in time
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=3))
for _ in range(2):
    try:
        print("made", saved_responses.served_responses(config, config.teachers[0], Path(config.data.dir), "key"))
    except UserError as error:
        print(error)
"""


@pytest.mark.distributed
def test_one_of_two_ranks_asks_however_long_it_takes(loopback, tmp_path):
    """The ranks' own time-out is 3 s, and the first answer takes 5. One is missing at first: both ranks hear of it."""

    def behave(handler, seed, attempt):
        if len(handler.server.bodies) == 1:
            time.sleep(5)
            handler.answer(b"", 500)
        else:
            echo(handler, seed, attempt)

    server, config = loopback(behave), tmp_path / "config.json"
    (tmp_path / "train.jsonl").write_text(json.dumps({"id": "q", "question": "?", "answer": "1"}))
    teacher = {"name": "a", "server": {"url": server.url, "model": "m", "concurrency": 2, "attempts": 1}}
    settings = {"work_dir": str(tmp_path / "runs"), "data": {"dir": str(tmp_path)}, "teachers": [teacher]}
    config.write_text(json.dumps({**settings, "responses": {"per_question": 6}}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, config, port, str(rank)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=200)[0].splitlines()[-2:] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0] and said[0] == said[1]
    missing, made = said[0]
    # Two requests are under way at once, and either may come first.
    assert re.search(r"1 of 6 responses are missing, the first, \(0, [01]\), because of: 500", missing)
    assert len(Path(made.removeprefix("made ")).read_text().splitlines()) == 6 and len(server.bodies) == 7
