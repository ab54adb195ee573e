from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import packing_cases, runner
from benchmarks.case import BOTH
from ril_engine import families
from ril_engine.rollout.graphs import Graphs
from ril_kernels import PackLayout, prefix_attention

one_layer = partial(packing_cases.qwen2_5_vl, layers=1)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def case(request):
    return packing_cases.policy_pack_case("small", (2, 4), 14, 5, one_layer, request.param, "cpu")


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
    case = packing_cases.policy_pack_case("small", (0, 0), 1, 4, one_layer, torch.float32, "cpu")
    assert runner.wrong(case) == {}
    assert not any("visual" in name for name in case.grad)
    rows = runner.rows_of(case, runner.measure(case, "cpu", 1), 1, {})
    both = {row["candidate"]: row for row in rows if row["pass"] == BOTH}
    assert [both[name]["tokens"] for name in case.candidates] == [40, 32, 25]
    assert both["padded"]["ratio"]["p50"] == 1 and "tokens" not in both["floor"]


def test_all_that_packs_read_is_on_the_device():
    """Ops refuse to mix a CPU's tensors with those of the meta device, which have no values and need no GPU. In padded
    rows Hugging Face's own code reads the mask on the host."""
    case = packing_cases.policy_pack_case("small", (0, 0), 1, 4, one_layer, torch.bfloat16, "meta")
    for name in ("packed", "shared"):
        results = runner._results(case, case.candidates[name], case.inputs)
        assert [each.device.type for each in results] == ["meta"] * (1 + len(case.grad))
        assert [each.dtype for each in results] == [torch.float32, *[torch.bfloat16] * len(case.grad)]
    case.floors[BOTH][0]()


def test_a_graph_hides_nothing_from_hooks():
    layer = torch.nn.Linear(2, 3)
    on_gpu = SimpleNamespace(is_cuda=True)  # of which Graphs would capture the step
    found = packing_cases.linear_layers(layer, lambda: Graphs().run("key", lambda: layer(torch.ones(4, 2)), [on_gpu]))
    assert found == {(4, 2, 3): 1}


def test_the_model_has_about_20_million_parameters():
    assert sum(each.numel() for each in packing_cases.qwen2_5_vl().parameters()) == pytest.approx(20e6, rel=0.1)


def test_the_wide_model_is_a_slice_of_the_3b():
    """Per layer, the 3B has 75.5M in the language model (36 layers of its 3.09B less 311M of embeddings)."""
    with torch.device("meta"):
        one, two = (packing_cases.qwen2_5_vl(layers, packing_cases.OF_3B).model.language_model for layers in (1, 2))
    sizes = [sum(each.numel() for each in model.parameters()) for model in (one, two)]
    assert sizes[1] - sizes[0] == pytest.approx((3.09e9 - 151_936 * 2048) / 36, rel=0.01)


def test_the_pictures_of_the_sizes_fit_their_prompts():
    for picture, prompt, _ in packing_cases.SIZES.values():
        encoded = packing_cases.prompt(picture, prompt)
        assert encoded["input_ids"].shape == (1, prompt)
        assert int((encoded["input_ids"] == packing_cases.IMAGE).sum()) == picture[0] * picture[1]
        if picture[0]:
            assert torch.equal(encoded["image_grid_thw"], torch.tensor([[1, 2 * picture[0], 2 * picture[1]]]))
