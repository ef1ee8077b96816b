"""The class of every item of a data set, from the cheapest source."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from pyprune.progress import track
from pyprune.types import IntArray


def integer_labels(who: str, labels: Any) -> IntArray:
    """Return ``labels`` as int64 [N] on the host.

    Raises
    ------
    TypeError
        If they are not whole numbers.
    ValueError
        If they are not one flat list.
    """
    given = np.asarray(labels.detach().cpu() if isinstance(labels, torch.Tensor) else labels)
    if given.size and (given.dtype == np.bool_ or not np.issubdtype(given.dtype, np.integer)):
        raise TypeError(f"{who}: labels must be whole numbers; got {given.dtype}. Pass class indices.")
    if given.ndim != 1:
        raise ValueError(f"{who}: labels must be [N], one class index per image; got shape {list(given.shape)}.")
    return given.astype(np.int64)


def dataset_labels(who: str, dataset: Dataset[Any], progress: bool = False) -> IntArray:
    """Return the label of every item: from the data set's own list where it has one, else by reading every item.

    The list is ``targets`` or ``labels``, or a ``TensorDataset``'s second tensor, also through ``Subset``. It is not
    used where a ``target_transform`` changes what the items say.

    Raises
    ------
    TypeError
        If the items are not (image, label).
    """
    listed = _listed_labels(who, dataset)
    if listed is not None:
        return listed
    count = len(dataset)  # type: ignore[arg-type]  # the callers saw its length
    items = track(range(count), "Reading labels", show=progress)
    return integer_labels(who, [_item_label(who, dataset[i]) for i in items])


def _listed_labels(who: str, dataset: Dataset[Any]) -> IntArray | None:
    """Return the labels that ``dataset`` lists without reading its items, or ``None``."""
    if isinstance(dataset, Subset):
        whole = _listed_labels(who, dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices, np.int64)]
    if getattr(dataset, "target_transform", None) is not None:
        return None  # its items' labels are not the listed ones
    listed = getattr(dataset, "targets", None)
    listed = getattr(dataset, "labels", None) if listed is None else listed
    if listed is None and isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        listed = dataset.tensors[1]
    try:
        labels = None if listed is None else integer_labels(who, listed)
    except (TypeError, ValueError):
        return None
    return labels if labels is not None and len(labels) == len(dataset) else None  # type: ignore[arg-type]  # has one


def _item_label(who: str, item: Any) -> int:
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise TypeError(f"{who}: every item of the data set must be (image, label); got {type(item).__name__}.")
    return int(item[1])
