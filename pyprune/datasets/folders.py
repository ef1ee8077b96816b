"""Images in folders: one folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyprune.datasets.images import WHO, EncodedImages, Statistics, assembled, three
from pyprune.datasets.parts import Splits

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
"""Other files are ignored, and so is everything hidden."""

_PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def image_folder(
    place: str,
    *,
    seed: int = 0,
    size: int = 224,
    channels: int = 3,
    normalise: str | Statistics = "imagenet",
    images: int | None = None,
) -> Splits:
    """Open a folder of images with one sub-folder a class, or with such folders in train, val and test.

    Images are decoded when they are read: converted to colour, the short side resized to ``size``, the centre cut out.
    Where only ``val`` or only ``test`` stands beside ``train``, it is measured with, and 10 % of the training images
    are set aside for validation.

    Parameters
    ----------
    place
        The folder. Classes are numbered in the order of their names; images may lie deeper. Hidden files, other kinds
        of files, and links to folders above are ignored.
    seed
        Of the splits.
    size
        Height and width.
    channels
        3 for colour, 1 for grey.
    normalise, images
        See :func:`pyprune.data.open_data`.

    Raises
    ------
    ValueError
        If there is no such folder, no image, a class without one, or an option is out of range.
    """
    if size < 1 or channels not in (1, 3):
        raise ValueError(f"{WHO}: size must be at least 1 and channels 1 or 3; got {size} and {channels}.")
    root = Path(place)
    if not root.is_dir():
        raise ValueError(f"{WHO}: needs a folder of images; {root} is none.")
    given = {part: folder for part, names in _PARTS.items() for folder in _sub_folders(root) if folder.name in names}
    if "train" not in given or not _sub_folders(given["train"]):  # a train may be what an image shows
        given = {}
    classes = tuple(folder.name for folder in _sub_folders(given.get("train", root)))
    if len(classes) < 2:
        raise ValueError(
            f"{WHO}: needs one sub-folder a class, at least two, or train with them and val or test; "
            f"{given.get('train', root)} has {', '.join(classes[:5]) or 'none'}."
        )

    def within(folder: Path) -> EncodedImages:
        paths, labels = _listed(folder, classes)
        return EncodedImages(paths, paths, np.array(labels, np.int64), size, channels)

    found = {part: within(folder) for part, folder in (given or {"train": root}).items()}
    parts = three(found, seed, images=images)
    return assembled(f"folder:{root.name}", parts, classes, normalise, augment=True)


def _sub_folders(folder: Path) -> list[Path]:
    """Return the folders in ``folder`` by name, without hidden ones and links to where they lie themselves."""
    home = folder.resolve()
    above = {home, *home.parents}
    return sorted(
        path for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".") and not (path.is_symlink() and path.resolve() in above)
    )  # fmt: skip


def _listed(folder: Path, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the images of each class and their labels, sorted by class and path."""
    other = [path.name for path in _sub_folders(folder) if path.name not in classes]
    if other:
        raise ValueError(f"{WHO}: {folder} has a class {other[0]!r} that the training images have not.")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = sorted(
            path
            for where, folders, names in os.walk(folder / name, followlinks=False)
            for path in (str(Path(where) / file) for file in _visible(folders, names))
            if Path(path).is_file()  # no link to nowhere
        )
        if not own:
            raise ValueError(
                f"{WHO}: every class needs an image; {folder / name} has none that ends in {' '.join(ENDINGS)}."
            )
        paths += own
        labels += [label] * len(own)
    return paths, labels


def _visible(folders: list[str], names: list[str]) -> list[str]:
    """Return the images among ``names``; hidden ``folders`` are taken out, so that the walk does not enter them."""
    folders[:] = [name for name in folders if not name.startswith(".")]
    return [name for name in names if name.lower().endswith(ENDINGS) and not name.startswith(".")]
