"""Plans joined: what any of several criteria finds redundant, or only what all of them do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import numpy as np

from pyprune.hints import did_you_mean
from pyprune.types import FilterWhy, IntArray, LayerWhy, Plan

HOW = ("union", "intersection")


def combine(plans: Sequence[Plan], how: str = "union", *, min_keep: int = 1) -> Plan:
    """Join plans of the same network by what they remove.

    What is kept does not depend on the order of the plans, nor, as long as ``min_keep`` adds nothing, on whether they
    are joined two by two or all at once.

    Parameters
    ----------
    plans
        Two or more. A layer that a plan leaves out keeps every filter in it.
    how
        ``"union"`` removes a filter if any plan does, ``"intersection"`` only if all do.
    min_keep
        At least so many filters stay in every layer (all, where there are fewer). Where fewer would, those come back
        first that the fewest plans remove; of these, the ones with the highest place by score within their layer,
        summed over the plans that have a score for every filter of it; then the lower index. Where no plan says how
        many filters a layer has, only those that some plan keeps can come back.

    Returns
    -------
    Plan
        ``why`` says for every filter which plans remove it, each with its own reason, and where filters came back.
        ``options["plans"]`` has the label, method and options of each plan, ``options["refilled"]`` what came back.
        A layer has neither ``why`` nor ``filters`` where no plan says how many filters it has.

    Raises
    ------
    ValueError
        If there are fewer than two plans, they know no layer in common or differ in how many filters one has, or
        ``how`` or ``min_keep`` is none.
    TypeError
        If ``plans`` are not plans.

    Examples
    --------
    >>> by_ranks = Plan({"conv": [0, 1, 2]}, filters={"conv": 5}, method="crank")
    >>> by_weights = Plan({"conv": [0, 2, 3]}, filters={"conv": 5}, method="ckrm")
    >>> combine([by_ranks, by_weights]).keep["conv"].tolist()
    [0, 2]
    >>> combine([by_ranks, by_weights], "intersection").why["conv"][3].reason
    'only crank would remove it'
    """
    given = _checked(plans, how, min_keep)
    filters = _filters(given)
    layers = {
        name: _Layer(given, name, filters.get(name), how, min_keep)
        for name in dict.fromkeys(name for plan in plans for name in plan.keep)
        # Where all must agree and a plan leaves the layer out all filters stay, and leaving it out says so uncounted.
        if how == "union" or name in filters or all(name in plan.keep for plan in plans)
    }
    return Plan(
        keep={name: layer.kept for name, layer in layers.items()},
        filters={name: filters[name] for name in layers if name in filters},
        why={name: layer.why for name, layer in layers.items() if name in filters},
        method=f"{how}({', '.join(plan.method for plan in plans)})",
        options={
            "how": how,
            "min_keep": min_keep,
            "plans": [
                {"label": label, "method": plan.method, "options": json.loads(json.dumps(dict(plan.options)))}
                for label, plan in given.items()
            ],
            "refilled": {name: layer.back.tolist() for name, layer in layers.items() if len(layer.back)},
        },
    )


@dataclass(frozen=True, eq=False)
class _Layer:
    """What several plans say of one layer; ``filters`` is ``None`` where none says how many it has."""

    plans: Mapping[str, Plan]
    name: str
    filters: int | None
    how: str
    min_keep: int

    @cached_property
    def kept(self) -> IntArray:
        """The filters that stay."""
        return np.union1d(self._stay, self.back)

    @cached_property
    def back(self) -> IntArray:
        """The filters that come back because fewer than ``min_keep`` would stay."""
        known = reduce(np.union1d, self._told.values()) if self.filters is None else np.arange(self.filters)
        gone = np.setdiff1d(known, self._stay)
        by = sorted(gone.tolist(), key=lambda f: (len(self._removing(f)), -self._places[f], f))
        return np.array(sorted(by[: max(0, self.min_keep - len(self._stay))]), np.int64)

    @property
    def why(self) -> LayerWhy:
        """The reasons; the clusters and regions of a plan stay visible where only one has any."""
        seen = [plan.why[self.name] for plan in self.plans.values() if self.name in plan.why]
        clustered = [why for why in seen if why.k is not None]
        count = self.filters or 0
        base = clustered[0] if len(clustered) == 1 else LayerWhy((FilterWhy("", True),) * count)
        kept, back = (np.isin(np.arange(count), one).tolist() for one in (self.kept, self.back))
        return replace(
            base, note=self._note(), stability=None,
            filters=tuple(
                replace(base[f], reason=self._reason(f, kept[f], back[f]), keep=kept[f], score=None)
                for f in range(count)
            ),
        )  # fmt: skip

    @cached_property
    def _told(self) -> dict[str, IntArray]:
        """What each plan keeps that knows the layer, by label."""
        return {label: plan.keep[self.name] for label, plan in self.plans.items() if self.name in plan.keep}

    @cached_property
    def _stay(self) -> IntArray:
        """The filters that stay by ``how``, before any come back."""
        if self.how == "intersection" and len(self._told) < len(self.plans):
            return np.arange(self.filters or 0)
        joined = np.intersect1d if self.how == "union" else np.union1d
        found: IntArray = reduce(joined, self._told.values())
        return found

    @cached_property
    def _places(self) -> IntArray:
        """How many filters score lower, summed over the plans: whole numbers add up alike in any order."""
        found = np.zeros(self.filters or 1 + max(int(kept[-1]) for kept in self._told.values()), np.int64)
        for plan in self.plans.values():
            scores = np.array([one.score for one in plan.why.get(self.name, ())], np.float64)  # None becomes NaN
            if len(scores) and np.isfinite(scores).all():
                found += np.searchsorted(np.sort(scores), scores)
        return found

    def _removing(self, f: int) -> list[str]:
        """Return the labels of the plans that remove filter ``f``."""
        return [label for label, kept in self._told.items() if f not in kept]

    def _reason(self, f: int, keep: bool, back: bool) -> str:
        """Say which plans remove filter ``f``, with their own reasons behind a colon."""
        who = self._removing(f)
        if not who:
            return "no plan removes it"
        own = [
            f"{label}: {self.plans[label].why[self.name][f].reason}"
            for label in who
            if self.name in self.plans[label].why
        ]
        fate = f"removed by {_listed(who)}"
        if keep:
            fate = f"kept to leave min_keep though {fate}" if back else f"only {_listed(who)} would remove it"
        return f"{fate}: {'; '.join(own)}" if own else fate

    def _note(self) -> str:
        notes = []
        for label, plan in self.plans.items():
            if self.name not in plan.keep:
                notes.append(f"{label} leaves this layer out and removes nothing in it")
            elif self.name in plan.why and plan.why[self.name].note:
                notes.append(f"{label}: {plan.why[self.name].note}")
        if len(self.back):
            notes.append(f"{len(self.back)} came back to leave {self.min_keep}")
        return "; ".join(notes)


def _checked(plans: Any, how: Any, min_keep: Any) -> dict[str, Plan]:
    """Return the plans by label: their method, and their number where methods repeat."""
    if how not in HOW:
        hint = did_you_mean(how, HOW, cutoff=0.4)
        raise ValueError(f"combine: how must be {' or '.join(map(repr, HOW))}; got {how!r}.{hint}")
    if isinstance(min_keep, bool) or not isinstance(min_keep, int) or min_keep < 1:
        raise ValueError(f"combine: min_keep must be a whole number of at least 1; got {min_keep!r}.")
    if isinstance(plans, Plan):
        raise ValueError("combine: needs two or more plans in a list; got one plan. Pass [plan, other].")
    if not isinstance(plans, Sequence) or not all(isinstance(plan, Plan) for plan in plans):
        kinds = [type(one).__name__ for one in plans] if isinstance(plans, (list, tuple)) else type(plans).__name__
        raise TypeError(f"combine: plans must be pyprune.Plan in a list; got {kinds}. Plan.load reads one from a file.")
    if len(plans) < 2:
        raise ValueError(f"combine: needs two or more plans; got {len(plans)}. There is nothing to join.")
    if not set.intersection(*(set(plan.keep) for plan in plans)):
        first = [next(iter(plan.keep), "nothing") for plan in plans]
        raise ValueError(
            f"combine: the plans know no layer in common; theirs begin with {', '.join(map(repr, first))}. "
            "Join plans of the same network."
        )
    methods = [plan.method for plan in plans]
    numbered = len(set(methods)) < len(methods)
    return {
        f"{one} #{i}" if numbered else one: plan for i, (one, plan) in enumerate(zip(methods, plans, strict=True), 1)
    }


def _filters(plans: Mapping[str, Plan]) -> dict[str, int]:
    """Return how many filters each layer has, from the plans that know, after checking that they agree."""
    found: dict[str, tuple[int, str]] = {}
    for label, plan in plans.items():
        said = [*plan.filters.items(), *((name, len(why)) for name, why in plan.why.items())]
        for name, count in said:
            known, who = found.setdefault(name, (count, label))
            if known != count:
                raise ValueError(
                    f"combine: {name!r} has {known} filters in the plan by {who!r} and {count} in that by {label!r}. "
                    "Join plans of the same network."
                )
    for label, plan in plans.items():
        for name, kept in plan.keep.items():
            if name in found and kept[-1] >= found[name][0]:
                count, who = found[name]
                raise ValueError(
                    f"combine: {name!r} has {count} filters in the plan by {who!r}; that by {label!r} keeps filter "
                    f"{kept[-1]}. Join plans of the same network."
                )
    return {name: count for name, (count, _) in found.items()}


def _listed(labels: Sequence[str]) -> str:
    """Join ``labels`` by commas and a last "and"."""
    return " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)
