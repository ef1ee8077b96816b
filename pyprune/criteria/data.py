"""Criteria that look at data: how well a filter tells classes apart, and what the loss would lose without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pyprune.criteria import Context
from pyprune.measure import as_batch, check_labels, check_outputs, running
from pyprune.progress import track
from pyprune.types import FloatArray


@dataclass(frozen=True)
class TVS:
    """How well a filter tells the classes apart that it tells apart worst (thesis eq. 3.8 to 3.12, after TVSPrune).

    For each class the outputs of a filter are taken as Gaussian, N(mu, sigma^2 I); the score is the least squared
    Hellinger distance over all pairs of classes. It is the same before and behind a norm, which scales and shifts
    all classes alike, so the convolution's own outputs are read.

    Parameters
    ----------
    pool
        Whether a map counts by its mean, one number an image. Without, by all its d = H W numbers: distances of so many
        dimensions are nearly all 1.
    batches
        Read at most so many batches.

    Notes
    -----
    Thesis eq. 3.12 lacks a factor of 4 in the denominator of Delta: with it, eq. 3.11 is the integral of eq. 3.9.
    """

    pool: bool = True
    batches: int | None = None

    name = "tvs"
    needs = ("data",)
    label = "least squared Hellinger distance"
    comparable = True

    def scores(self, model: nn.Module, context: Context) -> Mapping[str, FloatArray]:
        """Return the least squared Hellinger distance [F] over all pairs of classes, by layer, in [0, 1]."""
        moments: dict[str, ClassMoments] = {name: ClassMoments() for name in context.layers}
        labels = torch.zeros(0, dtype=torch.int64)

        def read(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, maps: torch.Tensor) -> None:
                flat = maps.detach().flatten(2)
                outputs = flat.mean(2, keepdim=True, dtype=torch.float64) if self.pool else flat.double()
                moments[name].add(outputs.cpu(), labels)

            return hook

        hooks = [layer.register_forward_hook(read(name)) for name, layer in context.layers.items()]
        try:
            with running(model, context.device) as place, torch.no_grad():
                for images, labels in _batches(self, context):  # the hooks read the labels
                    check_labels(
                        "select", labels, check_outputs("select", model(images.to(place)), len(images)).shape[1]
                    )
        finally:
            for hook in hooks:
                hook.remove()
        return {name: found.least_distance() for name, found in moments.items() if found.counts}


class ClassMoments:
    """Means and variances of every filter's outputs, class by class, in one pass and float64."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.sums: dict[int, torch.Tensor] = {}
        self.squares: dict[int, torch.Tensor] = {}
        self.shift: torch.Tensor | None = None  # keeps squares small: no cancellation where means are large

    def add(self, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        """Take in outputs [N, F, d] of images with labels [N]."""
        if self.shift is None:
            self.shift = outputs.mean(0)
        elif self.shift.shape != outputs.shape[1:]:
            raise ValueError(
                f"select: 'tvs' without pool needs maps of one size; got {list(self.shift.shape)} and then "
                f"{list(outputs.shape[1:])}, filters and positions. Use pool=True."
            )
        centred = outputs - self.shift
        for label in np.unique(labels.numpy()).tolist():
            mine = centred[labels == label]
            if label not in self.counts:
                self.counts[label], self.sums[label] = 0, torch.zeros_like(self.shift)
                self.squares[label] = torch.zeros(len(self.shift), dtype=torch.float64)
            self.counts[label] += len(mine)
            self.sums[label] += mine.sum(0)
            self.squares[label] += (mine**2).sum((0, 2))

    def least_distance(self) -> FloatArray:
        """Return the least squared Hellinger distance [F] over all pairs of classes (thesis eq. 3.11)."""
        lonely = [label for label, count in self.counts.items() if count < 2]
        if len(self.counts) < 2 or lonely:
            which = f"class {lonely[0]} has one" if lonely else f"there is only class {next(iter(self.counts))}"
            raise ValueError(
                f"select: 'tvs' needs at least two images of each of two classes; {which}. Pass more data."
            )
        count = torch.tensor([self.counts[label] for label in self.counts], dtype=torch.float64)[:, None]
        means = torch.stack(list(self.sums.values())) / count[..., None]  # [C, F, d]
        spread = torch.stack(list(self.squares.values())) / count - (means**2).sum(2)
        variances: FloatArray = (spread / means.shape[2]).clamp_min(0).numpy()
        least = np.ones(means.shape[1])
        for c in range(len(means) - 1):
            gaps = ((means[c + 1 :] - means[c]) ** 2).sum(2).numpy()
            pairs = squared_hellinger(gaps, variances[c + 1 :], variances[c], means.shape[2])
            least = np.minimum(least, pairs.min(axis=0))
        return least


def squared_hellinger(gaps: FloatArray, first: FloatArray, second: FloatArray, d: int) -> FloatArray:
    """Return the squared Hellinger distance of N(mu1, first I) and N(mu2, second I) in d dimensions (eq. 3.9, 3.11).

    ``gaps`` are |mu1 - mu2|^2, ``first`` and ``second`` variances; they broadcast. Of two points, it is 0 if they
    coincide and 1 otherwise.
    """
    total = first + second
    points = total == 0
    safe = np.where(points, 1.0, total)
    ratio = np.where(points, 1.0, 2 * np.sqrt(first * second) / safe)
    exponent = np.where(points, np.where(gaps > 0, np.inf, 0.0), gaps / (4 * safe))
    distance: FloatArray = 1 - np.minimum(ratio, 1.0) ** (d / 2) * np.exp(-exponent)
    return distance


@dataclass(frozen=True)
class Taylor:
    """The loss that removing a filter costs to first order: the mean over images of |sum of gradient * map|.

    Maps are read behind the norm that alone reads a convolution, where there is one: that is what a mask zeroes. The
    loss is the cross-entropy, in eval mode. No gradient of a parameter is touched.

    Parameters
    ----------
    batches
        Read at most so many batches.
    """

    batches: int | None = None

    name = "taylor"
    needs = ("data",)
    label = "first-order loss"
    comparable = True

    def scores(self, model: nn.Module, context: Context) -> Mapping[str, FloatArray]:
        """Return the mean of |sum over positions of gradient * map|, [F] by layer."""
        sums: dict[str, torch.Tensor] = {}
        images_seen = 0
        read = {name: (context.norm(name) or ("", layer))[1] for name, layer in context.layers.items()}
        with running(model, context.device) as place, torch.enable_grad(), _caught(read) as maps:
            for images, labels in _batches(self, context):
                outputs = check_outputs("select", model(images.to(place)), len(images))
                check_labels("select", labels, outputs.shape[1])
                loss = F.cross_entropy(outputs, labels.to(outputs.device).long(), reduction="sum")
                for name, found in _contributions(loss, maps).items():
                    sums[name] = sums.get(name, 0) + found.abs().sum(0).cpu()
                images_seen += len(images)
                maps.clear()
        return {name: (total / images_seen).numpy() for name, total in sums.items()}


@contextmanager
def _caught(read: Mapping[str, nn.Module]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Keep the outputs of modules, in their graphs, under the names of the layers."""
    maps: dict[str, list[torch.Tensor]] = {}

    def catch(name: str) -> Callable[..., torch.Tensor]:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            own = output if output.requires_grad else output.detach().requires_grad_()  # all parameters are frozen
            maps.setdefault(name, []).append(own)
            return own.clone()  # an in-place activation behind may have this one

        return hook

    hooks = [module.register_forward_hook(catch(name)) for name, module in read.items()]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def _contributions(loss: torch.Tensor, maps: Mapping[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the sum over positions and calls of gradient * map, [N, F] float64 by layer."""
    flat = [one for several in maps.values() for one in several]
    gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    found = {}
    for name, several in maps.items():
        parts = [(one, next(gradients)) for one in several]
        products = [torch.zeros_like(one) if slope is None else one.detach() * slope for one, slope in parts]
        found[name] = torch.stack([one.double().flatten(2).sum(2) for one in products]).sum(0)
    return found


def _batches(criterion: TVS | Taylor, context: Context) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield images and labels of the data that may be used to choose."""
    if criterion.batches is not None and (isinstance(criterion.batches, bool) or criterion.batches < 1):
        raise ValueError(f"select: batches must be a whole number of at least 1; got {criterion.batches!r}.")
    empty = True
    for position, batch in enumerate(
        track(islice(context.data or (), criterion.batches), criterion.name, show=context.progress)
    ):
        images, labels = as_batch("select", batch, position)
        empty = False
        yield images, labels.cpu()
    if empty:
        raise ValueError(f"select: {criterion.name!r} needs data with at least one batch; the loader is empty.")
