"""Progress bars on standard error for people; silence where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

_shown: list[Progress] = []
"""What is on the screen: a bar inside another one becomes a line below it."""


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

    if _shown:
        with _line(_shown[-1], description, total) as advance:
            yield advance
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        _shown.append(progress)
        try:
            with _line(progress, description, total) as advance:
                yield advance
        finally:
            _shown.remove(progress)


@contextmanager
def _line(progress: Progress, description: str, total: float | None) -> Iterator[Callable[..., None]]:
    """Show one line of ``progress`` while the context lasts; the last one stays on the screen."""
    task = progress.add_task(description, total=total, note="")

    def advance(n: float = 1, note: str = "") -> None:
        progress.advance(task, n)
        if note:
            progress.update(task, note=note)

    try:
        yield advance
    finally:
        if len(progress.tasks) > 1:
            progress.remove_task(task)


def track(iterable: Iterable[T], description: str, total: float | None = None, show: bool = True) -> Iterator[T]:
    """Yield the items of ``iterable`` under a progress bar."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with bar(description, total, show) as advance:
        for item in iterable:
            yield item
            advance()
