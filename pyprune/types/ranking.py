"""Class-conditional ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyprune import files
from pyprune.types.common import FloatArray, IntArray

UNINFORMATIVE = 0.9
"""A layer with a larger share of R at full rank than this says nothing about its filters."""


@dataclass(frozen=True, eq=False)
class ClassRanks:
    """Class-conditional feature-map ranks: what one pass over the data says about every filter.

    Parameters
    ----------
    layers
        For each convolution, R [F, C] float64: the mean rank of filter f's maps over the images of class c.
    counts
        [C] int64, how many images of each class were ranked.
    shapes
        For each convolution the (H, W) of the maps that were ranked; min(H, W) is full rank.
    taps
        For each convolution the node or module whose output was ranked.
    info
        How the ranks came about: seed, images a class, micro-batch size, variant, libraries.

    Raises
    ------
    ValueError
        If an R is not a finite, non-negative [F, C] array with the same C in every layer.
    """

    layers: Mapping[str, FloatArray]
    counts: IntArray | None = None
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    taps: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    FORMAT = "pyprune.ranks"
    VERSION = 1

    def __post_init__(self) -> None:
        # In C order, as files give them back: numpy adds up in the order of memory, and no plan may depend on that.
        layers = {name: np.array(R, np.float64, order="C") for name, R in self.layers.items()}
        for name, R in layers.items():
            if R.ndim != 2 or 0 in R.shape:
                raise ValueError(f"ClassRanks: {name!r} needs R of [F, C]; got {list(R.shape)}.")
            if not np.isfinite(R).all() or (R < 0).any():
                raise ValueError(f"ClassRanks: {name!r} has ranks that are negative, NaN or infinite.")
            R.flags.writeable = False
        classes = {R.shape[1] for R in layers.values()}
        if len(classes) != 1:
            raise ValueError(f"ClassRanks: needs at least one layer and one number of classes; got {sorted(classes)}.")
        object.__setattr__(self, "layers", layers)
        if self.counts is not None:
            counts = np.array(self.counts, np.int64)
            if counts.shape != (classes.pop(),) or (counts < 1).any():
                raise ValueError(f"ClassRanks: counts must be one positive number per class; got {counts}.")
            object.__setattr__(self, "counts", counts)

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return int(next(iter(self.layers.values())).shape[1])

    def full_rank_share(self, name: str) -> float | None:
        """Share of R[name] that is at full rank, min(H, W); ``None`` where the map's size is not known."""
        if name not in self.shapes:
            return None
        return float((self.layers[name] >= min(self.shapes[name])).mean())

    @property
    def uninformative(self) -> tuple[str, ...]:
        """Layers with more than 90 % of R at full rank: CRank leaves them alone."""
        return tuple(name for name in self.layers if (self.full_rank_share(name) or 0.0) > UNINFORMATIVE)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as safetensors; :meth:`load` reads it back bit for bit."""
        import torch

        tensors = {f"R/{name}": torch.from_numpy(R.copy()) for name, R in self.layers.items()}
        if self.counts is not None:
            tensors["counts"] = torch.from_numpy(self.counts)
        about = {"shapes": self.shapes, "taps": self.taps, "info": self.info, "layers": list(self.layers)}
        files.write_described(path, tensors, self.FORMAT, self.VERSION, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassRanks:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If the file is missing, truncated, of another kind or from a newer pyprune.
        """
        tensors, about = files.read_described("ClassRanks.load", path, cls.FORMAT, cls.VERSION)
        try:
            return cls(
                layers={name: tensors[f"R/{name}"].numpy() for name in about["layers"]},
                counts=tensors["counts"].numpy() if "counts" in tensors else None,
                shapes={name: (int(shape[0]), int(shape[1])) for name, shape in about["shapes"].items()},
                taps={str(name): str(tap) for name, tap in about["taps"].items()},
                info=about["info"],
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"ClassRanks.load: {path} lacks or garbles {error}.") from None
