"""Every K of a layer: the native search, and scikit-learn's as it comes and on one thread.

``python benchmarks/test_bench_kmeans.py`` prints the ratios. scikit-learn's search takes minutes, so every 16th K
(every 51st as it comes) stands for its neighbours there; ours is timed on every K, before and after.
"""

import resource
import statistics
import sys
import time

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from pyprune import machine
from pyprune.ops.kmeans import k_search

VARIANTS = machine.this_machine().cpu_variants
SIZES = [(64, 10), (128, 10), (256, 10), (512, 10)]
VGG16 = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def rows(F, C):
    """Rows like those of a layer: filters that differ in level and in a dozen directions, scaled by column."""
    rng = np.random.default_rng(0)
    x = rng.random((F, 1)) + rng.random((F, 12)) @ rng.random((12, C)) / 3 + rng.random((F, C)) / 10
    return (x - x.min(axis=0)) / np.ptp(x, axis=0)


def by_sklearn(x, ks):
    """Inertia and score of every K of ``ks`` by scikit-learn, [n] each."""
    found = [KMeans(K, random_state=6, n_init=10, max_iter=10000).fit(x) for K in ks]
    return [one.inertia_ for one in found], [silhouette_score(x, one.labels_) for one in found]


@pytest.mark.parametrize("rival", [*VARIANTS, "sklearn, one thread, every 16th K"])
@pytest.mark.parametrize(("F", "C"), SIZES)
def test_k_search(benchmark, F, C, rival):
    benchmark.group = f"every K of {F} filters, {C} classes"
    x = rows(F, C)
    if rival in VARIANTS:
        found = benchmark.pedantic(k_search, (x,), {"variant": rival}, rounds=5, warmup_rounds=1)
        assert found.variant == rival
        assert found.ks.tolist() == list(range(4, F))
        assert found.scores[5] == pytest.approx(silhouette_score(x, found.labels[5]))
        return
    ks = range(4, F, 16)
    with threadpool_limits(1):
        inertia, _ = benchmark.pedantic(by_sklearn, (x, ks), rounds=1)
    mine = np.array([k_search(x, K, K).inertia[0] for K in ks if K <= F / 2])
    assert np.exp(np.log(mine / inertia[: len(mine)]).mean()) < 1.01


def seconds(call, rounds=5):
    call()
    each = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        each.append(time.perf_counter() - began)
    return statistics.median(each)


def main(F=512, C=10):
    threads = machine.threads()
    x = rows(F, C)
    ours = seconds(lambda: k_search(x))
    print(f"every K of {F} x {C}: {ours:.3f} s on {threads} threads, {VARIANTS[-1]}", flush=True)
    for name, step, limit in (("threadpool_limits(1)", 16, 1), ("as it comes", 51, None)):
        ks = range(4 + step // 2, F, step)
        with threadpool_limits(limit):
            began = time.perf_counter()
            inertia, _ = by_sklearn(x, ks)
            scaled = (time.perf_counter() - began) * (F - 4) / len(ks)
        again = (ours + seconds(lambda: k_search(x))) / 2
        half = [i for i, K in enumerate(ks) if K <= F / 2]
        mine = [k_search(x, ks[i], ks[i]).inertia[0] for i in half]
        ratio = np.exp(np.mean(np.log(mine) - np.log([inertia[i] for i in half])))
        print(
            f"scikit-learn {name}: {scaled:.0f} s from {len(ks)} K; ratio {scaled / again:.0f}; "
            f"inertia over its best of ten, K <= F/2: {ratio:.4f}",
            flush=True,
        )
    layers = [rows(F, 10) for F in VGG16]
    print(f"VGG-16, 13 layers, every K: {seconds(lambda: [k_search(x) for x in layers], 3):.2f} s", flush=True)
    for F, C in ((512, 1000), (1024, 1000), (2048, 1000)):
        x = rows(F, C)
        began = time.perf_counter()
        k_search(x)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"every K of {F} x {C}: {time.perf_counter() - began:.1f} s, {peak:.0f} MB at most so far", flush=True)


def on_gpu():
    """Print every K on the GPU beside the CPU, interleaved."""
    for F, C in ((256, 10), (512, 10), (1024, 1000), (2048, 1000)):
        x = rows(F, C)
        k_search(x[:32], variant="cuda_gram")  # warms up
        taken = {name: [] for name in ("auto", "cuda_gram")}
        for _ in range(3 if F < 1024 else 1):
            for name, each in taken.items():
                began = time.perf_counter()
                k_search(x, variant=name)
                each.append(time.perf_counter() - began)
        cpu, gpu = (statistics.median(each) for each in taken.values())
        print(f"every K of {F} x {C}: CPU {cpu:.2f} s, cuda_gram {gpu:.2f} s", flush=True)


if __name__ == "__main__":
    on_gpu() if sys.argv[1:] == ["cuda"] else main(*map(int, sys.argv[1:]))
