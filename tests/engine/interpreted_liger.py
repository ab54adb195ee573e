"""Run by test_packed_forward.py in a process of its own with TRITON_INTERPRET=1: Liger's kernels on CPU tensors."""

import copy

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from liger_kernel.ops import rms_norm
from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb
from test_packed_forward import error, packed, vlm, worst
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from ril_engine import families
from ril_engine.config import LoraConfig
from ril_engine.lora import add_adapters


@triton.jit
def rsqrt(x):
    return 1.0 / tl.sqrt(x)


def scalar(value, given=interpreter._implicit_cvt):
    if isinstance(value, float):  # as the compiler passes it; the interpreter leaves it a Python number
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    return given(value)


@pytest.mark.parametrize(("name", "modeling"), [("qwen2_5_vl", modeling_qwen2_5_vl), ("internvl", modeling_qwen2)])
def test_liger_changes_the_language_model_only_and_no_result(name, modeling, tmp_path, monkeypatch):
    monkeypatch.setattr(rms_norm, "rsqrt", rsqrt)  # the interpreter has no libdevice
    monkeypatch.setattr(interpreter, "_implicit_cvt", scalar)
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", modeling.apply_rotary_pos_emb)
    model, encoder = vlm(tmp_path, name)
    model = model.float()
    plain = copy.deepcopy(model)
    want, want_gradients, _ = packed(plain, encoder, "shared", 10_000)
    forward = type(model).forward
    families.use_liger(families.language_model(model))
    got, got_gradients, _ = packed(model, encoder, "shared", 10_000)
    assert modeling.apply_rotary_pos_emb is liger_rotary_pos_emb
    changed = {name: module.forward.__func__ for name, module in model.named_modules() if "forward" in vars(module)}
    layers = range(model.config.text_config.num_hidden_layers)
    names = ["input_layernorm", "post_attention_layernorm", "mlp"]
    expected = {f"model.language_model.layers.{i}.{each}" for i in layers for each in names}
    assert changed.keys() == expected | {"model.language_model.norm"}
    assert {f for n, f in changed.items() if n.endswith("norm")} == {LigerRMSNorm.forward}
    assert {f for n, f in changed.items() if n.endswith("mlp")} == {LigerSwiGLUMLP.forward}
    assert type(model).forward is forward  # its fused loss would be here
    assert max(error(g, w) for g, w in zip(got, want, strict=True)) < 1e-5
    assert worst(got_gradients, want_gradients)[0] < 1e-5
    # Adapters are in the layers that Liger's MLP calls.
    for each in (plain, model):
        add_adapters(each, LoraConfig(rank=4), seed=0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in filter(lambda parameter: parameter.requires_grad, each.parameters()):
                parameter.normal_(0, 0.03, generator=generator)
    adapted, adapted_gradients, _ = packed(plain, encoder, "shared", 10_000)
    assert max(error(a, w) for a, w in zip(adapted, want, strict=True)) > 1e-4
    got, got_gradients, _ = packed(model, encoder, "shared", 10_000)
    assert max(error(g, a) for g, a in zip(got, adapted, strict=True)) < 1e-5
    assert worst(got_gradients, adapted_gradients)[0] < 1e-5
