"""PackLayout: what it says of a pack, the index tensors that it makes, and what it refuses."""

import pytest
import torch

from ril_kernels import PackLayout


def test_layout():
    layout = PackLayout.from_groups([(3, [2, 1]), (0, [4]), (5, [])])
    assert layout.starts.tolist() == [0, 3, 5, 6, 10, 15]
    assert layout.prefix.tolist() == [0, 0, 0, 3, 4]
    assert layout.num_tokens == 15


def test_index_tensors_are_made_once():
    layout = PackLayout.from_groups([(3, [2, 1]), (2, [4])])
    meta = torch.device("meta")
    assert layout.plan(meta) is layout.plan(meta) and layout.plan(meta).own.cu_keys.device == meta
    plan = layout.plan(torch.device("cpu"))
    assert plan.own.cu_queries.tolist() == [0, 3, 5, 6, 8, 12] and plan.own.max_keys == 4
    # The three tokens that read the first prefix are one sequence, the four that read the second another.
    assert plan.shared.cu_queries.tolist() == [0, 3, 7] and plan.shared.cu_keys.tolist() == [0, 3, 5]
    assert plan.readers.tolist() == [3, 4, 5, 8, 9, 10, 11] and plan.prefixes.tolist() == [0, 1, 2, 6, 7]
    one = PackLayout.from_groups([(3, [2, 1])]).plan(torch.device("cpu"))
    assert (one.readers, one.prefixes) == (slice(3, 6), slice(0, 3))  # views


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], r"groups: got no token, expected at least one\. Skip an empty pack"),
        ([(0, [])], r"groups: got no token"),
        ([(2, [1]), (-1, [1])], r"groups\[1\]: got \(-1, \[1\]\), expected a prefix of at least 0"),
        ([(2, [1, 0])], r"groups\[0\]: got \(2, \[1, 0\]\), .*responses of at least 1\. Leave out empty responses"),
    ],
)
def test_group_errors(groups, message):
    with pytest.raises(ValueError, match=message):
        PackLayout.from_groups(groups)


@pytest.mark.parametrize(
    ("starts", "prefix", "error", "message"),
    [
        ([0, 2], torch.tensor([0]), TypeError, r"starts: got list, expected a torch\.Tensor\. PackLayout\.from_groups"),
        (torch.tensor([0.0, 2.0]), torch.tensor([0]), TypeError, r"starts: got dtype float32, expected int64"),
        (torch.tensor([0, 2], device="meta"), torch.tensor([0]), ValueError, r"starts: got device meta, .*CPU.*known"),
        (torch.tensor([0]), torch.tensor([0]), ValueError, r"starts: got shape \(1,\), expected \(S \+ 1,\)"),
        (torch.tensor([1, 2]), torch.tensor([0]), ValueError, r"starts: got \[1, 2\], expected offsets that begin at"),
        (torch.tensor([0, 2, 2]), torch.tensor([0, 1]), ValueError, r"starts: got \[0, 2, 2\], .*and rise"),
        (torch.tensor([0, 2]), torch.tensor([0, 1]), ValueError, r"prefix: got shape \(2,\), .*S = 1 as in starts"),
        (torch.tensor([0, 2]), torch.tensor([1]), ValueError, r"prefix: got \[1\], expected segments in \[0, 1\)"),
        (torch.tensor([0, 2, 3, 4]), torch.tensor([0, 0, 1]), ValueError, r"prefix: got \[0, 0, 1\], .*nothing but th"),
    ],
)
def test_layout_errors(starts, prefix, error, message):
    with pytest.raises(error, match=message):
        PackLayout(starts, prefix)
