"""What DeepSpeed's engine and AdamW hold for a module, allocated in a ledger as stages 0 to 3 of DeepSpeed 0.19 do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ril_engine.config import Config
from ril_engine.engine import checkpoint_layers, zero_settings
from ril_engine.ledger import Ledger

REDUCED_TOGETHER = 500_000_000  # gradients of one all-reduce without ZeRO: DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE


class Weights:
    """A module's weights on one of `ranks` GPUs: whole, or with stage 3 a share of each, and those gathered to run."""

    def __init__(self, module: nn.Module, config: Config, ledger: Ledger, ranks: int, whole: nn.Module | None = None):
        """`whole`: a submodule that stage 3 leaves whole."""
        self.zero, self.ranks = zero_settings(config.deepspeed), ranks
        kept = [] if whole is None else [id(each) for each in whole.parameters()]
        parameters = list(module.parameters())
        divided = [each for each in parameters if self.zero.stage == 3 and id(each) not in kept]
        before = ledger.live
        ledger.overlook(divided)
        ledger.hold([*parameters, *module.buffers()])
        sizes = [each.numel() for each in divided]
        self.count, self.largest = sum(sizes), max(sizes, default=0)
        self.like = parameters[0].detach()
        self.on_host = self.zero.offload_param is not None
        self.share = self.new(0 if self.on_host else sum(-(-size // ranks) for size in sizes))
        # DeepSpeed never lets go of small ones
        self.small = self.new(sum(size for size in sizes if size < self.zero.param_persistence_threshold))
        self.held = ledger.live - before

    def new(self, count: int) -> Tensor:
        return self.like.new_empty(count)

    @contextmanager
    def gathered(self, count: int | None = None) -> Iterator[int]:
        """Within it `count` of the weights that stage 3 has divided are there, by default all. Gives their bytes."""
        there = self.new(self.count if count is None else min(count, self.count))
        try:
            yield there.numel() * there.element_size()
        finally:
            del there

    @property
    def to_read(self) -> int:
        """How many a forward has gathered at once: the largest and, twice, since they come in one buffer and are copied
        out of it, what is fetched ahead."""
        return self.largest + 2 * self.zero.prefetch_bucket_size

    @property
    def to_train(self) -> int:
        """A forward and its backward: as the one turns into the other, all that the backward needs within the distance
        of reuse, which counts them twice, is kept."""
        return max(self.largest, self.zero.max_reuse_distance // 2) + 2 * self.zero.prefetch_bucket_size

    @property
    def sent(self) -> float:
        """Bytes that a GPU sends to gather all once."""
        return (self.ranks - 1) / self.ranks * self.count * self.like.element_size()

    @property
    def from_host(self) -> float:
        """Bytes that a GPU reads from the host to gather all once."""
        return self.count / self.ranks * self.like.element_size() if self.on_host else 0.0


class Trained:
    """A module and what DeepSpeed's engine and AdamW hold for it, its weights aside, on one of `ranks` GPUs."""

    def __init__(self, module: nn.Module, weights: Weights, config: Config, ledger: Ledger):
        self.module, self.weights, self.ranks = module, weights, weights.ranks
        if config.deepspeed.gradient_checkpointing:
            checkpoint_layers(module)
        self.parameters = [each for each in module.parameters() if each.requires_grad]
        self.count = sum(each.numel() for each in self.parameters)
        self.bytes_each = self.parameters[0].element_size()
        self.zero = weights.zero
        self.stage, self.bf16 = config.deepspeed.zero_stage, config.deepspeed.bf16
        self.like = self.parameters[0].detach()
        self.share = -(-self.count // self.ranks) if self.stage else self.count  # of the optimiser's parameters
        self.owned: Tensor | None = None  # stage 2's gradients of this rank's share
        self.on_host = self.zero.offload_optimizer is not None
        before = ledger.live
        self.kept = [self.new(int(self.zero.reduce_bucket_size))] if self.stage == 3 else []
        if self.on_host:
            if self.stage < 3:  # on its way to the host
                self.kept.append(self.new(max(each.numel() for each in self.parameters)))
            self.held = ledger.live - before
            return
        self.masters = self._masters() if self.stage or self.bf16 else []
        if self.stage == 3:
            self.kept.append(self.new(self.share))  # of gradients
        self.optimizer = torch.optim.AdamW(self.masters or self.parameters, lr=1e-6, foreach=ledger.device == "meta")
        if not self.masters:
            for each in self.parameters:  # so that AdamW has its states
                each.grad = torch.empty_like(each)
        self._update()
        self.held = ledger.live - before

    def new(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.like.new_empty(count, dtype=dtype)

    def _masters(self) -> list[Tensor]:
        """The share in float32; stage 3 updates groups of it, one after another. Without ZeRO each parameter's own."""
        if not self.stage:
            return [self.new(each.numel(), torch.float32).requires_grad_() for each in self.parameters]
        size = self.zero.sub_group_size if self.stage == 3 else self.share
        starts = range(0, self.share, size)
        return [self.new(min(size, self.share - start), torch.float32).requires_grad_() for start in starts]

    def _update(self) -> None:
        if not self.stage:  # in bf16 all gradients are there in float32, too
            for master in self.masters:
                master.grad = torch.empty_like(master)
            self.optimizer.step()
            for master in self.masters:
                master.grad = None
        for master in self.masters if self.stage else ():
            flat = self.new(master.numel())  # in the weights' dtype
            master.grad = flat.to(torch.float32)
            del flat
            self.owned = None
            for each in self.parameters:
                each.grad = None
            self.optimizer.step()
            master.grad = None
        for each in self.parameters:
            each.grad = None

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Where gradients go while a backward runs: DeepSpeed's bucket, and from stage 2 on a share of them."""
        handles, held, filled = [], [], 0
        waiting: list[Tensor] = []  # stage 3's that are larger than the bucket
        bucket = int(self.zero.reduce_bucket_size)

        def reduced(parameter: Tensor) -> None:
            nonlocal filled
            gradient, parameter.grad, count = parameter.grad, None, parameter.numel()
            if self.stage == 3 and filled and filled + count > bucket:
                self.new(filled)  # ordered by rank
                waiting.clear()
                filled = 0
            if self.stage == 3 and count > bucket:
                waiting.append(gradient)
            filled += count
            if self.stage == 2 and not self.on_host and filled > bucket and self.owned is None:
                self.owned = self.new(self.share)

        if self.stage in (1, 2):
            held.append(self.new(bucket))
        if self.stage > 1:
            handles = [each.register_post_accumulate_grad_hook(reduced) for each in self.parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self.stage == 3:
            self.new(filled)
        if self.stage == 2 and not self.on_host and self.owned is None:  # the bucket held all of them until now
            self.owned = self.new(self.share)

    def step(self) -> None:
        if self.on_host:
            return
        if self.stage == 0:  # a flat copy of the gradients for each all-reduce, of one rank, too
            self.new(min(self.count, REDUCED_TOGETHER))
        self._update()

    def sent(self, micro_batches: float) -> float:
        """Bytes that a GPU sends in one update: gradients to their owners, from stage 2 on after each micro-batch, and
        below stage 3 what those have made of them back."""
        gradients = micro_batches if self.stage > 1 else 1
        once = (self.ranks - 1) / self.ranks * self.count * self.bytes_each
        return (gradients + (self.stage < 3)) * once

    def over_host(self, micro_batches: float) -> float:
        """Bytes between a GPU and the host in one update: gradients of the share there, what AdamW makes of it back."""
        return (micro_batches + 1) * self.share * self.bytes_each if self.on_host else 0.0
