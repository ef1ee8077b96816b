"""What the zoo knows of a network: how to build it, small and whole, and how much of a plan must leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Entry:
    """One architecture.

    ``build`` makes it narrow and shallow, ``whole`` at the size that people use; both take images of the shape beside
    them. ``floor`` is the least share of the planned parameters that must leave, in per cent, over the zoo's plans;
    ``mainstream`` says whether the goal of 80 % is meant for it. ``heads`` are convolutions that make an output, which
    a plan should leave alone. Where groups of ``run`` channels have to stay of one size, a plan should take
    equally many from each ``run`` filters.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    floor: float
    whole: Callable[[], nn.Module] | None = None
    whole_shape: tuple[int, ...] = (2, 3, 64, 64)
    mainstream: bool = True
    heads: tuple[str, ...] = ()
    run: int = 1
