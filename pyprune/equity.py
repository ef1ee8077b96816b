"""Fairness of pruning: what it does to each class and group, before and after (thesis sections 3.1.4 and 5.1.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

from pyprune.types import Correlation, Evaluation, Excess, Fairness, FloatArray, IntArray


def fairness(before: Evaluation, after: Evaluation) -> Fairness:
    """Compare what two networks do to each class, the original and the pruned one.

    Parameters
    ----------
    before, after
        From :func:`pyprune.evaluate`, on the same images; with ``attributes=`` there, groups other than classes are
        compared as well.

    Returns
    -------
    Fairness
        Equalised opportunity and odds with both ranges, correlations with their p, and excessive losses. Classes
        without images are left out; ``classes`` names those that are not.

    Raises
    ------
    TypeError
        If either is no Evaluation.
    ValueError
        If they are of different images, or fewer than two classes have any.

    Notes
    -----
    Equations 5.1 to 5.6 of the thesis for the measures, 3.13 to 3.15 for the excessive loss. The thesis takes 2K and
    4K as the ranges of EOpp and EOdd for K classes; no network can reach more than K and 2K, which the verdicts go by.

    Examples
    --------
    >>> import numpy as np
    >>> from pyprune import Evaluation
    >>> before = Evaluation(np.array([[9, 1], [2, 8]]), 0.3, None, None)
    >>> after = Evaluation(np.array([[9, 1], [5, 5]]), 0.6, None, None)
    >>> result = fairness(before, after)
    >>> round(result.eopp1, 3), result.errors.between
    (0.3, ('0', '1'))
    """
    for one in (before, after):
        if not isinstance(one, Evaluation):
            raise TypeError(f"fairness: needs two results of pyprune.evaluate; got {type(one).__name__}.")
    counts = _same_images(before, after)
    classes = np.flatnonzero((counts > 0) & (counts < counts.sum()))
    if len(classes) < 2:
        raise ValueError(f"fairness: needs images of at least two classes; got those of {len(np.flatnonzero(counts))}.")
    old, new = rates(before.confusion)[classes], rates(after.confusion)[classes]
    images = {str(c): int(counts[c]) for c in classes}
    losses = None
    if before.class_loss is not None and after.class_loss is not None:
        losses = excess(images, before.class_loss[classes], after.class_loss[classes])
    return Fairness(
        before=old,
        after=new,
        classes=tuple(classes.tolist()),
        **equality(old, new),
        pearson=correlation(pearsonr, old[:, 0], new[:, 0]),
        spearman=correlation(spearmanr, old[:, 0], new[:, 0]),
        errors=excess(images, 1 - old[:, 0], 1 - new[:, 0]),
        losses=losses,
        groups=_groups(before, after),
        auc=(before.auc, after.auc),
    )


def _same_images(before: Evaluation, after: Evaluation) -> IntArray:
    """Return [C] how many images each class has, which must be the same in both."""
    if before.confusion.shape != after.confusion.shape:
        raise ValueError(
            f"fairness: both must have the same classes; got {len(before.confusion)} and {len(after.confusion)}."
        )
    one, other = before.confusion.sum(axis=1), after.confusion.sum(axis=1)
    if (different := np.flatnonzero(one != other)).size:
        c = int(different[0])
        raise ValueError(
            f"fairness: both must be measured on the same images; class {c} has {one[c]} and {other[c]}. "
            "Evaluate both networks with one loader."
        )
    counts: IntArray = one.astype(np.int64)
    return counts


def rates(confusion: IntArray) -> FloatArray:
    """Return TPR, TNR and FPR of every class against the rest, [C, 3] (eq. 5.1, 5.2 and 5.5); NaN where undefined."""
    total, hits = confusion.sum(), np.diagonal(confusion)
    positive, called = confusion.sum(axis=1), confusion.sum(axis=0)
    negative = total - positive
    false = called - hits
    with np.errstate(invalid="ignore"):
        found: FloatArray = np.stack([hits / positive, (negative - false) / negative, false / negative], axis=1)
    return found


def equality(before: FloatArray, after: FloatArray) -> dict[str, float]:
    """Return EOpp0, EOpp1 and EOdd in both forms (eq. 5.3, 5.4 and 5.6) from TPR, TNR and FPR, [K, 3] each."""
    tpr, tnr, fpr = (after - before).T
    return {
        "eopp0": float(np.abs(tnr).sum()),
        "eopp1": float(np.abs(tpr).sum()),
        "eodd": float(np.abs(tpr + fpr).sum()),
        "eodd_separate": float((np.abs(tpr) + np.abs(fpr)).sum()),
    }


def correlation(measure: Any, one: FloatArray, other: FloatArray) -> Correlation:
    """Return what scipy's ``measure`` says of two columns; nothing where one is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return Correlation(None, None)
    found = measure(one, other)
    return Correlation(float(found.statistic), None if np.isnan(found.pvalue) else float(found.pvalue))


def excess(
    images: Mapping[str, int], before: Sequence[float] | FloatArray, after: Sequence[float] | FloatArray
) -> Excess:
    """Return R(a) of every group and the largest difference between two (eq. 3.14 and 3.15)."""
    losses = {name: float(new - old) for name, old, new in zip(images, before, after, strict=True)}
    better, worse = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    return Excess(losses, losses[worse] - losses[better], (better, worse), dict(images))


def _groups(before: Evaluation, after: Evaluation) -> dict[str, Excess]:
    """Return the excessive losses for every attribute that was measured both times."""
    found = {}
    for name in before.groups.keys() & after.groups.keys():
        old, new = before.groups[name], after.groups[name]
        images = {group: score.images for group, score in old.items()}
        if images != {group: score.images for group, score in new.items()}:
            raise ValueError(f"fairness: both must be measured on the same images; the groups of {name!r} differ.")
        found[name] = excess(images, [one.loss for one in old.values()], [new[group].loss for group in old])
    return dict(sorted(found.items()))
