"""Images in .npz files: as arrays, or as encoded files one after the other."""

from __future__ import annotations

import io
import itertools
import math
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from pyprune import files
from pyprune.datasets.images import (
    WHO,
    EncodedImages,
    ImageArrays,
    Images,
    Statistics,
    assembled,
    open_image,
    three,
    with_channels,
)
from pyprune.datasets.labels import integer_labels
from pyprune.datasets.parts import Splits
from pyprune.types import IntArray

Arrays = Mapping[str, np.ndarray[Any, Any]]

MAX_BYTES = 4 << 30
"""Of all arrays together: a few megabytes can claim to be gigabytes."""

IN_MEMORY_BYTES = 256 << 20
"""Encoded images that decode to less are decoded once; others whenever they are read."""

MAX_CLASSES = 1 << 16
"""More need names: one stray label must not make a network of so many outputs."""

_SPLIT = {"train": 0, "test": 1, "val": 2}
_KEYS = {
    "images", "labels", "jpeg", "offsets", "split", "patients", "classes", "class_names",
    *(f"{letter}_{part}" for letter in "xy" for part in _SPLIT),
}  # fmt: skip


def npz_file(
    place: str,
    *,
    seed: int = 0,
    size: int | None = None,
    channels: int | None = None,
    normalise: str | Statistics = "data",
    images: int | None = None,
) -> Splits:
    """Open images in one .npz file, or in two: training and test.

    It holds ``images`` and ``labels``; or ``x_train``, ``y_train``, ``x_test``, ``y_test`` (and ``x_val``, ``y_val``);
    or ``jpeg``, ``offsets`` and ``labels``: encoded image i is ``jpeg[offsets[i] : offsets[i + 1]]``. ``split`` says
    which of the images are for training (0), test (1) or validation (2); ``patients`` whose they are, and those of one
    patient stay together; ``classes`` or ``class_names`` names the labels. Parts that are
    missing are set aside at random.

    Parameters
    ----------
    place
        The file, or two with a comma between.
    seed
        Of the splits.
    size
        Height and width of encoded images; by default the short side of the first.
    channels
        1 for grey, 3 for colour; by default as stored, and 3 where images are encoded.
    normalise, images
        See :func:`pyprune.data.open_data`; encoded images that are not drawn are not decoded.

    Raises
    ------
    ValueError
        If a file is missing, broken, holds Python objects, claims sizes that it does not have, or lacks an array.
    """
    if (size is not None and size < 1) or channels not in (None, 1, 3):
        raise ValueError(f"{WHO}: size must be at least 1 and channels 1 or 3; got {size} and {channels}.")
    paths = [Path(part) for part in place.split(",")]
    if len(paths) > 2:
        raise ValueError(f"{WHO}: npz takes one file, or two as TRAIN,TEST; got {len(paths)}.")
    opened = [(_read(path), str(path)) for path in paths]
    parts, groups = _parts(*opened[0], size, channels)
    for arrays, name in opened[1:]:
        whole = _whole(arrays, name, size or parts["train"].shape[1], channels or parts["train"].shape[0])
        parts = {**{part: own for part, own in parts.items() if part != "test"}, "test": whole}
    classes = _class_names(opened[0][0], parts.values(), str(paths[0]))
    first, second, third = _decoded(three(parts, seed, groups, images=images))
    return assembled(f"npz:{paths[0].stem}", (first, second, third), classes, normalise)


def _read(path: Path) -> Arrays:
    """Return the arrays that we know, once each one's header agrees with the size that the zip file declares."""
    data = files.read_bytes(WHO, path, MAX_BYTES)
    wrong = f"{WHO}: {path} is not an .npz file that can be read"
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    total = 0
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise ValueError(f"{wrong}: it holds a name twice.")
            for key in sorted(_KEYS & members.keys()):
                total += members[key].file_size
                if total > MAX_BYTES:
                    raise ValueError(f"{WHO}: {path} claims more than {MAX_BYTES} bytes of arrays.")
                with archive.open(members[key]) as stream:
                    _check_header(stream, f"{key!r} in {path}", members[key].file_size)
            for key in sorted(_KEYS & members.keys()):
                with archive.open(members[key]) as stream:
                    arrays[key] = np.lib.format.read_array(stream, allow_pickle=False)
    except ValueError as error:
        raise error if str(error).startswith(WHO) else ValueError(f"{wrong} ({_one_line(error)}).") from None
    except Exception as error:  # zipfile and zlib raise many kinds
        raise ValueError(f"{wrong} ({_one_line(error)}).") from None
    if not arrays:
        raise ValueError(f"{WHO}: {path} must hold images and labels, x_train and y_train, or jpeg and offsets.")
    return arrays


def _check_header(stream: IO[bytes], name: str, declared: int) -> None:
    """Raise ``ValueError`` unless an .npy header announces numbers or text that fill the member exactly."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"{WHO}: {name} has the .npy version {version}; save it again with numpy.savez.")
    if dtype.kind not in "uifbUS" or dtype.hasobject or dtype.names is not None:
        raise ValueError(f"{WHO}: arrays must hold numbers or text; {name} is of {str(dtype)[:80]}.")
    if min(shape, default=0) < 0 or stream.tell() + math.prod(shape) * dtype.itemsize != declared:
        raise ValueError(f"{WHO}: {name} claims shape {list(shape)} of {dtype} and has {declared} bytes.")


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _parts(
    arrays: Arrays, name: str, size: int | None, channels: int | None
) -> tuple[dict[str, Images], np.ndarray[Any, Any] | None]:
    """Return the parts that a file holds, and the patients of the images for training where it names them."""
    if "x_train" in arrays:
        found = [part for part in _SPLIT if f"x_{part}" in arrays]
        return {p: _from_arrays(arrays, f"x_{p}", f"y_{p}", name, size, channels) for p in found}, None
    whole = _whole(arrays, name, size, channels)
    for key in ("split", "patients"):
        if key in arrays and arrays[key].shape != (len(whole),):
            raise ValueError(
                f"{WHO}: {name} must have one entry in {key} for each of {len(whole)} images; "
                f"its shape is {list(arrays[key].shape)}."
            )
    patients = arrays.get("patients")
    if "split" not in arrays:
        return {"train": whole}, patients
    rows = {part: np.flatnonzero(arrays["split"] == number) for part, number in _SPLIT.items()}
    if sum(map(len, rows.values())) != len(whole) or not len(rows["train"]):
        raise ValueError(f"{WHO}: split in {name} must be 0 (train), 1 (test) or 2 (val), and 0 at least once.")
    parts = {part: whole.part(own) for part, own in rows.items() if len(own)}
    return parts, None if patients is None else patients[rows["train"]]


def _whole(arrays: Arrays, name: str, size: int | None, channels: int | None) -> Images:
    """Return all images of a file in one of the two layouts that do not cut them into parts."""
    if "jpeg" in arrays:
        return _encoded(arrays, name, size, channels)
    return _from_arrays(arrays, "images", "labels", name, size, channels)


def _from_arrays(
    arrays: Arrays, images_key: str, labels_key: str, name: str, size: int | None, channels: int | None
) -> ImageArrays:  # fmt: skip
    for key in (images_key, labels_key):
        if key not in arrays:
            raise ValueError(f"{WHO}: {name} has no {key!r}; it has {', '.join(sorted(arrays))}.")
    images = with_channels(_as_images(arrays[images_key], f"{images_key} in {name}"), channels)
    if size is not None and size != images.shape[2]:
        raise ValueError(f"{WHO}: size is for encoded images; {images_key} in {name} is {list(images.shape)}.")
    return ImageArrays(images, _labels(arrays[labels_key], len(images), f"{labels_key} in {name}"))


def _as_images(array: np.ndarray[Any, Any], name: str) -> torch.Tensor:
    """Return an array of images as [N, C, H, W], uint8 or float32."""
    shape = list(array.shape)
    images = array[:, None] if array.ndim == 3 else array
    first, last = (images.shape[1] in (1, 3), images.shape[3] in (1, 3)) if images.ndim == 4 else (False, False)
    if first == last or 0 in shape:
        raise ValueError(f"{WHO}: {name} must be [N, H, W, C], [N, C, H, W] or [N, H, W], C 1 or 3; got {shape}.")
    if array.dtype.kind in "ui" and array.dtype != np.uint8:
        if array.min() < 0 or array.max() > 255:
            raise ValueError(f"{WHO}: {name} must be in 0 ... 255; it reaches {array.min()} and {array.max()}.")
        images = images.astype(np.uint8)
    elif array.dtype.kind == "f":
        images = images.astype(np.float32)
        if not np.isfinite(images).all():
            raise ValueError(f"{WHO}: {name} must be finite; it holds NaN or infinity.")
    elif array.dtype != np.uint8:
        raise ValueError(f"{WHO}: {name} must hold numbers; got {array.dtype}.")
    return torch.from_numpy(np.ascontiguousarray(images if first else images.transpose(0, 3, 1, 2)))


def _labels(array: np.ndarray[Any, Any], count: int, name: str) -> IntArray:
    labels = integer_labels(WHO, array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array)
    if len(labels) != count or labels.min(initial=0) < 0:
        what = f"{len(labels)} labels" if len(labels) != count else f"the label {labels.min()}"
        raise ValueError(f"{WHO}: {name} must be class numbers from 0, one for each of {count} images; got {what}.")
    return labels


def _encoded(arrays: Arrays, name: str, size: int | None, channels: int | None) -> Images:
    for key in ("offsets", "labels"):
        if key not in arrays:
            raise ValueError(f"{WHO}: {name} has no {key!r}; it has {', '.join(sorted(arrays))}.")
    content, offsets = arrays["jpeg"], arrays["offsets"]
    if content.dtype != np.uint8 or content.ndim != 1 or offsets.dtype.kind not in "ui" or offsets.ndim != 1:
        raise ValueError(f"{WHO}: {name} must have jpeg as uint8 [bytes] and offsets as whole numbers [N + 1].")
    ends = offsets.tolist()
    if len(ends) < 2 or ends[0] < 0 or ends[-1] > len(content) or any(b <= a for a, b in itertools.pairwise(ends)):
        raise ValueError(f"{WHO}: offsets in {name} must ascend within the {len(content)} bytes of jpeg.")
    sources = [content[a:b] for a, b in itertools.pairwise(ends)]
    names = [f"image {i} of {name}" for i in range(len(sources))]
    labels = _labels(arrays["labels"], len(sources), f"labels in {name}")
    side = size or min(open_image(sources[0], names[0]).size)
    return EncodedImages(sources, names, labels, side, channels or 3)


def _decoded(parts: Sequence[Images]) -> Sequence[Images]:
    """Return ``parts`` with encoded images decoded, if that takes little memory."""
    encoded = [part for part in parts if isinstance(part, EncodedImages)]
    if sum(len(part) * math.prod(part.shape) for part in encoded) > IN_MEMORY_BYTES:
        return parts
    return [part.in_memory() if isinstance(part, EncodedImages) else part for part in parts]


def _class_names(arrays: Arrays, parts: Collection[Images], name: str) -> tuple[str, ...]:
    """Return the names of the classes: the file's own, or their numbers."""
    most = 1 + max(int(part.labels.max()) for part in parts)
    given = arrays.get("classes", arrays.get("class_names"))
    if given is None:
        if most > MAX_CLASSES:
            raise ValueError(f"{WHO}: labels in {name} reach {most - 1}; name the classes, or count them from 0.")
        return tuple(map(str, range(most)))
    if given.ndim != 1 or len(given) < most:
        raise ValueError(f"{WHO}: {name} must name {most} classes; it names {list(given.shape)}.")
    return tuple(one.decode("latin1") if isinstance(one, bytes) else str(one) for one in given.tolist())
