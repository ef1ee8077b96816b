"""Budgets: how many filters have to go, in a given order, until the compacted network costs no more than it may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyprune.hints import did_you_mean
from pyprune.measure import Costs
from pyprune.types import Plan, Profile

COSTS = ("macs", "parameters", "hrank_v1_macs", "hrank_v1_parameters")
"""What a budget may name: fields of a :class:`~pyprune.types.Profile`."""

Queue = Sequence[Sequence[tuple[str, int]]]
"""Filters (layer, index) in the order in which they go; those that stand together go together."""


def check_budget(who: str, budget: Any) -> dict[str, float]:
    """Return ``budget`` as numbers after checking it.

    Raises
    ------
    ValueError, TypeError
        If it names nothing or something unknown, or a number is not positive.
    """
    if not isinstance(budget, Mapping) or not budget:
        raise TypeError(f'{who}: budget must be a mapping such as {{"macs": 0.5}}; got {budget!r}.')
    for name, value in budget.items():
        if name not in COSTS:
            hint = did_you_mean(name, COSTS)
            raise ValueError(f"{who}: budget can name {', '.join(map(repr, COSTS))}; got {name!r}.{hint}")
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise TypeError(f"{who}: budget of {name} must be a number; got {type(value).__name__}.")
        if not 0 < value < np.inf:
            raise ValueError(f"{who}: budget of {name} must be a share up to 1 or a number above; got {value}.")
    return {str(name): float(value) for name, value in budget.items()}


def meet(
    who: str, costs: Costs, filters: Mapping[str, int], queue: Queue, budget: Mapping[str, float]
) -> tuple[dict[str, set[int]], dict[str, Any]]:
    """Return which filters have to go, as few of ``queue`` as will do, and how the budget was met.

    The cost is that of the network as compaction leaves it, coupling included. It is bisected over the queue, which
    takes a dozen counts.

    Parameters
    ----------
    who
        Whom messages name.
    costs
        The network.
    filters
        The number of filters of every layer of the plan.
    queue
        What may go, in order.
    budget
        From :func:`check_budget`: for each cost the most that it may be, as a share of what it is up to 1, or as a
        number above.

    Returns
    -------
    removed, record
        By layer; and for each cost what it was, what was allowed and what was reached.

    Raises
    ------
    ValueError
        If the budget cannot be met; with the nearest that can.
    """
    full = costs.profile()
    allowed = {name: value * getattr(full, name) if value <= 1 else value for name, value in budget.items()}

    def cost(count: int) -> Profile:
        return costs.profile(_plan(filters, _removed(queue[:count])))

    def fits(found: Profile) -> bool:
        return all(getattr(found, name) <= most for name, most in allowed.items())

    few, many = -1, len(queue)
    found = cost(many)
    if not fits(found):
        raise ValueError(_too_small(who, full, found, allowed))
    while many - few > 1:
        middle = (few + many) // 2
        tried = cost(middle)
        if fits(tried):
            many, found = middle, tried
        else:
            few = middle
    record = {
        name: {"asked": budget[name], "allowed": most, "reached": getattr(found, name), "of": getattr(full, name)}
        for name, most in allowed.items()
    }
    return _removed(queue[:many]), record


def _too_small(who: str, full: Profile, least: Profile, allowed: Mapping[str, float]) -> str:
    missed = {name: most for name, most in allowed.items() if getattr(least, name) > most}
    parts = [
        f"{name} cannot fall to {most:,.0f}; the nearest is {getattr(least, name):,}, "
        f"{getattr(least, name) / getattr(full, name):.3g} of {getattr(full, name):,}"
        for name, most in missed.items()
    ]
    return f"{who}: {'; '.join(parts)}. Ask for that much, exclude fewer layers, or lower min_keep."


def _removed(part: Queue) -> dict[str, set[int]]:
    removed: dict[str, set[int]] = {}
    for group in part:
        for name, f in group:
            removed.setdefault(name, set()).add(f)
    return removed


def _plan(filters: Mapping[str, int], removed: Mapping[str, set[int]]) -> Plan:
    return Plan({
        name: np.setdiff1d(np.arange(count), np.array(sorted(removed.get(name, ())), np.int64))
        for name, count in filters.items()
    })  # fmt: skip
