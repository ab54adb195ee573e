"""What a run of the benchmarks ends with on screen: a line per case, ours beside the baseline and the best other."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from benchmarks.case import BOTH, NO_GRAD
from benchmarks.plot import OURS
from benchmarks.runner import FLOOR

WIDTH = 160


def summary_rows(rows: list[dict]) -> list[tuple[str, ...]]:
    """Of each case with a candidate of ours: its cells. Forward and backward together, or without a gradient where
    there is no backward."""
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        some = [row for row in rows if row["case"] == case]
        whole = [row for row in some if row["pass"] == BOTH] or [row for row in some if row["pass"] == NO_GRAD]
        by_name = {row["candidate"]: row for row in whole}
        baseline = next(iter(by_name))
        ours = next((name for name in OURS if name in by_name), None)
        if ours is None:
            continue
        others = {n: r["ratio"]["p50"] for n, r in by_name.items() if n not in (baseline, FLOOR, *OURS)}
        best = min(others, key=others.get, default=None)
        row, base = by_name[ours], by_name[baseline]
        found.append(
            (
                case,
                baseline,
                f"{row['ratio']['p50']:.2f}",
                "" if best is None else f"{others[best]:.2f} {best}",
                f"{row['floor_share']:.0%}" if "floor_share" in row else "",
                f"{row['peak_mib']:.0f} of {base['peak_mib']:.0f}" if "peak_mib" in row else "",
            )
        )
    return found


def print_summary(rows: list[dict], console: Console | None = None) -> None:
    """Default console: stderr; WIDTH columns of it where that is a file."""
    table = Table(title="Ours: time over the baseline's, below 1 is faster", title_justify="left")
    for name in ("case", "baseline", "ours", "best other", "of floor", "peak MiB"):
        table.add_column(name, justify="right" if name in ("ours", "of floor", "peak MiB") else "left")
    for cells in summary_rows(rows):
        table.add_row(*cells)
    (console or Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH)).print(table)
