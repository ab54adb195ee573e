"""What `ril plan` shows: a table of phases, and a verdict."""

from __future__ import annotations

import sys

from ril_engine.plan import OWN


def verdict(result: dict) -> str:
    """One line: whether it fits, and what would."""
    peak = f"{result['peak_gib']:.1f} of {result['gpu_memory_gib']:g} GiB per GPU, in phase {result['peak_phase']}"
    if result["fits"]:
        return f"fits: {peak}; a step takes at least {result['step_s']:.3g} s on {result['gpus']} x {result['gpu']}"
    if result["would_fit"]:
        return f"does not fit: {peak}; it would with --set {' --set '.join(result['would_fit'].split())}"
    return f"does not fit: {peak}; nor does it with any of the settings tried: take more or larger GPUs"


def show(result: dict) -> None:
    """The phases as a table, and the verdict, on stderr: the last line of stdout is for programs."""
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for phase in result["phases"] for name in phase["parts"] if name != OWN))
    table = Table(title=f"GiB on each of {result['gpus']} x {result['gpu']}, and the least time of a step")
    for column in ("phase", *names, OWN, "peak", "seconds"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase in result["phases"]:
        sizes = [*(phase["parts"].get(name, 0) for name in (*names, OWN)), phase["peak"]]
        table.add_row(phase["name"], *(f"{size / 2**30:.2f}" for size in sizes), f"{phase['seconds']:.3f}")
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)
    console.print(table)
    if result.get("layouts"):
        layouts = Table(title="the same GPUs, shared out")
        for column in ("layout", "peak GiB", "sampling s", "transfer s", "training s", "step s", "step s, overlapped"):
            layouts.add_column(column, justify="left" if column == "layout" else "right")
        for row in result["layouts"]:
            layouts.add_row(*map(str, row.values()))
        console.print(layouts)
    console.print(verdict(result), soft_wrap=True, highlight=False)
