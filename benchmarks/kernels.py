"""Every Triton kernel compiled ahead of time for three GPU generations: what it needs of one. Runs without a GPU."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

import ril_kernels
from ril_kernels.discriminator_head.fused import NORMS
from ril_kernels.policy_loss.reference import ADVANTAGE_KINDS

TARGETS = (80, 90, 100)  # compute capability: A100, H100, B200
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# The type of each argument, by name; VALUES are compiled for every dtype. Pointers are divisible by 16, as PyTorch's
# allocator gives them.
VALUES = "*values"
ARGUMENTS = {
    **dict.fromkeys(("logits", "hidden", "weight", "bias", "norm_weight", "norm_bias"), VALUES),
    **dict.fromkeys(("grad_hidden", "grad_weight", "grad_bias", "grad_norm_weight", "grad_norm_bias"), VALUES),
    **dict.fromkeys(("temperature", "logprob", "entropy", "grad_logprob", "grad_entropy"), "*fp32"),
    **dict.fromkeys(("rewards", "advantages", "labels", "label_weights", "logit", "score", "reward"), "*fp32"),
    **dict.fromkeys(("loss", "row_loss", "stats", "grad_logit", "grad_loss"), "*fp32"),
    **dict.fromkeys(
        ("last_index", "target", "groups", "seed", "question", "sample_number", "position", "token"), "*i64"
    ),
    **dict.fromkeys(("policy_logprob", "sampling_logprob"), "*fp32"),
    **dict.fromkeys(("banned", "seen", "ids", "finished"), "*i32"),
    "lse": "*fp64",
    **dict.fromkeys(("softcap", "tau", "rate", "penalty", "eps", "smoothing", "denominator"), "fp32"),
    "top_p": "fp64",
    "stride": "i64",
    **dict.fromkeys(("num_vocab", "num_hidden", "num_responses", "top_k", "flags"), "i32"),
}
# The values that a launcher passes for a constant; for any other it passes its module's constant of that name.
CHOICES = {"CAPPED": (False, True), "PADDED": (True, False), "KIND": ADVANTAGE_KINDS, "NORM": NORMS}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Form:
    """A kernel with all that its launcher fixes at compile time."""

    kernel: triton.JITFunction
    dtype: str
    constants: dict[str, object]
    num_warps: int

    def __str__(self) -> str:
        choices = [f"{name}={value}" for name, value in self.constants.items() if name in CHOICES]
        return " ".join([self.kernel.__name__, self.dtype, *choices])

    def compile(self, target: int) -> CompiledKernel:
        names = self.kernel.arg_names
        types = {name: "constexpr" if name in self.constants else ARGUMENTS[name] for name in names}
        types = {name: f"*{DTYPES[self.dtype]}" if each == VALUES else each for name, each in types.items()}
        wide = ("stride", "num_hidden") if self.padded else ()
        aligned = [name for name, each in types.items() if each[0] == "*" or name in wide]
        source = ASTSource(
            self.kernel,
            types,
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        return triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": self.num_warps})

    @property
    def padded(self) -> bool:
        """Whether rows begin and end at a multiple of 16 elements, as every model's hidden states do."""
        return bool(self.constants.get("PADDED", "num_hidden" in self.kernel.arg_names))


def forms() -> Iterator[Form]:
    """Every `*_kernel` of every triton.py of ril_kernels, in every dtype and with every choice of its constants."""
    for info in pkgutil.walk_packages(ril_kernels.__path__, "ril_kernels."):
        if not info.name.endswith(".triton"):
            continue
        module = importlib.import_module(info.name)
        for name, kernel in vars(module).items():
            if not name.endswith("_kernel"):
                continue
            constants = [each for each in kernel.arg_names if each not in ARGUMENTS]
            values = [CHOICES[each] if each in CHOICES else (getattr(module, each),) for each in constants]
            varies = any(ARGUMENTS.get(each) == VALUES for each in kernel.arg_names)
            dtypes = DTYPES if varies else ("float32",)
            for dtype, *chosen in itertools.product(dtypes, *values):
                yield Form(kernel, dtype, dict(zip(constants, chosen, strict=True)), module.NUM_WARPS)


def resources(compiled: CompiledKernel) -> dict:
    """What cuobjdump and nvdisasm say of a kernel's machine code, and its shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([*command, path], check=True, capture_output=True, text=True).stdout
            for command in ((TOOLS / "cuobjdump", "-res-usage"), (TOOLS / "nvdisasm",))
        )
    (used,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    registers, stack, local = map(int, used)
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
    return {
        "registers": registers,
        "spill_bytes": stack + local,
        "shared_bytes": compiled.metadata.shared,  # dynamic: not in the machine code
        "instructions": sum(operation != "NOP" for operation in operations),
        "load_bits": _widths(operations, "LDG"),
        "store_bits": _widths(operations, "STG"),
    }


def _widths(operations: list[str], kind: str) -> list[int]:
    """Bits that the global loads or stores move per thread, each width once: LDG.E.128 -> 128, LDG.E.U16 -> 16."""
    found = {re.search(r"\.[US]?(8|16|64|128|256)\b", each) for each in operations if each.split(".")[0] == kind}
    return sorted({int(width[1]) if width else 32 for width in found})


def rows(origin: dict) -> Iterator[dict]:
    """One row per kernel, dtype, choice and target."""
    for form in forms():
        for target in TARGETS:
            yield {
                "kernel": form.kernel.__name__,
                "dtype": form.dtype,
                "constants": form.constants,
                "num_warps": form.num_warps,
                "target": f"sm_{target}",
                **resources(form.compile(target)),
                **origin,
            }
