from functools import partial

import pytest
import torch

from benchmarks import packing_cases, runner
from benchmarks.case import BOTH
from ril_engine import families
from ril_kernels import PackLayout, prefix_attention

one_layer = partial(packing_cases.qwen2_5_vl, layers=1)


@pytest.fixture(scope="module")
def case():
    return packing_cases.policy_pack_case("small", (2, 4), 14, 5, one_layer)


def test_candidates_are_right_and_counted(case):
    assert runner.wrong(case) == {}
    # The last token of a response predicts nothing, and only padded rows hold it.
    assert case.tokens == {"padded": 8 * (14 + 5), "packed": 8 * (14 + 4), "shared": 14 + 8 * 4}
    assert case.baseline == "padded"
    attention, mlp = 2 * 384 * 384 + 2 * 384 * 128, 3 * 384 * 2048
    patches, merged = 32, 8
    vision = patches * (4 * 256 * 256 + 3 * 256 * 684) + merged * (1024 * 1024 + 1024 * 384)
    head = 8 * 5 * 384 * packing_cases.VOCABULARY
    assert case.flops == {BOTH: 6 * (46 * (attention + mlp) + vision + head)}
    for form in case.floors[BOTH]:
        form()


def test_responses_that_read_each_other_are_seen(case, monkeypatch):
    def leaky(query, key, value, *, layout, scale):
        return prefix_attention(query, key, value, layout=PackLayout.from_groups([(len(query), [])]), scale=scale)

    monkeypatch.setattr(families, "prefix_attention", leaky)
    assert "shared" in runner.wrong(case)


def test_text_alone_has_no_gradient_in_the_vision_tower():
    case = packing_cases.policy_pack_case("small", (0, 0), 1, 4, one_layer)
    assert runner.wrong(case) == {}
    assert not any("visual" in name for name in case.grad)
    rows = runner.rows_of(case, runner.measure(case, "cpu", 1), 1, {})
    both = {row["candidate"]: row for row in rows if row["pass"] == BOTH}
    assert [both[name]["tokens"] for name in case.candidates] == [40, 32, 25]
    assert both["padded"]["ratio"]["p50"] == 1 and "tokens" not in both["floor"]


def test_the_model_has_about_20_million_parameters():
    assert sum(each.numel() for each in packing_cases.qwen2_5_vl().parameters()) == pytest.approx(20e6, rel=0.1)


def test_the_pictures_of_the_sizes_fit_their_prompts():
    for picture, prompt, _ in packing_cases.SIZES.values():
        encoded = packing_cases.prompt(picture, prompt)
        assert encoded["input_ids"].shape == (1, prompt)
        assert int((encoded["input_ids"] == packing_cases.IMAGE).sum()) == picture[0] * picture[1]
        if picture[0]:
            assert torch.equal(encoded["image_grid_thw"], torch.tensor([[1, 2 * picture[0], 2 * picture[1]]]))
