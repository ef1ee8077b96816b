"""K-means for every number of clusters at once, each judged by its silhouettes (thesis sections 4.1.1 and 4.1.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyprune import machine
from pyprune.hints import did_you_mean
from pyprune.machine import Machine

TIE = 1e-12
"""Mean silhouettes, numbers up to 1, that differ by less are equal but for rounding."""

MOST_ROWS = 32767
"""Beyond, the matrix of distances would take more than 8 GB."""


@dataclass(frozen=True, eq=False)
class KSearch:
    """What :func:`k_search` found for every K; the first axis runs over ``ks``.

    Attributes
    ----------
    ks
        int64 [n], the numbers of clusters that were tried.
    labels
        int32 [n, F]: the cluster of every row, in [0, K), numbered in order of their first row; none is empty.
    inertia
        float64 [n]: the summed squared distances of the rows to the centres of their clusters.
    silhouettes
        float64 [n, F], 0 for a row alone in its cluster.
    scores
        float64 [n], their means.
    rounds, moves
        int32 [n]: Lloyd's rounds of the restart that won, and the rows that ``refine`` moved afterwards.
    variant
        Which variant computed it.
    """

    ks: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    inertia: npt.NDArray[np.float64]
    silhouettes: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    rounds: npt.NDArray[np.int32]
    moves: npt.NDArray[np.int32]
    variant: str

    @property
    def best(self) -> int:
        """Where in ``ks`` the highest score stands, the smallest K on a tie (thesis section 4.1.2)."""
        return int(np.flatnonzero(self.scores >= self.scores.max() - TIE)[0])


def choose_kmeans(machine: Machine) -> str:
    """Return the CPU's fastest variant; all on the CPU give the same bits."""
    if not machine.cpu_variants:
        raise ValueError("k_search: the extension pyprune._core is not built; run pip install .")
    return machine.cpu_variants[-1]


def k_search(
    x: npt.ArrayLike,
    k_min: int = 4,
    k_max: int | None = None,
    *,
    n_init: int = 10,
    seed: int = 6,
    max_iter: int = 10000,
    refine: bool = False,
    variant: str = "auto",
    progress: Callable[[int], object] | None = None,
) -> KSearch:
    """Cluster the rows of ``x`` into every number of clusters by k-means, and score each by its silhouettes.

    Parameters
    ----------
    x
        [F, C] finite numbers in host memory: F rows to cluster; for CRank filters by classes, scaled to [0, 1].
    k_min, k_max
        Numbers of clusters to try, both included; ``k_max`` is F - 1, or the number of distinct rows if that is less.
    n_init
        Restarts, of which the one with the least inertia counts.
    seed
        The result is the same for the same seed, whatever the number of threads and the CPU's variant; what a K gets
        does not depend on which others are tried.
    max_iter
        Rounds of a restart at most.
    refine
        Afterwards move single rows of the best restart for as long as that lowers the inertia, by 3 to 6 % where
        clusters are not clear. Off by default, for it favours a larger K than plain k-means does.
    variant
        ``"auto"``, or one of :func:`kmeans_variants`. ``"cuda_gram"``: Lloyd's rounds on the first GPU, the rest on
        the CPU; only by name, for it has not been measured.
    progress
        Called on the calling thread with the number of K that were done since the last call.

    Returns
    -------
    KSearch

    Raises
    ------
    ValueError
        If ``x`` is not [F, C], not finite or too large, has too few rows or distinct rows, a count is out of range, or
        the variant is unknown or not usable here.
    TypeError
        If ``x`` does not hold real numbers, or a count is no whole number.

    Notes
    -----
    k-means++ seeds (several candidates each), Lloyd's rounds to their fixed point, the silhouettes of scikit-learn. A
    round costs at most F^2 additions whatever K and C are, memory is 8 F^2 bytes and 12 F bytes for each K.
    docs/ops/kmeans.md has the method.

    Examples
    --------
    >>> import numpy as np
    >>> from pyprune.ops.kmeans import k_search
    >>> found = k_search(np.repeat([[0.0], [1.0], [5.0]], 3, axis=0) + np.arange(9)[:, None] / 100, k_min=2)
    >>> int(found.ks[found.best]), found.labels[found.best].tolist()
    (3, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    """
    rows = _rows(x)
    for name, value, least in (
        ("k_min", k_min, 2),
        ("n_init", n_init, 1),
        ("max_iter", max_iter, 1),
        ("seed", seed, 0),
    ):
        _check_whole(name, value, least)
    k_max = _check_k(rows, k_min, k_max)
    name = _resolve(variant, machine.this_machine())
    from pyprune import _core

    cpu, elsewhere = (choose_kmeans(machine.this_machine()), "cuda") if name == "cuda_gram" else (name, "")
    labels, silhouettes, inertia, scores, rounds, moves = _core.k_search(
        rows, k_min, k_max, n_init, min(max_iter, 2**31 - 2), seed, refine, cpu, machine.threads(), progress, elsewhere
    )
    return KSearch(np.arange(k_min, k_max + 1), labels, inertia, silhouettes, scores, rounds, moves, name)


def kmeans_variants(machine: Machine) -> tuple[str, ...]:
    """Return the names that ``variant=`` takes on such a machine."""
    return (*machine.cpu_variants, *(("cuda_gram",) if machine.cuda else ()))


def _rows(x: Any) -> npt.NDArray[np.float64]:
    """Return ``x`` as float64 [F, C] in C order, after checking it."""
    if getattr(x, "is_cuda", False):
        raise ValueError(f"k_search: x must be in host memory; it is on {x.device}. Pass x.cpu().")
    array = np.asarray(x.detach() if hasattr(x, "detach") else x)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"k_search: x must hold real numbers; got {array.dtype}. Convert it to float64.")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"k_search: x must be [F, C] with at least one row and column; got {list(array.shape)}.")
    if len(array) > MOST_ROWS:
        raise ValueError(f"k_search: x must have at most {MOST_ROWS} rows; got {len(array)}. Pass a sample of them.")
    rows = np.ascontiguousarray(array, np.float64)
    bad = rows.size - np.count_nonzero(np.isfinite(rows))
    if bad:
        raise ValueError(f"k_search: x must be finite; {bad} of {rows.size} numbers are NaN or infinite. Remove them.")
    return rows


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"k_search: {name} must be a whole number; got {value!r}.")
    if not least <= value < 2**63:
        raise ValueError(f"k_search: {name} must be at least {least} and below 2^63; got {value}.")


def _check_k(rows: npt.NDArray[np.float64], k_min: int, k_max: int | None) -> int:
    """Return the largest K to try, after checking that the rows allow it."""
    distinct = len(np.unique(rows, axis=0))
    most = min(len(rows) - 1, distinct)
    have = f"{len(rows)} rows, {distinct} of them distinct"
    if k_max is None:
        k_max = max(most, k_min)
    _check_whole("k_max", k_max, k_min)
    if k_max > most:
        raise ValueError(
            f"k_search: {k_max} clusters need at least {k_max + 1} rows, {k_max} of them distinct; x has {have}. "
            + (f"Pass k_max={most} or less." if k_min <= most else "Leave such a layer alone.")
        )
    return k_max


def _resolve(variant: str, here: Machine) -> str:
    if variant == "auto":
        return choose_kmeans(here)
    names = ("auto", *kmeans_variants(here))
    why_not = machine.cuda_reason() if variant == "cuda_gram" else machine.cpu_variants().get(variant)
    if variant in names or why_not == "":
        return variant
    if why_not:
        raise ValueError(f"k_search: variant {variant!r} is not usable: {why_not}; here are {', '.join(names)}.")
    hint = did_you_mean(variant, names)
    raise ValueError(f"k_search: variant {variant!r} is unknown; here are {', '.join(names)}.{hint}")
