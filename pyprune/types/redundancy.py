"""The redundancy of kernels (CKRM paper, section 3.2)."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from pyprune import files
from pyprune.types.common import FloatArray, IntArray, grouped, plain, printable

EPSILONS = (1e-12, 1e-2, 1e-1)
"""The constants, relative to a layer's mean square weight, at which every redundancy is shown beside the one asked."""

BINS = 100
"""Bins of a histogram of similarities, uniform on [0, 1]."""


@dataclass(frozen=True, eq=False)
class RandomKernels:
    """What kernels of independent normal numbers give in the place of a layer's own: the null of its redundancy.

    ``lambdas`` [4, T] as in :class:`LayerRedundancy`; ``mean``, ``std`` and ``point99`` (the 99 % point) of the
    similarities of ``pairs`` pairs at the constant that was asked, and their ``histogram``.
    """

    pairs: int
    lambdas: FloatArray
    mean: float
    std: float
    point99: float
    histogram: IntArray

    def __post_init__(self) -> None:
        _freeze(self)


@dataclass(frozen=True, eq=False)
class LayerRedundancy:
    """The redundancy of one convolution (CKRM paper, section 3.2).

    Parameters
    ----------
    shape
        (F2, F1, K1, K2): filters, input channels of a group, kernel.
    groups
        Groups of the convolution; only filters of one group make a pair, since others read other channels.
    pairs, all_pairs
        How many pairs were compared, and how many there are.
    mean_square
        Mean of the squared weights, to which the constants are relative.
    eps
        The relative constant of row 0 of ``counts``; rows 1 to 3 belong to :data:`EPSILONS`.
    counts
        [4, T] int64: pairs with Psi above each threshold.
    intervals
        [4, T, 2] float64: Wilson interval of lambda; both ends are lambda itself where all pairs were compared.
    mean, histogram
        Of Omega at ``eps``; the histogram is int64 [100], uniform on [0, 1].
    top
        The most similar pairs (i, j, Psi), best first.
    twins, twin_psi
        [F2]: each filter's most similar one among the pairs compared, -1 where it is in none, and how similar it is.
    random
        The null of such kernels; ``None`` where it was switched off or there is no pair.
    above_random
        How many pairs lie above the 99 % point of the null: 1 % of them for random kernels.
    faint
        How many filters have a mean square weight below ``eps`` times the layer's: any two of them count as alike.
    variant, note
        Which kernel computed it, and what there is to know.
    """

    shape: tuple[int, int, int, int]
    groups: int
    pairs: int
    all_pairs: int
    mean_square: float
    eps: float
    counts: IntArray
    intervals: FloatArray
    mean: float
    histogram: IntArray
    top: tuple[tuple[int, int, float], ...]
    twins: IntArray
    twin_psi: FloatArray
    random: RandomKernels | None = None
    above_random: int | None = None
    faint: int = 0
    variant: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        _freeze(self)

    @property
    def lambdas(self) -> FloatArray:
        """[4, T] float64: lambda at the constant asked and at :data:`EPSILONS`; NaN without pairs."""
        shares: FloatArray = self.counts / self.pairs if self.pairs else np.full(self.counts.shape, np.nan)
        return shares

    @property
    def sampled(self) -> bool:
        """Whether only some of the pairs were compared."""
        return self.pairs < self.all_pairs

    @property
    def z(self) -> float:
        """Mean of Omega against the null, in standard deviations of one random pair; NaN without a null."""
        if self.random is None or not self.random.std:
            return float("nan")
        return (self.mean - self.random.mean) / self.random.std

    @property
    def above_random_share(self) -> float:
        """Share of the pairs above the 99 % point of the null; NaN without a null."""
        return float("nan") if self.above_random is None else self.above_random / self.pairs


@dataclass(frozen=True, eq=False)
class CKRM:
    """How redundant the kernels of one or several networks are, layer by layer.

    ``result["conv1"]`` is the :class:`LayerRedundancy` of a layer of the only network, ``result["run 0", "conv1"]``
    that of a named network.

    Parameters
    ----------
    networks
        For each network its layers, in order of depth.
    thresholds
        Every t of lambda^t, in the order of the last axis of ``counts``.
    options
        Settings: eps, eps_absolute, pairs, seed, alpha, beta, gamma, confidence.
    left_out
        For each network the layers that were not measured, and why.
    notes
        What there is to know about the result as a whole.
    """

    networks: Mapping[str, Mapping[str, LayerRedundancy]]
    thresholds: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    FORMAT = "pyprune.ckrm"
    VERSION = 1

    def __post_init__(self) -> None:
        if not self.networks or not all(self.networks.values()):
            raise ValueError("CKRM: needs at least one network, and each at least one layer.")
        for network, layers in self.networks.items():
            for name, layer in layers.items():
                if why := _unsound(layer, len(self.thresholds)):
                    raise ValueError(f"CKRM: layer {name!r} of {network!r} has {why}.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CKRM) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, key: str | tuple[str, str]) -> LayerRedundancy:
        network, layer = key if isinstance(key, tuple) else (None, key)
        layers = self.layers(network)
        if layer not in layers:
            raise KeyError(f"CKRM: there is no layer {layer!r}{_nearest(layer, layers)}")
        return layers[layer]

    def layers(self, network: str | None = None) -> Mapping[str, LayerRedundancy]:
        """Return the layers of a network by name; the network may be left out where there is one.

        Raises
        ------
        KeyError
            If there is no such network, or several and none is named.
        """
        if network is None:
            if len(self.networks) > 1:
                raise KeyError(f"CKRM: there are {len(self.networks)} networks; name one of {list(self.networks)}.")
            return next(iter(self.networks.values()))
        if network not in self.networks:
            raise KeyError(f"CKRM: there is no network {network!r}{_nearest(network, self.networks)}")
        return self.networks[network]

    def lambdas(
        self, threshold: float | None = None, network: str | None = None, *, eps: float | None = None
    ) -> dict[str, float]:
        """Return lambda^t of every layer: the share of its pairs whose similarity is above t.

        Parameters
        ----------
        threshold
            One of ``thresholds``; the first by default.
        network
            May be left out where there is one.
        eps
            One of :data:`EPSILONS`, or nothing for the constant that was asked.

        Returns
        -------
        dict
            By layer; NaN for a layer without pairs.

        Raises
        ------
        ValueError
            If it was not measured at this threshold or constant.
        """
        row, column = self.row(eps), self.column(threshold)
        return {name: float(layer.lambdas[row, column]) for name, layer in self.layers(network).items()}

    def row(self, eps: float | None = None) -> int:
        """Return the row of ``counts`` that belongs to a constant; 0 is the one that was asked."""
        if eps is None or (eps == self.options.get("eps") and self.options.get("eps_absolute") is None):
            return 0
        if eps not in EPSILONS:
            raise ValueError(f"CKRM: lambda was measured at eps {list(EPSILONS)} and as asked; got {eps}.")
        return 1 + EPSILONS.index(eps)

    def column(self, threshold: float | None = None) -> int:
        """Return the column of ``counts`` that belongs to a threshold; the first one by default."""
        if threshold is None:
            return 0
        if threshold not in self.thresholds:
            raise ValueError(f"CKRM: lambda was measured at thresholds {list(self.thresholds)}; got {threshold}.")
        return self.thresholds.index(threshold)

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values; ``null`` stands for what does not exist."""
        return {
            "format": self.FORMAT,
            "version": self.VERSION,
            "thresholds": list(self.thresholds),
            "epsilons": list(EPSILONS),
            "options": json.loads(json.dumps(dict(self.options))),
            "notes": list(self.notes),
            "left_out": {network: dict(layers) for network, layers in self.left_out.items()},
            "networks": {
                network: {name: _redundancy_to_json(layer) for name, layer in layers.items()}
                for network, layers in self.networks.items()
            },
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON; :meth:`load` reads it back bit for bit."""
        files.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CKRM:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If the file is missing, truncated, of another kind, inconsistent or from a newer pyprune.
        """
        return cls.from_json(files.read_json("CKRM.load", path, cls.FORMAT, cls.VERSION), str(path))

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str = "the content") -> CKRM:
        """Return what :meth:`to_json` gave; ``ValueError`` naming ``where`` if it cannot be that."""
        try:
            if content["epsilons"] != list(EPSILONS):
                raise KeyError("epsilons")
            return cls(
                networks={
                    str(network): {str(name): _redundancy(layer) for name, layer in layers.items()}
                    for network, layers in content["networks"].items()
                },
                thresholds=tuple(float(t) for t in content["thresholds"]),
                options=dict(content["options"]),
                left_out={
                    network: {name: str(why) for name, why in layers.items()}
                    for network, layers in content["left_out"].items()
                },
                notes=tuple(str(note) for note in content["notes"]),
            )
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(f"CKRM.load: {where} lacks or garbles {error}.") from None
        except ValueError as error:
            raise ValueError(f"CKRM.load: {where} is damaged ({error})") from None

    def __str__(self) -> str:
        parts = [_redundancy_table(self, network) for network in self.networks]
        return "\n\n".join([*parts, "\n".join(self.notes)] if self.notes else parts)


def _freeze(value: RandomKernels | LayerRedundancy) -> None:
    """Give the dataclass its own, read-only copies of its arrays: several layers share one null."""
    for one in fields(value):
        array = getattr(value, one.name)
        if isinstance(array, np.ndarray):
            own = array.copy()
            own.flags.writeable = False
            object.__setattr__(value, one.name, own)


def _nearest(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _unsound(layer: LayerRedundancy, thresholds: int) -> str:
    """Return what is wrong with the numbers of a layer, or nothing."""
    rows, filters, bins = 1 + len(EPSILONS), layer.shape[0], (BINS,)
    if layer.counts.shape != (rows, thresholds) or layer.intervals.shape != (rows, thresholds, 2):
        return f"counts of shape {list(layer.counts.shape)} for {thresholds} thresholds"
    if not 0 <= layer.pairs <= layer.all_pairs or ((layer.counts < 0) | (layer.counts > layer.pairs)).any():
        return f"counts that {layer.pairs} of {layer.all_pairs} pairs cannot give"
    if layer.histogram.shape != bins or (layer.histogram < 0).any() or layer.histogram.sum() != layer.pairs:
        return f"a histogram that does not hold its {layer.pairs} pairs"
    if layer.twins.shape != (filters,) or layer.twin_psi.shape != (filters,):
        return f"twins for other than its {filters} filters"
    if (layer.twins < -1).any() or (layer.twins >= filters).any():
        return f"twins beyond its {filters} filters"
    if not all(0 <= i < filters and 0 <= j < filters for i, j, _ in layer.top):
        return f"similar pairs beyond its {filters} filters"
    null = layer.random
    if null is not None and (null.lambdas.shape != (rows, thresholds) or null.histogram.shape != bins):
        return "a null of another shape"
    return ""


def _redundancy_to_json(layer: LayerRedundancy) -> dict[str, Any]:
    content = {one.name: plain(getattr(layer, one.name)) for one in fields(layer)}
    content["lambdas"] = plain(layer.lambdas)  # for readers of the file; loading computes them again
    content["z"] = plain(layer.z)
    if layer.random is not None:
        content["random"] = {one.name: plain(getattr(layer.random, one.name)) for one in fields(layer.random)}
    return content


def _redundancy(content: Mapping[str, Any]) -> LayerRedundancy:
    null = content["random"]
    F2, F1, K1, K2 = (int(size) for size in content["shape"])
    return LayerRedundancy(
        shape=(F2, F1, K1, K2),
        groups=int(content["groups"]),
        pairs=int(content["pairs"]),
        all_pairs=int(content["all_pairs"]),
        mean_square=float(content["mean_square"]),
        eps=float(content["eps"]),
        counts=np.array(content["counts"], np.int64),
        intervals=np.array(content["intervals"], np.float64),
        mean=float(np.float64(content["mean"])),
        histogram=np.array(content["histogram"], np.int64),
        top=tuple((int(i), int(j), float(psi)) for i, j, psi in content["top"]),
        twins=np.array(content["twins"], np.int64),
        twin_psi=np.array(content["twin_psi"], np.float64),
        random=None if null is None else _random_kernels(null),
        above_random=None if content["above_random"] is None else int(content["above_random"]),
        faint=int(content["faint"]),
        variant=str(content["variant"]),
        note=str(content["note"]),
    )


def _random_kernels(content: Mapping[str, Any]) -> RandomKernels:
    return RandomKernels(
        pairs=int(content["pairs"]),
        lambdas=np.array(content["lambdas"], np.float64),
        mean=float(content["mean"]),
        std=float(content["std"]),
        point99=float(content["point99"]),
        histogram=np.array(content["histogram"], np.int64),
    )


def _redundancy_table(result: CKRM, network: str) -> str:
    """Return one network as text: a line for each layer."""
    layers = result.networks[network]
    asked = [f"lambda>{t:g}" for t in result.thresholds]
    head = [
        "layer", "kernels", "pairs", *asked, *(f"eps {eps:g}" for eps in EPSILONS), "random", "mean", "z",
        "above 99%", "faint",
    ]  # fmt: skip
    rows = [_redundancy_row(name, layer) for name, layer in layers.items()]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.ljust(wide) if i < 2 else cell.rjust(wide)
            for i, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    notes = grouped({name: layer.note for name, layer in layers.items() if layer.note})
    left_out = grouped({name: f"left out, {why}" for name, why in result.left_out.get(network, {}).items()})
    for note, names in (*notes.items(), *left_out.items()):
        shown = ", ".join(printable(name) for name in names[:4])
        lines.append(f"{note}: {shown}{f' and {len(names) - 4} more' if len(names) > 4 else ''}")
    return "\n".join([printable(network), *lines] if len(result.networks) > 1 else lines)


def _redundancy_row(name: str, layer: LayerRedundancy) -> list[str]:
    def share(value: float) -> str:
        return "-" if np.isnan(value) else f"{value:.4f}"

    asked = [share(value) for value in layer.lambdas[0]]
    if layer.sampled:
        asked = [f"{one} ({low:.4f} to {high:.4f})" for one, (low, high) in zip(asked, layer.intervals[0], strict=True)]
    groups = f" in {layer.groups} groups" if layer.groups > 1 else ""
    return [
        printable(name),
        "x".join(str(size) for size in layer.shape) + groups,
        f"{layer.pairs:,} of {layer.all_pairs:,}" if layer.sampled else f"{layer.pairs:,}",
        *asked,
        *(share(value) for value in layer.lambdas[1:, 0]),
        "-" if layer.random is None else share(float(layer.random.lambdas[0, 0])),
        share(layer.mean),
        "-" if np.isnan(layer.z) else f"{layer.z:+.2f}",
        "-" if layer.above_random is None else f"{layer.above_random_share:.1%}",
        str(layer.faint),
    ]
