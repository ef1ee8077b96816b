"""The extension under Address-, UndefinedBehavior- and ThreadSanitizer; what its machine code may hold."""

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from pyprune import _core

ROOT = Path(__file__).parents[2]
SANITIZED = os.environ.get("PYPRUNE_SANITIZED", "")
WIDE = re.compile(r"_(avx2|avx512)\.cpp$")  # files that are compiled for more than the baseline


def _output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _library(name):
    """Return where the compiler keeps a sanitizer's library, or "" where it has none."""
    found = _output("g++", f"-print-file-name={name}").strip() if shutil.which("g++") else ""
    return found if "/" in found else ""


@pytest.mark.slow
@pytest.mark.skipif(bool(SANITIZED), reason="runs inside a sanitizer already")
@pytest.mark.parametrize(
    ("kind", "library"), [("address", "libasan.so"), ("undefined", "libubsan.so"), ("thread", "libtsan.so")]
)
def test_the_tests_of_the_ops_pass_under(kind, library):
    if not _library(library) or not shutil.which("cmake"):
        pytest.skip(f"needs g++ with {library}, and cmake")
    command = [ROOT / "tests" / "sanitize.sh", kind, "-q"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert re.search(r"\d\d+ passed", done.stdout)
    assert "Sanitizer" not in done.stdout + done.stderr


@pytest.mark.skipif(not SANITIZED, reason="asks a sanitized build; tests/sanitize.sh makes one")
def test_the_sanitizer_is_built_in():
    mark = {"address": "__asan_report_load8", "undefined": "__ubsan_handle_", "thread": "__tsan_read8"}[SANITIZED]
    assert mark in _output("nm", "-D", _core.__file__)


@pytest.mark.skipif(SANITIZED != "address", reason="asks AddressSanitizer; tests/sanitize.sh address runs it")
def test_a_read_past_the_end_is_reported():
    code = """
import numpy as np
from pyprune import _core
maps = np.lib.stride_tricks.as_strided(np.ones(64, np.float32), (1, 9, 8, 8), (0, 256, 32, 4))
_core.rank(maps, 1e-6, "cpu_baseline", 1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "heap-buffer-overflow" in done.stderr
    assert done.returncode != 0


def _objects():
    """Return the object files of the build that is imported, by the name of their source."""
    folders = [path for path in (ROOT / "build").glob("*") if (path / "CMakeFiles" / "_core.dir").is_dir()]
    objects = [path for folder in folders for path in folder.glob("CMakeFiles/_core.dir/csrc/**/*.o")]
    return {path.name.removesuffix(".o"): path for path in objects}


def _shared_code(objects):
    """Map every symbol of code that is not internal to its file to the sources that define it."""
    owners = defaultdict(set)
    for source, path in objects.items():
        for line in _output("nm", "--defined-only", path).splitlines():
            kind, symbol = line.split()[-2:]
            if kind in "TWVu":  # code, weak code, unique: t is internal, and B, D, R are no code
                owners[symbol].add(source)
    return owners


def _needs_binutils():
    if not (shutil.which("nm") and shutil.which("objdump")):
        pytest.skip("needs nm and objdump (binutils)")
    objects = _objects()
    if not any(WIDE.search(source) for source in objects):
        pytest.skip("needs the object files of a build for x86-64 in build/")
    return objects


def test_no_code_for_a_wider_instruction_set_can_be_picked_for_a_baseline_cpu():
    """The linker keeps one copy of each weak symbol, whatever it was compiled for: wide files may define none."""
    objects = _needs_binutils()
    owners = _shared_code(objects)
    assert [symbol for symbol, sources in owners.items() if any(map(WIDE.search, sources))] == []
    assert any(len(sources) > 1 for sources in owners.values())  # weak symbols of the other files: the check sees such


def _wide_registers(path):
    return set(
        re.findall(r"%[yz]mm|\bv[a-z0-9]+(?=\s+[^\n]*%xmm)", _output("objdump", "-d", "--no-show-raw-insn", path))
    )


def test_baseline_files_hold_no_avx():
    objects = _needs_binutils()
    assert all(_wide_registers(path) for source, path in objects.items() if WIDE.search(source))  # the check sees them
    found = {source: _wide_registers(path) for source, path in objects.items() if not WIDE.search(source)}
    assert {source: registers for source, registers in found.items() if registers} == {}
