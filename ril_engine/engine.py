"""DeepSpeed, and nothing else that knows of it."""

from __future__ import annotations

import argparse
import copy
import functools
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import nn

from ril_engine.config import DeepSpeedConfig
from ril_engine.errors import UserError
from ril_engine.placement import place


def init_distributed() -> None:
    """Join the job that the launcher started, or be a job of one."""
    if dist.is_initialized():
        return
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:  # not launched: any free port will do
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    accelerator, backend = get_accelerator(), None
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
        # Counts, metrics and Python objects are reduced on the host: nothing of it waits for the GPU.
        backend = f"cpu:gloo,{accelerator.device_name()}:{accelerator.communication_backend_name()}"
    deepspeed.init_distributed(backend, verbose=False)
    if backend is not None:
        return
    _unlink_buffers()
    if "OMP_NUM_THREADS" not in os.environ:
        # Each rank would start a thread per core, and then all of them wait for one another.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1"))))


def device() -> torch.device:
    """Where this process's models run: the accelerator that DeepSpeed found, or the CPU. A module given to an Engine is
    moved there by it."""
    return torch.device(get_accelerator().current_device_name())


def _unlink_buffers() -> None:
    """DeepSpeed on a CPU leaves its buffers, 66 MiB of memory a rank, under their names when a process ends. All ranks
    have opened them by now, so that the names are not needed any more."""
    dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)


def compile_ops() -> None:
    """On a CPU, what DeepSpeed would compile at the first use: communication in shared memory and both of its Adams."""
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

    init_distributed()
    if get_accelerator().device_name() != "cpu":
        return
    for builder in (CPUAdamBuilder, FusedAdamBuilder):
        builder().load()


def to_deepspeed(config: DeepSpeedConfig, max_grad_norm: float) -> dict:
    """The only place where DeepSpeed's own settings are written.

    Raises:
        UserError: DeepSpeed refuses what `extra` holds.
    """
    # Elements that are reduced together. By default they are 5e8, a buffer of 2 GB in float32.
    zero: dict = {"stage": config.zero_stage, "reduce_bucket_size": 50_000_000}
    host = {"device": "cpu", "pin_memory": get_accelerator().device_name() != "cpu"}
    if config.offload_optimizer:
        zero["offload_optimizer"] = host
    if config.offload_parameters:
        zero["offload_param"] = host
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # the loop builds its micro-batches itself
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": config.bf16},
        "steps_per_print": 10**9,
    }
    settings = _merged(settings, config.extra)
    try:
        deepspeed.DeepSpeedConfig(copy.deepcopy(settings))
    except (ValueError, TypeError, AssertionError, KeyError, AttributeError) as error:  # pydantic's is a ValueError
        reason = " ".join(str(error).split())
        raise UserError(f"deepspeed.extra: DeepSpeed refuses {config.extra}: {reason}; mend or remove it") from error
    return settings


def _merged(settings: dict, extra: dict) -> dict:
    out = dict(settings)
    for key, value in extra.items():
        out[key] = _merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def training_dtype(config: DeepSpeedConfig) -> torch.dtype:
    """Of the weights that forwards read."""
    return torch.bfloat16 if config.bf16 else torch.float32


def zero_settings(config: DeepSpeedConfig):
    """DeepSpeed's own ZeRO settings as they will be, its defaults included."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig(**to_deepspeed(config, max_grad_norm=1.0)["zero_optimization"])


def scaled_for_average(loss_sum: torch.Tensor, world_size: int) -> torch.Tensor:
    """DeepSpeed averages gradients over ranks; a loss already divided by a global denominator wants their sum."""
    return loss_sum * world_size


def _keep(names: set[str], module, state: dict, prefix: str, _) -> None:
    """In a state dict, of the module that has these names."""
    for name in [name for name in state if name.removeprefix(prefix) not in names]:
        del state[name]


class _Unseen:
    """A submodule that its parent still has and runs, but does not count among its submodules. DeepSpeed looks for
    marks of its own on all parameters that it finds, so it must not find these."""

    def __init__(self, module: nn.Module, part: nn.Module | None):
        places = ((home, name) for home in module.modules() for name in home._modules)
        self.part = part
        self.places = [] if part is None else [(home, name) for home, name in places if home._modules[name] is part]
        for home, name in self.places:
            home.__dict__[name], home._modules[name] = part, None

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Within it all is as before."""
        for home, name in self.places:
            home._modules[name] = self.part
        try:
            yield
        finally:
            for home, name in self.places:
                home._modules[name] = None


def freeze(module: nn.Module, config: DeepSpeedConfig, *, whole: nn.Module | None = None) -> None:
    """Make a module ready that is only read, such as the reference: in the training's dtype, and with ZeRO-3
    partitioned over the ranks, which then call it together. It is on the accelerator, or with offload_idle at rest.

    Args:
        whole: as of Engine.
    """
    init_distributed()
    module.requires_grad_(False).eval()
    if config.zero_stage < 3:
        place(module, torch.device("cpu") if config.offload_idle else device(), training_dtype(config))
        return
    if whole is not None:
        place(whole, device(), training_dtype(config))
        _Unseen(module, whole)
    if config.offload_idle:  # its own way to have them there only while they are read
        config = config.model_copy(update={"offload_parameters": True})
    deepspeed.initialize(model=module, config=to_deepspeed(config, max_grad_norm=0.0))


def wake(module: nn.Module, config: DeepSpeedConfig) -> None:
    """Have a module that is only read on the accelerator, before it is called."""
    if config.offload_idle and config.zero_stage < 3:
        module.to(device())


def rest(module: nn.Module, config: DeepSpeedConfig) -> None:
    """With offload_idle: have a module that is only read on the host."""
    if config.offload_idle and config.zero_stage < 3:
        module.to("cpu")


def _adamw(config: DeepSpeedConfig) -> type[torch.optim.Optimizer]:
    if config.offload_optimizer:
        return deepspeed.ops.adam.DeepSpeedCPUAdam
    # ZeRO-3 moves the states of no other.
    return deepspeed.ops.adam.FusedAdam if config.offload_idle else torch.optim.AdamW


def checkpoint_layers(module: nn.Module) -> None:
    """Have a Hugging Face model, or a module around one, keep what enters its layers and compute the rest again."""
    model = next(part for part in module.modules() if hasattr(part, "gradient_checkpointing_enable"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


class Engine:
    """A module, its AdamW and its learning-rate schedule: linear warm-up, linear to the final rate, and constant."""

    def __init__(
        self,
        module,
        *,
        config: DeepSpeedConfig,
        steps: int,
        learning_rate: float,
        final_learning_rate: float | None = None,
        warmup_steps: int = 0,
        final_steps: int = 0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        whole: nn.Module | None = None,
        sampled: bool = False,
        save_frozen: bool = True,
    ):
        """
        Args:
            whole: a frozen submodule that ZeRO-3 does not partition, since not all ranks run it in each forward: a
                vision tower, where some questions have no picture. It is no part of checkpoints then.
            save_frozen: False keeps what is not trained out of checkpoints; `load` then leaves it as it is.
            sampled: others read the weights while the engine is at rest.
        """
        init_distributed()
        final = learning_rate if final_learning_rate is None else final_learning_rate

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            share = (step - warmup_steps) / max(1, steps - final_steps - warmup_steps - 1)
            return 1 + (final / learning_rate - 1) * min(1.0, share)

        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = _adamw(config)(trained, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        if config.gradient_checkpointing:
            checkpoint_layers(module)
        self.partitioned = config.zero_stage == 3
        if self.partitioned and whole is not None:
            place(whole.eval(), device(), training_dtype(config))
        self.unseen = _Unseen(module, whole if self.partitioned else None)
        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, lr_scheduler=schedule, config=to_deepspeed(config, max_grad_norm)
        )
        self.module, self.save_frozen = module, save_frozen
        if not save_frozen:  # DeepSpeed leaves out one name of a parameter only, and the head's has two or three
            names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
            module.register_state_dict_post_hook(functools.partial(_keep, names))
        self.world_size = dist.get_world_size()
        self.at_rest: tuple[OffloadStateTypeEnum, ...] = ()  # of its states, those that wait on the host then
        if config.offload_idle:
            self.at_rest = tuple(OffloadStateTypeEnum)
            if sampled or self.partitioned:  # of which a rank has a share only
                self.at_rest = tuple(each for each in self.at_rest if each != OffloadStateTypeEnum.lp_params)
        self.resting = False

    def __call__(self, *args, **kwargs):
        return self.engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """`loss` is a sum over this micro-batch divided by the global denominator; `last` ends the update's."""
        self.engine.set_gradient_accumulation_boundary(last)
        finite = torch.where(loss.detach().isfinite(), 1.0, torch.nan)  # a loss of infinity may have a finite gradient
        self.engine.backward(scaled_for_average(loss * finite, self.world_size), scale_wrt_gas=False)

    def step(self) -> dict[str, float]:
        """Update the parameters. `grad_norm` is the global one, before clipping; where it is not finite, since a loss
        or gradient of any rank was not, parameters, optimiser and schedule stay as they are."""
        rate = self.engine.get_lr()[0]
        if (
            self.engine.zero_optimization_stage() > 0
        ):  # DeepSpeed itself skips the update, and its norm is infinite then
            self.engine.step()
            return {"grad_norm": float(self.engine.get_global_grad_norm()), "learning_rate": rate}
        # It keeps no norm of unpartitioned float32 gradients, and would use any.
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None]))
        if math.isfinite(norm):
            self.engine.step()
        else:
            self.engine.zero_grad()
        return {"grad_norm": norm, "learning_rate": rate}

    def rest(self) -> None:
        """With offload_idle: its states wait on the host until it is awake again."""
        if self.at_rest and not self.resting:
            pinned = get_accelerator().device_name() != "cpu"
            self.engine.offload_states(include=self.at_rest, pin_memory=pinned)
            self.resting = True

    def wake(self) -> None:
        """Have its states on the accelerator, before a forward that is trained on."""
        if self.resting:
            self.engine.reload_states()
            self.resting = False

    @contextmanager
    def _awake(self) -> Iterator[None]:
        resting = self.resting
        self.wake()
        yield
        if resting:
            self.rest()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it the module is whole on each rank, to generate with it or to save it. All ranks enter it; inside and
        at its end no rank waits for another."""
        if not self.partitioned:
            yield
            return
        holder = self.engine.optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            # Its hooks would release a submodule's parameters after a forward.
            for hook in [*holder.forward_hooks, *holder.backward_hooks]:
                hook.remove()
            holder.forward_hooks, holder.backward_hooks = [], []
            try:
                with self.unseen.seen():
                    yield
            finally:
                holder._register_deepspeed_module(self.module)

    def save(self, folder: Path) -> None:
        """Parameters, optimiser and schedule. All ranks call it."""
        with self._awake():
            for state in self.engine.basic_optimizer.state.values():  # ZeRO-3 keeps what it moved states to beside them
                for name in [name for name in state if name.endswith("_offload_buffer")]:
                    del state[name]
            settings = {"save_latest": False, "exclude_frozen_parameters": not self.save_frozen}
            self.engine.save_checkpoint(str(folder), tag="state", **settings)

    def load(self, folder: Path, *, universal: bool = False) -> None:
        """What `save` wrote, or `write_universal`. All ranks call it."""
        if not list((folder / "state").glob("*.pt")):
            raise UserError(f"checkpoint {folder}: no state/*.pt there; start a new run with --config")
        self.engine._config.load_universal_checkpoint = universal  # a setting of the whole engine, read by each load
        with self._awake():
            self.engine.load_checkpoint(str(folder), tag="state", load_module_strict=self.save_frozen)
        self.engine._config.load_universal_checkpoint = False

    @property
    def optimizer_is_divided(self) -> bool:
        """Does each rank hold a share of it, so that what `save` wrote suits as many ranks only?"""
        return self.engine.zero_optimization_stage() > 0


def write_universal(folder: Path, out: Path) -> None:
    """What `Engine.save` wrote in `folder`, rewritten to `out` so that any number of ranks can load it. One process
    calls it; it holds one rank's share at a time."""
    from deepspeed.checkpoint import ds_to_universal

    settings = argparse.Namespace(input_folder=str(folder / "state"), output_folder=str(out / "state"))
    settings.num_extract_workers = settings.num_merge_workers = 1  # in this process
    settings.keep_temp_folder, settings.strict, settings.inject_missing_state = False, True, True
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):  # progress bars
        ds_to_universal.main(settings)


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The module's state as `Engine.save` wrote it in `folder`, on the CPU; needs neither ranks nor a GPU. Under ZeRO-3
    float32, whatever the module's dtype.

    The files are read with pickle, which runs what they hold: only from folders that you trust.
    """
    whole = folder / "state" / "mp_rank_00_model_states.pt"
    if whole.exists():
        return torch.load(whole, map_location="cpu", weights_only=False)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="state")
