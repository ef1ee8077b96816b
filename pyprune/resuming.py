"""The folder of a long run: what an earlier run left is taken up, what is missing is made and written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pyprune import files


class Saved(Protocol):
    """What is written to a file and read back."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path``."""


T = TypeVar("T", bound=Saved)


class Run:
    """A folder with the results of one run and its settings.

    Parameters
    ----------
    who
        For messages: the function that runs.
    folder
        ``None`` keeps nothing.
    settings
        What results depend on, as plain JSON values; a folder with others is refused.
    fresh
        Whether to delete what an earlier run left: files and folders that match one of ``owned``.
    """

    def __init__(
        self,
        who: str,
        folder: str | os.PathLike[str] | None,
        settings: dict[str, Any],
        fresh: bool = False,
        owned: Sequence[str] = (),
    ) -> None:
        self.folder = None if folder is None else files.make_folder(who, folder)
        self.seconds: dict[str, float] = {}
        if self.folder is None:
            return
        about, form = self.folder / "run.json", f"pyprune.run.{who}" if who != "prune" else "pyprune.run"
        if about.exists() and not fresh:
            found = files.read_json(who, about, form, 1).get("settings")
            other = [name for name in settings if not isinstance(found, dict) or found.get(name) != settings[name]]
            if other:
                raise ValueError(
                    f"{who}: {self.folder} holds a run with other {', '.join(other)}. "
                    "Choose another folder, or start over with fresh=True (--fresh)."
                )
        else:
            for pattern in owned:
                for old in self.folder.glob(pattern):
                    old.unlink()
        files.write_json(about, {"format": form, "version": 1, "settings": settings})

    def path(self, name: str) -> Path | None:
        """Return where ``name`` lies, its folder made; ``None`` without a folder."""
        if self.folder is None:
            return None
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def stage(self, stage: str, name: str, kind: Any, make: Callable[[], T]) -> T:
        """Return what an earlier run left in ``name``, or make it and write it there."""
        path = self.path(name)
        with self.timed(stage):
            if path is not None and path.exists():
                found: T = kind.load(path)
                return found
            made = make()
            if path is not None:
                made.save(path)
            return made

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of what runs inside to those of ``stage``."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
