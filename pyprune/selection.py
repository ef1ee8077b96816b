"""Which filters stay: CRank's automatic selection (thesis sections 4.1 to 4.3), and HRank at given rates."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt
import scipy
import sklearn
from scipy.spatial.distance import cdist
from sklearn.metrics import silhouette_samples
from torch import nn

import pyprune
from pyprune import graph, hrank
from pyprune.clustering import ROUNDING, Clustering, KMeansOptions, Labels, k_range, search
from pyprune.types import ClassRanks, FilterWhy, FloatArray, IntArray, LayerWhy, Plan, Region

METHODS = ("crank", "hrank")
CLUSTERERS = ("sklearn",)

MIN_ROWS = 5
"""Filters, and distinct rows, that a layer needs: below, no K of at least 4 leaves anything to compare."""

BEST = Region.HIGH_AVG_LOW_STD
"""Where the filters lie that do well for every class: region 2 of the thesis."""

Rates = Plan | Mapping[str, float] | Sequence[float] | float | str
Bools = npt.NDArray[np.bool_]


def select(
    model: nn.Module,
    method: str = "crank",
    *,
    ranks: ClassRanks | None = None,
    rates: Rates | None = None,
    exclude: Sequence[str] = (),
    min_keep: int = 1,
    clusterer: str = "sklearn",
    k_min: int = 4,
    k_max: int | None = None,
    seed: int = 6,
    n_init: int = 10,
    max_iter: int = 10000,
    jobs: int | None = None,
    progress: bool = True,
) -> Plan:
    """Choose the filters that stay in every layer that was ranked.

    Parameters
    ----------
    model
        The network that was ranked.
    method
        ``"crank"`` finds rates by itself: it clusters the filters of a layer by their class ranks, keeps the clusters
        whose medoid does well for every class, and thins these out. ``"hrank"`` keeps the filters with the highest
        mean rank, as many as ``rates`` says.
    ranks
        From :func:`pyprune.rank_filters` or :class:`pyprune.RankAccumulator`.
    rates
        For ``"hrank"``: the share of filters that goes, in [0, 1), one for all layers or one for each; of F filters
        F (1 - rate), rounded, halves up, stay. Or a :class:`Plan`, of which each layer keeps as many as the plan
        does; layers that the plan leaves out keep all. Or HRank's list, as numbers or as a string such as
        ``"[0.95]+[0.5]*6+[0.9]*4+[0.8]*2"``: see :func:`pyprune.hrank.rates_for`.
    exclude
        Convolutions that keep every filter.
    min_keep
        At least so many filters stay in every layer (all, where there are fewer).
    clusterer
        ``"sklearn"``: scikit-learn's ``KMeans`` and ``silhouette_score``.
    k_min, k_max
        Numbers of clusters that are tried; by default all from 4, as in thesis algorithm 3, to F - 1, or to the
        number of distinct rows.
    seed, n_init, max_iter
        For k-means: 6 and 10000 in the thesis's listing, with scikit-learn's default of 10 restarts at that time.
    jobs
        Processes for the clustering; ``None`` for one per core. The plan does not depend on it.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Plan
        For every layer of ``ranks``: ``keep`` the filters that stay, ``why`` what was seen in each, ``options``
        all settings, library versions and how the ranks came about.

    Raises
    ------
    ValueError
        If the method is unknown, ranks or rates are missing, out of range or of another model, ``rates`` is given to
        a method that finds its own, or the ranks know one class only, of which no deviation can be taken.
    TypeError
        If an argument is of the wrong kind.

    Notes
    -----
    CRank follows thesis algorithm 3; each step is a function of this module, named after it: :func:`min_max`,
    :func:`average_and_deviation`, :func:`dividing_point`, :func:`pyprune.clustering.search`, :func:`medoids`,
    :func:`regions`, :func:`surviving`, :func:`redundant`, :func:`refill`. docs/selection.md tells them in order.
    """
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"select: method must be one of {', '.join(map(repr, METHODS))}; got {method!r}.{hint}")
    found = _check_ranks(model, method, ranks)
    left_alone = _check_exclude(model, exclude)
    _check_counts(min_keep=min_keep, n_init=n_init, max_iter=max_iter, jobs=jobs, k_max=k_max)
    if method == "hrank":
        return _hrank(model, found, rates, left_alone, min_keep)
    if rates is not None:
        raise ValueError("select: 'crank' finds its own rates; rates are for 'hrank'. Leave them out.")
    if clusterer not in CLUSTERERS:
        raise ValueError(f"select: clusterer must be one of {', '.join(map(repr, CLUSTERERS))}; got {clusterer!r}.")
    if k_min < 2:
        raise ValueError(f"select: k_min must be at least 2, for a silhouette needs two clusters; got {k_min}.")
    settings = {
        "clusterer": clusterer, "k_min": k_min, "k_max": k_max, "seed": seed, "n_init": n_init, "max_iter": max_iter
    }  # fmt: skip
    whys = _crank(found, left_alone, min_keep, k_min, k_max, KMeansOptions(seed, n_init, max_iter), jobs, progress)
    return _plan("crank", found, whys, left_alone, min_keep, settings)


def _crank(
    ranks: ClassRanks, exclude: Sequence[str], min_keep: int, k_min: int, k_max: int | None,
    options: KMeansOptions, jobs: int | None, progress: bool,
) -> dict[str, LayerWhy]:  # fmt: skip
    """Select by CRank in every layer (thesis algorithm 3)."""
    if ranks.num_classes < 2:
        raise ValueError("select: 'crank' needs ranks of at least two classes; got 1. Use method='hrank'.")
    normalised = {name: min_max(R) for name, R in ranks.layers.items()}
    ks = {name: k_range(X, k_min, k_max) for name, X in normalised.items()}
    notes = {
        name: "excluded" if name in exclude else _why_alone(ranks, name, X, ks[name]) for name, X in normalised.items()
    }
    searched = {name: ks[name] for name, note in notes.items() if not note}
    best = search(normalised, searched, options, jobs, progress)
    return {
        name: _untouched(len(X), notes[name]) if notes[name] else select_filters(X, best[name], min_keep)
        for name, X in normalised.items()
    }


def _why_alone(ranks: ClassRanks, name: str, X: FloatArray, ks: range) -> str:
    """Say why CRank leaves a layer alone; empty if it does not."""
    if name in ranks.uninformative:
        return f"uninformative: {ranks.full_rank_share(name):.1%} of its ranks are full"
    rows = len(np.unique(X, axis=0))
    if rows < MIN_ROWS:
        return f"too few to cluster: {len(X)} filters, {rows} of them distinct, and at least {MIN_ROWS} are needed"
    if not ks:
        return f"no number of clusters to try from {ks.start} to {ks.stop - 1}"
    if any(np.ptp(values) == 0 for values in average_and_deviation(X)):
        return "no dividing point: AVG or STD is the same for every filter"
    return ""


def select_filters(X: FloatArray, clustering: Clustering, min_keep: int = 1) -> LayerWhy:
    """Apply the regions and the silhouettes to one clustered layer (thesis algorithm 3 and section 4.3).

    Parameters
    ----------
    X
        [F, C], from :func:`min_max`.
    clustering
        The best clustering of its rows.
    min_keep
        Filters that stay at least.
    """
    labels = clustering.labels
    avg, std = average_and_deviation(X)
    avg_mean, std_mean = dividing_point(avg, std)
    where = regions(avg, std)
    centres = medoids(X, labels)
    silhouettes = silhouette_samples(X, labels)
    keep, reasons = _judge(labels, where, centres, silhouettes)
    for f in refill(keep, avg, std, min_keep):
        keep[f] = True
        reasons[f] = "kept to leave min_keep"
    return LayerWhy(
        tuple(
            FilterWhy(
                reasons[f], bool(keep[f]), int(labels[f]), f in centres.values(), where[f],
                float(silhouettes[f]), float(avg[f]), float(std[f]),
            )
            for f in range(len(X))
        ),
        k=clustering.k, silhouette=clustering.silhouette, avg_mean=avg_mean, std_mean=std_mean,
    )  # fmt: skip


def _judge(
    labels: Labels, where: Sequence[Region], centres: Mapping[int, int], silhouettes: FloatArray
) -> tuple[Bools, list[str]]:
    """Return which filters stay, [F], and why: the second half of thesis algorithm 3."""
    keep = np.zeros(len(labels), np.bool_)
    reasons = [f"outside {BEST}"] * len(labels)
    inside = np.array([region is BEST for region in where])
    alive = surviving(centres, where)
    for f in np.flatnonzero(~np.isin(labels, alive)).tolist():
        reasons[f] = f"its cluster's medoid lies outside {BEST}"
    for label in alive:
        members = np.flatnonzero((labels == label) & inside)
        mean = mean_silhouette(silhouettes[members])
        for f, gone in zip(members.tolist(), redundant(silhouettes[members]).tolist(), strict=True):
            relation = "redundant: silhouette {:.2f} above" if gone else "kept: silhouette {:.2f} not above"
            reasons[f] = f"{relation.format(silhouettes[f])} the mean {mean:.2f}"
            keep[f] = not gone
        keep[centres[label]] = True
        reasons[centres[label]] = "medoid"
    return keep, reasons


def min_max(R: FloatArray) -> FloatArray:
    """Scale every column of R [F, C] to [0, 1] over the filters (thesis section 4.1).

    A column that is constant but for rounding, ten units in the last place, becomes 0.
    """
    low, span = R.min(axis=0), np.ptp(R, axis=0)
    constant = span < 10 * np.finfo(np.float64).eps * np.maximum(1, np.abs(low))
    scaled: FloatArray = np.where(constant, 0.0, (R - low) / np.where(constant, 1.0, span))
    return scaled


def average_and_deviation(X: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return AVG and STD [F] of the rows of X [F, C], each scaled to [0, 1] (thesis algorithm 1).

    Whether the deviation divides by C or C - 1 makes no difference after scaling.
    """
    both = min_max(np.stack([X.mean(axis=1), X.std(axis=1)], axis=1))
    return both[:, 0], both[:, 1]


def dividing_point(avg: FloatArray, std: FloatArray) -> tuple[float, float]:
    """Return the means of AVG and STD, which divide the plane into four regions (thesis algorithm 3)."""
    return float(avg.mean()), float(std.mean())


def regions(avg: FloatArray, std: FloatArray) -> list[Region]:
    """Return the region of every filter (thesis section 4.2).

    High AVG and low STD are strict: a filter on a dividing line does not lie in HIGH_AVG_LOW_STD.
    """
    avg_mean, std_mean = dividing_point(avg, std)
    names = {
        (True, True): Region.HIGH_AVG_LOW_STD, (True, False): Region.HIGH_AVG_HIGH_STD,
        (False, True): Region.LOW_AVG_LOW_STD, (False, False): Region.LOW_AVG_HIGH_STD,
    }  # fmt: skip
    high, low = avg - avg_mean > ROUNDING, std_mean - std > ROUNDING
    return [names[bool(h), bool(s)] for h, s in zip(high, low, strict=True)]


def medoids(X: FloatArray, labels: Labels) -> dict[int, int]:
    """Return, for each cluster, its member with the least summed Euclidean distance to the others.

    The lowest index wins a tie (thesis listing A.4). Distances are added in ascending order, so members with the
    same distances have the same sum.
    """
    found = {}
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        sums = np.sort(cdist(X[members], X[members]), axis=1).sum(axis=1)
        found[label] = int(members[np.flatnonzero(sums <= sums.min() + ROUNDING)[0]])
    return found


def surviving(centres: Mapping[int, int], where: Sequence[Region]) -> list[int]:
    """Return the clusters whose medoid lies in HIGH_AVG_LOW_STD (thesis algorithm 3)."""
    return [label for label, medoid in centres.items() if where[medoid] is BEST]


def mean_silhouette(silhouettes: FloatArray) -> float:
    """Return the mean silhouette of a surviving cluster's members inside the region (thesis listing A.4)."""
    return math.fsum(silhouettes.tolist()) / len(silhouettes)


def redundant(silhouettes: FloatArray) -> Bools:
    """Say which of the members inside the region are packed more densely than their mean (thesis section 4.3)."""
    above: Bools = silhouettes - mean_silhouette(silhouettes) > ROUNDING
    return above


def refill(keep: Bools, avg: FloatArray, std: FloatArray, min_keep: int) -> IntArray:
    """Return the filters to add so that ``min_keep`` stay: by highest AVG, then lowest STD, then lowest index."""
    order = np.lexsort((std, -avg))
    candidates = order[~keep[order]]
    return candidates[: max(0, min_keep - int(keep.sum()))].astype(np.int64)


def _untouched(count: int, note: str) -> LayerWhy:
    return LayerWhy(tuple(FilterWhy("the layer is left alone", True) for _ in range(count)), note)


def _hrank(model: nn.Module, ranks: ClassRanks, rates: Rates | None, exclude: Sequence[str], min_keep: int) -> Plan:
    """Keep the filters with the highest mean rank (thesis section 3.2.3, after HRank)."""
    counts = _kept_counts(model, ranks, rates, exclude)
    whys = {}
    for name, R in ranks.layers.items():
        if name in exclude:
            whys[name] = _untouched(len(R), "excluded")
        else:
            whys[name] = _highest(mean_rank(R, ranks.counts), min(len(R), max(min_keep, counts[name])))
    given: Any = f"of a plan by {rates.method}" if isinstance(rates, Plan) else rates
    plain = dict(given) if isinstance(given, Mapping) else list(given) if isinstance(given, (list, tuple)) else given
    settings = {"rates": plain, "counts": counts}
    return _plan("hrank", ranks, whys, exclude, min_keep, settings)


def mean_rank(R: FloatArray, counts: IntArray | None) -> FloatArray:
    """Return each filter's mean rank over all images [F], classes weighted by their images if ``counts`` is known.

    Rounded to nine decimals, so that filters with the same sum of ranks tie whatever way it was added up.
    """
    rounded: FloatArray = np.round(np.average(R, axis=1, weights=counts), 9)
    return rounded


def _highest(means: FloatArray, count: int) -> LayerWhy:
    """Keep the ``count`` highest means, the lower index first on a tie."""
    kept = set(np.argsort(-means, kind="stable")[:count].tolist())
    return LayerWhy(
        tuple(
            FilterWhy(f"mean rank {mean:.3f}, {'among' if f in kept else 'below'} the {count} highest", f in kept)
            for f, mean in enumerate(means.tolist())
        )
    )


def kept_count(filters: int, rate: float) -> int:
    """Return how many of ``filters`` stay at ``rate``: rounded to the nearest, halves up, and at least one."""
    return max(1, math.floor(filters * (1 - rate) + 0.5))


def _kept_counts(model: nn.Module, ranks: ClassRanks, rates: Rates | None, exclude: Sequence[str]) -> dict[str, int]:
    """Return how many filters each layer keeps, after checking ``rates``."""
    filters = {name: len(R) for name, R in ranks.layers.items()}
    if rates is None:
        raise ValueError("select: 'hrank' needs rates: a plan, one rate per layer, or one rate in [0, 1).")
    if isinstance(rates, Sequence):
        rates = _listed_rates(model, rates, filters, exclude)
    if isinstance(rates, Plan):
        graph.check_plan("select", model, rates)
        _check_known(rates.keep, filters)
        return {name: len(rates.keep.get(name, range(count))) for name, count in filters.items()}
    each = dict(rates) if isinstance(rates, Mapping) else dict.fromkeys(filters, rates)
    _check_known(each, filters)
    missing = [name for name in filters if name not in each and name not in exclude]
    if missing:
        raise ValueError(f"select: rates lacks {', '.join(map(repr, missing))}. Give each a rate, or exclude it.")
    for name, rate in each.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise TypeError(f"select: rates must be numbers in [0, 1), or a plan; got {type(rate).__name__}.")
        if not 0 <= rate < 1:
            raise ValueError(f"select: rates must be in [0, 1); got {rate} for {name!r}.")
    return {name: kept_count(filters[name], float(rate)) for name, rate in each.items()}


def _listed_rates(
    model: nn.Module, rates: Sequence[float] | str, filters: Mapping[str, int], exclude: Sequence[str]
) -> dict[str, float]:
    """Return the rates of the layers that were ranked, out of a list for all convolutions."""
    listed = hrank.rates_for(model, rates)
    for name, rate in listed.items():
        if rate and name not in filters and name not in exclude:
            raise ValueError(f"select: rates gives {name!r} {rate:.3g}, and there are no ranks of it. Exclude it.")
    return {name: rate for name, rate in listed.items() if name in filters}


def _check_known(names: Mapping[str, Any], filters: Mapping[str, int]) -> None:
    for name in names:
        if name not in filters:
            near = difflib.get_close_matches(str(name), filters, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"select: rates names {name!r}, of which there are no ranks.{hint}")


def _check_ranks(model: nn.Module, method: str, ranks: ClassRanks | None) -> ClassRanks:
    """Return ``ranks`` after checking that they are of ``model``."""
    if ranks is None:
        raise ValueError(f"select: {method!r} needs ranks; pass ranks=pyprune.rank_filters(model, loader).")
    if not isinstance(ranks, ClassRanks):
        raise TypeError(f"select: ranks must be ClassRanks; got {type(ranks).__name__}.")
    layers = graph.convolutions(model)
    for name, R in ranks.layers.items():
        have = layers[name].out_channels if name in layers else None
        if have != len(R):
            here = "is no convolution" if have is None else f"has {have} filters"
            raise ValueError(
                f"select: the ranks are from another model: {name!r} has {len(R)} filters there and {here} here."
            )
    return ranks


def _check_exclude(model: nn.Module, exclude: Sequence[str]) -> list[str]:
    if isinstance(exclude, str):
        raise TypeError(f"select: exclude must be a sequence of names; got one string. Pass [{exclude!r}].")
    for name in exclude:
        graph.check_layer("select", name, graph.convolutions(model))
    return list(exclude)


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"select: {name} must be a whole number of at least 1; got {count!r}.")


def _plan(
    method: str, ranks: ClassRanks, whys: Mapping[str, LayerWhy], exclude: Sequence[str], min_keep: int,
    settings: Mapping[str, Any],
) -> Plan:  # fmt: skip
    """Assemble the plan from the reasons."""
    modules = {"joblib": joblib, "numpy": np, "pyprune": pyprune, "scikit-learn": sklearn, "scipy": scipy}
    versions = {name: str(module.__version__) for name, module in modules.items()}
    return Plan(
        keep={name: np.array([f for f, why in enumerate(layer) if why.keep], np.int64) for name, layer in whys.items()},
        filters={name: len(layer) for name, layer in whys.items()},
        why=dict(whys),
        method=method,
        options={
            **settings, "exclude": list(exclude), "min_keep": min_keep, "libraries": versions,
            "ranks": dict(ranks.info),
        },
    )  # fmt: skip
