"""Rollout: schedule, run, read, until every sample of every question has ended.

Q question slots, G samples of each, B rows of a step, P prompt tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ril_engine.config import SamplingConfig
from ril_engine.errors import UserError
from ril_engine.families import attend_over_packs, language_model, only_rows
from ril_engine.models import Encoder
from ril_engine.packing import NO_MASK, pack
from ril_engine.placement import to_device
from ril_engine.rollout.cache import Cache, Decode, Prefill, visible
from ril_engine.rollout.graphs import Graphs
from ril_engine.rollout.response import Response, draw_settings
from ril_engine.rollout.schedule import Schedule
from ril_kernels import sample, token_bits

# Of a pack of prompts, unless one prompt alone is longer. On a CPU larger packs leave the cache: with 8,192 tokens the
# prefill of 16 prompts of 256 took a quarter longer.
PREFILL_TOKENS = 1024
# Rows of a captured decode step; without graphs a step has as many as there are.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
# device -> multiples that the prompt and response lengths of a step are rounded up to. A GPU captures a graph for each.
EXTENTS = {"cpu": (16, 8), "cuda": (256, 128)}


class Tables:
    """What a step reads and changes, one entry per row (slot * G + sample) or per slot, at addresses that stay."""

    def __init__(self, questions: int, samples: int, vocabulary: int, penalty: bool, device: torch.device):
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rows = questions * samples
        self.seed = zeros()
        self.rows = zeros(rows)  # of the step; the first B count
        self.token = zeros(rows)  # drawn last
        self.count = zeros(rows)  # drawn so far
        self.start = zeros(rows)  # position of a response's first token
        self.question = zeros(rows)
        self.prompt_length = zeros(questions)
        self.sample = torch.arange(rows, device=device) % samples
        self.slot = torch.arange(rows, device=device) // samples
        self.seen = zeros(rows, -(-vocabulary // 32), dtype=torch.int32) if penalty else None

    @property
    def changed(self) -> list[Tensor]:
        return [each for each in (self.token, self.count, self.seen) if each is not None]

    @property
    def all(self) -> list[Tensor]:
        return [each for each in vars(self).values() if each is not None]


class Rollout:
    """Generation with the weights of a Hugging Face model that is being trained: no copy of them, no export.

    A question's prompt and pictures are run once for all of its samples, whose decode steps share its keys and values.
    Finished samples leave; when all of a question's have, a waiting question enters. What is drawn depends on the seed,
    the question's number, the sample's and the position alone, not on what shares the batch.

    `seconds` sums up where a CPU's time went: prefill, decode, sampling, and what is left to Python.
    """

    def __init__(self, model, encoder: Encoder, sampling: SamplingConfig, buckets: Sequence[int] | None = None):
        self.model, self.encoder, self.sampling = model, encoder, sampling
        self.decoder, self.head = language_model(model), model.lm_head
        attend_over_packs(self.decoder)
        self.device = self.head.weight.device
        self.buckets = (BUCKETS if self.device.type == "cuda" else ()) if buckets is None else buckets
        self.axes = () if encoder.rope_index is None else (3,)  # of a position
        self.vocabulary = self.head.out_features  # of its weight ZeRO-3 leaves no rows here
        self.banned = self._to(token_bits(torch.tensor(encoder.banned_ids), self.vocabulary))
        self.graphs = Graphs()
        self.seconds: Counter[str] = Counter()
        self._shape: tuple | None = None

    @torch.no_grad()
    def generate(
        self,
        questions: Sequence[tuple[int, dict]],
        samples: int,
        *,
        seed: int,
        greedy: bool = False,
        advance: Callable[[int], object] = lambda count: None,
    ) -> list[list[Response]]:
        """`samples` responses to each (number, question), drawn by the sampling settings or greedily.

        Args:
            advance: told how many responses have ended, after every token.

        Raises:
            UserError: the model's logits are not finite, or one question does not fit into the cache.
        """
        prompts = [self.encoder.prompt(question) for _, question in questions]
        schedule = self._prepare(prompts, samples, seed)
        responses = [[Response() for _ in range(samples)] for _ in questions]

        def read(rows: Sequence[int], drawn: Tensor) -> None:
            ended = 0
            for row, values in zip(rows, drawn.tolist(), strict=False):  # a bucket may repeat the last
                response = responses[schedule.running[row]][row % samples]
                if response.append(values, self.encoder, self.sampling):
                    schedule.leave(row)
                    ended += 1
            advance(ended)

        while not schedule.done:
            entered = schedule.admit(lambda i: _length(prompts[i]), PREFILL_TOKENS)
            if entered:
                some = [(slot, questions[i][0], prompts[i]) for slot, i in entered]
                read([slot * samples + i for slot, _ in entered for i in range(samples)], self._prefill(some, greedy))
            elif schedule.running:
                rows = sorted(schedule.running)
                num_own = max(len(responses[schedule.running[row]][row % samples].ids) for row in rows)
                num_prompt = max(_length(prompts[i]) for i in schedule.running.values())
                read(rows, self._decode(rows, num_prompt, num_own, greedy))
        return responses

    def _prepare(self, prompts: list[dict[str, Tensor]], samples: int, seed: int) -> Schedule:
        """Buffers for these prompts, the last ones where their sizes are the same, and a schedule of slots."""
        sampling, (of_prompt, of_own) = self.sampling, EXTENTS.get(self.device.type, EXTENTS["cuda"])
        longest = _round_up(max(map(_length, prompts), default=1), of_prompt)
        own = _round_up(sampling.max_new_tokens, of_own)
        room = min(sampling.batch_size // samples, sampling.cache_tokens // (longest + samples * own))
        if room < 1:
            raise UserError(
                f"sampling: batch_size {sampling.batch_size} and cache_tokens {sampling.cache_tokens} do not hold one "
                f"question's {samples} responses of {own} tokens and its prompt of {longest}; raise them"
            )
        slots = max(1, min(len(prompts), room))
        shape = (slots, samples, longest, own)
        if shape != self._shape:
            self._shape = self.cache = self.tables = None  # before the new ones are made
            self.graphs.clear()  # new buffers may get the addresses of old ones, with other strides
            self.cache = Cache(self.decoder, slots, samples, longest, own)
            penalty = sampling.repetition_penalty != 1
            self.tables = Tables(slots, samples, self.vocabulary, penalty, self.device)
            self._shape = shape
        self.tables.seed.fill_(seed)
        self.tables.prompt_length.zero_()
        self.tables.count.zero_()
        self.graphs.keep([*self.model.parameters(), *self.model.buffers(), *self.cache.all, *self.tables.all])
        return Schedule(len(prompts), slots, samples)

    def _prefill(self, some: list[tuple[int, int, dict[str, Tensor]]], greedy: bool) -> Tensor:
        """Prompts of (slot, question's number, prompt) as one pack, and the first token of each of their samples."""
        tables, samples = self.tables, self._shape[1]
        inputs, _ = pack([(prompt, []) for *_, prompt in some], self.encoder.rope_index)
        lengths = torch.tensor([_length(prompt) for *_, prompt in some])
        ends = lengths.cumsum(0)
        slot = torch.tensor([slot for slot, *_ in some])
        rows = (slot[:, None] * samples + torch.arange(samples)).flatten()
        start = inputs["position_ids"].reshape(-1, int(ends[-1]))[0, ends - 1] + 1
        place = torch.arange(int(ends[-1])) - (ends - lengths).repeat_interleave(lengths)
        question = torch.tensor([number for _, number, _ in some])
        to = self._to
        rows_there = to(rows)
        tables.prompt_length[to(slot)] = to(lengths)
        tables.start[rows_there] = to(start.repeat_interleave(samples))
        tables.question[rows_there] = to(question.repeat_interleave(samples))
        tables.count[rows_there] = 0
        if tables.seen is not None and not greedy:
            for each, _, prompt in some:
                bits = token_bits(prompt["input_ids"], self.vocabulary)
                tables.seen[each * samples : (each + 1) * samples] = to(bits)
        layout = inputs.pop("pack_layout")
        keep = Prefill(self.cache, layout, to(slot.repeat_interleave(lengths)), to(place))
        with self._clock("prefill"), only_rows(self.decoder.norm, to(ends - 1)):
            inputs = {name: to(value) for name, value in inputs.items()}
            states = self.model.base_model(**inputs, use_cache=False, kv_cache=keep).last_hidden_state
            logits = self.head(states).repeat_interleave(samples, dim=0)
        with self._clock("sampling"):
            return self._draw(logits, rows_there, greedy)

    def _decode(self, rows: list[int], num_prompt: int, num_own: int, greedy: bool) -> Tensor:
        """One more token of each row. `num_own`: the most tokens that one of them has."""
        most = len(self.tables.rows)
        buckets = sorted({min(each, most) for each in (*self.buckets, most)}) if self.buckets else [len(rows)]
        size = next(each for each in buckets if each >= len(rows))
        _, _, longest, limit = self._shape
        of_prompt, of_own = EXTENTS.get(self.device.type, EXTENTS["cuda"])
        extents = min(longest, _round_up(num_prompt, of_prompt)), min(limit, _round_up(num_own, of_own))
        self.tables.rows[:size] = self._to(torch.tensor(rows + rows[-1:] * (size - len(rows))))
        # All that a step reads on the host, but for what stays: the sampling settings, and the buffers' shapes, with
        # which the graphs go.
        key = (size, *extents, greedy)
        return self.graphs.run(key, lambda: self.step(size, *extents, greedy), self.tables.changed)

    def step(self, size: int, num_prompt: int, num_own: int, greedy: bool) -> Tensor:
        """(B, 3): token and its two log-probs, of the first `size` of the tables' rows. Waits for no host."""
        tables = self.tables
        rows = tables.rows[:size]
        with self._clock("decode"):
            token, place = tables.token[rows], tables.count[rows] - 1
            dtype = torch.promote_types(self.head.weight.dtype, torch.float32)
            mask = visible(tables.prompt_length, tables.count, num_prompt, num_own, dtype)
            keep = Decode(self.cache, tables.slot[rows], tables.sample[rows], place, mask, num_prompt)
            states = self.decoder(
                inputs_embeds=self.decoder.embed_tokens(token)[None],
                position_ids=(tables.start[rows] + place).expand(*self.axes, 1, -1),
                attention_mask=NO_MASK,
                use_cache=False,
                kv_cache=keep,
            ).last_hidden_state
            logits = self.head(states[0])
        with self._clock("sampling"):
            return self._draw(logits, rows, greedy)

    def _draw(self, logits: Tensor, rows: Tensor, greedy: bool) -> Tensor:
        tables = self.tables
        count = tables.count[rows]
        settings = draw_settings(self.sampling, greedy)
        if tables.seen is not None and not greedy:
            settings["seen"] = tables.seen[rows]
        drawn = sample(
            logits,
            seed=tables.seed,
            question=tables.question[rows],
            sample_number=tables.sample[rows],
            position=count,
            banned=self.banned,
            **settings,
        )
        tables.token[rows], tables.count[rows] = drawn.token, count + 1
        if "seen" in settings:
            tables.seen[rows] = settings["seen"]
        return torch.stack([each.double() for each in drawn], dim=1)

    def _to(self, value: Tensor) -> Tensor:
        return to_device(value, self.device)

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun


def _length(prompt: dict[str, Tensor]) -> int:
    return prompt["input_ids"].shape[1]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
