"""One self-contained HTML page about a run: accuracy before and after, curves, sample answers, settings.

Responses are whatever a model wrote: every text goes through html.escape, every picture is decoded and encoded
again, and the page's own policy forbids scripts and requests.
"""

from __future__ import annotations

import base64
import io
import json
import re
from datetime import datetime
from html import escape
from itertools import zip_longest
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from PIL import Image

from ril_engine.errors import UserError
from ril_engine.questions import pictures
from ril_engine.runlog import accuracy_rows, clock, read_jsonl

ALGORITHMS = {"ril": "RIL", "dr_grpo": "Dr. GRPO", "grpo": "GRPO", "sft": "SFT on responses"}
INK = "#010203"  # stands for the page's text colour, so that one drawing suits light and dark
COLOURS = {
    "student": "#2f81d6",
    "teachers": "#e0762f",
    "D": "#9a63d8",
    "accuracy": "#9a63d8",
    "AUC": "#2fa37c",
    "calibration error": "#9a63d8",
    "reward by length": "#8a94a6",
    "score by length": "#d1a52c",
    "greedy": "#2f81d6",
    "sampled": "#2fa37c",
    "spread": "#2f81d6",
    "all zero": "#8a94a6",
    "clipped below": "#2f81d6",
    "clipped above": "#e0762f",
    "cut": "#8a94a6",
}
TEACHER_COLOURS = ("#e0762f", "#2fa37c", "#d1a52c", "#c0362c", "#8a94a6")
PHASE_COLOURS = ("#2f81d6", "#9a63d8", "#d1a52c", "#e0762f", "#2fa37c", "#8a94a6")
PANELS = {  # title: (what to read from it, y axis), in the page's order
    "Answer reward": ("Mean over responses: of one verifier or judge, the share that it accepts.", "share"),
    "Similarity reward": ("Share of responses that D takes for a teacher's.", "share"),
    "Discriminator": ("Accuracy near 1 teaches nothing, 0.5 is guessing; shaded: 0.70 to 0.85.", "share"),
    "Score of D": ('Mean probability of "student" that D gives to a side.', "share"),
    "Trust in D": (
        "Calibration: how far its scores are from the truth. By length: share of the reward that the length explains.",
        "share",
    ),
    "Answer reward by source": ("Each teacher has its own line.", "share"),
    "Similarity reward by source": ("Each teacher has its own line.", "share"),
    "Validation accuracy": ("Share of the validation questions that the student answers rightly.", "share"),
    "Unscored": ("Share of responses that an answer reward could not score; they count as 0.", "linear"),
    "KL to the reference policy": ("How far the student has moved.", "linear"),
    "Learning signal": ("Spread of advantages; share of questions where all are zero.", "linear"),
    "Response length": ("Mean tokens per response.", "linear"),
    "Entropy": ("Of the student's distribution over the next token, in nats.", "linear"),
    "Left out": ("Share of tokens that the clip stops, and of the student's responses that the limit cuts.", "linear"),
    "Policy loss": ("Near 0 by design; not a measure of quality.", "linear"),
    "Discriminator loss": ("0.69 is guessing.", "linear"),
    "Gradient norms": ("Before clipping; logarithmic.", "log"),
}
CURVES = {  # metric: (panel, label)
    "reward/student_answer": ("Answer reward", "student"),
    "reward/teacher_answer": ("Answer reward", "teachers"),
    "reward/student_similarity": ("Similarity reward", "student"),
    "reward/teacher_similarity": ("Similarity reward", "teachers"),
    "discriminator/accuracy": ("Discriminator", "accuracy"),
    "discriminator/auc": ("Discriminator", "AUC"),
    "discriminator/student_score": ("Score of D", "student"),
    "discriminator/teacher_score": ("Score of D", "teachers"),
    "discriminator/calibration_error": ("Trust in D", "calibration error"),
    "reward/similarity_by_length": ("Trust in D", "reward by length"),
    "discriminator/score_by_length": ("Trust in D", "score by length"),
    "validation/greedy": ("Validation accuracy", "greedy"),
    "validation/sampled": ("Validation accuracy", "sampled"),
    "reward/unscored": ("Unscored", "student"),
    "kl": ("KL to the reference policy", "student"),
    "advantage/spread": ("Learning signal", "spread"),
    "zero_advantage_groups": ("Learning signal", "all zero"),
    "length/student": ("Response length", "student"),
    "length/teacher": ("Response length", "teachers"),
    "entropy": ("Entropy", "student"),
    "clip/low": ("Left out", "clipped below"),
    "clip/high": ("Left out", "clipped above"),
    "truncated": ("Left out", "cut"),
    "loss/policy": ("Policy loss", "student"),
    "loss/discriminator": ("Discriminator loss", "D"),
    "grad_norm/student": ("Gradient norms", "student"),
    "grad_norm/discriminator": ("Gradient norms", "D"),
}
BY_SOURCE = {"Answer reward by source": "reward/answer/", "Similarity reward by source": "reward/similarity/"}
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f5f6f8;--ink:#1c2430;--soft:#5c6675;--line:#dfe3e9;--up:#14804a;
--down:#c0362c}
@media(prefers-color-scheme:dark){:root{--bg:#12161c;--card:#1b212a;--ink:#e4e9f0;--soft:#9aa6b6;--line:#303946;
--up:#4cc38a;--down:#ff7b6e}}
body{margin:0 auto;padding:2rem 1.25rem 4rem;max-width:70rem;background:var(--bg);color:var(--ink);
font:1rem/1.5 system-ui,sans-serif}
h1{font-size:1.7rem;line-height:1.25;margin:0}h2{font-size:1.25rem;margin:2.5rem 0 .75rem}
h3{font-size:1rem;margin:1.5rem 0 .5rem}.soft,figcaption span{color:var(--soft);font-size:.875rem}
.numbers,.curves{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));margin:1.5rem 0}
.curves{grid-template-columns:repeat(auto-fit,minmax(19rem,1fr))}
.numbers div,figure,.sample{background:var(--card);border-radius:.6rem;padding:.9rem 1rem;margin:0}
.numbers b{display:block;font-size:1.35rem;white-space:nowrap;font-variant-numeric:tabular-nums}
figcaption b{display:block}figure svg{width:100%;height:auto;display:block;margin-top:.4rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.925rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .75rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;
white-space:nowrap}th{color:var(--soft);font-weight:500}th:first-child,td:first-child,.text{text-align:left}
.all td{font-weight:600}.up{color:var(--up)}.down{color:var(--down)}
.sample{display:flex;flex-wrap:wrap;gap:1rem 1.5rem;margin-bottom:1rem}.sample>div{flex:1 1 28rem;min-width:0}
.sample table{width:100%}.sample p{margin:0 0 .6rem}.sample img{width:12rem;align-self:flex-start;max-width:100%;
border-radius:.3rem}.tiny{image-rendering:pixelated}td.text{width:99%;min-width:14rem}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;max-height:14rem;overflow:auto;unicode-bidi:isolate;
font:.875rem/1.45 ui-monospace,monospace}details pre{max-height:none;background:var(--card);padding:1rem}
summary{cursor:pointer}
"""
HISTOGRAM = "reward/histogram/"  # loop.py's, and the value
LEGEND_CHARACTERS = 56  # side by side in a chart's legend
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of the run; NaN where nothing is known nearby."""
    half = min(max(1, len(values) // 40), (len(values) - 1) // 2)
    kernel, known = np.ones(2 * half + 1), np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    weight = np.convolve(known, kernel, mode="same")
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0)


def _column(rows: list[dict], group: str, name: str) -> np.ndarray:
    """One metric over the steps; NaN where a step has none."""
    return np.array([row[group].get(name) for row in rows], dtype=float)


def _svg(figure: Figure, salt: str) -> str:
    """A drawing as inline SVG in the page's own text colour, with ids that no other drawing uses."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    return re.sub(r' id="[\w.]+_\d+"', "", svg).replace(INK, "currentColor")  # figure_1, line2d_3, ...


def _axes():
    figure = Figure(figsize=(4.0, 2.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def _legend(axes) -> None:
    """Above the curves, in as many columns as fit: a legend that is wider than the chart would squeeze the curves."""
    longest = max(len(label) for label in axes.get_legend_handles_labels()[1])
    ncols = max(1, LEGEND_CHARACTERS // (longest + 5))  # five for the line and the gaps
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), borderaxespad=0, borderpad=0, ncols=ncols, frameon=False)


def _panel(rows: list[dict], title: str, scale: str) -> str:
    """Raw values pale, their moving average over them; "" when the run has none of the metrics."""
    lines = {label: _column(rows, "metrics", name) for name, (panel, label) in CURVES.items() if panel == title}
    colours = dict(COLOURS)
    if prefix := BY_SOURCE.get(title):
        names = sorted({name for row in rows for name in row["metrics"] if name.startswith(prefix)})
        lines = {name.removeprefix(prefix): _column(rows, "metrics", name) for name in names} if len(names) > 1 else {}
        teachers = (label for label in lines if label != "student")
        colours |= {label: TEACHER_COLOURS[i % len(TEACHER_COLOURS)] for i, label in enumerate(teachers)}
    lines = {label: values for label, values in lines.items() if np.isfinite(values).any()}
    if not lines:
        return ""
    steps = [row["step"] for row in rows]
    figure, axes = _axes()
    for label, values in lines.items():
        if title == "Validation accuracy":  # of some steps only
            known = np.isfinite(values)
            axes.plot(np.array(steps)[known], values[known], color=colours[label], label=label, marker="o")
            continue
        axes.plot(steps, values, color=colours[label], alpha=0.35, linewidth=0.8)
        marker = "o" if len(rows) == 1 else None
        axes.plot(steps, _smooth(values), color=colours[label], label=label, linewidth=1.8, marker=marker)
    if title == "Discriminator":
        axes.axhspan(0.70, 0.85, color="#2fa37c", alpha=0.15, linewidth=0)
    if scale == "share":
        known = np.concatenate([values[np.isfinite(values)] for values in lines.values()])
        low, high = min(0.0, known.min()), max(1.0, known.max())  # a weighted sum of rewards may be any number
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    if scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if len(lines) > 1:
        _legend(axes)
    return _svg(figure, title)


def _phases_panel(rows: list[dict]) -> str:
    """Seconds per phase, stacked, and what "step" has beyond them as "other"."""
    names = [name for name in rows[-1]["seconds"] if name != "step"]
    parts = [np.nan_to_num(_smooth(_column(rows, "seconds", name))) for name in names]
    whole = np.nan_to_num(_smooth(_column(rows, "seconds", "step")))
    parts.append(np.maximum(0.0, whole - sum(parts)))
    figure, axes = _axes()
    colours = [*(PHASE_COLOURS[i % 5] for i in range(len(names))), PHASE_COLOURS[-1]]
    axes.stackplot([row["step"] for row in rows], parts, labels=[*names, "other"], colors=colours, alpha=0.85)
    axes.set_ylim(bottom=0)
    _legend(axes)
    return _svg(figure, "seconds")


def _rewards_panel(rows: list[dict]) -> str:
    """Share of the student's responses at each total reward, stacked; "" when the run has none."""
    names = {name for row in rows for name in row["metrics"] if name.startswith(HISTOGRAM)}
    levels = sorted(names, key=lambda name: float(name.removeprefix(HISTOGRAM)))
    if not levels:
        return ""
    parts = [_smooth(np.nan_to_num(_column(rows, "metrics", name))) for name in levels]
    colours = [colormaps["viridis"](i / max(1, len(levels) - 1)) for i in range(len(levels))]
    labels = [name.removeprefix(HISTOGRAM) for name in levels]
    figure, axes = _axes()
    axes.stackplot([row["step"] for row in rows], parts, labels=labels, colors=colours, alpha=0.85)
    axes.set_ylim(0, 1)
    _legend(axes)
    return _svg(figure, "rewards")


def _curves(rows: list[dict]) -> str:
    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with rc_context({**dict.fromkeys(keys, INK), "font.family": "sans-serif", "font.size": 9}):
        drawn = [(title, note, _panel(rows, title, scale)) for title, (note, scale) in PANELS.items()]
        note = "Share of its responses at each total reward, to the nearest half."
        drawn.insert(2, ("Rewards of the student", note, _rewards_panel(rows)))
        drawn.append(("Seconds per step", "Where the time of a step goes.", _phases_panel(rows)))
    figures = "".join(
        f"<figure><figcaption><b>{escape(title)}</b><span>{escape(note)}</span></figcaption>{svg}</figure>"
        for title, note, svg in drawn
        if svg
    )
    return f'<div class="curves">{figures}</div>'


def _picture(data_dir: Path, name: str, sample_id: str) -> str:
    """An <img> with the picture inside it, or its name where it is gone; small ones are shown pixel by pixel."""
    root = data_dir.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise UserError(f"sample {sample_id}: image {name!r} is outside {data_dir}: give a path inside that folder")
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return f'<p class="soft">{escape(str(name))} is no longer there, or no picture</p>'
    image.thumbnail((512, 512))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    css = ' class="tiny"' if max(image.size) <= 128 else ""
    return f'<img{css} src="data:image/png;base64,{data}" alt="picture of the question">'


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _sample(row: dict, data_dir: Path) -> str:
    lines = "".join(
        f'<tr><td>{escape(r["source"])}</td><td class="text"><pre>{escape(r["text"])}</pre></td>'
        f"<td>{_number(r['answer_reward'], 'g')}</td><td>{_number(r['similarity_reward'], 'g')}</td>"
        f"<td>{_number(r['advantage'], '+.2f')}</td></tr>"
        for r in sorted(row["responses"], key=lambda r: r["source"] != "student")
    )
    picture = "".join(_picture(data_dir, name, str(row["id"])) for name in pictures(row))
    reference = escape(str(row["answer"] or "none"))
    return (
        f'<div class="sample">{picture}<div><p><b>{escape(row["question"])}</b><br>Reference answer: '
        f'<b>{reference}</b> <span class="soft">{escape(str(row["kind"] or ""))} {escape(str(row["id"]))}'
        '</span></p><div class="scroll"><table><tr><th>source</th><th class="text">response</th><th>answer</th>'
        f"<th>similarity</th><th>advantage</th></tr>{lines}</table></div></div></div>"
    )


def _chosen(rows: list[dict]) -> dict[int, list[dict]]:
    """Samples of the first, middle and last recorded steps, three a step (of steps with fewer, six steps)."""
    by_step: dict[int, list[dict]] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row)
    steps = sorted(by_step)
    places = np.linspace(0, len(steps) - 1, 3 if len(rows) >= 3 * len(steps) else 6).round().astype(int)
    chosen = {}
    for step in dict.fromkeys(steps[place] for place in places):
        kinds: dict[str, list[dict]] = {}
        for row in by_step[step]:
            kinds.setdefault(row["kind"], []).append(row)
        in_turn = [row for turn in zip_longest(*kinds.values()) for row in turn if row is not None]
        chosen[step] = in_turn[:3]
    return chosen


def _samples(rows: list[dict], data_dir: Path) -> str:
    if not rows:
        return ""
    parts = [
        '<h2>Sample answers</h2><p class="soft">answer: 1 where the judge accepts the response. similarity: 1 '
        "where D takes it for a teacher's. advantage: positive where training makes the response more likely.</p>"
    ]
    for step, at_step in _chosen(rows).items():
        parts += [f"<h3>Step {step}</h3>", *(_sample(row, data_dir) for row in at_step)]
    return "".join(parts)


def _accuracy(before: dict, after: dict) -> str:
    body = []
    for label, questions, old, new, change in accuracy_rows(before, after):
        colour = "" if change in ("-", "+0.0") else "up" if change[0] == "+" else "down"
        whole = ' class="all"' if label.startswith("all (") else ""
        body.append(
            f"<tr{whole}><td>{escape(label)}</td><td>{questions}</td><td>{old}</td><td>{new}</td>"
            f'<td class="{colour}">{change}</td></tr>'
        )
    head = "".join(f"<th>{name}</th>" for name in ("question kind", "questions", "before", "after", "points"))
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _numbers(result: dict) -> str:
    evaluation = result["evaluation"]
    cards = {"steps": f"{result['steps']:,}", "wall time": clock(result["seconds"])}
    for way, row in zip(("sampled", "greedy"), accuracy_rows(**evaluation)[:-3:-1], strict=True):
        cards = {f"{way} accuracy, {row[4]} points": f"{row[2]} → {row[3]}", **cards}
    return f'<div class="numbers">{"".join(f"<div><b>{b}</b>{name}</div>" for name, b in cards.items())}</div>'


def write_report(run_dir: Path, data_dir: Path) -> Path:
    """Write run_dir/report.html from the run's own files; pictures of sample answers come from data_dir.

    Raises:
        UserError: result.json or metrics are missing, or a sample's image is outside data_dir.
    """
    run_dir, data_dir = Path(run_dir), Path(data_dir)
    metrics, samples, result_path = (run_dir / name for name in ("metrics.jsonl", "samples.jsonl", "result.json"))
    rows = read_jsonl(metrics) if metrics.exists() else []
    if not rows:
        raise UserError(f"{metrics} has no steps: the report needs a run of at least one step")
    if not result_path.exists():
        raise UserError(f"{result_path} does not exist: the report needs a run that has finished")
    result = json.loads(result_path.read_text(encoding="utf-8"))
    name, teachers = ALGORITHMS.get(result["algorithm"], result["algorithm"]), ", ".join(result["teachers"])
    title = escape(f"{name} with {teachers}" if teachers else name)
    date = datetime.fromtimestamp(result_path.stat().st_mtime).strftime("%d %B %Y, %H:%M")
    about = f"seed {result['seed']} · finished {date} · {run_dir}"
    config = run_dir / "config.yaml"
    settings = escape(config.read_text(encoding="utf-8")) if config.exists() else "not written by this run"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body>'
        f'<h1>{title}</h1><p class="soft">{escape(about)}</p>'
        f"{_numbers(result)}<h2>Accuracy on held-out questions</h2>"
        f'<p class="soft">Each question kind: greedy decoding.</p>{_accuracy(**result["evaluation"])}'
        f'<h2>Training</h2><p class="soft">Pale: each step. Strong: moving average.</p>{_curves(rows)}'
        f"{_samples(read_jsonl(samples) if samples.exists() else [], data_dir)}"
        f"<h2>Settings</h2><details><summary>config.yaml</summary><pre>{settings}</pre></details></body></html>\n"
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8", errors="replace")
    return path
