"""Validation shared by the public functions. Every message names the argument, what it got, what was
expected and what to do about it.

Values (index ranges, NaN) are read only where reading them is free, on the CPU: on an accelerator it would be
a host sync, and there PyTorch's own gather stops an index that is out of range.
"""

import math
from typing import NoReturn

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refuse(argument: str, got: object, expected: str, remedy: str, *, error: type = ValueError) -> NoReturn:
    raise error(f"{argument}: got {got}, expected {expected}. {remedy}")


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Log-probs, logits and losses are float32, or float64 where the input is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(argument: str, value: object, dtypes: tuple[torch.dtype, ...], remedy: str) -> None:
    if not isinstance(value, Tensor):
        refuse(argument, type(value).__name__, "a torch.Tensor", remedy, error=TypeError)
    if value.dtype not in dtypes:
        expected = " or ".join(map(dtype_name, dtypes))
        refuse(argument, f"dtype {dtype_name(value.dtype)}", expected, remedy, error=TypeError)


def check_device(argument: str, value: Tensor, like: str, device: torch.device) -> None:
    if value.device != device:
        remedy = f"Move it with .to({like}.device)."
        refuse(argument, f"device {value.device}", f"{device}, where {like} is", remedy)


def check_number(argument: str, value: object, remedy: str, *, low: float = 0.0, low_open: bool = True) -> None:
    """A finite Python number above `low` (or at it, where `low_open` is False)."""
    bound = f"a finite number {'above' if low_open else 'of at least'} {low:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(argument, type(value).__name__, bound, remedy, error=TypeError)
    if not low <= value < math.inf or (low_open and value == low):  # refuses NaN; torch.compile traces no isfinite
        refuse(argument, value, bound, remedy)


def check_choice(argument: str, value: object, choices: tuple[str, ...], remedy: str) -> None:
    if value not in choices:
        refuse(argument, repr(value), "one of " + ", ".join(map(repr, choices)), remedy)


def check_index_range(argument: str, values: Tensor, size: int, size_name: str, remedy: str) -> None:
    """Every value in [0, size); read on the CPU only."""
    if values.device.type != "cpu" or values.numel() == 0:
        return
    low, high = map(int, values.aminmax())
    if low < 0 or high >= size:
        expected = f"values in [0, {size}) where {size_name} = {size}"
        refuse(argument, f"the value {low if low < 0 else high}", expected, remedy)


def check_finite(argument: str, values: Tensor, remedy: str) -> None:
    """Reads the values, wherever they are: where a sync matters, call it for CPU tensors only."""
    finite = values.isfinite()
    if not bool(finite.all()):
        position = int((~finite).nonzero()[0])
        refuse(argument, f"{float(values[position])} at index {position}", "finite values", remedy)


class Shapes:
    """Binds the letters of a shape legend to sizes, argument by argument, and refuses whatever disagrees.

    >>> shapes.check("hidden", hidden, "T H", "...")  # binds T and H
    >>> shapes.check("lm_head", lm_head, "V H", "...")  # binds V, refuses another H
    """

    def __init__(self) -> None:
        self.size: dict[str, int] = {}
        self._fixed_by: dict[str, str] = {}

    def check(self, argument: str, value: Tensor, letters: str, remedy: str) -> None:
        names, shape = letters.split(), value.shape
        fits = len(names) == len(shape)
        for name, got in zip(names, shape):  # noqa: B905 (in every call of every op: nothing that can be spared)
            fits &= got == (int(name) if name.isdigit() else self.size.get(name, got))
        if not fits or 0 in shape:
            self._refuse(argument, shape, names, fits, remedy)
        for name, got in zip(names, shape):  # noqa: B905
            if name not in self.size and not name.isdigit():
                self.size[name], self._fixed_by[name] = got, argument

    def _refuse(self, argument: str, shape: torch.Size, names: list[str], fits: bool, remedy: str) -> NoReturn:
        got = f"shape {tuple(shape)}"
        legend = "(" + ", ".join(names) + (",)" if len(names) == 1 else ")")
        if fits:
            refuse(argument, got, f"{legend} with no size of 0", "An empty batch has no loss: skip the call.")
        known = [name for name in names if name in self.size]
        bound = [f"{name} = {self.size[name]} as in {self._fixed_by[name]}" for name in known]
        refuse(argument, got, f"{legend} with {' and '.join(bound)}" if bound else legend, remedy)
