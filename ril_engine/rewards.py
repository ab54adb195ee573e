"""The answer reward: a weighted sum of the verifier, of judges and of functions of the user's.

Each is a callable (questions, references, responses, **columns) of lists of N, sync or async, that gives N numbers, or
None where it could not score a response. Functions made for TRL (prompts, completions, **columns) are called as TRL
calls them with chat data.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ril_engine.config import AnswerRewardConfig, Config, FunctionConfig, JudgeConfig
from ril_engine.errors import UserError
from ril_engine.runlog import read_jsonl
from ril_engine.verifier import verify

ARGUMENTS = ("question", "questions", "references", "responses")  # never columns
SIGNATURES = "(questions, references, responses, **columns) or TRL's (prompts, completions, **columns)"


class Score(NamedTuple):
    reward: float  # the weighted sum of the parts
    parts: dict[str, float]  # by the reward's name; 0.0 where it could not score
    unscored: int  # how many parts could not score


class AnswerRewards:
    """What `config.answer_rewards` names. Nothing is imported or loaded before the first response is scored.

    With `cache_dir`, a folder of one process, verdicts of judges outlive it in JSONL files there.
    """

    def __init__(self, config: Config, cache_dir: Path | None = None):
        self._settings, self._cache_dir = config.answer_rewards, cache_dir
        self._rewards: list[Callable] | None = None
        names = [each.function.split(":")[1] if each.kind == "function" else each.kind for each in self._settings]
        self.names = [
            name if names.count(name) == 1 else f"{name}_{names[:i].count(name) + 1}" for i, name in enumerate(names)
        ]

    def score(self, rows: list[dict], responses: list[str], truncated: list[bool]) -> list[Score]:
        """The scores of N responses to the questions of N rows. A truncated one gets 0 and is shown to no reward.

        Columns are the fields that all rows have, without the question.

        Raises:
            UserError: a function that cannot be imported, raises, or gives anything but N numbers or None; a judge
                that cannot be loaded or asked.
        """
        shown = [i for i, (_, _, cut) in enumerate(zip(rows, responses, truncated, strict=True)) if not cut]
        values: list[list[float | None]] = [[0.0] * len(self.names) for _ in rows]
        if shown and self.names:
            some = [rows[i] for i in shown]
            fields = [name for name in some[0] if name not in ARGUMENTS and all(name in row for row in some)]
            found = self._ask(
                [row["question"] for row in some],
                [row.get("answer") for row in some],
                [responses[i] for i in shown],
                **{name: [row[name] for row in some] for name in fields},
            )
            for place, i in enumerate(shown):
                values[i] = [one[place] for one in found]
        return [self._score(each) for each in values]

    def _score(self, values: list[float | None]) -> Score:
        parts = [value or 0.0 for value in values]
        reward = sum(each.weight * part for each, part in zip(self._settings, parts, strict=True))
        return Score(float(reward), dict(zip(self.names, parts, strict=True)), values.count(None))

    def _ask(self, /, *lists: list, **columns: list) -> list[list[float | None]]:
        """Each reward's values: first of the sync ones, in order, then of the async ones, all at once."""
        if self._rewards is None:
            self._rewards = [self._make(*each) for each in zip(self.names, self._settings, strict=True)]
        found = [None if inspect.iscoroutinefunction(each) else each(*lists, **columns) for each in self._rewards]
        later = [i for i, values in enumerate(found) if values is None]

        async def together() -> list:
            return await asyncio.gather(*(self._rewards[i](*lists, **columns) for i in later))

        for i, values in zip(later, asyncio.run(together()) if later else [], strict=True):
            found[i] = values
        return found

    def _make(self, name: str, settings: AnswerRewardConfig) -> Callable:
        if settings.kind == "function":
            return user_function(settings)
        if settings.kind == "judge":
            from ril_engine.judge import judge

            path = self._cache_dir and self._cache_dir / f"{name}.jsonl"
            return Cached(judge(settings), verdict_settings(settings), path)
        return _verified

    def close(self) -> None:
        """Let go of judges and of their files; the next score loads them again."""
        for each in self._rewards or ():
            if isinstance(each, Cached):
                each.close()
        self._rewards = None


def require_rewards(config: Config) -> None:
    """Import the user's functions and look for the keys of judges' servers, before anything slow.

    Raises:
        UserError: a function that cannot be imported, or is none; a key that is not there.
    """
    for each in config.answer_rewards:
        if each.kind == "function":
            user_function(each)
        elif each.kind == "judge" and each.server is not None:
            from ril_engine.server import api_key

            api_key(each.server)


def _verified(
    questions: list[str], references: list[str | None], responses: list[str], **columns
) -> list[float | None]:
    pairs = zip(references, responses, strict=True)
    return [float(verify(response, reference)) if reference else None for reference, response in pairs]


def verdict_settings(settings: JudgeConfig) -> dict:
    """What a judge's verdicts depend on: not where and how fast it is asked, or what its verdict weighs."""
    server = {"url", "api_key_env", "concurrency", "timeout_s", "attempts", "max_response_bytes"}
    exclude = {"weight": True, "on_failure": True, "micro_batch_tokens": True, "server": server}
    return settings.model_dump(exclude=exclude) | {"code": _judging()}


@functools.cache
def _judging() -> str:
    """A hash of how judges are asked and their replies read."""
    files = (Path(__file__).with_name(name) for name in ("judge.py", "local_judge.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class Cached:
    """A judge whose verdicts are kept by content, in memory and in a JSONL file: what is known is not asked again.

    Args:
        judge: called as (questions, references, responses, on_score=...); it may tell on_score(place, verdict) as
            verdicts come, so that a failure loses none of them. None is no verdict and is not kept.
        settings: what the verdicts depend on besides the content.
        path: the file, of this process alone; made with its folder where there is none.
    """

    def __init__(self, judge: Callable, settings: dict, path: Path | None = None):
        self._judge, self._settings = judge, settings
        self.hits = self.calls = 0
        self._known: dict[str, float] = {}
        self._file = None
        if path is not None:
            rows = read_jsonl(path) if path.exists() else []
            self._known = {row["key"]: row["verdict"] for row in rows}
            path.parent.mkdir(parents=True, exist_ok=True)
            # Written anew: a kill leaves half a line, to which the next one would be added.
            whole = path.with_name(path.name + ".tmp")
            whole.write_text("".join(_line(*each) for each in self._known.items()), encoding="utf-8")
            os.replace(whole, path)
            self._file = path.open("a", encoding="utf-8")

    def __call__(
        self, questions: list[str], references: list, responses: list[str], /, **columns
    ) -> list[float | None]:
        contents = list(zip(questions, references, responses, strict=True))
        keys = [hashlib.sha256(json.dumps([self._settings, *each]).encode()).hexdigest() for each in contents]
        asked = {key: each for key, each in zip(keys, contents, strict=True) if key not in self._known}
        self.calls += len(asked)
        self.hits += len(keys) - len(asked)
        if asked:
            places = list(asked)
            lists = (list(each) for each in zip(*asked.values(), strict=True))
            verdicts = self._judge(*lists, on_score=lambda place, verdict: self._keep(places[place], verdict))
            for key, verdict in zip(places, verdicts, strict=True):
                self._keep(key, verdict)
        return [self._known.get(key) for key in keys]

    def _keep(self, key: str, verdict: float | None) -> None:
        if verdict is None or key in self._known:
            return
        self._known[key] = verdict
        if self._file is not None:
            self._file.write(_line(key, verdict))
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _line(key: str, verdict: float) -> str:
    return json.dumps({"key": key, "verdict": verdict}) + "\n"


def user_function(settings: FunctionConfig) -> Callable:
    """The function that "module:name" names, as a reward whose every mistake is a UserError that names it."""
    what = f"answer reward {settings.function}"
    module, _, name = settings.function.partition(":")
    with _blamed_on(what, "it must import: put the folder of its module on PYTHONPATH, or mend it"):
        function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        got = "no such name" if function is None else f"a {type(function).__name__}"
        raise UserError(f"{what}: {got} in {module}, expected a function {SIGNATURES}")
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some builtins show none
        parameters = {}
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    conversational = not {"prompts", "completions"}.isdisjoint(parameters)
    if not conversational and "responses" not in parameters:
        raise UserError(f"{what}: its parameters are ({', '.join(parameters)}), expected {SIGNATURES}")

    def arguments(questions: list[str], references: list, responses: list[str], columns: dict) -> dict:
        given = columns | {"questions": questions, "references": references, "responses": responses}
        if conversational:
            prompts = [[{"role": "user", "content": question}] for question in questions]
            completions = [[{"role": "assistant", "content": response}] for response in responses]
            # TRL's own functions know the reference as the column `solution`.
            given = {"solution": references} | columns | {"prompts": prompts, "completions": completions}
        return {each: value for each, value in given.items() if takes_all or each in parameters}

    remedy = "mend it or remove it from answer_rewards"
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):

        async def call(questions: list[str], references: list, responses: list[str], **columns) -> list:
            with _blamed_on(what, remedy):
                values = await function(**arguments(questions, references, responses, columns))
            return _numbers(what, values, len(responses))
    else:

        def call(questions: list[str], references: list, responses: list[str], **columns) -> list:
            with _blamed_on(what, remedy):
                values = function(**arguments(questions, references, responses, columns))
            return _numbers(what, values, len(responses))

    return call


@contextlib.contextmanager
def _blamed_on(what: str, remedy: str):
    """The user's code may raise anything: one line then says whose it is, and the cause stays chained."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{what}: {type(error).__name__}: {reason}; {remedy}") from error


def _numbers(what: str, values, count: int) -> list[float | None]:
    """`count` finite floats, None for None and NaN."""
    expected = f"expected a list of {count}, one number or None for each response"
    if isinstance(values, str | dict) or not hasattr(values, "__len__"):
        raise UserError(f"{what}: returned a {type(values).__name__}, {expected}")
    if len(values) != count:
        raise UserError(f"{what}: returned {len(values)} values, {expected}")
    return [_number(what, place, value) for place, value in enumerate(values)]


def _number(what: str, place: int, value) -> float | None:
    if value is None:
        return None
    try:
        number = math.inf if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number):
        raise UserError(f"{what}: value {place} is {value!r:.80}, expected a finite number, or None for no score")
    return None if math.isnan(number) else number
