"""Batched numerical matrix rank: how many singular values of each map exceed ``rtol * sigma_max``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyprune import machine
from pyprune.hints import did_you_mean
from pyprune.machine import Machine
from pyprune.ops import _dlpack, _finite, _reference
from pyprune.ops._reference import EPS32

if TYPE_CHECKING:
    import torch

NATIVE_SIDE = 1024
"""Largest short side for the native kernels, up to which their promise is tested. They win everywhere: a single map of
1024 x 1024 takes 22 ms on one AVX-512 thread and 126 ms on a baseline one, LAPACK's float64 SVD 180 ms."""

NATIVE_RTOL = EPS32
"""Smallest ``rtol`` for all but the SVD: the Gram form squares singular values and sees nothing far below."""

TRITON_SIDE = 64
"""Largest short side for the Triton kernel, which keeps a whole Gram matrix in one program's registers."""

WORKSPACE = 1 << 28
"""Bytes of float64 copies that a variant by numpy or torch may hold at a time; more maps go block by block."""

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def choose_rank(
    shape: Sequence[int], dtype: str, device: str, machine: Machine, rtol: float | None = None
) -> str:  # shape: [..., H, W]
    """Return the variant for such maps.

    On the CPU that is the fastest native one, or ``"reference"``; on a GPU the first layout of the compiled kernels
    that is large enough, without them ``"triton"``, and beyond either ``"torch_eigvalsh"``, or ``"torch_svd"`` for an
    ``rtol`` below eps(float32).

    Raises
    ------
    ValueError
        If there is no variant for the device.
    """
    side = min(shape[-2:])
    fine = rtol is not None and rtol < NATIVE_RTOL
    if device == "cpu":
        return "reference" if not machine.cpu_variants or side > NATIVE_SIDE or fine else machine.cpu_variants[-1]
    if device == "meta":
        raise ValueError(
            "matrix_rank: maps must have values; these are on meta. Pass them from the device they are on."
        )
    if device != "cuda":
        raise ValueError(
            f"matrix_rank: maps must be on cpu or cuda; these are on {device}. Pass x.cpu(), or "
            "variant='torch_eigvalsh' if torch has float64 linear algebra there."
        )
    if fine:
        return "torch_svd"
    for layout, largest in machine.cuda:
        if side <= largest:
            return layout
    return "triton" if machine.triton == "cuda" and not machine.cuda and side <= TRITON_SIDE else "torch_eigvalsh"


def matrix_rank(x: Any, *, rtol: float | None = None, check: bool = True, variant: str = "auto") -> Any:
    """Count the singular values of each map that exceed ``rtol`` times its largest one.

    Parameters
    ----------
    x
        [..., H, W] maps: a torch tensor, a numpy array, a CuPy array or anything else with ``__dlpack__``; float16,
        bfloat16, float32 or float64, any strides, in host memory or on a GPU.
    rtol
        In [0, 1). By default max(H, W) * eps(float32), whatever the dtype, as numpy and torch define it for float32.
        Below eps(float32) the float64 SVD is used, because the kernels work on squared singular values.
    check
        Refuse maps with NaN or infinity. With ``False`` their rank is -1. On a GPU nothing waits for the answer: the
        rank is -1 at first, and a later call of pyprune raises once the device has got there. While a CUDA graph is
        recorded nothing is checked.
    variant
        ``"auto"``, or the name of one of :func:`rank_variants`.

    Returns
    -------
    int32 [...], the same kind as ``x``, on the same device, and on a GPU on the caller's stream. Ranks carry no
    gradient.

    Raises
    ------
    ValueError
        If ``x`` has fewer than two dimensions, a map is not finite, ``rtol`` is out of range, there is no variant for
        the device, or the variant is unknown, missing here, or made for another device or smaller maps.
    TypeError
        If ``x`` is no array or not of a floating type.
    BufferError
        If an array of another library cannot be read where it is.

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

    if _library.is_tensor(x):
        return _library.matrix_rank(x, rtol, check, variant)
    with _dlpack.stream_of(x):
        return _dlpack.like(x, matrix_rank(_dlpack.view(x), rtol=rtol, check=check, variant=variant))


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
        _resolve(variant, x.shape, _dtype_name(x), x.device.type, rtol, machine.this_machine())
    return x.new_empty(x.shape[:-2], dtype=torch.int32)


def on_batch(info: Any, in_dims: tuple[int | None, ...], x: torch.Tensor, *options: Any) -> tuple[torch.Tensor, int]:
    """Rank a whole batch of vmap at once: it is one leading dimension more."""
    from pyprune.ops import _library

    return _library.matrix_rank(x.movedim(in_dims[0], 0), *options), 0  # type: ignore[arg-type]


def rank_variants(machine: Machine, device: str = "cpu") -> tuple[str, ...]:
    """Return the names that ``variant=`` takes on such a machine for maps on such a device."""
    native = (*machine.cpu_variants, "reference") if device == "cpu" else ()
    compiled = tuple(layout for layout, _ in machine.cuda) if device == "cuda" else ()
    triton = ("triton",) if machine.triton == device else ()
    return (*native, *compiled, *triton, "torch_eigvalsh", "torch_svd")


def _run(x: Any, *, rtol: float | None = None, check: bool = True, variant: str = "auto") -> tuple[Any, str]:
    """Return the ranks of an array or tensor, and the variant that computed them."""
    _check_rtol(rtol)
    dtype, on_gpu = _dtype_name(x), False
    _check_maps(x.shape, dtype)
    if isinstance(x, np.ndarray):
        name = _resolve(variant, x.shape, dtype, "cpu", rtol, machine.this_machine())
    else:
        on_gpu = x.is_cuda
        name = _resolve(variant, x.shape, dtype, x.device.type, rtol, machine.this_machine(x.device.index or 0))
    if on_gpu and check:
        check = not _finite.capturing()
        if check:
            _finite.poll(x.device)
    counts = on_gpu and (name == "triton" or name.startswith("cuda"))
    ranks = _compute(x, rtol, name, dtype, check and counts)
    if check and not counts:
        _raise_not_finite(ranks)
    if isinstance(ranks, np.ndarray) and not isinstance(x, np.ndarray):
        import torch

        ranks = torch.from_numpy(ranks)
    return ranks, name


def _raise_not_finite(ranks: Any) -> None:
    bad = np.count_nonzero(ranks < 0) if isinstance(ranks, np.ndarray) else int((ranks < 0).sum())
    if bad:
        raise ValueError(
            f"matrix_rank: maps must be finite; {bad} of {math.prod(ranks.shape)} hold NaN or infinity. "
            "Find what makes them, or pass check=False to get -1 for these."
        )


def _dtype_name(maps: Any) -> str:
    return maps.dtype.name if isinstance(maps, np.ndarray) else str(maps.dtype)[6:]  # without "torch."


def _check_rtol(rtol: float | None) -> None:
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"matrix_rank: rtol must be in [0, 1); got {rtol}.")


def _check_maps(shape: Sequence[int], dtype: str) -> None:
    if dtype not in _FLOATS:
        raise TypeError(f"matrix_rank: maps must be {', '.join(_FLOATS)}; got {dtype}. Convert them to float32.")
    if len(shape) < 2:
        raise ValueError(f"matrix_rank: maps must be [..., H, W]; got {list(shape)}.")


def _resolve(
    variant: str, shape: Sequence[int], dtype: str, device: str, rtol: float | None, here: Machine
) -> str:  # shape: [..., H, W]
    """Return the variant to run, after checking that a forced one can."""
    if variant == "auto":
        return choose_rank(shape, dtype, device, here, rtol)
    if variant not in rank_variants(here, device):
        raise ValueError(_why_not(variant, device, here))
    largest = dict(here.cuda).get(variant, TRITON_SIDE if variant == "triton" else None)
    if largest is not None and min(shape[-2:]) > largest:
        raise ValueError(
            f"matrix_rank: variant {variant!r} takes maps with a short side of at most {largest}; "
            f"got {shape[-2]} x {shape[-1]}. Pass variant='auto'."
        )
    return variant


def _why_not(variant: str, device: str, here: Machine) -> str:
    """Say why a variant cannot run on maps on ``device``, and which can."""
    names = ("auto", *rank_variants(here, device))
    place = {"triton": here.triton or "cuda"}.get(variant, "cuda" if variant.startswith("cuda") else "cpu")
    reasons = {**machine.cpu_variants(), "triton": machine.triton_reason(bool(here.cuda) or device == "cuda")}
    if variant in dict(here.cuda) or (variant.startswith("cuda") and not here.cuda):
        reasons[variant] = machine.cuda_reason()
    if variant in {*reasons, "reference"} and device != place:
        held = "in host memory" if place == "cpu" else "on a GPU"
        where = "in host memory" if device == "cpu" else f"on {device}"
        return (
            f"matrix_rank: variant {variant!r} takes maps {held}; these are {where}. "
            f"Pass x.to({place!r}), or one of {', '.join(names)}."
        )
    if reasons.get(variant):
        return f"matrix_rank: variant {variant!r} is not usable: {reasons[variant]}; here are {', '.join(names)}."
    hint = did_you_mean(variant, names)
    return f"matrix_rank: variant {variant!r} is unknown; here are {', '.join(names)}.{hint}"


def _compute(maps: Any, rtol: float | None, name: str, dtype: str, counts: bool) -> Any:
    """Return int32 [...] ranks, an array or a tensor, with -1 for maps that are not finite."""
    if name.startswith("cpu"):
        return _native(maps, rtol, name, dtype)
    if name == "reference":
        return _by_numpy(maps, rtol)
    if name.startswith("torch"):
        return _by_torch(maps, rtol, _ranks_by_svd if name == "torch_svd" else _ranks_by_eigenvalues)
    if isinstance(maps, np.ndarray):  # Triton's interpreter takes tensors
        import torch

        maps = torch.from_numpy(np.array(maps))
        return _compute(maps, rtol, name, dtype, counts).numpy()
    counter = _finite.counter(maps.device) if counts else None
    if name == "triton":
        from pyprune.ops._triton.rank import rank as launch
    else:
        from pyprune.ops._cuda import rank as launch
    ranks, _ = launch(_as_four(maps.resolve_neg()), rtol, name, counter)
    return ranks.reshape(maps.shape[:-2])


def _native(maps: Any, rtol: float | None, name: str, dtype: str) -> npt.NDArray[np.int32]:
    from pyprune import _core

    array = _in_order(maps) if isinstance(maps, np.ndarray) else _as_array(maps, dtype)
    named: tuple[str, ...] = ()
    if dtype == "bfloat16":  # a kind that numpy does not know: its bits, and a name for them
        array, named = array.view(np.uint16), (dtype,)
    rtol = max(maps.shape[-2:]) * EPS32 if rtol is None else rtol
    return _core.rank(_as_four(array), rtol, name, machine.threads(), *named).reshape(maps.shape[:-2])


def _as_array(maps: torch.Tensor, dtype: str) -> npt.NDArray[Any]:
    """Return the array that shares the memory of a tensor; bfloat16 as the int16 of its bits."""
    import torch

    plain = maps.resolve_neg()
    return (plain.view(torch.int16) if dtype == "bfloat16" else plain).numpy()


def _in_order(maps: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return ``maps`` with elements as the kernels read them: native bytes, aligned, whole strides."""
    item = maps.dtype.itemsize
    if maps.dtype.isnative and maps.flags.aligned and all(stride % item == 0 for stride in maps.strides):
        return maps
    return np.array(maps, maps.dtype.newbyteorder("="), order="C")


def _as_four(maps: Any) -> Any:
    """Return ``maps`` as [N, C, H, W], without a copy where two strides can walk the leading dimensions."""
    if maps.ndim > 4:
        return maps.reshape(math.prod(maps.shape[:-3]), *maps.shape[-3:])
    return maps[(None,) * (4 - maps.ndim)]


def _blocks(shape: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Cut [N, C] maps into blocks that fit the workspace; a map takes three float64 copies and two matrices."""
    N, C, H, W = shape
    fit = max(1, WORKSPACE // (8 * (3 * H * W + 2 * min(H, W) ** 2 + 1)))
    n, c = max(1, fit // max(C, 1)), min(fit, max(C, 1))
    for i in range(0, N, n):
        for j in range(0, C, c):
            yield slice(i, i + n), slice(j, j + c)


def _by_numpy(maps: Any, rtol: float | None) -> npt.NDArray[np.int32]:
    """Rank by the float64 SVD of numpy, block by block."""
    four = _as_four(maps)
    ranks = np.empty(tuple(four.shape[:2]), np.int32)
    for block in _blocks(four.shape):
        part = four[block] if isinstance(maps, np.ndarray) else four[block].double().resolve_neg().numpy()
        part = np.array(part, np.float64)
        finite = np.isfinite(part).all(axis=(-2, -1))
        part[~finite] = 0
        ranks[block] = np.where(finite, _reference.matrix_rank(part, rtol), -1)
    return ranks.reshape(maps.shape[:-2])


def _by_torch(maps: Any, rtol: float | None, ranks_of: Callable[[torch.Tensor, float], torch.Tensor]) -> Any:
    """Rank by torch's float64 linear algebra on the maps' own device, block by block."""
    import torch

    four = _as_four(maps)
    is_array = isinstance(maps, np.ndarray)
    ranks = torch.zeros(tuple(four.shape[:2]), dtype=torch.int32, device="cpu" if is_array else maps.device)
    rtol = max(maps.shape[-2:]) * EPS32 if rtol is None else rtol
    for block in _blocks(four.shape) if 0 not in maps.shape else ():
        part = torch.from_numpy(np.array(four[block], np.float64)) if is_array else four[block].double()
        finite = part.isfinite().all(-1).all(-1)
        part = part.where(finite[..., None, None], part.new_zeros(()))
        ranks[block] = ranks_of(part, rtol).where(finite, ranks.new_full((), -1))
    ranks = ranks.reshape(maps.shape[:-2])
    return ranks.numpy() if is_array else ranks


def _ranks_by_svd(maps: torch.Tensor, rtol: float) -> torch.Tensor:  # float64 [..., H, W]
    import torch

    s: torch.Tensor = torch.linalg.svdvals(maps)  # [..., min(H, W)], descending
    return (s > rtol * s[..., :1]).sum(-1, dtype=torch.int32)


def _ranks_by_eigenvalues(maps: torch.Tensor, rtol: float) -> torch.Tensor:  # float64 [..., H, W]
    """Count the eigenvalues of the Gram matrix of the short side above rtol^2 times the largest."""
    import torch

    # A power of two for each map, made of exponent bits, keeps squares in range and every digit as it is.
    exponent = maps.abs().amax((-2, -1), keepdim=True).view(torch.int64) >> 52
    maps = maps * ((2046 - exponent).clamp(min=1) << 52).view(torch.float64)
    A = maps if maps.shape[-2] <= maps.shape[-1] else maps.mT
    eigenvalues: torch.Tensor = torch.linalg.eigvalsh(A @ A.mT)  # [..., min(H, W)], ascending
    return (eigenvalues > rtol**2 * eigenvalues[..., -1:]).sum(-1, dtype=torch.int32)
