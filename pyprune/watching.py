"""CKRM and ranks as a training signal: how redundant a network is, epoch by epoch, at next to no cost."""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median_low
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from pyprune import randomness
from pyprune.convolutions import Kernels, read_networks
from pyprune.datasets.labels import integer_labels
from pyprune.loggers import as_log
from pyprune.measure import model_device
from pyprune.ops.ssim import SsimStatistics, kernel_ssim_statistics, layer_statistics
from pyprune.ranks import RankAccumulator
from pyprune.redundancy import checked_thresholds, random_kernels
from pyprune.types import IntArray

LEVELS = (1.0, 1 / 4, 1 / 16)
"""Shares of the pairs and of the images that a measurement may take; few, because libraries prepare for each size."""

LEAST_FILTERS = 8
"""Of a layer, at any level: 28 pairs."""

EXPONENTS = (0.1, 1.0, 1.0)


class Watch:
    """Log the redundancy of a network while it is trained.

    Call it with the number of the epoch after every epoch of one's own loop, or give it to :func:`pyprune.finetune`
    as ``log=``: the rows of fine-tuning then go through it, with what it measures added. It changes no weight,
    gradient, buffer, training flag, hook or random state, so training ends with the same bits as without it.

    A row has, with the names of layers for ``<layer>``:

    - ``redundancy/lambda/<layer>``, the share of its pairs of filters with Psi above the first threshold (CKRM paper,
      section 3.2), ``redundancy/lambda_<t>/<layer>`` for further thresholds t, and ``redundancy/lambda_mean``;
    - ``redundancy/above_random/<layer>`` and ``..._mean``, the share above the 99 % point of random kernels of the
      layer's shape: 0.01 where kernels are like random ones;
    - with ``images``, ``ranks/mean/<layer>``, the mean rank of its feature maps; ``ranks/full/<layer>``, the share of
      R [F, C] at full rank, min(H, W); with labels also ``ranks/spread/<layer>``, how much the mean rank of a filter
      differs between classes (standard deviation, mean over the filters);
    - ``watch/pairs`` and ``watch/images``, the share of the pairs and the number of images that were taken;
      ``watch/seconds``, and ``watch/share`` of the time since the measurement before; ``watch/done``, in words.

    Building it draws the null of random kernels and measures at every level, to know what each costs.

    Parameters
    ----------
    model
        The network. Its weights are read in place at each call. Forward hooks of its layers fire for ``images``, too.
    images
        A few images whose feature maps are ranked: a tensor [N, C, H, W], or a batch (images, labels) for ranks by
        class. The model must then be traceable by torch.fx. Without them only kernels are compared.
    log
        Where the rows go: a path, for one JSON object a line (a row takes the place of those of its epoch and of later
        ones, so a continued run repeats none); any callable; an object with ``.add_scalar``, such as TensorBoard's
        SummaryWriter, ``.log_metrics`` or ``.log``; or several of these in a list.
    thresholds
        Every t of lambda^t, in [0, 1]; the paper takes 0.6.
    every
        Measure only in epochs that this divides.
    budget
        The share of the time since the measurement before that a measurement may take. Where a whole one would take
        more, the pairs among a half or a quarter of each layer's filters (a quarter or a sixteenth of the pairs) and
        as many fewer images are taken, drawn by ``seed`` and the same each time; where even that would, the epoch is
        skipped and the time goes on counting.
    eps
        As for :func:`pyprune.ckrm`.
    seed
        Of the random kernels, and of which filters are taken where not all are.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of range, the model has no pair of K x K kernels, the images are none, the model cannot be
        traced, or the log cannot be written. Once training goes on, weights or maps that are not finite are no
        error: the row says so.

    Examples
    --------
    >>> import torch
    >>> rows = []
    >>> watch = Watch(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU()), torch.rand(2, 1, 9, 9), log=rows.append)
    >>> for epoch in range(1, 3):
    ...     pass  # train
    ...     _ = watch(epoch)
    >>> [row["epoch"] for row in rows]
    [1, 2]
    """

    def __init__(
        self,
        model: nn.Module,
        images: torch.Tensor | Sequence[Any] | None = None,
        *,
        log: Any = "redundancy.jsonl",
        thresholds: float | Sequence[float] = (0.6,),
        every: int = 1,
        budget: float = 0.02,
        eps: float = 1e-2,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.thresholds = checked_thresholds("Watch", thresholds)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Watch: every must be a whole number of epochs, at least 1; got {every!r}.")
        if not 0 < budget <= 1:
            raise ValueError(f"Watch: budget must be a share of an epoch in (0, 1]; got {budget!r}.")
        if not 0 < eps < math.inf:
            raise ValueError(f"Watch: eps must be a positive, finite number; got {eps!r}.")
        self.every, self.budget, self._eps, self._seed = every, budget, eps, seed
        self._write = as_log("Watch", log)
        kernels = {name: one for name, one in self._kernels().items() if one.pairs}
        if not kernels:
            raise ValueError("Watch: needs a convolution with two K x K filters that read the same channels; none has.")
        self._null = {
            name: random_kernels(one.shape[1:], eps, self.thresholds, EXPONENTS, seed).point99
            for name, one in kernels.items()
        }
        self._all_pairs = sum(one.pairs for one in kernels.values())
        self._probes = {} if images is None else _probes(model, images)
        self._costs = {share: min([self._timed(share) for _ in range(3)][1:]) for share in LEVELS}
        self._paces = deque([1.0], maxlen=3)
        self._logging = deque([0.0], maxlen=3)  # seconds that the log takes, which may wait for a disk
        self._ended = perf_counter()

    def __call__(self, epoch: int | Mapping[str, Any]) -> dict[str, Any]:
        """Measure after ``epoch``, as far as the budget allows, and hand the row to the log.

        Parameters
        ----------
        epoch
            Its number, or a row of one's own with an ``"epoch"`` to which the measurements are added.

        Returns
        -------
        dict
            The row. In an epoch that ``every`` leaves out it is what came in, and a bare number is not logged.
        """
        row: dict[str, Any] = dict(epoch) if isinstance(epoch, Mapping) else {"epoch": epoch}
        number = row.get("epoch")
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"Watch: needs the number of an epoch, or a row that has one; got {number!r}.")
        if number % self.every:
            if len(row) > 1:
                self._write(row)
            return row
        began = perf_counter()
        share = self._affordable(began - self._ended)
        if share is None:
            least = self._costs[LEVELS[-1]] * median_low(self._paces) + median_low(self._logging)
            row["watch/done"] = f"skipped: {least:.2g} s is more than {self.budget:.2%} of {began - self._ended:.2g} s"
            self._write(row)
            return row
        row |= self._measured(share)
        measured = perf_counter()
        took = measured - began
        row |= {"watch/seconds": took, "watch/share": took / max(began - self._ended, 1e-9)}
        self._paces.append(took / max(self._costs[share], 1e-9))
        self._costs[share] = min(self._costs[share], took)
        self._write(row)
        self._ended = perf_counter()
        self._logging.append(self._ended - measured)
        return row

    def _affordable(self, seconds: float) -> float | None:
        """Return the largest level that fits into the budget of ``seconds``.

        A level costs the least that it ever did, times how much slower the machine is now, and the log's time. Of the
        last three measurements, of any level, the median says that: one that was held up changes nothing, and a
        machine that is fast again is noticed.
        """
        allowed = (self.budget * seconds - median_low(self._logging)) / median_low(self._paces)
        return next((one for one in LEVELS if self._costs[one] <= allowed), None)

    def _timed(self, share: float) -> float:
        began = perf_counter()
        self._measure(share)
        return perf_counter() - began

    def _measured(self, share: float) -> dict[str, Any]:
        try:
            return self._measure(share)
        except ValueError as error:  # weights or maps that are not finite: whoever trains says so, a watch looks on
            return {"watch/done": f"nothing: {error}"}

    def _measure(self, share: float) -> dict[str, Any]:
        with randomness.given_back(model_device(self.model)), torch.no_grad():
            row = self._redundancy(share)
            images = self._probes[share] if self._probes else None
            if images is not None:
                row |= images.ranks(self.model)
        row["watch/images"] = 0 if images is None else len(images.images)
        pairs = "all pairs" if row["watch/pairs"] == 1 else f"{row['watch/pairs']:.1%} of the pairs"
        row["watch/done"] = f"{pairs}, {row['watch/images']} images"
        return row

    def _kernels(self) -> Mapping[str, Kernels]:
        return read_networks("Watch", self.model)["network"].layers

    def _redundancy(self, share: float) -> dict[str, Any]:
        """Return lambda at every threshold and the share above the null, layer by layer and on average."""
        points = sorted(set(self._null.values()))
        found = self._statistics(share, (*self.thresholds, *points))
        row: dict[str, Any] = {}
        for i, t in enumerate(self.thresholds):
            key = f"redundancy/lambda_{t:g}" if i else "redundancy/lambda"
            row |= _with_mean(key, {name: one.counts[i] / one.pairs for name, one in found.items()})
        at = {name: len(self.thresholds) + points.index(point) for name, point in self._null.items()}
        above = {name: one.counts[at[name]] / one.pairs for name, one in found.items()}
        row |= _with_mean("redundancy/above_random", above)
        row["watch/pairs"] = sum(one.pairs for one in found.values()) / self._all_pairs
        return row

    def _statistics(self, share: float, thresholds: tuple[float, ...]) -> dict[str, SsimStatistics]:
        """Compare the pairs among a part of each layer's filters, all layers without groups in one call.

        A part of the filters and not of the pairs: pairs in any order cost fifteen times as much each as all of a
        matrix (on AVX-512, 17 layers of ResNet-50).
        """
        kernels = {name: one for name, one in self._kernels().items() if name in self._null}
        chosen = {name: self._filters(name, one, share) for name, one in kernels.items()}
        plain = {
            name: one.weight if share == 1 else one.weight[torch.from_numpy(chosen[name][0])]
            for name, one in kernels.items()
            if one.groups == 1
        }
        measured = layer_statistics(list(plain.values()), thresholds=thresholds, bins=1, eps=self._eps)
        found = dict(zip(plain, measured, strict=True))
        for name in kernels.keys() - found.keys():
            found[name] = kernel_ssim_statistics(
                kernels[name].weight, thresholds=thresholds, bins=1, pairs=_within(chosen[name]), eps=self._eps
            )
        return {name: found[name] for name in kernels}

    def _filters(self, name: str, kernels: Kernels, share: float) -> IntArray:
        """Return which filters are compared, [groups, filters of a group]; those of a level are among the next's."""
        in_group = kernels.shape[0] // kernels.groups
        count = min(in_group, max(LEAST_FILTERS, round(in_group * math.sqrt(share))))
        order = np.random.default_rng([self._seed, zlib.crc32(name.encode())]).permutation(in_group)
        first: IntArray = np.sort(order[:count]).astype(np.int64)
        return first + in_group * np.arange(kernels.groups)[:, None]


def _within(filters: IntArray) -> IntArray:
    """Return the pairs [P, 2] within each row of ``filters`` [groups, filters of a group]."""
    i, j = np.triu_indices(filters.shape[1], 1)
    return np.stack([filters[:, i], filters[:, j]], axis=-1).reshape(-1, 2)


def _with_mean(key: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{key}_mean": fmean(values.values()), **{f"{key}/{name}": float(x) for name, x in values.items()}}


@dataclass(frozen=True, eq=False)
class _Probe:
    """The images of one level, and what ranks their maps."""

    images: torch.Tensor
    labels: IntArray
    accumulator: RankAccumulator
    empty: Mapping[str, torch.Tensor]

    def ranks(self, model: nn.Module) -> dict[str, float]:
        """Return the mean rank, the share at full rank and the spread over classes of every layer's maps."""
        self.accumulator.load_state_dict(dict(self.empty))
        with self.accumulator:
            model(self.images.to(model_device(model)))
            self.accumulator.update(self.labels)
        ranks = self.accumulator.ranks()
        row = {f"ranks/mean/{name}": float(R.mean()) for name, R in ranks.layers.items()}
        row |= {f"ranks/full/{name}": ranks.full_rank_share(name) or 0.0 for name in ranks.layers}
        if ranks.num_classes > 1:
            row |= {f"ranks/spread/{name}": float(R.std(axis=1).mean()) for name, R in ranks.layers.items()}
        return row


def _probes(model: nn.Module, given: torch.Tensor | Sequence[Any]) -> dict[float, _Probe]:
    """Return the images of every level: all, or so many of them, evenly over the classes."""
    images, labels = _checked_images(given)
    order = np.argsort(labels, kind="stable")
    probes = {}
    for share in LEVELS:
        count = max(1, round(share * len(images)))
        some = np.sort(order[np.linspace(0, len(order) - 1, count).round().astype(np.int64)])
        classes, index = np.unique(labels[some], return_inverse=True)  # some of them may have no image here
        accumulator = RankAccumulator(model, num_classes=len(classes))
        chosen = images[torch.from_numpy(some)].detach().clone()
        probes[share] = _Probe(chosen, index.astype(np.int64), accumulator, accumulator.state_dict())
    return probes


def _checked_images(given: torch.Tensor | Sequence[Any]) -> tuple[torch.Tensor, IntArray]:
    """Return images [N, C, H, W] and labels [N], all of one class where there are none."""
    images, labels = given if isinstance(given, (tuple, list)) and len(given) == 2 else (given, None)
    if not isinstance(images, torch.Tensor) or images.ndim != 4 or not len(images):
        came = list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"Watch: images must be a tensor [N, C, H, W], or such images with labels; got {came}.")
    found = np.zeros(len(images), np.int64) if labels is None else integer_labels("Watch", labels)
    if len(found) != len(images):
        raise ValueError(f"Watch: needs one label per image; got {len(found)} labels for {len(images)} images.")
    return images, found
