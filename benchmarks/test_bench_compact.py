"""How long compaction takes, and how much of it is the proof."""

import numpy as np
import pytest
import torch

import pyprune as pp
from pyprune.graph import convolutions
from pyprune.types import Plan


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(0)
    model = pp.models.vgg16_bn(num_classes=10)
    rng = np.random.default_rng(0)
    keep = {
        name: rng.permutation(layer.out_channels)[: layer.out_channels // 2]
        for name, layer in convolutions(model).items()
    }
    return model, Plan(keep), torch.randn(2, 3, 32, 32)


@pytest.mark.benchmark(group="compact VGG-16")
def test_analyse(benchmark, vgg):
    analysis = benchmark(pp.analyse, *vgg)
    assert analysis.parameters_left < 0.3 * analysis.parameters


@pytest.mark.benchmark(group="compact VGG-16")
@pytest.mark.parametrize("verify", [False, True], ids=["unverified", "verified"])
def test_compact(benchmark, vgg, verify):
    slim = benchmark(pp.compact, *vgg, verify=verify, latency=False)
    assert slim.certificate.verified == verify
    assert slim.after.parameters < 0.3 * slim.before.parameters


@pytest.mark.benchmark(group="slim folder of VGG-16")
def test_save_and_load(benchmark, vgg, tmp_path):
    slim = pp.compact(*vgg, verify=False, latency=False)
    loaded = benchmark(lambda: pp.load_slim(pp.save_slim(slim, tmp_path)))
    assert torch.equal(loaded(vgg[2]), slim.model.eval()(vgg[2]))
