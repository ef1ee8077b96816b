"""Which images are ranked: a balanced sample, cut into fixed micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from pyprune.datasets.labels import dataset_labels, integer_labels
from pyprune.datasets.loading import unaugmented
from pyprune.types import IntArray

WHO = "rank_filters"


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A few images of the sample: the unit of work and of restart.

    ``images`` [N, ...] is ``None`` where the caller asked to skip it; ``labels`` [N] are their classes and ``ids`` [N]
    their positions in the data set or in the stream.
    """

    images: torch.Tensor | None
    labels: IntArray
    ids: IntArray


class Sample(Protocol):
    """A balanced sample: ``micro_batch`` images at a time, ``images`` in all (``None``: known only at its end)."""

    micro_batch: int
    images: int | None

    def batches(self, skip: int = 0) -> Iterator[MicroBatch]:
        """Yield the micro-batches in their fixed order; the first ``skip`` of them without images."""


def draw_sample(
    loader: Iterable[Any], images_per_class: int, num_classes: int | None, seed: int, progress: bool = True
) -> Sample:
    """Choose ``images_per_class`` images of every class.

    From a ``DataLoader`` over a data set with a length they are drawn without replacement, each class by a random
    stream of its own, so a class's draw depends on ``seed`` and its own images alone. From any other iterable of
    (images, labels) batches they are the first of each class.

    Parameters
    ----------
    loader
        A ``DataLoader``, or anything that yields (images, labels).
    images_per_class
        Images per class.
    num_classes
        Number of classes; ``None`` for the largest label plus one.
    seed
        Of the draw.
    progress
        Whether a pass over a data set that does not tell its labels shows a bar.

    Raises
    ------
    ValueError
        If a class has too few images or a label lies outside [0, num_classes). Of a stream, that is known at its end.
    TypeError
        If ``loader`` cannot be iterated over.
    """
    for name, value in (("images_per_class", images_per_class), ("num_classes", num_classes)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{WHO}: {name} must be a whole number of at least 1; got {value!r}.")
    if isinstance(loader, DataLoader) and loader.batch_size is not None and hasattr(loader.dataset, "__len__"):
        if not isinstance(loader.dataset, IterableDataset):
            return _Drawn(loader, images_per_class, num_classes, seed, progress)
    elif not isinstance(loader, Iterable):
        raise TypeError(f"{WHO}: needs a DataLoader or an iterable of (images, labels); got {type(loader).__name__}.")
    return _Streamed(loader, images_per_class, num_classes)


class _Drawn:
    """A seeded draw from a data set with a length, read in ascending order, which disks like."""

    def __init__(
        self, loader: DataLoader[Any], images_per_class: int, num_classes: int | None, seed: int, progress: bool
    ) -> None:
        self.dataset = unaugmented(loader.dataset)
        allowed = getattr(loader.sampler, "indices", None)  # a SubsetRandomSampler splits one data set by its indices
        candidates = np.arange(len(self.dataset)) if allowed is None else np.sort(np.asarray(allowed, np.int64))  # type: ignore[arg-type]  # draw_sample saw its length
        labels = dataset_labels(WHO, self.dataset, progress)
        self.ids = _balanced(labels, candidates, images_per_class, num_classes, seed)
        self.labels = labels[self.ids]
        self.loader = loader
        self.micro_batch = int(loader.batch_size or 1)
        self.images: int | None = len(self.ids)

    def batches(self, skip: int = 0) -> Iterator[MicroBatch]:
        cuts = range(self.micro_batch, len(self.ids), self.micro_batch)
        parts = list(zip(np.split(self.ids, cuts), np.split(self.labels, cuts), strict=True))
        for ids, labels in parts[:skip]:
            yield MicroBatch(None, labels, ids)
        for (ids, labels), batch in zip(parts[skip:], self._read([ids for ids, _ in parts[skip:]]), strict=True):
            images, seen = _images_labels(batch)
            if not np.array_equal(seen, labels):
                raise ValueError(
                    f"{WHO}: the data set's listed labels and its items disagree, first in the batch of item {ids[0]}. "
                    "Correct its targets or labels."
                )
            yield MicroBatch(images, labels, ids)

    def _read(self, parts: list[IntArray]) -> DataLoader[Any]:
        """Return a loader like the caller's that reads exactly ``parts``."""
        loader = self.loader
        return DataLoader(
            self.dataset, batch_sampler=[part.tolist() for part in parts], collate_fn=loader.collate_fn,
            num_workers=loader.num_workers, pin_memory=loader.pin_memory, timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn, multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator(),  # else every pass would draw from the caller's random stream
        )  # fmt: skip


class _Streamed:
    """The first images of each class of a stream, cut anew into micro-batches as long as the stream's first batch."""

    def __init__(self, stream: Iterable[Any], images_per_class: int, num_classes: int | None) -> None:
        self.stream = stream
        self.images_per_class = images_per_class
        self.num_classes = num_classes
        self.images: int | None = None if num_classes is None else images_per_class * num_classes
        self.micro_batch = 0  # until the first batch is seen

    def batches(self, skip: int = 0) -> Iterator[MicroBatch]:
        pending: list[tuple[torch.Tensor, int, int]] = []
        done = 0
        for image, label, position in self._chosen():
            pending.append((image, label, position))
            if len(pending) == self.micro_batch:
                yield _assemble(pending, done >= skip)
                pending = []
                done += 1
        if pending:
            yield _assemble(pending, done >= skip)

    def _chosen(self) -> Iterator[tuple[torch.Tensor, int, int]]:
        """Yield (image, label, position) of the first images of each class; stop once every class has enough."""
        counts = np.zeros(self.num_classes or 0, np.int64)
        position = 0
        for batch in self.stream:
            images, labels = _images_labels(batch)
            _check_range(labels, self.num_classes)
            self.micro_batch = self.micro_batch or len(labels)
            counts = np.pad(counts, (0, max(0, int(labels.max(initial=-1)) + 1 - len(counts))))
            for row, label in enumerate(labels.tolist()):
                if counts[label] < self.images_per_class:
                    counts[label] += 1
                    yield images[row].clone(), label, position + row  # a view would keep the whole batch alive
            position += len(labels)
            if self.num_classes is not None and (counts >= self.images_per_class).all():
                return
        _check_counts(counts, self.images_per_class)


def _assemble(pending: list[tuple[torch.Tensor, int, int]], read: bool) -> MicroBatch:
    images, labels, ids = zip(*pending, strict=True)
    return MicroBatch(torch.stack(images) if read else None, np.array(labels, np.int64), np.array(ids, np.int64))


def _balanced(
    labels: IntArray, candidates: IntArray, images_per_class: int, num_classes: int | None, seed: int
) -> IntArray:
    """Draw ``images_per_class`` of the ``candidates`` of each class; return their ids in ascending order."""
    _check_range(labels[candidates], num_classes)
    members = labels[candidates]
    counts = np.bincount(members, minlength=num_classes or 0)
    _check_counts(counts, images_per_class)
    draws = [
        np.random.default_rng([seed, label]).choice(candidates[members == label], images_per_class, replace=False)
        for label in range(len(counts))
    ]
    return np.sort(np.concatenate(draws))


def _check_range(labels: IntArray, num_classes: int | None) -> None:
    """Raise ``ValueError`` for a label outside [0, num_classes)."""
    bad = labels[(labels < 0) | (labels >= (num_classes or np.inf))]
    if len(bad):
        limit = num_classes or "the number of classes"
        raise ValueError(f"{WHO}: labels must be in [0, {limit}); got {bad[0]}. Correct the labels or num_classes.")


def _check_counts(counts: IntArray, images_per_class: int) -> None:
    """Raise ``ValueError`` for a class with fewer images than asked for."""
    short = np.flatnonzero(counts < images_per_class)
    if len(short) or not len(counts):
        which = f"class {short[0]} has {counts[short[0]]}" if len(short) else "there is none at all"
        more = f" (and {len(short) - 1} more classes are short)" if len(short) > 1 else ""
        raise ValueError(
            f"{WHO}: needs {images_per_class} images of every class; {which}{more}. "
            "Lower images_per_class, add images, or correct num_classes."
        )


def _images_labels(batch: Any) -> tuple[torch.Tensor, IntArray]:
    """Return images [N, ...] and labels [N] of one batch after checking what it is."""
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise TypeError(f"{WHO}: every batch must be (images, labels); got {type(batch).__name__}.")
    images = torch.as_tensor(batch[0])
    labels = integer_labels(WHO, batch[1])
    if images.ndim < 1 or len(images) != len(labels):
        raise ValueError(f"{WHO}: needs one label per image; got {len(labels)} labels for shape {list(images.shape)}.")
    return images, labels
