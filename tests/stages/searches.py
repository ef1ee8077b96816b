"""Searches for widths made by hand: realistic ones and awkward ones, for the tests of results and of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import pyprune as pp
from pyprune.searching import WidthRun, WidthSearch, WidthStep

STANDARD = {"conv1": 8, "conv2": 12}
LAYERS = {"conv1": ("conv1",), "conv2": ("conv2.0", "conv2.1")}


def redundancy(widths: Mapping[str, int], seed: int, twins: int = 2, **options: Any) -> pp.CKRM:
    """Return lambda of random kernels of which the first ``twins`` of every layer are alike."""
    draw = np.random.default_rng([seed, *widths.values()])
    one, two = widths.values()
    layers = {"conv1": (one, 1, 3, 3), "conv2.0": (two, one, 3, 3), "conv2.1": (two, two, 3, 3)}
    weights = {name: draw.standard_normal(shape) for name, shape in layers.items()}
    for kernels in weights.values():
        kernels[:twins] = kernels[:1]
    return pp.ckrm(weights, **options)


def width_run(
    seed: int, widths: Mapping[str, int] = STANDARD, validation: float = 0.9, test: float | None = 0.88, **more: Any
) -> WidthRun:
    """Return a run with these scores."""
    tested = {} if test is None else {"auc": test, "accuracy": test - 0.1}
    found = {"distinct": {"conv1": widths["conv1"] - 1}, "seconds": 1.5, **more}
    found.setdefault("redundancy", None)
    found["redundancy"] = found["redundancy"] or redundancy(widths, seed)
    return WidthRun(
        seed, widths, sum(widths.values()) * 100, {"auc": validation, "accuracy": validation - 0.1}, tested, **found
    )


def search(**more: Any) -> WidthSearch:
    """Return four steps: the standard network, a narrower one, one that does not hold, one without a run."""
    half, small, wide = {"conv1": 4, "conv2": 6}, {"conv1": 2, "conv2": 3}, {"conv1": 3, "conv2": 6}
    steps = (
        WidthStep(STANDARD, {"conv1": "as given", "conv2": "as given"}, _runs(STANDARD, (0.90, 0.91, 0.89))),
        WidthStep(half, {"conv1": "lambda 0.12", "conv2": "lambda 0.08"}, _runs(half, (0.91, 0.89, 0.90))),
        WidthStep(
            small, {"conv1": "half", "conv2": "half"}, _runs(small, (0.70, 0.72)), {"2": "NaN loss, and again"}, False
        ),
        WidthStep(wide, {"conv1": "wider again", "conv2": "wider again"}, (), {"0": "NaN", "1": "NaN"}, False),
    )
    settings = {"threshold": 0.6, "target": 0.01, "tolerance": 0.02, "runs": 3, "budget": 12, "seed": 0}
    found = {"steps": steps, "layers": LAYERS, "metric": "auc", "stopped": "the budget of 12 trainings is spent",
             "notes": ("lambda of conv1 starts at 0",), "options": settings, **more}  # fmt: skip
    return WidthSearch(**found)


def _runs(widths: Mapping[str, int], scores: Sequence[float]) -> tuple[WidthRun, ...]:
    failures = ("the loss was NaN",)
    return tuple(
        width_run(i, widths, score, score - 0.02, failures=failures if i == 1 else ()) for i, score in enumerate(scores)
    )


def awkward() -> dict[str, WidthSearch]:
    """Return searches that have less than they might."""
    one, untested = width_run(0), (width_run(0, test=None), width_run(1, validation=0.92, test=None))
    same = WidthStep(STANDARD, {}, (one, one))
    bare: dict[str, Any] = {"layers": LAYERS, "metric": "auc", "stopped": "the budget is spent"}
    narrow = {"conv1": 1, "conv2": 1}
    without_pairs = width_run(0, narrow, redundancy=redundancy({"conv1": 2, "conv2": 1}, 0))
    return {
        "one run": WidthSearch((WidthStep(STANDARD, {}, (one,)),), **bare),
        "no test": WidthSearch((WidthStep(STANDARD, {}, untested), WidthStep(narrow, {}, untested)), **bare),
        "no runs": WidthSearch((WidthStep(STANDARD, {}, (), {"0": "NaN"}, False),), **bare),
        "no pairs": WidthSearch((WidthStep(STANDARD, {}, (one,)), WidthStep(narrow, {}, (without_pairs,))), **bare),
        "all the same": WidthSearch((same, same), options={"tolerance": 0.1}, **bare),
        "the standard failed": WidthSearch(
            (WidthStep(STANDARD, {}, (), {"0": "NaN"}, False), WidthStep(narrow, {}, (without_pairs,))), **bare
        ),
    }  # fmt: skip
