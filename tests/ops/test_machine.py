"""What backends() tells people and programs."""

import json
import subprocess
import sys

import pytest
import torch

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


class FakeCore:
    """The extension, as far as CUDA goes."""

    def __init__(self, why_not="", built=True):
        self.cuda_built = lambda: (built, "80-real;90-real" if built else "")
        self.cuda_device_reason = lambda gpu: why_not
        self.rank_cuda_layouts = lambda gpu: {"cuda_thread": 4, "cuda_tile8": 192 if gpu else 224}
        self.rank_variants = lambda: {"cpu_baseline": ""}


@pytest.fixture
def initialised(monkeypatch):
    """A process in which torch has been on a GPU."""
    machine._machine.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    yield
    machine._machine.cache_clear()


def test_a_gpu_counts_once_torch_has_been_on_it(monkeypatch, initialised):
    monkeypatch.setattr(machine, "_core", FakeCore)
    monkeypatch.setattr(machine, "_found", lambda module: True)
    here = machine.this_machine()
    assert here == machine.Machine(("cpu_baseline",), (("cuda_thread", 4), ("cuda_tile8", 224)), "cuda")
    assert machine.this_machine(1).cuda[1] == ("cuda_tile8", 192)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert machine.this_machine().cuda == ()


def test_triton_runs_on_the_cpu_under_its_interpreter(monkeypatch, initialised):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(machine, "_found", lambda module: True)
    assert machine.this_machine().triton == "cpu"
    monkeypatch.setattr(machine, "_found", lambda module: False)
    machine._machine.cache_clear()
    assert machine.this_machine().triton == ""


@pytest.mark.parametrize(
    ("core", "why_not"),
    [
        (FakeCore(built=False), "no CUDA kernels in this build: nvcc was not found, or PYPRUNE_CUDA=OFF"),
        (FakeCore("the driver is too old."), "the driver is too old (built for 80-real, 90-real)"),
        (FakeCore(), ""),
        (None, "the extension pyprune._core is not built; run pip install ."),
    ],
)
def test_why_the_cuda_kernels_cannot_run(core, why_not, monkeypatch):
    monkeypatch.setattr(machine, "_core", lambda: core)
    assert machine.cuda_reason() == why_not


@pytest.mark.parametrize(("cuda", "blind"), [("12.8", "torch finds no GPU"), (None, "is built for CPUs only")])
def test_backends_say_what_torch_lacks(cuda, blind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = pp.backends()
    assert blind in found.cuda
    assert found.cuda_devices == ()


def test_backends_say_what_takes_the_place_of_the_cuda_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: "some GPU")
    monkeypatch.setattr(machine, "_core", lambda: FakeCore(built=False))
    monkeypatch.setattr(machine, "_found", lambda module: module == "triton")
    found = pp.backends()
    assert found.cuda.endswith("PYPRUNE_CUDA=OFF; GPU tensors go through Triton and torch.linalg")
    assert (found.cuda_devices, found.triton) == (("some GPU",), "")
    monkeypatch.setattr(machine, "_core", FakeCore)
    assert pp.backends().cuda == ""


def test_what_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(machine, "_found", lambda module: False)
    found = pp.backends()
    assert found.packages["nvidia-ml-py"] == "not installed: pip install nvidia-ml-py"
    assert found.triton == "not installed: pip install triton"
    for cuda, name in [(None, "cupy-cuda13x"), ("12.8", "cupy-cuda12x"), ("13.0", "cupy-cuda13x")]:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert pp.backends().packages["cupy"] == f"not installed: pip install {name}"


def test_a_variant_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(machine, "cpu_variants", lambda: {"cpu_baseline": "", "cpu_avx2": "this CPU lacks AVX2"})
    assert "cpu_avx2      this CPU lacks AVX2" in str(pp.backends())


def test_without_the_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyprune._core", None)
    monkeypatch.delattr("pyprune._core", raising=False)
    machine._machine.cache_clear()
    try:
        assert machine.this_machine() == machine.Machine()
        assert "pyprune._core is not built" in str(pp.backends())
    finally:
        machine._machine.cache_clear()


@pytest.mark.parametrize("module", ["pyprune.machine", "pyprune.ops.rank"])
def test_importing_does_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
