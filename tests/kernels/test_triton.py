"""The Triton kernels without a GPU: interpreted on CPU tensors, and compiled ahead of time for three generations."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

kernels = importlib.import_module("ril_kernels.token_logprob.triton")
POINTERS = {"logits": None, "target": "i64", "temperature": "fp32", "logprob": "fp32", "entropy": "fp32"}
POINTERS |= {"lse": "fp64", "grad_logprob": "fp32", "grad_entropy": "fp32"}
SCALARS = {"softcap": "fp32", "stride": "i64", "num_vocab": "i32"}


def test_interpreted():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / "interpreted.py")]
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:] + result.stderr[-1000:]


def compiled(kernel, dtype: str, arch: int, capped: bool, padded: bool, folder: Path) -> tuple[str, str]:
    """Resources and machine code of a kernel, as cuobjdump and nvdisasm print them."""
    names = kernel.arg_names
    pointers = {name: f"*{width or dtype}" for name, width in POINTERS.items()}
    signature = {name: pointers.get(name) or SCALARS.get(name, "constexpr") for name in names}
    constants = {"CAPPED": capped, "PADDED": padded, "BLOCK": kernels.BLOCK}
    divisible = [i for i, name in enumerate(names) if name in POINTERS or (padded and name == "stride")]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    options = {"num_warps": kernels.NUM_WARPS}
    cubin = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]
    (folder / "kernel.cubin").write_bytes(cubin)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def run(*command: str) -> str:
        return subprocess.run(
            [*command, str(folder / "kernel.cubin")], check=True, capture_output=True, text=True
        ).stdout

    return run(str(tools / "cuobjdump"), "-res-usage"), run(str(tools / "nvdisasm"))


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unaligned"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled_ahead_of_time(arch, dtype, padded, tmp_path):
    for kernel in (kernels.logits_stats_kernel, kernels.logits_grad_kernel):
        for capped in (False, True):
            resources, code = compiled(kernel, dtype, arch, capped, padded, tmp_path)
            assert re.findall(r"STACK:(\d+)", resources) == ["0"] and re.findall(r"LOCAL:(\d+)", resources) == ["0"]
            assert not re.search(r"\b(LDL|STL)\b", code)  # no spill
            if padded:
                assert "LDG.E.128" in code, f"{kernel.__name__}: the logits are not read 128 bits at a time"
                if kernel is kernels.logits_grad_kernel:
                    stores = set(re.findall(r"STG[.\w]*", code))
                    assert stores and all(".128" in store for store in stores), stores


def test_padding_is_told_from_the_strides():
    assert kernels._padded(torch.empty(4, 48)[:, :37]) and not kernels._padded(torch.empty(4, 37))
    assert not kernels._padded(torch.empty(4, 48)[:, 1:38])
