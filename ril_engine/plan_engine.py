"""What DeepSpeed's engine and AdamW hold for a module, allocated in a ledger as stages 0 to 2 of DeepSpeed 0.19 do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ril_engine.config import Config
from ril_engine.engine import zero_settings
from ril_engine.ledger import Ledger

REDUCED_TOGETHER = 500_000_000  # gradients of one all-reduce without ZeRO: DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE


class Trained:
    """A module and what DeepSpeed's engine and AdamW hold for it on one of `ranks` GPUs."""

    def __init__(self, module: nn.Module, config: Config, ledger: Ledger, ranks: int):
        self.module, self.ledger, self.ranks = module, ledger, ranks
        self.parameters = [each for each in module.parameters() if each.requires_grad]
        self.count = sum(each.numel() for each in self.parameters)
        self.bytes_each = self.parameters[0].element_size()
        self.zero = zero_settings(config.deepspeed)
        self.stage, self.bf16 = config.deepspeed.zero_stage, config.deepspeed.bf16
        self.like = self.parameters[0].detach()
        self.share = -(-self.count // ranks) if self.stage or self.bf16 else self.count  # of the optimiser's parameters
        self.gradient_dtype = torch.float32 if self.bf16 else None  # None: the weights'
        self.owned: Tensor | None = None  # stage 2's gradients of this rank's share
        before = ledger.live
        if self.stage or self.bf16:
            self.master = self.new(self.share, torch.float32).requires_grad_()
            updated = [self.master]
        else:
            updated = self.parameters
        # bf16 below stage 2: gradients are added up in float32, whole
        self.added = self.new(self.count, torch.float32) if self.bf16 and self.stage < 2 else None
        self.optimizer = torch.optim.AdamW(updated, lr=1e-6, foreach=ledger.device == "meta")
        if self.stage or self.bf16:
            self._update()
        else:
            self.update_once()
        self.held = ledger.live - before

    def new(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.like.new_empty(count, dtype=dtype)

    def update_once(self) -> None:
        """So that AdamW has its states."""
        for each in self.parameters:
            each.grad = torch.empty_like(each)
        self._update()

    def _update(self) -> None:
        if self.stage or self.bf16:
            self.master.grad = self.new(self.share, torch.float32)
            self.owned = None
            for each in self.parameters:
                each.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Where gradients go while a backward runs: DeepSpeed's bucket, and from stage 2 on a share of them."""
        handles, held, filled = [], [], 0
        bucket = int(self.zero.reduce_bucket_size)

        def reduced(parameter: Tensor) -> None:
            nonlocal filled
            parameter.grad, filled = None, filled + parameter.numel()
            if self.stage == 2 and filled > bucket and self.owned is None:
                self.owned = self.new(self.share, self.gradient_dtype)

        if self.stage:
            held.append(self.new(bucket))
        if self.stage == 2 or self.added is not None:
            handles = [each.register_post_accumulate_grad_hook(reduced) for each in self.parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self.stage == 2 and self.owned is None:  # the bucket held all of them until now
            self.owned = self.new(self.share, self.gradient_dtype)

    def step(self) -> None:
        if self.stage == 0 and self.added is None:  # a flat copy of the gradients for each all-reduce, of one rank, too
            self.new(min(self.count, REDUCED_TOGETHER))
        self._update()

    def exchanged(self) -> float:
        """Bytes that a GPU sends in one update: gradients to their owners, and what those have made of them back."""
        return 2 * (self.ranks - 1) / self.ranks * self.count * self.bytes_each
