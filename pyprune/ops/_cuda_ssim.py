"""Kernel SSIM by the compiled GPU kernels: many layers in one launch, on torch's current stream of their device.

Matrices come without waiting for the device, so a CUDA graph can capture them; statistics wait once, at the end.
Callers check meaning. Tensors in host memory go through the kernels' twin on the host, as tests of the kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyprune import _core

if TYPE_CHECKING:
    import torch

Constants = tuple[float, float, float, float, float | None]
"""alpha, beta, gamma, eps, eps_absolute."""

BAND = 64
"""Filters: the kernels take bands of rows that start at a multiple."""

BAND_PAIRS = 1 << 24
"""Pairs whose Psi is held at a time to find the most similar ones: 64 MiB, and three times that to sort them."""

SUM_BITS = 62
"""Of a sum of Psi in fixed point."""


@dataclass(frozen=True)
class How:
    """Options of the twin: the order of threads and blocks, and where in their bounds approximations lie (-1, 0, 1)."""

    backwards: bool = False
    worst: int = 0


def matrices(
    layers: Sequence[torch.Tensor],
    constants: Sequence[Constants],
    not_finite: torch.Tensor | None = None,
    how: How = How(),
) -> list[torch.Tensor]:
    """Return Psi of every layer, all from one launch of each kernel.

    Parameters
    ----------
    layers
        [F2, F1, K1, K2] weights on one device.
    constants
        For every layer; the same layer may come several times, with other constants.
    not_finite
        int64 [1]: the number of weights with NaN or infinity is added to it. Psi of such a layer is NaN throughout.

    Returns
    -------
    For every layer [F2, F2]: float64 for float64 weights, else float32; single precision in either case.
    """
    import torch

    items, keep = [], []
    for w, values in zip(layers, constants, strict=True):
        item, held = _item(w, values)
        psi = torch.empty(w.shape[0], w.shape[0], dtype=torch.float32, device=w.device)
        items.append({**item, "matrix": psi.data_ptr()})
        keep.append((psi, held))
    _launch(items, layers[0].device, keep, not_finite, how)
    return [psi.double() if w.dtype == torch.float64 else psi for w, (psi, _) in zip(layers, keep, strict=True)]


@dataclass(frozen=True, eq=False)
class Found:
    """What :func:`statistics` finds of a layer, as ``_core.ssim_statistics`` returns it."""

    pairs: int
    mean: float
    counts: npt.NDArray[np.int64]
    histogram: npt.NDArray[np.int64]
    top_i: npt.NDArray[np.int64]
    top_j: npt.NDArray[np.int64]
    top_psi: npt.NDArray[np.float32]
    nearest: npt.NDArray[np.int64]  # -1 without pairs
    nearest_psi: npt.NDArray[np.float32]


def statistics(
    layers: Sequence[torch.Tensor],
    constants: Sequence[Constants],
    thresholds: Sequence[float] = (),
    bins: int = 0,
    top: int = 0,
    nearest: bool = False,
    pairs: npt.NDArray[np.int64] | None = None,
    how: How = How(),
) -> list[Found]:
    """Count, bin and pick the pairs of every layer: the same of each, in one launch unless ``top`` needs bands.

    ``pairs``: int64 [P, 2] of filters i < j to look at in every layer, instead of all.

    Raises
    ------
    ValueError
        If a weight is not finite.
    """
    import torch

    device = layers[0].device
    asked = torch.tensor([*thresholds], dtype=torch.float64, device=device)
    jobs = [
        _Job(w, values, len(thresholds), bins, top, nearest, pairs) for w, values in zip(layers, constants, strict=True)
    ]
    offsets = np.cumsum([1, *(job.counters for job in jobs)])
    counters = torch.zeros(int(offsets[-1]), dtype=torch.int64, device=device)
    bands = [list(_bands(job.filters, BAND_PAIRS if top and pairs is None else None)) for job in jobs]
    for band in range(max(map(len, bands))):
        now = [(job, at, b[band]) for job, at, b in zip(jobs, offsets, bands, strict=False) if band < len(b)]
        items = [job.item(counters[at:], asked, first, last) for job, at, (first, last) in now]
        _launch(items, device, [job.keep for job, _, _ in now], counters, how)
        for job, _, (first, last) in now:
            job.merge_top(first, last)
    numbers = counters.cpu().numpy()
    if numbers[0]:
        of = f" of {layers[0].numel()}" if len(layers) == 1 and max(map(len, bands)) == 1 else ""
        raise ValueError(f"kernel_ssim: weights must be finite; {numbers[0]}{of} are NaN or infinite.")
    return [job.found(numbers[at:]) for job, at in zip(jobs, offsets, strict=False)]


class _Job:
    """One layer of :func:`statistics`: its memory, and how its counters are laid out (counts, bins, sum, nearest)."""

    def __init__(
        self,
        w: torch.Tensor,
        constants: Constants,
        thresholds: int,
        bins: int,
        top: int,
        nearest: bool,
        pairs: npt.NDArray[np.int64] | None,
    ) -> None:
        import torch

        self.filters, self.thresholds, self.bins, self.top = w.shape[0], thresholds, bins, top
        self.nearest = self.filters if nearest else 0
        self.counters = thresholds + bins + 1 + self.nearest
        # In order of (i, j), so that a stable sort by Psi breaks ties as it should.
        self.pairs = None if pairs is None else pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
        self.count = self.filters * (self.filters - 1) // 2 if pairs is None else len(pairs)
        self.shift = SUM_BITS - max(self.count, 1).bit_length()
        given = None if self.pairs is None else torch.from_numpy(self.pairs).to(w.device)
        self._item, held = _item(w, constants, given)
        self.keep = (given, *held)
        self._psi = torch.empty(0, device=w.device)
        self._best = torch.empty(0, device=w.device), torch.empty(0, dtype=torch.int64, device=w.device)

    def item(self, counters: torch.Tensor, thresholds: torch.Tensor, first: int, last: int) -> dict[str, Any]:
        at = counters.data_ptr()
        item = {
            **self._item,
            "first": first,
            "last": last,
            "thresholds": thresholds.data_ptr(),
            "threshold_count": self.thresholds,
            "counts": at,
            "bins": self.bins,
            "histogram": at + 8 * self.thresholds,
            "sum": at + 8 * (self.thresholds + self.bins),
            "sum_shift": self.shift,
        }
        if self.nearest:
            item["nearest"] = at + 8 * (self.thresholds + self.bins + 1)
        if self.top:
            here = self._before(last) - self._before(first) if self.pairs is None else self.count
            self._psi = thresholds.new_empty(here, dtype=self._psi.dtype)
            item["psi"] = self._psi.data_ptr()
        return item

    def merge_top(self, first: int, last: int) -> None:
        """Join the most similar pairs so far, Psi and index, with those of a band: earlier pairs stand first."""
        if not self.top:
            return
        import torch

        index = torch.arange(len(self._psi), device=self._psi.device) + (
            self._before(first) if self.pairs is None else 0
        )
        psi, index = torch.cat((self._best[0], self._psi)), torch.cat((self._best[1], index))
        order = torch.sort(psi, descending=True, stable=True).indices[: self.top]
        self._best = psi[order], index[order]

    def found(self, numbers: npt.NDArray[np.int64]) -> Found:
        counts, histogram, total, keys = np.split(numbers[: self.counters], np.cumsum([self.thresholds, self.bins, 1]))
        packed = keys.view(np.uint64)
        partner = (~packed & np.uint64(0xFFFFFFFF)).astype(np.int64)
        psi = (packed >> np.uint64(32)).astype(np.uint32).view(np.float32)
        top_i, top_j = self._pair(self._best[1].cpu().numpy())
        return Found(
            self.count,
            math.ldexp(int(total[0]), -self.shift) / self.count if self.count else math.nan,
            counts.copy(),
            histogram.copy(),
            top_i,
            top_j,
            self._best[0].cpu().numpy(),
            np.where(packed > 0, partner, -1),
            np.where(packed > 0, psi, np.float32(math.nan)),
        )

    def _before(self, row: int) -> int:
        """Return how many pairs have i < row."""
        return row * self.filters - row * (row + 1) // 2

    def _pair(self, index: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        if self.pairs is not None:
            return self.pairs[index, 0], self.pairs[index, 1]
        rows = np.arange(self.filters, dtype=np.int64)
        starts = rows * self.filters - rows * (rows + 1) // 2
        i = np.searchsorted(starts, index, side="right") - 1
        i = np.minimum(i, max(self.filters - 2, 0))
        return i, index - starts[i] + i + 1


def _bands(filters: int, most_pairs: int | None) -> Iterator[tuple[int, int]]:
    """Cut the rows of the matrix into bands of at most so many pairs, or of BAND rows."""
    rows = filters if most_pairs is None else max(BAND, most_pairs // filters // BAND * BAND)
    for first in range(0, filters, rows):
        yield first, min(first + rows, filters)


def _item(
    w: torch.Tensor, constants: Constants, pairs: torch.Tensor | None = None
) -> tuple[dict[str, Any], tuple[torch.Tensor, torch.Tensor]]:
    """Describe a layer to the kernels; the tensors are the memory that they read and write meanwhile."""
    import torch

    w = w if w.dtype in (torch.float32, torch.float64) else w.float()
    w = w.resolve_neg().contiguous()
    F2, F1, K1, K2 = w.shape
    item = {
        "weights": w.data_ptr(),
        "shape": (F2, F1, K1 * K2),
        "constants": constants,
        "float64": w.dtype == torch.float64,
    }
    if pairs is not None:
        item.update(pairs=pairs.data_ptr() or 1, pair_count=len(pairs))  # no pairs at all have no address
    scratch = torch.empty(_core.ssim_scratch(item) // 8, dtype=torch.int64, device=w.device)
    return {**item, "scratch": scratch.data_ptr()}, (w, scratch)


def _launch(
    items: Sequence[dict[str, Any]],
    device: torch.device,
    keep: object,
    not_finite: torch.Tensor | None,
    how: How,
) -> None:
    """Run the kernels; ``keep`` must live until they are enqueued, and from then on the stream's order protects it."""
    import torch

    counter = 0 if not_finite is None else not_finite.data_ptr()
    if device.type == "cpu":
        _core.ssim_twin(items, not_finite=counter, backwards=how.backwards, worst=how.worst)
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
        _core.ssim_cuda(items, not_finite=counter, stream=stream, device=device.index)
    del keep
