"""How a question's teacher responses are divided among several teachers."""

from collections import Counter

import pytest
import torch

from ril_engine.config import Config
from ril_engine.teachers import divide, needed, weights_of

PLENTY = 99


def config(group_size: int = 4, per_question: int = 16, **teachers: dict) -> Config:
    """Teachers by name, each with its settings; one without a source is generated here."""
    named = [{"name": name, "path": "" if "responses" in each else "p", **each} for name, each in teachers.items()]
    settings = {"teachers": named, "rl": {"group_size": group_size}, "responses": {"per_question": per_question}}
    return Config.model_validate(settings)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("weights", [(1, 2, 5), (1, 2, 4), (0.1, 0.2, 0.7), (1, 1, 1), (3, 3, 0.5)])
def test_the_long_run_shares_are_the_weights_and_each_draw_is_floor_or_ceil(weights):
    weights = weights_of(config(**{name: {"weight": weight} for name, weight in zip("abc", weights, strict=True)}))
    total, draws, given = sum(weights.values()), 8000, Counter()
    for seed in range(draws):
        counts = divide(4, weights, dict.fromkeys(weights, PLENTY), generator(seed))
        assert sum(counts.values()) == 4
        for name, count in counts.items():
            assert abs(count - 4 * weights[name] / total) < 1
        given.update(counts)
    for name in weights:  # the deviation of a count is 0.5 at most, so that of the mean 0.0056
        assert given[name] / draws == pytest.approx(float(4 * weights[name] / total), abs=0.025)


def test_equal_weights_draw_as_one_permutation_does():
    for seed in range(50):
        drawing = generator(seed)
        counts = divide(6, weights_of(config(a={}, b={}, c={}, d={})), dict.fromkeys("abcd", PLENTY), drawing)
        alone = generator(seed)
        order = ["abcd"[i] for i in torch.randperm(4, generator=alone).tolist()]
        assert list(counts.items()) == [(name, 2 if place < 2 else 1) for place, name in enumerate(order)]
        assert torch.equal(drawing.get_state(), alone.get_state())  # what is drawn next does not change either


def test_the_same_seed_divides_alike():
    weights = weights_of(config(a={"weight": 1}, b={"weight": 2}, c={"weight": 4}))
    one, two = (
        [divide(4, weights, dict.fromkeys("abc", PLENTY), generator(seed)) for seed in range(20)] for _ in range(2)
    )
    assert one == two and len({tuple(sorted(each.items())) for each in one}) > 1


def test_none_gives_more_than_it_has_and_the_others_give_the_rest():
    weights = weights_of(config(a={"weight": 8}, b={"weight": 1}, c={"weight": 1}))
    for seed in range(50):
        counts = divide(10, weights, {"a": 3, "b": 2, "c": PLENTY}, generator(seed))
        assert counts == {"a": 3, "b": 2, "c": 5}
        assert divide(10, weights, {"a": 3, "b": 2, "c": 1}, generator(seed)) == {"a": 3, "b": 2, "c": 1}


def test_what_a_file_must_have():
    file = {"responses": "r.jsonl"}
    assert needed(config(a=file)) == {"a": 4}
    assert needed(config(a=file, b={})) == {"a": 2}
    assert needed(config(a={**file, "weight": 5}, b={}, c={"weight": 2})) == {"a": 3}  # ceil of 4 x 5/8
    tenths = {name: {**file, "weight": weight} for name, weight in (("a", 0.1), ("b", 0.2), ("c", 0.7))}
    assert needed(config(group_size=10, **tenths)) == {"a": 1, "b": 2, "c": 7}  # of the floats next to them a had 2
    assert needed(config(a=file, b={}, per_question=1)) == {"a": 3}  # the other one has no more
    assert needed(config(a=file, b={**file, "weight": 3}, c={}, per_question=1, group_size=8)) == {"a": 2, "b": 5}
