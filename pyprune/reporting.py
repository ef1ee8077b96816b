"""One self-contained HTML page about a result: what went, why, what it cost, and the proof; or what is redundant."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from pyprune import drawing, redundancy_plots, trial_plots, width_plots
from pyprune.comparing import Trial
from pyprune.drawing import ACCENT, COLOURS, GREY, INK, new_axes
from pyprune.searching import WidthSearch
from pyprune.types import CKRM, ClassRanks, Compacted, Evaluation, History, LayerWhy, Plan, PruneResult, Region

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def report(result: PruneResult | CKRM | Trial | WidthSearch, path: str | os.PathLike[str]) -> None:
    """Write ``result`` as one HTML page with its pictures inside: no script, no request to anywhere.

    For a :class:`PruneResult` it shows, for every convolution, the heatmap of R (filters by classes, thesis figure 4.2)
    and the filters in the plane of AVG and STD with the four regions (thesis figure 4.3). For a :class:`CKRM` it shows
    lambda along depth, and how similar the filters of every layer are; for a :class:`Trial` the accuracy of every run,
    and what the plans have in common; for a :class:`WidthSearch` every step, and both networks.

    Raises
    ------
    TypeError
        If ``result`` is none of these.
    ValueError
        If ``path`` lies in a folder that cannot be written.
    """
    if isinstance(result, CKRM):
        redundancy_plots.redundancy_page(result, path)
        return
    if isinstance(result, Trial):
        trial_plots.trial_page(result, path)
        return
    if isinstance(result, WidthSearch):
        width_plots.widths_page(result, path)
        return
    if not isinstance(result, PruneResult):
        raise TypeError(
            f"report: needs what pyprune.prune, ckrm, trial or optimize_widths returned; got {type(result).__name__}."
        )
    drawing.write_page(
        "report", "report.html", path,
        result=result,
        stages=list(result.evaluations.items()),
        costs=_costs(result.slim),
        layers=[_layer(name, result) for name in result.plan.keep],
        history=history_figure(result.history),
        per_class=per_class_figure(result.evaluations),
        proof=result.slim.certificate,
    )  # fmt: skip


def _costs(slim: Compacted) -> list[tuple[str, str, str, str]]:
    before, after = slim.before, slim.after
    rows: list[tuple[str, float | None, float | None, str]] = [
        ("Parameters", before.parameters, after.parameters, ",.0f"),
        ("MACs an image", before.macs, after.macs, ",.0f"),
        ("Parameters as HRank counts", before.hrank_v1_parameters, after.hrank_v1_parameters, ",.0f"),
        ("MACs as HRank counts", before.hrank_v1_macs, after.hrank_v1_macs, ",.0f"),
        (f"Latency, ms ({after.device})", before.latency_ms, after.latency_ms, ".3f"),
    ]
    return [
        (name, format(old, form), format(new, form), f"{1 - new / old:.1%}" if old else "")
        for name, old, new, form in rows
        if old is not None and new is not None
    ]


def _layer(name: str, result: PruneResult) -> dict[str, Any]:
    """Collect what the page shows about one convolution."""
    plan, why = result.plan, result.plan.why.get(name)
    kept_anyway = result.slim.kept.get(name, {})
    notes = [why.note] if why is not None and why.note else []
    notes += sorted({f"kept against the plan: {reason}" for reason in kept_anyway.values()})
    R = result.ranks.layers.get(name)
    before = plan.filters.get(name) or (len(R) if R is not None else 0)
    return {
        "name": name,
        "before": before,
        "after": len(plan.keep[name]) + len(kept_anyway),
        "k": why.k if why is not None else None,
        "silhouette": why.silhouette if why is not None else None,
        "stability": why.stability if why is not None else None,
        "tap": result.ranks.taps.get(name, ""),
        "notes": notes,
        "fates": None if why is None or why.k is None else _fates(why),
        "heatmap": None if R is None else heatmap_figure(result.ranks, plan, name),
        "regions": None if why is None or why.k is None else regions_figure(why),
    }


def _fates(why: LayerWhy) -> str:
    """Count the filters of one layer by what became of them: the words before a reason's figures."""
    counts = Counter(one.reason.partition(":")[0].replace("_", " ").lower() for one in why)
    return ", ".join(f"{count} {fate}" for fate, count in counts.most_common())


def heatmap_figure(ranks: ClassRanks, plan: Plan, name: str) -> Figure:
    """Draw R of one layer, classes by filters, filters sorted by mean rank; kept ones are ticked below."""
    figure, axes = new_axes(6.4, 2.9)
    R = ranks.layers[name]
    order = np.argsort(-R.mean(axis=1), kind="stable")
    shape = ranks.shapes.get(name)
    top = min(shape) if shape else R.max()
    image = axes.imshow(R[order].T, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
    kept = np.flatnonzero(np.isin(order, plan.keep[name]))
    axes.plot(kept, np.full(len(kept), R.shape[1] + 0.1), "^", color=ACCENT, markersize=4, clip_on=False)
    axes.set(xlabel="filters, by mean rank (triangles: kept)", ylabel="class", ylim=(R.shape[1] - 0.5, -0.5))
    axes.set_xticks([0, len(R) - 1], ["highest", "lowest"])
    axes.tick_params(axis="x", pad=8)
    figure.colorbar(image, ax=axes, label=f"mean rank (full: {top:g})")
    return figure


def regions_figure(why: LayerWhy) -> Figure:
    """Draw the filters of one layer by AVG and STD with the four regions, the clusters and every filter's fate."""
    figure, axes = new_axes(6.4, 3.4)
    x_mean, y_mean = why.avg_mean or 0.0, why.std_mean or 0.0
    axes.axvspan(x_mean, 1.06, ymin=0, ymax=(y_mean + 0.06) / 1.12, color=ACCENT, alpha=0.08, lw=0)
    axes.axvline(x_mean, color=GREY, lw=0.8, ls="--")
    axes.axhline(y_mean, color=GREY, lw=0.8, ls="--")
    surviving = sorted({one.cluster or 0 for one in why if one.medoid and one.region == Region.HIGH_AVG_LOW_STD})
    colour = {cluster: COLOURS[i % len(COLOURS)] for i, cluster in enumerate(surviving)}
    for one in why:
        if one.cluster is None or one.avg is None or one.std is None:
            continue
        shade = colour.get(one.cluster, GREY)
        axes.plot(
            one.avg, one.std, "*" if one.medoid else "o", color=shade, markersize=9 if one.medoid else 4.5,
            markerfacecolor=shade if one.keep else "none", alpha=1.0 if one.cluster in colour else 0.55,
        )  # fmt: skip
    corners = {
        Region.LOW_AVG_HIGH_STD: (0, 1), Region.HIGH_AVG_HIGH_STD: (1, 1),
        Region.LOW_AVG_LOW_STD: (0, 0), Region.HIGH_AVG_LOW_STD: (1, 0),
    }  # fmt: skip
    for region, (x, y) in corners.items():
        axes.annotate(
            region.replace("_", " ").lower(), (x, y), (4 - 8 * x, 4 - 8 * y), xycoords="axes fraction", color=GREY,
            textcoords="offset points", ha="right" if x else "left", va="top" if y else "bottom", fontsize=7,
        )  # fmt: skip
    axes.set(xlabel="AVG of the class ranks", ylabel="STD", xlim=(-0.06, 1.06), ylim=(-0.06, 1.06))
    _legend(axes, len(surviving), why.k or 0)
    return figure


def _legend(axes: Axes, surviving: int, k: int) -> None:
    from matplotlib.lines import Line2D

    def mark(marker: str, label: str, color: str, fill: bool) -> Line2D:
        return Line2D([], [], ls="", marker=marker, color=color, label=label, markerfacecolor=color if fill else "none")

    handles = [
        mark("o", "kept", INK, True), mark("o", "removed", INK, False), mark("*", "medoid", INK, True),
        mark("o", f"in one of {surviving} surviving clusters of {k}", COLOURS[0], True),
        mark("o", "in a cluster that goes", GREY, False),
    ]  # fmt: skip
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3, frameon=False, fontsize=7)


def history_figure(history: History) -> Figure:
    """Draw loss and validation top-1 by epoch of fine-tuning; the chosen epoch is marked."""
    figure, axes = new_axes(6.4, 2.6)
    epochs = [epoch.epoch for epoch in history.epochs]
    axes.plot(epochs, [epoch.train_loss for epoch in history.epochs], "-o", ms=3, color=ACCENT, label="training loss")
    axes.set(xlabel="epoch", ylabel="training loss")
    top1 = [epoch.val_top1 for epoch in history.epochs if epoch.val_top1 is not None]
    if len(top1) == len(epochs):
        right = axes.twinx()
        right.plot(epochs, top1, "-s", ms=3, color=COLOURS[1], label="validation top-1")
        right.set_ylabel("validation top-1")
        right.spines["right"].set_visible(True)
    axes.axvline(history.best, color=GREY, lw=0.8, ls=":")
    axes.annotate("chosen", (history.best, 1), (3, -2), xycoords=("data", "axes fraction"),
                  textcoords="offset points", color=GREY, fontsize=7, va="top")  # fmt: skip
    figure.legend(loc="upper center", ncols=2, frameon=False, fontsize=7, bbox_to_anchor=(0.5, 1.06))
    return figure


def per_class_figure(evaluations: Any) -> Figure:
    """Draw top-1 within each class, stage beside stage."""
    figure, axes = new_axes(6.4, 2.6)
    stages: list[tuple[str, Evaluation]] = list(evaluations.items())
    width = 0.8 / len(stages)
    for i, (name, evaluation) in enumerate(stages):
        classes = np.arange(len(evaluation.per_class))
        axes.bar(classes + (i - (len(stages) - 1) / 2) * width, evaluation.per_class, width,
                 color=COLOURS[i % len(COLOURS)], label=name)  # fmt: skip
    axes.set(xlabel="class", ylabel="top-1", ylim=(0, 1))
    figure.legend(loc="upper center", ncols=len(stages), frameon=False, fontsize=7, bbox_to_anchor=(0.5, 1.06))
    return figure
