"""Which question has which slot: waiting ones enter as soon as all samples of another have left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush


class Schedule:
    """Questions wait in their order; a slot holds one with its G samples. A sample's row is slot * G + its number."""

    def __init__(self, num_questions: int, slots: int, samples: int):
        self.samples = samples
        self.waiting = deque(range(num_questions))
        self.free = list(range(slots))
        self.running: dict[int, int] = {}  # row -> question
        self._left = [0] * slots  # samples of each slot that have not ended

    @property
    def done(self) -> bool:
        return not self.waiting and not self.running

    def admit(self, tokens: Callable[[int], int], budget: int) -> list[tuple[int, int]]:
        """(slot, question) of those that enter now: what is free, at most `budget` tokens of prompts, at least one."""
        entered, used = [], 0
        while self.waiting and self.free and (not entered or used + tokens(self.waiting[0]) <= budget):
            question, slot = self.waiting.popleft(), heappop(self.free)
            used += tokens(question)
            self._left[slot] = self.samples
            self.running |= {slot * self.samples + i: question for i in range(self.samples)}
            entered.append((slot, question))
        return entered

    def leave(self, row: int) -> None:
        del self.running[row]
        slot = row // self.samples
        self._left[slot] -= 1
        if not self._left[slot]:
            heappush(self.free, slot)
