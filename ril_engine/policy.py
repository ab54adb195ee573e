"""The policy: a Hugging Face model with its loss. T packed response tokens, H hidden."""

from __future__ import annotations

from torch import Tensor, nn

from ril_engine.families import language_model, only_rows
from ril_engine.models import Batch
from ril_kernels import policy_loss, token_logprob


class Head(nn.Module):
    """The fused ops as the forward of the model's own lm_head. ZeRO-3 gathers parameters module by module, forward and
    backward, so the weight is whole wherever an op reads it, once if it is tied to the embeddings."""

    def __init__(self, lm_head: nn.Linear):
        super().__init__()
        self.weight = lm_head.weight

    def forward(self, hidden: Tensor, batch: Batch, **loss_settings):
        if not loss_settings:
            return token_logprob(hidden, self.weight, batch.target)
        return policy_loss(hidden, self.weight, batch.target, response_index=batch.response_index, **loss_settings)


class Policy(nn.Module):
    """A Hugging Face model whose forward ends in a loss, so that all of it runs inside the engine's forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.head = Head(model.lm_head)

    def hidden(self, batch: Batch) -> Tensor:  # (T, H): only response positions ever meet the final norm and the head
        with only_rows(language_model(self.model).norm, batch.row):
            return self.model.base_model(**batch.inputs, use_cache=False).last_hidden_state

    def forward(self, batch: Batch, **loss_settings):
        """(loss, PolicyMetrics) with settings of `policy_loss`; without any, the (T,) log-probs."""
        return self.head(self.hidden(batch), batch, **loss_settings)
