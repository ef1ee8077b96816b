"""Progress bars on standard error for people; silence where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def bar(description: str, total: float | None, show: bool = True) -> Iterator[Callable[..., None]]:
    """Show a progress bar and yield ``advance(n=1, note="")``; a no-op without a terminal or with ``show=False``."""
    if not (show and sys.stderr.isatty()):
        yield lambda n=1, note="": None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, note="")

        def advance(n: float = 1, note: str = "") -> None:
            progress.advance(task, n)
            if note:
                progress.update(task, note=note)

        yield advance


def track(iterable: Iterable[T], description: str, total: float | None = None, show: bool = True) -> Iterator[T]:
    """Yield the items of ``iterable`` under a progress bar."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with bar(description, total, show) as advance:
        for item in iterable:
            yield item
            advance()
