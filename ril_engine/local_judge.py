"""A judge's checkpoint in this process: log-probs of yes and no over packs of prompts, or greedy replies.

N responses, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor, nn

from ril_engine.config import JudgeConfig
from ril_engine.engine import device
from ril_engine.errors import UserError
from ril_engine.families import attend_over_packs, only_rows, why_not_packable
from ril_engine.judge import INSTRUCTIONS, OnScore, Text, score_of, user_turn
from ril_engine.models import require_whole
from ril_engine.packing import micro_batches, pack, padded, shared_tokens
from ril_engine.placement import to_device


class FirstToken(nn.Module):
    """A causal LM's logits of the first token of its reply to each prompt. Only those rows meet the head."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(
        self, inputs: dict[str, Tensor], last: Tensor
    ) -> Tensor:  # last: (N,) rows of the flat states -> (N, V)
        decoder = self.model.get_decoder()
        if hasattr(decoder, "norm"):
            with only_rows(decoder.norm, last):
                states = decoder(**inputs, use_cache=False).last_hidden_state
        else:
            states = decoder(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[last]
        return self.model.get_output_embeddings()(states)


class LocalJudge:
    """A frozen checkpoint: log-probs of yes and no by one forward over packs, or a greedy reply."""

    def __init__(self, config: JudgeConfig):
        self.config, self.name = config, f"judge {config.path}"
        self.device = device()
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        model, self.tokenizer = load_language_model(config, dtype)
        self.model = model.to(self.device).requires_grad_(False).eval()
        self.prompts = Prompts(self.tokenizer, config.mode, self.name)
        if config.mode == "yes_no":
            self.yes, self.no = verdict_tokens(self.tokenizer, self.name)
            self.first_token = FirstToken(self.model)
            decoder = self.model.get_decoder()
            packable = hasattr(decoder, "norm") and why_not_packable(decoder.config) is None
            self.packing = "shared" if packable else "padded"
            if packable:
                attend_over_packs(decoder)

    @torch.no_grad()
    def __call__(
        self,
        questions: list[str],
        references: list[Text],
        responses: list[str],
        *,
        on_score: OnScore = lambda place, score: None,
        **columns,
    ) -> list[float | None]:
        rows = [self.prompts.encode(*each) for each in zip(questions, references, responses, strict=True)]
        scores: list[float | None] = [None] * len(rows)
        if not rows:
            return scores
        read = self._yes_no if self.config.mode == "yes_no" else self._explain
        for places, some in read(rows, list(zip(questions, references, strict=True))):
            for place, score in zip(places, some, strict=True):
                scores[place] = score
                if score is not None:
                    on_score(place, score)
        return scores

    def _yes_no(self, rows: list[list[int]], keys: list) -> Iterator[tuple[list[int], list[float]]]:
        for places, inputs, last in batches(rows, keys, self.packing, self.config.micro_batch_tokens):
            logits = self.first_token(*to_device((inputs, last), self.device)).float()
            margin = logits[:, self.yes].logsumexp(-1) - logits[:, self.no].logsumexp(-1)
            if not margin.isfinite().all():
                raise UserError(f"{self.name}: its logits are not finite; its weights are damaged, give another one")
            yield places, (margin > 0).float().tolist()

    def _explain(self, rows: list[list[int]], keys: list) -> Iterator[tuple[list[int], list[float | None]]]:
        for places, replies in self._replies(rows):
            yield places, [score_of(text, "explain", truncated) for text, truncated in replies]

    def _replies(self, rows: list[list[int]]) -> Iterator[tuple[list[int], list[tuple[str, bool]]]]:
        """Greedy replies to prompts as (places in `rows`, (text, whether max_new_tokens cut it) of each)."""
        from transformers import GenerationConfig

        limit, ends = self.config.max_new_tokens, self.model.generation_config.eos_token_id
        ends = [self.tokenizer.eos_token_id] if ends is None else ends if isinstance(ends, list) else [ends]
        pad = ends[0] if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        greedy = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=ends, pad_token_id=pad)
        self.model.generation_config = greedy  # without the checkpoint's own temperature and penalties
        sizes = [len(row) + limit for row in rows]
        (planned,) = micro_batches("padded", sizes, [0] * len(rows), sizes, budget=self.config.micro_batch_tokens)
        for places in filter(None, planned):
            inputs = to_device(padded([rows[i] for i in places], pad, left=True), self.device)
            out = self.model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist()
            ended = [next((i for i, token in enumerate(reply) if token in ends), None) for reply in out]
            texts = [
                self.tokenizer.decode(reply[:end], skip_special_tokens=True)
                for reply, end in zip(out, ended, strict=True)
            ]
            yield places, [(text, end is None) for text, end in zip(texts, ended, strict=True)]


class Prompts:
    """A judge's prompts as tokens of its own tokenizer.

    Raises:
        UserError: the tokenizer has no chat template, or one without a system turn.
    """

    def __init__(self, tokenizer, mode: str, name: str):
        from jinja2 import TemplateError

        self.tokenizer, self.instruction = tokenizer, INSTRUCTIONS[mode]
        added = tokenizer.added_tokens_decoder.values()
        self.special = [*tokenizer.all_special_tokens, *(each.content for each in added if each.special)]
        remedy = "give an instruction-tuned model, such as Qwen/Qwen2.5-7B-Instruct"
        if not tokenizer.chat_template:
            raise UserError(f"{name}: its tokenizer has no chat template; {remedy}")
        try:
            seen = self.instruction in self._render("")
        except TemplateError:
            seen = False
        if not seen:
            raise UserError(f"{name}: its chat template takes no system turn, which holds the instructions; {remedy}")

    def encode(self, question: str, reference: Text, response: str) -> list[int]:
        data = user_turn(question, reference, response, self.special)
        return self.tokenizer(self._render(data), add_special_tokens=False)["input_ids"]

    def _render(self, data: str) -> str:
        turns = [{"role": "system", "content": self.instruction}, {"role": "user", "content": data}]
        # Templates that know of no thinking take no notice.
        return self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False, enable_thinking=False
        )


def verdict_tokens(tokenizer, name: str) -> tuple[list[int], list[int]]:
    """The tokens that a yes may begin with, and those of a no; never the same one."""
    firsts = []
    for word in ("yes", "no"):
        forms = [before + form for form in (word, word.capitalize(), word.upper()) for before in ("", " ")]
        firsts.append({tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms})
    yes, no = firsts[0] - firsts[1], firsts[1] - firsts[0]
    if not (yes and no):
        raise UserError(f"{name}: its tokenizer begins yes and no with the same token; set mode: explain")
    return sorted(yes), sorted(no)


def batches(
    rows: list[list[int]], keys: list, packing: str, budget: int
) -> Iterator[tuple[list[int], dict[str, Tensor], Tensor]]:
    """Prompts in forwards of at most `budget` tokens, as (places in `rows`, inputs, rows of their last tokens).

    Args:
        keys: of each row, its question and reference. What rows share is computed once: the instruction for all rows
            of a pack, or instruction, question and reference for those with the same key, whichever saves more.
        packing: "shared", or "padded" for a family that cannot read packs.
    """
    if packing == "padded":
        (planned,) = micro_batches(packing, keys, [0] * len(rows), list(map(len, rows)), budget=budget)
        for places in filter(None, planned):
            inputs = padded([rows[i] for i in places], 0, left=False)
            lengths = inputs["attention_mask"].sum(-1)
            yield places, inputs, torch.arange(len(places)) * inputs["input_ids"].shape[1] + lengths - 1
        return
    choices = [(by, _prefixes(rows, by)) for by in ([0] * len(rows), keys)]
    by, prefix = min(choices, key=lambda choice: sum(map(len, rows)) - _saved(*choice))
    own = [len(row) - first for row, first in zip(rows, prefix, strict=True)]
    (planned,) = micro_batches(packing, by, prefix, own, budget=budget)
    for places in filter(None, planned):
        sides = [list(some) for _, some in groupby(places, key=by.__getitem__)]
        groups = [
            ({"input_ids": torch.tensor([rows[some[0]][: prefix[some[0]]]])}, [rows[i][prefix[i] :] for i in some])
            for some in sides
        ]
        inputs, spans = pack(groups)
        yield places, inputs, torch.tensor([start + count - 1 for _, start, count in spans])


def _prefixes(rows: list[list[int]], keys: list) -> list[int]:
    """For each row, how many tokens all rows of its key begin with; each keeps its last one, at which it is read."""
    members: dict = {}
    for row, key in zip(rows, keys, strict=True):
        members.setdefault(key, []).append(row)
    shared = {key: shared_tokens(some) for key, some in members.items()}
    return [shared[key] for key in keys]


def _saved(keys: list, prefix: list[int]) -> int:
    return sum(prefix) - sum(dict(zip(keys, prefix, strict=True)).values())


def load_language_model(config: JudgeConfig, dtype: torch.dtype = torch.float32):
    """A causal LM, or the text part of a VLM, and its tokenizer.

    Raises:
        UserError: no such checkpoint, not one of a language model, or one that lacks weights.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    options = {"trust_remote_code": config.trust_remote_code}
    loading = options | {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.path, **options)
        try:
            model, found = AutoModelForCausalLM.from_pretrained(config.path, **loading)
        except ValueError:  # no causal LM by its config
            model, found = AutoModelForImageTextToText.from_pretrained(config.path, **loading)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"judge {config.path}: not loadable as a causal LM ({reason}); give a folder or hub name such as "
            "Qwen/Qwen2.5-7B-Instruct"
        ) from error
    require_whole(f"judge {config.path}", found)
    return model, tokenizer
