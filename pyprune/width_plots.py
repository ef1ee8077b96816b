"""Figures of a search for widths: what changed step by step, the narrow network beside the standard one; and a page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyprune import drawing, files
from pyprune.drawing import ACCENT, COLOURS, GREY, INK, LIGHT
from pyprune.redundancy_plots import draw_omega
from pyprune.searching import WidthRun, WidthSearch, WidthStep
from pyprune.types import FloatArray, LayerRedundancy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_LAYERS = 60
"""Layers of which both networks are drawn: two panels each, and a hundred take a few seconds."""

NAMED_WIDTHS = 12
"""Lines that are named beside a figure; of more, so many along the depth."""

_CELLS = 3  # layers in a row of the figure of both networks
_SCORES = 4  # in a row
_NAMED_RUNS = 3  # whose lambdas fit above a panel
_ABOVE: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 6.5, "parse_math": False}


def plot_widths(search: WidthSearch, folder: str | os.PathLike[str], *, form: str = "svg") -> dict[str, Path]:
    """Draw ``search`` into files, each written beside its place and renamed.

    Parameters
    ----------
    search
        What :func:`pyprune.optimize_widths` returned.
    folder
        Created if needed; old files of those names are replaced.
    form
        ``"svg"`` or ``"png"``.

    Returns
    -------
    dict
        The paths: ``"steps"`` (width, lambda and scores by step), ``"parameters"``, ``"omega"`` (the CKRM paper's
        table 3: Omega and lambda of every layer, narrow beside standard) and ``"scores"`` (its figure 1). The last two
        are missing where no run of the standard network ended well.

    Raises
    ------
    ValueError
        If the folder cannot be written, or ``form`` is neither.
    TypeError
        If ``search`` is no WidthSearch.
    """
    if not isinstance(search, WidthSearch):
        raise TypeError(f"plot_widths: needs the WidthSearch of optimize_widths; got {type(search).__name__}.")
    if form not in ("svg", "png"):
        raise ValueError(f"plot_widths: form must be 'svg' or 'png'; got {form!r}.")
    place = files.make_folder("plot_widths", folder)
    paths = {}
    for name, figure in _figures(search).items():
        paths[name] = place / f"{name}.{form}"
        files.write_bytes(paths[name], drawing.encoded(figure, form))
    return paths


def _figures(search: WidthSearch) -> dict[str, Figure]:
    found = {"steps": steps_figure(search), "parameters": parameters_figure(search)}
    if search.standard.runs:
        found |= {"omega": omega_figure(search), "scores": scores_figure(search)}
    return found


def widths_page(search: WidthSearch, path: str | os.PathLike[str]) -> None:
    """Write ``search`` as one HTML page with its figures inside: no script, no request to anywhere.

    Raises
    ------
    ValueError
        If ``path`` lies in a folder that cannot be written.
    """
    shared = {name: layers for name, layers in search.layers.items() if name in search.widths}
    drawing.write_page(
        "report", "widths.html", path,
        search=search, figures=_figures(search), rows=search.rows(), layers=_layers(search),
        shown=min(len(_layer_names(search)), SHOWN_LAYERS), shared=shared,
        statistics=_statistics(search) if search.narrow is not search.standard and search.standard.runs else [],
        share=_share(search, search.narrow), changed=search.narrow is not search.standard,
    )  # fmt: skip


def _statistics(search: WidthSearch) -> list[dict[str, Any]]:
    """Collect what is said of each score of the standard and the narrow network."""
    return [
        {
            "score": score, "standard": _mean(search.sample(search.standard, score)),
            "narrow": _mean(search.sample(search.narrow, score)), "compare": search.compare(score),
            "anova": search.anova(score), "equivalence": search.equivalence(score) if search.tolerance else None,
        }
        for score in search.scores
    ]  # fmt: skip


def _layers(search: WidthSearch) -> list[dict[str, Any]]:
    """Collect lambda of every layer in every run of both networks."""
    both = [search.narrow, search.standard] if search.narrow is not search.standard else [search.standard]
    return [{"name": name, "networks": [_cell(step.runs, name) for step in both]} for name in _layer_names(search)]


def _cell(runs: Sequence[WidthRun], name: str) -> dict[str, Any] | None:
    found = [run.redundancy.layers()[name] for run in runs if name in run.redundancy.layers()]
    if not found:
        return None
    null = found[0].random
    return {
        "shape": " x ".join(map(str, found[0].shape)),
        "lambdas": [_told(float(layer.lambdas[0, 0])) for layer in found],
        "random": "" if null is None else _told(float(null.lambdas[0, 0])),
        "distinct": [str(run.distinct[name]) for run in runs if name in run.distinct],
    }


def _told(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.4f}"


def _mean(values: FloatArray) -> float | None:
    return float(values.mean()) if len(values) else None


def _share(search: WidthSearch, step: WidthStep) -> str:
    """Return the parameters of a step as a share of the standard network's."""
    if step.parameters is None or not search.standard.parameters:
        return ""
    percent = 100 * step.parameters / search.standard.parameters
    return f"{percent:.0f}%" if percent >= 10 else f"{percent:.2g}%"


def steps_figure(search: WidthSearch) -> Figure:
    """Draw width, lambda and the deciding score step by step; grey steps do not hold, and the chosen one is named.

    A width is redundant where its lambda is above the dotted line of its colour: random kernels, and the target.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    names, steps = list(search.standard.widths), search.steps
    hues, target = _hues(len(names)), float(search.options.get("target", 0))
    figure, panels = drawing.new_grid(3, 1, min(5.0 + 0.35 * len(steps), 12), 6.6, sharex=True)
    widths, lambdas, scores = panels
    for i, (name, hue) in enumerate(zip(names, hues, strict=True)):
        found = [search.redundancy(step, name) for step in steps]
        limit = [value - search.excess(step, name) + target for value, step in zip(found, steps, strict=True)]
        aside = 0.9 * ((len(names) - 1) / 2 - i) if len(names) <= len(COLOURS) else 0.0
        _plot_aside(widths, [step.widths[name] for step in steps], aside, "-o", color=hue, ms=3, lw=1.2)
        _plot_aside(lambdas, found, aside, "-o", color=hue, ms=3, lw=1.2)
        _plot_aside(lambdas, limit, aside, ":_", color=hue, ms=5, lw=0.8)
    every = [width for step in steps for width in step.widths.values()]
    widths.set_yscale("log", base=2, subs=[])
    if max(every) < 16 * min(every):  # few powers of two: name what lies between as well
        widths.yaxis.set_major_locator(LogLocator(2, subs=(1, 1.5)))
    widths.yaxis.set_major_formatter("{x:g}")
    widths.set_ylabel("filters")
    threshold = search.options.get("threshold")
    lambdas.set_ylabel("lambda" if threshold is None else f"lambda, Psi > {threshold}", parse_math=False)
    lambdas.set_ylim(bottom=0)
    told = f"random kernels + {target:g}" if target else "random kernels"
    handles = [Line2D([], [], color=GREY, ls="-", label="lambda"), Line2D([], [], color=GREY, ls=":", label=told)]
    _quiet_legend(lambdas, handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7)
    _draw_scores(scores, search)
    _mark_steps(panels, search)
    _name_widths(widths, names, hues)
    figure.align_ylabels(panels)
    return figure


def _plot_aside(axes: Axes, values: Sequence[float], points: float, style: str, **more: Any) -> None:
    """Draw a line moved upwards by some points, so that those with the same values lie beside one another."""
    from matplotlib.transforms import ScaledTranslation

    figure: Any = axes.figure
    moved = axes.transData + ScaledTranslation(0, points / 72, figure.dpi_scale_trans)
    axes.plot(values, style, clip_on=False, transform=moved, **more)
    axes.update_datalim([(at, value) for at, value in enumerate(values) if math.isfinite(value)] or [(0, 1)])


def _hues(count: int) -> list[Any]:
    """Return a colour each for a few, and colours along the depth for many."""
    if count <= len(COLOURS):
        return drawing.colours(count)
    from matplotlib import colormaps

    return [colormaps["viridis"](0.95 * i / (count - 1)) for i in range(count)]


def _draw_scores(axes: Axes, search: WidthSearch) -> None:
    """Draw every run, the means, and how far below the standard's the mean may fall."""
    metric, steps = search.metric, search.steps
    kinds: list[tuple[str, str, str, str]] = [("validation", metric, "o", ACCENT)]
    if search.tests:
        kinds.append(("test", metric if metric in search.tests else search.tests[0], "s", COLOURS[1]))
    for offset, (kind, score, marker, hue) in zip((-0.06, 0.06) if len(kinds) > 1 else (0,), kinds, strict=True):
        found = [step.validation(score) if kind == "validation" else step.test(score) for step in steps if step.runs]
        at = np.array([i for i, step in enumerate(steps) if step.runs], np.float64) + offset
        for place, values in zip(at, found, strict=True):
            axes.plot([place] * len(values), values, marker, color=hue, ms=3.5, alpha=0.45, mew=0)
        name = f"{kind} {drawing.label(score, 24)}"
        axes.plot(
            at, [values.mean() for values in found], "-" + marker, color=hue, lw=1.2, ms=4.5, mfc="none", label=name
        )
    if search.standard.runs and search.tolerance:
        mean = float(search.standard.validation(metric).mean())
        axes.axhspan(mean - search.tolerance, mean, color=ACCENT, alpha=0.1, lw=0, label="tolerance")
    if not any(step.runs for step in steps):
        axes.set_yticks([])
    axes.set_ylabel(drawing.label(metric, 24), parse_math=False)
    axes.set_xlabel("step; grey ones do not hold")
    _quiet_legend(axes, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7)


def _quiet_legend(axes: Axes, **more: Any) -> None:
    """Add a legend, if there is anything in it, whose names are no formulas."""
    if axes.get_legend_handles_labels()[0] or "handles" in more:
        for text in axes.legend(frameon=False, **more).get_texts():
            text.set_parse_math(False)


def _mark_steps(panels: Sequence[Axes], search: WidthSearch) -> None:
    for i, step in enumerate(search.steps):
        for axes in panels:
            if not step.holds:
                axes.axvspan(i - 0.5, i + 0.5, color=LIGHT, alpha=0.45, lw=0, zorder=0)
            if step is search.narrow:
                axes.axvline(i, color=GREY, lw=0.8, ls=":", zorder=0)
        if step is search.narrow:
            panels[0].annotate("standard" if not i else "chosen", (i, 1), (0, 2), xycoords=("data", "axes fraction"),
                               textcoords="offset points", ha="center", fontsize=7, color=GREY)  # fmt: skip
        if not step.runs:
            panels[-1].annotate("no run", (i, 0), (0, 3), xycoords=("data", "axes fraction"),
                                textcoords="offset points", ha="center", fontsize=7, color=GREY)  # fmt: skip
    panels[-1].set_xticks(range(len(search.steps)))
    panels[-1].set_xlim(-0.5, len(search.steps) - 0.5)


def _name_widths(axes: Axes, names: list[str], hues: list[Any]) -> None:
    from matplotlib.lines import Line2D

    chosen = np.unique(np.linspace(0, len(names) - 1, min(len(names), NAMED_WIDTHS)).round().astype(int))
    handles = [Line2D([], [], color=hues[i], lw=2, label=drawing.label(names[i], 24)) for i in chosen]
    title = f"{len(chosen)} of {len(names)} widths" if len(chosen) < len(names) else None
    _quiet_legend(axes, handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, title=title,
                  title_fontsize=7, labelspacing=0.3)  # fmt: skip


def parameters_figure(search: WidthSearch) -> Figure:
    """Draw how many parameters each step has; light bars do not hold, and the chosen one stands out."""
    steps = search.steps
    figure, axes = drawing.new_axes(min(2.2 + 0.75 * len(steps), 12), 2.6)
    for i, step in enumerate(steps):
        hue = ACCENT if step is search.narrow else GREY if step.holds else LIGHT
        axes.bar(i, step.parameters or 0, 0.7, color=hue)
        told = "no run" if step.parameters is None else f"{_short(step.parameters)}\n{_share(search, step)}".strip()
        axes.annotate(told, (i, step.parameters or 0), (0, 2), textcoords="offset points", ha="center", fontsize=7,
                      color=ACCENT if step is search.narrow else INK)  # fmt: skip
    axes.set_ylim(0, 1.22 * max([step.parameters or 0 for step in steps] + [1]))
    axes.set_xlim(-0.6, len(steps) - 0.4)
    axes.set_xticks(range(len(steps)))
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    axes.locator_params(axis="y", nbins=4)
    axes.set(xlabel="step; light ones do not hold", ylabel="parameters")
    return figure


def _short(count: float) -> str:
    """Return a count with at most three digits and a letter."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{letter}"
    return f"{count:g}"


def omega_figure(search: WidthSearch) -> Figure:
    """Draw Omega of every layer, the narrow network left and the standard one right (CKRM paper, table 3).

    Runs lie over one another, with lambda of each above them and random kernels behind. Heights are square roots, since
    what lambda counts is a tail of a few pairs in a thousand. Panels have scales of their own: a distribution is
    narrower, and so higher, the more input channels there are. Where no narrower network holds, the standard one stands
    alone.
    """
    both = [search.narrow, search.standard] if search.narrow is not search.standard else [search.standard]
    every, names = _layer_names(search), _layer_names(search)[:SHOWN_LAYERS]
    cells = min(_CELLS, len(names))
    rows = -(-len(names) // cells)
    width, height = cells * (1.62 * len(both) + 0.25) + 0.5, 1.35 * rows + 1.3
    figure, panels = drawing.new_grid(rows, cells * len(both), width, height, layout=None)
    count = min(max(len(step.runs) for step in both), len(COLOURS))
    bottom, top = 0.5 / height, 1 - (0.85 if count < 6 else 1.0) / height  # six names fit in a row
    figure.subplots_adjust(left=0.3 / width, right=1 - 0.15 / width, bottom=bottom, top=top, wspace=0.14, hspace=0.85)
    for axes in panels:
        axes.axis("off")
    for place, name in enumerate(names):
        cell = panels[place * len(both) : (place + 1) * len(both)]
        for step, axes in zip(both, cell, strict=True):
            _draw_layer(axes, [run.redundancy.layers().get(name) for run in step.runs], _threshold(search))
        cell[0].annotate(drawing.label(name, 30), (0, 1), (0, 19), **{**_ABOVE, "fontsize": 8}, weight="bold")
    sides = "narrow network left, standard right" if len(both) > 1 else "standard network; no narrower one holds"
    some = f"; the first {len(names)} of {len(every)} layers" if len(names) < len(every) else ""
    figure.suptitle(f"Omega, runs over one another: {sides}{some}", fontsize=9, y=1 - 0.12 / height)
    figure.supxlabel(
        "similarity Psi of a pair of filters; dashed: the threshold; heights: the square root of the share of pairs",
        fontsize=8,
        y=0.1 / height,
    )
    runs = [(f"run {i + 1}", hue) for i, hue in enumerate(drawing.colours(count))]
    drawing.add_legend(figure, [*runs, ("random kernels", LIGHT)], y=1 - 0.2 / height)
    return figure


def _layer_names(search: WidthSearch) -> list[str]:
    """Return the layers of the standard and of the narrow network in order of depth."""
    steps = [step for step in (search.standard, search.narrow) if step.runs]
    return list(dict.fromkeys(name for step in steps for name in step.runs[0].redundancy.layers()))


def _threshold(search: WidthSearch) -> float:
    run = next(run for step in search.steps for run in step.runs)
    return run.redundancy.thresholds[0]


def _draw_layer(axes: Axes, layers: Sequence[LayerRedundancy | None], threshold: float) -> None:
    """Draw one layer of one network: Omega of its runs, its size, and lambda of each run in the run's colour."""
    found = [layer for layer in layers if layer is not None]
    if not found:
        return
    axes.axis("on")
    axes.set_yscale("function", functions=(np.sqrt, np.square))  # or nobody would see the tail
    draw_omega(axes, layers, (threshold,))
    axes.set_ylim(bottom=0)
    axes.set(xlim=(0, 1), xticks=(0, 0.5, 1), yticks=())
    axes.tick_params(labelsize=6, pad=1)
    axes.annotate("x".join(map(str, found[0].shape)), (0, 1), (0, 10), **_ABOVE, color=GREY)
    _name_lambdas(axes, [(float(layer.lambdas[0, 0]), i) for i, layer in enumerate(layers) if layer is not None])


def _name_lambdas(axes: Axes, found: list[tuple[float, int]]) -> None:
    """Write lambda of each run in the run's colour above a panel, or of many runs the mean and the range."""
    values = [value for value, _ in found]
    if all(math.isnan(value) for value in values):
        axes.annotate("no pairs", (0, 1), (0, 2), **_ABOVE, color=GREY)
    elif len(found) > _NAMED_RUNS:
        told = f"{np.nanmean(values):.4f} ({np.nanmin(values):.4f} to {np.nanmax(values):.4f})"
        axes.annotate(f"lambda {told}", (0, 1), (0, 2), **_ABOVE, color=INK)
    else:
        axes.annotate("lambda", (0, 1), (0, 2), **_ABOVE, color=GREY)
        for place, (value, i) in enumerate(found):
            axes.annotate(
                _told(value), (0, 1), (29 + 26 * place, 2), **_ABOVE, color=_darker(COLOURS[i % len(COLOURS)])
            )


def _darker(hue: str) -> Any:
    """Return a colour that small letters can have."""
    from matplotlib.colors import to_rgb

    return tuple(0.72 * part for part in to_rgb(hue))


def scores_figure(search: WidthSearch) -> Figure:
    """Draw the scores of the standard network beside the narrow one's: a dot a run, a bar the mean (paper, figure 1).

    The tolerance about the standard network's mean is grey.
    """
    both = {"standard": search.standard, "narrow": search.narrow}
    if search.narrow is search.standard:
        del both["narrow"]
    kind = "test" if search.tests else "validation"
    columns = min(len(search.scores), _SCORES)
    rows = -(-len(search.scores) // columns)
    figure, panels = drawing.new_grid(rows, columns, max(2.5 * columns, 2.8), 3.1 * rows)
    for axes in panels[len(search.scores) :]:
        axes.axis("off")
    for axes, score in zip(panels, search.scores, strict=False):
        for place, step in enumerate(both.values()):
            values = search.sample(step, score)
            spread = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(1)
            hue = COLOURS[place]
            axes.plot(place + spread, values, "o", color=hue, ms=5, alpha=0.7, mew=0)
            axes.plot([place - 0.25, place + 0.25], [values.mean()] * 2, color=hue, lw=2)
        if search.tolerance:
            mean = search.sample(search.standard, score).mean()
            axes.axhspan(mean - search.tolerance, mean + search.tolerance, color=LIGHT, alpha=0.45, lw=0, zorder=0)
        axes.set_xticks(range(len(both)), list(both))
        axes.set_xlim(-0.6, len(both) - 0.4)
        axes.margins(y=0.1)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.locator_params(axis="y", nbins=5)
        axes.set_ylabel(f"{kind} {drawing.label(score, 24)}", parse_math=False)
        axes.set_title(_verdict(search, score) if len(both) > 1 else "", fontsize=7)
    return figure


def _verdict(search: WidthSearch, score: str) -> str:
    """Return the two tests in as many lines."""
    found = search.anova(score)
    lines = ["ANOVA: undefined" if found.f is None or found.p is None
             else f"ANOVA: F({found.between}, {found.within}) = {found.f:.3g}, p = {found.p:.2g}"]  # fmt: skip
    if search.tolerance:
        same = search.equivalence(score)
        lines.append(f"equal within {same.margin:g}: " + ("undefined" if same.p is None else f"p = {same.p:.2g}"))
    return "\n".join(lines)
