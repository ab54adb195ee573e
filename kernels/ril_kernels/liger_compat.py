"""`LigerFusedLinearGRPOLoss` with the constructor and forward of Liger-Kernel 0.8.5's class of that name, on
`policy_loss`: for code that calls Liger's class. An option that policy_loss does not have is refused by name.

B responses, L padded completion tokens, H hidden, V vocabulary.
"""

import torch
from torch import Tensor

from ril_kernels._checks import check_choice, refuse
from ril_kernels.policy_loss.op import policy_loss
from ril_kernels.token_logprob.op import token_logprob

_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")


def _tokens_per_rank(mask: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Liger's denominator of dapo and cispo: the mean number of counted tokens of a rank."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    total = mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=mask.device)
    total = total.float()
    if num_items_in_batch is None and distributed:
        total = total.clone()
        torch.distributed.all_reduce(total)
    return (total / (torch.distributed.get_world_size() if distributed else 1)).clamp(min=1.0)


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """Arguments, defaults and results as in Liger-Kernel 0.8.5; `compiled` and `chunk_size` have no effect on the
    result there, and none at all here: chunks follow from V and a memory budget."""

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        remedy = "Use Liger's own class for luspo and vespo."
        check_choice("loss_type", loss_type, _LOSS_TYPES, remedy)
        check_choice("importance_sampling_level", importance_sampling_level, ("token", "sequence"), "'sequence': GSPO.")
        if use_bias_correction_kl:
            refuse("use_bias_correction_kl", True, "False", "policy_loss has no such KL: use Liger's own class.")
        if (vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg) != (2.0, 3.0, 3.0, 2.0):
            refuse("vespo_*", "a value", "Liger's defaults, since there is no vespo here", remedy)
        if loss_type == "dr_grpo" and max_completion_length is None:
            refuse("max_completion_length", None, "a number with loss_type 'dr_grpo'", "Pass the longest completion.")
        self.beta, self.use_ref_model, self.temperature, self.loss_type = beta, use_ref_model, temperature, loss_type
        self.max_completion_length = max_completion_length
        self.settings = {
            "clip_low": epsilon_low,
            "clip_high": epsilon_high,
            "clip_max": delta if loss_type not in ("cispo", "sapo") else None,  # Liger has it do nothing there
            "loss_type": loss_type,
            "ratio_level": importance_sampling_level,
            "sapo_temperature_pos": sapo_temperature_pos,
            "sapo_temperature_neg": sapo_temperature_neg,
        }

    def forward(
        self,
        _input: Tensor,  # (B, L, H)
        lin_weight: Tensor,  # (V, H)
        selected_token_ids: Tensor,  # (B, L) int64
        attention_mask: Tensor,  # (B, L), not 0 counts
        advantages: Tensor,  # (B,)
        bias: Tensor | None = None,  # (V,)
        ref_per_token_logps: Tensor | None = None,  # (B, L)
        old_per_token_logps: Tensor | None = None,  # (B, L)
        ref_input: Tensor | None = None,  # (B, L, H)
        ref_weight: Tensor | None = None,  # (V, H)
        ref_bias: Tensor | None = None,  # (V,)
        vllm_is_ratio: Tensor | None = None,  # (B, L) or (B, 1)
        num_items_in_batch: Tensor | int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, metrics) as Liger returns them: the mean KL where beta is not 0, then the clipped share."""
        num, length = selected_token_ids.shape
        mask = attention_mask.bool().flatten()
        tokens = mask.sum().clamp(min=1)

        def flat(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.float().expand(num, length).flatten()

        reference = flat(ref_per_token_logps)
        if reference is None and self.beta != 0:
            if not self.use_ref_model or ref_input is None or ref_weight is None:
                got = "neither ref_per_token_logps nor ref_input with ref_weight"
                refuse("ref_per_token_logps", got, "one of them with beta above 0", "Pass the reference's log-probs.")
            with torch.no_grad():
                ids = selected_token_ids.flatten().masked_fill(~mask, -100)
                head = {"bias": ref_bias, "temperature": self.temperature}
                reference = token_logprob(ref_input.flatten(0, 1), ref_weight, ids, **head)
        if self.loss_type == "dr_grpo":
            norm = num * self.max_completion_length
        elif self.loss_type in ("grpo", "sapo"):
            norm = num
        elif self.loss_type == "bnpo":
            norm = tokens
        else:
            norm = _tokens_per_rank(mask, num_items_in_batch)
        loss, metrics = policy_loss(
            _input.flatten(0, 1),
            lin_weight,
            selected_token_ids.flatten(),
            response_index=torch.arange(num, device=mask.device).repeat_interleave(length),
            advantages=advantages.float(),
            behavior_logprobs=flat(old_per_token_logps),
            reference_logprobs=reference if self.beta != 0 else None,
            importance_weights=flat(vllm_is_ratio),
            mask=mask,
            beta=self.beta,
            norm=1.0,  # the loss is divided below, so that a count on the device needs no host sync
            bias=bias,
            temperature=self.temperature,
            **self.settings,
        )
        clipped = (metrics.clip_low_fraction + metrics.clip_high_fraction) * metrics.num_computed / tokens
        loss = loss / norm
        return loss, (clipped,) if metrics.kl is None else (metrics.kl, clipped)
