"""Data: the embedded handwritten digits, seeded stratified splits, and loaders."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from pyprune.types import IntArray

KNOWN = ("digits",)


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set in three parts that share no image.

    ``train`` is for ranking and training, ``val`` for choosing between epochs, ``test`` for nothing but the final
    measurement. Items are (image [C, H, W] float32, label); ``classes`` names the labels; ``shape`` is (C, H, W).
    Images were normalised per channel as (x - ``mean``) / ``std``, statistics of the training images in [0, 1].
    """

    name: str
    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def channels(self) -> int:
        """Number of channels of an image."""
        return self.shape[0]


def digits(*, size: int = 16, seed: int = 0) -> Splits:
    """Return scikit-learn's handwritten digits: 1,797 real scans of 8x8 pixels, ten classes, no download.

    They are resized bilinearly, split by class into about 1,200 training, 297 validation and 300 test images, and
    normalised with the training images' mean and standard deviation.

    Parameters
    ----------
    size
        Height and width after resizing; 16 leaves room for three pools.
    seed
        Of the split.

    Raises
    ------
    ValueError
        If ``size`` is below 1.

    References
    ----------
    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    if size < 1:
        raise ValueError(f"digits: size must be at least 1; got {size}.")
    raw = load_digits()
    images = torch.from_numpy(raw.images).float()[:, None] / 16  # 16 grey levels above black
    images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(raw.target).long()
    parts = _stratified(labels.numpy(), (1200 / 1797, 297 / 1797, 300 / 1797), seed)
    std, mean = (float(value) for value in torch.std_mean(images[parts[0]].double()))
    images = (images - mean) / std
    train, val, test = (TensorDataset(images[part], labels[part]) for part in parts)
    classes = tuple(str(name) for name in raw.target_names)
    return Splits("digits", train, val, test, classes, (1, size, size), (mean,), (std,))


def open_data(spec: str, *, seed: int = 0) -> Splits:
    """Return the data set that ``spec`` names; today that is ``"digits"``.

    Raises
    ------
    ValueError
        If there is no such data set.
    """
    if spec == "digits":
        return digits(seed=seed)
    raise ValueError(f"open_data: the data must be one of {', '.join(KNOWN)}; got {spec!r}.")


def loader(dataset: Dataset[Any], batch_size: int = 128, shuffle: bool = False, seed: int = 0) -> DataLoader[Any]:
    """Return a loader of (images, labels) whose order depends on ``seed`` alone.

    Batches are made in this process: for images in memory that is faster than handing them over. With
    ``shuffle``, meant for training, a last batch of one image is left out, since batch norms cannot train on it.

    Parameters
    ----------
    dataset
        Any map-style data set.
    batch_size
        Images per batch; 128 as in the thesis.
    shuffle
        Whether every pass has an order of its own.
    seed
        Of the order.

    Raises
    ------
    ValueError
        If ``batch_size`` is below 1 or the data set is empty.
    """
    count = _length("loader", dataset)
    if batch_size < 1:
        raise ValueError(f"loader: batch_size must be at least 1; got {batch_size}.")
    lonely = shuffle and count > 1 and batch_size > 1 and count % batch_size == 1
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle=shuffle, generator=generator, drop_last=lonely)


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
    count = _length("split", dataset)
    if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"split: fractions must be positive and add up to 1; got {tuple(fractions)}.")
    classes = np.asarray(_labels(dataset, count) if labels is None else labels)
    if classes.shape != (count,):
        raise ValueError(f"split: needs one label for each of {count} items; got shape {list(classes.shape)}.")
    return tuple(Subset(dataset, part.tolist()) for part in _stratified(classes, fractions, seed))


def _length(who: str, dataset: Any) -> int:
    count = len(dataset) if hasattr(dataset, "__len__") else -1
    if count < 0:
        raise TypeError(f"{who}: needs a data set with a length; got {type(dataset).__name__}.")
    if count == 0:
        raise ValueError(f"{who}: needs at least one item; the data set is empty.")
    return count


def _labels(dataset: Any, count: int) -> Any:
    for attribute in ("targets", "labels"):
        if hasattr(dataset, attribute):
            return getattr(dataset, attribute)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        return dataset.tensors[1]
    return [int(dataset[i][1]) for i in range(count)]


def _stratified(labels: IntArray, fractions: Sequence[float], seed: int) -> list[IntArray]:
    """Return sorted indices per fraction: each class is shuffled and cut at the rounded cumulative shares."""
    rng = np.random.default_rng(seed)
    parts: list[list[IntArray]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = [round(share * len(members)) for share in itertools.accumulate(fractions)]
        for part, piece in zip(parts, np.split(members, ends[:-1]), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(pieces)) for pieces in parts]
