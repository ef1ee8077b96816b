"""Pictures of a selection: for CRank every step from R to the kept filters, for other criteria the scores."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyprune import drawing, files
from pyprune.criteria.crank import BEST, min_max
from pyprune.drawing import ACCENT, COLOURS, GREY, INK, LIGHT
from pyprune.types import ClassRanks, FilterWhy, FloatArray, LayerWhy, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_selection(
    plan: Plan, folder: str | os.PathLike[str], ranks: ClassRanks | None = None, layers: Sequence[str] | None = None
) -> list[Path]:
    """Write one SVG for every layer that was judged, and return their paths.

    Parameters
    ----------
    plan
        From :func:`pyprune.select`.
    folder
        Created if need be.
    ranks
        What the plan was made from: with them a plan by CRank at its own rate is shown step by step.
    layers
        Only these.

    Raises
    ------
    ValueError
        If a layer is not in the plan, or the folder cannot be written.
    """
    target = files.make_folder("plot_selection", folder)
    written = []
    for name in plan.keep if layers is None else layers:
        if name not in plan.keep:
            raise ValueError(
                f"plot_selection: the plan has no layer {name!r}. It has {', '.join(list(plan.keep)[:8])}."
            )
        why = plan.why.get(name)
        if why is None or why.note:
            continue
        R = None if ranks is None else ranks.layers.get(name)
        if R is not None and why.k is not None:
            figure = steps_figure(R, why, name, by_layer=plan.options.get("scale") == "layer")
        elif all(one.score is not None for one in why):
            figure = scores_figure(why, f"{name} by {plan.method}")
        else:
            continue
        path = target / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.svg"
        files.write_bytes(path, drawing.encoded(figure))
        written.append(path)
    return written


def steps_figure(R: FloatArray, why: LayerWhy, title: str = "", *, by_layer: bool = False) -> Figure:
    """Draw CRank's selection in one layer, step by step: ranks, scaled ranks, regions, clusters, survivors, kept."""
    figure, panels = drawing.new_grid(3, 2, 9.0, 9.6)
    X = min_max(R.reshape(-1, 1)).reshape(R.shape) if by_layer else min_max(R)
    _heatmap(panels[0], R, "1. R: mean rank of each filter for each class")
    _heatmap(panels[1], X, f"2. X: min-max of {'the layer' if by_layer else 'every class'}")
    alive = sorted({one.cluster for one in why if one.medoid and one.region is BEST and one.cluster is not None})
    clusters = sorted({one.cluster for one in why if one.cluster is not None})
    shade = {cluster: COLOURS[i % len(COLOURS)] for i, cluster in enumerate(clusters)}
    inside = sum(one.region is BEST for one in why)
    _plane(panels[2], why, f"3. AVG and STD of the rows of X: {inside} filters in the region", lambda _: INK)
    _plane(
        panels[3], why, f"4. K = {why.k} clusters, mean silhouette {why.silhouette:.2f}; stars are medoids",
        lambda one: shade.get(one.cluster, GREY) if one.cluster is not None else GREY, stars=True,
    )  # fmt: skip
    _plane(
        panels[4], why, f"5. {len(alive)} clusters survive: their medoid lies in the region",
        lambda one: shade[one.cluster] if one.cluster in alive else LIGHT, stars=True,
    )  # fmt: skip
    _silhouettes(panels[5], why, alive, shade)
    figure.suptitle(
        f"{title}: {sum(one.keep for one in why)} of {len(why)} filters stay".removeprefix(": "), fontsize=11
    )
    return figure


def _heatmap(axes: Axes, values: FloatArray, title: str) -> None:
    image = axes.imshow(values.T, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set(xlabel="filter", ylabel="class")
    axes.set_title(title, fontsize=9, loc="left")
    axes.figure.colorbar(image, ax=axes)


def _plane(axes: Axes, why: LayerWhy, title: str, colour: Callable[[FilterWhy], str], *, stars: bool = False) -> None:
    """Draw the filters by AVG and STD, with the region of those that do well for every class."""
    x_mean, y_mean = why.avg_mean or 0.0, why.std_mean or 0.0
    axes.axvspan(x_mean, 1.06, ymin=0, ymax=(y_mean + 0.06) / 1.12, color=ACCENT, alpha=0.08, lw=0)
    axes.axvline(x_mean, color=GREY, lw=0.8, ls="--")
    axes.axhline(y_mean, color=GREY, lw=0.8, ls="--")
    for shape, size, chosen in (("o", 20, False), ("*", 90, True)):
        mine = [one for one in why if (stars and one.medoid) == chosen]
        axes.scatter(
            [one.avg or 0.0 for one in mine], [one.std or 0.0 for one in mine], size, [colour(one) for one in mine],
            marker=shape, zorder=3 if chosen else 2,
        )  # fmt: skip
    axes.set(xlabel="AVG", ylabel="STD", xlim=(-0.06, 1.06), ylim=(-0.06, 1.06))
    axes.set_title(title, fontsize=9, loc="left")


def _silhouettes(axes: Axes, why: LayerWhy, alive: Sequence[int], shade: dict[int, str]) -> None:
    """Draw the silhouettes of the members of surviving clusters; those that stay are filled."""
    members = [(f, one) for f, one in enumerate(why) if one.cluster in alive or one.keep]
    members.sort(key=lambda pair: (pair[1].cluster or 0, -(pair[1].silhouette or 0.0)))
    heights = [one.silhouette or 0.0 for _, one in members]
    tints = [GREY if one.cluster is None else shade[one.cluster] for _, one in members]
    fills = [tint if one.keep else "none" for tint, (_, one) in zip(tints, members, strict=True)]
    bars = axes.bar(range(len(members)), heights, color=fills, edgecolor=tints, lw=0.8)
    for bar, (_, one) in zip(bars, members, strict=True):
        bar.set_linestyle("-" if one.region is BEST else ":")
    at = [position for position, (_, one) in enumerate(members) if one.medoid]
    axes.scatter(at, [heights[i] + 0.03 for i in at], 45, [tints[i] for i in at], marker="*")
    axes.set(xlabel="filters of surviving clusters", ylabel="silhouette")
    if len(members) <= 40:
        axes.set_xticks(range(len(members)), [str(f) for f, _ in members], fontsize=6, rotation=90)
    else:
        axes.set_xticks([])
    axes.set_title("6. Filled bars stay. Redundant: above the mean; dotted: outside the region", fontsize=9, loc="left")


def scores_figure(why: LayerWhy, title: str = "") -> Figure:
    """Draw the scores of one layer in descending order; filters that stay are filled."""
    figure, axes = drawing.new_axes(6.4, 2.6)
    order = np.argsort([-(one.score or 0.0) for one in why], kind="stable").tolist()
    scores = [why[f].score or 0.0 for f in order]
    axes.bar(range(len(order)), scores, color=[ACCENT if why[f].keep else LIGHT for f in order], width=0.9)
    axes.set(xlabel="filters, by score (dark: kept)", ylabel="score")
    axes.set_title(
        f"{title}: {sum(one.keep for one in why)} of {len(why)} stay".removeprefix(": "), fontsize=9, loc="left"
    )
    return figure
