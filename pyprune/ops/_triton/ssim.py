"""Kernel SSIM of all pairs by a Triton kernel, a tile of pairs to a program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from pyprune.ops._cuda_ssim import SUM_BITS, Found
from pyprune.ops.ssim import Constants, _statistics_of, _torch_slices, _wanted

SIDE = 32
"""Filters of a tile's side: eight pairs a thread of four warps. Not yet timed on a GPU."""

FLOAT_EPS = 2.0**-100, 2.0**100
"""Between these bounds on e, for weights below 1, every quotient of the formula is a normal float32."""


@triton.jit
def _ssim_kernel(
    rows, e_at, bad_at, psi, counters, thresholds, not_finite,
    F2, F1, K, stride_f1: tl.int64, stride_number: tl.int64, stride_psi: tl.int64,
    threshold_count, bins, sum_scale: tl.float64, unit: tl.float64,
    ALPHA: tl.constexpr, BETA: tl.constexpr, GAMMA: tl.constexpr,
    B: tl.constexpr, SIMPLE: tl.constexpr, MATRIX: tl.constexpr, STATISTICS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Compare B x B pairs of filters: the mean over channels of L^alpha C^beta S^gamma.

    Rows of numbers [F1, K + 2, F2] hold the K centred values of a slice over sqrt(K), its mean m and its deviation s,
    of all filters side by side. With them, for the slices x and y of a channel::

        L = (2 |mx my| + e) / (mx^2 + my^2 + e)
        C = (2 sx sy + e) / (sx^2 + sy^2 + e)
        S = (|sum_k cx_k cy_k| + e) / (sx sy + e)

    as ``_reference.kernel_ssim`` has it. Psi adds up in whole units (``unit`` of them make 1), so that no order shows.
    ``SIMPLE`` is beta = gamma = 1 in float32. ``counters``: counts above thresholds, bins, the sum of Psi.
    """
    tile_i, tile_j = tl.program_id(0), tl.program_id(1)
    if tile_i <= tile_j:
        i = tile_i * B + tl.arange(0, B)
        j = tile_j * B + tl.arange(0, B)
        in_i, in_j = i < F2, j < F2
        e = tl.load(e_at).to(rows.dtype.element_ty)
        bad = tl.load(bad_at)

        total = tl.zeros([B, B], tl.int64)
        for c in range(F1):
            at = rows + c * stride_f1
            sxy = tl.zeros([B, B], rows.dtype.element_ty)
            for k in range(K):
                x = tl.load(at + k * stride_number + i, mask=in_i, other=0.0)
                y = tl.load(at + k * stride_number + j, mask=in_j, other=0.0)
                sxy += x[:, None] * y[None, :]
            at += K * stride_number
            mx = tl.load(at + i, mask=in_i, other=0.0)[:, None]
            my = tl.load(at + j, mask=in_j, other=0.0)[None, :]
            sx = tl.load(at + stride_number + i, mask=in_i, other=0.0)[:, None]
            sy = tl.load(at + stride_number + j, mask=in_j, other=0.0)[None, :]
            L = (2 * tl.abs(mx * my) + e) / ((mx * mx + my * my) + e)
            if SIMPLE:  # rounded quotients: Triton's own are two units off
                C = tl.div_rn(2 * (sx * sy) + e, (sx * sx + sy * sy) + e)
                S = tl.div_rn(tl.abs(sxy) + e, sx * sy + e)
                part = tl.exp2(ALPHA * tl.log2(L)) * (C * S)
            else:
                C = (2 * (sx * sy) + e) / ((sx * sx + sy * sy) + e)
                S = (tl.abs(sxy) + e) / (sx * sy + e)
                part = tl.exp2(ALPHA * tl.log2(L) + (BETA * tl.log2(C) + GAMMA * tl.log2(S)))
            total += tl.floor(part.to(tl.float64) * unit + 0.5).to(tl.int64)

        mean = tl.minimum(total.to(tl.float64) / (unit * F1), 1.0).to(tl.float32)
        mean = tl.where(bad > 0, float("nan"), mean)
        row, column = i.to(tl.int64)[:, None], j.to(tl.int64)[None, :]
        valid = (row < column) & in_j[None, :]
        if MATRIX:
            tl.store(psi + row * stride_psi + column, mean, mask=valid)
            tl.store(psi + column * stride_psi + row, mean, mask=valid)
            one = tl.where(bad > 0, float("nan"), tl.zeros([B, B], tl.float32) + 1.0)
            tl.store(psi + row * stride_psi + column, one, mask=(row == column) & in_j[None, :])
        if STATISTICS:  # noqa: SIM102 (known when the kernel is compiled; the next when it runs)
            if bad == 0:
                exact = mean.to(tl.float64)
                for t in range(threshold_count):
                    above = valid & (exact > tl.load(thresholds + t))
                    tl.atomic_add(counters + t, tl.sum(tl.sum(above.to(tl.int64), 1), 0), sem="relaxed")
                bin_of = tl.minimum((exact * bins).to(tl.int32), bins - 1)
                one_each = tl.zeros([B, B], tl.int64) + 1
                tl.atomic_add(counters + threshold_count + bin_of, one_each, mask=valid, sem="relaxed")
                fixed = tl.where(valid, tl.floor(exact * sum_scale + 0.5), 0.0).to(tl.int64)
                tl.atomic_add(counters + threshold_count + bins, tl.sum(tl.sum(fixed, 1), 0), sem="relaxed")
        if COUNTS:
            first = (tile_i == 0) & (tile_j == 0)
            tl.atomic_add(not_finite, bad, mask=first & (bad > 0), sem="relaxed", scope="sys")


def matrices(
    layers: Sequence[torch.Tensor],
    constants: Sequence[tuple[float, float, float, float, float | None]],
    not_finite: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Return Psi of every layer, as :func:`pyprune.ops._cuda_ssim.matrices` does."""
    results = []
    for w, values in zip(layers, constants, strict=True):
        psi = torch.empty(len(w), len(w), dtype=torch.float32, device=w.device)
        _launch(w, Constants(*values), psi=psi, not_finite=not_finite)
        results.append(psi.double() if w.dtype == torch.float64 else psi)
    return results


def statistics(
    layers: Sequence[torch.Tensor],
    constants: Sequence[tuple[float, float, float, float, float | None]],
    thresholds: Sequence[float] = (),
    bins: int = 1,
    top: int = 0,
    nearest: bool = False,
    pairs: npt.NDArray[np.int64] | None = None,
) -> list[Found]:
    """Count and bin the pairs of every layer in the kernel; pick pairs, or look at given ones, from the matrix."""
    found = []
    for w, values in zip(layers, constants, strict=True):
        if top or nearest or pairs is not None:
            found.append(_from_matrix(w, values, thresholds, bins, top, nearest, pairs))
        else:
            found.append(_counted(w, Constants(*values), thresholds, bins))
    return found


def _counted(w: torch.Tensor, constants: Constants, thresholds: Sequence[float], bins: int) -> Found:
    pairs = len(w) * (len(w) - 1) // 2
    shift = min(SUM_BITS - max(pairs, 1).bit_length(), 52)
    counters = torch.zeros(len(thresholds) + bins + 2, dtype=torch.int64, device=w.device)
    limits = torch.tensor([*thresholds, 0.0], dtype=torch.float64, device=w.device)
    _launch(w, constants, counters=counters, thresholds=limits, bins=bins, shift=shift, not_finite=counters[-1:])
    numbers = counters.cpu().numpy()
    _refuse(int(numbers[-1]), w)
    counts, histogram, total, _ = np.split(numbers, np.cumsum([len(thresholds), bins, 1]))
    none, no_psi = np.zeros(0, np.int64), np.zeros(0, np.float32)
    mean = math.ldexp(int(total[0]), -shift) / pairs if pairs else math.nan
    return Found(pairs, mean, counts, histogram, none, none, no_psi, none, no_psi)


def _from_matrix(
    w: torch.Tensor,
    values: tuple[float, float, float, float, float | None],
    thresholds: Sequence[float],
    bins: int,
    top: int,
    nearest: bool,
    pairs: npt.NDArray[np.int64] | None,
) -> Found:
    bad = torch.zeros(1, dtype=torch.int64, device=w.device)
    psi = matrices([w], [values], bad)[0].float().cpu().numpy()
    _refuse(int(bad), w)
    of = _statistics_of(psi, _wanted(thresholds, bins, top, nearest, pairs, len(w)), "triton_tile")
    index, best = (of.nearest.index, of.nearest.psi) if of.nearest else (of.top.i[:0], of.top.psi[:0])
    return Found(of.pairs, of.mean, of.counts, of.histogram, of.top.i, of.top.j, of.top.psi, index, best)


def _refuse(bad: int, w: torch.Tensor) -> None:
    if bad:
        raise ValueError(f"kernel_ssim: weights must be finite; {bad} of {w.numel()} are NaN or infinite.")


def simple(w: torch.Tensor, constants: Constants) -> bool:
    """Say whether float32 does: the paper's beta and gamma, and an e that is sure to lie within FLOAT_EPS.

    The largest weight squared is at most 4 F2 F1 K mean squares, once it is scaled to lie below 1.
    """
    least = constants.eps / (4 * w.numel())
    sure = constants.eps_absolute is None and least >= FLOAT_EPS[0] and constants.eps <= FLOAT_EPS[1]
    return sure and constants.beta == constants.gamma == 1 and constants.alpha <= 1


def _launch(
    w: torch.Tensor,
    constants: Constants,
    psi: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    thresholds: torch.Tensor | None = None,
    bins: int = 1,
    shift: int = 0,
    not_finite: torch.Tensor | None = None,
) -> None:
    """Prepare rows with torch and run the kernel on the current stream."""
    is_simple = simple(w, constants)
    dtype = torch.float32 if is_simple else torch.float64
    bad = w.numel() - w.isfinite().sum()
    centred, m, s, e = _torch_slices(w.double(), constants)
    K = centred.shape[-1]
    rows = torch.empty(w.shape[1], K + 2, len(w), dtype=dtype, device=w.device)  # [F1, K + 2, F2]
    rows[:, :K], rows[:, K], rows[:, K + 1] = centred.permute(1, 2, 0), m.T, s.T
    tiles = triton.cdiv(len(w), SIDE)
    launch: Any = _ssim_kernel[(tiles, tiles)]
    with torch.cuda.device_of(w):
        launch(
            rows, e, bad, psi, counters, thresholds, not_finite,
            len(w), w.shape[1], K, rows.stride(0), rows.stride(1), len(w),
            0 if thresholds is None else len(thresholds) - 1, bins, 2.0**shift, 2.0**23 if is_simple else 2.0**40,
            ALPHA=float(constants.alpha), BETA=float(constants.beta), GAMMA=float(constants.gamma), B=SIDE,
            SIMPLE=is_simple, MATRIX=psi is not None, STATISTICS=counters is not None,
            COUNTS=not_finite is not None, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
