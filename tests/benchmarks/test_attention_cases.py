import pytest
import torch

from benchmarks import attention_cases, runner
from benchmarks.case import BOTH, NO_GRAD


def test_candidates_are_right_and_counted():
    case = attention_cases.prefix_attention_case("small", [(8, [3, 5]), (0, [4])], torch.float32, "cpu")
    assert runner.wrong(case) == {}
    # A token reads itself and those before it (36 + 6 + 15 + 10 pairs), a response's the prefix too (8 * 8).
    num_query, _, head_size = attention_cases.HEADS
    assert case.flops == {NO_GRAD: 4 * 131 * num_query * head_size, BOTH: 14 * 131 * num_query * head_size}
    for forms in case.floors.values():
        for form in forms:
            form()


def test_a_wrong_candidate_is_seen():
    case = attention_cases.prefix_attention_case("small", [(8, [3, 5])], torch.float32, "cpu")
    case.candidates["twice"] = lambda **inputs: 2 * attention_cases.by_response(**inputs)
    assert list(runner.wrong(case)) == ["twice"]


def test_growth_is_one_problem_in_sizes_and_fits_an_exponent():
    case = attention_cases.growth_case((512, 1024), torch.float32, "cpu")
    assert runner.wrong(case) == {} and case.tokens == {"T=512": 512, "T=1024": 1024}
    numbers = runner.measure(case, "cpu", 1)
    assert numbers["T=512", BOTH]["exponent"] == numbers["T=1024", BOTH]["exponent"]
    assert numbers["T=1024", BOTH]["peak_mib"] < 3 * numbers["T=512", BOTH]["peak_mib"]


def test_exponent():
    seconds = {"a": [3.0, 3.0], "b": [12.0, 12.0], "c": [48.0, 48.0]}
    assert runner._exponent({"a": 10, "b": 20, "c": 40}, seconds) == pytest.approx(2)
