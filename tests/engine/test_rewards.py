"""Answer rewards: weighted sums, functions of the user's and of TRL's, what judges are asked, every mistake's line."""

import importlib.util
import json

import pytest

from ril_engine import rewards as ril_rewards
from ril_engine.config import Config, JudgeConfig, TeacherConfig
from ril_engine.errors import UserError
from ril_engine.rewards import AnswerRewards, Cached, Score, require_rewards, verdict_settings

ROWS = [
    {"id": "a", "question": "What is 2+3?", "answer": "5", "image": "a.png", "kind": "sum"},
    {"id": "b", "question": "What is 2*3?", "answer": "6", "kind": "product"},
    {"id": "c", "question": "Odd or even: 7?", "answer": "odd", "kind": "word"},
]
RESPONSES = ["The answer is 5.", "It is 7.", "odd"]
TRL = "TRL (extra `dev`, Python 3.11 or later) is not installed"


def rewards(*settings, cache_dir=None):
    teachers = [TeacherConfig(name="a", path="tiny:qwen_teacher")]
    return AnswerRewards(Config(teachers=teachers, answer_rewards=settings), cache_dir)


def function(name, weight=1.0):
    return {"kind": "function", "function": name, "weight": weight}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes the module of a user's functions; its name is `name` and it is on the Python path."""

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return name

    monkeypatch.syspath_prepend(tmp_path)
    return write


def score(answer_rewards, responses=RESPONSES, truncated=(False, False, False)):
    return answer_rewards.score(ROWS, responses, list(truncated))


def test_the_verifier_and_none():
    assert score(rewards({"kind": "verifier", "weight": 2})) == [
        Score(2.0, {"verifier": 1.0}, 0),
        Score(0.0, {"verifier": 0.0}, 0),
        Score(2.0, {"verifier": 1.0}, 0),
    ]
    assert score(rewards()) == [Score(0.0, {}, 0)] * 3


def test_no_reference_is_counted_not_guessed():
    rows = [{"question": "Why?"}, {"question": "Why?", "answer": None}, {"question": "Why?", "answer": ""}]
    found = rewards({"kind": "verifier"}).score(rows, ["None", "", ""], [False] * 3)
    assert found == [Score(0.0, {"verifier": 0.0}, 1)] * 3


def test_weighted_sum_of_sync_and_async_functions(module):
    text = """
import asyncio
started = asyncio.Event()
async def first(questions, references, responses, **columns):
    await asyncio.wait_for(started.wait(), 5)  # hangs where the two do not run together
    return [0.5, None, float("nan")]
async def second(responses, kind):
    started.set()
    return [len(response) + len(each) for response, each in zip(responses, kind)]
def third(questions, references, responses, **columns):
    assert columns == {"id": ["a", "b", "c"], "answer": ["5", "6", "odd"], "kind": ["sum", "product", "word"]}
    return asyncio.run(loop_of_its_own())
async def loop_of_its_own():
    return [True, 0, -1.5]
"""
    name = module("user_together", text)
    settings = [function(f"{name}:first", 2), function(f"{name}:second", 0.5), function(f"{name}:third", 10)]
    assert score(rewards(*settings, {"kind": "verifier"})) == [
        Score(2 * 0.5 + 0.5 * 19 + 10 + 1, {"first": 0.5, "second": 19.0, "third": 1.0, "verifier": 1.0}, 0),
        Score(0.5 * 15 + 0, {"first": 0.0, "second": 15.0, "third": 0.0, "verifier": 0.0}, 1),
        Score(0.5 * 7 - 15 + 1, {"first": 0.0, "second": 7.0, "third": -1.5, "verifier": 1.0}, 1),
    ]


def test_names_are_numbered_where_they_come_twice(module):
    name = module("user_twice", "def one(responses):\n    return [1] * len(responses)\n")
    settings = [function(f"{name}:one"), {"kind": "verifier"}, function(f"{name}:one")]
    assert score(rewards(*settings))[0] == Score(3.0, {"one_1": 1.0, "verifier": 1.0, "one_2": 1.0}, 0)


def test_truncated_responses_are_shown_to_nobody(module):
    text = "seen = []\ndef see(responses):\n    seen.append(responses)\n    return [1.0] * len(responses)\n"
    name = module("user_sees", text)
    found = score(rewards(function(f"{name}:see"), {"kind": "verifier"}), truncated=(True, False, True))
    assert found == [
        Score(0.0, {"see": 0.0, "verifier": 0.0}, 0),
        Score(1.0, {"see": 1.0, "verifier": 0.0}, 0),
        Score(0.0, {"see": 0.0, "verifier": 0.0}, 0),
    ]
    score(rewards(function(f"{name}:see")), truncated=(True, True, True))
    assert importlib.import_module(name).seen == [["It is 7."]]


def test_nothing_is_imported_before_the_first_score():
    made = rewards(function("no_such_module_of_ours:f"))
    assert score(made, truncated=(True, True, True)) == [Score(0.0, {"f": 0.0}, 0)] * 3
    with pytest.raises(UserError, match="no_such_module_of_ours:f: ModuleNotFoundError: No module named"):
        score(made)


def test_functions_and_objects_in_trls_manner(module):
    text = """
import functools
def content(prompts, completions, **kwargs):
    assert prompts[0] == [{"role": "user", "content": "What is 2+3?"}] and kwargs["kind"][2] == "word"
    return [len(completion[0]["content"]) for completion in completions]
class Agreement:
    async def __call__(self, completions, solution):
        return [float(s in c[0]["content"]) for c, s in zip(completions, solution)]
agreement = Agreement()
short = functools.partial(lambda limit, completions: [len(c[0]["content"]) < limit for c in completions], 5)
"""
    name = module("user_trl", text)
    found = score(rewards(*(function(f"{name}:{each}") for each in ("content", "agreement", "short"))))
    assert [each.parts for each in found] == [
        {"content": 16.0, "agreement": 1.0, "short": 0.0},
        {"content": 8.0, "agreement": 0.0, "short": 0.0},
        {"content": 3.0, "agreement": 1.0, "short": 1.0},
    ]


def test_trls_own_format_reward():
    pytest.importorskip("trl", reason=TRL)
    responses = ["<think>2+3</think>5", "6", "<think>odd"]
    found = score(rewards(function("trl.rewards:think_format_reward")), responses)
    assert [each.reward for each in found] == [1.0, 0.0, 0.0]


def test_trls_own_accuracy_reward():
    pytest.importorskip("trl", reason=TRL)
    made = rewards(function("trl.rewards:accuracy_reward"))
    responses = [r"It is \boxed{5}", r"It is \boxed{7}", r"\boxed{odd}"]
    if importlib.util.find_spec("math_verify") is None:  # TRL's own optional dependency
        with pytest.raises(UserError, match="accuracy_reward: ImportError: Please install the `math_verify` package"):
            score(made, responses)
    else:
        assert [(each.reward, each.unscored) for each in score(made, responses)[:2]] == [(1.0, 0), (0.0, 0)]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("g = 1", "no such name in MODULE, expected a function"),
        ("f = 3", "a int in MODULE, expected a function"),
        ("raise RuntimeError('at import')", "RuntimeError: at import; it must import: put the folder"),
        ("def f(:", "SyntaxError: .*; it must import"),
        ("def f(answers): return []", r"its parameters are \(answers\), expected \(questions, references, responses"),
        ("f = max", r"its parameters are \(\), expected \(questions"),
        ("def f(responses): return [1.0, 2.0]", "returned 2 values, expected a list of 3, one number or None for each"),
        ("def f(responses): return None", "returned a NoneType, expected a list of 3"),
        ("def f(responses): return '111'", "returned a str, expected a list of 3"),
        ("def f(responses): return [1, 'yes', 2]", "value 1 is 'yes', expected a finite number, or None for no score"),
        ("def f(responses): return [1, '2', 2]", "value 1 is '2', expected a finite number"),
        ("def f(responses): return [[1], 2, 2]", r"value 0 is \[1\], expected a finite number"),
        ("def f(responses): return [10**400, 2, 2]", "value 0 is 1000.*, expected a finite number"),
        ("def f(responses): return [1, 2, float('inf')]", "value 2 is inf, expected a finite number"),
        ("def f(responses): raise KeyError('two\\nlines')", "KeyError: .*; mend it or remove it from answer_rewards"),
        ("async def f(responses): raise OSError('two\\nlines')", "OSError: two lines; mend it or remove it"),
        ("async def f(responses): return [1]", "returned 1 values, expected a list of 3"),
        ("def f(completions, completion_ids): return [1]", "TypeError: .*missing 1 required .*'completion_ids'; mend"),
    ],
)
def test_mistakes_of_a_users_function(module, request, code, message):
    name = module(f"user_wrong_{request.node.callspec.indices['code']}", code + "\n")
    with pytest.raises(UserError, match=f"^answer reward {name}:f: " + message.replace("MODULE", name)) as caught:
        score(rewards(function(f"{name}:f")))
    assert "\n" not in str(caught.value)
    if "Error: " in message:
        assert type(caught.value.__cause__).__name__ in message


class Judge:
    """Accepts what contains "yes", has no verdict on "?", and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, questions, references, responses, *, on_score=lambda place, verdict: None):
        self.asked += zip(questions, references, responses, strict=True)
        verdicts = [None if text == "?" else float("yes" in text) for text in responses]
        for place, verdict in enumerate(verdicts):
            if responses[place] == "down":
                raise UserError("judge: the server is down")
            on_score(place, verdict)
        return verdicts


def test_a_judge_is_asked_once_for_equal_contents():
    judge = Judge()
    cached = Cached(judge, {"model": "a"})
    assert cached(["q"] * 4, ["r"] * 4, ["yes", "no", "yes", "?"]) == [1.0, 0.0, 1.0, None]
    assert judge.asked == [("q", "r", "yes"), ("q", "r", "no"), ("q", "r", "?")]
    assert (cached.calls, cached.hits) == (3, 1)
    # Another question, reference or response is another content, and no verdict is asked for again.
    assert cached(["q", "p", "q", "q", "q"], ["r", "r", None, "r", "r"], ["no", "no", "no", "?", "n"]) == [
        *(0.0, 0.0, 0.0, None, 0.0)
    ]
    assert judge.asked[3:] == [("p", "r", "no"), ("q", None, "no"), ("q", "r", "?"), ("q", "r", "n")]
    assert (cached.calls, cached.hits) == (7, 2)


def test_a_column_may_have_any_name(monkeypatch):
    monkeypatch.setattr("ril_engine.judge.judge", lambda settings: Judge())
    rows = [{"question": "q", "answer": "r", "self": 1, "on_score": 2, "lists": 3, "columns": 4}]
    made = rewards({"kind": "judge", "path": "p"}, {"kind": "verifier"})
    assert made.score(rows, ["yes"], [False]) == [Score(1.0, {"judge": 1.0, "verifier": 0.0}, 0)]


def test_verdicts_outlive_a_failure_and_a_kill(tmp_path):
    path = tmp_path / "cache" / "judge.jsonl"
    cached = Cached(Judge(), {"model": "a"}, path)
    with pytest.raises(UserError, match="the server is down"):
        cached(["q"] * 3, ["r"] * 3, ["yes", "down", "no"])  # nothing is closed, as in a kill
    with path.open("a") as file:
        file.write('{"key": "half')
    judge = Judge()
    cached = Cached(judge, {"model": "a"}, path)
    assert cached(["q"] * 3, ["r"] * 3, ["yes", "?", "no"]) == [1.0, None, 0.0]
    assert judge.asked == [("q", "r", "?"), ("q", "r", "no")]
    cached.close()
    assert [json.loads(line)["verdict"] for line in path.read_text().splitlines()] == [1.0, 0.0]
    other = Judge()
    Cached(other, {"model": "b"}, path)(["q"], ["r"], ["yes"])  # another judge asks for itself
    assert other.asked == [("q", "r", "yes")]


def test_a_broken_cache_is_named(tmp_path):
    (tmp_path / "judge.jsonl").write_text('{"key": \n{"key": "a", "verdict": 1.0}\n')
    with pytest.raises(UserError, match=r"judge\.jsonl: line 1 is not JSON .*: remove it"):
        Cached(Judge(), {}, tmp_path / "judge.jsonl")


def test_a_function_that_is_missing_is_told_before_anything_slow():
    names = ({"kind": "verifier"}, {"kind": "function", "function": "no_such_module_at_all:f"})
    with pytest.raises(UserError, match="no_such_module_at_all"):
        require_rewards(Config(rl={"algorithm": "grpo"}, answer_rewards=names))


def test_what_a_verdict_depends_on(monkeypatch):
    def settings(server=None, **others):
        server = {"url": "http://one:1/v1", "model": "m"} | (server or {})
        return verdict_settings(JudgeConfig(server=server, **others))

    same = settings()
    assert same == settings({"url": "http://two:2/v1", "concurrency": 2, "timeout_s": 1, "attempts": 1}, weight=3)
    assert same == settings({"api_key_env": "KEY"}, on_failure="zero")
    assert same != settings({"model": "n"})
    assert same != settings(mode="explain")
    assert settings(mode="explain") != settings(mode="explain", max_new_tokens=3)
    assert same != verdict_settings(JudgeConfig(path="m"))
    assert verdict_settings(JudgeConfig(path="m")) == verdict_settings(JudgeConfig(path="m", micro_batch_tokens=5))
    assert verdict_settings(JudgeConfig(path="m")) != verdict_settings(JudgeConfig(path="n"))
    json.dumps(same)
    monkeypatch.setattr(ril_rewards, "_judging", lambda: "another way to ask")
    assert same != settings()
