"""verl 0.9 with `token_logprob` behind its fused kernels, and RIL's policy loss under the name "ril".

In every process of the job, as verl starts:

    export VERL_USE_EXTERNAL_MODULES=ril_engine.integrations.verl

and in its config `actor_rollout_ref.model.use_fused_kernels=True` (either backend),
`actor_rollout_ref.actor.policy_loss.loss_mode=ril`. B sequences, S positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.utils.experimental import torch_functional
from verl.utils.kernel import linear_cross_entropy as triton_backend

from ril_kernels import token_logprob
from ril_kernels.policy_loss.reference import LossSettings, TokenTerms, policy_terms

_theirs = triton_backend.linear_cross_entropy


def linear_cross_entropy(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group=None,
) -> tuple[Tensor, Tensor]:  # (T,), (T,)
    """What verl's Triton backend and its Megatron models call; T is the product of the leading sizes. A head that is
    split over ranks is left to verl's own kernel."""
    if reduction != "none" or (dist_process_group is not None and dist_process_group.size() > 1):
        return _theirs(hidden, weight, labels, temperature, reduction, dist_process_group)  # a part of a head alone
    labels = labels.reshape(-1).long()
    return token_logprob(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels, temperature=temperature, return_entropy=True
    )


def _fused_linear(self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0):
    logprobs, entropy = linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)
    return logprobs.view(input_ids.shape), entropy.view(input_ids.shape).to(hidden_states.dtype)


triton_backend.linear_cross_entropy = linear_cross_entropy
torch_functional.FusedLinearForPPO.forward = _fused_linear


@register_policy_loss("ril")
def policy_loss(
    old_log_prob: Tensor,  # (B, S)
    log_prob: Tensor,  # (B, S)
    advantages: Tensor,  # (B, S)
    response_mask: Tensor,  # (B, S)
    loss_agg_mode: str = "seq-mean-token-sum-norm",
    config=None,
    rollout_is_weights: Tensor | None = None,  # (B, S)
) -> tuple[Tensor, dict]:
    """RIL's clipped loss (arXiv 2510.19307, Algorithm 2) of all responses, teachers' too: Dr.GRPO's with
    `seq-mean-token-sum-norm` and the response limit as `loss_scale_factor`. A token whose old log-prob is NaN, such as
    a teacher's that nobody sampled, has a ratio of 1. No dual clip.
    """
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    mask = response_mask.bool()
    # Every way of verl's to add up the tokens is linear, so its gradient is the weight of each of them.
    ones = torch.zeros_like(log_prob, requires_grad=True)
    with torch.enable_grad():
        total = agg_loss(ones, response_mask, loss_agg_mode, **config.global_batch_info)
    (weight,) = torch.autograd.grad(total, ones)
    terms = TokenTerms(
        advantages=advantages.flatten(),
        weight=weight.flatten(),
        mask=mask.flatten(),
        kl_mask=mask.flatten(),
        behavior_logprobs=torch.where(old_log_prob.isnan(), log_prob.detach(), old_log_prob).flatten(),
        reference_logprobs=None,
        sampler_logprobs=None,
        importance_weights=None if rollout_is_weights is None else rollout_is_weights.flatten(),
    )
    settings = LossSettings(0.0, low, high, None, "dr_grpo", "k3", 0.0, None, 1.0, 1.05, norm=1.0, kl_norm=1.0)
    loss, ratios = policy_terms(log_prob.flatten(), torch.zeros_like(terms.advantages), terms, settings)
    counted = mask.sum().clamp(min=1)
    clipped = (ratios.stopped & terms.mask).sum() / counted
    kl = -(ratios.ratio.detach().log() * terms.mask).sum() / counted
    return loss, {"actor/pg_clipfrac": float(clipped), "actor/ppo_kl": float(kl), "actor/pg_clipfrac_lower": 0.0}
