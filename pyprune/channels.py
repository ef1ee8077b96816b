"""Which channels can leave a network, given which filters are zero.

One walk over the traced graph, in order. Every tensor carries, along its channel dimension, the *slots* that
decide whether each entry exists and the *constant* that the entry takes where it is dead (NaN: alive).
Convolutions and linear layers make new slots, and so does what is padded or added; operations that leave channels
apart pass them on and map the constant; anything that is not understood pins the slots that it reads. One slot can
*hold* another: if it stays, so does the other. An addition's sides hold its result; under ``"scatter"`` a side may
lose a channel that the result keeps, under ``"intersect"`` and ``"union"`` all three hold one another. A slot leaves
if it is dead, not pinned, and nothing that stays holds it.

A new operation is a new function under :func:`_handles`; nothing else has to know about it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx, nn

from pyprune import graph as graphs
from pyprune import operations as ops
from pyprune.types import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]
Residual = Literal["scatter", "intersect", "union"]


@dataclass(frozen=True, eq=False)
class Value:
    """What lies along the channel dimension of a tensor: [C] slots, and [C] constants (NaN where alive)."""

    slots: IntArray
    constants: FloatArray


@dataclass(frozen=True, eq=False)
class Reading:
    """The shape of a tensor, as read by the network; its entry 1 counts channels."""

    value: Value
    ndim: int


@dataclass(frozen=True, eq=False)
class Sum:
    """An addition: the slots [C] of its two sides and of its result, and the number of dimensions."""

    sides: tuple[IntArray, IntArray]
    result: IntArray
    ndim: int


@dataclass(frozen=True, eq=False)
class Pad:
    """A padding of channels: the slots before and after those of the tensor, and the number of its dimensions."""

    before: IntArray
    after: IntArray
    ndim: int


@dataclass(frozen=True, eq=False)
class Slice:
    """A slice: the slots of the tensor that is sliced, which of them are taken, in order, and the whole index."""

    source: IntArray
    taken: IntArray
    index: tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Channels:
    """What the walk found.

    ``filters`` counts the outputs of each layer that the network calls, and ``first`` is the first slot of each;
    ``inputs`` is what each layer, norm or other sized module reads; ``leaves`` [slots] says which go; ``tied``
    [slots] numbers the classes of slots that leave together; ``flattens`` names the nodes whose literal size must
    become a flatten; ``sums``, ``pads`` and ``slices`` describe the nodes that must be written anew; ``groups``
    counts the groups of grouped convolutions before anything leaves.
    """

    filters: Mapping[str, int]
    first: Mapping[str, int]
    inputs: Mapping[str, Value]
    leaves: BoolArray
    tied: IntArray
    flattens: frozenset[str]
    sums: Mapping[str, Sum]
    pads: Mapping[str, Pad]
    slices: Mapping[str, Slice]
    groups: Mapping[str, int]
    _why: Callable[[int], str]

    def leaving(self, layer: str) -> BoolArray:
        """Return [F] which filters of ``layer`` leave."""
        return self.leaves[self.first[layer] : self.first[layer] + self.filters[layer]]

    def leaving_inputs(self, module: str) -> BoolArray:
        """Return [C] which entries of the channel dimension that ``module`` reads leave."""
        return self.leaves[self.inputs[module].slots]

    def groups_left(self, layer: str) -> int:
        """Return how many groups a convolution is left with."""
        if layer not in self.groups:
            return 1
        return int((~self.leaving(layer)).reshape(self.groups[layer], -1).any(1).sum())

    def why(self, layer: str, index: int) -> str:
        """Say why a dead filter stays all the same."""
        return self._why(self.first[layer] + index)

    def partners(self, layer: str, index: int) -> list[tuple[str, int]]:
        """Return every (layer, filter) that leaves together with this one, itself included."""
        members = np.flatnonzero(self.tied == self.tied[self.first[layer] + index])
        return [
            (name, int(slot) - first)
            for slot in members
            for name, first in self.first.items()
            if first <= slot < first + self.filters[name]
        ]


def follow(
    model: nn.Module,
    graph: fx.Graph,
    shapes: Mapping[fx.Node, Any],
    dead: Mapping[str, IntArray],
    residual: Residual = "scatter",
) -> Channels:
    """Walk ``graph`` and decide which channels leave.

    Parameters
    ----------
    model, graph
        The network and its trace. Neither is changed.
    shapes
        For each node that yields a tensor, its shape.
    dead
        What the mask zeroes, from :func:`pyprune.graph.dead_slices`.
    residual
        ``"scatter"`` lets the sides of an addition lose different channels; otherwise all lose the same.
    """
    walk = _Walk(model, graph, shapes, dead, residual == "scatter")
    for node in graph.nodes:
        walk.values[node] = walk.step(node)
    return walk.result()


@dataclass(frozen=True, eq=False)
class _Hold:
    """Each slot of ``held`` stays if the slot of ``by`` at the same place does; ``reason`` says why."""

    by: IntArray
    held: IntArray
    reason: str


@dataclass(eq=False)
class _Walk:
    model: nn.Module
    graph: fx.Graph
    shapes: Mapping[fx.Node, Any]
    dead: Mapping[str, IntArray]
    scatters: bool = True
    values: dict[fx.Node, Value | Reading | None] = field(default_factory=dict)
    inputs: dict[str, Value] = field(default_factory=dict)
    holds: list[_Hold] = field(default_factory=list)
    ties: list[_Hold] = field(default_factory=list)
    flattens: set[str] = field(default_factory=set)
    sums: dict[str, Sum] = field(default_factory=dict)
    pads: dict[str, Pad] = field(default_factory=dict)
    slices: dict[str, Slice] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules: dict[str, Any] = dict(self.model.named_modules())
        self.fixed = _fixed_modules(self.model, self.graph, self.modules)
        self.counts: dict[str, int] = {}
        for node in self.graph.nodes:
            module = self.modules[str(node.target)] if node.op == "call_module" else None
            if module is not None and type(module) in _PRODUCERS:
                self.counts[str(node.target)] = kinds.outputs(module)
        starts = np.cumsum([0, *self.counts.values()])
        self.first = {name: int(start) for name, start in zip(self.counts, starts, strict=False)}
        self.alive = np.ones(starts[-1], np.bool_)
        self.pinned = np.zeros(starts[-1], np.int64)
        self.reasons: list[str] = [""]
        self.others: list[tuple[int, str]] = []  # the first slot of each sum and padding, and its name

    def step(self, node: fx.Node) -> Value | Reading | None:
        """Return what ``node`` yields, after pinning or tying what it reads."""
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.op == "output":
            return self.pin_reads(node, "is an output of the model")
        key: Any = node.target
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            key = type(module)
            if change := graphs.is_changed(module):
                return self.pin_reads(node, f"feeds {node.target}, which {change}")
        handler = _HANDLERS.get((node.op, key))
        if handler is None:
            return self.pin_reads(node, f"feeds {_title(node, key)}, which pyprune does not know")
        return handler(self, node)

    def source(self, node: fx.Node) -> Value | None:
        """Return the channels of the tensor that ``node`` works on, its first argument."""
        value = self.values.get(_input(node)) if isinstance(_input(node), fx.Node) else None
        return value if isinstance(value, Value) else None

    def only(self, node: fx.Node) -> Value | None:
        """Return the channels that ``node`` works on; if it reads others too, keep them all."""
        others = (self.values.get(source) for source in node.all_input_nodes if source is not _input(node))
        if any(other is not None for other in others):
            return self.pin_reads(node, f"feeds {node.name} together with other channels")
        return self.source(node)

    def produce(self, node: fx.Node, name: str) -> Value:
        """Return the new channels of layer ``name``: constant 0 where the mask zeroes the filter."""
        slots = np.arange(self.counts[name]) + self.first[name]
        constants = np.full(len(slots), np.nan)
        constants[self.dead.get(f"{name}.weight", [])] = 0.0
        self.alive[slots] = np.isnan(constants)
        value = Value(slots, constants)
        if name in self.fixed:
            self.pin(value, self.fixed[name])
        return value

    def make(self, name: str, constants: FloatArray) -> Value:
        """Return new channels that are no layer's filters: those of a sum, which its sides hold, or padded ones."""
        first = len(self.alive)
        self.others.append((first, name))
        self.alive = np.concatenate([self.alive, np.zeros(len(constants), np.bool_)])
        self.pinned = np.concatenate([self.pinned, np.zeros(len(constants), np.int64)])
        return Value(np.arange(first, first + len(constants)), constants)

    def consume(self, node: fx.Node, name: str, takes_constants: bool) -> None:
        """Note that layer ``name`` mixes what ``node`` reads, and pin what it could not do without."""
        value = self.source(node)
        if value is None:
            return
        if name in self.fixed:
            self.pin(value, f"feeds {name}, which {self.fixed[name]}")
            return
        if not takes_constants:
            self.pin_constants(value, f"into {name}, which pads with zeros")
        self.inputs[name] = value

    def pin(self, value: Value, reason: str, where: BoolArray | None = None) -> None:
        """Keep the slots of ``value`` (those at ``where``); the first reason stands."""
        slots = value.slots if where is None else value.slots[where]
        self.reasons.append(reason)
        self.pinned[slots] = np.where(self.pinned[slots] == 0, len(self.reasons) - 1, self.pinned[slots])

    def pin_constants(self, value: Value, where_to: str) -> None:
        """Keep the slots that carry a constant other than 0."""
        for constant in np.unique(value.constants[~np.isnan(value.constants) & (value.constants != 0)]):
            self.pin(value, f"carries the constant {constant:.6g} {where_to}", value.constants == constant)

    def pin_reads(self, node: fx.Node, reason: str) -> Value | None:
        """Keep everything that ``node`` reads, and follow its result no further."""
        for source in node.all_input_nodes:
            value = self.values.get(source)
            if isinstance(value, Reading):
                value = value.value
            if value is not None:
                self.pin(value, reason)
        return None

    def result(self) -> Channels:
        """Decide what leaves; a tensor never loses its last channel."""
        while True:
            origins, through = self._spread()
            leaves = origins < 0
            empty = [
                (node, value)
                for node, value in self.values.items()
                if isinstance(value, Value) and len(value.slots) and leaves[value.slots].all()
            ]
            if not empty and kinds.balance(self, leaves):
                continue
            if not empty:
                break
            node, value = empty[0]
            self.pin(Value(value.slots[:1], value.constants[:1]), f"is the last channel of {node.name}")
        return Channels(
            self.counts, self.first, self.inputs, leaves, self._tied(), frozenset(self.flattens),
            self.sums, self.pads, self.slices, self.groups, self._explain(origins, through),
        )  # fmt: skip

    def _spread(self) -> tuple[IntArray, IntArray]:
        """Return, for each slot that stays, the nearest slot that holds it and stays by itself; and the last hold.

        Both are -1 for a slot that leaves; the hold is -1 for one that stays by itself.
        """
        by, held = _joined(hold.by for hold in self.holds), _joined(hold.held for hold in self.holds)
        which = np.repeat(np.arange(len(self.holds)), [len(hold.by) for hold in self.holds])
        origins = np.where(self.alive | (self.pinned > 0), np.arange(len(self.alive)), -1)
        through = np.full(len(origins), -1)
        while (new := np.flatnonzero((origins[by] >= 0) & (origins[held] < 0))).size:
            origins[held[new]], through[held[new]] = origins[by[new]], which[new]
        return origins, through

    def _tied(self) -> IntArray:
        """Return [slots] the classes of slots that can leave only together."""
        count = len(self.alive)
        if not count:
            return np.zeros(0, np.int64)
        ends = (_joined(tie.by for tie in self.ties), _joined(tie.held for tie in self.ties))
        edges = coo_array((np.ones(len(ends[0]), np.bool_), ends), shape=(count, count))
        tied: IntArray = connected_components(edges, directed=False)[1].astype(np.int64)
        return tied

    def _explain(self, origins: IntArray, through: IntArray) -> Callable[[int], str]:
        def owner(slot: int) -> str:
            starts = [*((first, name) for name, first in self.first.items()), *self.others]
            return max((first, name) for first, name in starts if first <= slot)[1]

        def why(slot: int) -> str:
            if self.pinned[slot]:
                return self.reasons[int(self.pinned[slot])]
            if through[slot] < 0:
                return ""
            origin, reason = int(origins[slot]), self.holds[int(through[slot])].reason
            state = "keeps its channel" if self.alive[origin] else self.reasons[int(self.pinned[origin])]
            whose = owner(origin)
            return f"{reason}, which {state}" if reason.endswith(f" {whose}") else f"{reason}, where {whose} {state}"

        return why


def _joined(arrays: Iterable[IntArray]) -> IntArray:
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _fixed_modules(model: nn.Module, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the modules whose parameters must keep their shape, and why."""
    fixed: dict[str, str] = {}
    tied = graphs.tied_parameters(model)
    for name, count in graphs.call_counts(graph).items():
        if change := graphs.is_changed(modules[name]):
            fixed[name] = change
        if count > 1:
            fixed[name] = "is called more than once"
    for name, other in tied.items():
        fixed.setdefault(name.rpartition(".")[0], f"shares its parameters with {other.rpartition('.')[0]}")
    for node in graph.nodes:
        if node.op == "get_attr":
            owner = str(node.target).rpartition(".")[0]
            fixed.setdefault(owner, f"has its {str(node.target).rpartition('.')[2]} read directly by the model")
    return fixed


def _title(node: fx.Node, key: Any) -> str:
    """Name an operation for a reader: the layer and its type, or the function."""
    if node.op == "call_module":
        return f"{node.target} ({key.__name__})" if isinstance(key, type) else str(node.target)
    if node.op == "call_method":
        return f".{node.target}()"
    home = str(getattr(key, "__module__", None) or "torch")
    return f"{home.removeprefix('_')}.{getattr(key, '__name__', key)}"


def _input(node: fx.Node) -> Any:
    """Return the tensor that ``node`` works on: its first argument, or in 2 * x the only one that is a node."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(first, fx.Node) and len(node.all_input_nodes) == 1:
        return node.all_input_nodes[0]
    return first


_Handler = Callable[[_Walk, fx.Node], Value | Reading | None]
_HANDLERS: dict[tuple[str, Any], _Handler] = {}
_PRODUCERS = ops.CONVOLUTIONS | ops.TRANSPOSED | {nn.Linear}


def _handles(op: str, *keys: Any) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        _HANDLERS.update({(op, key): handler for key in keys})
        return handler

    return register


@_handles("call_module", nn.Linear)
def _linear(walk: _Walk, node: fx.Node) -> Value | None:
    name = str(node.target)
    output = walk.produce(node, name)
    if len(walk.shapes[node]) != 2:
        walk.pin_reads(node, f"feeds {name} with more than two dimensions")
        walk.pin(output, "has more than two dimensions")
        return None
    walk.consume(node, name, takes_constants=True)
    return output


@_handles("call_module", *ops.ACTIVATIONS)
def _activation(walk: _Walk, node: fx.Node) -> Value | None:
    name, value = str(node.target), walk.source(node)
    if value is None:
        return None
    module = walk.modules[name]
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        if name in walk.fixed:
            walk.pin(value, f"feeds {name}, which {walk.fixed[name]}")
        else:
            walk.inputs[name] = value
    weights = [weight.detach().to("cpu", torch.float64) for weight in module.parameters()]
    if weights:  # PReLU, the only activation with parameters
        return _mapped(walk, node, value, lambda x: nn.functional.prelu(x, *weights))
    return _mapped(walk, node, value, module)


@_handles("call_function", *ops.ACTIVATION_FUNCTIONS, *ops.SCALAR_FUNCTIONS)
@_handles("call_method", *ops.ACTIVATION_METHODS)
def _activation_function(walk: _Walk, node: fx.Node) -> Value | None:
    value = walk.source(node)
    if value is None or len(node.all_input_nodes) != 1:
        return walk.pin_reads(node, f"feeds {_title(node, node.target)} together with another tensor")

    def apply(x: torch.Tensor) -> Any:
        args = fx.map_arg(node.args, lambda _: x)
        kwargs = fx.map_arg(node.kwargs, lambda _: x)
        if isinstance(node.target, str):
            return getattr(x, node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    return _mapped(walk, node, value, apply)


def _mapped(walk: _Walk, node: fx.Node, value: Value, function: Callable[[torch.Tensor], Any]) -> Value:
    """Return ``value`` with its constants mapped by an elementwise ``function``."""
    with torch.no_grad():
        found = np.asarray(function(torch.from_numpy(value.constants.copy())[None]))[0].astype(np.float64)
    known = ~np.isnan(value.constants)
    constants = np.where(known, found, np.nan)
    walk.pin(value, f"becomes infinite or undefined at {node.name}", known & ~np.isfinite(constants))
    return _written(walk, node, value, Value(value.slots, constants))


def _written(walk: _Walk, node: fx.Node, value: Value, result: Value) -> Value:
    """Return ``result``, keeping what changes under other readers of a tensor that is overwritten with it."""
    if len(_input(node).users) > 1 and _in_place(walk, node):
        changed = ~np.isnan(value.constants) & (result.constants != value.constants)
        walk.pin(value, f"is overwritten at {node.name} while others read it", changed)
    return result


def _in_place(walk: _Walk, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(walk.modules[str(node.target)], "inplace", False))
    title = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return bool(node.kwargs.get("inplace")) or title.endswith("_") or title == "iadd"


@_handles("call_module", *ops.DROPOUTS, *ops.ADAPTIVE_AVG_POOLS, *ops.UPSAMPLES)
@_handles("call_function", *ops.DROPOUT_FUNCTIONS, *ops.ADAPTIVE_AVG_POOL_FUNCTIONS, *ops.INTERPOLATE_FUNCTIONS)
@_handles("call_method", *ops.SAME_METHODS)
def _same(walk: _Walk, node: fx.Node) -> Value | None:
    return walk.only(node)


@_handles("call_module", nn.Flatten)
@_handles("call_function", *ops.FLATTEN_FUNCTIONS)
@_handles("call_method", "flatten", *ops.RESHAPE_METHODS)
def _flatten(walk: _Walk, node: fx.Node) -> Value | None:
    value = walk.source(node)
    if value is None:
        return walk.pin_reads(node, f"gives a size to {_title(node, node.target)}")
    before, after = walk.shapes[_input(node)], walk.shapes[node]
    if len(after) == 2 and after[0] == before[0] and len(before) > 1 and ops.states_columns(node, after[1]):
        walk.flattens.add(node.name)
    elif not ops.is_flatten(node, walk.modules):
        key = type(walk.modules[str(node.target)]) if node.op == "call_module" else node.target
        return walk.pin_reads(node, f"is reshaped by {_title(node, key)}")
    run = int(np.prod(before[2:], dtype=np.int64))
    return Value(np.repeat(value.slots, run), np.repeat(value.constants, run))


@_handles("call_function", *ops.MEAN_FUNCTIONS)
@_handles("call_method", "mean")
def _mean(walk: _Walk, node: fx.Node) -> Value | None:
    value = walk.source(node)
    if value is None or ops.spatial_mean(node, len(walk.shapes[_input(node)])) is None:
        return walk.pin_reads(node, f"is averaged with other channels by {node.name}")
    return value


@_handles("call_function", getattr)
def _attribute(walk: _Walk, node: fx.Node) -> Value | Reading | None:
    value = walk.source(node)
    if node.args[1] not in ("shape", "ndim", "dtype", "device"):
        return walk.pin_reads(node, f"feeds .{node.args[1]}, which pyprune does not know")
    return Reading(value, len(walk.shapes[_input(node)])) if value is not None and node.args[1] == "shape" else None


@_handles("call_method", "size", "dim")
def _size(walk: _Walk, node: fx.Node) -> Value | Reading | None:
    value = walk.source(node)
    if value is None or node.target == "dim":
        return None
    ndim = len(walk.shapes[_input(node)])
    dim = ops.argument(node, 1, "dim")
    if dim is None:
        return Reading(value, ndim)
    return walk.pin_reads(node, f"has its number of channels read by {node.name}") if dim % ndim == 1 else None


@_handles("call_function", operator.getitem)
def _item(walk: _Walk, node: fx.Node) -> Value | None:
    value, index = walk.values.get(_input(node)), node.args[1]
    if isinstance(value, Value):
        return _slice(walk, node, value)
    if not isinstance(value, Reading):
        return walk.pin_reads(node, "feeds an indexing, which pyprune does not know")
    if not isinstance(index, (int, slice)) or 1 in np.atleast_1d(np.arange(value.ndim)[index]):
        return walk.pin_reads(node, f"has its number of channels read by {node.name}")
    return None


def _slice(walk: _Walk, node: fx.Node, value: Value) -> Value | None:
    """Slice space, as in x[:, :, ::2, ::2], and channels where the bounds are written out."""
    index = ops.whole_batch_index(node, len(walk.shapes[_input(node)]))
    if index is None or len(node.all_input_nodes) > 1:
        return walk.pin_reads(node, "feeds an indexing, which pyprune does not know")
    if any(_in_place(walk, user) for user in node.users):
        walk.pin(value, f"is overwritten through {node.name}, a slice of it")
    taken = np.arange(len(value.slots))[index[1]]
    walk.slices[node.name] = Slice(value.slots, taken, index)
    return Value(value.slots[taken], value.constants[taken])


@_handles("call_function", *ops.PAD_FUNCTIONS)
def _pad(walk: _Walk, node: fx.Node) -> Value | None:
    """Pad space, and channels by a constant: those are new slots that nothing needs."""
    value = walk.only(node)
    padding = ops.padding(node, len(walk.shapes[_input(node)]))
    if value is None or padding is None or min(padding.channels) < 0:
        return walk.pin_reads(node, "feeds a padding that pyprune does not know")
    if padding.mixes:
        other = ~np.isnan(value.constants) & (value.constants != padding.value)
        walk.pin(value, f"carries a constant into {node.name}, which pads with {padding.value:g}", other)
    if not any(padding.channels):
        return value
    before, after = (walk.make(node.name, np.full(count, padding.value)) for count in padding.channels)
    walk.pads[node.name] = Pad(before.slots, after.slots, len(walk.shapes[node]))
    parts = (before, value, after)
    return Value(np.concatenate([p.slots for p in parts]), np.concatenate([p.constants for p in parts]))


@_handles("call_function", *ops.ADD_FUNCTIONS)
@_handles("call_method", *ops.ADD_METHODS)
def _add(walk: _Walk, node: fx.Node) -> Value | Reading | None:
    """Add two tensors channel by channel; adding a number, or a tensor to itself, maps the constants."""
    if len(node.all_input_nodes) == 1 and walk.source(node) is not None:
        return _activation_function(walk, node)
    sources = node.all_input_nodes
    found = [walk.values.get(source) for source in sources]
    values = [value for value in found if isinstance(value, Value)]
    shapes = {tuple(walk.shapes.get(source, ())) for source in sources}
    if len(values) != 2 or len(shapes) != 1 or len(node.args) != 2 or node.kwargs:
        return walk.pin_reads(node, f"reaches {node.name}, an addition whose other side pyprune does not follow")
    first, second = values
    result = walk.make(node.name, first.constants + second.constants)
    walk.sums[node.name] = Sum((first.slots, second.slots), result.slots, len(walk.shapes[node]))
    overwrites = _in_place(walk, node) and len(_input(node).users) > 1  # then it cannot be written anew
    for side in values:
        walk.holds.append(_Hold(side.slots, result.slots, f"reaches {node.name}"))
        if walk.scatters and not overwrites:
            carry = ~np.isnan(side.constants) & (side.constants != 0)
            reason = f"carries a constant other than 0 into {node.name}"
            walk.holds.append(_Hold(result.slots[carry], side.slots[carry], reason))
        else:
            walk.holds.append(_Hold(result.slots, side.slots, f"reaches {node.name}"))
            walk.ties.append(walk.holds[-1])
    return _written(walk, node, first, result)


from pyprune import kinds as kinds  # noqa: E402  at the end, since the handlers of layer kinds need the walk
