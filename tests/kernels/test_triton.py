"""The Triton kernels without a GPU: interpreted on CPU tensors, and compiled ahead of time for three generations."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.kernels import TARGETS, forms
from benchmarks.sass import resources

kernels = importlib.import_module("ril_kernels.token_logprob.triton")


def test_interpreted():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / "interpreted.py")]
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:] + result.stderr[-1000:]


def test_every_kernel_is_compiled():
    found = {form.kernel.__name__ for form in forms()}
    files = [path.read_text() for path in Path(kernels.__file__).parents[1].glob("*/triton.py")]
    entries = {name for text in files for name in re.findall(r"^@triton\.jit\ndef ([a-z]\w*)", text, re.MULTILINE)}
    assert found == entries and {"logits_stats_kernel", "logits_grad_kernel", "group_advantages_kernel"} <= found


@pytest.mark.parametrize("form", list(forms()), ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_ahead_of_time(target, form):
    used = resources(form.compile(target))
    assert used["spill_bytes"] == 0 and used["registers"] > 0 and used["instructions"] > 100
    if form.padded:  # the logits, or hidden states, are what a kernel reads most bits of at a time
        assert max(used["load_bits"]) == 128
        # ... and logits_grad_kernel writes nothing else, discriminator_backward_kernel nothing larger.
        assert form.kernel is not kernels.logits_grad_kernel or used["store_bits"] == [128]
        assert form.kernel.__name__ != "discriminator_backward_kernel" or max(used["store_bits"]) == 128


def test_spills_and_narrow_loads_are_seen():
    some = {form.kernel.__name__: form for form in forms()}
    form = some["group_advantages_kernel"]
    crowded = replace(form, constants={**form.constants, "ROWS": 64}, num_warps=1)  # 256 float64 sums per thread
    assert resources(crowded.compile(90))["spill_bytes"] > 0
    form = some["logits_grad_kernel"]
    unaligned = resources(replace(form, constants={**form.constants, "PADDED": False}).compile(90))
    assert form.dtype == "float16" and unaligned["store_bits"] == [16] and max(unaligned["load_bits"]) < 128


def test_padding_is_told_from_the_strides():
    assert kernels._padded(torch.empty(4, 48)[:, :37]) and not kernels._padded(torch.empty(4, 37))
    assert not kernels._padded(torch.empty(4, 48)[:, 1:38])
