"""Criteria that join filters that are alike and keep one of each group: CUP, and CKRM's similarity.

Both build a dendrogram. Whenever two groups join, the representative with the smaller norm is absorbed; the height at
which that happens is its score. So the n highest scores are exactly the representatives of the n groups that the
dendrogram can be cut into, and kept sets at different rates are nested.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import nn

from pyprune.coupling import outgoing
from pyprune.criteria import Context, needed_number
from pyprune.graph import Convolution
from pyprune.ops.ssim import Constants, kernel_ssim
from pyprune.types import FilterWhy, FloatArray, LayerWhy, Plan


@dataclass(frozen=True)
class CUP:
    """Ward clustering of each filter's incoming and outgoing weights (thesis section 3.1.5, after Duggal et al.).

    A filter's features are the norms of its slices over the input channels, its bias, and the norms of the slices
    through which others read its channel (thesis eq. 3.17 and 3.18). Input channels of other groups count as zero; in
    a residual stream all readers of the stream count.

    Parameters
    ----------
    threshold
        t: the height at which every dendrogram is cut, for CUP's own rate; one filter of each cluster stays. The lower,
        the more stay. Not needed where rates or a budget are given.

    Raises
    ------
    ValueError
        If ``threshold`` is negative.
    """

    threshold: float | None = None

    name = "cup"
    needs = ("example_inputs",)
    label = "absorbed at height"
    comparable = True

    def __post_init__(self) -> None:
        if self.threshold is not None:
            needed_number("cup", "threshold", self.threshold, 0, np.inf)

    def scores(self, model: nn.Module, context: Context) -> Mapping[str, FloatArray]:
        """Return the height [F] at which each filter is absorbed, by layer."""
        return context.once(self, lambda: {name: absorbed(x, "ward") for name, x in cup_features(context).items()})

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Return what stays where every dendrogram is cut at the threshold."""
        if self.threshold is None:
            raise ValueError("select: 'cup' needs threshold=, where to cut its dendrograms; or pass rates= or budget=.")
        return _cut(self.scores(model, context), self.threshold, "height {:.3g}")


@dataclass(frozen=True)
class KernelRedundancy:
    """Groups of filters with Psi above a threshold, of which one stays (CKRM paper, equations 5 to 8).

    Filters are joined by single linkage: a group holds all that are connected by pairs with Psi > threshold. Filters
    of different groups of a convolution read different channels and are never joined. Kernels of one number, which
    have no structure, are left alone unless a rate is asked of them.

    Parameters
    ----------
    threshold
        t, in [0, 1].
    eps
        As in :func:`pyprune.kernel_ssim`.

    Raises
    ------
    ValueError
        If either is out of range.
    """

    threshold: float = 0.6
    eps: float = 1e-2

    name = "ckrm"
    needs = ()
    label = "1 - Psi on joining a larger filter"
    comparable = True

    def __post_init__(self) -> None:
        needed_number("ckrm", "threshold", self.threshold, 0, 1)
        Constants(eps=self.eps)

    def scores(self, model: nn.Module, context: Context) -> Mapping[str, FloatArray]:
        """Return 1 - Psi at which each filter is absorbed, [F] by layer; 2 for the last of its group of channels."""
        return context.once(self, lambda: {n: self._layer(context, n, one) for n, one in context.layers.items()})

    def left_alone(self, model: nn.Module, context: Context) -> Mapping[str, str]:
        """Name the layers whose kernels have no structure."""
        single = {name: layer.weight[0, 0].numel() == 1 for name, layer in context.layers.items()}
        return {name: "kernels of one number have no structure" for name, alone in single.items() if alone}

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Return what stays where filters with Psi above the threshold are joined."""
        return _cut(self.scores(model, context), 1 - self.threshold, "Psi above {:.3g}", shown=self.threshold)

    def _layer(self, context: Context, name: str, layer: Convolution) -> FloatArray:
        weights = context.weights(name)
        F, groups = len(weights), layer.groups
        sizes = weights.shape[2:] if weights.ndim == 4 else (1, int(np.prod(weights.shape[2:])))
        kernels = weights.reshape(groups, F // groups, weights.shape[1], *sizes)
        mean_square = float((weights**2).mean())  # eps is relative to the whole layer, not to each of its groups
        constant = self.eps * mean_square or self.eps
        return np.concatenate([self._group(part, constant) for part in kernels])

    def _group(self, kernels: FloatArray, constant: float) -> FloatArray:
        psi = np.asarray(kernel_ssim(kernels, eps_absolute=constant))
        distances = np.clip(1 - (psi + psi.T) / 2, 0, 1)
        np.fill_diagonal(distances, 0)
        return absorbed(kernels.reshape(len(kernels), -1), "single", squareform(distances, checks=False), last=2.0)


def absorbed(
    features: FloatArray, method: str, distances: FloatArray | None = None, last: float | None = None
) -> FloatArray:
    """Return the height [F] at which each filter is absorbed by one with a larger norm, the lower index on a tie.

    Parameters
    ----------
    features
        [F, D]: their norms say which of two representatives stays, and their distances are clustered by default.
    method
        Linkage: ``"ward"`` or ``"single"``.
    distances
        [F (F - 1) / 2] condensed, instead of those of ``features``.
    last
        What the one gets that is never absorbed; by default twice the greatest height, or 1.
    """
    F = len(features)
    found = np.zeros(F)
    merges = linkage(features if distances is None else distances, method) if F > 1 else np.zeros((0, 4))
    norms = np.round(np.linalg.norm(features, axis=1), 12)
    standing = list(range(F))  # by node of the dendrogram: its representative
    for left, right, height, _ in merges:
        one, other = standing[int(left)], standing[int(right)]
        stays, goes = sorted((one, other), key=lambda f: (-norms[f], f))
        found[goes] = height
        standing.append(stays)
    top = float(found.max()) if F > 1 else 0.0
    found[standing[-1]] = (2 * top or 1.0) if last is None else last
    return found


def cup_features(context: Context) -> dict[str, FloatArray]:
    """Return the features of every filter, [F, C + 1 + P] by layer, where P numbers read its channel (eq. 3.17)."""
    read = outgoing(context.costs)
    return {
        name: np.concatenate([_incoming(context, name, layer), read[name]], axis=1)
        for name, layer in context.layers.items()
        if name in read
    }


def _incoming(context: Context, name: str, layer: Convolution) -> FloatArray:
    """Return the norms of each filter's slices over the input channels (eq. 3.18), and its bias: [F, C + 1]."""
    weights = context.weights(name)
    norms = np.linalg.norm(weights.reshape(*weights.shape[:2], -1), axis=2)
    found = np.zeros((len(weights), layer.in_channels + 1))
    group = np.arange(len(weights)) // (len(weights) // layer.groups)
    columns = group[:, None] * weights.shape[1] + np.arange(weights.shape[1])
    np.put_along_axis(found, columns, norms, axis=1)
    if layer.bias is not None:
        found[:, -1] = layer.bias.detach().double().cpu().numpy()
    return found


def _cut(scores: Mapping[str, FloatArray], limit: float, title: str, shown: float | None = None) -> Plan:
    """Keep the filters that are absorbed at ``limit`` or above, or never; ``title`` says what the limit is."""
    where = title.format(limit if shown is None else shown)
    whys = {}
    for name, values in scores.items():
        keep = values >= min(limit, values.max())
        fates = [f"{'represents its group' if stays else 'joined a larger filter'} at {where}" for stays in keep]
        filters = zip(fates, keep.tolist(), values.tolist(), strict=True)
        whys[name] = LayerWhy(tuple(FilterWhy(fate, stays, score=score) for fate, stays, score in filters))
    return Plan({name: np.array([f for f, one in enumerate(why) if one.keep]) for name, why in whys.items()}, why=whys)
