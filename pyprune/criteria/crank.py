"""CRank's selection (thesis sections 4.1 to 4.3), step by step, and the order in which filters come back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist
from sklearn.metrics import silhouette_samples
from torch import nn

from pyprune.clustering import ROUNDING, Clustering, KMeansOptions, Labels, k_range, search, search_native
from pyprune.criteria import Context, needed_number
from pyprune.criteria.ranked import ranked
from pyprune.types import ClassRanks, FilterWhy, FloatArray, IntArray, LayerWhy, Plan, Region

CLUSTERERS = ("native", "sklearn")

STABILITY_SEEDS = 3
STABILITY_FILTERS = 512
"""By default other seeds are tried for layers of at most so many filters: five more searches take seconds there."""

MIN_ROWS = 5
"""Filters, and distinct rows, that a layer needs: below, no K of at least 4 leaves anything to compare."""

BEST = Region.HIGH_AVG_LOW_STD
"""Where the filters lie that do well for every class: region 2 of the thesis."""

OWN = 1.0
"""Scores from here on belong to the filters that CRank itself keeps."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "scale": ("class", "layer"),
    "space": ("classes", "2d"),
    "members": ("region", "cluster"),
    "medoid": ("kept", "cluster_numbers"),
}
"""What each option may say; the first is the default."""

PRESETS: Mapping[str, Mapping[str, str]] = {
    "thesis_text": {"scale": "layer", "members": "cluster", "clusterer": "sklearn"},
    "thesis_code": {"medoid": "cluster_numbers", "clusterer": "sklearn"},
}
"""What the thesis's text and its listing A.4 do other than by default."""

_RANKED_WITH: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "thesis_text": {"images_per_class": (50, 10)},
    "thesis_code": {"images_per_class": (640,), "taps": ("hrank",)},
}

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class CRank:
    """Clusters of filters that do well for every class, thinned out; it finds its own rates (thesis algorithm 3).

    Parameters
    ----------
    preset
        ``"thesis_text"`` or ``"thesis_code"``: what the thesis's text or its listing A.4 does, where they differ from
        the defaults. Options that are given win over the preset.
    ease
        From 0, CRank's own selection, to 1, which removes nothing. Kept sets are nested in between; filters come back
        in the order of :func:`order`.
    scale
        Min-max over the filters for each ``"class"``, or over all numbers of the ``"layer"`` at once.
    space
        Cluster rows of all ``"classes"``, or the points (AVG, STD), ``"2d"``.
    members
        Whose silhouettes are held against whose mean in a surviving cluster: those of the members in the ``"region"``,
        or of the whole ``"cluster"``, whose members then need not lie in the region.
    medoid
        The medoid of a surviving cluster is ``"kept"``; or ``"cluster_numbers"``, a bug of the listing that is
        reproduced: it keeps the filters whose index is the *number* of a surviving cluster, and protects no medoid.
    clusterer
        ``"native"``: :func:`pyprune.ops.kmeans.k_search`, the same objective and the same score; or ``"sklearn"``,
        scikit-learn's ``KMeans`` and ``silhouette_score`` to the letter, which takes some hundred times as long.
    k_min, k_max
        Numbers of clusters that are tried; by default all from 4, as in thesis algorithm 3, to F - 1, or to the
        number of distinct rows.
    seed, n_init, max_iter
        For k-means: 6 and 10000 in the thesis's listing, with scikit-learn's default of 10 restarts at that time.
    stability
        How many other seeds of k-means the plan is compared with, ``seed + 1`` and so on: ``Plan.stability`` has the
        overlap of what is kept (at ease 0). ``None`` for 3 in layers of at most 512 filters; ``"native"`` only.
    jobs
        Processes for ``"sklearn"``; ``None`` for one per core. The plan does not depend on it.

    Raises
    ------
    ValueError
        If an option is unknown or out of range.
    """

    preset: str | None = None
    ease: float = 0.0
    scale: str | None = None
    space: str | None = None
    members: str | None = None
    medoid: str | None = None
    clusterer: str | None = None
    k_min: int = 4
    k_max: int | None = None
    seed: int = 6
    n_init: int = 10
    max_iter: int = 10000
    stability: int | None = None
    jobs: int | None = field(default=None, metadata={"record": False})

    name = "crank"
    needs = ("ranks",)
    label = "CRank's order"
    comparable = True

    def __post_init__(self) -> None:
        if self.preset is not None:
            _check_choice("preset", self.preset, tuple(PRESETS))
        given = PRESETS.get(self.preset or "", {})
        for name, choices in {**CHOICES, "clusterer": CLUSTERERS}.items():
            value = getattr(self, name)
            value = given.get(name, choices[0]) if value is None else value
            _check_choice(name, value, choices)
            object.__setattr__(self, name, value)
        needed_number("select", "ease", self.ease, 0, 1)
        _check_counts(n_init=self.n_init, max_iter=self.max_iter, jobs=self.jobs, k_max=self.k_max)
        if self.k_min < 2:
            raise ValueError(
                f"select: k_min must be at least 2, for a silhouette needs two clusters; got {self.k_min}."
            )
        if self.stability:
            _check_counts(stability=self.stability)
            if self.clusterer != "native":
                raise ValueError("select: stability needs clusterer='native'; scikit-learn would take hours over it.")

    def scores(self, model: nn.Module, context: Context) -> Mapping[str, FloatArray]:
        """Return every filter's place in :func:`order`, [F] by layer: at least 1 for those that CRank keeps."""
        return {name: np.array([one.score for one in why]) for name, why in self._judged(context).items()}

    def left_alone(self, model: nn.Module, context: Context) -> Mapping[str, str]:
        """Name the layers of which the ranks say nothing."""
        return {name: why.note for name, why in self._judged(context).items() if why.note}

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Return CRank's own selection, eased."""
        whys = {name: ease(why, self.ease) for name, why in self._judged(context).items()}
        return Plan(
            keep={name: np.array([f for f, one in enumerate(why) if one.keep]) for name, why in whys.items()},
            why=whys,
            options={"ranked_otherwise": _ranked_otherwise(self.preset, context.ranks)},
        )

    def _judged(self, context: Context) -> dict[str, LayerWhy]:
        return context.once(self, lambda: self._judge(context))

    def _judge(self, context: Context) -> dict[str, LayerWhy]:
        """Select in every layer (thesis algorithm 3), and give every filter its place."""
        rows = {name: self._rows(R) for _, name, R in ranked(context)}
        if context.ranks is not None and context.ranks.num_classes < 2:
            raise ValueError("select: 'crank' needs ranks of at least two classes; got 1. Use method='hrank'.")
        spaces = {name: np.stack(average_and_deviation(X), 1) if self.space == "2d" else X for name, X in rows.items()}
        ks = {name: k_range(points, self.k_min, self.k_max) for name, points in spaces.items()}
        notes = {name: _why_alone(context.ranks, name, X, spaces[name], ks[name]) for name, X in rows.items()}
        searched = {name: ks[name] for name, note in notes.items() if not note}
        best = self._search(spaces, searched, context.progress)

        def judged(name: str, clustering: Clustering) -> LayerWhy:
            return select_filters(
                rows[name], clustering, context.min_keep, points=spaces[name], members=self.members or "",
                medoid=self.medoid or "",
            )  # fmt: skip

        return {
            name: _whole(X, notes[name]) if notes[name] else compared([judged(name, one) for one in best[name]])
            for name, X in rows.items()
        }

    def _search(
        self, spaces: Mapping[str, FloatArray], ks: Mapping[str, range], progress: bool
    ) -> Mapping[str, Sequence[Clustering]]:
        """Return the best clustering of each layer, and then those of other seeds to compare it with."""
        options = KMeansOptions(self.seed, self.n_init, self.max_iter)
        if self.clusterer == "sklearn":
            return {name: [one] for name, one in search(spaces, ks, options, self.jobs, progress).items()}
        usual = {name: STABILITY_SEEDS if len(spaces[name]) <= STABILITY_FILTERS else 0 for name in ks}
        more = {name: count if self.stability is None else self.stability for name, count in usual.items()}
        seeds = {name: range(self.seed + 1, self.seed + 1 + count) for name, count in more.items()}
        return search_native(spaces, ks, options, seeds, progress)

    def _rows(self, R: FloatArray) -> FloatArray:
        return min_max(R) if self.scale == "class" else min_max(R.reshape(-1, 1)).reshape(R.shape)


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"select: {name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"select: {name} must be a whole number of at least 1; got {count!r}.")


def _ranked_otherwise(preset: str | None, ranks: ClassRanks | None) -> list[str]:
    """Say in what the ranks were not made as the preset's source makes them."""
    info = {} if ranks is None else ranks.info
    return [
        f"{name} is {info.get(name)!r}, and {preset} has {' or '.join(map(repr, wanted))}"
        for name, wanted in _RANKED_WITH.get(preset or "", {}).items()
        if info.get(name) not in wanted
    ]


def _why_alone(ranks: ClassRanks | None, name: str, X: FloatArray, points: FloatArray, ks: range) -> str:
    """Say why CRank leaves a layer alone; empty if it does not."""
    if ranks is not None and name in ranks.uninformative:
        return f"uninformative: {ranks.full_rank_share(name):.1%} of its ranks are full"
    rows = len(np.unique(points, axis=0))
    if rows < MIN_ROWS:
        return f"too few to cluster: {len(X)} filters, {rows} of them distinct, and at least {MIN_ROWS} are needed"
    if not ks:
        return f"no number of clusters to try from {ks.start} to {ks.stop - 1}"
    if any(np.ptp(values) == 0 for values in average_and_deviation(X)):
        return "no dividing point: AVG or STD is the same for every filter"
    return ""


def _whole(X: FloatArray, note: str) -> LayerWhy:
    """Keep a layer whole; where a rate is asked of it all the same, highest AVG and then lowest STD come first."""
    avg, std = average_and_deviation(X)
    score = places(refill(np.zeros(len(X), np.bool_), avg, std, len(X)), len(X))
    return LayerWhy(
        tuple(FilterWhy("the layer is left alone", True, score=float(score[f])) for f in range(len(X))), note
    )


def select_filters(
    X: FloatArray,
    clustering: Clustering,
    min_keep: int = 1,
    *,
    points: FloatArray | None = None,
    members: str = "region",
    medoid: str = "kept",
) -> LayerWhy:
    """Apply the regions and the silhouettes to one clustered layer (thesis algorithm 3 and section 4.3).

    Parameters
    ----------
    X
        [F, C], from :func:`min_max`.
    clustering
        The best clustering of its rows.
    min_keep
        Filters that stay at least.
    points
        What was clustered, [F, D]; by default X.
    members, medoid
        As for :class:`CRank`.
    """
    points = X if points is None else points
    labels = clustering.labels
    avg, std = average_and_deviation(X)
    avg_mean, std_mean = dividing_point(avg, std)
    where = regions(avg, std)
    centres = medoids(points, labels)
    silhouettes = silhouette_samples(points, labels)
    keep, reasons = _judge(labels, where, centres, silhouettes, members, medoid)
    for f in refill(keep, avg, std, min_keep):
        keep[f] = True
        reasons[f] = "kept to leave min_keep"
    candidates = np.isin(labels, surviving(centres, where))
    if members == "region":
        candidates &= np.array([region is BEST for region in where])
    first, back = order(keep, candidates, labels, centres, silhouettes, avg, std)
    score = places(first, len(X)) + places(back, len(X)) - OWN * ~keep
    return LayerWhy(
        tuple(
            FilterWhy(
                reasons[f], bool(keep[f]), int(labels[f]), f in centres.values(), where[f],
                float(silhouettes[f]), float(avg[f]), float(std[f]), float(score[f]),
            )
            for f in range(len(X))
        ),
        k=clustering.k, silhouette=clustering.silhouette, avg_mean=avg_mean, std_mean=std_mean,
    )  # fmt: skip


def _judge(
    labels: Labels, where: Sequence[Region], centres: Mapping[int, int], silhouettes: FloatArray, members: str,
    medoid: str,
) -> tuple[Bools, list[str]]:  # fmt: skip
    """Return which filters stay, [F], and why: the second half of thesis algorithm 3."""
    keep = np.zeros(len(labels), np.bool_)
    reasons = [f"outside {BEST}"] * len(labels)
    inside = np.array([region is BEST for region in where])
    alive = surviving(centres, where)
    for f in np.flatnonzero(~np.isin(labels, alive)).tolist():
        reasons[f] = f"its cluster's medoid lies outside {BEST}"
    for label in alive:
        mine = np.flatnonzero((labels == label) & (inside | (members == "cluster")))
        mean = mean_silhouette(silhouettes[mine])
        for f, gone in zip(mine.tolist(), redundant(silhouettes[mine]).tolist(), strict=True):
            relation = "redundant: silhouette {:.2f} above" if gone else "kept: silhouette {:.2f} not above"
            reasons[f] = f"{relation.format(silhouettes[f])} the mean {mean:.2f}"
            keep[f] = not gone
    for label in alive:
        f = centres[label] if medoid == "kept" else label
        keep[f] = True
        reasons[f] = "medoid" if medoid == "kept" else "kept as the number of a surviving cluster: the listing's bug"
    return keep, reasons


def compared(whys: Sequence[LayerWhy]) -> LayerWhy:
    """Return the first with its ``stability``: the mean overlap of what it keeps with what each of the others keeps."""
    first, *others = [frozenset(f for f, one in enumerate(why) if one.keep) for why in whys]
    overlaps = [len(first & other) / len(first | other) for other in others]
    return replace(whys[0], stability=math.fsum(overlaps) / len(overlaps)) if overlaps else whys[0]


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


def order(
    keep: Bools, candidates: Bools, labels: Labels, centres: Mapping[int, int], silhouettes: FloatArray,
    avg: FloatArray, std: FloatArray,
) -> tuple[IntArray, IntArray]:  # fmt: skip
    """Return the filters that stay, the last to go first, and the others, the first to come back first.

    Of those that stay, the medoids of surviving clusters are the last to go, then the lowest silhouettes, for they
    resemble the others least. Redundant members come back first, the lowest silhouette first; then the other members of
    surviving clusters; then cluster by cluster, that first whose medoid is nearest to the ideal of the thesis (AVG 1
    and STD 0, section 4.2), the medoid before the members. Within these, the nearest to the ideal come first, and the
    lowest index on a tie.

    Parameters
    ----------
    keep
        [F], what CRank keeps.
    candidates
        [F], the members of surviving clusters whose silhouettes were held against their mean.
    labels, centres, silhouettes, avg, std
        What it judged by.
    """
    ideal = np.round(np.hypot(1 - avg, std), 9)
    medoid = np.isin(np.arange(len(keep)), list(centres.values()))
    spread = np.round(silhouettes, 9)
    kept = np.flatnonzero(keep)
    rank = np.where(medoid & candidates, 0, np.where(candidates, 1, 2))[kept]
    first = kept[np.lexsort((np.where(rank == 1, spread[kept], ideal[kept]), rank))]
    gone = np.flatnonzero(~keep)
    survives = np.isin(labels, np.unique(labels[candidates]))[gone]
    stage = np.where(candidates[gone], 0, np.where(survives, 1, 2))
    centre = np.array([centres[label] for label in labels.tolist()])[gone]
    keys = (
        np.where(stage == 0, spread[gone], ideal[gone]),
        ~medoid[gone],
        np.where(stage == 2, centre, 0),
        np.where(stage == 2, ideal[centre], 0),
        stage,
    )
    return first, gone[np.lexsort(keys)]


def places(first: IntArray, filters: int) -> FloatArray:
    """Return [F] numbers in (1, 2) for the filters listed, descending in equal steps, and 0 for the others.

    The j-th of n gets 2 - (j + 1/2) / n, so that raising a threshold evenly takes or gives the same share of every
    layer, rounded to the nearest.
    """
    found = np.zeros(filters)
    found[first] = 2 - (np.arange(len(first)) + 0.5) / max(1, len(first))
    return found


def ease(why: LayerWhy, share: float) -> LayerWhy:
    """Return what a layer keeps once that share of what it lost has come back, in the order of :func:`order`."""
    limit = OWN - share - ROUNDING
    back = [not one.keep and (one.score or 0.0) >= limit for one in why]
    return replace(
        why,
        filters=tuple(
            replace(one, keep=True, reason=f"back at ease {share:g}; {one.reason}") if comes else one
            for one, comes in zip(why, back, strict=True)
        ),
    )
