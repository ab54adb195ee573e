"""The two trained modules: the policy with its loss, and the discriminator. T packed tokens, N responses, H hidden."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ril_engine.models import Batch
from ril_kernels import discriminator_head, policy_loss, token_logprob


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

    def hidden(self, batch: Batch) -> Tensor:  # (T, H): only response positions ever meet the head
        states = self.model.model(**batch.inputs, use_cache=False).last_hidden_state
        return states.flatten(0, 1)[batch.row]

    def forward(self, batch: Batch, **loss_settings):
        """(loss, PolicyMetrics) with settings of `policy_loss`; without any, the (T,) log-probs."""
        return self.head(self.hidden(batch), batch, **loss_settings)


class Discriminator(nn.Module):
    """D: the student's language model with its vocabulary head replaced by one H x 1, read at the last token."""

    def __init__(self, language_model, hidden_size: int):
        super().__init__()
        self.language_model = language_model
        self.score = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # both (N, S), right-padded -> (N,)
        states = self.language_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        count, length = input_ids.shape
        last = torch.arange(count) * length + attention_mask.sum(-1) - 1
        return discriminator_head(states.flatten(0, 1), last, self.score.weight, self.score.bias)


def encode_for_discriminator(tokenizer, instruction: str, texts: list[str]) -> dict[str, Tensor]:
    """D's prompt holds the response only, as text encoded by D's own tokenizer: nothing but words tells the sides."""
    special = tokenizer.all_special_tokens
    rows = []
    for text in texts:
        for token in special:
            text = text.replace(token, "")
        turns = [
            {"role": "system", "content": instruction},
            {"role": "user", "content": f"<response>{text.strip()}</response>"},
        ]
        rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        rows.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
