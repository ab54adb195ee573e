"""A LoRA student (PEFT): low-rank adapters beside the linear layers of its language model are all that is trained.

The weights under them stay those that RIL starts with, so the model without its adapters is the reference policy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ril_engine.config import LoraConfig
from ril_engine.errors import UserError
from ril_engine.families import language_model

NAME = "default"  # of the adapters, in the names of their weights


def add_adapters(model, settings: LoraConfig, seed: int):
    """Adapters in a model's language model, in place; everything else is frozen. Returns PEFT's handle of them.

    Raises:
        UserError: `target_modules` names no linear layer of it.
    """
    from peft import LoraConfig as Settings
    from peft import LoraModel

    decoder = language_model(model)
    linear = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    there = sorted({name.rpartition(".")[2] for name in linear})
    wanted = there if settings.target_modules is None else settings.target_modules
    if unknown := sorted(set(wanted) - set(there)):
        raise UserError(
            f"rl.lora.target_modules: no linear layer {unknown[0]!r} in {type(decoder).__name__}; expected some of "
            f"{', '.join(there)}; leave it out for all of them"
        )
    model.requires_grad_(False)
    peft = Settings(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=list(wanted)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoraModel(decoder, peft, NAME)


@contextmanager
def without(adapters) -> Iterator[None]:
    """Within it, the model of these adapters computes what it does without them, bit for bit."""
    adapters.disable_adapter_layers()
    try:
        yield
    finally:
        adapters.enable_adapter_layers()


@torch.no_grad()
def merged(model) -> dict[str, Tensor] | None:
    """The model's state with what its adapters add in the weights, under a plain model's names; None without any."""
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        return None
    state = {}
    for name, value in model.state_dict().items():
        layer, _, inner = name.rpartition(".base_layer.")
        if layer:
            value = value + layers[layer].get_delta_weight(NAME) if inner == "weight" else value
            state[f"{layer}.{inner}"] = value.cpu()
        elif not any(name.startswith(f"{each}.lora_") for each in layers):
            state[name] = value
    return state
