"""K-means for every number of clusters, and the silhouette that judges them (thesis sections 4.1.1 and 4.1.2).

The native search reads everything off one matrix of distances; scikit-learn's is kept to the letter. Kept free of
torch, so that the worker processes of the latter start quickly.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import joblib
import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from pyprune.ops.kmeans import TIE, KSearch, k_search
from pyprune.progress import bar
from pyprune.types import NOTHING, FloatArray

Labels = npt.NDArray[np.int32]

ROUNDING = 1e-12
"""Scores, distances and statistics of numbers in [0, 1] that differ by less are equal but for rounding."""

CHUNK = 0.25
"""Seconds of work that one task should hold: enough to hide what handing it over costs, little enough to balance."""

SERIAL = 2.0
"""Seconds of work below which starting processes (about a second each) does not pay."""


@dataclass(frozen=True, eq=False)
class Clustering:
    """The clustering of one layer's filters: ``labels`` [F] in [0, k), and the mean silhouette."""

    k: int
    labels: Labels
    silhouette: float


@dataclass(frozen=True)
class KMeansOptions:
    """What k-means is given; the thesis has seed 6 and max_iter 10000, and scikit-learn's n_init was 10 then."""

    seed: int = 6
    n_init: int = 10
    max_iter: int = 10000


def k_range(X: FloatArray, k_min: int = 4, k_max: int | None = None) -> range:
    """Return every K to try for rows X [F, C]: ``k_min`` to F - 1, at most the number of distinct rows or ``k_max``.

    Beyond F - 1 the silhouette is not defined, and beyond the distinct rows a cluster would be empty.
    """
    most = min(len(X) - 1, len(np.unique(X, axis=0)))
    return range(k_min, (most if k_max is None else min(most, k_max)) + 1)


def cluster(X: FloatArray, k: int, options: KMeansOptions) -> Clustering:
    """Cluster the rows of X [F, C] into ``k`` by k-means (thesis eq. 4.1) and score it (thesis eq. 4.2 to 4.4).

    Exactly scikit-learn's ``KMeans`` and ``silhouette_score``. Where it finds fewer clusters than asked, because
    rows differ by rounding alone, the silhouette is that of what it found; -1, the worst, for a single one.
    """
    kmeans = KMeans(
        n_clusters=k, random_state=options.seed, n_init=options.n_init, max_iter=options.max_iter
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = kmeans.fit(X).labels_
    found = len(np.unique(labels))
    score = float(silhouette_score(X, labels)) if 2 <= found < len(X) else -1.0
    return Clustering(k, labels, score)


def best_k(clusterings: Sequence[Clustering]) -> Clustering:
    """Return the clustering with the highest silhouette, the smallest K on a tie (thesis section 4.1.2)."""
    top = max(one.silhouette for one in clusterings)
    return min((one for one in clusterings if one.silhouette >= top - TIE), key=lambda one: one.k)


def search_native(
    layers: Mapping[str, FloatArray],
    ks: Mapping[str, range],
    options: KMeansOptions,
    seeds: Mapping[str, Sequence[int]] = NOTHING,
    progress: bool = True,
) -> dict[str, list[Clustering]]:
    """Try every K of every layer by :func:`pyprune.ops.kmeans.k_search` and return the best clustering of each.

    Parameters
    ----------
    layers
        Rows X [F, C] to cluster, by layer.
    ks
        The K to try, by layer; none may be empty.
    options
        For k-means.
    seeds
        More seeds to search with, by layer.
    progress
        Whether to show one bar over all layers, seeds and K.

    Returns
    -------
    dict
        For each layer the best clustering with the seed of ``options``, and then with each of ``seeds``.
    """
    every = {name: (options.seed, *seeds.get(name, ())) for name in ks}
    total = sum(len(ks[name]) * len(own) for name, own in every.items())
    found: dict[str, list[Clustering]] = {}
    with bar("Clustering", total, progress) as advance:
        for name, own in every.items():
            found[name] = [
                _best(
                    k_search(
                        layers[name], ks[name][0], ks[name][-1], n_init=options.n_init, seed=seed,
                        max_iter=options.max_iter, progress=advance,
                    )
                )
                for seed in own
            ]  # fmt: skip
    return found


def _best(search: KSearch) -> Clustering:
    i = search.best
    return Clustering(int(search.ks[i]), search.labels[i], float(search.scores[i]))


def search(
    layers: Mapping[str, FloatArray],
    ks: Mapping[str, range],
    options: KMeansOptions,
    jobs: int | None = None,
    progress: bool = True,
) -> dict[str, Clustering]:
    """Try every K of every layer by scikit-learn and return the best clustering of each.

    The tasks, a few K of one layer each, go to ``jobs`` processes, the long ones first; every process computes on
    one thread, because scikit-learn's threads cost more than they bring on so few rows. The result does not depend on
    ``jobs``: each K is computed for itself.

    Parameters
    ----------
    layers
        Rows X [F, C] to cluster, by layer.
    ks
        The K to try, by layer; none may be empty.
    options
        For scikit-learn.
    jobs
        Processes; ``None`` for one per core, or none where the work is too little to repay their start.
    progress
        Whether to show one bar over all layers and K.
    """
    tasks = _tasks(layers, ks, options)
    found: dict[str, list[Clustering]] = {name: [] for name in ks}
    with bar("Clustering", sum(map(len, ks.values())), progress) as advance:
        for name, clusterings in _run(tasks, options, jobs):
            found[name] += clusterings
            advance(len(clusterings))
    return {name: best_k(clusterings) for name, clusterings in found.items()}


@dataclass(frozen=True, eq=False)
class _Task:
    layer: str
    X: FloatArray
    ks: Sequence[int]
    seconds: float


def _tasks(layers: Mapping[str, FloatArray], ks: Mapping[str, range], options: KMeansOptions) -> list[_Task]:
    """Cut every layer's K into runs of about ``CHUNK`` seconds; the longest first, which balances best."""
    tasks = []
    for name, every in ks.items():
        X = layers[name]
        costs = np.cumsum([_seconds(X, k, options.n_init) for k in every])
        for chunk in np.unique(costs // CHUNK):
            mine = np.flatnonzero(costs // CHUNK == chunk)
            before = costs[mine[0] - 1] if mine[0] else 0.0
            tasks.append(_Task(name, X, [every[i] for i in mine], float(costs[mine[-1]] - before)))
    return sorted(tasks, key=lambda task: -task.seconds)


def _seconds(X: FloatArray, k: int, n_init: int) -> float:
    """Estimate the time of one K: scikit-learn spends 65 us of Python on each seed of k-means++, whatever F is."""
    return 1e-3 + 6.5e-5 * n_init * k * (1 + X.size / 60_000)


def _run(tasks: Sequence[_Task], options: KMeansOptions, jobs: int | None) -> Iterator[tuple[str, list[Clustering]]]:
    """Yield (layer, clusterings) for every task as they end."""
    if jobs is None:
        jobs = 1 if sum(task.seconds for task in tasks) < SERIAL else joblib.cpu_count()
    if jobs == 1 or len(tasks) < 2:
        yield from (_cluster_all(task, options) for task in tasks)
        return
    # loky starts fresh interpreters: forked children of a process with OpenMP threads hang.
    with joblib.parallel_config("loky", idle_worker_timeout=10):
        pool = joblib.Parallel(n_jobs=min(jobs, len(tasks)), return_as="generator_unordered", batch_size=1)
        yield from pool(joblib.delayed(_cluster_all)(task, options) for task in tasks)


def _cluster_all(task: _Task, options: KMeansOptions) -> tuple[str, list[Clustering]]:
    with threadpool_limits(1):
        return task.layer, [cluster(task.X, k, options) for k in task.ks]
