"""A case: one problem, its candidates and the floor below which no candidate can go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

BASELINE = "reference"  # our own definition in plain PyTorch, in the case's dtype
NO_GRAD, FORWARD, BACKWARD, BOTH = "no-grad", "forward", "backward", "both"


@dataclass
class Case:
    """One problem. Every candidate takes `inputs` and returns one tensor, which `grad` inputs have a gradient of. The
    first candidate is the baseline."""

    op: str
    name: str
    inputs: dict
    candidates: dict[str, Callable[..., Tensor]]
    # pass -> forms of the work that nobody can leave out (bare GEMMs, or a copy of bytes); the fastest counts
    floors: dict[str, list[Callable[[], object]]]
    floor_name: str
    flops: dict[str, int] = field(default_factory=dict)  # pass -> of the GEMMs
    num_bytes: int = 0  # read and written once
    grad: tuple[str, ...] = ()  # inputs that want a gradient
    no_grad: bool = True  # whether the op is used without a gradient too
    tokens: dict[str, int] = field(default_factory=dict)  # candidate -> positions it computes, where that differs
    notes: dict[str, dict] = field(default_factory=dict)  # candidate -> what its last call says of itself, for its rows
    judge: Callable[[Tensor], Tensor] | None = None  # output -> how wrong, 0 if right, where several are right
    dtype: torch.dtype = torch.float32  # of the models, where no input has it
    tolerance: float | None = None  # of an output, per unit of the largest true value (or of 1); None: by the dtype
    max_rounds: int | None = None  # of a case whose calls take seconds
    grows: bool = False  # candidates are one work, `tokens` times over: their rows say how time grows with it

    @property
    def passes(self) -> tuple[str, ...]:
        return (NO_GRAD,) * self.no_grad + ((FORWARD, BACKWARD, BOTH) if self.grad else ())

    @property
    def baseline(self) -> str:
        return next(iter(self.candidates))
