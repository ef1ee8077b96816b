"""All-pairs kernel SSIM: how alike the filters of a convolution are, slice by slice."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyprune import machine
from pyprune.machine import Machine
from pyprune.ops import _reference

if TYPE_CHECKING:
    import torch

_FLOATS = ("float16", "bfloat16", "float32", "float64")

_RESHAPE = {
    2: "Pass them before flattening.",
    3: "Those of a 1-d convolution go in as w[:, :, None], [F2, F1, 1, K].",
    5: "Those of a 3-d convolution go in as w.flatten(2)[:, :, None], [F2, F1, 1, K1 K2 K3].",
}


@dataclass(frozen=True)
class Constants:
    """The exponents and the constant of the three quotients, checked."""

    alpha: float = 0.1
    beta: float = 1.0
    gamma: float = 1.0
    eps: float = 1e-2
    eps_absolute: float | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"kernel_ssim: {name} must be finite and not negative; got {value}.")
        for name in ("eps", "eps_absolute"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(
                    f"kernel_ssim: {name} must be positive and finite; got {value}. "
                    "Without it slices of zeros divide zero by zero."
                )


@dataclass(frozen=True, eq=False)
class MostSimilar:
    """The most similar pairs, descending, ties by (i, j): i < j int64 [top], psi [top]."""

    i: npt.NDArray[np.int64]
    j: npt.NDArray[np.int64]
    psi: npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Nearest:
    """For every filter its most similar partner, the lowest on a tie: index int64 [F2], psi [F2].

    A filter without any pair has index -1 and psi NaN.
    """

    index: npt.NDArray[np.int64]
    psi: npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class SsimStatistics:
    """What :func:`kernel_ssim_statistics` found.

    Attributes
    ----------
    pairs
        How many pairs were looked at.
    mean
        Mean Psi over them; NaN without any.
    counts
        int64 [T], pairs with Psi > t for each threshold.
    histogram
        int64 [bins], equal bins on [0, 1]; pair Psi lies in bin floor(Psi * bins), 1 in the last.
    top, nearest
        Most similar pairs, and every filter's nearest twin where asked for.
    variant
        Which variant computed it.
    """

    pairs: int
    mean: float
    counts: npt.NDArray[np.int64]
    histogram: npt.NDArray[np.int64]
    top: MostSimilar
    nearest: Nearest | None
    variant: str


def choose_ssim(shape: Sequence[int], dtype: str, device: str, machine: Machine) -> str:  # shape: [F2, F1, K1, K2]
    """Return the variant for such weights: 'cpu_avx512', 'cpu_avx2', 'cpu_baseline', 'reference' or 'torch_chunked'."""
    if device != "cpu":
        return "torch_chunked"
    return machine.cpu_variants[-1] if machine.cpu_variants else "reference"


def ssim_variants(machine: Machine) -> tuple[str, ...]:
    """Return the names that ``variant=`` takes on such a machine."""
    return (*machine.cpu_variants, "reference", "torch_chunked")


def kernel_ssim(
    w: Any,
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-2,
    eps_absolute: float | None = None,
    variant: str = "auto",
) -> Any:
    """Compare every pair of filters by the structural similarity of their kernels.

    Parameters
    ----------
    w
        [F2, F1, K1, K2] weights of F2 filters over F1 input channels: a torch tensor, a numpy array, or anything else
        with ``__dlpack__``; float16, bfloat16, float32 or float64, any strides.
    alpha, beta, gamma
        Exponents of luminance, contrast and structure, not negative.
    eps
        The constant of the three quotients, as a share of the layer's mean square weight: slices whose variance is
        below count as alike. Psi does not change when the layer is scaled.
    eps_absolute
        The constant itself; wins over ``eps``.
    variant
        ``"auto"``, or the name of one of :func:`ssim_variants`.

    Returns
    -------
    Psi [F2, F2], the same kind as ``w``, on the same device; float64 for float64 weights, else float32. It is symmetric
    bit for bit, lies in [0, 1], and its diagonal is exactly 1.

    Raises
    ------
    ValueError
        If ``w`` is not 4-dimensional, empty or not finite, a constant is out of range, or the variant is unknown,
        missing here, or made for another device.
    TypeError
        If ``w`` is no array or not of a floating type.

    Notes
    -----
    Section 3 of the CKRM paper; here the structure term takes the absolute value before the constant is added, so that
    Psi(i, j) = 1 for W_i = -W_j whatever the constant. Within 1e-6 of the float64 definition. docs/ops/ssim.md has
    formula, error budget and variants.

    Examples
    --------
    >>> import numpy as np
    >>> import pyprune as pp
    >>> w = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    >>> pp.kernel_ssim(np.concatenate([w, -w]))
    array([[1., 1.],
           [1., 1.]], dtype=float32)
    """
    return _run(w, Constants(alpha, beta, gamma, eps, eps_absolute), variant)[0]


def kernel_ssim_statistics(
    w: Any,
    *,
    thresholds: float | Sequence[float] = (0.6,),
    bins: int = 100,
    top: int = 0,
    nearest: bool = False,
    pairs: Any = None,
    alpha: float = 0.1,
    beta: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-2,
    eps_absolute: float | None = None,
    variant: str = "auto",
) -> SsimStatistics:
    """Count, bin and pick the pairs of filters by kernel SSIM, without ever holding the [F2, F2] matrix.

    Parameters
    ----------
    w, alpha, beta, gamma, eps, eps_absolute, variant
        As for :func:`kernel_ssim`.
    thresholds
        Each in [0, 1]; pairs with Psi above are counted.
    bins
        Of the histogram over [0, 1].
    top
        How many of the most similar pairs to return.
    nearest
        Also return every filter's most similar partner.
    pairs
        int64 [P, 2] pairs of different filters to look at instead of all i < j; repeated ones count repeatedly.

    Returns
    -------
    SsimStatistics
        With numpy arrays, whatever ``w`` is.

    Raises
    ------
    ValueError
        As for :func:`kernel_ssim`; if a threshold or a pair is out of range, or ``top`` is more than there are pairs.
    TypeError
        If ``w`` is no array or not of a floating type, or ``pairs`` are not whole numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from pyprune.ops.ssim import kernel_ssim_statistics
    >>> w = np.random.default_rng(0).standard_normal((8, 4, 3, 3))
    >>> found = kernel_ssim_statistics(w, thresholds=(0.2, 0.6), top=3)
    >>> found.pairs, int(found.counts[0]) >= int(found.counts[1]), len(found.top.psi)
    (28, True, 3)
    """
    constants = Constants(alpha, beta, gamma, eps, eps_absolute)
    weights, name = _prepare(w, variant)
    wanted = _wanted(thresholds, bins, top, nearest, pairs, weights.shape[0])
    return _statistics(weights, constants, wanted, name)


def _run(w: Any, constants: Constants, variant: str = "auto") -> tuple[Any, str]:
    """Return Psi and the variant that computed it."""
    weights, name = _prepare(w, variant)
    return _like(w, _matrix(weights, constants, name)), name


def _prepare(w: Any, variant: str) -> tuple[Any, str]:
    """Return the weights as an array or a tensor, checked, and the variant for them."""
    weights = w if isinstance(w, np.ndarray) else _as_tensor(w)
    shape = tuple(weights.shape)
    if isinstance(weights, np.ndarray):
        dtype, device = weights.dtype.name, "cpu"
    else:
        dtype, device = str(weights.dtype).removeprefix("torch."), weights.device.type
    if dtype not in _FLOATS:
        raise TypeError(f"kernel_ssim: weights must be {', '.join(_FLOATS)}; got {dtype}. Convert them to float32.")
    if len(shape) != 4:
        how = _RESHAPE.get(len(shape), "")
        raise ValueError(f"kernel_ssim: weights must be [F2, F1, K1, K2]; got {list(shape)}. {how}".rstrip())
    if 0 in shape:
        raise ValueError(f"kernel_ssim: weights [F2, F1, K1, K2] must not be empty; got {list(shape)}.")
    name = _resolve(variant, shape, dtype, device)
    if name in machine.this_machine().cpu_variants:
        return weights, name  # the kernel looks for NaN itself
    finite = np.isfinite(weights) if isinstance(weights, np.ndarray) else weights.isfinite()
    bad = math.prod(shape) - int(finite.sum())
    if bad:
        raise ValueError(f"kernel_ssim: weights must be finite; {bad} of {math.prod(shape)} are NaN or infinite.")
    return weights, name


def _as_tensor(w: Any) -> torch.Tensor:
    if not hasattr(w, "__dlpack__"):
        raise TypeError(f"kernel_ssim: w must be a torch tensor, a numpy array or have __dlpack__; got {type(w)!r}.")
    import torch

    return w.detach() if isinstance(w, torch.Tensor) else torch.utils.dlpack.from_dlpack(w)


def _resolve(variant: str, shape: Sequence[int], dtype: str, device: str) -> str:
    here = machine.this_machine()
    if variant == "auto":
        return choose_ssim(shape, dtype, device, here)
    if variant not in ssim_variants(here):
        why = machine.cpu_variants().get(variant, "")
        raise ValueError(
            f"kernel_ssim: variant {variant!r} is {f'not usable: {why}' if why else 'unknown'}; "
            f"here are auto, {', '.join(ssim_variants(here))}."
        )
    if device != "cpu" and variant != "torch_chunked":
        raise ValueError(
            f"kernel_ssim: variant {variant!r} takes weights in host memory; these are on {device}. "
            "Pass w.cpu(), or variant='torch_chunked'."
        )
    return variant


def _values(constants: Constants) -> tuple[float, float, float, float, float | None]:
    return constants.alpha, constants.beta, constants.gamma, constants.eps, constants.eps_absolute


def _matrix(weights: Any, constants: Constants, name: str) -> Any:
    """Return Psi [F2, F2], a tensor or an array."""
    if name == "torch_chunked":
        return _torch_matrix(weights, constants)
    array, dtype = _in_memory(weights)
    if name != "reference":
        from pyprune import _core

        return _core.ssim_matrix(array, _values(constants), name, machine.threads(), dtype)
    array = _widened(array, dtype)
    return _reference.kernel_ssim(array, *_values(constants)).astype(_result(array.dtype))


def _in_memory(weights: Any) -> tuple[npt.NDArray[Any], str]:
    """Return weights as an array that C++ can read, bfloat16 as its bits, and their format."""
    if not isinstance(weights, np.ndarray):
        import torch

        weights = weights.resolve_neg()
        if weights.dtype == torch.bfloat16:
            return weights.view(torch.int16).numpy().view(np.uint16), "bfloat16"
        weights = weights.numpy()
    item = weights.dtype.itemsize
    if not (weights.dtype.isnative and weights.flags.aligned and all(step % item == 0 for step in weights.strides)):
        weights = np.array(weights, weights.dtype.newbyteorder("="), order="C")
    return weights, weights.dtype.name


def _widened(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Return weights as float32 or float64."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if dtype == "float16" else array


def _result(dtype: npt.DTypeLike) -> type[np.float32] | type[np.float64]:
    return np.float64 if np.dtype(dtype) == np.float64 else np.float32


@dataclass(frozen=True, eq=False)
class _Wanted:
    """What statistics are asked for, checked."""

    thresholds: npt.NDArray[np.float64]  # [T]
    bins: int
    top: int
    nearest: bool
    pairs: npt.NDArray[np.int64] | None  # [P, 2], i < j


def _wanted(thresholds: Any, bins: int, top: int, nearest: bool, pairs: Any, filters: int) -> _Wanted:
    limits = np.atleast_1d(np.asarray(thresholds, np.float64))
    if limits.ndim != 1 or not ((limits >= 0) & (limits <= 1)).all():
        raise ValueError(f"kernel_ssim_statistics: thresholds must be in [0, 1]; got {thresholds}.")
    if bins < 1:
        raise ValueError(f"kernel_ssim_statistics: bins must be at least 1; got {bins}.")
    chosen = None if pairs is None else _checked_pairs(pairs, filters)
    count = filters * (filters - 1) // 2 if chosen is None else len(chosen)
    if not 0 <= top <= count:
        raise ValueError(f"kernel_ssim_statistics: top must be between 0 and the {count} pairs there are; got {top}.")
    return _Wanted(limits, int(bins), int(top), bool(nearest), chosen)


def _checked_pairs(pairs: Any, filters: int) -> npt.NDArray[np.int64]:
    given = np.asarray(pairs.cpu() if hasattr(pairs, "cpu") else pairs)
    if given.size == 0:
        given = given.reshape(-1, 2).astype(np.int64)
    if given.dtype.kind not in "iu":
        raise TypeError(f"kernel_ssim_statistics: pairs must be whole numbers; got {given.dtype.name}.")
    if given.ndim != 2 or given.shape[1] != 2:
        raise ValueError(f"kernel_ssim_statistics: pairs must be [P, 2]; got {list(given.shape)}.")
    wrong = (given < 0).any(axis=1) | (given >= filters).any(axis=1) | (given[:, 0] == given[:, 1])
    if wrong.any():
        raise ValueError(
            f"kernel_ssim_statistics: pairs must be of two different filters in 0 .. {filters - 1}; "
            f"{int(wrong.sum())} of {len(given)} are not, the first is {given[wrong][0].tolist()}."
        )
    return np.sort(given.astype(np.int64), axis=1)


def _statistics(weights: Any, constants: Constants, wanted: _Wanted, name: str) -> SsimStatistics:
    if name not in machine.this_machine().cpu_variants:
        psi = _matrix(weights, constants, name)
        return _statistics_of(psi if isinstance(psi, np.ndarray) else psi.cpu().numpy(), wanted, name)
    from pyprune import _core

    array, dtype = _in_memory(weights)
    pairs, mean, counts, histogram, top_i, top_j, top_psi, index, index_psi = _core.ssim_statistics(
        array,
        _values(constants),
        wanted.thresholds.tolist(),
        wanted.bins,
        wanted.top,
        wanted.nearest,
        wanted.pairs,
        name,
        machine.threads(),
        dtype,
    )
    kind = _result(array.dtype)
    index_psi[index < 0] = math.nan
    nearest = Nearest(index, index_psi.astype(kind)) if wanted.nearest else None
    top = MostSimilar(top_i, top_j, top_psi.astype(kind))
    return SsimStatistics(pairs, mean, counts, histogram, top, nearest, name)


def _statistics_of(psi: npt.NDArray[Any], wanted: _Wanted, name: str) -> SsimStatistics:
    i, j = np.triu_indices(len(psi), 1) if wanted.pairs is None else (wanted.pairs[:, 0], wanted.pairs[:, 1])
    values = psi[i, j]
    exact = values.astype(np.float64)
    counts = np.array([(exact > t).sum() for t in wanted.thresholds], np.int64)
    bin_of = np.minimum((exact * wanted.bins).astype(np.int64), wanted.bins - 1)
    order = np.lexsort((j, i, -values))[: wanted.top]
    return SsimStatistics(
        pairs=len(values),
        mean=float(exact.mean()) if len(values) else math.nan,
        counts=counts,
        histogram=np.bincount(bin_of, minlength=wanted.bins).astype(np.int64),
        top=MostSimilar(i[order].astype(np.int64), j[order].astype(np.int64), values[order]),
        nearest=_nearest(len(psi), i, j, values) if wanted.nearest else None,
        variant=name,
    )


def _nearest(filters: int, i: npt.NDArray[Any], j: npt.NDArray[Any], values: npt.NDArray[Any]) -> Nearest:
    one, other, psi = np.concatenate([i, j]), np.concatenate([j, i]), np.concatenate([values, values])
    order = np.lexsort((other, -psi, one))
    owner, first = np.unique(one[order], return_index=True)
    index, best = np.full(filters, -1, np.int64), np.full(filters, np.nan, values.dtype)
    index[owner], best[owner] = other[order][first], psi[order][first]
    return Nearest(index, best)


def _torch_matrix(weights: Any, constants: Constants) -> torch.Tensor:
    """Psi by broadcasting in float64, a few rows at a time, on the weights' own device."""
    import torch

    w = torch.from_numpy(np.array(weights)) if isinstance(weights, np.ndarray) else weights
    result = torch.float64 if w.dtype == torch.float64 else torch.float32
    scaled, e = _torch_scaled(w.double(), constants)
    rows = scaled.flatten(2)  # [F2, F1, K]
    shifted = rows - rows[..., :1]
    shift = shifted.mean(-1, keepdim=True)
    m, centred = rows[..., 0] + shift[..., 0], (shifted - shift) / math.sqrt(rows.shape[-1])
    s = centred.square().sum(-1).sqrt()
    psi = torch.ones(len(w), len(w), dtype=result, device=w.device)
    for start, stop in _chunks(len(w), w.numel()):
        mx, sx = m[start:stop, None], s[start:stop, None]
        sxy = (centred[start:stop, None] * centred).sum(-1)
        luminance = (2 * (mx * m).abs() + e) / (mx * mx + m * m + e)
        contrast = (2 * sx * s + e) / (sx * sx + s * s + e)
        structure = (sxy.abs() + e) / (sx * s + e)
        part = luminance**constants.alpha * contrast**constants.beta * structure**constants.gamma  # [rows, F2, F1]
        psi[start:stop] = part.mean(-1).clamp_(max=1)
    upper = psi.triu(1)
    return upper + upper.T + torch.eye(len(w), dtype=result, device=w.device)


def _chunks(filters: int, numel: int) -> Iterator[tuple[int, int]]:
    rows = max(1, (1 << 22) // numel)  # 32 MiB of float64 a temporary
    for start in range(0, filters, rows):
        yield start, min(start + rows, filters)


def _torch_scaled(w: torch.Tensor, constants: Constants) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    exponent = torch.frexp(w.abs().max()).exponent
    half = -exponent // 2  # ldexp multiplies by a power that could overflow
    scaled = torch.ldexp(torch.ldexp(w, half), -exponent - half)
    if constants.eps_absolute is None:
        e = constants.eps * scaled.square().mean()
    else:
        absolute = torch.tensor(constants.eps_absolute, dtype=torch.float64, device=w.device)
        e = torch.ldexp(torch.ldexp(absolute, -exponent), -exponent)
    return scaled, torch.where((w == 0).all(), torch.ones_like(e), e.clamp(2.0**-600, 2.0**200))


def _like(w: Any, psi: Any) -> Any:
    """Return ``psi`` as the kind of array that ``w`` is."""
    if isinstance(w, np.ndarray):
        return psi if isinstance(psi, np.ndarray) else psi.cpu().numpy()
    import torch

    psi = torch.from_numpy(psi) if isinstance(psi, np.ndarray) else psi
    if isinstance(w, torch.Tensor):
        return psi
    root = sys.modules[type(w).__module__.partition(".")[0]]
    home = w.__array_namespace__() if hasattr(w, "__array_namespace__") else root
    return home.from_dlpack(psi) if hasattr(home, "from_dlpack") else psi
