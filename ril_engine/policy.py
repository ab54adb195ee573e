"""The two trained modules: the policy with its loss, and the discriminator. T packed tokens, N responses, H hidden."""

from __future__ import annotations

from itertools import takewhile

import torch
from torch import Tensor, nn

from ril_engine.families import language_model, only_rows
from ril_engine.models import Batch
from ril_engine.packing import pack
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

    def hidden(self, batch: Batch) -> Tensor:  # (T, H): only response positions ever meet the final norm and the head
        with only_rows(language_model(self.model).norm, batch.row):
            return self.model.base_model(**batch.inputs, use_cache=False).last_hidden_state

    def forward(self, batch: Batch, **loss_settings):
        """(loss, PolicyMetrics) with settings of `policy_loss`; without any, the (T,) log-probs."""
        return self.head(self.hidden(batch), batch, **loss_settings)


class Discriminator(nn.Module):
    """D: the student's language model with its vocabulary head replaced by one H x 1, read at the last token."""

    def __init__(self, decoder):
        super().__init__()
        self.language_model = decoder
        self.score = nn.Linear(decoder.config.hidden_size, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, inputs: dict[str, Tensor], last: Tensor) -> Tensor:  # last: (N,) rows of the flat states -> (N,)
        with only_rows(self.language_model.norm, last):
            states = self.language_model(**inputs, use_cache=False).last_hidden_state
        return discriminator_head(states, torch.arange(len(last)), self.score.weight, self.score.bias)


def encode_for_discriminator(tokenizer, instruction: str, texts: list[str]) -> list[list[int]]:
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
    return rows


def shared_tokens(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with: D's instruction, which no text is cut from, for a tokenizer may join its
    last letters with the text's first ones. Each row keeps at least one token of its own."""
    first, last = min(rows), max(rows)  # what these two begin with, all rows do
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    return min(common, *(len(row) - 1 for row in rows))


def discriminator_batch(
    rows: list[list[int]], pad_id: int, packing: str = "padded", shared: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """What `Discriminator` takes: rows padded to the right, or a pack ("packed": each row with its first `shared`
    tokens; "shared": they come once)."""
    if packing == "padded":
        length = max(map(len, rows))
        ids = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}, torch.arange(len(rows)) * length + mask.sum(-1) - 1
    prefix = {"input_ids": torch.tensor([rows[0][:shared]])}
    own = [row[shared:] for row in rows]
    inputs, spans = pack([(prefix, own)] if packing == "shared" else [(prefix, [row]) for row in own])
    return inputs, torch.tensor([start + count - 1 for _, start, count in spans])
