"""What the machine code of a compiled kernel says of it, by the cuobjdump and nvdisasm that Triton brings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
LABEL = re.compile(r"^(\.L_x_\d+):")
# Classes of the instruction mix, by the first part of an instruction's name; the rest is integers, moves and branches.
CLASSES = {
    "float32": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSET", "FSETP", "FADD2", "FMUL2", "FFMA2", "FMNMX3"),
    "float16": ("HADD2", "HMUL2", "HFMA2", "HMNMX2", "HSET2", "HSETP2"),
    "float64": ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"),
    "special": ("MUFU",),  # exp2, log2, reciprocal, square root
    "convert": ("F2F", "F2FP", "F2I", "I2F", "I2FP"),
    "load": ("LDG", "LDGSTS", "UBLKCP", "UTMALDG"),
    "store": ("STG", "UTMASTG", "RED", "REDG", "ATOM", "ATOMG"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ATOMS"),
    "shuffle": ("SHFL", "REDUX", "CREDUX", "VOTE"),
    "barrier": ("BAR", "SYNCS", "WARPSYNC", "MEMBAR"),
    "tensor": ("HMMA", "HGMMA", "UTCHMMA", "UTCMMA", "DMMA"),
}
READS = ("LDG", "LDGSTS")  # of global memory, into registers and shared memory
CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names}


@dataclass(frozen=True)
class SM:
    """What the programs on one multiprocessor share."""

    warps: int
    programs: int
    shared_bytes: int
    float32_lanes: int  # float32 instructions per clock


# CUDA C++ Programming Guide, "Compute Capabilities", tables "Technical Specifications per Compute Capability" and
# "Throughput of Native Arithmetic Instructions". Registers are handed out in the units of cuda_occupancy.h.
SMS = {80: SM(64, 32, 164 << 10, 64), 90: SM(64, 32, 228 << 10, 128), 100: SM(64, 32, 228 << 10, 128)}
REGISTERS, REGISTER_UNIT = 64 << 10, 256  # of a multiprocessor, a quarter for each scheduler; of a warp
SHARED_UNIT, SHARED_OF_CUDA = 128, 1024  # bytes; what CUDA keeps of each program's
TENSOR_COLUMNS = 512  # of a multiprocessor's tensor memory, which sm_100 has (PTX ISA, "Tensor Memory")
SCHEDULERS, LANES = 4, 32  # each issues an instruction of a warp, of so many threads, per clock


def occupancy(target: int, num_warps: int, registers: int, shared_bytes: int, tensor_columns: int = 0) -> int:
    """Warps that live on a multiprocessor at once, of 64."""
    sm = SMS[target]
    of_registers = SCHEDULERS * (REGISTERS // SCHEDULERS // _whole(registers * LANES, REGISTER_UNIT))
    of_shared = sm.shared_bytes // _whole(shared_bytes + SHARED_OF_CUDA, SHARED_UNIT)
    of_tensor = TENSOR_COLUMNS // tensor_columns if tensor_columns else sm.programs
    return num_warps * min(sm.programs, min(sm.warps, of_registers) // num_warps, of_shared, of_tensor)


def _whole(amount: int, unit: int) -> int:
    return -(-amount // unit) * unit


def instructions(code: str) -> tuple[list[str], list[tuple[int, int]]]:
    """nvdisasm's text -> the instructions' names, and the first and the end of each outermost loop that reads global
    memory. A loop is what lies between a label and a branch back to it; a slow path that the compiler put behind the
    kernel's end branches back too, and has an EXIT in between."""
    names, labels, loops = [], {}, []
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := INSTRUCTION.match(line):
            names.append(found[1])
            target = re.search(r"\.L_x_\d+", found[2])
            if found[1].startswith("BRA") and target and target[0] in labels:
                loops.append((labels[target[0]], len(names)))
    loops = [each for each in loops if "EXIT" not in names[slice(*each)] and _count(names[slice(*each)], *READS)]
    outermost = [each for each in loops if not any(o[0] <= each[0] and each[1] <= o[1] for o in loops if o != each)]
    return names, sorted(outermost)


def _count(names: list[str], *kinds: str) -> int:
    return sum(name.split(".")[0] in kinds for name in names)


def machine_code(compiled: CompiledKernel) -> tuple[str, str]:
    """cuobjdump's line of the resources, and nvdisasm's text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([*command, path], check=True, capture_output=True, text=True).stdout
            for command in ((TOOLS / "cuobjdump", "-res-usage"), (TOOLS / "nvdisasm",))
        )
    return usage, code


def resources(compiled: CompiledKernel) -> dict:
    """Registers, spilled and shared bytes, warps per multiprocessor, instructions by class and in each loop that reads
    global memory, and the widths of global loads and stores."""
    usage, code = machine_code(compiled)
    (used,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    registers, stack, local = map(int, used)
    names, loops = instructions(code)
    mix = Counter(CLASS_OF.get(name.split(".")[0], "other") for name in names if name != "NOP")
    made = compiled.metadata  # its shared memory is dynamic, so not in the machine code
    return {
        "registers": registers,
        "spill_bytes": stack + local,
        "shared_bytes": made.shared,
        "resident_warps": occupancy(made.target.arch, made.num_warps, registers, made.shared, made.tmem_size),
        "instructions": mix.total(),
        "mix": {kind: mix[kind] for kind in (*CLASSES, "other") if mix[kind]},
        "loops": [end - first for first, end in loops],
        "load_bits": _widths(names, *READS),
        "store_bits": _widths(names, "STG"),
    }


def _widths(names: list[str], *kinds: str) -> list[int]:
    """Bits that the global loads or stores move per thread, each width once: LDG.E.128 -> 128, LDG.E.U16 -> 16."""
    found = {re.search(r"\.[US]?(8|16|64|128|256)\b", each) for each in names if each.split(".")[0] in kinds}
    return sorted({int(width[1]) if width else 32 for width in found})
