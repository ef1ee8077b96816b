"""Reading what a JSON file says, field by field: a value of another kind is an error, never made to fit.

Everything here raises ``TypeError`` naming the field, and ``KeyError`` where it is missing; whoever reads the file says
which file it was.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import numpy as np

from pyprune.types.common import FloatArray, IntArray

T = TypeVar("T")

MANY = 1 << 63
"""What no count and no seed reaches."""


def garbled(name: str, value: object) -> str:
    """Return a field and what came instead, for a message."""
    return f"{name!r} ({str(value)[:40]})"


def whole(content: Mapping[str, Any], name: str, signed: bool = False) -> int:
    """Return a whole number, not negative unless ``signed``."""
    value = content[name]
    if isinstance(value, bool) or not isinstance(value, int) or not (-MANY if signed else 0) <= value < MANY:
        raise TypeError(garbled(name, value))
    return value


def number(content: Mapping[str, Any], name: str) -> float:
    """Return a number."""
    value = content[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(garbled(name, value))
    return float(value)


def number_or_none(content: Mapping[str, Any], name: str) -> float | None:
    """Return a number, or ``None`` where there is none."""
    return None if content[name] is None else number(content, name)


def truth(content: Mapping[str, Any], name: str) -> bool:
    """Return true or false."""
    value = content[name]
    if not isinstance(value, bool):
        raise TypeError(garbled(name, value))
    return value


def text(content: Mapping[str, Any], name: str) -> str:
    """Return a text."""
    value = content[name]
    if not isinstance(value, str):
        raise TypeError(garbled(name, value))
    return value


def listed(content: Mapping[str, Any], name: str) -> list[Any]:
    """Return a list of whatever."""
    value = content[name]
    if not isinstance(value, list):
        raise TypeError(garbled(name, value))
    return value


def mapped(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a mapping to whatever."""
    value = content[name]
    if not isinstance(value, Mapping):
        raise TypeError(garbled(name, value))
    return value


def texts(content: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a list of texts."""
    values = listed(content, name)
    if not all(isinstance(value, str) for value in values):
        raise TypeError(garbled(name, values))
    return tuple(values)


def wholes(content: Mapping[str, Any], name: str) -> IntArray:
    """Return a list, or a list of equally long lists, of whole numbers as int64."""
    found: IntArray = _array(content, name, (int,), np.int64)
    return found


def numbers(content: Mapping[str, Any], name: str) -> FloatArray:
    """Return a list, or a list of equally long lists, of numbers as float64; NaN for ``None``."""
    found: FloatArray = _array(content, name, (int, float, types.NoneType), np.float64)
    return found


def counts(content: Mapping[str, Any], name: str) -> dict[str, int]:
    """Return whole numbers by name."""
    return {str(key): whole(content[name], key) for key in mapped(content, name)}


def scores(content: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return numbers by name."""
    return {str(key): number(content[name], key) for key in mapped(content, name)}


def record(kind: type[T], content: Any, **given: Any) -> T:
    """Return a dataclass whose fields are numbers, texts, true or false, each of the kind that it is declared as.

    Fields with a default may be missing, as in files of before they were there; ``given`` are taken as they are.
    """
    if not isinstance(content, Mapping):
        raise TypeError(garbled(kind.__name__, content))
    known, found = _fields(typing.cast("Any", kind)), dict(given)
    for name, (reader, optional, required) in known.items():
        if name in given or (name not in content and not required):
            continue
        found[name] = None if optional and content[name] is None else reader(content, name)
    if unknown := content.keys() - known.keys() - {"format", "version"}:
        raise TypeError(garbled(min(unknown), content[min(unknown)]))
    return kind(**found)


_READERS: dict[Any, Any] = {int: whole, float: number, str: text, bool: truth}


@cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool, bool]]:
    """Return how each field is read, whether it may be ``None``, and whether it must be there."""
    hints = typing.get_type_hints(kind)
    found = {}
    for one in dataclasses.fields(kind):
        parts = typing.get_args(hints[one.name]) if isinstance(hints[one.name], types.UnionType) else (hints[one.name],)
        plain = [part for part in parts if part is not types.NoneType]
        missing = dataclasses.MISSING
        required = one.default is missing and one.default_factory is missing
        found[one.name] = (_READERS.get(plain[0]), types.NoneType in parts, required)
    return found


def _array(content: Mapping[str, Any], name: str, kinds: tuple[type, ...], dtype: Any) -> Any:
    values = listed(content, name)
    rows = values if all(isinstance(row, list) for row in values) else [values]
    if len({len(row) for row in rows}) > 1 or not all(type(one) in kinds for row in rows for one in row):
        raise TypeError(garbled(name, values))
    try:
        return np.array(values, dtype)
    except OverflowError:
        raise TypeError(garbled(name, values)) from None
