"""Chat completions of any OpenAI-compatible server (vLLM, SGLang): many at once, each saved as it comes.

Whatever a server answers is data: it is parsed as JSON, its text is saved, and nothing of it is evaluated.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

import httpx2

from ril_engine.config import SamplingConfig, ServerConfig
from ril_engine.errors import UserError
from ril_engine.runlog import progress, read_jsonl

RETRIED = (408, 409, 425, 429)  # and every 5xx
BACKOFF_S = 1.0  # before the second attempt; doubles with each further one
MAX_BACKOFF_S = 60.0  # also of a Retry-After
FAILED_IN_A_ROW = 3  # x concurrency: so many requests failed one after another mean a server that is gone
REMEDIES = {
    400: "check that model and sampling suit this server",
    401: "name the environment variable that holds the key in api_key_env",
    403: "name the environment variable that holds the key in api_key_env",
    404: "check url, whose path often is /v1, and model",
}

Key = tuple[int, ...]  # what a request is known by, such as (question, sample)


class Answer(NamedTuple):
    text: str
    truncated: bool


class _Failed(Exception):
    """An attempt without an answer: why, whether another one may help, and the pause that the server asks for."""

    def __init__(self, reason: str, *, again: bool = True, pause_s: float = 0.0):
        super().__init__(reason)
        self.again, self.pause_s = again, pause_s


def request_seed(seed: int, key: Key) -> int:
    """31 bits, which every server takes; they depend on `seed` and `key` only."""
    return int.from_bytes(hashlib.sha256(repr((seed, *key)).encode()).digest()[:4], "big") >> 1


def chat(server: ServerConfig, asked: list[tuple[str, str]], sampling: SamplingConfig, seed: int) -> dict:
    """The body of a request for one response to a user's turn, of ("text", a text) and ("image", a picture's URL)."""
    content = [
        {"type": "text", "text": value} if kind == "text" else {"type": "image_url", "image_url": {"url": value}}
        for kind, value in asked
    ]
    return {
        "model": server.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        # Left out, it is the checkpoint's own in vLLM; off is -1 for SGLang and for every vLLM.
        "top_k": sampling.top_k or -1,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "stop": sampling.stop or None,
        "seed": seed,
        "n": 1,
    }


def collect(
    server: ServerConfig, keys: Iterable[Key], body: Callable[[Key], dict], saved: Path, title: str
) -> dict[Key, Answer]:
    """The answer to `body(key)` for each key. Those in the file `saved` are not asked for, others are added to it."""
    keys = list(keys)
    rows = read_jsonl(saved) if saved.exists() else []
    found = {tuple(row["key"]): Answer(row["text"], row["truncated"]) for row in rows}
    # Written anew: a kill leaves half a line, to which the next one would be added.
    whole = saved.with_name(saved.name + ".tmp")
    whole.write_text("".join(_line(key, answer) for key, answer in found.items()), encoding="utf-8")
    os.replace(whole, saved)
    missing = [key for key in keys if key not in found]
    with (
        saved.open("a", encoding="utf-8") as file,
        progress(len(keys), title, completed=len(keys) - len(missing), enabled=True) as advance,
    ):

        def keep(key: Key, answer: Answer) -> None:
            file.write(_line(key, answer))
            file.flush()
            found[key] = answer
            advance(1)

        ask(server, ((key, body(key)) for key in missing), keep)
    return {key: found[key] for key in keys}


def _line(key: Key, answer: Answer) -> str:
    return json.dumps({"key": key, **answer._asdict()}) + "\n"


def ask(
    server: ServerConfig,
    requests: Iterable[tuple[Key, dict]],
    on_result: Callable[[Key, Answer], None],
    on_failure: Callable[[Key, str], None] | None = None,
) -> None:
    """Call `on_result` with the answer to each request as it comes; `requests` is read no faster than it is asked.

    Args:
        on_failure: told of each request without an answer, and why, in place of an error; a server that answers none
            any more is asked no further.

    Raises:
        UserError: the server refuses a request, answers none any more, or, after all others, left some unanswered.
    """
    asyncio.run(_ask(server, api_key(server), enumerate(requests), on_result, on_failure))


def api_key(server: ServerConfig) -> str | None:
    """The API key, where the server has one.

    Raises:
        UserError: the environment variable that should hold it does not.
    """
    if server.api_key_env is None:
        return None
    secret = os.environ.get(server.api_key_env, "").strip()
    if not secret or not secret.isascii() or not secret.isprintable():
        raise UserError(
            f"server {server.url}: the environment variable that api_key_env names is "
            f"{'no printable ASCII text' if secret else 'not set'}; export the API key in it"
        )
    return secret


async def _ask(
    server: ServerConfig, secret: str | None, requests: Iterator, on_result: Callable, on_failure: Callable | None
) -> None:
    stop = asyncio.Event()
    failed: dict[int, tuple[Key, str]] = {}
    asked = in_a_row = 0

    async def work(client: httpx2.AsyncClient) -> None:
        nonlocal asked, in_a_row
        for number, (key, body) in requests:  # all workers read from this one iterator
            asked += 1
            try:
                answer = await _obtain(client, server, secret, json.dumps(body).encode(), stop)
            except _Failed as error:
                failed[number] = key, str(error)
                in_a_row += 1
                if on_failure is not None:
                    on_failure(key, str(error))
                if in_a_row == FAILED_IN_A_ROW * server.concurrency and on_failure is not None:
                    stop.set()
                elif in_a_row == FAILED_IN_A_ROW * server.concurrency:
                    raise UserError(
                        f"server {server.url}: {in_a_row} requests failed one after another, the last with: {error}; "
                        "see to the server and start again: what was answered is kept"
                    ) from error
            else:
                in_a_row = 0
                on_result(key, answer)
            if stop.is_set():
                return

    # Without "identity" a few packed bytes could unpack to more than max_response_bytes.
    headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
    if secret is not None:
        headers["Authorization"] = f"Bearer {secret}"
    limits = httpx2.Limits(max_connections=server.concurrency)
    async with httpx2.AsyncClient(headers=headers, timeout=None, limits=limits, follow_redirects=False) as client:
        workers = [asyncio.create_task(work(client)) for _ in range(server.concurrency)]
        await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        stop.set()  # after an error answers that are under way are still kept, but nothing more is asked for
        await asyncio.wait(workers)
    for error in [worker.exception() for worker in workers]:
        if error is not None:
            raise error
    if failed and on_failure is None:
        key, reason = failed[min(failed)]
        raise UserError(
            f"server {server.url}: {len(failed)} of {asked} responses are missing, the first, {key}, because of: "
            f"{reason}; start again: only missing ones are asked for"
        )


async def _obtain(
    client: httpx2.AsyncClient, server: ServerConfig, secret: str | None, body: bytes, stop: asyncio.Event
) -> Answer:
    """The answer of the first attempt that has one; _Failed with the last one's reason if none has."""
    for attempt in range(1, server.attempts + 1):
        try:
            return await asyncio.wait_for(_attempt(client, server, secret, body), server.timeout_s)
        except asyncio.TimeoutError:
            failure = _Failed(f"no whole response within timeout_s {server.timeout_s:g}")
        except httpx2.TransportError as error:
            failure = _Failed(_shown(f"{type(error).__name__} {error}", secret))
        except _Failed as error:
            failure = error
        if not failure.again or attempt == server.attempts or stop.is_set():
            break
        backoff = BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), min(max(backoff, failure.pause_s), MAX_BACKOFF_S))
            break
    raise failure


async def _attempt(client: httpx2.AsyncClient, server: ServerConfig, secret: str | None, body: bytes) -> Answer:
    received = bytearray()
    async with client.stream("POST", f"{server.url}/chat/completions", content=body) as response:
        async for chunk in response.aiter_raw():
            received += chunk
            if len(received) > server.max_response_bytes:
                raise _Failed(
                    f"a response of more than max_response_bytes {server.max_response_bytes}; raise it", again=False
                )
    status = response.status_code
    if status == 200:
        return _answer(received)
    said = f"{status} {_shown(_message(received), secret)}".strip()
    if status in RETRIED or status >= 500:
        raise _Failed(said, pause_s=_retry_after(response.headers.get("retry-after", "")))
    remedy = "give the address that it leads to" if 300 <= status < 400 else "check url and model"
    raise UserError(f"server {server.url}: {said}; {REMEDIES.get(status, remedy)}")


def _answer(received: bytes) -> Answer:
    try:
        choice = json.loads(received)["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    except (ValueError, RecursionError) as error:
        raise _Failed(f"malformed JSON ({type(error).__name__})") from error
    except (LookupError, TypeError) as error:
        raise _Failed("JSON without choices[0].message.content and finish_reason") from error
    if not isinstance(text, str):
        raise _Failed(f"a message whose content is {type(text).__name__}, not text")
    if reason not in ("stop", "length"):
        raise _Failed(f"finish_reason {_shown(str(reason), None)!r}, not 'stop' or 'length'")
    # Half a surrogate pair is good JSON, but no tokenizer takes it.
    return Answer(text.encode("utf-8", "replace").decode().strip(), reason == "length")


def _message(received: bytes) -> str:
    """The first line of what a server says of an error, in the shapes of OpenAI, vLLM and FastAPI, or as it is."""
    try:
        said = json.loads(received)
        said = said.get("error", said)
        said = said if isinstance(said, str) else said.get("message") or said["detail"]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        said = received.decode("utf-8", "replace")
    return str(said).strip().partition("\n")[0]


def _shown(said: str, secret: str | None) -> str:
    """Foreign text for a message of one line: without the API key, control characters and great length."""
    if secret:
        said = said.replace(secret, "***")
    return "".join(c if c.isprintable() else " " for c in said[:300]).strip()


def _retry_after(header: str) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 for anything else."""
    if re.fullmatch(r"[0-9]{1,9}", header):
        return float(header)
    try:
        return parsedate_to_datetime(header).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
