"""Ranks by a Triton kernel, one Gram matrix to a program: short sides up to 64."""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from pyprune.ops._reference import EPS32

PROBES = tl.constexpr(32)  # points at which one Sturm pass counts: a warp


@triton.jit
def _count_above(G, shift, m, B: tl.constexpr, M: tl.constexpr):
    """Count the positive pivots of G - shift I = L D L^T; G: [B, M, M], shift: [B].

    The growth, sum_k |d_k| sum_i l_ik^2 over the negative pivots, bounds the error of the factors together with the
    trace of G. It is NaN where a pivot vanishes.
    """
    line = tl.arange(0, M)[None, :]
    eye = tl.arange(0, M)[None, :, None] == tl.arange(0, M)[None, None, :]
    G = G - tl.where(eye, shift[:, None, None], 0.0)
    positive = tl.zeros([B], tl.int32)
    growth = tl.zeros([B], tl.float64)
    for k in range(m):
        column = tl.sum(tl.where(line[:, None, :] == k, G, 0.0), 2)  # [B, M]
        d = tl.sum(tl.where(line == k, column, 0.0), 1)
        column = tl.where(line > k, column, 0.0)
        inverse = 1.0 / d
        positive += (d > 0).to(tl.int32)
        growth -= tl.where(d > 0, 0.0, d + tl.sum(column * column, 1) * inverse)
        G -= column[:, :, None] * column[:, None, :] * inverse[:, None, None]  # the product first: it stays symmetric
    return positive, growth


@triton.jit
def _tridiagonal(G, m, B: tl.constexpr, M: tl.constexpr):
    """Reduce G [B, M, M] by Householder reflections to a diagonal and a squared off-diagonal, both [B, M]."""
    line = tl.arange(0, M)[None, :]
    diagonal = tl.zeros([B, M], tl.float64)
    off2 = tl.zeros([B, M], tl.float64)  # off2[:, k] joins k - 1 and k; off2[:, 0] = 0
    for k in range(m):
        column = tl.sum(tl.where(line[:, None, :] == k, G, 0.0), 2)
        diagonal = tl.where(line == k, column, diagonal)
        v = tl.where(line > k, column, 0.0)
        norm2 = tl.sum(v * v, 1)
        off2 = tl.where(line == k + 1, norm2[:, None], off2)
        head = tl.sum(tl.where(line == k + 1, v, 0.0), 1)
        norm = tl.sqrt(norm2)
        long = tl.where(head > 0, head + norm, head - norm)  # no cancellation
        vv = norm2 - head * head + long * long
        v = tl.where(line == k + 1, long[:, None], v)
        # G <- (I - 2 v v^T / vv) G (I - 2 v v^T / vv) as G - v w^T - w v^T, w = p - (p.v / vv) v, p = 2 G v / vv.
        half = tl.where(vv > 0, 1.0 / tl.where(vv > 0, vv, 1.0), 0.0)
        p = tl.where(line > k, tl.sum(G * v[:, None, :], 2) * (2.0 * half)[:, None], 0.0)
        w = p - (tl.sum(p * v, 1) * half)[:, None] * v
        G -= v[:, :, None] * w[:, None, :] + w[:, :, None] * v[:, None, :]
    return diagonal, off2


@triton.jit
def _sturm(diagonal, off2, x, floor, m, M: tl.constexpr):
    """Count the eigenvalues above x [B, PROBES] of tridiagonal matrices: the positive terms of Sturm's sequence."""
    line = tl.arange(0, M)[None, :]
    q = x * 0.0 + 1.0
    count = (x * 0.0).to(tl.int32)
    for k in range(m):
        d = tl.sum(tl.where(line == k, diagonal, 0.0), 1)
        e2 = tl.sum(tl.where(line == k, off2, 0.0), 1)
        q = d[:, None] - x - e2[:, None] / q
        q = tl.where(tl.abs(q) < floor[:, None], -floor[:, None], q)
        count += (q > 0).to(tl.int32)
    return count


@triton.jit
def _rank_by_tridiagonal(G, lo, hi, rtol2, m, passes, B: tl.constexpr, M: tl.constexpr):
    """Close the bracket of sigma_max^2 by Sturm counts at PROBES points a pass, then count at the threshold."""
    diagonal, off2 = _tridiagonal(G, m, B, M)
    floor = hi * 4.930380657631324e-32  # 2^-104
    probe = tl.arange(0, PROBES)[None, :].to(tl.float64)
    for _ in range(passes):
        step = (hi - lo) / PROBES
        x = lo[:, None] + step[:, None] * probe
        inside = tl.sum((_sturm(diagonal, off2, x, floor, m, M) > 0).to(tl.int32), 1)
        hi = lo + step * inside.to(tl.float64)
        lo = lo + step * tl.where(inside > 0, inside - 1, 0).to(tl.float64)
    return tl.max(_sturm(diagonal, off2, (rtol2 * hi)[:, None] + 0.0 * probe, floor, m, M), 1)


@triton.jit
def _rank_kernel(
    maps, ranks, counter, total, C, m, n,
    stride_n: tl.int64, stride_c: tl.int64, stride_short: tl.int64, stride_long: tl.int64,
    rtol2: tl.float64, passes,
    B: tl.constexpr, M: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Rank B maps: #{s_i > rtol s_1} for the singular values s_i of a map A with sides m <= n.

    With G = A A^T in float64 that is the number of eigenvalues above rtol^2 s_1^2, which by Sylvester's law is the
    number of positive pivots of G - rtol^2 s_1^2 I. s_1^2 lies in [max(|G|^2 / trace G, max G_ii), |G|] (Frobenius),
    and equal counts at both ends decide. What is left is tridiagonalised in the same program: nothing goes back to
    the host. The same in numpy::

        s = np.linalg.svd(maps.astype(np.float64), compute_uv=False)
        rank = (s > rtol * s[..., :1]).sum(-1)
    """
    line = tl.arange(0, M)[None, :]
    index = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    valid = index < total
    start = maps + (index // C) * stride_n + (index % C) * stride_c
    element = start[:, None] + line.to(tl.int64) * stride_short  # [B, M]
    mask = valid[:, None] & (line < m)

    # Phase 1: a power of two for each float64 map, made of exponent bits, so that squares stay in range.
    factor = tl.zeros([B], tl.float64) + 1.0
    if maps.dtype.element_ty == tl.float64:
        top = tl.zeros([B, M], tl.float64)
        for k in range(n):
            top = tl.maximum(top, tl.abs(tl.load(element + k * stride_long, mask=mask, other=0.0)))
        exponent = tl.max(top, 1).to(tl.int64, bitcast=True) >> 52
        factor = (tl.maximum(2046 - exponent, 1) << 52).to(tl.float64, bitcast=True)

    # Phase 2: the Gram matrix of the short side and the bracket of its largest eigenvalue.
    G = tl.zeros([B, M, M], tl.float64)
    for k in range(n):
        a = tl.load(element + k * stride_long, mask=mask, other=0.0)
        if maps.dtype.element_ty != tl.float64:
            a = a.to(tl.float32)
        a = a.to(tl.float64) * factor[:, None]
        G += a[:, :, None] * a[:, None, :]
    diagonal = tl.sum(tl.where(line[:, :, None] == line[:, None, :], G, 0.0), 2)
    trace = tl.sum(diagonal, 1)
    square = tl.sum(tl.sum(G * G, 2), 1)
    finite = trace < float("inf")
    hi = tl.sqrt(square)
    lo = tl.maximum(square / tl.where(trace > 0, trace, 1.0), tl.max(diagonal, 1))

    # Phase 3: one count where all pivots are positive, two for most others.
    rank, growth = _count_above(G, rtol2 * hi, m, B, M)
    decided = (rank == m) | (trace == 0) | (finite == 0)
    if tl.min(decided.to(tl.int32), 0) == 0:
        below, growth_below = _count_above(G, rtol2 * lo, m, B, M)
        decided = decided | ((rank == below) & (growth <= trace) & (growth_below <= trace))

        # Phase 4: what neither end decides.
        if tl.min(decided.to(tl.int32), 0) == 0:
            slow = _rank_by_tridiagonal(G, lo, hi, rtol2, m, passes, B, M)
            rank = tl.where(decided, rank, slow)

    rank = tl.where(trace == 0, 0, rank)
    tl.store(ranks + index, tl.where(finite, rank, -1), mask=valid)
    if COUNTS:
        bad = tl.sum((valid & (finite == 0)).to(tl.int64), 0)
        tl.atomic_add(counter, bad, mask=bad > 0, sem="relaxed", scope="sys")


def blocking(side: int) -> tuple[int, int, int]:
    """Return maps a program, padded short side and warps: 4 to 16 float64 numbers of G for each thread.

    The most that compile for sm_80 and sm_90 without spilling registers; not yet timed on a GPU.
    """
    M = max(4, triton.next_power_of_2(side))
    return max(1, min(8, 256 // (M * M))), M, max(1, M * M // 512)


def rank(
    maps: torch.Tensor, rtol: float | None = None, layout: str = "triton", not_finite: torch.Tensor | None = None
) -> tuple[torch.Tensor, str]:
    """Launch the kernel on the current stream; maps: [N, C, H, W] -> int32 [N, C].

    ``not_finite`` is an int64 [1] that the device can reach; maps with NaN or infinity (rank -1) are added to it.
    """
    N, C, H, W = maps.shape
    ranks = torch.zeros((N, C), dtype=torch.int32, device=maps.device)
    if maps.numel() == 0:
        return ranks, layout
    (n, long), (m, short) = sorted([(W, maps.stride(3)), (H, maps.stride(2))], key=lambda side: -side[0])
    rtol = n * EPS32 if rtol is None else rtol
    passes = math.ceil(math.log2(32 * n * n) / math.log2(PROBES.value))  # to a sixteenth of the tolerated band
    B, M, warps = blocking(m)
    launch: Any = _rank_kernel[(triton.cdiv(N * C, B),)]
    with torch.cuda.device_of(maps):
        launch(
            maps, ranks, not_finite, N * C, C, m, n, maps.stride(0), maps.stride(1), short, long, rtol**2, passes,
            B=B, M=M, COUNTS=not_finite is not None, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return ranks, layout
