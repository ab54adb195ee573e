"""The report, read back as a browser would: its text, its pictures, and that it asks for nothing from outside."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ril_engine import report
from ril_engine.errors import UserError
from ril_engine.report import write_report


def response(source, text, similarity=1.0):
    return {"source": source, "text": text, "answer_reward": 1.0, "similarity_reward": similarity, "advantage": 0.25}


def metrics(step, ril):
    row = {"reward/student_answer": 0.5, "kl": None if step == 2 else 0.01 * step, "grad_norm/student": 0.5}
    row |= {"advantage/spread": 0.4, "zero_advantage_groups": 0.1, "length/student": 5.0, "loss/policy": 0.001}
    row |= {"entropy": 0.4, "clip/low": 0.0, "clip/high": 0.1, "truncated": 0.2}
    seconds = {"rollout": 1.0, "policy": 0.5, "step": 1.6}
    if ril:
        row |= {"reward/teacher_answer": 0.9, "reward/student_similarity": 0.3, "reward/teacher_similarity": 0.8}
        row |= {"discriminator/accuracy": 0.8, "loss/discriminator": 0.5, "grad_norm/discriminator": 2.0}
        row |= {"discriminator/auc": 0.9, "discriminator/student_score": 0.7, "discriminator/teacher_score": 0.2}
        row |= {"discriminator/calibration_error": 0.1, "discriminator/score_by_length": 0.3, "reward/unscored": 0.0}
        row |= {"reward/similarity_by_length": 0.3}
        row |= {f"reward/{kind}/{name}": 0.6 for kind in ("answer", "similarity") for name in ("qwen", "internvl")}
        row |= {f"validation/{way}": 0.6 for way in ("greedy", "sampled") if step % 4 == 1}
        row |= {"reward/histogram/0": 0.25, "reward/histogram/2": 0.5} | (
            {"reward/histogram/1": 0.25} if step > 1 else {}
        )
        seconds |= {"discriminator": 0.2}
    return {"step": step, "metrics": row, "seconds": seconds}


@pytest.fixture
def run(tmp_path):
    """Writes a run's files; returns (run_dir, data_dir)."""

    def make(algorithm="ril", steps=9, image="images/a.png", student_text="The answer is 12."):
        run_dir, data_dir = tmp_path / "run", tmp_path / "data"
        run_dir.mkdir()
        (data_dir / "images").mkdir(parents=True)
        pixels = np.arange(28 * 56, dtype=np.uint8).reshape(28, 56)
        Image.fromarray(pixels).save(data_dir / "images/a.png")
        ril = algorithm == "ril"
        rows = [metrics(step, ril) for step in range(1, steps + 1)]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        samples = []
        for step in range(1, steps + 1):
            responses = [response("qwen", "From a teacher.", 0.0)] if ril else []
            responses.append(response("student", student_text, 1.0 if ril else None))
            sample = {"step": step, "id": f"train-{step}", "image": image, "question": "What is 3 < 4 times 4?"}
            samples.append({**sample, "answer": "12", "kind": "product", "responses": responses})
        (run_dir / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
        before = {"greedy": 0.71, "sampled": 0.66, "questions": 2250, "mean_length": 5.2}
        before["by_kind"] = {"sum": {"accuracy": 0.7, "questions": 250}}
        after = {**before, "greedy": 0.86, "sampled": 0.65, "by_kind": {"sum": {"accuracy": 0.9, "questions": 250}}}
        result = {"algorithm": algorithm, "seed": 7, "steps": steps, "seconds": 3725.0, "run_dir": str(run_dir)}
        result |= {"teachers": ["qwen", "internvl"] if ril else [], "accuracy": {"before": 0.71, "after": 0.86}}
        (run_dir / "result.json").write_text(json.dumps({**result, "evaluation": {"before": before, "after": after}}))
        (run_dir / "config.yaml").write_text("seed: 7  # <b>\n")
        return run_dir, data_dir

    return make


class Page(HTMLParser):
    """Tags with attributes, and the visible text."""

    def __init__(self, html: Path | str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html if isinstance(html, str) else html.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def attributes(self, tag, name):
        return [attrs[name] for found, attrs in self.tags if found == tag and name in attrs]


def test_numbers_and_text(run):
    run_dir, data_dir = run()
    path = write_report(run_dir, data_dir)
    assert path == run_dir / "report.html"
    page, html = Page(path), path.read_text(encoding="utf-8")
    for text in (
        "RIL with qwen, internvl",
        "seed 7",
        "71.0 % → 86.0 %greedy accuracy, +15.0 points",
        "66.0 % → 65.0 %sampled accuracy, -1.0 points",
        "1:02:05wall time",
        "What is 3 < 4 times 4?",
        "seed: 7  # <b>",
    ):
        assert text in page.text
    assert '<tr><td>sum</td><td>250</td><td>70.0 %</td><td>90.0 %</td><td class="up">+20.0</td></tr>' in html
    assert '<td>65.0 %</td><td class="down">-1.0</td>' in html
    assert html.index("The answer is 12.") < html.index("From a teacher.")  # the student first


def test_a_question_without_a_reference(run):
    run_dir, data_dir = run(steps=1)
    samples = run_dir / "samples.jsonl"
    samples.write_text(samples.read_text().replace('"answer": "12"', '"answer": null'))
    assert "Reference answer: none product train-1" in Page(write_report(run_dir, data_dir)).text


def test_one_curve_per_panel_and_fewer_without_a_discriminator(run):
    run_dir, data_dir = run()
    html = write_report(run_dir, data_dir).read_text(encoding="utf-8")
    assert html.count("<svg") == len(report.PANELS) + 2
    lines = ("AUC</text>", "greedy</text>", "teachers</text>", "internvl</text>", "rollout</text>", "other</text>")
    for text in ("<b>Discriminator</b>", "<b>Similarity reward by source</b>", *lines):
        assert text in html


def test_a_reward_beyond_1_is_drawn_within_the_axes(monkeypatch):
    limits, axes = [], report._axes
    monkeypatch.setattr(report, "_axes", lambda: limits.append(axes()) or limits[-1])
    for values in ((0.2, 0.9), (-1.0, 2.5)):
        rows = [{"step": i, "metrics": {"reward/student_answer": each}} for i, each in enumerate(values, 1)]
        assert report._panel(rows, "Answer reward", "share")
    (low, high), (lower, higher) = (each.get_ylim() for _, each in limits)
    assert (low, high) == (-0.03, 1.03) and lower < -1.0 and higher > 2.5


def test_dr_grpo_omits_what_it_does_not_measure(run):
    run_dir, data_dir = run("dr_grpo")
    html = write_report(run_dir, data_dir).read_text(encoding="utf-8")
    assert "<h1>Dr. GRPO</h1>" in html
    panels = re.findall(r"<figcaption><b>([^<]+)</b>", html)
    assert panels == [
        "Answer reward",
        "KL to the reference policy",
        "Learning signal",
        "Response length",
        "Entropy",
        "Left out",
        "Policy loss",
        "Gradient norms",
        "Seconds per step",
    ]
    assert "teachers</text>" not in html
    assert "<td>1</td><td>-</td><td>+0.25</td>" in html  # no similarity reward


def test_responses_cannot_become_markup(run):
    run_dir, data_dir = run(student_text="<script>alert('x')</script></pre><img src=http://x.test/y> \ud83d &amp;")
    path = write_report(run_dir, data_dir)
    html, page = path.read_text(encoding="utf-8"), Page(path)
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in html
    assert "<script" not in html
    assert "<script>alert('x')</script></pre><img src=http://x.test/y> ? &amp;" in page.text


def test_nothing_comes_from_outside(run):
    run_dir, data_dir = run()
    path = write_report(run_dir, data_dir)
    page, html = Page(path), path.read_text(encoding="utf-8")
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object"}
    assert all(source.startswith("data:image/png;base64,") for source in page.attributes("img", "src"))
    links = [a[n] for _, a in page.tags for n in ("href", "xlink:href") if n in a]
    assert links and all(link.startswith("#") for link in links)
    assert not re.findall(r"url\((?!#)|@import", html)
    assert "default-src 'none'" in page.attributes("meta", "content")[0]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert {link[1:] for link in links} <= set(ids) and len(set(ids)) == len(ids)


def test_embedded_pictures_are_the_data_sets_own(run):
    run_dir, data_dir = run(steps=9)
    page = Page(write_report(run_dir, data_dir))
    sources = page.attributes("img", "src")
    assert len(sources) == 6  # one sample a step: six of the nine steps
    image = Image.open(io.BytesIO(base64.b64decode(sources[0].split(",")[1])))
    assert image.format == "PNG" and image.size == (56, 28)
    original = Image.open(data_dir / "images/a.png").convert("RGB")
    assert np.array_equal(np.array(image), np.array(original))
    assert page.attributes("img", "class") == ["tiny"] * 6


def test_large_pictures_are_made_smaller(run):
    run_dir, data_dir = run(steps=1)
    Image.new("RGB", (2048, 1024), "red").save(data_dir / "images/a.png")
    page = Page(write_report(run_dir, data_dir))
    image = Image.open(io.BytesIO(base64.b64decode(page.attributes("img", "src")[0].split(",")[1])))
    assert image.size == (512, 256) and not page.attributes("img", "class")


def test_samples_over_time_of_different_kinds():
    rows = [{"step": step, "kind": kind} for step in (1, 20, 40, 60) for kind in ("sum", "sum", "sum", "left")]
    chosen = report._chosen(rows)
    assert list(chosen) == [1, 40, 60]
    assert all([row["kind"] for row in of_step] == ["sum", "left", "sum"] for of_step in chosen.values())
    assert list(report._chosen([{"step": 5, "kind": None}])) == [5]


def test_moving_average_by_hand():
    assert report._smooth(np.array([3.0])).tolist() == [3.0]
    assert report._smooth(np.array([1.0, 3.0])).tolist() == [1.0, 3.0]
    assert report._smooth(np.array([1.0, 3.0, 8.0])).tolist() == [2.0, 4.0, 5.5]
    assert report._smooth(np.array([1.0, np.nan, 3.0])).tolist() == [1.0, 2.0, 3.0]
    assert np.isnan(report._smooth(np.full(5, np.nan))).all()
    assert report._smooth(np.arange(100.0))[50] == 50.0


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_a_step_or_two(run, steps):
    run_dir, data_dir = run(steps=steps, image=None)
    html = write_report(run_dir, data_dir).read_text(encoding="utf-8")
    assert html.count("<svg") == len(report.PANELS) + 2 and "<img" not in html


@pytest.mark.parametrize("outside", ["../secret.png", "/etc/passwd", "images/link.png"])
def test_an_image_outside_the_data_is_refused(run, tmp_path, outside):
    run_dir, data_dir = run(image=outside)
    Image.new("L", (4, 4)).save(tmp_path / "secret.png")
    (data_dir / "images/link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match=r"sample train-1: image '.*' is outside .*: give a path inside that folder"):
        write_report(run_dir, data_dir)


def test_a_picture_that_is_gone_leaves_its_name(run):
    """What has trained for days is not left without a report. A kind may be a number, as in the data."""
    run_dir, data_dir = run(image="images/<b>.png")
    rows = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    (run_dir / "samples.jsonl").write_text("".join(json.dumps({**row, "kind": 3}) + "\n" for row in rows))
    page = write_report(run_dir, data_dir).read_text()
    assert "images/&lt;b&gt;.png is no longer there, or no picture" in page and "3 train-1" in page


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "met'])
def test_no_metrics(run, content):
    run_dir, data_dir = run()
    (run_dir / "metrics.jsonl").unlink()
    if content is not None:
        (run_dir / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl has no steps: the report needs a run of at least one step"):
        write_report(run_dir, data_dir)


def test_an_unfinished_run(run):
    run_dir, data_dir = run()
    (run_dir / "result.json").unlink()
    with pytest.raises(UserError, match=r"result\.json does not exist: the report needs a run that has finished"):
        write_report(run_dir, data_dir)


def test_rewards_are_drawn_as_shares_of_each_value(run):
    run_dir, data_dir = run()
    html = write_report(run_dir, data_dir).read_text(encoding="utf-8")
    figure = re.search(r"<figure><figcaption><b>Rewards of the student</b>.*?</figure>", html, re.S)[0]
    labels = re.findall(r">(\d+(?:\.\d+)?)</text>", figure)
    assert [label for label in labels if label in ("0", "1", "2")][-3:] == ["0", "1", "2"]  # the legend, in their order


PROBE = """<script>addEventListener("load", () => {
const box = each => each.getBoundingClientRect(), scrolls = each => each.closest(".scroll, pre");
const charts = [...document.querySelectorAll("svg")];
const seen = {
  width: innerWidth, needed: document.documentElement.scrollWidth, images: document.images.length,
  broken: [...document.images].filter(each => !each.naturalWidth).length, charts: charts.length,
  cut: charts.flatMap(each => [...each.querySelectorAll("text")]
    .filter(text => box(text).right > box(each).right + 1).map(text => text.textContent)),
  outside: [...document.body.querySelectorAll("*")]
    .filter(each => box(each).right > innerWidth + 1 && !scrolls(each)).map(each => each.tagName)};
parent.postMessage(JSON.stringify(seen), "*"); })</script>"""
FRAME = """<body><iframe src="probed.html" style="width:{width}px;height:900px;border:0"></iframe>
<script>onmessage = event => document.body.setAttribute("data-seen", event.data)</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH (Debian: apt install chromium)")
@pytest.mark.parametrize("width", [390, 1280])  # a phone, and a desk
def test_a_browser_draws_all_of_it(run, width):
    run_dir, data_dir = run()
    path = write_report(run_dir, data_dir)
    page = path.read_text(encoding="utf-8")
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)  # which lets no script run
    assert probed != page
    path.with_name("probed.html").write_text(probed.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    path.with_name("frame.html").write_text(FRAME.format(width=width))  # no window is narrower than 500 pixels
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"]
    command += ["--virtual-time-budget=5000", "--dump-dom", path.with_name("frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = json.loads(Page(done.stdout).attributes("body", "data-seen")[0])
    assert seen["width"] == width and seen["needed"] <= width
    assert seen["images"] > 0 and seen["broken"] == 0 and seen["charts"] >= 8
    assert seen["cut"] == [] and seen["outside"] == []
