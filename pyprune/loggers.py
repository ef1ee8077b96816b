"""Loggers of any kind behind one function: paths, callables, and what has ``.log_metrics`` and the like."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyprune import files

Log = Callable[[dict[str, Any]], object]


def as_log(who: str, log: Any) -> Log:
    """Return a function that hands a row to ``log``, whatever kind of logger it is.

    Parameters
    ----------
    who
        Whom messages name.
    log
        ``None`` (nothing is logged); a path, for :class:`JsonLines`; a ``logging.Logger``; an object with
        ``.log_metrics(numbers, step=)``, ``.add_scalar(name, number, step)`` or ``.log(row)``; any callable; or
        several of these in a list. What takes a step gets numbers alone, and the row's ``"epoch"`` as the step.

    Raises
    ------
    TypeError, ValueError
        If it is none of these, or the file cannot be continued.
    """
    if log is None:
        return lambda row: None
    if isinstance(log, (list, tuple)):
        several = [as_log(who, one) for one in log]
        return lambda row: [one(row) for one in several]
    if isinstance(log, (str, os.PathLike)):
        return JsonLines(who, log)
    if isinstance(log, logging.Logger):
        return lambda row: log.info("%s", row)
    if hasattr(log, "log_metrics"):
        return lambda row: log.log_metrics(_numbers(row), step=row["epoch"])
    if hasattr(log, "add_scalar"):
        return lambda row: [log.add_scalar(name, value, row["epoch"]) for name, value in _numbers(row).items()]
    if hasattr(log, "log"):
        return lambda row: log.log(row)
    if callable(log):
        return lambda row: log(row)
    raise TypeError(
        f"{who}: log must be a path, a callable or have .log, .add_scalar or .log_metrics; got {type(log).__name__}."
    )


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, (int, float))}


class JsonLines:
    """A file with one JSON object an epoch, whole after every row.

    A row takes the place of the rows of its epoch and of later ones, which are of a future that was lost: a run that
    is continued from a checkpoint repeats no row, and one that begins anew begins the file anew. Numbers that are NaN
    or infinite become null, since JSON has none.

    Parameters
    ----------
    who
        Whom messages name.
    path
        The file; it is continued if it is there.

    Raises
    ------
    ValueError
        If it holds anything else than such rows, or cannot be written.
    """

    def __init__(self, who: str, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        files.make_folder(who, self._path.parent)
        self._lines: list[tuple[int, bytes]] = []
        if self._path.exists():
            for line in files.read_bytes(who, self._path, files.MAX_JSON_BYTES).splitlines():
                row = files.parse_json(who, line, str(self._path))
                if not isinstance(row.get("epoch"), int):
                    raise ValueError(f"{who}: {self._path} must hold a row an epoch; it does not. Choose another path.")
                self._lines.append((row["epoch"], line))

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Write ``row``, which has an ``"epoch"``, and all rows before it."""
        epoch = int(row["epoch"])
        plain = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
        self._lines = [(other, line) for other, line in self._lines if other < epoch]
        self._lines.append((epoch, json.dumps(plain, allow_nan=False).encode()))
        files.write_bytes(self._path, b"".join(line + b"\n" for _, line in self._lines))
