"""All-pairs kernel SSIM: how alike the filters of a convolution are, slice by slice."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyprune import machine
from pyprune.hints import did_you_mean
from pyprune.machine import Machine
from pyprune.ops import _dlpack, _finite, _reference

if TYPE_CHECKING:
    import torch

_FLOATS = ("float16", "bfloat16", "float32", "float64")

_GPU_VARIANTS = {"cuda_tile": "pyprune.ops._cuda_ssim", "triton_tile": "pyprune.ops._triton.ssim"}

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
    """Return the variant for such weights.

    On the CPU the fastest native one, or ``"reference"``; on a GPU the compiled kernels, ``"cuda_tile"``, without them
    ``"triton_tile"``, and without either, or on another device, ``"torch_chunked"``.
    """
    if device == "cpu":
        return machine.cpu_variants[-1] if machine.cpu_variants else "reference"
    return next(name for name in ssim_variants(machine, device))


def ssim_variants(machine: Machine, device: str = "cpu") -> tuple[str, ...]:
    """Return the names that ``variant=`` takes on such a machine for weights on such a device."""
    native = (*machine.cpu_variants, "reference") if device == "cpu" else ()
    compiled = ("cuda_tile",) if device == "cuda" and machine.cuda else ()
    triton = ("triton_tile",) if machine.triton == device else ()
    return (*native, *compiled, *triton, "torch_chunked")


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
    if isinstance(w, np.ndarray):
        return _run(w, Constants(alpha, beta, gamma, eps, eps_absolute), variant)[0]
    _check_array(w)
    from pyprune.ops import _library

    if _library.is_tensor(w):
        return _library.kernel_ssim(w.detach(), alpha, beta, gamma, eps, eps_absolute, variant)
    with _dlpack.stream_of(w):
        here = _dlpack.view(w)
        psi = kernel_ssim(
            here, alpha=alpha, beta=beta, gamma=gamma, eps=eps, eps_absolute=eps_absolute, variant=variant
        )
        return _dlpack.like(w, psi)


def on_tensor(
    w: torch.Tensor,
    alpha: float = 0.1,
    beta: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-2,
    eps_absolute: float | None = None,
    variant: str = "auto",
) -> torch.Tensor:
    """Compute the operator ``pyprune::kernel_ssim``; w: [F2, F1, K1, K2] -> [F2, F2]."""
    psi, _ = _run(w.detach(), Constants(alpha, beta, gamma, eps, eps_absolute), variant)
    return psi  # type: ignore[no-any-return]


def on_fake(
    w: torch.Tensor,
    alpha: float = 0.1,
    beta: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-2,
    eps_absolute: float | None = None,
    variant: str = "auto",
) -> torch.Tensor:
    """Return what :func:`on_tensor` would, without values, and refuse what it would refuse unseen."""
    import torch

    Constants(alpha, beta, gamma, eps, eps_absolute)
    _check_weights(w.shape, _dtype_name(w))
    if variant != "auto":
        _resolve(variant, w.shape, _dtype_name(w), w.device.type, machine.this_machine())
    return w.new_empty((w.shape[0], w.shape[0]), dtype=torch.float64 if w.dtype == torch.float64 else torch.float32)


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
    _check_array(w)
    with _dlpack.stream_of(w):
        weights = _in_place(w)
        name, _ = _prepare(weights, variant)
        wanted = _wanted(thresholds, bins, top, nearest, pairs, weights.shape[0])
        return _statistics(weights, constants, wanted, name)


def layer_statistics(
    layers: Sequence[Any],
    *,
    thresholds: float | Sequence[float] = (0.6,),
    bins: int = 100,
    top: int = 0,
    nearest: bool = False,
    variant: str = "auto",
    **constants: Any,
) -> list[SsimStatistics]:
    """Return :func:`kernel_ssim_statistics` of many layers: on a GPU all in one launch, and one wait for their results.

    Parameters
    ----------
    layers
        Weights as for :func:`kernel_ssim`. Those on a GPU must be torch tensors on the same one.
    thresholds, bins, top, nearest, variant
        As for :func:`kernel_ssim_statistics`, the same of every layer.
    **constants
        ``alpha``, ``beta``, ``gamma``, ``eps`` and ``eps_absolute`` as for :func:`kernel_ssim`.

    Returns
    -------
    One :class:`SsimStatistics` for each layer.
    """
    values = Constants(**constants)
    for w in layers:
        _check_array(w)
    weights = [_in_place(w) for w in layers]
    names = [_prepare(w, variant)[0] for w in weights]
    wanted = [_wanted(thresholds, bins, top, nearest, None, len(w)) for w in weights]
    if set(names) == {"cuda_tile"} and len({w.device for w in weights}) == 1:
        return _gpu_statistics(weights, values, wanted[0], "cuda_tile")
    return [_statistics(w, values, one, name) for w, one, name in zip(weights, wanted, names, strict=True)]


def _run(w: Any, constants: Constants, variant: str = "auto") -> tuple[Any, str]:
    """Return Psi of an array or tensor, and the variant that computed it."""
    name, on_gpu = _prepare(w, variant)
    if on_gpu and not _finite.capturing():
        _finite.poll(w.device)
    psi = _matrix(w, constants, name)
    if isinstance(w, np.ndarray) == isinstance(psi, np.ndarray):
        return psi, name
    if isinstance(w, np.ndarray):
        return psi.numpy(), name
    import torch

    return torch.from_numpy(psi), name


def _prepare(w: Any, variant: str) -> tuple[str, bool]:
    """Check an array or tensor; return the variant for it, and whether a GPU counts what is not finite there."""
    dtype = _dtype_name(w)
    _check_weights(w.shape, dtype)
    if isinstance(w, np.ndarray):
        name = _resolve(variant, w.shape, dtype, "cpu", machine.this_machine())
        on_gpu = False
    else:
        name = _resolve(variant, w.shape, dtype, w.device.type, machine.this_machine(w.device.index or 0))
        on_gpu = w.is_cuda and name in _GPU_VARIANTS
    if name.startswith("cpu") or on_gpu:
        return name, on_gpu  # the kernel looks for NaN itself
    finite = np.isfinite(w) if isinstance(w, np.ndarray) else w.isfinite()
    bad = math.prod(w.shape) - int(finite.sum())
    if bad:
        raise ValueError(f"kernel_ssim: weights must be finite; {bad} of {math.prod(w.shape)} are NaN or infinite.")
    return name, False


def _check_array(w: Any) -> None:
    if not isinstance(w, np.ndarray) and not hasattr(w, "__dlpack__"):
        raise TypeError(f"kernel_ssim: w must be a torch tensor, a numpy array or have __dlpack__; got {type(w)!r}.")


def _in_place(w: Any) -> Any:
    """Return any array as numpy's or a tensor, without a copy."""
    if isinstance(w, np.ndarray):
        return w
    from pyprune.ops import _library

    return w.detach() if _library.is_tensor(w) else _dlpack.view(w)


def _check_weights(shape: Sequence[int], dtype: str) -> None:
    if dtype not in _FLOATS:
        raise TypeError(f"kernel_ssim: weights must be {', '.join(_FLOATS)}; got {dtype}. Convert them to float32.")
    if len(shape) != 4:
        how = _RESHAPE.get(len(shape), "")
        raise ValueError(f"kernel_ssim: weights must be [F2, F1, K1, K2]; got {list(shape)}. {how}".rstrip())
    if 0 in shape:
        raise ValueError(f"kernel_ssim: weights [F2, F1, K1, K2] must not be empty; got {list(shape)}.")


def _dtype_name(w: Any) -> str:
    return w.dtype.name if isinstance(w, np.ndarray) else str(w.dtype)[6:]  # without "torch."


def _resolve(variant: str, shape: Sequence[int], dtype: str, device: str, here: Machine) -> str:
    """Return the variant to run, after checking that a forced one can."""
    if variant == "auto":
        return choose_ssim(shape, dtype, device, here)
    names = ssim_variants(here, device)
    if variant in names:
        return variant
    some = f"here are auto, {', '.join(names)}"
    reasons = {
        **machine.cpu_variants(),
        "reference": "",
        "cuda_tile": "" if here.cuda else machine.cuda_reason(),
        "triton_tile": "" if here.triton else machine.triton_reason(bool(here.cuda) or device == "cuda"),
    }
    if variant not in reasons:
        raise ValueError(f"kernel_ssim: variant {variant!r} is unknown; {some}.{did_you_mean(variant, names)}")
    if reasons[variant]:
        raise ValueError(f"kernel_ssim: variant {variant!r} is not usable: {reasons[variant]}; {some}.")
    place = {"cuda_tile": "cuda", "triton_tile": here.triton}.get(variant, "cpu")
    held = "in host memory" if place == "cpu" else "on a GPU"
    where = "in host memory" if device == "cpu" else f"on {device}"
    raise ValueError(
        f"kernel_ssim: variant {variant!r} takes weights {held}; these are {where}. Pass w.to({place!r}); {some}."
    )


def _values(constants: Constants) -> tuple[float, float, float, float, float | None]:
    return constants.alpha, constants.beta, constants.gamma, constants.eps, constants.eps_absolute


def _matrix(weights: Any, constants: Constants, name: str) -> Any:
    """Return Psi [F2, F2], a tensor or an array."""
    if name == "torch_chunked":
        return _torch_matrix(weights, constants)
    if name in _GPU_VARIANTS:
        return _gpu_kernel(name).matrices([_tensor(weights)], [_values(constants)], _counter(weights))[0]
    array, dtype = _in_memory(weights)
    if name != "reference":
        from pyprune import _core

        return _core.ssim_matrix(array, _values(constants), name, machine.threads(), dtype)
    array = _widened(array, dtype)
    return _reference.kernel_ssim(array, *_values(constants)).astype(_result(array.dtype))


def _gpu_kernel(name: str) -> Any:
    return importlib.import_module(_GPU_VARIANTS[name])


def _tensor(weights: Any) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.array(weights)) if isinstance(weights, np.ndarray) else weights


def _counter(weights: Any) -> torch.Tensor | None:
    on_gpu = not isinstance(weights, np.ndarray) and weights.is_cuda
    return _finite.counter(weights.device, "kernel_ssim") if on_gpu and not _finite.capturing() else None


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
    if name in _GPU_VARIANTS:
        return _gpu_statistics([_tensor(weights)], constants, wanted, name)[0]
    if not name.startswith("cpu"):
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


def _gpu_statistics(
    layers: Sequence[torch.Tensor], constants: Constants, wanted: _Wanted, name: str
) -> list[SsimStatistics]:
    found = _gpu_kernel(name).statistics(
        layers,
        [_values(constants)] * len(layers),
        wanted.thresholds.tolist(),
        wanted.bins,
        wanted.top,
        wanted.nearest,
        wanted.pairs,
    )
    results = []
    for w, of in zip(layers, found, strict=True):
        kind = np.float64 if _dtype_name(w) == "float64" else np.float32
        top = MostSimilar(of.top_i, of.top_j, of.top_psi.astype(kind))
        nearest = Nearest(of.nearest, of.nearest_psi.astype(kind)) if wanted.nearest else None
        results.append(SsimStatistics(of.pairs, of.mean, of.counts, of.histogram, top, nearest, name))
    return results


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

    w = _tensor(weights)
    result = torch.float64 if w.dtype == torch.float64 else torch.float32
    centred, m, s, e = _torch_slices(w.double(), constants)
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


def _torch_slices(
    w: torch.Tensor, constants: Constants
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the centred slices of float64 weights [F2, F1, K], their means and deviations [F2, F1], and e."""
    scaled, e = _torch_scaled(w, constants)
    rows = scaled.flatten(2)
    shifted = rows - rows[..., :1]
    shift = shifted.mean(-1, keepdim=True)
    centred = (shifted - shift) / math.sqrt(rows.shape[-1])
    return centred, rows[..., 0] + shift[..., 0], centred.square().sum(-1).sqrt(), e


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
