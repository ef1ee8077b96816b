"""A data set in three parts, and how to cut one so that every class is spread in proportion."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from pyprune.datasets.labels import dataset_labels
from pyprune.types import IntArray


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set in three parts that share no image.

    ``train`` is for ranking and training, ``val`` for choosing between epochs, ``test`` for nothing but the final
    measurement. Items are (image [C, H, W] float32, label), never augmented: only ``loader(..., augment=True)`` does
    that. ``classes`` names the labels; ``shape`` is (C, H, W). Images in [0, 1] were normalised per channel as
    (x - ``mean``) / ``std``; ``normalise`` says where these come from: "imagenet", "cifar", "data" or "given".
    ``augment`` says whether training should be augmented, unless one knows better.
    """

    name: str
    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalise: str = "data"
    augment: bool = False

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return self.shape[0]


def split(
    dataset: Dataset[Any],
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    labels: Any = None,
) -> tuple[Subset[Any], ...]:
    """Cut ``dataset`` at random into parts that hold every class in the same proportion.

    Parameters
    ----------
    dataset
        Any map-style data set.
    fractions
        Share of each part; they must add up to 1. Classes are cut one by one, so sizes are right to within half
        an image per class.
    seed
        Of the draw.
    labels
        One class number per item. By default ``dataset.targets`` or ``dataset.labels``, a ``TensorDataset``'s
        second tensor, or else what ``dataset[i][1]`` says, which reads every item.

    Returns
    -------
    tuple of torch.utils.data.Subset
        One per fraction. Together they hold every item once; within each, items keep their order.

    Raises
    ------
    ValueError
        If the fractions are not positive with sum 1, the data set is empty, or there is not one label per item.
    """
    count = length("split", dataset)
    if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"split: fractions must be positive and add up to 1; got {tuple(fractions)}.")
    classes = np.asarray(dataset_labels("split", dataset) if labels is None else labels)
    if classes.shape != (count,):
        raise ValueError(f"split: needs one label for each of {count} items; got shape {list(classes.shape)}.")
    return tuple(Subset(dataset, part.tolist()) for part in stratified(classes, fractions, seed))


def drawn(who: str, parts: Sequence[IntArray], images: int | None, seed: int) -> list[IntArray]:
    """Return sorted indices into each part, ``images`` in all; parts, and classes in them, keep their shares.

    Parameters
    ----------
    who
        For messages.
    parts
        The labels of each part.
    images
        How many there are to be; ``None`` keeps all.
    seed
        Of the draw.

    Raises
    ------
    ValueError
        If there are fewer images, or more classes in the parts.
    """
    if images is None:
        return [np.arange(len(labels)) for labels in parts]
    classes = [[np.flatnonzero(labels == label) for label in np.unique(labels)] for labels in parts]
    least = np.array([len(own) for own in classes])
    sizes = np.array([len(labels) for labels in parts])
    if not least.sum() <= images <= sizes.sum():
        raise ValueError(
            f"{who}: images must be at least {least.sum()}, one for each class of each part, and at most the "
            f"{sizes.sum()} that there are; got {images}."
        )
    rng = np.random.default_rng(seed)
    chosen = []
    for own, total in zip(classes, _shares(sizes, images, least), strict=True):
        counts = _shares(np.array([len(members) for members in own]), int(total), np.ones(len(own), np.int64))
        pieces = [rng.permutation(members)[:count] for members, count in zip(own, counts, strict=True)]
        chosen.append(np.sort(np.concatenate(pieces)))
    return chosen


def _shares(sizes: IntArray, total: int, least: IntArray) -> IntArray:
    """Return whole numbers with sum ``total``, none below ``least``, as near to the shares of ``sizes`` as can be."""
    exact = sizes * (total / sizes.sum())
    counts: IntArray = np.maximum(least, exact.astype(np.int64))
    while missing := total - int(counts.sum()):
        step = 1 if missing > 0 else -1
        can = np.flatnonzero((counts < sizes) if step > 0 else (counts > least))
        furthest = can[np.argsort(step * (counts - exact)[can], kind="stable")]
        counts[furthest[: abs(missing)]] += step
    return counts


def length(who: str, dataset: Any) -> int:
    """Return the number of items of ``dataset``.

    Raises
    ------
    TypeError
        If it has no length.
    ValueError
        If it is empty.
    """
    count = len(dataset) if hasattr(dataset, "__len__") else -1
    if count < 0:
        raise TypeError(f"{who}: needs a data set with a length; got {type(dataset).__name__}.")
    if count == 0:
        raise ValueError(f"{who}: needs at least one item; the data set is empty.")
    return count


def stratified(labels: IntArray, fractions: Sequence[float], seed: int, groups: Any = None) -> list[IntArray]:
    """Return sorted indices per fraction: each class is shuffled and cut at the rounded cumulative shares.

    With ``groups`` [N] (the patient of every image, say) all items of a group go together: the groups are cut instead,
    each in the class of its first item.
    """
    if groups is not None:
        _, first, group = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
        parts_of_groups = stratified(labels[first], fractions, seed)
        return [np.flatnonzero(np.isin(group, part)) for part in parts_of_groups]
    rng = np.random.default_rng(seed)
    parts: list[list[IntArray]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = [round(share * len(members)) for share in itertools.accumulate(fractions)]
        for part, piece in zip(parts, np.split(members, ends[:-1]), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(pieces)) for pieces in parts]
