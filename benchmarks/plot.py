"""The ratios of the main cases as a picture, beside RESULTS.md."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.case import BOTH, NO_GRAD

# The first words of a case's name; a line each, in this order.
MAIN = (
    "step RL alone P=256",
    "step RIL P=1024",
    "policy_pack 14 x 14 picture",
    "policy_pack 28 x 32 picture",
    "policy_pack text only",
    "rollout 14 x 14 picture",
    "token_logprob small",
    "token_logprob Qwen2.5-0.5B T=",
    "policy_loss small",
    "policy_loss Qwen2.5-0.5B T=",
    "prefix_attention P=256",
    "discriminator_head T=4096 N=128 H=896",
    "sampling filtered",
)
OURS = ("ril_kernels", "ril_engine", "shared")


def plot_ratios(rows: list[dict], folder: Path) -> Path | None:
    """Draw one device's ratios, the newest row of each case and candidate: ours, peers and the floor over the baseline,
    of forward and backward together, or without a gradient where there is no backward.

    Returns:
        The SVG file, or None where none of the main cases has rows.
    """
    lines = []
    for start in MAIN:
        some = [row for row in rows if row["case"].startswith(start)]
        whole = [row for row in some if row["pass"] == BOTH] or [row for row in some if row["pass"] == NO_GRAD]
        if whole:
            lines.append((whole[0]["case"], whole))
    if not lines:
        return None
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    path = folder / f"ratios_{re.sub(r'[^a-z0-9]+', '_', rows[0]['device_name'].lower())}.svg"
    # Text stays text, and the ids in the file are the same each time.
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name, "font.size": 8}):
        figure, axes = pyplot.subplots(figsize=(8, 1 + 0.32 * len(lines)), layout="constrained")
        for height, (_, whole) in enumerate(lines):
            for row in whole:
                ratio = row["ratio"]
                if row["candidate"] in OURS:
                    axes.plot([ratio["p20"], ratio["p80"]], [height, height], color="tab:blue", linewidth=2)
                    axes.plot(ratio["p50"], height, "o", color="tab:blue")
                    axes.annotate(f"{ratio['p50']:.2f}", (ratio["p50"], height - 0.25), ha="center", color="tab:blue")
                else:
                    axes.plot(ratio["p50"], height, "|" if row["candidate"] == "floor" else ".", color="tab:gray")
        axes.axvline(1, color="tab:gray", linewidth=0.5)
        axes.set(
            xscale="log",
            yticks=range(len(lines)),
            yticklabels=[case for case, _ in lines],
            ylim=(len(lines) - 0.4, -0.8),
            title="Time over the baseline's, left is faster; blue ours, 20th to 80th percentile; dots peers; | floor",
        )
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
    return path
