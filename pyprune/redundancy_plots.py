"""Figures of redundancy: Omega in every layer, lambda along depth, the first kernels beside their twins; and a page."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyprune import drawing, files
from pyprune.convolutions import read_networks
from pyprune.drawing import ACCENT, GREY, LIGHT
from pyprune.types import BINS, CKRM, EPSILONS, FloatArray, IntArray, LayerRedundancy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN_KERNELS = 18
"""Filters that are drawn beside their twins, the most similar first."""

SHOWN_LAYERS = 180
"""Layers in a figure: more would be neither drawn nor read in reasonable time."""

_COARSE = 2  # of the fine bins make one bar,
_COARSER = 5  # or so many where the pairs are few, or a run would be a comb
_FEW = 200
_COLUMNS = 6


def plot_ckrm(
    result: CKRM, folder: str | os.PathLike[str], weights: Any = None, *, form: str = "svg"
) -> dict[str, Path]:
    """Draw ``result`` into files, each written beside its place and renamed.

    Parameters
    ----------
    result
        What :func:`pyprune.ckrm` returned.
    folder
        Created if needed; old files of those names are replaced.
    weights
        What was given to :func:`pyprune.ckrm`. With it, the kernels of each network's first layer are drawn too.
    form
        ``"svg"`` or ``"png"``.

    Returns
    -------
    dict
        The paths: ``"omega"``, ``"depth"``, and ``"kernels 0"``, ``"kernels 1"``, ... for the networks in order.

    Raises
    ------
    ValueError
        If the folder cannot be written, ``form`` is neither, or the weights have another shape than the result.
    TypeError
        If ``result`` is no CKRM.
    """
    if not isinstance(result, CKRM):
        raise TypeError(f"plot_ckrm: needs the CKRM of pyprune.ckrm; got {type(result).__name__}.")
    if form not in ("svg", "png"):
        raise ValueError(f"plot_ckrm: form must be 'svg' or 'png'; got {form!r}.")
    figures = {"omega": omega_figure(result), "depth": depth_figure(result)}
    for i, figure in enumerate(_kernel_figures("plot_ckrm", result, weights).values()):
        figures[f"kernels {i}"] = figure
    place = files.make_folder("plot_ckrm", folder)
    paths = {}
    for name, figure in figures.items():
        paths[name] = place / f"{name.replace(' ', '_')}.{form}"
        files.write_bytes(paths[name], drawing.encoded(figure, form))
    return paths


def redundancy_page(result: CKRM, path: str | os.PathLike[str], weights: Any = None) -> None:
    """Write ``result`` as one HTML page with its figures inside: no script, no request to anywhere.

    Parameters are those of :func:`plot_ckrm`, and so are the errors.
    """
    first = next(iter(result.networks))
    drawing.write_page(
        "report", "ckrm.html", path,
        result=result,
        epsilons=EPSILONS,
        networks=[
            {"name": name, "rows": _rows(result, name), "left_out": result.left_out.get(name, {})}
            for name in result.networks
        ],
        redundant=sum(value > 0 for value in result.lambdas(network=first).values()),
        beyond=sum(layer.z > 2 for layer in result.layers(first).values()),
        first=first,
        omega=omega_figure(result),
        depth=depth_figure(result),
        kernels=_kernel_figures("report", result, weights),
    )  # fmt: skip


def _rows(result: CKRM, network: str) -> list[dict[str, Any]]:
    """Collect what the page's table shows about each layer."""
    return [
        {
            "name": name,
            "layer": layer,
            "shape": " x ".join(map(str, layer.shape)),
            "lambdas": [_share(value) for value in layer.lambdas[0]],
            "intervals": [f"{low:.4f} to {high:.4f}" for low, high in layer.intervals[0]] if layer.sampled else [],
            "elsewhere": [_share(value) for value in layer.lambdas[1:, 0]],
            "random": _share(layer.random.lambdas[0, 0]) if layer.random else "",
            "mean": _share(layer.mean),
            "z": "" if math.isnan(layer.z) else f"{layer.z:+.2f}",
            "above": "" if layer.above_random is None else f"{layer.above_random_share:.1%}",
            "top": [f"{i} and {j}: {psi:.3f}" for i, j, psi in layer.top[:3]],
        }
        for name, layer in result.layers(network).items()
    ]


def _share(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.4f}"


def omega_figure(result: CKRM) -> Figure:
    """Draw how Psi is distributed in every layer, the networks over one another and the null behind them."""
    names = _names(result)
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    width, height = 2.1 * columns + 0.5, 1.4 * rows + 1.1
    # Margins by hand, in inches: the constrained layout of fifty panels takes seconds.
    figure, panels = drawing.new_grid(rows, columns, width, height, layout=None)
    figure.subplots_adjust(
        left=0.65 / width, right=1 - 0.1 / width, bottom=0.5 / height, top=1 - 0.6 / height, wspace=0.3, hspace=0.45
    )
    for axes in panels[len(names) :]:
        axes.axis("off")
    for name, axes in zip(names, panels, strict=False):
        draw_omega(axes, [layers.get(name) for layers in result.networks.values()], result.thresholds)
        axes.set_title(drawing.label(name, 30), fontsize=7, parse_math=False)
        axes.tick_params(labelsize=6)
    figure.supxlabel("similarity Psi of a pair of filters", fontsize=8, y=0.1 / height)
    figure.supylabel("share of the pairs", fontsize=8, x=0.05 / width)
    drawing.add_legend(
        figure, [*zip(result.networks, drawing.colours(len(result.networks)), strict=False), ("random kernels", LIGHT)]
    )
    return figure


def _names(result: CKRM) -> list[str]:
    """Return the layers of all networks in order, as many as a figure shows."""
    return list(dict.fromkeys(name for layers in result.networks.values() for name in layers))[:SHOWN_LAYERS]


def draw_omega(axes: Axes, networks: Sequence[LayerRedundancy | None], thresholds: Sequence[float]) -> None:
    """Draw how Psi is distributed in one layer of several networks, over one another and over random kernels."""
    coarse = _COARSER if max((layer.pairs for layer in networks if layer is not None), default=0) < _FEW else _COARSE
    edges = np.linspace(0, 1, BINS // coarse + 1)
    null = next((layer.random for layer in networks if layer is not None and layer.random is not None), None)
    if null is not None:
        axes.stairs(_shares(null.histogram, coarse), edges, fill=True, color=LIGHT)
    for layer, colour in zip(networks, drawing.colours(len(networks)), strict=True):
        if layer is not None and layer.pairs:
            axes.stairs(_shares(layer.histogram, coarse), edges, color=colour, lw=1)
    for t in thresholds:
        axes.axvline(t, color=GREY, lw=0.7, ls="--")
    axes.set(xlim=(0, 1), xticks=(0, 0.5, 1))
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", nbins=3)


def _shares(histogram: IntArray, coarse: int) -> FloatArray:
    bars = histogram.reshape(-1, coarse).sum(axis=1)
    shares: FloatArray = bars / max(int(bars.sum()), 1)
    return shares


def depth_figure(result: CKRM) -> Figure:
    """Draw lambda of the first threshold along depth: networks by colour, the three constants one below the other."""
    names = _names(result)
    width = min(3 + 0.16 * len(names), 14)
    figure, panels = drawing.new_grid(len(EPSILONS), 1, width, 5.6, sharex=True)
    for row, (axes, eps) in enumerate(zip(panels, EPSILONS, strict=True), start=1):
        for layers, colour in zip(result.networks.values(), drawing.colours(len(result.networks)), strict=False):
            axes.plot(_along(layers, names, lambda one, r=row: one.lambdas[r, 0]), "-o", ms=2.5, lw=1, color=colour)
        null = _along(next(iter(result.networks.values())), names, lambda one, r=row: _null_lambda(one, r))
        axes.plot(null, color=GREY, lw=1, ls="--")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"eps {eps:g}")
    panels[0].set_title(f"lambda: share of the pairs with Psi > {result.thresholds[0]:g}", fontsize=9)
    panels[-1].set_xticks(
        range(len(names)), [drawing.label(name, 24) for name in names], rotation=90, fontsize=6, parse_math=False
    )
    drawing.add_legend(
        figure, [*zip(result.networks, drawing.colours(len(result.networks)), strict=False), ("random kernels", GREY)]
    )
    return figure


def _along(layers: Mapping[str, LayerRedundancy], names: list[str], value: Any) -> list[float]:
    return [float(value(layers[name])) if name in layers else math.nan for name in names]


def _null_lambda(layer: LayerRedundancy, row: int) -> float:
    return float(layer.random.lambdas[row, 0]) if layer.random is not None else math.nan


def _kernel_figures(who: str, result: CKRM, weights: Any) -> dict[str, Figure]:
    """Return, by network, the figure of its first layer's kernels; nothing without weights."""
    if weights is None:
        return {}
    include_1x1 = any(
        math.prod(layer.shape[2:]) == 1 for layers in result.networks.values() for layer in layers.values()
    )
    given = read_networks(who, weights, include_1x1=include_1x1)
    figures = {}
    for network, layers in result.networks.items():
        name, layer = next(iter(layers.items()))
        kernels = given[network].layers.get(name) if network in given else None
        if kernels is None or kernels.shape != layer.shape:
            raise ValueError(
                f"{who}: weights must be those that were measured; they have no {name!r} of shape "
                f"{list(layer.shape)} in {network!r}."
            )
        if layer.pairs:
            figures[network] = kernels_figure(layer, kernels.on_host(), title=name)
    return figures


def kernels_figure(layer: LayerRedundancy, kernels: FloatArray, title: str = "") -> Figure:
    """Draw filters beside their nearest twins, the most similar first.

    Kernels of three input channels are shown in colour, scaled to the largest weight of the filter; others by the
    one input channel that has the most energy in the pair, blue below and red above zero.

    Parameters
    ----------
    layer
        The measured layer.
    kernels
        Its weights [F2, F1, K1, K2] float64.
    title
        What stands above.
    """
    shown = _twin_pairs(layer)
    columns = min(6, len(shown))
    rows = -(-len(shown) // columns)
    ratios = [1, 1, 0.35] * columns  # a filter, its twin, a gap
    figure, grid = drawing.new_grid(rows, 3 * columns, 1.7 * columns, 1.05 * rows + 0.4, width_ratios=ratios)
    for axes in grid:
        axes.axis("off")
    for place, (i, twin) in enumerate(shown):
        channel = int(np.square(kernels[[i, twin]]).sum(axis=(0, 2, 3)).argmax())
        left, right = grid[3 * place : 3 * place + 2]
        _show(left, kernels[i], channel)
        _show(right, kernels[twin], channel)
        left.set_title(f"{i} and {twin}", fontsize=7, loc="left", pad=2)
        right.set_title(f"{layer.twin_psi[i]:.3f}", fontsize=7, loc="right", pad=2, color=ACCENT)
    figure.suptitle(
        f"{drawing.label(title, 60)}: filters beside their nearest twins, and Psi", fontsize=9, parse_math=False
    )
    return figure


def _twin_pairs(layer: LayerRedundancy) -> list[tuple[int, int]]:
    """Return filters with their twins, the most similar first; two that are each other's twins once."""
    psi = np.nan_to_num(layer.twin_psi, nan=-1.0)
    found: list[tuple[int, int]] = []
    for i in np.argsort(-psi, kind="stable").tolist():
        twin = int(layer.twins[i])
        if twin >= 0 and (twin, i) not in found:
            found.append((i, twin))
    return found[:SHOWN_KERNELS]


def _show(axes: Axes, kernel: FloatArray, channel: int) -> None:
    """Draw one filter [F1, K1, K2]."""
    if len(kernel) == 3:
        largest = np.abs(kernel).max() or 1.0
        axes.imshow(np.moveaxis(0.5 + kernel / (2 * largest), 0, -1), interpolation="nearest")
    else:
        largest = np.abs(kernel[channel]).max() or 1.0
        axes.imshow(kernel[channel], cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
