"""Float64 definitions of the kernels, written for reading: what every variant is held against."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

EPS32 = float(np.finfo(np.float32).eps)


def matrix_rank(x: npt.ArrayLike, rtol: float | None = None) -> npt.NDArray[np.int32]:
    """Count the singular values above ``rtol * sigma_max``; x: [..., H, W] -> int32 [...].

    ``rtol`` defaults to max(H, W) * eps(float32), as numpy and torch define it for float32.
    """
    maps = np.asarray(x, np.float64)
    if 0 in maps.shape:
        return np.zeros(maps.shape[:-2], np.int32)
    s = np.linalg.svd(maps, compute_uv=False)  # [..., min(H, W)], descending
    rtol = max(maps.shape[-2:]) * EPS32 if rtol is None else rtol
    return np.asarray((s > rtol * s[..., :1]).sum(axis=-1), np.int32)


def silhouettes(x: npt.ArrayLike, labels: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return (b - a) / max(a, b) for every row of x [F, C]: float64 [F], 0 for a row alone in its cluster.

    ``a`` is the mean Euclidean distance to the others of the row's own cluster, ``b`` the least mean distance to the
    members of another (thesis eq. 4.2 to 4.4).
    """
    rows = np.asarray(x, np.float64)
    distances = np.stack([np.sqrt(np.square(rows - row).sum(axis=1)) for row in rows])
    member = np.asarray(labels)[:, None] == np.unique(labels)  # [F, K]
    sums, sizes = distances @ member, member.sum(axis=0)
    own = sizes[np.nonzero(member)[1]]
    a = sums[member] / np.maximum(own - 1, 1)
    b = np.where(member, np.inf, sums / sizes).min(axis=1)
    larger = np.maximum(a, b)
    return np.where((own > 1) & (larger > 0), (b - a) / np.where(larger > 0, larger, 1), 0.0)


def inertia(x: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the summed squared distances of the rows of x [F, C] to the means of their clusters (thesis eq. 4.1)."""
    rows, own = np.asarray(x, np.float64), np.asarray(labels)
    return float(sum(np.square(rows[own == k] - rows[own == k].mean(axis=0)).sum() for k in np.unique(own)))


def ssim_scaled(
    w: npt.ArrayLike, eps: float, eps_absolute: float | None = None
) -> tuple[npt.NDArray[np.float64], float]:
    """Return a layer divided by a power of two, so that its largest weight is in [0.5, 1), and e on that scale.

    ``e`` is ``eps`` times the mean square weight, or ``eps_absolute``. It is kept within 2^-600 and 2^200: beyond
    these psi hardly depends on it in float64. A layer of zeros gets e = 1, since all of its slices are alike.
    """
    weights = np.asarray(w, np.float64)
    largest = float(np.abs(weights).max(initial=0))
    if largest == 0:
        return weights, 1.0
    exponent = int(np.frexp(largest)[1])
    scaled = np.ldexp(weights, -exponent)
    if eps_absolute is None:
        e = eps * float(np.mean(np.square(scaled)))
    else:
        with np.errstate(over="ignore", under="ignore"):
            e = float(np.ldexp(eps_absolute, -2 * exponent))
    return scaled, min(max(e, 2.0**-600), 2.0**200)


def ssim_slices(
    scaled: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return every slice centred and divided by sqrt(K1 K2) [F2, F1, K1 K2], the means and the deviations [F2, F1].

    So a covariance is a plain product of two rows. Subtracting a slice's own first value before averaging makes the
    centred values of a constant slice exactly zero.
    """
    rows = scaled.reshape(*scaled.shape[:2], -1)
    shifted = rows - rows[..., :1]
    mean = shifted.mean(axis=-1)
    centred = (shifted - mean[..., None]) / np.sqrt(rows.shape[-1])
    return centred, rows[..., 0] + mean, np.sqrt(np.square(centred).sum(axis=-1))


def kernel_ssim(
    w: npt.ArrayLike,
    alpha: float = 0.1,
    beta: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-2,
    eps_absolute: float | None = None,
) -> npt.NDArray[np.float64]:
    """Return the mean over channels of L^alpha C^beta S^gamma for all pairs of filters: [F2, F1, K1, K2] -> [F2, F2].

    L = (2 |mx my| + e) / (mx^2 + my^2 + e), C = (2 sx sy + e) / (sx^2 + sy^2 + e), S = (|sxy| + e) / (sx sy + e).
    """
    scaled, e = ssim_scaled(w, eps, eps_absolute)
    centred, m, s = ssim_slices(scaled)
    psi = np.eye(len(m))
    for i in range(len(m) - 1):
        mx, my, sx, sy = m[i], m[i + 1 :], s[i], s[i + 1 :]
        sxy = np.einsum("ck,jck->jc", centred[i], centred[i + 1 :])
        luminance = (2 * np.abs(mx * my) + e) / (mx * mx + my * my + e)
        contrast = (2 * sx * sy + e) / (sx * sx + sy * sy + e)
        structure = (np.abs(sxy) + e) / (sx * sy + e)
        row = (luminance**alpha * contrast**beta * structure**gamma).mean(axis=-1)
        psi[i, i + 1 :] = psi[i + 1 :, i] = np.minimum(row, 1)
    return psi
