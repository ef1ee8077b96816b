"""Images as data sets: in memory as bytes, or encoded and decoded when they are read; normalised batch by batch."""

from __future__ import annotations

import copy
import io
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from pyprune import files
from pyprune.datasets.parts import Splits, drawn, stratified
from pyprune.types import IntArray

WHO = "open_data"

Statistics = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation per channel, of images in [0, 1]."""

CONSTANTS: dict[str, Statistics] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
"""The constants that published training scripts use."""

NORMALISATIONS = ("imagenet", "cifar", "data")

PADDING = 4
"""Pixels of black around an image in memory before a random part of its size is cut out."""

AREA = (0.25, 1.0)
ASPECT = (3 / 4, 4 / 3)
"""What part of a decoded image a random crop keeps, and how far it is stretched."""

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""Only these decoders run: others (EPS, for one) start programs."""

_KNOWN = ", ".join(FORMATS)

MAX_PIXELS = 64_000_000
MAX_IMAGE_BYTES = 256 << 20
"""Larger images are refused: a few kilobytes can claim to be gigabytes."""

STATISTICS_SAMPLE = 2000
"""Encoded images that are decoded for ``normalise="data"``."""


class BrokenImageError(ValueError):
    """An image that cannot be decoded. A worker process of a loader repeats the message with its traceback above."""

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].rpartition("BrokenImageError: ")[2])


class Images(Dataset[Any], ABC):
    """Images with labels: item i is (image [C, H, W] float32, label), normalised and never augmented.

    :meth:`batch` makes many at once, which is what loaders use.
    """

    def __init__(self, labels: IntArray, rows: IntArray | None = None) -> None:
        self.rows = np.arange(len(labels)) if rows is None else rows  # [N] of this part in what is stored
        self.labels = labels[self.rows]
        self._scale, self._shift = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        images, labels = self.batch([i])
        return images[0], int(labels[0])

    def batch(self, indices: Sequence[int] | IntArray, seed: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the images [N, C, H, W] float32 and labels [N] at ``indices``; a ``seed`` augments them."""
        index = np.asarray(indices, np.int64)
        random = None if seed is None else torch.Generator().manual_seed(seed)
        images = self.raw(self.rows[index], random).float()
        return images.mul_(self._scale).add_(self._shift), torch.from_numpy(self.labels[index])

    def part(self, rows: IntArray) -> Self:
        """Return the images at ``rows`` of this data set; nothing is copied."""
        chosen = copy.copy(self)
        chosen.rows, chosen.labels = self.rows[rows], self.labels[rows]
        return chosen

    def normalised(self, statistics: Statistics) -> Self:
        """Return the same images, to be normalised by ``statistics``."""
        mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in statistics)
        other = copy.copy(self)
        other._scale = (1 / (self.white * std)).float()
        other._shift = (-mean / std).float()
        return other

    def statistics(self) -> Statistics:
        """Return mean and standard deviation of each channel over the images as they are stored, in [0, 1]."""
        pixels, total, squares = 0, torch.zeros(()), torch.zeros(())
        for rows in np.array_split(self.rows[self._looked_at()], max(1, len(self.rows) // 500)):
            values = self.raw(rows, None).double() / self.white
            pixels += values.shape[0] * values.shape[2] * values.shape[3]
            total, squares = total + values.sum((0, 2, 3)), squares + (values * values).sum((0, 2, 3))
        mean = total / pixels
        std = (squares / pixels - mean * mean).clamp(min=0).sqrt()
        if not bool((std > 1e-6).all()):
            raise ValueError(f'{WHO}: normalise="data" needs channels that vary; their deviations are {std.tolist()}.')
        return tuple(mean.tolist()), tuple(std.tolist())

    def _looked_at(self) -> slice:
        return slice(None)

    white: float = 255.0
    """The value of the brightest pixel as stored."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    @abstractmethod
    def raw(self, rows: IntArray, random: torch.Generator | None) -> torch.Tensor:
        """Return new images [N, C, H, W] as stored at ``rows``, augmented if there is a generator."""


class ImageArrays(Images):
    """Images [M, C, H, W] in memory: uint8, or float32 in [0, 1].

    Augmentation: :data:`PADDING` black pixels all around, a random crop of the old size, a horizontal flip of every
    other image.
    """

    def __init__(self, images: torch.Tensor, labels: IntArray, rows: IntArray | None = None) -> None:
        super().__init__(labels, rows)
        self.images = images
        self.kept: IntArray | None = None  # [M], ascending: the rows that images holds, where it does not hold all
        self.white = 255.0 if images.dtype == torch.uint8 else 1.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        C, H, W = self.images.shape[1:]
        return C, H, W

    def between_black_and_white(self) -> bool:
        """Say whether every value lies in [0, 1], or is a byte."""
        if self.images.dtype == torch.uint8:
            return True
        low, high = torch.aminmax(self.images)
        return bool(low >= 0 and high <= 1)

    def raw(self, rows: IntArray, random: torch.Generator | None) -> torch.Tensor:
        """Return new images [N, C, H, W] as stored at ``rows``, augmented if there is a generator."""
        places = rows if self.kept is None else np.searchsorted(self.kept, rows)
        images = self.images[torch.from_numpy(places)]
        return images if random is None else crop_and_flip(images, random)


def crop_and_flip(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return a random crop of each padded image, [N, C, H, W] like ``images``, every other one mirrored."""
    N, _, H, W = images.shape
    top, left = torch.randint(2 * PADDING + 1, (2, N), generator=random)
    mirror = torch.rand(N, generator=random) < 0.5
    padded = F.pad(images, (PADDING,) * 4)
    windows = padded.unfold(2, H, 1).unfold(3, W, 1)  # [N, C, 9, 9, H, W], a view
    crops = windows[torch.arange(N), :, top, left]
    return torch.where(mirror[:, None, None, None], crops.flip(3), crops)


class EncodedImages(Images):
    """Image files, decoded whenever they are read: the short side resized to ``size``, the centre cut out.

    Augmentation: a random part of :data:`AREA` of the image, stretched by :data:`ASPECT`, resized to ``size``, and
    every other image mirrored.

    Parameters
    ----------
    sources
        Paths, or bytes of the files.
    names
        What to call each in messages.
    labels
        [N] class numbers.
    size
        Height and width.
    channels
        1 for grey, 3 for colour.
    """

    def __init__(
        self, sources: Sequence[str | npt.NDArray[np.uint8]], names: Sequence[str], labels: IntArray,
        size: int, channels: int,
    ) -> None:  # fmt: skip
        super().__init__(labels)
        self.sources, self.names, self.size, self.channels = sources, names, size, channels

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.size, self.size

    def raw(self, rows: IntArray, random: torch.Generator | None) -> torch.Tensor:
        """Return new images [N, C, H, W] as stored at ``rows``, augmented if there is a generator."""
        draws = [None] * len(rows) if random is None else torch.rand(len(rows), 5, generator=random).tolist()
        pixels = np.stack([self._decode(row, draw) for row, draw in zip(rows.tolist(), draws, strict=True)])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    def in_memory(self) -> ImageArrays:
        """Decode the images of this part once."""
        kept = np.unique(self.rows)
        decoded = ImageArrays(torch.cat([self.raw(rows, None) for rows in _chunks(kept)]), self.labels)
        decoded.rows, decoded.kept = self.rows, kept
        return decoded

    def _looked_at(self) -> slice:
        return slice(None, None, -(-len(self) // STATISTICS_SAMPLE))

    def _decode(self, row: int, draw: Sequence[float] | None) -> npt.NDArray[np.uint8]:  # [H, W, C]
        with open_image(self.sources[row], self.names[row]) as image:
            box = _centre(image.size) if draw is None else _random_part(image.size, draw)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # on odd palettes and metadata
                    pixels = image.convert("L" if self.channels == 1 else "RGB").resize(
                        (self.size, self.size), Image.Resampling.BILINEAR, box
                    )
            except Exception as error:  # decoders raise anything
                raise BrokenImageError(f"{WHO}: cannot decode {self.names[row]} ({_first_line(error)}).") from None
        found = np.array(pixels, np.uint8).reshape(self.size, self.size, self.channels)
        return found[:, ::-1] if draw is not None and draw[4] < 0.5 else found


def open_image(source: str | npt.NDArray[np.uint8], name: str) -> Image.Image:
    """Read the header of an encoded image; no pixel is decoded yet.

    Raises
    ------
    ValueError
        If it is no image, too large, or of more than 8 bits a channel, which a conversion would clip.
    """
    try:
        data = files.read_bytes(WHO, source, MAX_IMAGE_BYTES) if isinstance(source, str) else source.tobytes()
    except ValueError as error:
        raise BrokenImageError(str(error)) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is stricter
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_large(name) from None
    except UnidentifiedImageError:
        raise BrokenImageError(f"{WHO}: {name} is not an image that can be read; it is none of {_KNOWN}.") from None
    except Exception as error:  # decoders raise anything
        raise BrokenImageError(f"{WHO}: {name} is not an image that can be read ({_first_line(error)}).") from None
    if math.prod(image.size) > MAX_PIXELS:
        raise _too_large(name)
    if image.mode.startswith(("I", "F")):
        raise BrokenImageError(
            f"{WHO}: images must have 8 bits a channel; {name} is of mode {image.mode!r}. Convert it to 0 ... 255."
        )
    return image


def _too_large(name: str) -> BrokenImageError:
    return BrokenImageError(f"{WHO}: images may have {MAX_PIXELS:,} pixels; {name} claims more. Remove or shrink it.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _centre(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the largest square in the middle: resizing it is resizing the short side and cutting out the centre."""
    W, H = size
    side = min(W, H)
    left, top = (W - side) / 2, (H - side) / 2
    return left, top, left + side, top + side


def _random_part(size: tuple[int, int], draw: Sequence[float]) -> tuple[float, float, float, float]:
    """Return a random part of the image from four numbers in [0, 1)."""
    W, H = size
    area = W * H * (AREA[0] + (AREA[1] - AREA[0]) * draw[0])
    aspect = math.exp(math.log(ASPECT[0]) + (math.log(ASPECT[1]) - math.log(ASPECT[0])) * draw[1])
    width, height = min(W, math.sqrt(area * aspect)), min(H, math.sqrt(area / aspect))
    left, top = (W - width) * draw[2], (H - height) * draw[3]
    return left, top, left + width, top + height


def _chunks(rows: IntArray) -> list[IntArray]:
    return np.array_split(rows, max(1, len(rows) // 500))


def with_channels(images: torch.Tensor, channels: int | None) -> torch.Tensor:  # [N, C, H, W]
    """Return ``images`` in grey (1) or colour (3), or as they are (``None``)."""
    C = images.shape[1]
    if channels is None or channels == C:
        return images
    if channels == 3 and C == 1:
        return images.expand(-1, 3, -1, -1)
    if channels == 1 and C == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R BT.601, as Pillow has it
        grey = [(part.float() * weights).sum(1, keepdim=True) for part in torch.split(images, 1000)]
        return torch.cat([(part.round() if images.dtype == torch.uint8 else part).to(images.dtype) for part in grey])
    raise ValueError(f"{WHO}: channels must be 1 or 3 and the images' own 1 or 3; got {channels} for {C}.")


def three(
    parts: Mapping[str, Images], seed: int, groups: Any = None, *, images: int | None = None
) -> tuple[Images, Images, Images]:
    """Return training, validation and test images, setting aside at random what ``parts`` lacks.

    Where only one of validation and test is there, it is measured with, and 10 % of the training images become the
    validation images; where neither is, 10 % each. ``groups`` are those of the training images; see
    :func:`pyprune.datasets.parts.stratified`. Of all that, ``images`` are drawn; see
    :func:`pyprune.datasets.parts.drawn`.
    """
    train = parts["train"]
    rest = [parts[part] for part in ("val", "test") if part in parts]
    fractions = {0: (0.8, 0.1, 0.1), 1: (0.9, 0.1), 2: (1.0,)}[len(rest)]
    rows = stratified(train.labels, fractions, seed, groups)
    if not all(map(len, rows)):
        raise ValueError(f"{WHO}: {len(train)} training images are too few to set some aside; add images.")
    whole = [*(train.part(own) for own in rows), *rest]
    chosen = drawn(WHO, [part.labels for part in whole], images, seed)
    first, second, third = (part.part(own) for part, own in zip(whole, chosen, strict=True))
    return first, second, third


def assembled(
    name: str, parts: tuple[Images, Images, Images], classes: tuple[str, ...], normalise: str | Statistics,
    *, cifar: str = "cifar10", augment: bool = False,
) -> Splits:  # fmt: skip
    """Return the three parts as :class:`Splits`, normalised as :func:`choose_statistics` says."""
    chosen, (mean, std) = choose_statistics(normalise, parts[0], cifar)
    train, val, test = (part.normalised((mean, std)) for part in parts)
    return Splits(
        name, train, val, test, classes, train.shape, tuple(mean), tuple(std), normalise=chosen, augment=augment
    )


def choose_statistics(normalise: str | Statistics, train: Images, cifar: str = "cifar10") -> tuple[str, Statistics]:
    """Return the name and the values of what ``normalise`` asks for; ``cifar`` says which of the two "cifar" is.

    Raises
    ------
    ValueError
        If it is unknown, or there is not one positive deviation per channel.
    """
    C = train.shape[0]
    if normalise == "data":
        return "data", train.statistics()
    name = cifar if normalise == "cifar" else normalise
    if isinstance(name, str) and name in CONSTANTS:
        if isinstance(train, ImageArrays) and not train.between_black_and_white():
            raise ValueError(f'{WHO}: normalise={normalise!r} needs images in [0, 1]; pass normalise="data".')
        mean, std = CONSTANTS[name]
        if C == 1:  # grey: the mean of the three, as is usual
            mean, std = (round(sum(mean) / 3, 4),), (round(sum(std) / 3, 4),)
        return str(normalise), _checked((mean, std), C)
    return "given", _checked(_parsed(normalise) if isinstance(normalise, str) else normalise, C)


def _parsed(text: str) -> Statistics:
    try:
        mean, std = ([float(value) for value in half.split(",")] for half in text.split("/"))
    except ValueError:
        raise ValueError(
            f"{WHO}: normalise must be one of {', '.join(NORMALISATIONS)}, or means and deviations as "
            f"0.5,0.5,0.5/0.2,0.2,0.2; got {text!r}."
        ) from None
    return mean, std


def _checked(statistics: Statistics, C: int) -> Statistics:
    mean, std = (tuple(float(value) for value in values) for values in statistics)
    if len(mean) != C or len(std) != C or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError(f"{WHO}: normalise needs {C} means and {C} positive deviations; got {mean} and {std}.")
    return mean, std
