"""Families of maps on which ranks are compared, as float32 [N, H, W]."""

import numpy as np

EPS32 = float(np.finfo(np.float32).eps)


def _frames(rng, N, rows, columns):
    """[N, rows, columns] with orthonormal columns."""
    return np.linalg.qr(rng.standard_normal((N, rows, columns)))[0]


def with_spectrum(rng, H, W, s):
    """Dense float64 maps [N, H, W] with singular values s [N, min(H, W)]."""
    N, m = s.shape
    return (_frames(rng, N, H, m) * s[:, None]) @ _frames(rng, N, W, m).swapaxes(1, 2)


def near_threshold(rng, N, H, W, low, high):
    """Float64 maps with singular values at t (1 +- f / (4 n^2)), f in [low, high], and their ranks.

    Float32 cannot hold such maps unless they are diagonal: its rounding alone moves a singular value further.
    """
    m, n = min(H, W), max(H, W)
    t = n * EPS32
    s = np.where(rng.random((N, 1)) < 0.5, 1.0, rng.uniform(0.05, 1, (N, m)))
    s[:, 0] = 1
    offset = rng.choice([-1, 1], (N, m)) * rng.uniform(low, high, (N, m)) / (4 * n * n)
    s = np.where(np.arange(m) >= rng.integers(1, m + 1, (N, 1)), t * (1 + offset), s)
    return with_spectrum(rng, H, W, s), (s > t).sum(axis=1)


def normal(rng, N, H, W):
    return rng.standard_normal((N, H, W))


def relu(rng, N, H, W):
    return np.maximum(rng.standard_normal((N, H, W)) - rng.uniform(-1, 1, (N, 1, 1)), 0)


def duplicated(rng, N, H, W):
    maps = rng.standard_normal((N, H, W))
    return maps[:, rng.integers(0, H, H)][:, :, rng.integers(0, W, W)]


def zero_padded(rng, N, H, W):
    return relu(rng, N, H, W) * (rng.random((N, H, 1)) < 0.6) * (rng.random((N, 1, W)) < 0.6)


def smooth(rng, N, H, W):
    cos_h = np.cos(np.pi * np.outer(np.arange(4), np.arange(H) + 0.5) / H)
    cos_w = np.cos(np.pi * np.outer(np.arange(4), np.arange(W) + 0.5) / W)
    return np.einsum("nkl,kh,lw->nhw", rng.standard_normal((N, 4, 4)), cos_h, cos_w)


def smooth_relu(rng, N, H, W):
    return np.maximum(smooth(rng, N, H, W), 0)


def log_uniform(rng, N, H, W):
    return with_spectrum(rng, H, W, 10.0 ** rng.uniform(-9, 0, (N, min(H, W))))


def at_noise(rng, N, H, W):
    """A plateau at the threshold, as float32 rounding leaves it."""
    m, n = min(H, W), max(H, W)
    s = np.where(np.arange(m) < rng.integers(1, m + 1, (N, 1)), 1, n * EPS32 * rng.uniform(0.5, 2, (N, m)))
    return with_spectrum(rng, H, W, s)


def weak_rows(rng, N, H, W):
    """First rows about as long as the threshold: their pivots vanish and the factors grow."""
    maps = rng.standard_normal((N, H, W))
    maps[:, : (H + 2) // 3] *= max(H, W) * EPS32 * 2.0 ** rng.uniform(-3, 3, (N, (H + 2) // 3, 1))
    return maps


def diagonal_near(rng, N, H, W):
    """Diagonal maps, exact in float32, with entries just outside the band around the threshold."""
    m, n = min(H, W), max(H, W)
    maps = np.zeros((N, H, W))
    offset = rng.choice([-1, 1], (N, m)) * rng.uniform(1.1, 2, (N, m)) / (4 * n * n)
    entries = np.where(rng.random((N, m)) < 0.5, 1, n * EPS32 * (1 + offset))
    entries[:, 0] = 1
    maps[:, np.arange(m), np.arange(m)] = entries
    return maps[:, rng.permutation(H)][:, :, rng.permutation(W)]


def rank_one(rng, N, H, W):
    return rng.standard_normal((N, H, 1)) * rng.standard_normal((N, 1, W))


def orthogonal(rng, N, H, W):
    return with_spectrum(rng, H, W, np.ones((N, min(H, W))))


def scaled(rng, N, H, W):
    return relu(rng, N, H, W) * 10.0 ** rng.uniform(-30, 30, (N, 1, 1))


def denormal(rng, N, H, W):
    return rng.standard_normal((N, H, W)) * 1e-42


FAMILIES = {
    family.__name__: family
    for family in (
        normal, relu, duplicated, zero_padded, smooth, smooth_relu, log_uniform, at_noise, weak_rows, diagonal_near,
        rank_one, orthogonal, scaled, denormal,
    )
}  # fmt: skip


def make(family, seed, N, H, W):
    return FAMILIES[family](np.random.default_rng(seed), N, H, W).astype(np.float32)
