"""What backends() tells people and programs."""

import json
import subprocess
import sys

import pytest

import pyprune as pp
from pyprune import machine


def test_backends_lists_everything():
    found = pp.backends()
    content = json.loads(json.dumps(found.to_json()))
    assert set(content["packages"]) == {"onnx", "onnxruntime", "cupy", "nvidia-ml-py", "torchvision"}
    assert content["cpu"]["cpu_baseline"] == ""
    assert content["threads"] >= 1
    assert "cpu_baseline" in str(found)
    assert str(found).splitlines()[0].split() == ["pyprune", content["pyprune"]]


def test_what_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(machine, "_found", lambda module: False)
    found = pp.backends()
    assert found.packages["nvidia-ml-py"] == "not installed: pip install nvidia-ml-py"
    assert found.triton == "not installed: pip install triton"


def test_a_variant_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(machine, "cpu_variants", lambda: {"cpu_baseline": "", "cpu_avx2": "this CPU lacks AVX2"})
    assert "cpu_avx2      this CPU lacks AVX2" in str(pp.backends())


def test_without_the_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyprune._core", None)
    monkeypatch.delattr("pyprune._core", raising=False)
    machine.this_machine.cache_clear()
    try:
        assert machine.this_machine() == machine.Machine()
        assert "pyprune._core is not built" in str(pp.backends())
    finally:
        machine.this_machine.cache_clear()


@pytest.mark.parametrize("module", ["pyprune.machine", "pyprune.ops.rank"])
def test_importing_does_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
