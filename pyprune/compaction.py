"""Compaction: a masked network becomes a smaller one that computes the same, and is shown to.

:mod:`pyprune.channels` decides which channels leave; here the layers are cut, constants are folded into biases,
and the result is compared with the masked network.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import fx, nn

from pyprune import channels as channel_walk
from pyprune import graph as graphs
from pyprune import kinds, measure, recording
from pyprune import operations as ops
from pyprune.baking import baked, check_model
from pyprune.channels import BoolArray, Channels, Residual
from pyprune.origins import origins
from pyprune.rewiring import Rewiring
from pyprune.types import Analysis, Certificate, Compacted, IntArray, LayerAnalysis, Plan, Profile
from pyprune.wrappers import unwrapped, unwrapped_plan

TOLERANCE = 1e-10
"""Largest |slim - masked| / max(1, max |masked|) in float64: the order of summation is all that may differ."""

NATIVE_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The same in the model's own type."""

_MOST_IMAGES = 8  # of the example inputs in float64, where a large batch would cost minutes and prove no more
_MOST_SPACE = 64  # rows and columns of theirs, for the same reason
_SIZED = ops.CONVOLUTIONS | ops.TRANSPOSED | ops.NORMS | {nn.Linear, nn.PReLU, nn.GroupNorm}


def analyse(
    model: nn.Module,
    plan: Plan,
    example_inputs: torch.Tensor | Sequence[torch.Tensor],
    *,
    residual: Residual = "scatter",
) -> Analysis:
    """Say what :func:`compact` would remove, what would stay against the plan, and why.

    Parameters
    ----------
    model
        Not changed.
    plan
        Layers that are not in it keep every filter.
    example_inputs
        What ``model(*example_inputs)`` takes: one tensor, or a tuple of them; the first dimension counts images.
    residual
        As for :func:`compact`.

    Returns
    -------
    Analysis
        One row per convolution and linear layer that the network calls, in order; and what coupling costs: how many
        planned filters, and parameters in all, ``"intersect"`` keeps that ``"scatter"`` removes.

    Raises
    ------
    ValueError
        As for :func:`compact`.
    """
    _check_residual("analyse", residual)
    model, _ = unwrapped(model)
    plan = unwrapped_plan(plan, graphs.prunable(model))
    model = _prepared("analyse", model)
    with _undisturbed(model):
        network = _Network("analyse", model, plan, _inputs("analyse", example_inputs), residual)
        return _analysis(network, plan, _decide(network, plan, 1))


def compact(
    model: nn.Module,
    plan: Plan,
    example_inputs: torch.Tensor | Sequence[torch.Tensor],
    *,
    residual: Residual = "scatter",
    round_to: int = 1,
    verify: bool = True,
    latency: bool = True,
) -> Compacted:
    """Remove the channels that ``plan`` leaves unused and return a network that computes what the masked one does.

    In eval mode the slim network equals the masked one, or the channel is kept and ``Compacted.kept`` says why.
    Operations that pyprune does not know keep the channels that they read; nothing is guessed. Where torch.fx cannot
    trace the model, its own forward is kept, and so are the channels that it could not do without. Constants that dead
    channels carry (a sigmoid makes 0.5 of 0) are folded into the bias of the layer that reads them.

    Parameters
    ----------
    model
        Masked or not; it is never changed. A wrapper of data parallelism or torch.compile is taken off, and
        ``Compacted.unwrapped`` names it.
    plan
        Layers that are not in it keep every filter.
    example_inputs
        What ``model(*example_inputs)`` takes: one tensor, or a tuple of them; the first dimension counts images.
    residual
        What happens where branches are added. ``"scatter"``: each branch computes only its own surviving filters and
        is added into the stream by index; the stream loses the channels that every branch removes. ``"intersect"``:
        branches, too, lose only what every branch removes; no indexed additions. A model that keeps its own forward
        gets that for ``"scatter"``, and ``Compacted.residual`` says so. ``"union"``, which is lossy: a channel leaves
        if any branch removes it; the plan is extended accordingly, ``Compacted.beyond`` says by what, and the proof is
        against the network masked by the extended plan.
    round_to
        Bring filters back, lowest index first and with the model's own weights, until each layer's number of
        filters is a multiple of this.
    verify
        Compare with the masked network in float64, with randomised norms, and in the model's own type.
    latency
        Measure both networks' time per forward pass, about 0.4 s.

    Returns
    -------
    Compacted
        Its ``model`` is a ``torch.fx.GraphModule`` with the names, dtype, device, memory format, ``requires_grad``
        and training flags of ``model``, and shares no memory with it. Where torch.fx cannot trace the model it is a
        network of the model's own class; ``Compacted.own_forward`` says why.

    Raises
    ------
    ValueError
        If an argument is out of range, the plan does not fit the model, it does not accept the inputs, or what it
        computes depends on values of tensors (the line is named).
    RuntimeError
        If the verification fails: then nothing is returned.
    """
    _check_residual("compact", residual)
    if not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1:
        raise ValueError(f"compact: round_to must be a positive whole number; got {round_to!r}.")
    inputs = _inputs("compact", example_inputs)
    model, wrappers = unwrapped(model)
    plan = unwrapped_plan(plan, graphs.prunable(model))
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    model = _prepared("compact", model)
    with _undisturbed(model):
        network = _Network("compact", model, plan, inputs, residual)
        decision = _decide(network, plan, round_to)
        masked = _masked(model, decision.dead)
        slim = _rebuild(masked, decision)
        sources = origins(slim, masked, own, lambda name, module: _cut_whole(name, module, decision.channels))
        certificate = _verify(masked, slim, decision, inputs) if verify else _unverified(model)
        del masked
        before, after = _profiles(network, slim, decision, _copies(inputs), latency)
    return Compacted(
        slim, certificate, plan, decision.kept, before, after, inputs, network.residual, decision.beyond, sources,
        wrappers, decision.lossy, network.own_forward,
    )  # fmt: skip


def _prepared(who: str, model: nn.Module) -> nn.Module:
    """Return ``model`` with plain weights, after refusing what cannot be cut."""
    check_model(who, model)
    return baked(model)


def _check_residual(who: str, residual: str) -> None:
    modes = get_args(Residual)
    if residual not in modes:
        listed = ", ".join(f'"{mode}"' for mode in modes)
        raise ValueError(f"{who}: residual must be one of {listed}; got {residual!r}.")


@dataclass(frozen=True, eq=False)
class _Decision:
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


class _Network:
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
        found = recording.record(self.who, twin, _copies(self.inputs))
        if found.failure is not None:
            raise _unaccepted(self.who, self.model, self.inputs, found.failure)
        recording.check(self.who, twin, found, self.inputs)
        self.recorded, self.graph, self.shapes = found, found.graph, found.shapes
        self.residual = "intersect" if self.residual == "scatter" else self.residual

    def settle(self, channels: Channels) -> bool:
        """Say whether forward, as it is, does the right thing with the layers that are left; if not, keep more."""
        if self.recorded is None:
            return True
        slim = _adopted(self.model, channels).eval()
        found = recording.record(self.who, slim, _copies(self.inputs))
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
        mode, lines = residual or self.residual, self.recorded.lines if self.recorded else None
        return channel_walk.follow(self.model, self.graph, self.shapes, dead, mode, staying, self.frozen, lines)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Hold the random state still, keep reduced precision out of the comparison, and leave no traces in ``model``."""
    device = measure.model_device(model)
    with ExitStack() as stack:
        stack.callback(_restore, _state(model))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False))
        yield


_State = list[tuple[dict[str, Any], dict[str, Any]]]


def _state(model: nn.Module) -> tuple[_State, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return what every module holds, and copies of what a forward of somebody's own may overwrite."""
    tables = [(table, dict(table)) for one in model.modules() for table in (one._parameters, one._buffers, vars(one))]
    foreign = [one for one in model.modules() if not type(one).__module__.startswith("torch.nn")]
    tensors = {one for module in foreign for one in vars(module).values() if isinstance(one, torch.Tensor)}
    tensors |= {one for module in foreign for one in module.buffers(recurse=False)}
    return tables, [(one, one.detach().clone()) for one in tensors]


def _restore(state: tuple[_State, list[tuple[torch.Tensor, torch.Tensor]]]) -> None:
    """Take back what tracing and running left behind: tensors that are computed from buffers alone, counters."""
    for table, held in state[0]:
        table.clear()
        table.update(held)
    for tensor, numbers in state[1]:
        if not torch.equal(tensor, numbers):
            tensor.copy_(numbers)


def _inputs(who: str, example_inputs: Any) -> tuple[torch.Tensor, ...]:
    if not isinstance(example_inputs, (torch.Tensor, list, tuple)):
        raise TypeError(f"{who}: example_inputs must be a tensor or a tuple of tensors; got {type(example_inputs)}.")
    return _copies(measure.as_inputs(who, example_inputs))


def _copies(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return inputs of one's own: a network that begins with an in-place activation overwrites what it is given."""
    return tuple(one.detach().clone() for one in inputs)


def _decide(network: _Network, plan: Plan, round_to: int) -> _Decision:
    """Decide what leaves, so that a forward that cannot be written anew needs no edit."""
    decision = _wanted(network, plan, round_to)
    while not network.settle(decision.channels):
        decision = _wanted(network, plan, round_to)
    return decision


def _wanted(network: _Network, plan: Plan, round_to: int) -> _Decision:
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
    return _Decision(network.graph, channels, dead, plan, wanted, kept, beyond, lossy, dropouts, own)


def _united(network: _Network, plan: Plan) -> Plan:
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
        expected = model(*_copies(inputs))
    return _difference(recording.tensors(outputs), recording.tensors(expected)) <= NATIVE_TOLERANCES.get(
        _dtype(model), 5e-2
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
            outputs = Recorder(model, graph=graph).run(*_copies(inputs))
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


def _masked(model: nn.Module, dead: Mapping[str, IntArray]) -> nn.Module:
    """Return a copy of ``model`` with the dead slices zeroed."""
    masked = copy.deepcopy(model)
    _zero(masked, dead)
    return masked


def _zero(model: nn.Module, dead: Mapping[str, IntArray]) -> None:
    for name, indices in dead.items():
        graphs.zero_filters(model, name, indices)


def _adopted(model: nn.Module, channels: Channels) -> nn.Module:
    """Return a copy of ``model`` with cut layers: whatever refers to a layer refers to the cut one."""
    memo: dict[int, Any] = {}
    parts: dict[str, Any] = {}
    for name, module in model.named_modules():
        if name in channels.filters or name in channels.inputs:
            parts[name] = memo[id(module)] = _cut(name, module, channels, memo)
    _tie(model, parts)
    for name in channels.parameters:
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(model.get_submodule(owner), leaf)
        if (left := _sliced(name, tensor, channels)) is not tensor:
            memo[id(tensor)] = left
    slim = copy.deepcopy(model, memo)
    for parameter in slim.parameters():
        parameter.grad = None
    return slim


def _rebuild(masked: nn.Module, decision: _Decision) -> nn.Module:
    """Return the slim network: a copy of the graph over cut layers, in which no tensor is the masked model's."""
    if decision.own_forward:
        return _adopted(masked, decision.channels)
    graph = _copied(decision)
    parts: dict[str, Any] = {}
    memo: dict[int, Any] = {}
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and target not in parts:
            parts[target] = _cut(target, masked.get_submodule(target), decision.channels, memo)
    for node in graph.nodes:
        if node.op == "get_attr":
            tensor = _attribute(masked, parts, str(node.target), memo)
            parts[str(node.target)] = _sliced(str(node.target), tensor, decision.channels)
    _tie(masked, parts)
    _name_dropouts(graph, parts, decision.dropouts)
    taken = {path.partition(".")[0] for path in parts}
    rewiring = Rewiring(graph, decision.channels, taken, measure.model_device(masked), _is_last(masked))
    rewiring.rewire()
    parts |= rewiring.indices
    title = type(masked).__name__
    return _module(graph, parts, title if title.startswith("Slim") else f"Slim{title}", masked)


def _tie(masked: nn.Module, parts: Mapping[str, Any]) -> None:
    """Let layers that share their parameters share what is left of them."""
    firsts: dict[int, nn.Parameter] = {}
    for name, parameter in masked.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if owner in parts and (own := getattr(parts[owner], leaf)) is not None:
            setattr(parts[owner], leaf, firsts.setdefault(id(parameter), own))


def _copied(decision: _Decision) -> fx.Graph:
    """Return a copy of the traced graph without types and metadata, literal sizes replaced by a flatten."""
    graph = fx.Graph()
    output = graph.graph_copy(decision.graph, {})
    graph.output(output)
    for node in list(graph.nodes):
        node.type, node.meta = None, {}
        if node.name in decision.channels.flattens:
            node.op, node.target, node.args, node.kwargs = "call_function", torch.flatten, (node.args[0], 1), {}
    return graph


def _name_dropouts(graph: fx.Graph, parts: dict[str, Any], follow: frozenset[str]) -> None:
    """Make modules of the functional dropouts in ``follow``, so that they know the training flag."""
    for node in graph.nodes:
        if node.name in follow and node.op == "call_function":
            name = node.name
            while name in {path.partition(".")[0] for path in parts}:
                name += "_"
            parts[name] = ops.DROPOUT_MODULES[node.target](ops.argument(node, 1, "p", 0.5))
            node.op, node.target, node.args, node.kwargs = "call_module", name, (node.all_input_nodes[0],), {}


def _is_last(model: nn.Module) -> bool:
    """Say whether the weights of ``model`` have their channels last in memory."""
    kernels = [one for one in model.parameters() if one.ndim == 4 and not one.is_contiguous()]
    return any(_memory_format(one) == torch.channels_last for one in kernels)


def _attribute(masked: nn.Module, parts: Mapping[str, Any], target: str, memo: dict[int, Any]) -> Any:
    """Return the copy of a tensor that the model reads directly; a layer that also runs owns the same one."""
    owner, _, leaf = target.rpartition(".")
    if owner in parts:
        return getattr(parts[owner], leaf)
    return copy.deepcopy(getattr(masked.get_submodule(owner), leaf), memo)


def _cut_whole(name: str, module: nn.Module, channels: Channels) -> Any:
    """Return a copy of ``module`` without what leaves of it, be it a layer or one whose parameters the model reads."""
    slim = _cut(name, module, channels, {})
    for leaf, parameter in list(slim.named_parameters(recurse=False)):
        setattr(slim, leaf, _sliced(f"{name}.{leaf}" if name else leaf, parameter, channels))
    return slim


def _sliced(name: str, tensor: Any, channels: Channels) -> Any:
    """Return a tensor that the model reads directly without the entries that leave."""
    if name not in channels.parameters or not channels.leaving_entries(name).any():
        return tensor
    left = torch.from_numpy(np.flatnonzero(~channels.leaving_entries(name))).to(tensor.device)
    data = tensor.detach().index_select(channels.parameters[name].dim, left)
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _module(graph: fx.Graph, parts: dict[str, Any], title: str, like: nn.Module) -> fx.GraphModule:
    """Return ``graph`` as a module, its generated code checked before it is compiled."""
    code = graph.python_code("self")
    graphs.check_source("compact", code.src, {*code.globals, "getattr", "slice", "Ellipsis"})
    slim = fx.GraphModule(parts, graph, title)
    known = dict(like.named_modules())
    for name, module in slim.named_modules():
        module.training = known.get(name, like).training
    for parameter in slim.parameters():
        parameter.grad = None
    return slim


def _cut(name: str, module: Any, channels: Channels, memo: dict[int, Any]) -> Any:
    """Return a copy of ``module`` without the channels that leave."""
    inputs = channels.leaving_inputs(name) if name in channels.inputs else None
    outputs = channels.leaving(name) if name in channels.filters else inputs
    gone = (outputs is not None and outputs.any()) or (inputs is not None and inputs.any())
    if not gone or type(module) not in _SIZED:
        return copy.deepcopy(module, memo)
    held = [*module.parameters(), *module.buffers()]
    slim: Any = copy.deepcopy(module, {id(tensor): tensor for tensor in held})  # each is replaced below
    out = None if outputs is None else ~outputs
    if name not in channels.filters:
        _cut_channelwise(slim, out)
        return slim
    _cut_weight(slim, module, out, None if inputs is None else ~inputs, channels.groups.get(name, 1))
    bias = None if module.bias is None else _picked(slim.bias, out)
    folded = None if inputs is None else _folded(module, channels.inputs[name].constants, inputs, out)
    if folded is not None:
        bias = (folded if bias is None else folded + bias.double()).to(slim.weight.dtype)
    _set(slim, "bias", bias, like=slim.weight)
    _count(slim, channels.groups_left(name))
    return slim


def _cut_weight(slim: Any, module: Any, out: BoolArray | None, inputs: BoolArray | None, groups: int) -> None:
    """Cut a weight [F, C, ...], or [C, F, ...] of a transposed convolution, within its groups if there are several."""
    rows, columns = (inputs, out) if type(module) in ops.TRANSPOSED else (out, inputs)
    if groups == 1:
        _set(slim, "weight", _picked(module.weight, rows, columns))
        return
    weight = module.weight.detach()
    there = np.ones(len(weight), np.bool_) if rows is None else rows
    across = np.ones(weight.shape[1] * groups, np.bool_) if columns is None else columns
    left = np.flatnonzero(there)
    inside = across.reshape(groups, -1)[left // (len(there) // groups)]  # [rows left, columns]
    index = np.nonzero(inside)[1].reshape(len(left), -1)
    picked = weight[torch.from_numpy(left)[:, None].to(weight.device), torch.from_numpy(index).to(weight.device)]
    _set(slim, "weight", picked.to(memory_format=_memory_format(weight)))


def _cut_channelwise(slim: Any, out: BoolArray | None) -> None:
    """Cut a norm's or an activation's own tensors, all of which have one entry a channel or none."""
    for leaf, tensor in [*slim.named_parameters(), *slim.named_buffers()]:
        _set(slim, leaf, _picked(tensor, out if tensor.ndim == 1 else None))
    count = 0 if out is None else int(out.sum())
    if isinstance(slim, nn.GroupNorm):
        slim.num_groups = count * slim.num_groups // slim.num_channels
    names = {nn.PReLU: "num_parameters", nn.GroupNorm: "num_channels"}
    setattr(slim, names.get(type(slim), "num_features"), count)


def _folded(module: Any, constants: Any, leaving: BoolArray, out: BoolArray | None) -> torch.Tensor | None:
    """Return what the leaving input channels add to every output of ``module``, in float64; ``None`` if nothing."""
    used = np.where(leaving, constants, 0.0)
    return _picked(kinds.folded(module, used), out) if used.any() else None


def _set(module: Any, leaf: str, tensor: torch.Tensor | None, like: torch.Tensor | None = None) -> None:
    """Put ``tensor`` in the place of a parameter or buffer, which says whether it is trained."""
    old = getattr(module, leaf)
    if tensor is None or leaf in module._buffers:
        setattr(module, leaf, tensor)
        return
    pattern = like if old is None else old
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=pattern is None or pattern.requires_grad))


def _count(module: Any, groups: int) -> None:
    """Make the sizes that a layer states about itself those of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
        return
    rows, columns = module.weight.shape[0], module.weight.shape[1] * groups
    transposed = type(module) in ops.TRANSPOSED
    module.in_channels, module.out_channels = (rows, columns) if transposed else (columns, rows)
    module.groups = groups


def _picked(tensor: torch.Tensor, out: BoolArray | None, inputs: BoolArray | None = None) -> torch.Tensor:
    """Return a copy of ``tensor`` with the entries at ``out`` [dim 0] and ``inputs`` [dim 1], in its memory format."""
    picked = tensor.detach()
    for dim, keep in enumerate((out, inputs)):
        if keep is not None and not keep.all():
            picked = picked.index_select(dim, torch.from_numpy(np.flatnonzero(keep)).to(tensor.device))
    picked = picked.clone() if picked.data_ptr() == tensor.data_ptr() else picked
    return picked.to(memory_format=_memory_format(tensor))


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.ndim in formats:
        last = torch.empty(tensor.shape, device="meta", memory_format=formats[tensor.ndim])
        if tensor.stride() == last.stride():
            return formats[tensor.ndim]
    return torch.contiguous_format


def _verify(masked: nn.Module, slim: nn.Module, decision: _Decision, inputs: tuple[torch.Tensor, ...]) -> Certificate:
    """Compare slim and masked as they are in their own type, then in float64 with randomised norms.

    ``masked`` is used up: it gets random norms. Only the layer that is running is held in float64.
    """
    device = measure.model_device(masked)
    dtype, generator = _dtype(masked), torch.Generator().manual_seed(0)
    limit = NATIVE_TOLERANCES.get(dtype, 5e-2)
    masked.eval()
    with measure.running(slim):
        native = _difference(_outputs(slim, inputs), _outputs(masked, inputs))
    if device.type == "mps":  # has no float64
        masked.cpu()
    _randomise(masked, generator)
    _zero(masked, decision.dead)
    words, worst = [], 0.0
    with _in_float64(masked, decision):
        run = _slimmed(slim, masked, decision)
        for word, batch, expected in _compared(inputs, generator, masked, decision):
            words.append(word)
            worst = max(worst, _difference(recording.tensors(run(*_copies(batch))), expected))
    _check("in float64", worst, TOLERANCE)
    _check(f"in {_plain(dtype)}", native, limit)
    return Certificate(True, tuple(words), worst, TOLERANCE, _plain(dtype), native, limit)


@contextmanager
def _in_float64(model: nn.Module, decision: _Decision) -> Iterator[None]:
    """Let every layer compute in float64, its tensors converted when it is called and put back when it has run.

    A model that reads parameters outside their layers, or that could not be traced, is converted as a whole instead.
    """
    graph = decision.graph
    if decision.own_forward or any(node.op == "get_attr" for node in graph.nodes):
        model.double()
        yield
        return
    layers = {model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    own: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def widen(layer: nn.Module, _: Any) -> None:
        own[layer] = [(one, one.data) for one in (*layer.parameters(), *layer.buffers()) if one.is_floating_point()]
        for one, data in own[layer]:
            one.data = data.double()

    def restore(layer: nn.Module, *_: Any) -> None:
        for one, data in own.pop(layer):
            one.data = data

    handles = [layer.register_forward_pre_hook(widen, prepend=True) for layer in layers]
    handles += [layer.register_forward_hook(restore, always_call=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _slimmed(slim: nn.Module, masked: nn.Module, decision: _Decision) -> Callable[..., Any]:
    """Return what runs the slim network in float64, with the numbers of the masked one."""
    if not isinstance(slim, fx.GraphModule):
        return _adopted(masked, decision.channels).double().eval()
    return _Slimmed(slim, masked, decision.channels).run


class _Slimmed(fx.Interpreter):
    """The slim network in float64: each layer is cut from the masked one when it runs, and dropped."""

    def __init__(self, slim: fx.GraphModule, masked: nn.Module, channels: Channels) -> None:
        super().__init__(slim)
        self.masked, self.channels = dict(masked.named_modules()), channels
        self.device = measure.model_device(masked)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run one layer."""
        layer = self.masked.get(target)
        if layer is None:  # a functional dropout that follows the training flag, and this is eval mode
            return args[0]
        if type(layer) not in _SIZED and not [*layer.parameters(), *layer.buffers()]:
            return layer(*args, **kwargs)
        return _cut(target, copy.deepcopy(layer).double(), self.channels, {})(*args, **kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a tensor that the network reads directly: the masked network's own, or an index."""
        owner, _, leaf = target.rpartition(".")
        if hasattr(self.masked.get(owner), leaf):
            return _sliced(target, getattr(self.masked[owner], leaf), self.channels)
        return super().get_attr(target, args, kwargs).to(self.device)


def _check(where: str, difference: float, limit: float) -> None:
    if not difference <= limit:  # also when it is NaN
        raise RuntimeError(
            f"compact: the slim network differs from the masked one by {difference:.3g} {where}, more than {limit:g}; "
            "nothing is returned. Exclude the layers in question from the plan, and please report the network."
        )


def _unverified(model: nn.Module) -> Certificate:
    dtype = _dtype(model)
    return Certificate(False, (), None, TOLERANCE, _plain(dtype), None, NATIVE_TOLERANCES.get(dtype, 5e-2))


def _dtype(model: nn.Module) -> torch.dtype:
    return next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Give every norm statistics and affine parameters that hide nothing."""

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return (torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low).to(like.device)

    ranges = {"running_mean": (-1, 1), "running_var": (0.5, 2), "weight": (0.5, 1.5), "bias": (-0.5, 0.5)}
    for module in model.modules():
        if type(module) in ops.NORMS | ops.GROUP_NORMS | ops.MIXING_NORMS:
            for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if leaf in ranges:
                    tensor.copy_(uniform(tensor, *ranges[leaf]))


def _compared(
    inputs: tuple[torch.Tensor, ...], generator: torch.Generator, model: nn.Module, decision: _Decision
) -> Iterator[tuple[str, tuple[torch.Tensor, ...], list[torch.Tensor]]]:
    """Yield what is compared in float64, in words and numbers, and what ``model`` makes of it.

    These are the example inputs and two random batches of different sizes, few and small images where it takes them.
    Where only the way is known that forward took on the example inputs, others must take the same.
    """
    images, space = len(inputs[0]), max([0, *(max(one.shape[2:]) for one in inputs if one.ndim == 4)])
    sizes = [_MOST_SPACE, space] if space > _MOST_SPACE else [space]
    batches = [(count, size) for size in sizes for count in sorted({min(images, _MOST_IMAGES), images})]
    for count, size in batches:
        batch = _resized(inputs, count, size, model)
        last = (count, size) == batches[-1]
        expected = _outputs(model, batch) if last else _accepted(model, batch, decision)
        if expected is not None:
            break
    first = "" if count == images else f"first {count} of "
    crop = "" if size == space else f", cropped to {size} x {size}"
    yield f"example inputs ({first}{images} images{crop})", batch, expected or []
    few = min(images, 2)
    for count in (few, few + 1):
        batch = _resized(inputs, count, size, model, generator)
        expected = _accepted(model, batch, decision)
        if expected is not None:
            yield f"normal random inputs ({count} images)", batch, expected


def _accepted(model: nn.Module, batch: tuple[torch.Tensor, ...], decision: _Decision) -> list[torch.Tensor] | None:
    """Return what ``model`` makes of ``batch``; ``None`` if it does not take it: some expect one size of batch.

    Nor does a model take what makes its own forward go another way.
    """
    try:
        if decision.own_forward:
            found = recording.record("compact", model, _copies(batch))
            return found.outputs if found.takes(decision.graph) else None
        return _outputs(model, batch)
    except Exception:
        return None


def _resized(
    inputs: tuple[torch.Tensor, ...], count: int, size: int, model: nn.Module, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, ...]:
    """Return ``count`` images in float64, cropped to ``size``, random ones if there is a generator.

    Tensors of whole numbers are repeated instead.
    """
    device, images = measure.model_device(model), len(inputs[0])

    def resized(one: torch.Tensor) -> torch.Tensor:
        rows = count if len(one) == images else len(one)
        if one.ndim == 4:
            one = one[:, :, :size, :size]
        if generator is not None and one.is_floating_point():
            return torch.randn((rows, *one.shape[1:]), generator=generator, dtype=torch.float64).to(device)
        rest = one[torch.arange(rows, device=one.device) % len(one)].to(device)
        return rest.double() if one.is_floating_point() else rest

    return tuple(resized(one) for one in inputs)


def _outputs(model: nn.Module, batch: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return recording.tensors(model(*_copies(batch)))


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest |found - expected| / max(1, max |expected|); infinite where the shapes differ."""
    if [one.shape for one in found] != [one.shape for one in expected]:
        return float("inf")
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.numel() == 0 or torch.equal(one, other):
            continue
        a, b = one.double(), other.double()
        same = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(same, 0.0, (a - b).abs())
        scale = max(1.0, float(torch.where(b.isfinite(), b.abs(), 0.0).max()))
        worst = max(worst, float("inf") if not gap.isfinite().all() else float(gap.max()) / scale)
    return worst


def _profiles(
    network: _Network, slim: nn.Module, decision: _Decision, inputs: tuple[torch.Tensor, ...], latency: bool
) -> tuple[Profile, Profile]:
    """Return what both networks cost; HRank's convention counts the slim one from the filters that are left."""
    model, channels = network.model, decision.channels
    positions, images = _positions(network), network.images  # those of the slim network are the same
    left = {name: int((~channels.leaving(name)).sum()) for name in decision.plan.keep if name in channels.filters}
    before, after = measure.counted(model, positions, images), measure.counted(slim, positions, images)
    counted = measure.counted(model, positions, images, left)
    after = replace(after, hrank_v1_parameters=counted.hrank_v1_parameters, hrank_v1_macs=counted.hrank_v1_macs)
    if latency:
        own = copy.deepcopy(model) if decision.own_forward else model  # it may store things when it runs
        times = measure.latencies([own, slim], inputs)
        before, after = replace(before, latency_ms=times[0]), replace(after, latency_ms=times[1])
    return before, after


def _analysis(network: _Network, plan: Plan, decision: _Decision) -> Analysis:
    """Return the counts of every layer, from the walks alone: nothing is built."""
    dead = graphs.follow_masks(network.model, plan, network.graph)[0]
    apart, together = network.follow(dead, "scatter"), network.follow(dead, "intersect")
    layers = tuple(
        _layer(name, module, decision, int((apart.leaving(name) & ~together.leaving(name)).sum()))
        for name, module in network.model.named_modules()
        if name in decision.channels.filters
    )
    saved = {channels: _saved(network.model, channels) for channels in (apart, together, decision.channels)}
    total = sum(one.numel() for one in network.model.parameters())
    coupled = saved[apart] - saved[together]
    return Analysis(layers, total, total - saved[decision.channels], network.residual, coupled, decision.lossy)


def _saved(model: nn.Module, channels: Channels) -> int:
    """Return how many parameters leave with the channels; those that layers share leave once."""
    shared = graphs.shared_layers(model)
    saved = 0
    for name in channels.filters.keys() | channels.inputs.keys():
        module: Any = model.get_submodule(name)
        first: Any = model.get_submodule(shared[name][0]) if name in shared else module
        if name not in channels.filters:
            saved += int(channels.leaving_inputs(name).sum()) * len(list(module.parameters()))
        elif first is module:
            saved += _weights(module) - _weights_left(name, module, channels)
        elif module.bias is None or module.bias is not first.bias:
            saved += _biases(module) - _biases_left(name, module, channels)
    return saved + channels.leaving_parameters(model)


def _biases(module: Any) -> int:
    return 0 if module.bias is None else int(module.bias.numel())


def _weights(module: Any) -> int:
    return int(module.weight.numel()) + _biases(module)


def _biases_left(name: str, module: Any, channels: Channels) -> int:
    """Return how many biases the layer is left with; folded constants make one."""
    read = channels.inputs.get(name)
    folds = read is not None and bool(read.constants[channels.leaving_inputs(name)].any())
    return int((~channels.leaving(name)).sum()) * int(module.bias is not None or folds)


def _weights_left(name: str, module: Any, channels: Channels) -> int:
    """Return how many weights and biases the layer is left with."""
    gone = int(channels.leaving_inputs(name).sum()) if name in channels.inputs else 0
    inputs, outputs = _inputs_of(module) - gone, int((~channels.leaving(name)).sum())
    kernel, groups = int(module.weight[0, 0].numel()), channels.groups_left(name)
    return outputs * (inputs // groups * kernel) + _biases_left(name, module, channels)


def _inputs_of(module: Any) -> int:
    return int(module.in_features if isinstance(module, nn.Linear) else module.in_channels)


def _layer(name: str, module: Any, decision: _Decision, coupled: int) -> LayerAnalysis:
    channels = decision.channels
    outputs, inputs = kinds.outputs(module), _inputs_of(module)
    gone = int(channels.leaving_inputs(name).sum()) if name in channels.inputs else 0
    planned = outputs - len(decision.given.keep[name]) if name in decision.given.keep else 0
    return LayerAnalysis(
        name, type(module).__name__, outputs, planned, int(channels.leaving(name).sum()), inputs, inputs - gone,
        _weights(module), _weights_left(name, module, channels), decision.kept.get(name, {}), coupled,
        tuple(decision.beyond.get(name, np.zeros(0, np.int64)).tolist()),
    )  # fmt: skip


def _positions(network: _Network) -> dict[str, int]:
    """Return the positions of an image's map at which each layer's weights were applied, over all its calls."""
    found: Counter[str] = Counter()
    for node in network.graph.nodes:
        module = network.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, measure.Counted):
            seen = node.all_input_nodes[0] if isinstance(module, measure.Transposed) else node
            shape = network.shapes[seen]
            values = shape[-1] if isinstance(module, nn.Linear) else shape[1]
            found[str(node.target)] += shape.numel() // (network.images * values)
    return found
