import torch

from benchmarks import attention_cases, runner
from benchmarks.cases import BOTH, NO_GRAD


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


def test_scaling_fits_an_exponent():
    result = attention_cases.scaling(tokens=(512, 1024), rounds=1)
    assert list(result["seconds"]) == [512, 1024] and 0 < result["exponent"] < 3
