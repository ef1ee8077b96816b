"""Plans: which filters stay, and why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from pyprune import files
from pyprune.types import reading
from pyprune.types.common import IntArray


class Region(StrEnum):
    """Where a filter lies in the (AVG, STD) plane, divided at the means of both (thesis section 4.2)."""

    LOW_AVG_LOW_STD = "LOW_AVG_LOW_STD"
    HIGH_AVG_LOW_STD = "HIGH_AVG_LOW_STD"
    HIGH_AVG_HIGH_STD = "HIGH_AVG_HIGH_STD"
    LOW_AVG_HIGH_STD = "LOW_AVG_HIGH_STD"


@dataclass(frozen=True)
class FilterWhy:
    """Why one filter stays or goes. ``score`` is what its criterion gave it, higher for those to keep."""

    reason: str
    keep: bool
    cluster: int | None = None
    medoid: bool = False
    region: Region | None = None
    silhouette: float | None = None
    avg: float | None = None
    std: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class LayerWhy(Sequence[FilterWhy]):
    """What the selection saw in one layer; indexing gives the :class:`FilterWhy` of a filter.

    ``note`` says why a layer was left alone and is empty otherwise. ``k`` and ``silhouette`` are the chosen
    number of clusters and its mean silhouette; ``avg_mean`` and ``std_mean`` the dividing point. ``stability`` is the
    mean overlap |A and B| / |A or B| of the kept filters with those that other seeds of k-means keep.
    """

    filters: tuple[FilterWhy, ...]
    note: str = ""
    k: int | None = None
    silhouette: float | None = None
    avg_mean: float | None = None
    std_mean: float | None = None
    stability: float | None = None

    def __getitem__(self, index: Any) -> Any:
        return self.filters[index]

    def __len__(self) -> int:
        return len(self.filters)

    def __iter__(self) -> Iterator[FilterWhy]:
        return iter(self.filters)


@dataclass(frozen=True, eq=False)
class Plan:
    """Which filters stay, layer by layer, and why.

    Parameters
    ----------
    keep
        For each convolution, the indices of the filters that stay: sorted to int64 [kept].
    filters
        For each convolution, how many filters it had. Optional in a plan made by hand.
    why
        For each convolution a :class:`LayerWhy`. Optional in a plan made by hand.
    method, options
        What made the plan, and with which settings.

    Raises
    ------
    ValueError, TypeError
        If an index list is empty, doubled, negative, out of range or not of integers.
    """

    keep: Mapping[str, IntArray]
    filters: Mapping[str, int] = field(default_factory=dict)
    why: Mapping[str, LayerWhy] = field(default_factory=dict)
    method: str = "manual"
    options: Mapping[str, Any] = field(default_factory=dict)

    FORMAT = "pyprune.plan"
    VERSION = 1

    def __post_init__(self) -> None:
        keep = {name: _indices(name, indices, self.filters.get(name)) for name, indices in self.keep.items()}
        object.__setattr__(self, "keep", keep)
        for name, why in self.why.items():
            if name not in keep or [i for i, one in enumerate(why) if one.keep] != keep[name].tolist():
                raise ValueError(f"Plan: the reasons for {name!r} disagree with its kept filters.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    @property
    def rates(self) -> dict[str, float]:
        """Share of the filters that goes, for each layer whose number of filters is known."""
        return {name: 1 - len(kept) / self.filters[name] for name, kept in self.keep.items() if name in self.filters}

    @property
    def stability(self) -> dict[str, float]:
        """Mean overlap of what is kept with what other seeds keep, for each layer where other seeds were tried."""
        return {name: why.stability for name, why in self.why.items() if why.stability is not None}

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "format": self.FORMAT,
            "version": self.VERSION,
            "method": self.method,
            "options": json.loads(json.dumps(dict(self.options))),  # tuples become lists, as they do in a file
            "filters": dict(self.filters),
            "keep": {name: kept.tolist() for name, kept in self.keep.items()},
            "why": {name: asdict(why) for name, why in self.why.items()},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON."""
        files.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If the file is missing, truncated, of another kind, inconsistent or from a newer pyprune.
        """
        content = files.read_json("Plan.load", path, cls.FORMAT, cls.VERSION)
        try:
            return cls(
                keep={name: reading.wholes(content["keep"], name) for name in reading.mapped(content, "keep")},
                filters=reading.counts(content, "filters"),
                why={name: _layer_why(why) for name, why in reading.mapped(content, "why").items()},
                method=reading.text(content, "method"),
                options=dict(reading.mapped(content, "options")),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"Plan.load: {path} lacks or garbles {error}.") from None


def _layer_why(content: Any) -> LayerWhy:
    if not isinstance(content, Mapping):
        raise TypeError(reading.garbled("why", content))
    return reading.record(LayerWhy, content, filters=tuple(map(_filter_why, reading.listed(content, "filters"))))


def _filter_why(content: Any) -> FilterWhy:
    if not isinstance(content, Mapping):
        raise TypeError(reading.garbled("filters", content))
    region = content.get("region")
    if region not in (None, *Region):
        raise TypeError(reading.garbled("region", region))
    return reading.record(FilterWhy, content, region=None if region is None else Region(region))


def _indices(name: str, indices: Any, count: int | None) -> IntArray:
    """Return ``indices`` sorted as int64 after checking that they can name filters."""
    given = np.asarray(indices)
    if given.size == 0:
        raise ValueError(f"Plan: {name!r} keeps no filter; keep at least one, or leave the layer out.")
    if given.ndim != 1 or given.dtype == np.bool_ or not np.issubdtype(given.dtype, np.integer):
        raise TypeError(
            f"Plan: {name!r} needs a flat list of filter indices; got {given.dtype} of shape {list(given.shape)}."
            + (" Pass np.flatnonzero(mask)." if given.dtype == np.bool_ else "")
        )
    kept = np.unique(given.astype(np.int64))
    if len(kept) != given.size:
        raise ValueError(f"Plan: {name!r} names a filter twice.")
    if kept[0] < 0 or (count is not None and kept[-1] >= count):
        limit = "" if count is None else f" to {count - 1}"
        raise ValueError(f"Plan: {name!r} needs indices from 0{limit}; got {kept[0]} to {kept[-1]}.")
    kept.flags.writeable = False
    return kept
