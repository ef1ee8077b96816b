"""Loaders: whole batches at a time, in an order that a seed fixes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from pyprune.datasets.images import EncodedImages, Images
from pyprune.datasets.labels import dataset_labels
from pyprune.datasets.parts import length
from pyprune.types import IntArray


def loader(
    dataset: Dataset[Any],
    batch_size: int = 128,
    shuffle: bool = False,
    seed: int = 0,
    *,
    augment: bool = False,
    workers: int | None = None,
) -> DataLoader[Any]:
    """Return a loader of (images, labels) whose order depends on ``seed`` alone.

    Images in memory are gathered, augmented and normalised a batch at a time in this process: that takes about a
    millisecond, and less than handing them over. With ``shuffle``, meant for training, a last batch of one image is
    left out, since batch norms cannot train on it.

    Parameters
    ----------
    dataset
        Any map-style data set.
    batch_size
        Images per batch; 128 as in the thesis.
    shuffle
        Whether every pass has an order of its own.
    seed
        Of the order and the augmentation.
    augment
        Whether images are changed at random, as their data set does it (see docs/data.md). The changes follow from
        ``seed`` and the batch's own items, so they are other ones in every pass of a shuffled loader, and the same
        ones in a run that was broken off and continued, whatever the number of workers.
    workers
        Processes that decode; by default one for each usable core where images are decoded, and none where they are in
        memory.

    Raises
    ------
    ValueError
        If ``batch_size`` is below 1, the data set is empty, or ``augment`` is asked for without ``shuffle`` or of a
        data set that knows no augmentation.
    """
    count = length("loader", dataset)
    if batch_size < 1:
        raise ValueError(f"loader: batch_size must be at least 1; got {batch_size}.")
    base = _base(dataset)
    if augment and not isinstance(base, Images):
        raise ValueError(
            f"loader: augment needs images that open_data opened, other than digits; got {type(base).__name__}. "
            "Augment in the data set's own items."
        )
    if augment and not shuffle:
        raise ValueError("loader: augment is for training; pass shuffle=True with it.")
    if workers is None:
        workers = _usable_cores() if isinstance(base, EncodedImages) else 0
    batched = isinstance(base, Images) or (type(base) is TensorDataset and len(base.tensors) == 2)
    lonely = shuffle and count > 1 and batch_size > 1 and count % batch_size == 1
    items = _Batches(dataset, seed if augment else None) if batched else dataset
    # The sampler's generator is its own: a loader draws from the other one whenever it starts workers.
    order, other = (torch.Generator().manual_seed(seed) for _ in range(2))
    return DataLoader(
        items, batch_size, sampler=RandomSampler(items, generator=order) if shuffle else None, generator=other,  # type: ignore[arg-type]  # items have a length
        drop_last=lonely, collate_fn=_as_it_is if batched else None,
        num_workers=workers, persistent_workers=workers > 0,
    )  # fmt: skip


def unaugmented(dataset: Dataset[Any]) -> Dataset[Any]:
    """Return ``dataset`` without the augmentation that :func:`loader` gave it."""
    return _Batches(dataset.dataset, None) if isinstance(dataset, _Batches) else dataset


class _Batches(Dataset[Any]):
    """A data set that makes whole batches; only for loaders whose collate function takes them as they are."""

    def __init__(self, dataset: Dataset[Any], seed: int | None) -> None:
        self.dataset, self.seed = dataset, seed
        self._base, self._rows = dataset, np.arange(len(dataset))  # type: ignore[arg-type]  # loader saw its length
        while isinstance(self._base, Subset):
            self._rows = np.asarray(self._base.indices, np.int64)[self._rows]
            self._base = self._base.dataset

    @property
    def labels(self) -> IntArray:
        return dataset_labels("loader", self.dataset)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Any:
        return self.dataset[i]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        rows = self._rows[np.asarray(indices, np.int64)]
        if isinstance(self._base, Images):
            return self._base.batch(rows, None if self.seed is None else _batch_seed(self.seed, rows))
        return tuple(tensor[torch.from_numpy(rows)] for tensor in self._base.tensors)  # type: ignore[attr-defined]


def _batch_seed(seed: int, rows: IntArray) -> int:
    """Return a seed that follows from the batch's own items, so that no worker and no restart can change it."""
    return int.from_bytes(hashlib.sha256(np.append(seed, rows).astype("<i8").tobytes()).digest()[:7], "little")


def _as_it_is(batch: Any) -> Any:
    return batch


def _base(dataset: Dataset[Any]) -> Dataset[Any]:
    """Return what ``dataset`` is a part of."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return dataset


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
