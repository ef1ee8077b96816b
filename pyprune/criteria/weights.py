"""Criteria that look at weights alone: norms, distances, scales of norms; and chance, for comparison."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import pdist, squareform
from torch import nn

from pyprune.criteria import Context
from pyprune.types import FloatArray


@dataclass(frozen=True)
class L1:
    """The sum of a filter's absolute weights (thesis section 3.1.2, after Li et al.)."""

    name = "l1"
    needs = ()

    def scores(self, model: nn.Module, context: Context) -> Mapping[str, FloatArray]:
        """Return the L1 norms [F] by layer."""
        return {name: np.abs(_rows(context, name)).sum(axis=1) for name in context.layers}


@dataclass(frozen=True)
class L2:
    """The Euclidean norm of a filter's weights."""

    name = "l2"
    needs = ()

    def scores(self, model: nn.Module, context: Context) -> Mapping[str, FloatArray]:
        """Return the L2 norms [F] by layer."""
        return {name: np.linalg.norm(_rows(context, name), axis=1) for name in context.layers}


@dataclass(frozen=True)
class FPGM:
    """The summed Euclidean distance of a filter's weights to all others of its layer: near the median, it goes.

    In a grouped convolution, filters of different groups are compared as well, number by number.
    """

    name = "fpgm"
    needs = ()

    def scores(self, model: nn.Module, context: Context) -> Mapping[str, FloatArray]:
        """Return the summed distances [F] by layer."""
        return {name: squareform(pdist(_rows(context, name))).sum(axis=1) for name in context.layers}


@dataclass(frozen=True)
class BNScale:
    """The absolute scale that the norm behind a convolution gives a filter's map, as in network slimming.

    Scales of different layers are compared. Layers without an affine norm of their own are left alone.
    """

    name = "bn_scale"
    needs = ()
    comparable = True

    def scores(self, model: nn.Module, context: Context) -> Mapping[str, FloatArray]:
        """Return |gamma| [F] for every layer with a norm."""
        return {name: scale for name in context.layers if (scale := _scale(context, name)) is not None}

    def left_alone(self, model: nn.Module, context: Context) -> Mapping[str, str]:
        """Name the layers without a scale."""
        return {
            name: "no affine norm reads this layer alone" for name in context.layers if _scale(context, name) is None
        }


@dataclass(frozen=True)
class Random:
    """Chance: what every other criterion has to beat. Each layer's numbers depend on ``seed`` and its name alone."""

    seed: int = 0

    name = "random"
    needs = ()

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"random: seed must be a whole number of at least 0; got {self.seed!r}.")

    def scores(self, model: nn.Module, context: Context) -> Mapping[str, FloatArray]:
        """Return uniform numbers [F] by layer."""
        return {
            name: np.random.default_rng([self.seed, zlib.crc32(name.encode())]).random(layer.out_channels)
            for name, layer in context.layers.items()
        }


def _rows(context: Context, name: str) -> FloatArray:
    """Return the weights of a layer, one row a filter: [F, C / groups * ...]."""
    weights = context.weights(name)
    return weights.reshape(len(weights), -1)


def _scale(context: Context, name: str) -> FloatArray | None:
    found = context.norm(name)
    weight = None if found is None else getattr(found[1], "weight", None)
    if weight is None or len(weight) != context.layers[name].out_channels:
        return None
    scale: FloatArray = np.abs(weight.detach().double().cpu().numpy())
    return scale
