"""What a filter is worth: the interface of a criterion, and where criteria are found by name.

A criterion is any object with a name, a word on what it needs, and one method that gives every filter a number.
:func:`pyprune.select` makes plans of these numbers; docs/selection.md shows how to add one's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from pyprune import graph, operations
from pyprune.hints import did_you_mean
from pyprune.measure import Costs, Device
from pyprune.types import ClassRanks, FloatArray

T = TypeVar("T")

NEEDS = ("ranks", "data", "example_inputs")
"""What a criterion may need besides the model."""

GROUP = "pyprune.criteria"
"""The group of entry points under which other packages offer criteria."""

_HOME = {
    "crank": ("crank", "CRank"),
    "hrank": ("ranked", "HRank"),
    "l1": ("weights", "L1"),
    "l2": ("weights", "L2"),
    "fpgm": ("weights", "FPGM"),
    "cup": ("clusters", "CUP"),
    "tvs": ("data", "TVS"),
    "ckrm": ("clusters", "KernelRedundancy"),
    "bn_scale": ("weights", "BNScale"),
    "taylor": ("data", "Taylor"),
    "random": ("weights", "Random"),
}
NAMES = tuple(_HOME)
"""The criteria that are built in."""


class Criterion(Protocol):
    """What a filter is worth.

    Attributes
    ----------
    name
        What plans call it.
    needs
        Some of :data:`NEEDS`; :func:`pyprune.select` refuses to begin without them.

    Notes
    -----
    Three more members are looked for, and may be missing:

    ``plan(model, context) -> Plan``
        for a criterion that has a rate of its own: what it keeps when it is asked for no rate and no budget;
    ``left_alone(model, context) -> {layer: why}``
        layers that it would rather not judge; they are kept whole unless a rate is asked of them;
    ``comparable = True``
        if scores mean the same in every layer. A budget then removes the lowest scores of the whole network; otherwise
        it removes the same share of every layer.
    """

    @property
    def name(self) -> str:
        """What plans call it."""
        ...

    @property
    def needs(self) -> Collection[str]:
        """Some of :data:`NEEDS`."""
        ...

    def scores(self, model: nn.Module, context: Context) -> Mapping[str, Any]:
        """Return one number for every filter, [F] float64 by layer, the higher the better it is kept."""
        ...


@dataclass(frozen=True, eq=False)
class Context:
    """What a criterion is given besides the model.

    Parameters
    ----------
    model
        The network.
    layers
        The convolutions to score, by name: all that are not excluded.
    ranks, data, example_inputs
        As :func:`pyprune.select` was given them; those that the criterion needs are there.
    exclude
        Convolutions that keep every filter.
    min_keep
        Filters that stay in every layer at least.
    device
        Where to compute on data.
    progress
        Whether progress bars may be shown.
    """

    model: nn.Module
    layers: Mapping[str, graph.Convolution]
    ranks: ClassRanks | None = None
    data: Iterable[Any] | None = None
    example_inputs: Any = None
    exclude: Collection[str] = ()
    min_keep: int = 1
    device: Device = None
    progress: bool = True
    _made: dict[int, tuple[Any, Any]] = field(default_factory=dict, repr=False)

    def weights(self, name: str) -> FloatArray:
        """Return the weights of a layer as float64, [F, C / groups, ...]."""
        array: FloatArray = self.layers[name].weight.detach().double().cpu().numpy()
        return array

    def norm(self, name: str) -> tuple[str, nn.Module] | None:
        """Return the norm that alone reads the maps of a layer, or nothing; its entries are the layer's filters."""
        return self._norms.get(name)

    @cached_property
    def _norms(self) -> dict[str, tuple[str, nn.Module]]:
        traced = graph.trace(self.model, "select")
        calls, modules = graph.call_counts(traced), dict(self.model.named_modules())
        found = {}
        for node in traced.nodes:
            name, users = str(node.target), list(node.users)
            if node.op != "call_module" or name not in self.layers or calls[name] > 1 or len(users) != 1:
                continue
            reader = str(users[0].target)
            if users[0].op == "call_module" and calls[reader] == 1 and isinstance(modules[reader], _NORMS):
                found[name] = (reader, modules[reader])
        return found

    @cached_property
    def costs(self) -> Costs:
        """What the network costs under any plan, and which channels leave; needs ``example_inputs``."""
        return Costs(self.model, self.example_inputs, "select")

    def once(self, criterion: object, make: Callable[[], T]) -> T:
        """Return what ``make`` returned the first time for this criterion: scores and plan share their work."""
        if id(criterion) not in self._made:
            self._made[id(criterion)] = (criterion, make())
        made: T = self._made[id(criterion)][1]
        return made


_NORMS = (*operations.NORMS, nn.SyncBatchNorm, nn.GroupNorm)


def find(who: str, method: str | Criterion, options: Mapping[str, Any]) -> Criterion:
    """Return the criterion of that name with these options, or the one that is given.

    Raises
    ------
    ValueError
        If there is none of the name, or it has no such option.
    TypeError
        If ``method`` is no criterion, or one with options of its own is given options, too.
    """
    if isinstance(method, str):
        return check(who, _made(who, method, options))
    if isinstance(method, type):
        raise TypeError(f"{who}: needs a criterion, not its class. Pass {method.__name__}().")
    if options:
        names = ", ".join(options)
        raise TypeError(f"{who}: {_title(method)} has its options already; got {names} too. Give them to it.")
    return check(who, method)


def _made(who: str, name: str, options: Mapping[str, Any]) -> Any:
    """Make the criterion of a name: one that is built in, or one that another package offers."""
    if name in _HOME:
        module, kind = _HOME[name]
        make = getattr(importlib.import_module(f"pyprune.criteria.{module}"), kind)
    else:
        offered = {point.name: point for point in entry_points(group=GROUP)}
        if name not in offered:
            raise ValueError(
                f"{who}: method must be one of {', '.join(map(repr, (*NAMES, *sorted(offered))))}; got {name!r}."
                f"{did_you_mean(name, (*NAMES, *offered))}"
            )
        make = offered[name].load()
    if not callable(make):  # an entry point may also name the criterion itself
        return find(who, make, options)
    known = [one.name for one in fields(make)] if is_dataclass(make) else list(options)
    for option in options:
        if option not in known:
            listed = ", ".join(known) if known else "none"
            raise ValueError(f"{who}: {name!r} has no option {option!r}; it has {listed}.{did_you_mean(option, known)}")
    return make(**options)


def check(who: str, criterion: Any) -> Criterion:
    """Return ``criterion`` after checking that it has the members of one.

    Raises
    ------
    TypeError
        If it has not.
    """
    name, needs = getattr(criterion, "name", None), getattr(criterion, "needs", None)
    if not isinstance(name, str) or not name or not callable(getattr(criterion, "scores", None)):
        raise TypeError(
            f"{who}: a criterion needs a name, needs, and a method scores(model, context); got {_title(criterion)}."
        )
    if isinstance(needs, str) or not isinstance(needs, Collection) or not set(needs) <= set(NEEDS):
        raise TypeError(f"{who}: {name!r} must have needs out of {', '.join(map(repr, NEEDS))}; got {needs!r}.")
    found: Criterion = criterion
    return found


def check_scores(who: str, criterion: Criterion, scores: Any, context: Context) -> dict[str, FloatArray]:
    """Return the scores of a criterion as float64, in the order of the model's layers, after checking them.

    Raises
    ------
    ValueError
        If they are of other layers, not one for each filter, or not finite.
    TypeError
        If they are no mapping of numbers.
    """
    if not isinstance(scores, Mapping):
        raise TypeError(f"{who}: scores of {criterion.name!r} must be a mapping from layers; got {_title(scores)}.")
    for name in scores:
        if name not in context.layers:
            raise ValueError(
                f"{who}: {criterion.name!r} scores {name!r}, which is no convolution that was asked for."
                f"{did_you_mean(str(name), context.layers)}"
            )
    return {
        name: _checked(f"{who}: scores of {criterion.name!r} for {name!r}", scores[name], layer.out_channels)
        for name, layer in context.layers.items()
        if name in scores
    }


def _checked(what: str, values: Any, filters: int) -> FloatArray:
    given = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if given.dtype.kind not in "fiu":
        raise TypeError(f"{what} must be real numbers; got {given.dtype}.")
    if given.shape != (filters,):
        raise ValueError(f"{what} must be one number a filter, [{filters}]; got {list(given.shape)}.")
    found: FloatArray = given.astype(np.float64)
    if bad := int((~np.isfinite(found)).sum()):
        raise ValueError(f"{what} must be finite; {bad} of {filters} are NaN or infinite.")
    return found


def settings(criterion: Criterion) -> dict[str, Any]:
    """Return the options of a criterion as a plan records them: those of a dataclass, without how fast it computes."""
    if not is_dataclass(criterion):
        return {}
    named = [one.name for one in fields(criterion) if one.metadata.get("record", True)]
    return {name: _plain(getattr(criterion, name)) for name in named}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _title(value: object) -> str:
    return str(getattr(value, "name", None) or type(value).__name__)


def needed_number(who: str, name: str, value: Any, low: float, high: float) -> float:
    """Return ``value`` after checking that it is a number from ``low`` to ``high``.

    Raises
    ------
    ValueError
        If it is not.
    """
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        upto = f"of at least {low:g}" if high == np.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{who}: {name} must be a number {upto}; got {value!r}.")
    return float(value)
