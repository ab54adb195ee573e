"""Arrows point one way, and no name shadows another package's."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "kernels/ril_kernels").rglob("*.py"))
ENGINE = sorted((ROOT / "ril_engine").rglob("*.py"))


def imported(path: Path, *, at_module_level: bool = False) -> set[str]:
    """Top-level packages that a file imports, anywhere in it or only as it is itself imported."""
    tree = ast.parse(path.read_text(), filename=str(path))
    lazy = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)

    def walk(node: ast.AST):
        for child in ast.iter_child_nodes(node):
            if not (at_module_level and isinstance(child, lazy)):
                yield child
                yield from walk(child)

    names = set()
    for node in walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_need_only_torch_and_numpy(path):
    optional = {"triton", "flash_attn"}
    assert imported(path) <= {"torch", "numpy", "ril_kernels"} | optional | sys.stdlib_module_names
    late = optional - {path.stem}  # a room's triton.py is itself imported late
    assert not imported(path, at_module_level=True) & late


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_engine_py_imports_deepspeed(path):
    names = imported(path)
    assert path == ROOT / "ril_engine/engine.py" or "deepspeed" not in names
    assert not names & {"benchmarks", "tests"}


def test_kernels_folder_is_no_package():
    # It would shadow the Hugging Face package `kernels`, which transformers imports.
    assert not (ROOT / "kernels/__init__.py").exists()


def locked_packages() -> set[str]:
    """Distribution names in requirements.lock, normalised."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return {re.split(r"[=<> ;\[]", line)[0].lower().replace("_", "-") for line in lines if line[:1].isalnum()}


def test_engine_modules_shadow_nothing():
    """The launcher puts ril_engine/ first on sys.path: `import types` would find ril_engine/types.py."""
    locked = locked_packages()
    assert {"torch", "transformers", "deepspeed"} <= locked
    taken = {name.replace("-", "_") for name in locked} | set(sys.stdlib_module_names)
    for module, distributions in importlib.metadata.packages_distributions().items():
        if any(name.lower().replace("_", "-") in locked for name in distributions):
            taken.add(module)
    taken |= {
        "kernels",
        "datasets",
        "evaluate",
        "vllm",
        "flash_attn",
        "wandb",
    }  # optional, imported if found
    ours = {path.stem for path in (ROOT / "ril_engine").glob("*.py")}
    ours |= {path.name for path in (ROOT / "ril_engine").iterdir() if path.is_dir()}
    assert not (ours - {"__init__", "__main__", "__pycache__"}) & taken


def test_files_are_short():
    long = {str(path.relative_to(ROOT)): n for path in KERNELS if (n := len(path.read_text().splitlines())) > 300}
    assert not long


def test_catalogue_is_sorted_functions():
    import ril_kernels

    assert ril_kernels.__all__ == sorted(ril_kernels.__all__)
    assert all(callable(getattr(ril_kernels, name)) for name in ril_kernels.__all__)
