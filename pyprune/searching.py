"""What a search for widths found: networks trained at each set of widths, their redundancy and scores, and statistics.

The CKRM paper reports this by hand: widths and parameters in its table 2, Omega and lambda of three runs in its
table 3, AUC, accuracy and an analysis of variance in its figure 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyprune import files
from pyprune.comparing import Anova, Comparison, Equivalence, anova, compare, deviation, equivalence
from pyprune.types import CKRM, FloatArray, reading


@dataclass(frozen=True, eq=False)
class WidthRun:
    """One network, trained from scratch.

    Parameters
    ----------
    seed
        Of its weights and its training.
    widths
        Filters by name, as ``build`` got them.
    parameters
        All that are trained.
    validation, test
        Scores by name; ``test`` is empty where none was asked for. Higher is better.
    distinct
        By layer, the most filters found of which no two have Psi above the threshold.
    redundancy
        lambda and Omega of every layer.
    seconds
        Of training and scoring.
    failures
        What went wrong before, if this is the repetition of a run that diverged.
    """

    seed: int
    widths: Mapping[str, int]
    parameters: int
    validation: Mapping[str, float]
    test: Mapping[str, float]
    distinct: Mapping[str, int]
    redundancy: CKRM
    seconds: float = 0.0
    failures: tuple[str, ...] = ()

    FORMAT = "pyprune.width_run"
    VERSION = 1

    def to_json(self) -> dict[str, Any]:
        """Return the run as plain JSON values."""
        return {
            "format": self.FORMAT, "version": self.VERSION, "seed": self.seed, "widths": dict(self.widths),
            "parameters": self.parameters, "validation": dict(self.validation), "test": dict(self.test),
            "distinct": dict(self.distinct), "redundancy": self.redundancy.to_json(), "seconds": self.seconds,
            "failures": list(self.failures),
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON."""
        files.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WidthRun:
        """Read what :meth:`save` wrote; ``ValueError`` if it cannot be that."""
        return cls.from_json(files.read_json("WidthRun.load", path, cls.FORMAT, cls.VERSION), str(path))

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str = "the content") -> WidthRun:
        """Return what :meth:`to_json` gave; ``ValueError`` naming ``where`` if it cannot be that."""
        try:
            return cls(
                reading.whole(content, "seed", signed=True), reading.counts(content, "widths"),
                reading.whole(content, "parameters"), reading.scores(content, "validation"),
                reading.scores(content, "test"), reading.counts(content, "distinct"),
                CKRM.from_json(content["redundancy"], where), reading.number(content, "seconds"),
                reading.texts(content, "failures"),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"WidthRun.load: {where} lacks or garbles {error}.") from None


@dataclass(frozen=True, eq=False)
class WidthStep:
    """One set of widths, and the runs at it.

    Parameters
    ----------
    widths
        Filters by name.
    why
        By name, how the width came about.
    runs
        Those that ended well.
    given_up
        By run, what went wrong in a run and in its repetition.
    holds
        Whether no run was given up and the mean validation score is within the tolerance of the first step's.
    """

    widths: Mapping[str, int]
    why: Mapping[str, str]
    runs: tuple[WidthRun, ...]
    given_up: Mapping[str, str] = field(default_factory=dict)
    holds: bool = True

    def validation(self, metric: str) -> FloatArray:
        """Return [runs] a validation score."""
        return np.array([run.validation[metric] for run in self.runs], np.float64)

    def test(self, metric: str) -> FloatArray:
        """Return [runs] a score on the test images."""
        return np.array([run.test[metric] for run in self.runs], np.float64)

    def lambdas(self) -> dict[str, FloatArray]:
        """Return [runs] lambda at the first threshold, by layer; NaN for layers without pairs."""
        found = [run.redundancy.lambdas() for run in self.runs]
        return {name: np.array([one[name] for one in found]) for name in (found[0] if found else ())}

    @property
    def parameters(self) -> int | None:
        """Parameters of the network; ``None`` where no run ended well."""
        return self.runs[0].parameters if self.runs else None


@dataclass(frozen=True, eq=False)
class WidthSearch:
    """Networks made narrower step by step, and whether they still do as well; ``print`` shows the table.

    Parameters
    ----------
    steps
        In the order in which they were tried; the first is the standard network.
    layers
        For each name of a width the convolutions that have it and whose kernels are larger than 1x1.
    metric
        The validation score that decides.
    stopped
        Why the search ended.
    notes
        What there is to know about the search as a whole.
    options
        All settings: threshold, target, tolerance, runs, budget, seed, ...
    """

    steps: tuple[WidthStep, ...]
    layers: Mapping[str, tuple[str, ...]]
    metric: str
    stopped: str
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    FORMAT = "pyprune.width_search"
    VERSION = 1

    def __post_init__(self) -> None:
        if why := _unsound(self):
            raise ValueError(f"WidthSearch: {why}.")

    @property
    def standard(self) -> WidthStep:
        """The first step: the network as it came."""
        return self.steps[0]

    @property
    def narrow(self) -> WidthStep:
        """The smallest network that holds; the first where none does."""
        held = [step for step in self.steps if step.holds and step.parameters is not None]
        return min(held, key=lambda step: step.parameters or 0, default=self.steps[0])

    @property
    def widths(self) -> dict[str, int]:
        """The widths of the smallest network that holds."""
        return dict(self.narrow.widths)

    @property
    def trainings(self) -> int:
        """How many networks were trained, repetitions and runs given up included."""
        ended = sum(1 + len(run.failures) for step in self.steps for run in step.runs)
        return ended + 2 * sum(len(step.given_up) for step in self.steps)

    @property
    def tests(self) -> tuple[str, ...]:
        """Names of the scores on test images that every run has; empty where there are none."""
        return _names(self.steps, "test")

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores that networks are compared by: ``tests``, or those on validation images without any."""
        return self.tests or _names(self.steps, "validation")

    @property
    def tolerance(self) -> float:
        """By how much the mean validation score may fall; 0 where the options name none."""
        return float(self.options.get("tolerance", 0))

    def redundancy(self, step: WidthStep, name: str) -> float:
        """Return lambda of a width: the largest of its layers' means over the runs; NaN where no layer has pairs."""
        return max((found for found, _ in self.by_layer(step, name).values()), default=math.nan)

    def excess(self, step: WidthStep, name: str) -> float:
        """Return by how much lambda exceeds that of random kernels in a width's worst layer; NaN without pairs."""
        return max((found - chance for found, chance in self.by_layer(step, name).values()), default=math.nan)

    def by_layer(self, step: WidthStep, name: str) -> dict[str, tuple[float, float]]:
        """Return, for each layer of a width that has pairs, mean lambda over the runs, and lambda of random kernels."""
        found = {}
        for layer, values in step.lambdas().items():
            random = step.runs[0].redundancy.layers()[layer].random
            if layer in self.layers[name] and not np.isnan(values).any():
                found[layer] = (float(values.mean()), 0.0 if random is None else float(random.lambdas[0, 0]))
        return found

    def anova(self, score: str) -> Anova:
        """Compare the standard and the narrow network by one-way analysis of variance (CKRM paper, section 4.2).

        ``score`` is one of ``tests``, or of the validation scores where nothing was tested.
        """
        return anova([self.sample(self.standard, score), self.sample(self.narrow, score)])

    def compare(self, score: str) -> Comparison:
        """Compare the narrow network with the standard one: difference, Welch's t-test, Cohen's d."""
        return compare(self.sample(self.narrow, score), self.sample(self.standard, score))

    def equivalence(self, score: str, margin: float | None = None) -> Equivalence:
        """Test whether the two are the same within ``margin`` (by default the tolerance): that needs its own test."""
        wide = self.tolerance if margin is None else margin
        return equivalence(self.sample(self.narrow, score), self.sample(self.standard, score), wide)

    def sample(self, step: WidthStep, score: str) -> FloatArray:
        """Return [runs] what networks are compared by: a score on test images, or on validation images without any."""
        return step.test(score) if self.tests else step.validation(score)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a step: parameters, lambda, and scores as means over the runs with their deviations."""
        rows = []
        for number, step in enumerate(self.steps):
            row: dict[str, Any] = {"step": number, "holds": step.holds, "runs": len(step.runs)}
            row["parameters"] = step.parameters
            row["widths"] = dict(step.widths)
            worst = [self.redundancy(step, name) for name in step.widths]
            row["lambda"] = max((one for one in worst if not math.isnan(one)), default=None)
            scores = [(f"validation {score}", step.validation(score)) for score in _names([step], "validation")]
            scores += [(f"test {score}", step.test(score)) for score in _names([step], "test")]
            for name, values in scores:
                row[name] = float(values.mean())
                row[f"{name} deviation"] = deviation(values)
            rows.append(row)
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return the search as plain JSON values, with the rows of :meth:`rows`."""
        return {
            "format": self.FORMAT, "version": self.VERSION, "metric": self.metric, "stopped": self.stopped,
            "notes": list(self.notes), "options": dict(self.options),
            "layers": {name: list(layers) for name, layers in self.layers.items()},
            "steps": [
                {
                    "widths": dict(step.widths), "why": dict(step.why), "holds": step.holds,
                    "given_up": dict(step.given_up), "runs": [run.to_json() for run in step.runs],
                }
                for step in self.steps
            ],
            "rows": self.rows(), "widths": self.widths,
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON."""
        files.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WidthSearch:
        """Read what :meth:`save` wrote; ``ValueError`` if it cannot be that."""
        content = files.read_json("WidthSearch.load", path, cls.FORMAT, cls.VERSION)
        try:
            layers = {str(name): reading.texts(content["layers"], name) for name in reading.mapped(content, "layers")}
            steps = tuple(_step(one, str(path)) for one in reading.listed(content, "steps"))
            options = dict(reading.mapped(content, "options"))
            return cls(
                steps,
                layers,
                reading.text(content, "metric"),
                reading.text(content, "stopped"),
                reading.texts(content, "notes"),
                options,
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"WidthSearch.load: {path} lacks or garbles {error}.") from None

    def __str__(self) -> str:
        test = self.tests[0] if self.tests else None
        scores = [f"validation {self.metric}", *([f"test {test}"] if test else [])]
        head = ["step", "parameters", "lambda", *scores, "holds"]
        table = [head]
        for row in self.rows():
            shown = [_spread(row, score) for score in scores]
            count = "-" if row["parameters"] is None else f"{row['parameters']:,}"
            worst = "-" if row["lambda"] is None else f"{row['lambda']:.4f}"
            table.append([str(row["step"]), count, worst, *shown, "yes" if row["holds"] else "no"])
        sizes = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = ["  ".join(cell.rjust(wide) for cell, wide in zip(row, sizes, strict=True)) for row in table]
        was = self.standard.widths
        chosen = [
            f"{name} {was[name]}" + (f" > {new}" if new != was[name] else "") for name, new in self.widths.items()
        ]
        lines.append(f"widths: {', '.join(chosen)}")
        if self.narrow is not self.standard:
            for score in self.scores:
                same = f"; {self.equivalence(score)}" if self.tolerance else ""
                lines.append(f"{score}: {self.anova(score)}{same}")
        return "\n".join([*lines, f"stopped: {self.stopped}", *self.notes])


def _names(steps: Sequence[WidthStep], kind: str) -> tuple[str, ...]:
    """Return the names of the scores that every run has."""
    found: list[Mapping[str, float]] = [getattr(run, kind) for step in steps for run in step.runs]
    return tuple(name for name in found[0] if all(name in one for one in found)) if found else ()


def _spread(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return "-"
    spread = row[f"{name} deviation"]
    return f"{row[name]:.4f}" + ("" if spread is None else f" +- {spread:.4f}")


def _unsound(search: WidthSearch) -> str:
    """Return what does not belong together in a search, or nothing."""
    if not search.steps:
        return "needs at least one step, the standard network"
    names = set(search.steps[0].widths)
    if not names or any(set(step.widths) != names for step in search.steps) or names - set(search.layers):
        return "every step must have the same widths, at least one, and their layers must be named"
    runs = [run for step in search.steps for run in step.runs]
    if any(search.metric not in run.validation for run in runs):
        return f"every run must have the validation score {search.metric!r} that decides"
    if any(len(run.redundancy.networks) != 1 for run in runs):
        return "the redundancy of a run must be that of one network"
    if any(len({tuple(run.redundancy.layers()) for run in step.runs}) > 1 for step in search.steps):
        return "the runs of a step must have the same layers"
    for name in ("tolerance", "target"):
        value = search.options.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            return f"the {name} must be a number of at least 0; got {str(value)[:40]}"
    return ""


def _step(content: Mapping[str, Any], where: str) -> WidthStep:
    return WidthStep(
        reading.counts(content, "widths"),
        {str(name): reading.text(content["why"], name) for name in reading.mapped(content, "why")},
        tuple(WidthRun.from_json(run, where) for run in reading.listed(content, "runs")),
        {str(run): reading.text(content["given_up"], run) for run in reading.mapped(content, "given_up")},
        reading.truth(content, "holds"),
    )  # fmt: skip
