"""The result of a trial: criteria side by side over several runs, and whether they differ by more than chance."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from pyprune import files
from pyprune.types import Evaluation, FloatArray, IntArray, Plan, reading


@dataclass(frozen=True, eq=False)
class Attempt:
    """One criterion in one run.

    Parameters
    ----------
    seed
        Of fine-tuning, and of a criterion that draws.
    keep
        The filters that the plan keeps, by layer.
    pruned, finetuned
        How well the slim network does on the test images before and after fine-tuning.
    parameters, macs
        Of the slim network, as they are (convention ``compact``); MACs an image.
    fairness
        ``eopp0``, ``eopp1``, ``eodd`` and ``eodd_separate`` against the original, ``excess`` the largest difference in
        what two classes lose (thesis eq. 3.15 and 5.3 to 5.6); empty where they are not defined.
    """

    seed: int
    keep: Mapping[str, IntArray]
    pruned: Evaluation
    finetuned: Evaluation
    parameters: int
    macs: int
    fairness: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    FORMAT = "pyprune.attempt"
    VERSION = 1

    def to_json(self) -> dict[str, Any]:
        """Return the attempt as plain JSON values."""
        return {
            "format": self.FORMAT, "version": self.VERSION, "seed": self.seed,
            "keep": {name: kept.tolist() for name, kept in self.keep.items()}, "pruned": self.pruned.to_json(),
            "finetuned": self.finetuned.to_json(), "parameters": self.parameters, "macs": self.macs,
            "fairness": dict(self.fairness), "settings": dict(self.settings),
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON."""
        files.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Attempt:
        """Read what :meth:`save` wrote; ``ValueError`` if it cannot be that."""
        return cls.from_json(files.read_json("Attempt.load", path, cls.FORMAT, cls.VERSION), str(path))

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str = "the content") -> Attempt:
        """Return what :meth:`to_json` gave; ``ValueError`` naming ``where`` if it cannot be that."""
        try:
            return cls(
                reading.whole(content, "seed", signed=True),
                {name: reading.wholes(content["keep"], name) for name in reading.mapped(content, "keep")},
                Evaluation.from_json(content["pruned"], where), Evaluation.from_json(content["finetuned"], where),
                reading.whole(content, "parameters"), reading.whole(content, "macs"),
                reading.scores(content, "fairness"), dict(reading.mapped(content, "settings")),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"Attempt.load: {where} lacks or garbles {error}.") from None


@dataclass(frozen=True)
class Comparison:
    """Two samples of top-1: the difference of their means, Welch's two-tailed p, and Cohen's d.

    ``p`` and ``d`` are ``None`` where they are not defined: for single runs, and where no sample varies. The
    difference is NaN where a sample is empty.
    """

    difference: float
    p: float | None
    d: float | None


@dataclass(frozen=True)
class Anova:
    """One-way analysis of variance: F with its degrees of freedom and p; ``None`` where nothing varies or runs lack.

    A large p does not show that samples are the same: :func:`equivalence` asks that.
    """

    f: float | None
    p: float | None
    between: int
    within: int

    def __str__(self) -> str:
        if self.f is None or self.p is None:
            return "ANOVA undefined (single runs, or no variance)"
        return f"ANOVA F({self.between}, {self.within}) = {self.f:.3g}, p {self.p:.3f}"


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests: ``p`` is small if the difference of two means is shown to lie within the margin."""

    difference: float
    margin: float
    p: float | None

    def __str__(self) -> str:
        told = "undefined" if self.p is None else f"p {self.p:.3f}"
        return f"difference {self.difference:+.4f}, within {self.margin:g} (two one-sided tests) {told}"


@dataclass(frozen=True)
class Overlap:
    """Filters of one layer that two plans keep (thesis tables 5.2 and 5.7), or that both remove.

    ``common`` of ``filters`` are in both; drawn blindly ``chance`` would be on average; ``p`` is the probability that
    blind draws have at least as many in common, ``p_fewer`` that they have at most as many (hypergeometric). Both p are
    the same for the kept and the removed filters of two plans.
    """

    filters: int
    first: int
    second: int
    common: int
    chance: float
    p: float
    p_fewer: float


@dataclass(frozen=True, eq=False)
class Trial:
    """Criteria side by side, at the same rates and under the same fine-tuning; ``print`` shows the table.

    Parameters
    ----------
    original
        How well the network does that all of them prune.
    parameters, macs
        What it costs.
    filters
        How many filters each layer has.
    attempts
        For each method its runs, in order; run i of every method was fine-tuned with the same seed.
    options
        All settings.
    """

    original: Evaluation
    parameters: int
    macs: int
    filters: Mapping[str, int]
    attempts: Mapping[str, tuple[Attempt, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)

    FORMAT = "pyprune.trial"
    VERSION = 1

    def top1(self, method: str) -> FloatArray:
        """Return [runs] the top-1 of ``method`` after fine-tuning, shares in [0, 1]."""
        return np.array([one.finetuned.top1 for one in self.attempts[method]], np.float64)

    def compare(self, first: str, second: str) -> Comparison:
        """Compare the top-1 of two methods over their runs."""
        return compare(self.top1(first), self.top1(second))

    def overlaps(self, first: str, second: str) -> dict[str, Overlap]:
        """Return, by layer, what the plans of two methods have in common; of the first run of each."""
        one, other = (self.attempts[method][0].keep for method in (first, second))
        return {
            name: overlap(one[name], other[name], filters)
            for name, filters in self.filters.items()
            if name in one and name in other
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a method, the best first: means over the runs, and deviations where there are several."""
        rows = []
        for method, runs in self.attempts.items():
            found = self.top1(method)
            aucs = [one.finetuned.auc for one in runs if one.finetuned.auc is not None]
            rows.append({
                "method": method, "runs": len(runs), "top1": float(found.mean()), "deviation": deviation(found),
                "top1_without_finetuning": float(np.mean([one.pruned.top1 for one in runs])),
                "auc": float(np.mean(aucs)) if len(aucs) == len(runs) else None,
                "parameters": round(np.mean([one.parameters for one in runs])),
                "macs": round(np.mean([one.macs for one in runs])),
                **{key: _mean(one.fairness.get(key) for one in runs) for key in ("eopp1", "eodd", "excess")},
            })  # fmt: skip
        return sorted(rows, key=lambda row: -row["top1"])

    def pairs(self) -> list[dict[str, Any]]:
        """Return one row for each two methods: how their top-1 and their plans differ."""
        rows = []
        for first, second in combinations(self.attempts, 2):
            shared = self.overlaps(first, second).values()
            cut = [one for one in shared if one.first < one.filters or one.second < one.filters]
            common, chance = sum(one.common for one in cut), sum(one.chance for one in cut)
            rows.append({
                "methods": f"{first}, {second}", **asdict(self.compare(first, second)), "common_filters": common,
                "by_chance": round(chance, 1), "of": sum(min(one.first, one.second) for one in cut),
            })  # fmt: skip
        return rows

    def to_json(self) -> dict[str, Any]:
        """Return the trial as plain JSON values, with the tables of :meth:`rows` and :meth:`pairs`."""
        return {
            "format": self.FORMAT, "version": self.VERSION, "original": self.original.to_json(),
            "parameters": self.parameters, "macs": self.macs, "filters": dict(self.filters),
            "attempts": {method: [one.to_json() for one in runs] for method, runs in self.attempts.items()},
            "options": dict(self.options), "rows": self.rows(), "pairs": self.pairs(),
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON."""
        files.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trial:
        """Read what :meth:`save` wrote; ``ValueError`` if it cannot be that."""
        content = files.read_json("Trial.load", path, cls.FORMAT, cls.VERSION)
        try:
            return cls(
                Evaluation.from_json(content["original"], str(path)), reading.whole(content, "parameters"),
                reading.whole(content, "macs"), reading.counts(content, "filters"),
                {
                    method: tuple(Attempt.from_json(one, str(path)) for one in reading.listed(runs, method))
                    for runs in (reading.mapped(content, "attempts"),)
                    for method in runs
                },
                dict(reading.mapped(content, "options")),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"Trial.load: {path} lacks or garbles {error}.") from None

    def __str__(self) -> str:
        lines = [
            f"original: top-1 {self.original.top1:.2%}, {self.parameters:,} parameters, {self.macs:,} MACs",
            f"{'method':14} {'runs':>4} {'top-1':>16} {'untuned':>8} {'parameters':>11} {'MACs':>13} {'EOpp1':>7}",
        ]
        for row in self.rows():
            spread = "" if row["deviation"] is None else f" +- {row['deviation']:.2%}"
            fair = "" if row["eopp1"] is None else f"{row['eopp1']:7.3f}"
            lines.append(
                f"{row['method']:14} {row['runs']:4} {format(row['top1'], '.2%') + spread:>16} "
                f"{row['top1_without_finetuning']:8.2%} {row['parameters']:11,} {row['macs']:13,} {fair:>7}"
            )
        for row in self.pairs():
            told = "one run" if row["p"] is None else f"p {row['p']:.3f}, d {row['d']:.2f}"
            lines.append(
                f"{row['methods']}: {row['difference']:+.2%} ({told}); {row['common_filters']} of {row['of']} kept "
                f"filters in common, {row['by_chance']} by chance"
            )
        return "\n".join(lines)


def compare(first: FloatArray, second: FloatArray) -> Comparison:
    """Compare two samples: Welch's two-tailed t-test, and Cohen's d by the pooled deviation."""
    from scipy import stats

    difference = _difference(first, second)
    if not _tellable(first, second):
        return Comparison(difference, None, None)
    one, other = _moments(first), _moments(second)
    pooled = math.sqrt(sum((n - 1) * s**2 for _, s, n in (one, other)) / (len(first) + len(second) - 2))
    test = stats.ttest_ind_from_stats(*one, *other, equal_var=False)
    return Comparison(difference, float(test.pvalue), difference / pooled)


def anova(samples: Sequence[FloatArray]) -> Anova:
    """Compare the means of several samples by one-way analysis of variance."""
    from scipy import stats

    sizes = [len(one) for one in samples]
    between, within = len(sizes) - 1, sum(sizes) - len(sizes)
    if between < 1 or min(sizes) < 1 or within < 1 or not any(np.ptp(one) > 0 and np.var(one) > 0 for one in samples):
        return Anova(None, None, between, within)
    # Not scipy's f_oneway: its difference of sums can leave F just below 0, and then p does not exist.
    grand = float(np.mean(np.concatenate(samples)))
    among = sum(len(one) * float(np.mean(one) - grand) ** 2 for one in samples) / between
    inside = sum(len(one) * float(np.var(one)) for one in samples) / within
    return Anova(among / inside, float(stats.f.sf(among / inside, between, within)), between, within)


def equivalence(first: FloatArray, second: FloatArray, margin: float) -> Equivalence:
    """Test whether two means differ by less than ``margin``: two one-sided Welch tests, of which the larger p counts.

    Raises
    ------
    ValueError
        If ``margin`` is not positive.
    """
    from scipy import stats

    if not 0 < margin < math.inf:
        raise ValueError(f"equivalence: margin must be a positive number; got {margin}.")
    difference = _difference(first, second)
    if not _tellable(first, second):
        return Equivalence(difference, margin, None)
    (mean, *rest), other = _moments(first), _moments(second)
    above = stats.ttest_ind_from_stats(mean + margin, *rest, *other, equal_var=False, alternative="greater").pvalue
    below = stats.ttest_ind_from_stats(mean - margin, *rest, *other, equal_var=False, alternative="less").pvalue
    return Equivalence(difference, margin, float(max(above, below)))


def _difference(first: FloatArray, second: FloatArray) -> float:
    return float(np.mean(first) - np.mean(second)) if len(first) and len(second) else math.nan


def _tellable(first: FloatArray, second: FloatArray) -> bool:
    """Return whether there are two values of each, and anything varies."""
    return min(len(first), len(second)) > 1 and any(np.ptp(one) > 0 and np.var(one) > 0 for one in (first, second))


def _moments(values: FloatArray) -> tuple[float, float, int]:
    """Return mean, deviation and size; values that are all the same deviate by exactly 0."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if np.ptp(values) else 0.0, len(values)


def overlap(first: IntArray, second: IntArray, filters: int) -> Overlap:
    """Return what two sets of filters of a layer have in common, beside what blind draws would."""
    from scipy import stats

    common, sizes = len(np.intersect1d(first, second)), (len(first), len(second))
    p, p_fewer = (float(value) for value in (
        stats.hypergeom.sf(common - 1, filters, *sizes), stats.hypergeom.cdf(common, filters, *sizes)))  # fmt: skip
    return Overlap(filters, *sizes, common, sizes[0] * sizes[1] / filters, p, p_fewer)


def removed_by_both(first: Plan, second: Plan) -> dict[str, Overlap]:
    """Return what two plans both remove, for each layer that both know and one says how many filters it has."""
    counts = {**first.filters, **second.filters}
    removed = [
        {name: np.setdiff1d(np.arange(counts[name]), kept) for name, kept in plan.keep.items() if name in counts}
        for plan in (first, second)
    ]
    return {
        name: overlap(gone, removed[1][name], counts[name]) for name, gone in removed[0].items() if name in removed[1]
    }


def pooled(overlaps: Iterable[Overlap]) -> Overlap:
    """Return several layers taken together: sums, and the probabilities of the sum of their blind draws, exactly."""
    from scipy import stats

    found = list(overlaps)
    chances: FloatArray = np.ones(1)
    for one in found:
        counts = np.arange(min(one.first, one.second) + 1)
        chances = np.convolve(chances, stats.hypergeom.pmf(counts, one.filters, one.first, one.second))
    common = sum(one.common for one in found)
    p, p_fewer = (min(1.0, float(part.sum())) for part in (chances[common:], chances[: common + 1]))
    filters, first, second = (sum(getattr(one, name) for one in found) for name in ("filters", "first", "second"))
    return Overlap(filters, first, second, common, sum((one.chance for one in found), 0.0), p, p_fewer)


def deviation(values: FloatArray) -> float | None:
    """Return the sample standard deviation; ``None`` for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _mean(values: Any) -> float | None:
    listed = list(values)
    return None if None in listed or not listed else float(np.mean(listed))
