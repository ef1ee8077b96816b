"""Which filters stay: the scores of a criterion become a plan, at given rates, at a budget, or at its own rate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import joblib
import numpy as np
import scipy
import sklearn
from torch import nn

import pyprune
from pyprune import budgets, coupling, criteria, graph, hrank
from pyprune.criteria import Context, Criterion
from pyprune.hints import did_you_mean
from pyprune.measure import Device, as_batch
from pyprune.types import ClassRanks, FilterWhy, FloatArray, IntArray, LayerWhy, Plan

COUPLED = ("apart", "joint")

Rates = Plan | Mapping[str, float] | Sequence[float] | float | str


def select(
    model: nn.Module,
    method: str | Criterion = "crank",
    *,
    ranks: ClassRanks | None = None,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    rates: Rates | None = None,
    budget: Mapping[str, float] | None = None,
    exclude: Sequence[str] = (),
    min_keep: int = 1,
    coupled: str = "apart",
    device: Device = None,
    progress: bool = True,
    **options: Any,
) -> Plan:
    """Choose the filters that stay in every convolution: at given rates, at a budget, or at the criterion's own rate.

    Parameters
    ----------
    model
        The network.
    method
        A criterion of :mod:`pyprune.criteria`, by name: ``"crank"``, ``"hrank"``, ``"l1"``, ``"l2"``, ``"fpgm"``,
        ``"cup"``, ``"tvs"``, ``"ckrm"``, ``"bn_scale"``, ``"taylor"``, ``"random"``, or one that another package
        offers; or a criterion itself. ``"crank"``, ``"cup"`` and ``"ckrm"`` have rates of their own.
    ranks
        For ``"crank"`` and ``"hrank"``: from :func:`pyprune.rank_filters` or :class:`pyprune.RankAccumulator`.
    data
        For ``"tvs"`` and ``"taylor"``: yields (images, labels). Never pass test data: what is chosen on them cannot be
        judged on them.
    example_inputs
        What ``model(*example_inputs)`` takes, for a budget, for coupled layers, and for ``"cup"``; by default the
        first image of ``data``. Where it is known the plan says what coupling costs, in ``options["coupling"]``.
    rates
        The share of filters that goes, in [0, 1), one for all layers or one for each; of F filters F (1 - rate),
        rounded, halves up, stay. Or a :class:`Plan`, of which each layer keeps as many as the plan does; layers that
        the plan leaves out keep all. Or HRank's list, as numbers or as a string such as
        ``"[0.95]+[0.5]*6+[0.9]*4+[0.8]*2"``: see :func:`pyprune.hrank.rates_for`.
    budget
        The most that the compacted network may cost an image: ``{"macs": 0.5}`` for half of what it costs now, numbers
        above 1 for counts; ``"macs"``, ``"parameters"``, or both. The lowest scores of the network go until it fits, or
        the same share of every layer, if the criterion's scores do not compare between layers.
    exclude
        Convolutions that keep every filter.
    min_keep
        At least so many filters stay in every layer (all, where there are fewer).
    coupled
        ``"apart"`` scores every layer by itself. ``"joint"`` gives filters whose channels can leave only together,
        as those of all branches that are added, one score, the mean of theirs, and as many stay in layers with the same
        channels, on average: then what a plan removes really leaves the network.
    device
        Where to compute on ``data``; by default where the model is.
    progress
        Whether to show a progress bar.
    **options
        Of the criterion: for ``"crank"`` see :class:`pyprune.criteria.crank.CRank` (``preset``, ``ease``, ``seed``,
        ...); ``threshold`` for ``"cup"`` and ``"ckrm"``; ``seed`` for ``"random"``; ``batches`` for ``"tvs"`` and
        ``"taylor"``.

    Returns
    -------
    Plan
        For every layer that was scored: ``keep`` the filters that stay, ``why`` what was seen in each, ``options``
        all settings, library versions and how the ranks came about.

    Raises
    ------
    ValueError
        If the method is unknown, something that it needs is missing, ranks or rates are out of range or of another
        model, the budget cannot be met (the message says what can), or there is neither a rate nor a budget nor a rate
        of the criterion's own.
    TypeError
        If an argument is of the wrong kind.
    """
    criterion = criteria.find("select", method, options)
    _check_together(criterion, rates, budget, options)
    _check_counts(min_keep=min_keep)
    if coupled not in COUPLED:
        raise ValueError(f"select: coupled must be one of {', '.join(map(repr, COUPLED))}; got {coupled!r}.")
    if ranks is not None:
        _check_ranks(model, ranks)
    left_out = _check_exclude(model, exclude)
    every = graph.convolutions(model)
    if example_inputs is None and (budget is not None or coupled == "joint" or "example_inputs" in criterion.needs):
        example_inputs = _example(data)
    context = Context(
        model, {name: layer for name, layer in every.items() if name not in left_out}, ranks, data, example_inputs,
        left_out, min_keep, device, progress,
    )  # fmt: skip
    _check_needs(criterion, context, budget is not None, coupled == "joint")
    chosen = _Choice(model, criterion, context, coupled == "joint")
    if budget is not None:
        whys, how = chosen.at_budget(budgets.check_budget("select", budget))
    elif rates is not None:
        whys, how = chosen.at_rates(rates)
    else:
        whys, how = chosen.at_its_own_rate()
    listed = {name: LayerWhy(_untouched(every[name].out_channels), "excluded") for name in left_out}
    whys = {name: {**whys, **listed}[name] for name in every if name in whys or name in listed}
    return _plan(criterion, context, whys, {**how, "coupled": coupled})


@dataclass(frozen=True, eq=False)
class _Choice:
    """One criterion on one network, and the ways to make a plan of it."""

    model: nn.Module
    criterion: Criterion
    context: Context
    joint: bool

    def at_its_own_rate(self) -> tuple[dict[str, LayerWhy], dict[str, Any]]:
        """Take the criterion's plan; jointly, its counts."""
        made = getattr(self.criterion, "plan", None)
        if made is None:
            raise ValueError(
                f"select: {self.criterion.name!r} has no rate of its own. Pass rates=, a plan, one rate per layer or "
                'one rate in [0, 1), or budget=, such as {"macs": 0.5}.'
            )
        plan: Plan = made(self.model, self.context)
        graph.check_plan(f"select: {self.criterion.name!r}", self.model, plan)
        alone = self._left_alone()
        plan = replace(plan, keep={name: kept for name, kept in plan.keep.items() if name not in alone}, why={
            name: why for name, why in plan.why.items() if name not in alone})  # fmt: skip
        how = {name: value for name, value in plan.options.items() if value}
        if self.joint:
            scores = self._scores(alone)
            counts = {name: len(plan.keep[name]) if name in plan.keep else len(found) for name, found in scores.items()}
            return self._highest(scores, counts, alone), how
        whys = {name: self._own(name, plan) for name in plan.keep}
        return {**whys, **self._whole(alone)}, how

    def _own(self, name: str, plan: Plan) -> LayerWhy:
        """Return the criterion's reasons, after filling up to ``min_keep`` by its scores."""
        filters = self.context.layers[name].out_channels
        kept = set(plan.keep[name].tolist())
        said = {True: f"{self.criterion.name} keeps it", False: f"{self.criterion.name} removes it"}
        plain = LayerWhy(tuple(FilterWhy(said[f in kept], f in kept) for f in range(filters)))
        why = plan.why.get(name, plain)
        missing = min(filters, self.context.min_keep) - len(kept)
        if missing <= 0:
            return why
        order = _descending(self._scores({})[name])
        back = [f for f in order.tolist() if f not in kept][:missing]
        return replace(why, filters=tuple(
            replace(one, keep=True, reason="kept to leave min_keep") if f in back else one for f, one in enumerate(why)
        ))  # fmt: skip

    def at_rates(self, rates: Rates) -> tuple[dict[str, LayerWhy], dict[str, Any]]:
        """Keep as many of the highest scores as ``rates`` says."""
        scores = self._scores({})
        counts = _kept_counts(self.model, {n: len(found) for n, found in scores.items()}, rates, self.context.exclude)
        given: Any = f"of a plan by {rates.method}" if isinstance(rates, Plan) else rates
        plain = (
            dict(given) if isinstance(given, Mapping) else list(given) if isinstance(given, (list, tuple)) else given
        )
        return self._highest(scores, counts, {}), {"rates": plain, "counts": counts}

    def at_budget(self, budget: Mapping[str, float]) -> tuple[dict[str, LayerWhy], dict[str, Any]]:
        """Let the lowest scores go until the network costs no more than it may."""
        alone = self._left_alone()
        scores = self._scores(alone)
        filters = {name: len(found) for name, found in scores.items()}
        removed, record = budgets.meet("select", self.context.costs, filters, self._queue(scores), budget)
        counts = {name: count - len(removed.get(name, ())) for name, count in filters.items()}
        whys = {
            name: _reasons(self._label, found, np.setdiff1d(np.arange(len(found)), sorted(removed.get(name, ()))))
            for name, found in scores.items()
        }
        return {**whys, **self._whole(alone)}, {"budget": record, "counts": counts}

    @property
    def _label(self) -> str:
        label = str(getattr(self.criterion, "label", self.criterion.name))
        return f"joint {label}" if self.joint else label

    @property
    def _comparable(self) -> bool:
        return bool(getattr(self.criterion, "comparable", False))

    def _left_alone(self) -> dict[str, str]:
        made = getattr(self.criterion, "left_alone", None)
        return {} if made is None else dict(made(self.model, self.context))

    def _whole(self, alone: Mapping[str, str]) -> dict[str, LayerWhy]:
        layers = self.context.layers
        return {name: LayerWhy(_untouched(layers[name].out_channels), note) for name, note in alone.items()}

    def _scores(self, alone: Mapping[str, str]) -> dict[str, FloatArray]:
        """Return the scores of every layer that is not left alone, jointly if asked."""
        given = self.criterion.scores(self.model, self.context)
        scores = criteria.check_scores("select", self.criterion, given, self.context)
        scores = {name: found for name, found in scores.items() if name not in alone}
        if not scores:
            raise ValueError(f"select: {self.criterion.name!r} has scores for no layer. Exclude fewer, or use another.")
        if self.joint:
            compared = scores if self._comparable else {name: _places(found) for name, found in scores.items()}
            return joint_scores(compared, self._classes)
        return scores

    @cached_property
    def _classes(self) -> dict[str, IntArray]:
        return coupling.classes(self.context.costs)

    def _highest(
        self, scores: Mapping[str, FloatArray], counts: Mapping[str, int], alone: Mapping[str, str]
    ) -> dict[str, LayerWhy]:
        """Keep ``counts`` of the highest scores in each layer; jointly, the mean of layers with the same channels."""
        if self.joint:
            counts = _mean_counts(counts, {name: self._classes[name] for name in counts if name in self._classes})
        whys = {}
        for name, found in scores.items():
            count = min(len(found), max(self.context.min_keep, counts[name]))
            whys[name] = _reasons(self._label, found, _descending(found)[:count])
        return {**whys, **self._whole(alone)}

    def _queue(self, scores: Mapping[str, FloatArray]) -> list[list[tuple[str, int]]]:
        """Return every filter that may go, lowest score first; jointly, those of one channel together."""
        entries: dict[tuple[float, int, int], list[tuple[str, int]]] = {}
        for position, (name, found) in enumerate(scores.items()):
            order = _descending(found)
            # Jointly, a channel's score compares between layers, or its filters would part.
            values = found if self._comparable or self.joint else _places(found)
            tied = self._classes.get(name) if self.joint else None
            for f in order[min(len(order), self.context.min_keep) :].tolist():
                key = (float(values[f]), position, -f) if tied is None else (float(values[f]), -1, int(tied[f]))
                entries.setdefault(key, []).append((name, f))
        return [entries[key] for key in sorted(entries)]


def joint_scores(scores: Mapping[str, FloatArray], classes: Mapping[str, IntArray]) -> dict[str, FloatArray]:
    """Return for every filter the mean score of all filters whose channels can leave only together with its own."""
    sums: dict[int, float] = {}
    members: dict[int, int] = {}
    tied = {name: classes[name] for name in scores if name in classes}
    for name, own in tied.items():
        for one, score in zip(own.tolist(), scores[name].tolist(), strict=True):
            sums[one] = sums.get(one, 0.0) + score
            members[one] = members.get(one, 0) + 1
    means = {one: total / members[one] for one, total in sums.items()}
    return {
        name: np.array([means[one] for one in tied[name].tolist()]) if name in tied else found
        for name, found in scores.items()
    }


def _mean_counts(counts: Mapping[str, int], classes: Mapping[str, IntArray]) -> dict[str, int]:
    """Return the mean count of the layers with the same channels, rounded, halves up, for each of them."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, own in classes.items():
        groups.setdefault(tuple(own.tolist()), []).append(name)
    found = dict(counts)
    for names in groups.values():
        mean = math.floor(sum(counts[name] for name in names) / len(names) + 0.5)
        found.update(dict.fromkeys(names, mean))
    return found


def _descending(scores: FloatArray) -> IntArray:
    """Return the filters by descending score, the lower index first on a tie."""
    return np.argsort(-scores, kind="stable")


def _places(scores: FloatArray) -> FloatArray:
    """Return each filter's place among those of its layer, (0, 1), the highest score highest."""
    found = np.empty(len(scores))
    found[_descending(scores)] = 1 - (np.arange(len(scores)) + 0.5) / len(scores)
    return found


def _reasons(label: str, scores: FloatArray, kept: Iterable[int]) -> LayerWhy:
    """Say for each filter what its score is, and whether it is among the highest."""
    keep = {int(f) for f in kept}
    return LayerWhy(
        tuple(
            FilterWhy(
                f"{label} {score:.4g}, {'among' if f in keep else 'below'} the {len(keep)} highest", f in keep,
                score=score,
            )
            for f, score in enumerate(scores.tolist())
        )
    )  # fmt: skip


def _untouched(count: int) -> tuple[FilterWhy, ...]:
    return tuple(FilterWhy("the layer is left alone", True) for _ in range(count))


def kept_count(filters: int, rate: float) -> int:
    """Return how many of ``filters`` stay at ``rate``: rounded to the nearest, halves up, and at least one."""
    return max(1, math.floor(filters * (1 - rate) + 0.5))


def _kept_counts(model: nn.Module, filters: Mapping[str, int], rates: Rates, exclude: Iterable[str]) -> dict[str, int]:
    """Return how many filters each layer keeps, after checking ``rates``."""
    if isinstance(rates, Sequence):
        rates = _listed_rates(model, rates, filters, exclude)
    if isinstance(rates, Plan):
        graph.check_plan("select", model, rates)
        layers = graph.prunable(model)
        pruned = [name for name, kept in rates.keep.items() if len(kept) < layers[name].out_channels]
        _check_known(pruned, filters, exclude)
        return {name: len(rates.keep.get(name, range(count))) for name, count in filters.items()}
    each = dict(rates) if isinstance(rates, Mapping) else dict.fromkeys(filters, rates)
    _check_known(each, filters, exclude)
    missing = [name for name in filters if name not in each]
    if missing:
        raise ValueError(f"select: rates lacks {', '.join(map(repr, missing))}. Give each a rate, or exclude it.")
    for name, rate in each.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float | np.integer | np.floating):
            raise TypeError(f"select: rates must be numbers in [0, 1), or a plan; got {type(rate).__name__}.")
        if not 0 <= rate < 1:
            raise ValueError(f"select: rates must be in [0, 1); got {rate} for {name!r}.")
    return {name: kept_count(count, float(each[name])) for name, count in filters.items()}


def _listed_rates(
    model: nn.Module, rates: Sequence[float] | str, filters: Mapping[str, int], exclude: Iterable[str]
) -> dict[str, float]:
    """Return the rates of the layers that were scored, out of a list for all convolutions."""
    listed = hrank.rates_for(model, rates)
    for name, rate in listed.items():
        if rate and name not in filters and name not in exclude:
            raise ValueError(f"select: rates gives {name!r} {rate:.3g}, and there are no scores of it. Exclude it.")
    missing = [name for name in filters if name not in listed]
    if missing:
        raise ValueError(
            f"select: a list of rates is for 2-d convolutions; {missing[0]!r} is none. Give rates by name."
        )
    return {name: rate for name, rate in listed.items() if name in filters}


def _check_known(names: Iterable[str], filters: Mapping[str, int], exclude: Iterable[str]) -> None:
    for name in names:
        if name not in filters and name not in exclude:
            hint = did_you_mean(name, filters)
            raise ValueError(f"select: rates names {name!r}, of which there are no scores.{hint}")


def check_method(who: str, method: str | Criterion, given: Mapping[str, Any]) -> tuple[Criterion, dict[str, Any]]:
    """Return the criterion that :func:`select` takes for these arguments, and a record of all that is not by default.

    Raises
    ------
    ValueError, TypeError
        As :func:`select` does, if there is no such criterion or it has no such option.
    """
    own = inspect.signature(select).parameters
    criterion = criteria.find(who, method, {name: value for name, value in given.items() if name not in own})
    record = {name: value for name, value in given.items() if name in own and value != own[name].default}
    return criterion, {**record, **criteria.settings(criterion)}


def _check_together(criterion: Criterion, rates: Any, budget: Any, options: Mapping[str, Any]) -> None:
    if rates is not None and budget is not None:
        raise ValueError("select: rates and budget were both given. Give one of them.")
    if getattr(criterion, "ease", 0) and (rates is not None or budget is not None):
        raise ValueError("select: ease is for CRank's own rates; with rates or budget it says nothing. Leave it out.")


def _check_needs(criterion: Criterion, context: Context, budget: bool, joint: bool) -> None:
    """Raise if something is missing that the criterion, a budget or joint scores need."""
    advice = {
        "ranks": "pass ranks=pyprune.rank_filters(model, loader)",
        "data": "pass data=, a loader of training or validation images and labels",
        "example_inputs": "pass example_inputs=, one batch as the model takes it",
    }
    for need in criterion.needs:
        if getattr(context, need) is None:
            raise ValueError(f"select: {criterion.name!r} needs {need}; {advice[need]}.")
    for name, asked in (("budget", budget), ("coupled='joint'", joint)):
        if asked and context.example_inputs is None:
            raise ValueError(f"select: {name} needs example_inputs; {advice['example_inputs']}.")


def _example(data: Iterable[Any] | None) -> Any:
    """Return the first image of ``data`` as a batch, [1, C, H, W], if there is one and it can be read again."""
    if data is None or iter(data) is data:
        return None
    for position, batch in enumerate(data):
        return as_batch("select", batch, position)[0][:1]
    return None


def _check_ranks(model: nn.Module, ranks: ClassRanks) -> None:
    """Raise unless ``ranks`` are of ``model``."""
    if not isinstance(ranks, ClassRanks):
        raise TypeError(f"select: ranks must be ClassRanks; got {type(ranks).__name__}.")
    layers = graph.convolutions(model)
    for name, R in ranks.layers.items():
        have = layers[name].out_channels if name in layers else None
        if have != len(R):
            here = "is no convolution" if have is None else f"has {have} filters"
            raise ValueError(
                f"select: the ranks are from another model: {name!r} has {len(R)} filters there and {here} here."
            )


def _check_exclude(model: nn.Module, exclude: Sequence[str]) -> list[str]:
    if isinstance(exclude, str):
        raise TypeError(f"select: exclude must be a sequence of names; got one string. Pass [{exclude!r}].")
    for name in exclude:
        graph.check_layer("select", name, graph.convolutions(model))
    return list(exclude)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"select: {name} must be a whole number of at least 1; got {count!r}.")


def _plan(criterion: Criterion, context: Context, whys: Mapping[str, LayerWhy], how: Mapping[str, Any]) -> Plan:
    """Assemble the plan from the reasons."""
    modules = {"joblib": joblib, "numpy": np, "pyprune": pyprune, "scikit-learn": sklearn, "scipy": scipy}
    versions = {name: str(module.__version__) for name, module in modules.items()}
    plan = Plan(
        keep={name: np.array([f for f, why in enumerate(layer) if why.keep], np.int64) for name, layer in whys.items()},
        filters={name: len(layer) for name, layer in whys.items()},
        why=dict(whys),
        method=criterion.name,
        options={
            **criteria.settings(criterion), **how, "exclude": list(context.exclude), "min_keep": context.min_keep,
            "libraries": versions, "ranks": {} if context.ranks is None else dict(context.ranks.info),
        },
    )  # fmt: skip
    if context.example_inputs is None:
        return plan
    return replace(plan, options={**plan.options, "coupling": coupling.cost(context.costs, plan)})
