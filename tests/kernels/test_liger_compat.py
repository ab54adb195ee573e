"""liger_compat against the class of that name in Liger-Kernel 0.8.5: one call, the same loss, metrics, gradients."""

import inspect

import pytest
import torch

from ril_kernels.liger_compat import LigerFusedLinearGRPOLoss as Ours

liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason="liger-kernel (extra `dev`) is not installed")
Theirs = liger.LigerFusedLinearGRPOLoss

B, L, H, V = 4, 6, 12, 53


def make_batch(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight, states = normal(V, H) * 0.4, normal(B, L, H)
    ids = torch.randint(V, (B, L), generator=generator)
    policy = (states @ weight.T).log_softmax(-1).gather(2, ids[..., None])[..., 0]
    return {
        "_input": states,
        "lin_weight": weight,
        "selected_token_ids": ids,
        "attention_mask": (torch.arange(L) < torch.tensor([6, 3, 1, 5])[:, None]).long(),
        "advantages": torch.tensor([1.0, -0.5, 0.0, 0.8]),
        "bias": 0.1 * normal(V),
        "ref_per_token_logps": policy + 0.3 * normal(B, L),
        "old_per_token_logps": policy + 0.4 * normal(B, L),
        "vllm_is_ratio": (0.2 * normal(B, L)).exp(),
    }


def results(loss_class: type, options: dict, batch: dict) -> tuple:
    names = [name for name in ("_input", "lin_weight", "bias") if batch.get(name) is not None]
    values = {name: batch[name].clone().requires_grad_() for name in names}
    loss, metrics = loss_class(**{"compiled": False, **options})(**{**batch, **values})
    return loss.detach(), torch.autograd.grad(2 * loss, values.values()), metrics


def assert_equal(options: dict, batch: dict) -> None:
    loss, gradients, metrics = results(Theirs, options, batch)
    our_loss, our_gradients, our_metrics = results(Ours, options, batch)
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(our_gradients, gradients, strict=True):
        scale = float(theirs.abs().max())
        assert scale > 1e-4
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * scale)
    assert len(our_metrics) == len(metrics)
    for ours, theirs in zip(our_metrics, metrics, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("off_policy", [False, True], ids=["on_policy", "off_policy"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_equal_to_liger(loss_type, level, beta, off_policy):
    if level == "sequence" and loss_type in ("cispo", "sapo"):
        with pytest.raises(ValueError, match="ratio_level: got 'sequence' with loss_type"):
            results(Ours, {"loss_type": loss_type, "importance_sampling_level": level}, make_batch())
        return
    options = {"loss_type": loss_type, "beta": beta, "max_completion_length": 9, "temperature": 0.8}
    options |= {"importance_sampling_level": level, "epsilon_high": 1.1 if loss_type == "cispo" else 0.28}
    batch = {**make_batch(), "vllm_is_ratio": None}
    if not off_policy:
        batch["old_per_token_logps"] = None
    assert_equal(options, batch)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"delta": 1.5}, {}),
        ({"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 1.4, "delta": 1.5}, {}),
        ({"loss_type": "dapo"}, {"num_items_in_batch": torch.tensor(40)}),
        ({"loss_type": "cispo"}, {"num_items_in_batch": 40}),
        ({}, {"vllm_is_ratio": torch.tensor([[0.5], [1.0], [2.0], [1.5]])}),
        ({}, {"bias": None}),
        ({"beta": 0.1}, {"ref_per_token_logps": None, "ref_input": make_batch(1)["_input"],
                         "ref_weight": make_batch(1)["lin_weight"], "ref_bias": make_batch(1)["bias"]}),
    ],
)  # fmt: skip
def test_options_equal_to_liger(options, changes):
    assert_equal(options, {**make_batch(), **changes})


def test_the_signatures_are_ligers():
    for name in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(each, name)).parameters for each in (Ours, Theirs))
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "luspo"}, r"loss_type: got 'luspo', expected one of 'grpo', .*Use Liger's own class"),
        ({"loss_type": "vespo"}, r"loss_type: got 'vespo', expected one of"),
        ({"use_bias_correction_kl": True}, r"use_bias_correction_kl: got True, expected False"),
        ({"vespo_k_pos": 1.0}, r"vespo_\*: got a value, expected Liger's defaults"),
        ({"importance_sampling_level": "word"}, r"importance_sampling_level: got 'word', expected one of 'token'"),
        ({"loss_type": "dr_grpo"}, r"max_completion_length: got None, expected a number with loss_type 'dr_grpo'"),
    ],
)
def test_what_is_missing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Ours(**options)


def test_a_missing_reference_is_refused():
    batch = {**make_batch(), "ref_per_token_logps": None}
    with pytest.raises(ValueError, match="ref_per_token_logps: got neither ref_per_token_logps nor ref_input"):
        Ours()(**batch)
