"""What leaves: the channels that a plan frees in a traced network, and what stays against it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from pyprune import channels as channel_walk
from pyprune import graph as graphs
from pyprune import measure, recording
from pyprune import operations as ops
from pyprune.channels import Channels, Residual
from pyprune.cutting import adopted
from pyprune.proving import NATIVE_TOLERANCES, copies, difference, model_dtype
from pyprune.types import IntArray, Plan


@dataclass(frozen=True, eq=False)
class Decision:
    """What leaves: everything that both builds, the delivered one and the one in float64, are made from."""

    graph: fx.Graph
    channels: Channels
    dead: Mapping[str, IntArray]
    given: Plan
    plan: Plan  # what is carried out: extended by a union, or reduced by rounding
    kept: Mapping[str, Mapping[int, str]]
    beyond: Mapping[str, IntArray]  # filters that leave although the given plan keeps them
    lossy: bool  # whether a union extended the plan
    dropouts: frozenset[str]  # the nodes of functional dropout that follow the training flag
    own_forward: bool = False  # whether the slim network is of the model's own class


class Network:
    """A traced model, the shapes of its tensors, and what the walks say under a plan."""

    def __init__(self, who: str, model: nn.Module, plan: Plan, inputs: tuple[torch.Tensor, ...], residual: Residual):
        graphs.check_plan(who, model, plan)
        self.who, self.model, self.inputs, self.residual = who, model, inputs, residual
        self.images = len(inputs[0])
        self.recorded: recording.Recording | None = None
        self.own_forward, self.frozen = "", dict[str, str]()
        try:
            self.graph = graphs.trace(model, who)
        except graphs.TraceError as error:
            self.own_forward = error.reason
        else:
            self.shapes, outputs = _shapes(who, model, self.graph, inputs)
            _write_methods(self.graph, self.shapes)
            if not _is_faithful(model, outputs, inputs):
                self.own_forward = "torch.fx follows another way through forward than tensors take"
        if self.own_forward:
            self._record()

    def _record(self) -> None:
        """Follow the way that forward takes on the inputs; branches are added as forward adds them."""
        twin = copy.deepcopy(self.model).eval()  # forward may store things in it
        found = recording.record(self.who, twin, copies(self.inputs))
        if found.failure is not None:
            raise _unaccepted(self.who, self.model, self.inputs, found.failure)
        recording.check(self.who, twin, found, self.inputs)
        self.recorded, self.graph, self.shapes = found, found.graph, found.shapes
        self.residual = "intersect" if self.residual == "scatter" else self.residual

    def settle(self, channels: Channels) -> bool:
        """Say whether forward, as it is, does the right thing with the layers that are left; if not, keep more."""
        if self.recorded is None:
            return True
        slim = adopted(self.model, channels).eval()
        found = recording.record(self.who, slim, copies(self.inputs))
        more = recording.to_freeze(self.recorded, channels, found, slim, self.residual, self.frozen)
        if more is None:
            return True
        if not more:
            raise ValueError(
                f"{self.who}: the forward of {type(self.model).__name__} does something else with narrower layers, and "
                f"keeping what it reads does not help ({found.failure}). Leave its layers out of the plan."
            )
        self.frozen |= more
        return False

    def walk(
        self, plan: Plan, staying: Mapping[str, set[int]] | None = None
    ) -> tuple[dict[str, IntArray], dict[str, dict[int, str]], Channels]:
        """Return what a mask zeroes, which filters no mask can silence, and which channels leave."""
        dead, stays = graphs.follow_masks(self.model, plan, self.graph)
        return dead, stays, self.follow(dead, staying=staying)

    def follow(
        self,
        dead: Mapping[str, IntArray],
        residual: Residual | None = None,
        staying: Mapping[str, set[int]] | None = None,
    ) -> Channels:
        """Return which channels leave where ``dead`` filters are zero."""
        mode, lines = residual or self.residual, self.recorded.lines if self.recorded else None
        return channel_walk.follow(self.model, self.graph, self.shapes, dead, mode, staying, self.frozen, lines)


def decide(network: Network, plan: Plan, round_to: int) -> Decision:
    """Decide what leaves, so that a forward that cannot be written anew needs no edit."""
    decision = _wanted(network, plan, round_to)
    while not network.settle(decision.channels):
        decision = _wanted(network, plan, round_to)
    return decision


def _wanted(network: Network, plan: Plan, round_to: int) -> Decision:
    """Follow the channels, and bring filters back until every number of filters is a multiple."""
    model = network.model
    united = wanted = _united(network, plan) if network.residual == "union" else plan
    back: dict[str, set[int]] = {}
    while True:
        dead, stays, channels = network.walk(wanted, back)
        more = _to_bring_back(channels, round_to) or _masked_in_vain(plan, wanted, channels)
        if not more:
            break
        back = {name: back.get(name, set()) | more.get(name, set()) for name in back.keys() | more.keys()}
        again = {name: np.array(sorted(filters), np.int64) for name, filters in back.items()}
        wanted = Plan({name: np.union1d(kept, again.get(name, kept)) for name, kept in united.keep.items()})
    kept = _kept(model, plan, wanted, channels, stays, f"makes the number of filters a multiple of {round_to}")
    beyond = _beyond(plan, channels)
    lossy = any(np.isin(filters, wanted.keep.get(name, filters), invert=True).any() for name, filters in beyond.items())
    dropouts = frozenset[str]() if network.recorded else _training_dropouts(model, network.graph)
    own = network.recorded is not None
    return Decision(network.graph, channels, dead, plan, wanted, kept, beyond, lossy, dropouts, own)


def _united(network: Network, plan: Plan) -> Plan:
    """Return ``plan`` extended until every producer of a joined channel removes what one of them removes.

    Joined channels that would stay all the same, say because they are an output, are left as they are. A layer that
    would lose every filter keeps the one that most branches keep.
    """
    channels, layers = network.walk(plan)[2], graphs.prunable(network.model)
    classes = {name: channels.joined[first : first + channels.filters[name]] for name, first in channels.first.items()}
    stuck: set[int] = {int(one) for name, tied in classes.items() if name not in layers for one in tied}
    while True:
        united = _extended(plan, {name: tied for name, tied in classes.items() if name in layers}, stuck)
        after = network.walk(united)[2]
        lost = {
            int(classes[name][index])
            for name, kept in united.keep.items()
            if name in classes
            for index in np.setdiff1d(np.flatnonzero(~after.leaving(name)), kept)
        }
        if lost <= stuck:
            return united
        stuck |= lost


def _extended(plan: Plan, classes: Mapping[str, IntArray], stuck: set[int]) -> Plan:
    """Return ``plan`` without every filter of a class that it removes one of; ``stuck`` classes are left alone."""
    votes: Counter[int] = Counter()
    for name, kept in plan.keep.items():
        votes.update(np.delete(classes[name], kept).tolist() if name in classes else ())
    left_alone = set(stuck)
    while True:
        keep = dict(plan.keep)
        for name, tied in classes.items():
            stays = [i for i, one in enumerate(tied.tolist()) if votes[one] == 0 or one in left_alone]
            if len(stays) < len(tied):
                keep[name] = np.intersect1d(plan.keep.get(name, np.arange(len(tied))), stays)
        empty = next((name for name, kept in keep.items() if not len(kept)), None)
        if empty is None:
            return Plan(keep)
        own = plan.keep.get(empty, np.arange(len(classes[empty])))  # the emptied layer need not be in the plan
        left_alone.add(min(classes[empty][own].tolist(), key=lambda one: votes[one]))


def _beyond(plan: Plan, channels: Channels) -> dict[str, IntArray]:
    """Return the filters that leave although ``plan`` keeps them."""
    kept = {name: plan.keep.get(name, np.arange(count)) for name, count in channels.filters.items()}
    found = {name: filters[channels.leaving(name)[filters]] for name, filters in kept.items()}
    return {name: filters for name, filters in found.items() if len(filters)}


def _training_dropouts(model: nn.Module, graph: fx.Graph) -> frozenset[str]:
    """Return the nodes like F.dropout(x, p, self.training), of which a trace in eval mode keeps only the False."""
    try:
        twin = graphs.trace(model, training=True)
    except ValueError:
        return frozenset()
    return frozenset(
        node.name
        for node, other in zip(graph.nodes, twin.nodes, strict=False)
        if node.target in ops.DROPOUT_MODULES and node.name == other.name and node.target == other.target
        and (_drops(node), _drops(other)) == (False, True)
    )  # fmt: skip


def _drops(node: fx.Node) -> Any:
    return ops.argument(node, 2, "training", True)


def _is_faithful(model: nn.Module, outputs: Any, inputs: tuple[torch.Tensor, ...]) -> bool:
    """Say whether the graph computed what forward does: isinstance, say, may answer otherwise while it is traced."""
    with measure.running(model):
        expected = model(*copies(inputs))
    return difference(recording.tensors(outputs), recording.tensors(expected)) <= NATIVE_TOLERANCES.get(
        model_dtype(model), 5e-2
    )


def _shapes(
    who: str, model: nn.Module, graph: fx.Graph, inputs: tuple[torch.Tensor, ...]
) -> tuple[dict[fx.Node, Any], Any]:
    """Run the graph once in eval mode and return the shape of every tensor, and every whole number; and the result."""
    shapes: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                shapes[n] = result.shape
            elif type(result) is int:
                shapes[n] = result
            return result

    try:
        with measure.running(model):
            outputs = Recorder(model, graph=graph).run(*copies(inputs))
    except Exception as error:
        raise _unaccepted(who, model, inputs, error) from None
    return shapes, outputs


def _unaccepted(who: str, model: nn.Module, inputs: tuple[torch.Tensor, ...], error: Exception) -> ValueError:
    came = ", ".join(f"{list(one.shape)} {one.dtype}".replace("torch.", "") for one in inputs)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"{who}: {type(model).__name__} does not accept example_inputs of {came} ({reason}). "
        "Pass one batch, as the model's forward takes it."
    )


def _write_methods(graph: fx.Graph, shapes: Mapping[fx.Node, Any]) -> None:
    """Write ``a += b`` as what it is: a method of tensors, and a plain sum of numbers, which are never changed."""
    for node in graph.nodes:
        if node.target in ops.IN_PLACE_FUNCTIONS:
            method, plain = ops.IN_PLACE_FUNCTIONS[node.target]
            if isinstance(shapes.get(node), tuple):
                node.op, node.target = "call_method", method
            else:
                node.target = plain


def _to_bring_back(channels: Channels, round_to: int) -> dict[str, set[int]]:
    """Return the filters that must stay for every layer's number of filters to be a multiple of ``round_to``."""
    back: dict[str, set[int]] = {}
    for name, count in channels.filters.items():
        leaving = np.flatnonzero(channels.leaving(name))
        missing = -(count - len(leaving)) % round_to
        for index in leaving[:missing]:
            for partner, other in channels.partners(name, int(index)):
                back.setdefault(partner, set()).add(other)
    return back


def _masked_in_vain(plan: Plan, wanted: Plan, channels: Channels) -> dict[str, set[int]]:
    """Return the filters that a union removes beyond ``plan`` and that stay all the same: they must not be masked."""
    found: dict[str, set[int]] = {}
    for name in wanted.keep.keys() & channels.filters.keys():
        stays = np.setdiff1d(np.flatnonzero(~channels.leaving(name)), wanted.keep[name])
        more = np.intersect1d(stays, plan.keep.get(name, stays))
        if len(more):
            found[name] = set(more.tolist())
    return found


def _kept(
    model: nn.Module, plan: Plan, wanted: Plan, channels: Channels, stays: Mapping[str, Mapping[int, str]], rounded: str
) -> dict[str, dict[int, str]]:
    """Return why each filter stays that the plan removes."""
    kept: dict[str, dict[int, str]] = {}
    layers = graphs.prunable(model)
    for name, keep in plan.keep.items():
        removed = np.setdiff1d(np.arange(layers[name].out_channels), keep)
        leaves = channels.leaving(name) if name in channels.filters else np.zeros(layers[name].out_channels, np.bool_)
        for index in (int(i) for i in removed if not leaves[i]):
            if index in wanted.keep[name]:
                why = rounded
            elif index in stays.get(name, {}):
                why = stays[name][index]
            elif name not in channels.filters:
                why = "is in a layer that the traced network does not call, or whose type pyprune does not know"
            else:
                why = channels.why(name, index)
            kept.setdefault(name, {})[index] = why
    return kept
