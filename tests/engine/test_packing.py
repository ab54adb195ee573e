"""The planner, and packs against positions, rows and layouts written out by hand."""

import time

import numpy as np
import pytest
import torch

from ril_engine.packing import NO_MASK, micro_batches, pack, plan


def tokens_of(groups, micro_batch):
    return sum(groups[g][0] + sum(groups[g][1][i] for i in some) for g, some in micro_batch)


def log_normal_mix(count, seed):
    rng = np.random.default_rng(seed)
    prefix = rng.lognormal(6, 0.6, count).clip(16, 3000).astype(int).tolist()
    responses = rng.lognormal(3.5, 0.7, (count, 8)).clip(1, 300).astype(int).tolist()
    return list(zip(prefix, responses, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 60, 400, 100_000])
def test_every_response_comes_once_within_the_budget(budget, ranks):
    rng = np.random.default_rng(0)
    for _ in range(30):
        groups = [
            (int(rng.integers(0, 80)), rng.integers(0, 30, rng.integers(1, 9)).tolist())
            for _ in range(rng.integers(1, 9))
        ]
        planned = plan(groups, budget, ranks)
        assert len(planned) == ranks and len({len(packs) for packs in planned}) == 1
        packs = [each for packs in planned for each in packs]
        seen = sorted((g, i) for each in packs for g, some in each for i in some)
        assert seen == [(g, i) for g, (_, responses) in enumerate(groups) for i in range(len(responses))]
        for each in packs:
            alone = len(each) == 1 and len(each[0][1]) == 1
            assert tokens_of(groups, each) <= budget or alone
        assert all(packs) or len(seen) < len(packs)  # empty only where there are too few responses


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("budget", [4096, 16384])
def test_100_000_groups(budget, ranks):
    groups = log_normal_mix(100_000, seed=1)
    seconds = []
    for _ in range(3):  # the best, since other work on the machine can only add
        began = time.process_time()
        planned = plan(groups, budget, ranks)
        seconds.append(time.process_time() - began)
    totals = [sum(tokens_of(groups, each) for each in packs) for packs in planned]
    assert sum(totals) >= 0.97 * budget * ranks * len(planned[0])
    assert max(totals) <= 1.02 * min(totals)
    assert min(seconds) < 1
    assert plan(groups, budget, ranks) == planned


def test_ranks_get_alike_of_a_few_packs():
    groups = log_normal_mix(300, seed=2)
    for ranks in (2, 4):
        planned = plan(groups, 16384, ranks)
        totals = [sum(tokens_of(groups, each) for each in packs) for packs in planned]
        assert max(totals) <= 1.02 * min(totals)


def test_a_large_group_is_split_and_repeats_its_prefix():
    (packs,) = plan([(50, [30, 20, 10, 40])], 100)
    assert sorted(tokens_of([(50, [30, 20, 10, 40])], each) for each in packs) == [100, 100]
    assert plan([(50, [60, 1])], 100) == [[[(0, [0])], [(0, [1])]]]  # 110 tokens, but they cannot be split


def test_a_rank_is_empty_only_where_responses_are_too_few():
    assert plan([(5, [1, 1, 1])], 100, 2) == [[[(0, [0, 2])]], [[(0, [1])]]]
    assert plan([(5, [1])], 100, 2) == [[[(0, range(1))]], [[]]]


def test_packings_differ_in_what_shares_a_prefix():
    keys, prefix, own = ["a", "b", "a", "b"], [10, 20, 10, 20], [1, 2, 3, 4]
    assert micro_batches("shared", keys, prefix, own, budget=40) == [[[1, 3, 0, 2]]]
    assert micro_batches("shared", keys, prefix, own, budget=39) == [[[1, 3], [0, 2]]]
    assert micro_batches("packed", keys, prefix, own, budget=40) == [[[3, 0], [1, 2]]]
    assert micro_batches("padded", keys, prefix, own, budget=47) == [[[0], [1], [2], [3]]]
    assert micro_batches("padded", keys, prefix, own, budget=48) == [[[0, 2], [1, 3]]]


def test_a_pack_by_hand():
    first = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3)}
    second = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1)}
    inputs, spans = pack([(first, [[1, 2], [], [3]]), (second, [[4]])])
    assert inputs["input_ids"].tolist() == [[7, 8, 9, 1, 2, 3, 5, 4]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 0, 1]]
    assert inputs["attention_mask"] is NO_MASK
    assert inputs["pack_layout"].starts.tolist() == [0, 3, 5, 6, 7, 8]
    assert inputs["pack_layout"].prefix.tolist() == [0, 0, 0, 3, 3]
    assert spans == [(2, 3, 2), (2, 5, 0), (2, 5, 1), (6, 7, 1)]
    assert set(inputs) == {"input_ids", "position_ids", "attention_mask", "pack_layout"}


def test_positions_and_pixels_of_pictures():
    """M-RoPE: after a picture of 2 x 3 tokens at position 1 the text goes on at 4, on all three axes."""

    def rope_index(input_ids, mm_token_type_ids, image_grid_thw=None, **_):
        assert mm_token_type_ids.shape == input_ids.shape and image_grid_thw is not None
        rows, columns = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
        picture = torch.stack([torch.zeros(2, 3), rows, columns]).flatten(1).long() + 1
        return torch.cat([torch.zeros(3, 1), picture, torch.full((3, 1), 4)], dim=1).long()[:, None], None

    picture = {
        "input_ids": torch.tensor([[1, 0, 0, 0, 0, 0, 0, 2]]),
        "mm_token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0]]),
        "pixel_values": torch.full((24, 3), 0.5),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }
    words = {"input_ids": torch.tensor([[1, 2]])}
    inputs, _ = pack([(picture, [[3, 4], [5]]), (words, [[6]]), (picture, [[7]])], rope_index)
    assert inputs["position_ids"].shape == (3, 1, 23)
    whole = [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]
    assert inputs["position_ids"][:, 0].tolist() == [[*axis, 5, 6, 5, 0, 1, 2, *axis, 5] for axis in whole]
    assert inputs["pixel_values"].shape == (48, 3) and inputs["image_grid_thw"].tolist() == [[1, 4, 6]] * 2


def test_prompts_that_cannot_be_packed():
    with pytest.raises(ValueError, match="groups: got a prompt without tokens, expected one or more"):
        pack([({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, [[1]])])
    picture = {"input_ids": torch.tensor([[0]]), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    with pytest.raises(ValueError, match="got a prompt with a picture and without mm_token_type_ids, expected both"):
        pack([(picture, [[1]])], lambda **_: None)
