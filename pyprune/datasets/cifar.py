"""CIFAR-10 and CIFAR-100 from their official python archives, extracted or not."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyprune import files
from pyprune.datasets.images import WHO, ImageArrays, Statistics, assembled, three, with_channels
from pyprune.datasets.parts import Splits
from pyprune.datasets.restricted import read_plain
from pyprune.types import IntArray

MAX_FILE_BYTES = 256 << 20
"""CIFAR-100's training file has 155 million bytes."""

MAX_ARCHIVE_BYTES = 1 << 30
"""Of the archive when decompressed; the official ones have 190 million."""

_FOLDER = {10: "cifar-10-batches-py", 100: "cifar-100-python"}
_TRAIN = {10: [f"data_batch_{i}" for i in range(1, 6)], 100: ["train"]}
_TEST = {10: "test_batch", 100: "test"}
_META = {10: ("batches.meta", "label_names"), 100: ("meta", "fine_label_names")}
_LABELS = {10: "labels", 100: "fine_labels"}


def cifar(
    place: str,
    classes: int,
    *,
    seed: int = 0,
    channels: int | None = None,
    normalise: str | Statistics = "cifar",
    images: int | None = None,
) -> Splits:
    """Open CIFAR-10 or CIFAR-100: the official test images, and 10 % of the training images for validation.

    Parameters
    ----------
    place
        The extracted folder, the folder that contains it, or the .tar.gz file.
    classes
        10 or 100.
    seed
        Of the validation images.
    channels
        1 for grey; 3 by default.
    normalise
        See :func:`pyprune.data.open_data`; ``"cifar"`` are this data set's usual constants.
    images
        See :func:`pyprune.data.open_data`.

    Raises
    ------
    ValueError
        If a file is missing, no CIFAR file, or hostile. Nothing in it is executed: see
        :mod:`pyprune.datasets.restricted`.
    """
    meta, key = _META[classes]
    names = [*_TRAIN[classes], _TEST[classes], meta]
    path = Path(place)
    found = _from_archive(path, names) if path.is_file() else _from_folder(path, _FOLDER[classes], names)
    label_names = _label_names(*found.pop(meta), key, classes)
    parts = {name: _images_labels(*found.pop(name), classes) for name in names[:-1]}
    train = [parts[name] for name in _TRAIN[classes]]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    whole, test = (
        ImageArrays(with_channels(torch.from_numpy(own), channels), classes_of)
        for own, classes_of in ((pixels, labels), map(np.array, parts[_TEST[classes]]))  # a copy can be written to
    )
    name = f"cifar{classes}"
    split = three({"train": whole, "test": test}, seed, images=images)
    return assembled(name, split, label_names, normalise, cifar=name, augment=True)


def _from_folder(path: Path, inner: str, names: Iterable[str]) -> dict[str, tuple[bytes, str]]:
    """Return the content and the place of each file in the extracted folder, or in the one that contains it."""
    names = list(names)
    folder = path / inner if (path / inner).is_dir() else path
    if not (folder / names[0]).is_file():
        raise ValueError(
            f"{WHO}: needs the folder {inner} of the official python archive, with {names[0]} in it, or its .tar.gz; "
            f"{path} is neither."
        )
    return {name: (files.read_bytes(WHO, folder / name, MAX_FILE_BYTES), str(folder / name)) for name in names}


def _from_archive(path: Path, names: Iterable[str]) -> dict[str, tuple[bytes, str]]:
    """Return the same from the .tar.gz file; it is read as a stream, and nothing is written to the disk."""
    wanted, found = set(names), {}
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(files.read_bytes(WHO, path, MAX_ARCHIVE_BYTES))) as unpacked:
            stream: Any = _Bounded(unpacked, MAX_ARCHIVE_BYTES)
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    name = member.name.rpartition("/")[2]
                    if not member.isreg() or name not in wanted:
                        continue
                    if member.size > MAX_FILE_BYTES:
                        raise ValueError(f"{WHO}: {path} holds {member.size} bytes as {name}; that is no CIFAR file.")
                    content = archive.extractfile(member)
                    found[name] = (content.read() if content else b"", f"{path} ({member.name})")
    except (tarfile.TarError, zlib.error, EOFError, OSError, OverflowError) as error:
        raise ValueError(f"{WHO}: {path} is not a .tar.gz file that can be read ({error}).") from None
    missing = wanted - found.keys()
    if missing:
        raise ValueError(f"{WHO}: {path} must be the official python archive; it has no {sorted(missing)[0]}.")
    return found


class _Bounded:
    """A stream that ends with an error once more than ``left`` bytes have been read."""

    def __init__(self, stream: gzip.GzipFile, left: int) -> None:
        self.stream, self.left = stream, left

    def read(self, size: int) -> bytes:
        content = self.stream.read(min(size, self.left + 1))
        self.left -= len(content)
        if self.left < 0:
            raise ValueError(f"{WHO}: the archive holds more than {MAX_ARCHIVE_BYTES} bytes; that is no CIFAR archive.")
        return content


def _plain_dict(data: bytes, source: str) -> dict[str, Any]:
    try:
        content = read_plain(data)
    except ValueError as error:
        raise ValueError(f"{WHO}: {source} is no CIFAR file that can be trusted: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{WHO}: {source} must hold a dict; got {type(content).__name__}.")
    return {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}


def _images_labels(data: bytes, source: str, classes: int) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], IntArray]:
    """Return images [N, 3, 32, 32] uint8 and labels [N] of one file."""
    content = _plain_dict(data, source)
    images, labels = content.get("data"), content.get(_LABELS[classes])
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (3072,) or not len(images):
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"{WHO}: {source} must have data of uint8 [N, 3072]; got {got}.")
    if not isinstance(labels, list) or len(labels) != len(images) or not all(type(one) is int for one in labels):
        got = f"{len(labels)}" if isinstance(labels, list) else type(labels).__name__
        raise ValueError(f"{WHO}: {source} must have {len(images)} whole numbers as {_LABELS[classes]}; got {got}.")
    if min(labels) < 0 or max(labels) >= classes:
        bad = min(labels) if min(labels) < 0 else max(labels)
        raise ValueError(f"{WHO}: the labels of {source} must be in [0, {classes}); got {str(bad)[:20]}.")
    return images.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def _label_names(data: bytes, source: str, key: str, classes: int) -> tuple[str, ...]:
    names = _plain_dict(data, source).get(key)
    texts = (
        [one.decode("latin1") if isinstance(one, bytes) else one for one in names] if isinstance(names, list) else []
    )
    if len(texts) != classes or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{WHO}: {source} must name {classes} classes as {key}; it names {len(texts)}.")
    return tuple(texts)
