"""Loggers of any kind behind one function: a callable, or what has ``.log_metrics``, ``.add_scalar`` or ``.log``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

Log = Callable[[dict[str, Any]], object]


def as_log(who: str, log: Any) -> Log:
    """Return a function that hands a row to ``log``, whatever kind of logger it is.

    Parameters
    ----------
    who
        Whom messages name.
    log
        ``None`` (nothing is logged), a ``logging.Logger``, an object with ``.log_metrics(numbers, step=)``,
        ``.add_scalar(name, number, step)`` or ``.log(row)``, or any callable. The first two kinds of objects get
        numbers alone; the step is the row's ``"epoch"``.

    Raises
    ------
    TypeError
        If it is none of these.
    """
    if log is None:
        return lambda row: None
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
    raise TypeError(f"{who}: log must be callable or have .log, .add_scalar or .log_metrics; got {type(log).__name__}.")


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, (int, float))}
