"""Where the native library lies, and what is said when it is missing or of another version."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

import ril_kernels
from ril_kernels import _native


def test_found_along_the_package_path():
    path = _native.find_library()
    assert path.name == "_cpu.so" and path.is_file()
    assert str(path.parent) in [str(Path(folder)) for folder in ril_kernels.__path__]
    assert ctypes.CDLL(str(path)).ril_abi_version() == _native.ABI_VERSION


def test_found_beside_or_away_from_the_sources(tmp_path):
    # An editable install has two folders on the path, and the library lies in only one of them.
    sources, build = tmp_path / "sources", tmp_path / "build"
    sources.mkdir(), build.mkdir()
    shutil.copy(_native.find_library(), build)
    assert _native.find_library([str(sources), str(build)]) == build / "_cpu.so"
    assert _native.find_library([str(build), str(sources)]) == build / "_cpu.so"


def test_missing_library(tmp_path):
    with pytest.raises(RuntimeError, match=rf"_cpu\.so is in none of: {tmp_path}\. Build it: `pip install"):
        _native.find_library([str(tmp_path)])


def test_unreadable_library(tmp_path):
    (tmp_path / "_cpu.so").write_text("not a library")
    with pytest.raises(RuntimeError, match=r"_cpu\.so cannot be loaded \(.*\)\. Build it"):
        _native.load_library(tmp_path / "_cpu.so")


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler `cc` to build a library of another version")
def test_library_of_another_abi(tmp_path):
    (tmp_path / "other.c").write_text("int ril_abi_version(void) { return 999; }\n")
    path = tmp_path / "_cpu.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, tmp_path / "other.c"], check=True)
    with pytest.raises(
        RuntimeError, match=rf"ABI version 999, expected {_native.ABI_VERSION}: it was built from other"
    ):
        _native.load_library(path)


def test_both_sides_state_one_abi_version():
    header = Path(__file__).parents[2] / "kernels/ril_kernels/abi.h"
    assert f"RIL_ABI_VERSION = {_native.ABI_VERSION};" in header.read_text()


def test_every_export_is_declared_and_every_declaration_exported():
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no `nm` to list the library's symbols")
    listing = subprocess.run([nm, "-D", "--defined-only", _native.find_library()], capture_output=True, text=True)
    exported = {line.split()[-1] for line in listing.stdout.splitlines() if " T " in line}
    assert exported == set(_native.SIGNATURES)
