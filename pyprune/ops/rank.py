"""Batched numerical matrix rank: how many singular values of each map exceed ``rtol * sigma_max``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyprune import machine
from pyprune.machine import Machine
from pyprune.ops import _reference
from pyprune.ops._reference import EPS32

if TYPE_CHECKING:
    import torch

NATIVE_SIDE = 256
"""Largest short side for the native kernels. For a single map LAPACK overtakes them between 256 and 320 (4.5 against
5.3 ms and 9.1 against 7.5 ms on one AVX-512 thread); batches of eight stay three times faster up to 512."""

NATIVE_RTOL = EPS32
"""Smallest ``rtol`` for the native kernels: the Gram form squares singular values and sees nothing far below."""

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def choose_rank(
    shape: Sequence[int], dtype: str, device: str, machine: Machine, rtol: float | None = None
) -> str:  # shape: [..., H, W]
    """Return the variant for such maps: 'cpu_avx512', 'cpu_avx2', 'cpu_baseline', 'reference' or 'torch_svd'."""
    if device != "cpu":
        return "torch_svd"
    if not machine.cpu_variants or min(shape[-2:]) > NATIVE_SIDE or (rtol is not None and rtol < NATIVE_RTOL):
        return "reference"
    return machine.cpu_variants[-1]


def matrix_rank(x: Any, *, rtol: float | None = None, check: bool = True, variant: str = "auto") -> Any:
    """Count the singular values of each map that exceed ``rtol`` times its largest one.

    Parameters
    ----------
    x
        [..., H, W] maps: a torch tensor, a numpy array, or anything else with ``__dlpack__``; float16, bfloat16,
        float32 or float64, any strides.
    rtol
        In [0, 1). By default max(H, W) * eps(float32), whatever the dtype, as numpy and torch define it for float32.
        Below eps(float32) the float64 SVD is used, because the kernels work on squared singular values.
    check
        Refuse maps with NaN or infinity. With ``False`` their rank is -1.
    variant
        ``"auto"``, or the name of one of :func:`rank_variants`.

    Returns
    -------
    int32 [...], the same kind as ``x``, on the same device.

    Raises
    ------
    ValueError
        If ``x`` has fewer than two dimensions, a map is not finite, ``rtol`` is out of range, or the variant is
        unknown, missing here, or made for another device.
    TypeError
        If ``x`` is no array or not of a floating type.

    Notes
    -----
    Exact up to singular values within a relative distance of 1 / (4 max(H, W)^2) of the threshold. A map costs
    about m^2 n / 2 + m^3 / 3 multiply-adds, m <= n its sides. docs/ops/rank.md has the method and its bounds.

    Examples
    --------
    >>> import numpy as np
    >>> import pyprune as pp
    >>> pp.matrix_rank(np.eye(3, 5, dtype=np.float32))
    array(3, dtype=int32)
    """
    if isinstance(x, np.ndarray):
        return _run(x, rtol=rtol, check=check, variant=variant)[0]
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"matrix_rank: x must be a torch tensor, a numpy array or have __dlpack__; got {type(x)!r}.")
    from pyprune.ops import _library

    return _like(x, _library.matrix_rank(_as_tensor(x), rtol, check, variant))


def on_tensor(x: torch.Tensor, rtol: float | None = None, check: bool = True, variant: str = "auto") -> torch.Tensor:
    """Compute the operator ``pyprune::matrix_rank``; x: [..., H, W] -> int32 [...]."""
    ranks, _ = _run(x.detach(), rtol=rtol, check=check, variant=variant)
    return ranks  # type: ignore[no-any-return]


def on_fake(x: torch.Tensor, rtol: float | None = None, check: bool = True, variant: str = "auto") -> torch.Tensor:
    """Return what :func:`on_tensor` would, without values, and refuse what it would refuse unseen."""
    import torch

    _check_rtol(rtol)
    _check_maps(x.shape, _dtype_name(x))
    if variant != "auto":
        _resolve(variant, x.shape, _dtype_name(x), x.device.type, rtol)
    return x.new_empty(x.shape[:-2], dtype=torch.int32)


def on_batch(info: Any, in_dims: tuple[int | None, ...], x: torch.Tensor, *options: Any) -> tuple[torch.Tensor, int]:
    """Rank a whole batch of vmap at once: it is one leading dimension more."""
    from pyprune.ops import _library

    return _library.matrix_rank(x.movedim(in_dims[0], 0), *options), 0  # type: ignore[arg-type]


def rank_variants(machine: Machine) -> tuple[str, ...]:
    """Return the names that ``variant=`` takes on such a machine."""
    return (*machine.cpu_variants, "reference", "torch_svd")


def _run(x: Any, *, rtol: float | None = None, check: bool = True, variant: str = "auto") -> tuple[Any, str]:
    """Return the ranks and the variant that computed them."""
    _check_rtol(rtol)
    maps = x if isinstance(x, np.ndarray) else _as_tensor(x)  # [..., H, W]
    shape = tuple(maps.shape)
    dtype, device = _dtype_name(maps), "cpu" if isinstance(maps, np.ndarray) else maps.device.type
    _check_maps(shape, dtype)
    name = _resolve(variant, shape, dtype, device, rtol)
    ranks = _compute(maps, rtol, name)
    bad = int((ranks < 0).sum()) if check else 0
    if bad:
        raise ValueError(
            f"matrix_rank: maps must be finite; {bad} of {math.prod(shape[:-2])} hold NaN or infinity. "
            "Find what makes them, or pass check=False to get -1 for these."
        )
    return ranks, name


def _as_tensor(x: Any) -> torch.Tensor:
    import torch

    return x if isinstance(x, torch.Tensor) else torch.utils.dlpack.from_dlpack(x)


def _dtype_name(maps: Any) -> str:
    return maps.dtype.name if isinstance(maps, np.ndarray) else str(maps.dtype).removeprefix("torch.")


def _check_rtol(rtol: float | None) -> None:
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"matrix_rank: rtol must be in [0, 1); got {rtol}.")


def _check_maps(shape: Sequence[int], dtype: str) -> None:
    if dtype not in _FLOATS:
        raise TypeError(f"matrix_rank: maps must be {', '.join(_FLOATS)}; got {dtype}. Convert them to float32.")
    if len(shape) < 2:
        raise ValueError(f"matrix_rank: maps must be [..., H, W]; got {list(shape)}.")


def _resolve(variant: str, shape: Sequence[int], dtype: str, device: str, rtol: float | None) -> str:
    here = machine.this_machine()
    if variant == "auto":
        return choose_rank(shape, dtype, device, here, rtol)
    if variant not in rank_variants(here):
        why = machine.cpu_variants().get(variant, "")
        raise ValueError(
            f"matrix_rank: variant {variant!r} is {f'not usable: {why}' if why else 'unknown'}; "
            f"here are auto, {', '.join(rank_variants(here))}."
        )
    if device != "cpu" and variant != "torch_svd":
        raise ValueError(
            f"matrix_rank: variant {variant!r} takes maps in host memory; these are on {device}. "
            "Pass x.cpu(), or variant='torch_svd'."
        )
    return variant


def _compute(maps: Any, rtol: float | None, name: str) -> Any:
    """Return int32 [...] ranks with -1 for maps that are not finite: a tensor for a tensor, else an array."""
    if name == "torch_svd":
        ranks = _torch_svd(maps, rtol)
        return ranks.numpy() if isinstance(maps, np.ndarray) else ranks
    if isinstance(maps, np.ndarray):
        return _on_array(maps, rtol, name)
    import torch

    array = (maps.float() if maps.dtype in (torch.float16, torch.bfloat16) else maps).resolve_neg().numpy()
    return torch.from_numpy(_on_array(array, rtol, name))


def _on_array(maps: npt.NDArray[Any], rtol: float | None, name: str) -> npt.NDArray[np.int32]:
    if maps.dtype == np.float16:
        maps = maps.astype(np.float32)
    if name == "reference":
        finite = np.isfinite(maps).all(axis=(-2, -1))
        return np.where(finite, _reference.matrix_rank(np.where(finite[..., None, None], maps, 0), rtol), np.int32(-1))
    from pyprune import _core

    rtol = max(maps.shape[-2:]) * EPS32 if rtol is None else rtol
    return _core.rank(_as_four(maps), rtol, name, machine.threads()).reshape(maps.shape[:-2])


def _as_four(maps: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return ``maps`` as [N, C, H, W], without a copy where two strides can walk the leading dimensions."""
    item = maps.dtype.itemsize
    if not (maps.dtype.isnative and maps.flags.aligned and all(stride % item == 0 for stride in maps.strides)):
        maps = np.array(maps, maps.dtype.newbyteorder("="), order="C")
    if maps.ndim > 4:
        return maps.reshape(math.prod(maps.shape[:-3]), *maps.shape[-3:])
    return maps[(None,) * (4 - maps.ndim)]


def _torch_svd(maps: Any, rtol: float | None) -> Any:
    import torch

    maps = torch.from_numpy(np.array(maps, np.float64)) if isinstance(maps, np.ndarray) else maps.double()
    if 0 in maps.shape:
        return torch.zeros(maps.shape[:-2], dtype=torch.int32, device=maps.device)
    finite = maps.isfinite().all(-1).all(-1)
    s = torch.linalg.svdvals(maps.where(finite[..., None, None], maps.new_zeros(())))  # [..., min(H, W)], descending
    rtol = max(maps.shape[-2:]) * EPS32 if rtol is None else rtol
    ranks = (s > rtol * s[..., :1]).sum(-1, dtype=torch.int32)
    return ranks.where(finite, ranks.new_full((), -1))


def _like(x: Any, ranks: Any) -> Any:
    """Return ``ranks`` as the kind of array that ``x`` is."""
    import torch

    if isinstance(x, torch.Tensor):
        return ranks
    root = sys.modules[type(x).__module__.partition(".")[0]]
    home = x.__array_namespace__() if hasattr(x, "__array_namespace__") else root
    return home.from_dlpack(ranks) if hasattr(home, "from_dlpack") else ranks
