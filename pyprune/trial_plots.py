"""Figures of a trial: top-1 run by run, what two plans have in common layer by layer, and the page with both."""

from __future__ import annotations

import os
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from pyprune import drawing
from pyprune.comparing import Trial
from pyprune.drawing import ACCENT, COLOURS, GREY, LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_PAIRS = 6
"""Pairs of methods whose overlaps are drawn: more lines cannot be told apart."""


def trial_page(result: Trial, path: str | os.PathLike[str]) -> None:
    """Write ``result`` as one HTML page with its figures inside: no script, no request to anywhere.

    Raises
    ------
    ValueError
        If ``path`` lies in a folder that cannot be written.
    """
    drawing.write_page(
        "report", "trial.html", path,
        result=result, rows=result.rows(), pairs=result.pairs(), accuracy=accuracy_figure(result),
        overlaps=overlap_figure(result) if len(result.attempts) > 1 else None, shown=SHOWN_PAIRS,
    )  # fmt: skip


def accuracy_figure(result: Trial) -> Figure:
    """Draw the top-1 of every run, methods in the order of their means, beside the original's and the untuned."""
    rows = result.rows()
    figure, axes = drawing.new_axes(6.4, 0.9 + 0.32 * len(rows))
    for place, row in enumerate(reversed(rows)):
        method = row["method"]
        untuned = [100 * one.pruned.top1 for one in result.attempts[method]]
        axes.plot(untuned, [place] * len(untuned), "|", color=GREY, label="before fine-tuning" if not place else None)
        axes.plot([100 * row["top1"]] * 2, [place - 0.25, place + 0.25], color=ACCENT, linewidth=2)
        found = 100 * result.top1(method)
        axes.plot(found, [place] * len(found), "o", color=ACCENT, alpha=0.6, label="a run" if not place else None)
    axes.axvline(100 * result.original.top1, color=LIGHT, zorder=0)
    axes.annotate("original", (100 * result.original.top1, len(rows) - 0.5), color=GREY, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["method"] for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.2)
    axes.set_xlabel("top-1 on the test images, %; the bar is the mean")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def overlap_figure(result: Trial) -> Figure:
    """Draw, along depth, how many more filters two plans have in common than blind draws would, as shares."""
    pairs = list(combinations(result.attempts, 2))[:SHOWN_PAIRS]
    figure, axes = drawing.new_axes(6.4, 2.8)
    names: list[str] = []
    for (first, second), colour in zip(pairs, COLOURS, strict=False):
        found = {
            name: one
            for name, one in result.overlaps(first, second).items()
            if min(one.first, one.second) < one.filters
        }
        names = list(found) if len(found) > len(names) else names
        beyond = [(one.common - one.chance) / min(one.first, one.second) for one in found.values()]
        axes.plot(np.arange(len(beyond)), beyond, ".-", color=colour, linewidth=1, label=f"{first}, {second}")
    axes.axhline(0, color=GREY, linewidth=0.8)
    step = max(1, len(names) // 12)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=45, ha="right", fontsize=7)
    axes.set_ylabel("in common beyond chance")
    axes.legend(frameon=False, fontsize=7, ncols=2)
    return figure
