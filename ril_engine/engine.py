"""DeepSpeed, and nothing else that knows of it."""

from __future__ import annotations

import argparse
import functools
import math
import os
import socket
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from ril_engine.config import DeepSpeedConfig
from ril_engine.errors import UserError


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


def to_deepspeed(config: DeepSpeedConfig, max_grad_norm: float) -> dict:
    """The only place where DeepSpeed's own settings are written."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # the loop builds its micro-batches itself
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.bf16},
        "steps_per_print": 10**9,
    }


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
        save_frozen: bool = True,
    ):
        """`save_frozen`: False keeps what is not trained out of checkpoints; `load` then leaves it as it is."""
        init_distributed()
        final = learning_rate if final_learning_rate is None else final_learning_rate

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            share = (step - warmup_steps) / max(1, steps - final_steps - warmup_steps - 1)
            return 1 + (final / learning_rate - 1) * min(1.0, share)

        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.95))
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, factor),
            config=to_deepspeed(config, max_grad_norm),
        )
        self.module, self.save_frozen = module, save_frozen
        if not save_frozen:  # DeepSpeed leaves out one name of a parameter only, and the head's has two or three
            names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
            module.register_state_dict_post_hook(functools.partial(_keep, names))
        self.world_size = dist.get_world_size()

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

    def save(self, folder: Path) -> None:
        """Parameters, optimiser and schedule. All ranks call it."""
        settings = {"save_latest": False, "exclude_frozen_parameters": not self.save_frozen}
        self.engine.save_checkpoint(str(folder), tag="state", **settings)

    def load(self, folder: Path, *, universal: bool = False) -> None:
        """What `save` wrote, or `write_universal`. All ranks call it."""
        if not list((folder / "state").glob("*.pt")):
            raise UserError(f"checkpoint {folder}: no state/*.pt there; start a new run with --config")
        self.engine._config.load_universal_checkpoint = universal  # a setting of the whole engine, read by each load
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
