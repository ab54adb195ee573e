"""policy_loss against TRL 1.16's own GRPOTrainer._compute_loss: the same model, batch, loss and gradients.

TRL runs its real code on a real tiny Qwen2 with TRL's fused LM head; only the trainer around it is left out
(an object made by __new__ that holds the attributes which _compute_loss reads). Ours takes the hidden states
of the same model, packed to the completion tokens, and its lm_head. All parameters' gradients are compared.

How TRL's normalisers map to ours, with B sequences in the call (2G x Q) and L = max_completion_length:
  dr_grpo: sum over tokens / (B x L)                      ->  loss_type "dr_grpo", norm = B x L
  grpo, sapo:  mean over sequences of each one's mean     ->  the same loss_type,  norm = B
  bnpo, dapo, cispo:  sum over tokens / number of tokens  ->  the same loss_type,  norm = number of tokens
TRL adds beta x k3 to the per-token loss before it normalises: our defaults kl_mask = mask, kl_norm = norm.
"""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from ril_kernels import policy_loss

pytest.importorskip("trl", reason="TRL (extra `dev`, Python 3.11 or later) is not installed")
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

SEQUENCES, PROMPT, COMPLETION, VOCAB, MAX_COMPLETION, TEMPERATURE = 6, 3, 5, 37, 8, 0.9
CLIP_LOW, CLIP_HIGH, CISPO_HIGH = 0.2, 0.28, 1.2
SAPO = {"sapo_temperature_pos": 0.9, "sapo_temperature_neg": 1.1}


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        initializer_range=0.3,  # logits far from uniform
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config).train()
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    return model


def make_batch(off_policy: bool) -> dict:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, 2, 4, 1, 3, 5])
    shape = (SEQUENCES, COMPLETION)
    batch = {
        "prompt_ids": torch.randint(VOCAB, (SEQUENCES, PROMPT), generator=generator),
        "prompt_mask": torch.ones(SEQUENCES, PROMPT, dtype=torch.int64),
        "completion_ids": torch.randint(VOCAB, shape, generator=generator),
        "completion_mask": (torch.arange(COMPLETION) < lengths[:, None]).long(),
        "advantages": torch.randn(SEQUENCES, generator=generator),
        "ref_per_token_logps": -3 + torch.randn(shape, generator=generator),
    }
    if off_policy:
        batch["noise"] = 0.4 * torch.randn(shape, generator=generator)
    return batch


def trl_trainer(model: Qwen2ForCausalLM, loss_type: str, beta: float, level: str, delta: float | None) -> GRPOTrainer:
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.__dict__.update(
        model=model,
        loss_type=loss_type,
        beta=beta,
        epsilon_low=CLIP_LOW,
        epsilon_high=CISPO_HIGH if loss_type == "cispo" else CLIP_HIGH,
        max_completion_length=MAX_COMPLETION,
        importance_sampling_level=level,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1, **SAPO),
        accelerator=SimpleNamespace(
            num_processes=1,
            is_main_process=False,
            autocast=nullcontext,
            reduce=lambda value, reduction: value,
            gather=lambda value: value,
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    return trainer


def gradients(model: Qwen2ForCausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("off_policy", [False, True], ids=["on_policy", "off_policy"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize(
    ("loss_type", "level", "delta"),
    [(name, "token", None) for name in ("dr_grpo", "grpo", "bnpo", "dapo", "cispo", "sapo")]
    + [("grpo", "sequence", None), ("dr_grpo", "sequence", None), ("dapo", "token", 1.4)],
)
def test_equal_to_trl(model, loss_type, level, delta, beta, off_policy):
    batch = make_batch(off_policy)
    tokens = batch["completion_mask"].sum()
    batch["num_items_in_batch"] = tokens
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    mask = batch["completion_mask"].bool()

    trainer = trl_trainer(model, loss_type, beta, level, delta)
    if off_policy:
        with torch.no_grad():
            policy, _, _ = trainer._get_per_token_logps_and_entropies(model, input_ids, attention_mask, COMPLETION)
        batch["old_per_token_logps"] = policy + batch.pop("noise")
    expected_loss = trainer._compute_loss(model, batch)
    expected = gradients(model, expected_loss)

    states = model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    behavior = batch["old_per_token_logps"][mask] if off_policy else None
    loss, metrics = policy_loss(
        states[:, PROMPT - 1 : -1][mask],  # the state before each completion token predicts it
        model.lm_head.weight,
        batch["completion_ids"][mask],
        response_index=torch.arange(SEQUENCES)[:, None].expand(-1, COMPLETION)[mask],
        advantages=batch["advantages"],
        behavior_logprobs=behavior,
        reference_logprobs=batch["ref_per_token_logps"][mask],
        beta=beta,
        clip_low=CLIP_LOW,
        clip_high=trainer.epsilon_high,
        clip_max=delta,
        ratio_level=level,
        loss_type=loss_type,
        norm={"dr_grpo": SEQUENCES * MAX_COMPLETION, "grpo": SEQUENCES, "sapo": SEQUENCES}.get(loss_type, int(tokens)),
        **SAPO,
        temperature=TEMPERATURE,
    )

    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    actual = gradients(model, loss)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 1e-2  # a comparison of zeros would prove nothing
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-6 * max(1.0, scale), msg=name)

    reported = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert float(metrics.entropy) == pytest.approx(reported["entropy"], abs=1e-6)
    if level == "sequence" or loss_type in ("cispo", "sapo"):
        return  # TRL reports these by sequence, or under other names
    assert float(metrics.clip_low_fraction) == pytest.approx(reported["clip_ratio/low_mean"], abs=1e-6)
    assert float(metrics.clip_high_fraction) == pytest.approx(reported["clip_ratio/high_mean"], abs=1e-6)
    if beta:
        assert float(metrics.kl) == pytest.approx(reported["kl"], rel=1e-5)
    if off_policy:
        assert metrics.clip_low_fraction > 0 and metrics.clip_high_fraction > 0
