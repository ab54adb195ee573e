"""Imports are light, and the wheel holds what it should under the right tag."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROBE = """
import json, sys, time
import torch
report = {}
for name in ("ril_kernels", "ril_engine"):
    before = set(sys.modules)
    start = time.perf_counter()
    __import__(name)
    report[name] = {"seconds": time.perf_counter() - start, "modules": sorted(set(sys.modules) - before)}
print(json.dumps(report))
"""


def test_imports_are_light(tmp_path):
    best: dict[str, float] = {}
    for _ in range(3):
        command = [sys.executable, "-c", PROBE]
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        report = json.loads(run.stdout)
        for name, measured in report.items():
            best[name] = min(best.get(name, 1e9), measured["seconds"])
            pulled = {module.split(".")[0] for module in measured["modules"]}
            assert not pulled & {
                "deepspeed",
                "transformers",
                "triton",
                "liger_kernel",
                "trl",
                "PIL",
                "sklearn",
            }
            assert not [module for module in measured["modules"] if module.startswith("torch._dynamo")]
    # The sum, so that neither hides behind what the other has already imported.
    assert sum(best.values()) < 0.2, best


def test_version_has_one_home():
    import ril_engine

    assert re.fullmatch(r"\d+\.\d+\.\d+", ril_engine.__version__)
    assert not re.search(r'^version\s*=\s*"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_lock_pins_every_line():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] not in "# "]
    assert lines and not [line for line in lines if not re.match(r"[A-Za-z0-9_.-]+==\S+( ;.*)?$", line)]
    assert not [line for line in lines if line.startswith("ril-engine")]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler to build the wheel with")
def test_wheel_is_py3_and_holds_the_library(tmp_path):
    pytest.importorskip("scikit_build_core", reason="scikit-build-core (extra `dev`) is not installed")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ROOT,
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    from ril_engine import __version__

    assert re.fullmatch(rf"ril_engine-{re.escape(__version__)}-py3-none-(?!any)\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"ril_engine-{__version__}.dist-info/METADATA").decode()
    assert {"ril_kernels/_cpu.so", "ril_kernels/__init__.py", "ril_engine/__init__.py"} <= names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".pyc")) or name.startswith("kernels/")]
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert [re.split(r"[ <>=]", line.removeprefix("Requires-Dist: "))[0] for line in required] == [
        "torch",
        "numpy",
    ]
