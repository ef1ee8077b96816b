"""What all figures and pages of pyprune share: one look, SVG without a date, pages that can run nothing."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyprune import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, LIGHT, ACCENT = "#1f2933", "#8a94a0", "#d5dbe1", "#0b6e99"
COLOURS = ("#0b6e99", "#d1495b", "#edae49", "#3a7d44", "#7b4ea3", "#00a6a6", "#b5651d", "#5d5d81")
STYLE: Any = {
    "svg.hashsalt": "pyprune", "font.size": 9, "text.color": INK, "axes.edgecolor": GREY, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes, in inches."""
    figure, grid = new_grid(1, 1, width, height)
    return figure, grid[0]


def new_grid(
    rows: int, columns: int, width: float, height: float, layout: Any = "constrained", **more: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``rows`` x ``columns`` axes, in inches, and the axes row after row."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout=layout)
        return figure, list(figure.subplots(rows, columns, squeeze=False, **more).ravel())


def colours(count: int) -> list[str]:
    """Return a colour each for things that are told apart; after eight they come again."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def add_legend(figure: Figure, entries: Sequence[tuple[str, str]], y: float = 1.0) -> None:
    """Name colours above the whole figure, or below the height ``y`` of one that has no layout."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, lw=2, label=label(name, 30)) for name, colour in entries]
    legend = figure.legend(
        handles=handles,
        loc="outside upper center" if figure.get_constrained_layout() else "upper center",
        bbox_to_anchor=None if figure.get_constrained_layout() else (0.5, y),
        ncols=6,
        frameon=False,
        fontsize=7,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def label(name: str, longest: int) -> str:
    """Return a name as a figure can show it: names come from files and may hold anything."""
    shown = name if name.isascii() and name.isprintable() else ascii(name)[1:-1]
    shown = shown if len(shown) <= longest else f"{shown[: longest // 2]}...{shown[-longest // 2 + 3 :]}"
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib hides labels that begin with one


def encoded(figure: Figure, form: str = "svg") -> bytes:
    """Return ``figure`` as an SVG or PNG file; the same figure gives the same bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(STYLE):
        metadata: Any = {"Date": None} if form == "svg" else None
        figure.savefig(buffer, format=form, bbox_inches="tight", metadata=metadata, dpi=150)
    return buffer.getvalue()


def picture(figure: Figure) -> str:
    """Return ``figure`` as a data URI of an SVG, which as an image cannot run anything."""
    return "data:image/svg+xml;base64," + base64.b64encode(encoded(figure)).decode()


def write_page(who: str, template: str, path: str | os.PathLike[str], **content: Any) -> None:
    """Fill a template, with everything in it escaped, and write it durably.

    Raises
    ------
    ValueError
        If ``path`` lies in a folder that cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pyprune"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["picture"] = picture
    page = environment.get_template(template).render(**content)
    target = Path(path)
    files.write_bytes(files.make_folder(who, target.parent) / target.name, page.encode())
