"""Ranking VGG-16 on 500 images against its own forward pass, and the k search of a small network.

Run with ``python -m pytest benchmarks/test_bench_ranks.py``. The network is untrained and its images are noise: the
maps of the first layers are at full rank, which is the dearest case for the kernel.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyprune import clustering
from pyprune.clustering import KMeansOptions, k_range, search
from pyprune.models import vgg16_bn
from pyprune.ops._reference import matrix_rank
from pyprune.ranks import RankAccumulator, rank_filters

IMAGES, CLASSES, BATCH = 500, 10, 50
MAPS = IMAGES * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512)
DEMO = (32, 32, 64, 64, 128, 128)


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(0)
    return vgg16_bn().eval()


@pytest.fixture(scope="module")
def data():
    return TensorDataset(torch.randn(IMAGES, 3, 32, 32), torch.arange(IMAGES) % CLASSES)


@pytest.mark.benchmark(group="VGG-16, 500 images of 3x32x32")
def test_forward_alone(benchmark, vgg, data):
    def forward():
        with torch.no_grad():
            return torch.cat([vgg(images) for images, _ in DataLoader(data, batch_size=BATCH)])

    scores = benchmark.pedantic(forward, rounds=3, warmup_rounds=1)
    assert scores.shape == (IMAGES, CLASSES)
    assert torch.isfinite(scores).all()


@pytest.mark.benchmark(group="VGG-16, 500 images of 3x32x32")
def test_forward_interpreted_with_maps_read_and_dropped(benchmark, vgg, data, monkeypatch):
    """What the graph interpreter alone costs."""
    monkeypatch.setattr("pyprune.ranks.matrix_rank", lambda maps: torch.zeros(maps.shape[:2], dtype=torch.int32))
    ranks = benchmark.pedantic(rank_filters, (vgg, DataLoader(data, batch_size=BATCH)), rounds=3, warmup_rounds=1)
    assert ranks.counts.tolist() == [IMAGES // CLASSES] * CLASSES


@pytest.mark.benchmark(group="VGG-16, 500 images of 3x32x32")
def test_rank_filters(benchmark, vgg, data):
    ranks = benchmark.pedantic(rank_filters, (vgg, DataLoader(data, batch_size=BATCH)), rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(maps=MAPS, variants=ranks.info["variants"], threads=ranks.info["threads"])
    assert ranks.counts.tolist() == [IMAGES // CLASSES] * CLASSES
    accumulator = RankAccumulator(vgg)
    with accumulator, torch.no_grad():
        vgg(data.tensors[0][:1])
        accumulator.update([0])
        maps = vgg.features.relu0(vgg.features.norm0(vgg.features.conv0(data.tensors[0][:1])))
    np.testing.assert_array_equal(accumulator.ranks().layers["features.conv0"][:, 0], matrix_rank(maps[0].numpy()))


@pytest.mark.benchmark(group="every K of six layers of 32 to 128 filters, 10 classes")
@pytest.mark.parametrize("jobs", [1, None], ids=["one process", "one per core"])
def test_k_search(benchmark, jobs):
    rng = np.random.default_rng(0)
    layers = {str(i): rng.random((F, 1)) + rng.random((F, CLASSES)) for i, F in enumerate(DEMO)}
    ks = {name: k_range(X) for name, X in layers.items()}
    found = benchmark.pedantic(
        search, (layers, ks, KMeansOptions(), jobs), rounds=2 if jobs is None else 1, warmup_rounds=int(jobs is None)
    )
    one = found["0"]
    again = clustering.cluster(layers["0"], one.k, KMeansOptions())
    assert one.silhouette == again.silhouette
    assert np.array_equal(one.labels, again.labels)
