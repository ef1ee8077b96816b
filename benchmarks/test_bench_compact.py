"""How long compaction takes, and how much of it is the proof."""

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import latency_table
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pyprune as pp
from pyprune.graph import convolutions
from pyprune.types import Plan
from zoo import ENTRIES, beside

NETWORKS = {
    "VGG-16": (pp.models.vgg16_bn, (2, 3, 32, 32)),
    "ResNet-56": (pp.models.resnet56, (2, 3, 32, 32)),
    "ResNet-50": (pp.models.resnet50, (1, 3, 224, 224)),
    "DenseNet-121": (ENTRIES["DenseNet"].whole, (1, 3, 224, 224)),
}
LIMITS = {"VGG-16": 1.0, "ResNet-56": 1.0, "ResNet-50": 1.5, "DenseNet-121": 5.0}
"""Seconds that compaction may take, proof included."""


def halved(name):
    """Return a network, a plan that keeps a random half of every layer, and example inputs."""
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, rng = build().eval(), np.random.default_rng(0)
    keep = {
        name: rng.permutation(layer.out_channels)[: layer.out_channels // 2]
        for name, layer in convolutions(model).items()
    }
    return model, Plan(keep), torch.randn(shape)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    return request.param, *halved(request.param)


@pytest.fixture(scope="module")
def vgg():
    return halved("VGG-16")


@pytest.mark.benchmark(group="compact")
def test_analyse(benchmark, network):
    analysis = benchmark(pp.analyse, *network[1:])
    assert analysis.parameters_left < 0.4 * analysis.parameters


@pytest.mark.benchmark(group="compact")
@pytest.mark.parametrize("verify", [False, True], ids=["unverified", "verified"])
def test_compact(benchmark, network, verify):
    name, *arguments = network
    slim = benchmark.pedantic(pp.compact, arguments, {"verify": verify, "latency": False}, rounds=5, warmup_rounds=1)
    assert slim.certificate.verified == verify
    assert slim.after.parameters < 0.4 * slim.before.parameters
    if benchmark.stats is not None:
        assert benchmark.stats.stats.median < LIMITS[name]


@pytest.mark.benchmark(group="compact")
def test_torch_pruning(benchmark, network):
    """The same filters by index. Coupled layers lose the same ones there, so what is left differs where plans do."""
    pytest.importorskip("torch_pruning", reason="needs Torch-Pruning: pip install pyprune[compare]")
    _, model, plan, images = network
    found = benchmark.pedantic(beside.torch_pruning, (model, plan, images, ()), rounds=3, warmup_rounds=1)
    assert found.model is not None, found.note
    benchmark.extra_info["seconds of pruning alone"] = found.seconds  # the rest judges the result
    assert found.parameters < 0.8 * beside.parameters(model)


def test_half_the_macs_of_resnet50_are_faster(request):
    """Interleaved, by medians: at least 1.6 times, in whole vectors of the CPU; 1.2 on a busy machine."""
    torch.manual_seed(0)
    model, x = pp.models.resnet50().eval(), torch.randn(1, 3, 224, 224)
    slim = latency_table.half_the_macs(model, x, agree=True, round_to=16)
    assert 0.4 < slim.after.macs / slim.before.macs <= 0.5
    times = latency_table.medians({"original": model, "slim": slim.model.eval()}, x.repeat(4, 1, 1, 1), rounds=9)
    print(f"{times['original'] / times['slim']:.2f} times faster, {slim.after.macs / slim.before.macs:.0%} of the MACs")
    assert times["original"] > (1.2 if request.config.getoption("benchmark_disable") else 1.6) * times["slim"]


@pytest.mark.benchmark(group="ResNet-56 forward, 32 images")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["default", "channels last"])
@pytest.mark.parametrize("residual", ["original", "scatter", "intersect", "union"])
def test_forward(benchmark, residual, layout):
    model, plan, images = halved("ResNet-56")
    model, images = model.to(memory_format=layout), images.repeat(16, 1, 1, 1).to(memory_format=layout)
    slim = model
    if residual != "original":
        slim = pp.compact(model, plan, images[:2], residual=residual, latency=False).model.eval()
    with torch.no_grad():
        scores = benchmark(slim, images)
    assert scores.shape == (32, 10)


@pytest.mark.benchmark(group="slim folder of VGG-16")
def test_save_and_load(benchmark, vgg, tmp_path):
    slim = pp.compact(*vgg, verify=False, latency=False)
    loaded = benchmark(lambda: pp.load_slim(pp.save_slim(slim, tmp_path)))
    assert torch.equal(loaded(vgg[2]), slim.model.eval()(vgg[2]))


def _kilobytes(word):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(word))


def peak_beside_the_model(verify):
    """Return the most memory that compacting ResNet-50 takes beside the model, over the model's own."""
    model, plan, images = halved("ResNet-50")
    with torch.no_grad():
        model(images)
    small = torch.nn.Conv2d(1, 1, 1)
    pp.compact(small, Plan({}), torch.zeros(1, 1, 2, 2), latency=False)  # what is imported on first use is no model's
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what others left behind would hide the peak
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _kilobytes("VmRSS")
    pp.compact(model, plan, images, verify=verify, latency=False)
    size = sum(one.numel() * one.element_size() for one in model.parameters()) / 1024
    return (_kilobytes("VmHWM") - before) / size


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
@pytest.mark.parametrize("verify", [False, True], ids=["unverified", "verified"])
def test_memory_of_compacting_resnet50(verify):
    """In a process of its own: what others have freed lies about in pieces, and counts again."""
    words = [sys.executable, __file__, *(["verify"] if verify else [])]
    found = float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    print(f"peak beside the model: {found:.2f} times its size")
    assert 1 < found < 2.5  # a masked copy and a slim one at least


FORMS = {  # of the stream S, the branch B, its places i, where each of S finds it, the branch widened, a 1x1 kernel
    "plain sum of C": lambda S, B, i, places, wide, kernel: S + wide,
    "index_add": lambda S, B, i, places, wide, kernel: torch.index_add(S, 1, i, B),
    "index_add, last dimension": lambda S, B, i, places, wide, kernel: torch.index_add(
        S.permute(0, 2, 3, 1), 3, i, B.permute(0, 2, 3, 1)
    ).permute(0, 3, 1, 2),
    "pad, index_select, sum": lambda S, B, i, places, wide, kernel: (
        S + F.pad(B, (0, 0, 0, 0, 0, 1)).index_select(1, places)
    ),
    "zeros, index_copy_, add_": lambda S, B, i, places, wide, kernel: torch.zeros_like(S).index_copy_(1, i, B).add_(S),
    "1x1 convolution, sum": lambda S, B, i, places, wide, kernel: S + F.conv2d(B, kernel),
}


@pytest.mark.benchmark(group="indexed addition")
@pytest.mark.parametrize("shape", [(32, 16, 32, 32), (32, 64, 8, 8), (8, 256, 56, 56)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["default", "channels last"])
@pytest.mark.parametrize("form", FORMS)
def test_indexed_addition(benchmark, form, layout, shape):
    """Add half as many channels into a stream of C, at random places."""
    torch.manual_seed(0)
    half = shape[1] // 2
    index = torch.randperm(shape[1])[:half].sort().values
    S, B = torch.randn(shape), torch.randn(shape[0], half, *shape[2:])
    wide = torch.zeros(shape).index_copy_(1, index, B)
    places = torch.full((shape[1],), half).index_copy_(0, index, torch.arange(half))
    kernel = torch.eye(half).new_zeros(shape[1], half, 1, 1).index_copy_(0, index, torch.eye(half)[:, :, None, None])
    arguments = [one.to(memory_format=layout) for one in (S, B)] + [
        index,
        places,
        wide.to(memory_format=layout),
        kernel,
    ]
    found = benchmark(FORMS[form], *arguments)
    assert torch.allclose(found, S + wide, atol=1e-6)


if __name__ == "__main__":
    print(peak_beside_the_model("verify" in sys.argv))
