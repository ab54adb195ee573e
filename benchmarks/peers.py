"""The ops as PyTorch and other libraries have them, each where it is installed and applies.

T packed tokens, H hidden, V vocabulary, N responses of L tokens each (so that padded peers pad nothing).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ril_kernels.policy_loss.advantages import group_advantages
from ril_kernels.policy_loss.reference import LossSettings, TokenTerms, policy_terms
from ril_kernels.token_logprob.reference import token_logprob_reference

try:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, selective_log_softmax
except ImportError:
    ChunkedLogProbFunction = None
try:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction
except ImportError:
    LigerFusedLinearGRPOLoss = None
try:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy
except ImportError:
    cut_cross_entropy = None
try:
    from transformers import generation
except ImportError:
    generation = None


def logprob_peers(device: str) -> dict[str, Callable[..., Tensor]]:
    """hidden, lm_head, target -> log-prob (T,)."""
    # Dynamic shapes on a CPU: one compilation of 10 seconds instead of one per model.
    peers = {"torch.compile(reference)": torch.compile(_eager_logprob, dynamic=device == "cpu")}
    peers["F.linear_cross_entropy"] = lambda hidden, lm_head, target: (
        -F.linear_cross_entropy(hidden, lm_head, target, reduction="none", options=torch.nn.LinearCrossEntropyOptions())
    )
    if ChunkedLogProbFunction is not None:
        peers["TRL ChunkedLogProbFunction"] = trl_chunked
        peers["TRL selective_log_softmax"] = lambda hidden, lm_head, target: selective_log_softmax(
            hidden @ lm_head.T, target
        )
    if LigerFusedLinearGRPOLoss is not None:
        peers["Liger scaled cross-entropy"] = lambda hidden, lm_head, target: (
            -_first(LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, lm_head, target))
        )
    if cut_cross_entropy is not None and device == "cuda":  # without a GPU it is torch.compile under another name
        peers["cut-cross-entropy"] = lambda hidden, lm_head, target: (
            -cut_cross_entropy(hidden, lm_head, target, reduction="none")
        )
    return peers


def loss_peers(device: str) -> dict[str, Callable[..., Tensor]]:
    """The arguments of policy_loss -> its loss. All start from rewards, as policy_loss does."""

    compiled = torch.compile(_eager_loss, dynamic=device == "cpu")
    peers = {
        "torch.compile(reference)": lambda hidden, lm_head, target, **rest: compiled(
            hidden, lm_head, target, *_terms(**rest)
        )
    }
    if ChunkedLogProbFunction is not None:

        def on_trl(hidden: Tensor, lm_head: Tensor, target: Tensor, **rest) -> Tensor:
            policy = trl_chunked(hidden, lm_head, target)
            return policy_terms(policy, torch.zeros_like(policy), *_terms(**rest))[0]

        peers["TRL ChunkedLogProbFunction, our terms"] = on_trl
    if LigerFusedLinearGRPOLoss is not None:
        peers["Liger GRPO loss"] = _liger_loss(compiled=device == "cuda")
    return peers


def discriminator_peers(device: str) -> dict[str, Callable[..., Tensor]]:
    """The arguments of discriminator_head with final_norm="rms" -> its loss, by PyTorch's own norm, linear and loss."""
    compiled = torch.compile(_eager_discriminator_loss, dynamic=device == "cpu")
    return {"eager F.rms_norm": _eager_discriminator_loss, "torch.compile(eager)": compiled}


def sampling_peers(
    eager: Callable[..., Tensor],  # logits (B, V) -> both log-probs (2, B), by the definition
    prompts: Tensor,  # (B, P)
    token: Tensor,  # (B,) what it draws
    vocab: int,
    options: dict,
    device: str,
) -> dict[str, Callable[..., Tensor]]:
    """logits -> log-prob of a token under the policy and under the sampling distribution (2, B)."""
    peers = {"torch.compile(reference)": torch.compile(lambda logits: eager(logits))}
    if generation is not None:
        banned = list(range(vocab - 20, vocab))
        steps = [generation.SuppressTokensLogitsProcessor(banned, device=device)]
        if "repetition_penalty" in options:
            steps.append(generation.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
        if "top_k" in options:
            steps += [generation.TopKLogitsWarper(options["top_k"]), generation.TopPLogitsWarper(options["top_p"])]
        processors = generation.LogitsProcessorList(steps)

        def hugging_face(logits: Tensor) -> Tensor:
            scores = processors(prompts, logits.float())
            torch.multinomial(scores.softmax(-1), 1)  # drawn as generate does; another token than ours
            both = torch.stack((logits.float(), scores)).log_softmax(-1)
            return both.gather(2, token.expand(2, -1)[..., None])[..., 0]

        peers["Hugging Face processors, multinomial"] = hugging_face
    return peers


def trl_chunked(hidden: Tensor, lm_head: Tensor, target: Tensor) -> Tensor:
    # As TRL's add_fused_lm_head calls it: no bias, temperature 1, its chunk, no soft-cap, scale 1, log-probs only.
    return _first(
        ChunkedLogProbFunction.apply(hidden, lm_head, None, target, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
    )


def _first(result: Tensor | tuple) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _eager_logprob(hidden: Tensor, lm_head: Tensor, target: Tensor) -> Tensor:
    return token_logprob_reference(hidden, lm_head, target)[0]


def _eager_loss(hidden: Tensor, lm_head: Tensor, target: Tensor, terms: TokenTerms, settings: LossSettings) -> Tensor:
    policy, entropy = token_logprob_reference(hidden, lm_head, target)
    return policy_terms(policy, entropy, terms, settings)[0]


def _eager_discriminator_loss(hidden: Tensor, last_index: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor,
                              labels: Tensor, norm: float) -> Tensor:  # fmt: skip
    states = F.rms_norm(hidden[last_index], hidden.shape[1:], norm_weight, 1e-6)
    logits = F.linear(states, weight, bias)[:, 0].float()
    return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum") / norm


def _terms(
    response_index: Tensor,
    rewards: Tensor,
    groups: Tensor,
    behavior_logprobs: Tensor,
    reference_logprobs: Tensor,
    beta: float,
    norm: float,
) -> tuple[TokenTerms, LossSettings]:
    advantages = group_advantages(rewards, groups)[response_index].to(behavior_logprobs)
    counts = torch.ones_like(advantages, dtype=torch.bool)
    terms = TokenTerms(advantages, torch.ones_like(advantages), counts, counts, behavior_logprobs, reference_logprobs,
                       None, None)  # fmt: skip
    settings = LossSettings(beta=beta, clip_low=0.2, clip_high=0.2, clip_max=None, loss_type="dr_grpo",
                            kl_estimator="k3", entropy_coef=0.0, importance_cap=None, sapo_temperature_pos=1.0,
                            sapo_temperature_neg=1.05, norm=norm, kl_norm=norm)  # fmt: skip
    return terms, settings


def _liger_loss(compiled: bool) -> Callable[..., Tensor]:
    # Uncompiled on a CPU, where its one loop per response is not bound by launches.
    def run(hidden, lm_head, target, *, response_index, rewards, groups, behavior_logprobs, reference_logprobs, beta,
            norm) -> Tensor:  # fmt: skip
        num = len(rewards)
        loss = LigerFusedLinearGRPOLoss(
            beta=beta, loss_type="dr_grpo", max_completion_length=len(target) // num, compiled=compiled
        )
        padded = (num, len(target) // num)
        return loss(
            hidden.view(*padded, -1),
            lm_head,
            target.view(padded),
            torch.ones_like(target).view(padded),
            group_advantages(rewards, groups).to(behavior_logprobs),
            ref_per_token_logps=reference_logprobs.view(padded),
            old_per_token_logps=behavior_logprobs.view(padded),
        )[0]

    return run
