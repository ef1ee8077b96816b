"""CKRM, the convolutional kernel redundancy measure (CKRM paper, section 3.2): weights in, lambda per layer out."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pyprune import progress as bars
from pyprune.convolutions import Kernels, Network, read_networks
from pyprune.hints import did_you_mean
from pyprune.ops.ssim import Nearest, SsimStatistics, kernel_ssim, kernel_ssim_statistics
from pyprune.types import BINS, CKRM, EPSILONS, FloatArray, IntArray, LayerRedundancy, RandomKernels

CONFIDENCE = 0.95
"""Of the Wilson intervals."""

NULL_SLICE_PAIRS = 1 << 23
"""Slice pairs that a null may cost: 256 random filters up to F1 = 256 and fewer beyond, where the spread is small."""


@dataclass(frozen=True)
class _Measure:
    """What is asked of every layer."""

    thresholds: tuple[float, ...]
    pairs: int | Mapping[str, int] | None
    seed: int
    eps: float
    eps_absolute: float | None
    exponents: tuple[float, float, float]
    top: int
    null: bool
    variant: str


def ckrm(
    model_or_weights: Any,
    *,
    thresholds: float | Sequence[float] = (0.6,),
    pairs: int | Mapping[str, int] | None = None,
    seed: int = 0,
    eps: float = 1e-2,
    eps_absolute: float | None = None,
    alpha: float = 0.1,
    beta: float = 1.0,
    gamma: float = 1.0,
    layers: Iterable[str] | None = None,
    include_1x1: bool = False,
    top: int = 10,
    null: bool = True,
    variant: str = "auto",
    progress: bool = True,
) -> CKRM:
    """Measure how many pairs of filters in each convolution are alike (CKRM paper, equations 5 to 9).

    lambda^t is the share of a layer's pairs of filters whose similarity Psi, the mean over the input channels of
    a structural similarity of their slices, is above t.

    Parameters
    ----------
    model_or_weights
        A module; the path of a safetensors file or a slim folder; a mapping from names to weights, such as a state
        dict; weights [F2, F1, K1, K2] of any floating type; or a list or mapping of these, such as runs from
        several seeds: ``{"run 0": model, ...}``.
    thresholds
        Every t, in [0, 1]; the paper takes 0.6.
    pairs
        Compare that many pairs of each layer, or of each layer that a mapping names, drawn without replacement,
        and give lambda a Wilson interval. By default all pairs.
    seed
        Draws the pairs and the random kernels.
    eps
        The constant of equation 2, relative to the mean square weight of the layer: slices whose variance is below
        it count as alike. lambda is measured at 1e-12, 1e-2 and 1e-1 as well.
    eps_absolute
        The plain constant, in place of ``eps``; lambda then changes when a layer is scaled.
    alpha, beta, gamma
        Positive exponents of luminance, contrast and structure.
    layers
        Measure only these; by default every 2-d convolution.
    include_1x1
        Measure 1x1 kernels as well. Without structure they differ by luminance alone, so that nearly all are alike.
    top
        How many of the most similar pairs to name.
    null
        Whether to compare each layer with random kernels of its shape.
    variant
        Of :func:`pyprune.kernel_ssim`.
    progress
        Show a progress bar over the layers, on a terminal.

    Returns
    -------
    CKRM
        For each network and layer lambda, the histogram of Omega, the null, the most similar pairs and each filter's
        twin. ``print`` shows it as a table.

    Raises
    ------
    ValueError
        If a parameter is out of range, a file cannot be read, weights are not 4-D or not finite, there is no
        convolution with kernels larger than 1x1 and two filters, more pairs are asked than exist, or a layer's name
        is unknown.
    TypeError
        If something is neither a network nor weights.

    Notes
    -----
    In a grouped convolution only filters of one group make a pair: those of different groups read different
    channels. A depthwise convolution has no pairs, and neither has a layer with one filter: its lambda is NaN.
    Filters of transposed convolutions are compared like others. Convolutions of one or three dimensions are left
    out. From weights alone, neither groups nor transposition can be seen.

    A layer costs F2 (F2 - 1) / 2 * F1 slice pairs for each of three or four constants, and its null at most 8.4 million
    for each.

    Examples
    --------
    >>> import numpy as np
    >>> import pyprune as pp
    >>> kernel = np.random.default_rng(0).normal(size=(1, 3, 3, 3))
    >>> result = pp.ckrm(np.concatenate([kernel, -2 * kernel / 2, kernel[:, ::-1]]), null=False)
    >>> result["weights"].top[0]
    (0, 1, 1.0)
    """
    measure = _Measure(
        thresholds=checked_thresholds("ckrm", thresholds),
        pairs=_checked_pairs(pairs),
        seed=_whole("seed", seed, 0),
        eps=_positive("eps", eps),
        eps_absolute=None if eps_absolute is None else _positive("eps_absolute", eps_absolute),
        exponents=(_positive("alpha", alpha), _positive("beta", beta), _positive("gamma", gamma)),
        top=_whole("top", top, 0),
        null=null,
        variant=variant,
    )
    networks = read_networks("ckrm", model_or_weights, include_1x1=include_1x1)
    wanted = None if layers is None else [layers] if isinstance(layers, str) else list(layers)
    chosen = {name: _chosen(network, wanted, measure.pairs) for name, network in networks.items()}
    for network in chosen.values():
        _check_enough(network, measure.pairs)
    found: dict[str, dict[str, LayerRedundancy]] = {name: {} for name in chosen}
    with bars.bar("ckrm", sum(map(len, chosen.values())), progress) as advance:
        for network_name, kernels_of in chosen.items():
            for name, kernels in kernels_of.items():
                found[network_name][name] = _layer(name, kernels, measure)
                advance(note=name)
    return CKRM(
        networks=found,
        thresholds=measure.thresholds,
        options={
            "eps": measure.eps, "eps_absolute": measure.eps_absolute, "pairs": measure.pairs, "seed": measure.seed,
            **dict(zip(("alpha", "beta", "gamma"), measure.exponents, strict=True)),
            "include_1x1": include_1x1, "confidence": CONFIDENCE,
        },
        left_out={name: dict(network.left_out) for name, network in networks.items() if network.left_out},
        notes=_notes(networks),
    )  # fmt: skip


def distinct_filters(model_or_weights: Any, *, threshold: float = 0.6, eps: float = 1e-2) -> dict[str, int]:
    """Count, in every convolution of one network, filters of which no two are alike.

    Filters are picked from the largest norm to the smallest, each unless its Psi with one that was picked before is
    above the threshold. Had a layer only these, its lambda would be 0 (CKRM paper, equation 9).

    Parameters
    ----------
    model_or_weights
        One network, as for :func:`ckrm`.
    threshold, eps
        As for :func:`ckrm`.

    Returns
    -------
    dict
        By layer, at least 1 and at most F2. Filters of different groups are never alike.

    Raises
    ------
    TypeError, ValueError
        As :func:`ckrm`.
    """
    limit = checked_thresholds("ckrm", threshold)[0]
    networks = read_networks("distinct_filters", model_or_weights)
    if len(networks) > 1:
        raise ValueError(f"distinct_filters: needs one network; got {len(networks)}.")
    return {
        name: _distinct(kernels, limit, _positive("eps", eps) * (_mean_square(name, kernels) or 1.0))
        for name, kernels in next(iter(networks.values())).layers.items()
    }


def _distinct(kernels: Kernels, threshold: float, constant: float) -> int:
    """Count the filters that are picked in one layer, group by group."""
    groups = np.split(kernels.on_host(), kernels.groups)
    return sum(_picked(weights, threshold, constant) for weights in groups)


def _picked(weights: FloatArray, threshold: float, constant: float) -> int:
    alike: npt.NDArray[np.bool_] = np.asarray(kernel_ssim(weights, eps_absolute=constant)) > threshold
    picked: list[int] = []
    for filter_ in np.argsort(-np.square(weights).sum(axis=(1, 2, 3)), kind="stable"):
        if not alike[filter_, picked].any():
            picked.append(int(filter_))
    return len(picked)


def checked_thresholds(who: str, thresholds: float | Sequence[float]) -> tuple[float, ...]:
    """Return every t of lambda^t; ``ValueError`` naming ``who`` unless they are different numbers in [0, 1]."""
    given = np.atleast_1d(np.asarray(thresholds, np.float64))
    found = tuple(float(t) for t in given)
    if not found or not all(0 <= t <= 1 for t in found) or len(set(found)) < len(found):
        raise ValueError(f"{who}: thresholds must be different numbers in [0, 1], at least one; got {list(found)}.")
    return found


def _checked_pairs(pairs: int | Mapping[str, int] | None) -> int | Mapping[str, int] | None:
    if pairs is None:
        return None
    if isinstance(pairs, Mapping):
        return {name: _whole(f"pairs of {name!r}", count, 1) for name, count in pairs.items()}
    return _whole("pairs", pairs, 1)


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"ckrm: {name} must be a whole number of at least {least}; got {value!r}.")
    return int(value)


def _positive(name: str, value: Any) -> float:
    number = float(value)
    if not (0 < number < math.inf):
        raise ValueError(f"ckrm: {name} must be a positive, finite number; got {value!r}.")
    return number


def _chosen(network: Network, layers: list[str] | None, pairs: Any) -> dict[str, Kernels]:
    """Return the layers that are to be measured; every name that the caller gave must be one."""
    known = network.layers
    wanted = list(known) if layers is None else layers
    for name in [*wanted, *(pairs if isinstance(pairs, Mapping) else ())]:
        if name in network.left_out:
            raise ValueError(f"ckrm: layer {name!r} cannot be measured: it {network.left_out[name]}.")
        if name not in known:
            hint = did_you_mean(name, known, f"There are {', '.join(list(known)[:8])}.")
            raise ValueError(f"ckrm: there is no layer {name!r} to measure.{hint}")
    if not wanted:
        raise ValueError("ckrm: layers must name at least one layer; got none.")
    return {name: known[name] for name in known if name in set(wanted)}


def _check_enough(network: Mapping[str, Kernels], pairs: int | Mapping[str, int] | None) -> None:
    counts = {name: kernels.pairs for name, kernels in network.items()}
    if not any(counts.values()):
        name, kernels = next(iter(network.items()))
        raise ValueError(
            f"ckrm: needs a layer with two filters that read the same channels; {name!r} has {kernels.shape[0]} "
            f"{'filter' if kernels.shape[0] == 1 else 'filters'}"
            + (f" in {kernels.groups} groups." if kernels.groups > 1 else ".")
        )
    for name, exist in counts.items():
        asked = _asked(name, pairs)
        if asked is not None and exist and asked > exist:
            raise ValueError(
                f"ckrm: pairs={asked} is more than the {exist} pairs of {name!r}. Ask for fewer, or pass "
                "pairs={layer: number} to sample some layers and compare all pairs of the others."
            )


def _asked(name: str, pairs: int | Mapping[str, int] | None) -> int | None:
    return pairs.get(name) if isinstance(pairs, Mapping) else pairs


def _notes(networks: Mapping[str, Network]) -> tuple[str, ...]:
    if any(network.weights_only for network in networks.values()):
        return ("Read from weights alone: groups and transposed convolutions cannot be seen.",)
    return ()


def _layer(name: str, kernels: Kernels, measure: _Measure) -> LayerRedundancy:
    """Measure one layer at the constant asked and at those that are always shown."""
    mean_square = _mean_square(name, kernels)
    # A layer of zeros has no scale; all its pairs are alike at any constant.
    eps = measure.eps if measure.eps_absolute is None else measure.eps_absolute / (mean_square or 1.0)
    exist = kernels.pairs
    if not exist:
        return _without_pairs(kernels, mean_square, eps, len(measure.thresholds))
    random = _random(kernels.shape[1:], eps, measure) if measure.null else None
    chosen = _pairs(name, kernels, _asked(name, measure.pairs), measure.seed)
    compared = exist if chosen is None else len(chosen)
    points = (*measure.thresholds, *((random.point99,) if random else ()))
    constant = {"eps": eps} if measure.eps_absolute is None else {"eps_absolute": measure.eps_absolute}
    asked = _statistics(kernels, chosen, points, measure, top=min(measure.top, compared), nearest=True, **constant)
    counts = [asked.counts[: len(measure.thresholds)]]
    for other in EPSILONS:
        same = other == constant.get("eps")
        found = counts[0] if same else _statistics(kernels, chosen, measure.thresholds, measure, eps=other).counts
        counts.append(found)
    best, twins = asked.top, cast("Nearest", asked.nearest)
    return LayerRedundancy(
        shape=kernels.shape,
        groups=kernels.groups,
        pairs=compared,
        all_pairs=exist,
        mean_square=mean_square,
        eps=eps,
        counts=np.stack(counts),
        intervals=_intervals(np.stack(counts), compared, exist),
        mean=float(asked.mean),
        histogram=asked.histogram,
        top=tuple((int(i), int(j), float(psi)) for i, j, psi in zip(best.i, best.j, best.psi, strict=True)),
        twins=twins.index,
        twin_psi=twins.psi.astype(np.float64),
        random=random,
        above_random=int(asked.counts[-1]) if random else None,
        faint=_faint(kernels, eps * mean_square),
        variant=asked.variant,
        note=_note(kernels, mean_square),
    )


def _note(kernels: Kernels, mean_square: float) -> str:
    if not mean_square:
        return "all weights are zero, so all pairs are alike"
    return f"pairs within each of {kernels.groups} groups" if kernels.groups > 1 else ""


def _without_pairs(kernels: Kernels, mean_square: float, eps: float, thresholds: int) -> LayerRedundancy:
    F2, rows = kernels.shape[0], 1 + len(EPSILONS)
    depthwise = "no pairs: each group has one filter" if kernels.groups > 1 else "no pairs: it has one filter"
    return LayerRedundancy(
        shape=kernels.shape, groups=kernels.groups, pairs=0, all_pairs=0, mean_square=mean_square, eps=eps,
        counts=np.zeros((rows, thresholds), np.int64), intervals=np.full((rows, thresholds, 2), np.nan),
        mean=math.nan, histogram=np.zeros(BINS, np.int64), top=(), twins=np.full(F2, -1, np.int64),
        twin_psi=np.full(F2, np.nan), note=depthwise,
    )  # fmt: skip


def _mean_square(name: str, kernels: Kernels) -> float:
    """Return the mean of the squared weights, the scale of a layer."""
    with np.errstate(over="ignore"):
        square = float(np.square(kernels.on_host()).mean())
    if not math.isfinite(square):
        raise ValueError(f"ckrm: the weights of {name!r} must be finite, and so must their squares; some are not.")
    return square


def _faint(kernels: Kernels, limit: float) -> int:
    """Count the filters whose mean square weight is below ``limit``."""
    return int((np.square(kernels.on_host()).mean(axis=(1, 2, 3)) < limit).sum())


def _statistics(
    kernels: Kernels, pairs: IntArray | None, thresholds: Sequence[float], measure: _Measure, **more: Any
) -> SsimStatistics:
    alpha, beta, gamma = measure.exponents
    return kernel_ssim_statistics(
        kernels.weight, thresholds=thresholds, bins=BINS, pairs=pairs, alpha=alpha, beta=beta, gamma=gamma,
        variant=measure.variant, **more,
    )  # fmt: skip


def _pairs(name: str, kernels: Kernels, asked: int | None, seed: int) -> IntArray | None:
    """Return the pairs [P, 2] that are to be compared, or nothing for all pairs of an ungrouped layer."""
    exist = kernels.pairs
    filters = kernels.shape[0] // kernels.groups
    if asked is None or asked == exist:
        return None if kernels.groups == 1 else _pair(np.arange(exist), filters)
    # Each layer draws its own pairs, whatever other layers there are; the same layer of each run draws the same.
    draw = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return _pair(np.sort(draw.choice(exist, asked, replace=False, shuffle=False)), filters)


def _pair(index: IntArray, filters: int) -> IntArray:
    """Return pairs (i, j), i < j, by their number: group after group, and in a group row after row."""
    per_group = filters * (filters - 1) // 2
    group, rest = np.divmod(index, per_group)
    rows = np.arange(filters - 1)
    ends = np.cumsum(filters - 1 - rows)  # row i holds the pairs (i, i + 1) to (i, filters - 1)
    i = np.searchsorted(ends, rest, side="right")
    j = filters - (ends[i] - rest)
    pairs: IntArray = np.stack([i, j], axis=1).astype(np.int64) + (group * filters)[:, None]
    return pairs


def wilson(successes: Any, trials: int, confidence: float = CONFIDENCE) -> FloatArray:
    """Return the Wilson score interval of a share; successes: [...] -> float64 [..., 2].

    Pairs are drawn without replacement, so the interval is a little wider than it need be.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = np.asarray(successes, np.float64) / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return np.clip(np.stack([centre - half, centre + half], axis=-1), 0.0, 1.0)


def _intervals(counts: IntArray, compared: int, exist: int) -> FloatArray:
    if compared == exist:
        return np.repeat((counts / exist)[..., None], 2, axis=-1)
    return wilson(counts, compared)


def _random(shape: tuple[int, ...], eps: float, measure: _Measure) -> RandomKernels:
    return random_kernels(shape, eps, measure.thresholds, measure.exponents, measure.seed)


@lru_cache(maxsize=256)
def random_kernels(
    shape: tuple[int, ...], eps: float, thresholds: tuple[float, ...], exponents: tuple[float, ...], seed: int
) -> RandomKernels:
    """Measure independent standard normal kernels; Psi of a pair depends on F1, K1, K2 alone, and not on F2."""
    F1 = shape[0]
    filters = int(np.clip(math.isqrt(2 * NULL_SLICE_PAIRS // F1), 64, 256))
    kernels = np.random.default_rng([seed, *shape]).standard_normal((filters, *shape), np.float32)
    alpha, beta, gamma = exponents
    omega: dict[float, FloatArray] = {}
    for one in dict.fromkeys((eps, *EPSILONS)):
        psi = np.asarray(kernel_ssim(kernels, alpha=alpha, beta=beta, gamma=gamma, eps_absolute=one), np.float64)
        omega[one] = psi[np.triu_indices(filters, 1)]
    lambdas = [[float((omega[one] > t).mean()) for t in thresholds] for one in (eps, *EPSILONS)]
    asked = omega[eps]
    bins = np.minimum((asked * BINS).astype(np.int64), BINS - 1)
    return RandomKernels(
        pairs=len(asked),
        lambdas=np.array(lambdas),
        mean=float(asked.mean()),
        std=float(asked.std()),
        point99=float(np.quantile(asked, 0.99)),
        histogram=np.bincount(bins, minlength=BINS),
    )
