"""The C++ library `_cpu.so`: found, checked and declared here, and nowhere else.

Loaded at the first call, never at import. torch is imported before the library is, so that both use the one
OpenMP runtime which torch has already loaded.
"""

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path

import torch  # noqa: F401  (before the library: see above)

import ril_kernels

ABI_VERSION = 5  # RIL_ABI_VERSION in abi.h

ISA = 0  # of the vectorised functions: 0 is the best that this CPU has, 1 is scalar (tests set it)

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_FLOAT, _DOUBLE = ctypes.c_float, ctypes.c_double

# logits, stride, rows, columns, first column, vocab, target, temperature, softcap, isa
_TILE = (_POINTER, _INT64, _INT64, _INT64, _INT64, _INT64, _POINTER, _POINTER, _FLOAT, _INT32)
# ..., sums (rows, 4) f64, kept, its stride, tops f32 or null, logprob, entropy (rows,) f32, lse (rows,) f64
_TILE_STATS = (*_TILE, _POINTER, _POINTER, _INT64, _POINTER, _POINTER, _POINTER, _POINTER)
# ..., out, its stride, tops f32 or null, lse f64, entropy, grad_logprob, grad_entropy f32 or null (rows,)
_TILE_GRAD = (*_TILE, _POINTER, _INT64, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER)
# logits, stride, rows, vocab, seed, question, sample number, position (rows,) i64,
# temperature, top k, top p, repetition penalty, banned bits, seen bits (rows, W) i32 in and out, or null, isa,
# token (rows,) i64 out, policy logprob, sampling logprob (rows,) f32 out
_SAMPLE = (_POINTER, _INT64, _INT64, _INT64, _POINTER, _POINTER, _POINTER, _POINTER, _FLOAT, _INT64, _DOUBLE, _FLOAT,
           _POINTER, _POINTER, _INT32, _POINTER, _POINTER, _POINTER)  # fmt: skip

# hidden, last index, weight, bias, norm weight, norm bias, labels, label weights, stride, H, N, norm,
# eps, temperature, label smoothing, denominator, isa, logits, scores, rewards (N,), loss, stats (N, 4) f32 out
_DISCRIMINATOR_FORWARD = (*(_POINTER,) * 8, _INT64, _INT64, _INT64, _INT32, *(_DOUBLE,) * 4, _INT32, *(_POINTER,) * 5)
# hidden, last index, weight, norm weight, norm bias, labels, label weights, scores, stats, grad_logits, grad_loss,
# stride, H, N, T, temperature, label smoothing, denominator, isa, gradients of hidden, weight, bias, norm weight and
# norm bias out, or null
_DISCRIMINATOR_BACKWARD = (*(_POINTER,) * 11, *(_INT64,) * 4, *(_DOUBLE,) * 3, _INT32, *(_POINTER,) * 5)

# Every exported function and the types of its arguments; each returns int32.
SIGNATURES: dict[str, tuple[type, ...]] = {
    "ril_abi_version": (),
    # rewards (N,) f32, groups (N,) i64, num_responses, kind, advantages (N,) f32 out
    "ril_group_advantages_f32": (_POINTER, _POINTER, _INT64, _INT32, _POINTER),
    "ril_tile_stats_f32": _TILE_STATS,
    "ril_tile_stats_bf16": _TILE_STATS,
    "ril_tile_grad_f32": _TILE_GRAD,
    "ril_tile_grad_bf16": _TILE_GRAD,
    "ril_sample_f32": _SAMPLE,
    "ril_sample_bf16": _SAMPLE,
    "ril_discriminator_forward_f32": _DISCRIMINATOR_FORWARD,
    "ril_discriminator_forward_bf16": _DISCRIMINATOR_FORWARD,
    "ril_discriminator_backward_f32": _DISCRIMINATOR_BACKWARD,
    "ril_discriminator_backward_bf16": _DISCRIMINATOR_BACKWARD,
    # memory, bytes
    "ril_huge_pages": (_POINTER, _INT64),
}

_STATUS = {1: "bad argument", 2: "out of memory", 3: "internal error"}  # abi.h
_REMEDY = (
    "Build it: `pip install ril-engine`, or in a checkout `pip install --no-deps -e .` (needs a C++ compiler "
    "with OpenMP). The PyTorch form needs no library: backend='reference'."
)


def find_library(package_path: Iterable[str] | None = None) -> Path:
    """`_cpu.so` along the package's `__path__`: an editable install does not put it beside the sources."""
    folders = [Path(folder) for folder in (ril_kernels.__path__ if package_path is None else package_path)]
    for folder in folders:
        if (folder / "_cpu.so").is_file():
            return folder / "_cpu.so"
    searched = ", ".join(map(str, folders))
    raise RuntimeError(f"ril_kernels: the native library _cpu.so is in none of: {searched}. {_REMEDY}")


def load_library(path: Path) -> ctypes.CDLL:
    """Opens the library, checks its ABI version and declares every signature."""
    try:
        native = ctypes.CDLL(str(path))
        native.ril_abi_version.argtypes, native.ril_abi_version.restype = (), _INT32
        version = native.ril_abi_version()
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"ril_kernels: {path} cannot be loaded ({error}). {_REMEDY}") from error
    if version != ABI_VERSION:
        raise RuntimeError(
            f"ril_kernels: {path} has ABI version {version}, expected {ABI_VERSION}: it was built from other "
            f"sources. {_REMEDY}"
        )
    for name, argtypes in SIGNATURES.items():
        function = getattr(native, name)
        function.argtypes, function.restype = argtypes, _INT32
    return native


@functools.cache
def library() -> ctypes.CDLL:
    """The library of this process, loaded once."""
    return load_library(find_library())


def call(name: str, *arguments: int) -> None:
    """Calls an exported function; a status other than 0 becomes a RuntimeError."""
    status = getattr(library(), name)(*arguments)
    if status != 0:
        meaning = _STATUS.get(status, "unknown")
        raise RuntimeError(f"{name}: the native library returned status {status} ({meaning})")
