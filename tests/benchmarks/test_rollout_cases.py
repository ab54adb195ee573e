"""The benchmark of generation: greedy tokens, the cache that prompts share, where the time went."""

from functools import partial

import pytest
import torch

from benchmarks import packing_cases, rollout_cases, runner


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def case(request):
    one_layer = partial(packing_cases.qwen2_5_vl, layers=1)
    return rollout_cases.rollout_case("small", (2, 4), 14, one_layer, request.param, "cpu")


def test_answers_are_right_and_counted(case):
    assert runner.wrong(case) == {}
    if case.dtype == torch.float32:
        theirs, ours = (each() for each in case.candidates.values())
        assert torch.equal(theirs, ours)
    theirs, ours = case.notes["reference"], case.notes["ril_engine"]
    token = 2 * 2 * 64 * case.dtype.itemsize / 2**20  # MiB of one layer's key and value
    assert theirs["cache_mib"] == pytest.approx(64 * (14 + 32 - 1) * token)
    assert ours["cache_mib"] == pytest.approx(16 * (16 + 4 * 32) * token)  # a prompt's slots are multiples of 16
    assert sum(ours["phase_share"].values()) == pytest.approx(1)
    assert set(ours["phase_share"]) == {"prefill", "decode", "sampling", "python"}


def test_another_answer_is_seen(case):
    other = case.candidates["ril_engine"]().clone()
    other[3, 5] += 1
    case.candidates["wrong"] = lambda: other
    try:
        assert set(runner.wrong(case)) == {"wrong"}
    finally:
        del case.candidates["wrong"]


def test_what_was_not_allowed_is_infinitely_wrong(case):
    answers = torch.full((rollout_cases.QUESTIONS * rollout_cases.SAMPLES, 2), rollout_cases.BANNED[-1])
    assert case.judge(answers) == torch.inf


def test_rows_say_the_dtype(case):
    (row,) = runner.rows_of(case, {("reference", "no-grad"): {}}, 1, {})
    assert row["dtype"] == str(case.dtype).removeprefix("torch.")


def test_floor_counts_prompts_once(case):
    """19M without the tower's 5M and three of four layers; at least the head of every answer's 32 tokens."""
    head = 2 * 384 * packing_cases.VOCABULARY
    assert case.flops["no-grad"] > 64 * 31 * head
    assert case.flops["no-grad"] < 64 * 31 * 2 * 8e6 + 16 * 14 * 2 * 8e6 + torch.finfo().eps
    case.floors["no-grad"][0]()
