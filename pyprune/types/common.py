"""What the types share: arrays, and values as JSON and terminals take them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

NOTHING: Mapping[str, Any] = MappingProxyType({})


def plain(value: Any) -> Any:
    """Return arrays as nested lists and NaN as ``None``, for JSON."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def grouped(reasons: Mapping[T, str]) -> dict[str, list[T]]:
    """Return what has the same reason, by reason."""
    groups: dict[str, list[T]] = {}
    for one, why in reasons.items():
        groups.setdefault(why, []).append(one)
    return groups


def printable(name: str) -> str:
    """Return a name as a terminal may show it: one from a file could hold control sequences."""
    return name if name.isprintable() else ascii(name)
