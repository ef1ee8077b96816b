"""Ranking VGG-16 and ResNet-56 on 500 images against their own forward passes, and the k search of a small network.

Run with ``python -m pytest benchmarks/test_bench_ranks.py``, or as a program for a table of ratios: ranking every map
the moment it exists (``at_once``) beside ranking with helper threads while the forward pass goes on (``beside``; at
least one, so where :func:`pyprune.overlap.choose_helpers` gives none the table shows why). The networks are
untrained and their images are noise: the maps of the first layers are at full rank, which is the dearest case for the
kernel. A ratio is taken over interleaved passes of one run, since the speed of a machine drifts.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyprune import clustering, machine, models, overlap
from pyprune.clustering import KMeansOptions, k_range, search
from pyprune.machine import keep_freed_memory
from pyprune.ops._reference import matrix_rank
from pyprune.ranks import RankAccumulator, rank_filters

IMAGES, CLASSES, BATCH = 500, 10, 50
NETWORKS = ("vgg16_bn", "resnet56")
ALLOWED = {"vgg16_bn": 1.25, "resnet56": 1.5}
DEMO = (32, 32, 64, 64, 128, 128)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(models, name)()
    return model.eval()


def images() -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(IMAGES, 3, 32, 32), torch.arange(IMAGES) % CLASSES)


def forward(model: nn.Module, data: TensorDataset) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in DataLoader(data, batch_size=BATCH)])


def rank(model: nn.Module, data: TensorDataset):
    return rank_filters(model, DataLoader(data, batch_size=BATCH), progress=False)


def with_helpers(least: int, most: int, model: nn.Module, data: TensorDataset):
    with pytest.MonkeyPatch.context() as patch:
        choose = overlap.choose_helpers
        patch.setattr(overlap, "choose_helpers", lambda threads, cpus: min(most, max(least, choose(threads, cpus))))
        return rank(model, data)


def at_once(model: nn.Module, data: TensorDataset):
    return with_helpers(0, 0, model, data)


def beside(model: nn.Module, data: TensorDataset):
    return with_helpers(1, 64, model, data)


def read_only(model: nn.Module, data: TensorDataset):
    """Everything but the kernel: maps are read and dropped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "rank_at_once", lambda where, maps: np.zeros(maps.shape[:2], np.int32))
        return at_once(model, data)


@pytest.fixture(scope="module")
def data():
    keep_freed_memory()  # as ranking does: the forward pass alone must not pay for pages that it does not
    return images()


@pytest.mark.benchmark(group="500 images of 3x32x32")
@pytest.mark.parametrize("what", [forward, read_only, at_once, beside], ids=lambda what: what.__name__)
@pytest.mark.parametrize("name", NETWORKS)
def test_ranking_beside_the_forward_pass(benchmark, name, what, data):
    model = network(name)
    found = benchmark.pedantic(what, (model, data), rounds=3, warmup_rounds=1)
    benchmark.extra_info.update(network=name, threads=torch.get_num_threads())
    if what is forward:
        assert found.shape == (IMAGES, CLASSES)
        assert torch.isfinite(found).all()
        return
    assert found.counts.tolist() == [IMAGES // CLASSES] * CLASSES
    if what is not read_only:
        check_first_layer(model, data)
    if what is beside:
        expected = at_once(model, data)
        assert all(np.array_equal(found.layers[layer], R) for layer, R in expected.layers.items())


def check_first_layer(model: nn.Module, data: TensorDataset) -> None:
    """Compare the first layer's ranks of one image with the float64 reference."""
    first = next(name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d))
    norm = dict(model.named_modules())[{"conv1": "bn1"}.get(first, first.replace("conv", "norm"))]
    accumulator = RankAccumulator(model)
    with accumulator, torch.no_grad():
        model(data.tensors[0][:1])
        accumulator.update([0])
        maps = torch.relu(norm(dict(model.named_modules())[first](data.tensors[0][:1])))
    np.testing.assert_array_equal(accumulator.ranks().layers[first][:, 0], matrix_rank(maps[0].numpy()))


PASSES = (forward, read_only, at_once, beside)


def ratios(name: str, rounds: int) -> dict[str, float]:
    """Return the median seconds of each kind of pass over ``rounds`` interleaved ones."""
    model, data = network(name), images()
    seconds: dict[str, list[float]] = {what.__name__: [] for what in PASSES}
    for _ in range(rounds + 1):
        for what in PASSES:
            began = time.perf_counter()
            what(model, data)
            seconds[what.__name__].append(time.perf_counter() - began)
    return {what: statistics.median(each[1:]) for what, each in seconds.items()}


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


if __name__ == "__main__":
    threads, cpus = torch.get_num_threads(), machine.cpus()
    print(f"threads {threads}, CPUs {cpus}, torch {torch.__version__}, medians of interleaved passes, seconds")
    print(f"rank_filters uses {overlap.choose_helpers(threads, cpus)} helpers here")
    print("| network | forward | maps read and dropped | ranked at once | ranked beside | ratios | allowed |")
    print("|---|---|---|---|---|---|---|")
    for name in NETWORKS:
        found = ratios(name, int(sys.argv[1]) if len(sys.argv) > 1 else 7)
        cells = " | ".join(f"{seconds:.3f}" for seconds in found.values())
        both = ", ".join(f"{found[what] / found['forward']:.2f}" for what in ("at_once", "beside"))
        print(f"| {name} | {cells} | {both} | {ALLOWED[name]} |")
