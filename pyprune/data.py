"""Data sets by name, seeded stratified splits, and loaders."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from pyprune.datasets.cifar import cifar
from pyprune.datasets.embedded import digits as digits
from pyprune.datasets.folders import image_folder
from pyprune.datasets.images import Statistics
from pyprune.datasets.loading import loader as loader
from pyprune.datasets.npz import npz_file
from pyprune.datasets.parts import Splits as Splits
from pyprune.datasets.parts import split as split

__all__ = ["KNOWN", "Splits", "digits", "loader", "open_data", "split"]

KNOWN = ("digits", "cifar10:DIR", "cifar100:DIR", "folder:DIR", "npz:FILE")
"""What :func:`open_data` opens."""

_OPENERS: dict[str, Callable[..., Splits]] = {
    "digits": lambda _place, **options: digits(**options),
    "cifar10": lambda place, **options: cifar(place, 10, **options),
    "cifar100": lambda place, **options: cifar(place, 100, **options),
    "folder": image_folder,
    "npz": npz_file,
}
_OPTIONS = {
    "digits": ("size", "images"), "cifar10": ("channels", "normalise", "images"),
    "cifar100": ("channels", "normalise", "images"), "folder": ("size", "channels", "normalise", "images"),
    "npz": ("size", "channels", "normalise", "images"),
}  # fmt: skip


def open_data(
    spec: str,
    *,
    seed: int = 0,
    size: int | None = None,
    channels: int | None = None,
    normalise: str | Statistics | None = None,
    images: int | None = None,
    augment: bool | None = None,
) -> Splits:
    """Open the data set that ``spec`` names.

    Nothing is downloaded, and nothing that a file holds is executed.

    Parameters
    ----------
    spec
        ``"digits"``: the handwritten digits of scikit-learn, embedded. ``"cifar10:PLACE"``, ``"cifar100:PLACE"``: the
        official python archive, as .tar.gz or extracted. ``"folder:DIR"``: images, one folder a class. ``"npz:FILE"``
        or ``"npz:TRAIN,TEST"``: arrays. docs/data.md says what each expects.
    seed
        Of the splits.
    size
        Height and width after resizing; for digits (16), folders (224) and encoded images in .npz files.
    channels
        1 for grey, 3 for colour; by default as stored, and 3 for folders and encoded images.
    normalise
        Per-channel mean and standard deviation: ``"imagenet"``, ``"cifar"``, ``"data"`` (of the training images),
        numbers as ``"0.5,0.5,0.5/0.2,0.2,0.2"``, or a pair of sequences. By default ``"cifar"`` for CIFAR,
        ``"imagenet"`` for folders, and ``"data"`` for the others.
    images
        How many to draw with ``seed`` for the three parts together; every class of every part keeps its share. By
        default all.
    augment
        What ``Splits.augment`` is to say, instead of what is usual for the kind of data.

    Returns
    -------
    Splits
        In three parts, none of them augmented; see :func:`loader`.

    Raises
    ------
    ValueError
        If there is no such data set, the files are missing, broken or hostile, an option does not apply, or ``images``
        is more than there are or too few for one of each class and part.
    """
    kind, _, place = spec.partition(":")
    if kind not in _OPENERS or bool(place) != (kind != "digits"):
        near = [known for known in KNOWN if known.partition(":")[0] in difflib.get_close_matches(kind, _OPENERS, n=1)]
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"open_data: the data must be one of {', '.join(KNOWN)}; got {spec!r}.{hint}")
    if augment and kind == "digits":
        raise ValueError("open_data: digits are not augmented; leave augment out.")
    options = {"size": size, "channels": channels, "normalise": normalise, "images": images}
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in _OPTIONS[kind]:
            raise ValueError(f"open_data: {kind} takes no {name}; leave it out.")
    splits = _OPENERS[kind](place, seed=seed, **given)
    return splits if augment is None else replace(splits, augment=augment)
