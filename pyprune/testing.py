"""What a criterion of one's own has to do right, to be run in one's own tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from pyprune import criteria, graph
from pyprune.criteria import Context, Criterion
from pyprune.ranks import rank_filters
from pyprune.selection import kept_count, select
from pyprune.types import ClassRanks, Plan

RATES = (0.0, 0.5, 0.9)


def check_criterion(
    criterion: Criterion,
    model: nn.Module | None = None,
    *,
    data: Iterable[Any] | None = None,
    example_inputs: Any = None,
    ranks: ClassRanks | None = None,
) -> None:
    """Check that a criterion keeps its side of the bargain; return nothing if it does.

    Its scores must be one finite number for every filter, the same when asked again, and only of layers that were asked
    for; the model, its gradients, hooks and training flags, and torch's and numpy's random state must be as they were;
    and the plans made of the scores must keep what rates and budgets say.

    Parameters
    ----------
    criterion
        The object that :func:`pyprune.select` would be given.
    model
        Try this network only; by default a chain and a residual network with a grouped convolution, both small.
    data, example_inputs, ranks
        For ``model``, as :func:`pyprune.select` takes them; what is missing is made of ``data``.

    Raises
    ------
    AssertionError
        If it does not; the message says what was expected and what came.
    ValueError, TypeError
        From the criterion, or from :func:`pyprune.select` about it.

    Examples
    --------
    >>> class Spread:
    ...     name = "spread"
    ...     needs = ()
    ...
    ...     def scores(self, model, context):
    ...         return {name: layer.weight.flatten(1).std(1) for name, layer in context.layers.items()}
    >>> check_criterion(Spread())
    """
    criteria.check("check_criterion", criterion)
    if model is not None:
        _check_on(criterion, model, data, example_inputs, ranks)
        return
    for make in (_chain, _residual):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            network, images = make(), torch.randn(24, 2, 8, 8)
        labels = torch.arange(24) % 3
        batches = [(images[:10], labels[:10]), (images[10:], labels[10:])]
        for training in (False, True):
            _check_on(criterion, network.train(training), batches, images[:1], None)


def _chain() -> nn.Module:
    """Return three convolutions, the last with one filter and without a norm, and a classifier."""
    return nn.Sequential(
        nn.Conv2d(2, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(inplace=True),
        nn.Conv2d(10, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7), nn.ReLU(),
        nn.Conv2d(7, 1, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.second = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores


def _residual() -> nn.Module:
    return _Residual()


def _check_on(criterion: Criterion, model: nn.Module, data: Any, example_inputs: Any, ranks: Any) -> None:
    if "ranks" in criterion.needs and ranks is None and data is not None:
        ranks = rank_filters(model, data, images_per_class=4, progress=False)
    given = {"data": data, "example_inputs": example_inputs, "ranks": ranks, "progress": False}
    before = _state(model)
    first, again = (_scores(criterion, model, given) for _ in range(2))
    _expect(first.keys() == again.keys(), f"scores of the layers {sorted(first)} again", sorted(again))
    for name, values in first.items():
        same = np.array_equal(values, again[name])
        _expect(same, f"the same scores of {name!r} when asked again", "others: seed what is random")
    for what, value in _state(model).items():
        _expect(value == before[what], f"{what} as it was", "it changed; put back whatever is needed on the way")
    _check_exclusion(criterion, model, given, list(first))
    _check_rates(criterion, model, given, first)
    if example_inputs is not None:
        plan = select(model, criterion, budget={"macs": 0.7}, **given)
        found = plan.options["budget"]["macs"]
        _expect(found["reached"] <= found["allowed"], f"a budget of {found['allowed']} MACs kept", found["reached"])
    _check_own_plan(criterion, model, given)


def _scores(criterion: Criterion, model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    context = Context(model, graph.convolutions(model), **given)
    found = criteria.check_scores("check_criterion", criterion, criterion.scores(model, context), context)
    alone = getattr(criterion, "left_alone", None)
    for name in () if alone is None else alone(model, context):
        _expect(name in context.layers, "left_alone to name layers that were asked for", repr(name))
    _expect(bool(found), "scores of at least one layer", "none")
    return found


def _state(model: nn.Module) -> dict[str, Any]:
    """Return what must not change, in comparable form."""
    tensors = {name: one.detach().clone() for name, one in model.state_dict(keep_vars=True).items()}
    return {
        "the model's state": _Bits(tensors),
        "every gradient": [None if one.grad is None else one.grad.tolist() for one in model.parameters()],
        "requires_grad": [one.requires_grad for one in model.parameters()],
        "every hook": [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()],
        "the training flag": [one.training for one in model.modules()],
        "torch's random state": torch.get_rng_state().tolist(),
        "numpy's random state": repr(np.random.get_state()),  # noqa: NPY002  # the one that others may rely on
    }


class _Bits:
    """Tensors that compare by their bits."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Bits) or self.tensors.keys() != other.tensors.keys():
            return False
        return all(torch.equal(one, other.tensors[name]) for name, one in self.tensors.items())

    __hash__ = None  # type: ignore[assignment]


def _check_exclusion(criterion: Criterion, model: nn.Module, given: Mapping[str, Any], scored: list[str]) -> None:
    if len(scored) < 2:
        return
    plan = select(model, criterion, rates=0.5, exclude=scored[:1], **given)
    every = plan.filters[scored[0]]
    _expect(len(plan.keep[scored[0]]) == every, f"{every} filters of an excluded layer", len(plan.keep[scored[0]]))


def _check_rates(criterion: Criterion, model: nn.Module, given: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """Check counts at rates of all three kinds, that the highest scores stay, and that kept sets are nested."""
    plans = {rate: select(model, criterion, rates=rate, **given) for rate in RATES}
    for rate, plan in plans.items():
        for name, values in scores.items():
            kept, count = plan.keep[name], kept_count(len(values), rate)
            _expect(len(kept) == count, f"{count} filters of {name!r} at rate {rate}", len(kept))
            lost = np.setdiff1d(np.arange(len(values)), kept)
            best = not len(lost) or values[kept].min() >= values[lost].max()
            _expect(best, f"the highest scores of {name!r} to stay", "a lower one in place of a higher")
            _expect(set(kept) <= set(plans[0.0].keep[name]), "kept sets to be nested", f"others at {rate}")
    same = select(model, criterion, rates=dict.fromkeys(scores, 0.5), **given)
    _expect(_kept(same) == _kept(plans[0.5]), "the same plan at rates by name", "another")
    again = select(model, criterion, rates=plans[0.5], **given)
    _expect(_kept(again) == _kept(plans[0.5]), "the same plan at the rates of a plan", "another")
    json.dumps(plans[0.5].to_json())


def _check_own_plan(criterion: Criterion, model: nn.Module, given: Mapping[str, Any]) -> None:
    made = getattr(criterion, "plan", None)
    if made is None:
        return
    plan = made(model, Context(model, graph.convolutions(model), **given))
    _expect(isinstance(plan, Plan), "plan to return a pyprune.Plan", type(plan).__name__)
    graph.check_plan("check_criterion", model, plan)
    own, again = (select(model, criterion, **given) for _ in range(2))
    _expect(_kept(own) == _kept(again), "the same plan when asked again", "another")


def _kept(plan: Plan) -> dict[str, list[int]]:
    return {name: kept.tolist() for name, kept in plan.keep.items()}


def _expect(holds: bool, wanted: str, came: object) -> None:
    if not holds:
        raise AssertionError(f"check_criterion: expected {wanted}; got {came}.")
