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
