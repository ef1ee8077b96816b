"""Networks inside other networks: what data parallelism and torch.compile wrap around a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from pyprune.types import Plan

_INSIDE = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}


def unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the network inside its wrappers, and the names of the wrappers, outermost first.

    ``DistributedDataParallel``, ``DataParallel`` and what ``torch.compile`` returns are known; anything else is the
    network itself.
    """
    wrappers: list[str] = []
    while (inside := _inside(model)) is not None:
        wrappers.append(type(model).__name__)
        model = inside
    return model, tuple(wrappers)


def unwrapped_plan(plan: Plan, names: Iterable[str]) -> Plan:
    """Return ``plan`` for the network inside: layers that are only known with their wrappers' names lose those."""
    known = set(names)
    found = {name: _bare(name, known) for name in plan.keep}
    if all(name == bare for name, bare in found.items()):
        return plan
    keep, filters, why = (_renamed(part, found) for part in (plan.keep, plan.filters, plan.why))
    return replace(plan, keep=keep, filters=filters, why=why)


def _inside(model: nn.Module) -> nn.Module | None:
    for kind in type(model).__mro__:  # by name and home: torch.nn.parallel is slow to import, Dynamo much slower
        if kind.__name__ in _INSIDE and kind.__module__.startswith("torch."):
            inside: nn.Module = getattr(model, _INSIDE[kind.__name__])
            return inside
    return None


def _renamed(part: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in part.items()}


def _bare(name: str, known: set[str]) -> str:
    """Return ``name`` without the prefixes of wrappers, if that is the name of a layer; else as it is."""
    bare = name
    while bare not in known and bare.startswith(("module.", "_orig_mod.")):
        bare = bare.partition(".")[2]
    return bare if bare in known else name
