"""Which channels can leave a network, given which filters are zero.

One walk over the traced graph, in order. Every tensor carries, along its channel dimension, the *slots* that
decide whether each entry exists and the *constant* that the entry takes where it is dead (NaN: alive).
Convolutions and linear layers make new slots, and so does what is padded or added; operations that leave channels
apart pass them on and map the constant; anything that is not understood pins the slots that it reads. One slot can
*hold* another: if it stays, so does the other. An addition's sides hold its result; under ``"scatter"`` a side may
lose a channel that the result keeps, under ``"intersect"`` and ``"union"`` all three hold one another. A slot leaves
if it is dead, not pinned, and nothing that stays holds it.

A new operation is a new function under :func:`_handles`, here or in :mod:`pyprune.joins` (sums, products, cuts) or
:mod:`pyprune.kinds` (layers); nothing else has to know about it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from torch import fx, nn

from pyprune import graph as graphs
from pyprune import operations as ops
from pyprune import views
from pyprune.aliases import written_later
from pyprune.types import FloatArray, IntArray

BoolArray = npt.NDArray[np.bool_]
Residual = Literal["scatter", "intersect", "union"]


@dataclass(frozen=True, eq=False)
class Value:
    """What lies along the channel dimension ``dim`` of a tensor: [C] slots, and [C] constants (NaN where alive)."""

    slots: IntArray
    constants: FloatArray
    dim: int = 1


@dataclass(frozen=True, eq=False)
class Rearranged:
    """A tensor whose channels lie along no single dimension: where its entries lay in that of ``node``."""

    node: fx.Node
    value: Value
    places: views.Places


@dataclass(frozen=True, eq=False)
class Reading:
    """Sizes of a tensor, as read by the network: of these dimensions, one of which may count channels."""

    value: Value
    dims: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Count:
    """A number that the network computes from a number of channels, and the node that reads it."""

    value: Value
    reader: str


@dataclass(frozen=True, eq=False)
class Parts:
    """Several tensors at once, as chunk and split yield them."""

    parts: tuple[Value, ...]


@dataclass(frozen=True, eq=False)
class Weights:
    """A parameter or buffer that the network reads by itself, and its qualified name."""

    name: str
    tensor: torch.Tensor


Found = Value | Rearranged | Reading | Count | Parts | Weights | None
"""What a node yields; ``None`` is anything that is not followed."""


@dataclass(frozen=True, eq=False)
class Sum:
    """An addition: the slots [C] of its two sides and of its result, and the number of dimensions."""

    sides: tuple[IntArray, IntArray]
    result: IntArray
    ndim: int
    subtracts: bool = False


@dataclass(frozen=True, eq=False)
class Pad:
    """A padding of channels: the slots before and after those of the tensor, and the number of its dimensions.

    With ``copies`` the tensor is overwritten later on, so that without padding a copy must be left.
    """

    before: IntArray
    after: IntArray
    ndim: int
    copies: bool = False


@dataclass(frozen=True, eq=False)
class Slice:
    """A slice: the slots of the tensor that is sliced, which of them are taken, in order, and the whole index.

    ``base`` names the node that is sliced, if it is not the one before.
    With ``copies`` the tensor is overwritten later on, so that what is copied must not become a view of it.
    """

    source: IntArray
    taken: IntArray
    index: tuple[slice, ...]
    base: str = ""
    copies: bool = False


@dataclass(frozen=True, eq=False)
class View:
    """A view with sizes written out: the slots of its result, their dimension, and which dimensions it squeezed."""

    slots: IntArray
    dim: int
    sizes: views.Sizes | None
    squeezed: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Split:
    """A tensor that is cut into several along its channels: the slots of each part."""

    parts: tuple[IntArray, ...]


@dataclass(frozen=True, eq=False)
class Sliced:
    """A parameter or buffer with one entry a channel: along which dimension, and the slots."""

    dim: int
    slots: IntArray


@dataclass(frozen=True, eq=False)
class Channels:
    """What the walk found.

    ``filters`` counts the outputs of each layer that the network calls, and ``first`` is the first slot of each;
    ``inputs`` is what each layer, norm or other sized module reads; ``leaves`` [slots] says which go; ``tied``
    [slots] numbers the classes of slots that leave together, and ``joined`` those that a lossy union may add to a plan;
    ``flattens`` names the nodes whose literal size must become a flatten; ``sums``, ``pads``, ``slices``, ``splits``
    and ``views`` describe the nodes that must be written anew; ``parameters`` are those that the network reads by
    themselves and that lose entries; ``groups`` counts the groups of grouped convolutions before anything leaves.
    ``values`` are those of every tensor that is followed, by the name of its node, and ``made`` is the first slot of
    those that a node made which is no layer, and that node.
    """

    filters: Mapping[str, int]
    first: Mapping[str, int]
    inputs: Mapping[str, Value]
    leaves: BoolArray
    tied: IntArray
    joined: IntArray
    flattens: frozenset[str]
    sums: Mapping[str, Sum]
    pads: Mapping[str, Pad]
    slices: Mapping[str, Slice]
    splits: Mapping[str, Split]
    views: Mapping[str, View]
    parameters: Mapping[str, Sliced]
    groups: Mapping[str, int]
    values: Mapping[str, Value | Rearranged]
    made: Sequence[tuple[int, str]]
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

    def leaving_entries(self, parameter: str) -> BoolArray:
        """Return [C] which entries leave a parameter or buffer that the network reads by itself."""
        return self.leaves[self.parameters[parameter].slots]

    def leaving_parameters(self, model: nn.Module) -> int:
        """Return how many numbers leave parameters that the network reads by themselves."""
        own = {name: one for name, one in model.named_parameters() if name in self.parameters}
        return sum(
            int(self.leaving_entries(name).sum()) * (one.numel() // len(self.parameters[name].slots))
            for name, one in own.items()
        )

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
    staying: Mapping[str, Collection[int]] | None = None,
    frozen: Mapping[str, str] | None = None,
    lines: Mapping[str, str] | None = None,
) -> Channels:
    """Walk ``graph`` and decide which channels leave.

    Parameters
    ----------
    model, graph
        The network and its trace. Neither is changed.
    shapes
        For each node that yields a tensor, its shape; for each that yields a whole number, that number.
    dead
        What the mask zeroes, from :func:`pyprune.graph.dead_slices`.
    residual
        ``"scatter"`` lets the sides of an addition lose different channels; otherwise all lose the same.
    staying
        Filters that stay whatever happens, by layer.
    frozen
        Nodes that yield what they yield now, by name, and why; ``"name:own"`` for what only that node makes.
    lines
        Where the source calls each node, by name, for the reasons.
    """
    walk = _Walk(model, graph, shapes, dead, residual == "scatter", staying or {}, lines or {})
    for node in graph.nodes:
        walk.values[node] = walk.step(node)
        walk.freeze(node, frozen or {})
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
    staying: Mapping[str, Collection[int]] = field(default_factory=dict)
    lines: Mapping[str, str] = field(default_factory=dict)
    values: dict[fx.Node, Found] = field(default_factory=dict)
    inputs: dict[str, Value] = field(default_factory=dict)
    holds: list[_Hold] = field(default_factory=list)
    ties: list[_Hold] = field(default_factory=list)
    joins: list[_Hold] = field(default_factory=list)
    flattens: set[str] = field(default_factory=set)
    sums: dict[str, Sum] = field(default_factory=dict)
    pads: dict[str, Pad] = field(default_factory=dict)
    slices: dict[str, Slice] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    splits: dict[str, Split] = field(default_factory=dict)
    views: dict[str, View] = field(default_factory=dict)
    parameters: dict[str, Sliced] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
    produced: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.modules: dict[str, Any] = dict(self.model.named_modules())
        self.tied, shared = graphs.tied_parameters(self.model), graphs.shared_layers(self.model)
        self.fixed = _fixed_modules(self.graph, self.modules, self.tied, shared)
        self.counts: dict[str, int] = {}
        for node in self.graph.nodes:
            module = self.modules[str(node.target)] if node.op == "call_module" else None
            if module is not None and type(module) in _PRODUCERS:
                self.counts[str(node.target)] = kinds.outputs(module)
        starts = np.cumsum([0, *self.counts.values()])
        self.first = {name: int(start) for name, start in zip(self.counts, starts, strict=False)}
        self.filters = int(starts[-1])  # every slot below is a filter of a layer
        self.alive = np.zeros(starts[-1], np.bool_)
        self.pinned = np.zeros(starts[-1], np.int64)
        self.reasons: list[str] = [""]
        called = {name: names for name, names in shared.items() if name in self.counts}
        self.shared = {name: [one for one in names if one in self.counts] for name, names in called.items()}
        for name, names in self.shared.items():
            self.tie(self.own_slots(name), self.own_slots(names[0]), f"shares its weight with {names[0]}")
        self.others: list[tuple[int, str]] = []  # the first slot of each sum and padding, and its name

    def own_slots(self, name: str) -> IntArray:
        """Return the slots [F] of the filters of a layer."""
        return np.arange(self.counts[name]) + self.first[name]

    @cached_property
    def rewritten(self) -> set[str]:
        """The nodes whose tensors are overwritten later on."""
        return written_later(self.model, self.graph)

    def step(self, node: fx.Node) -> Found:
        """Return what ``node`` yields, after pinning or tying what it reads."""
        if node.op == "placeholder":
            return None
        if node.op == "get_attr":
            return self.weights(str(node.target))
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
        if view := self.overwritten(node):
            return self.pin_reads(node, f"is overwritten through {view.name}, a view of it")
        if handler not in _ANYWHERE and any(map(self.is_elsewhere, node.all_input_nodes)):
            return self.pin_reads(node, f"feeds {_title(node, key)} with its channels not along dimension 1")
        return handler(self, node)

    def is_elsewhere(self, node: fx.Node) -> bool:
        """Say whether the channels of a tensor lie along another dimension than the first behind the batch."""
        value = self.values.get(node)
        return isinstance(value, Rearranged) or (isinstance(value, Value) and value.dim != 1)

    def key(self, node: fx.Node) -> Any:
        """Return what a node calls: the type of a module, or the function."""
        return type(self.modules[str(node.target)]) if node.op == "call_module" else node.target

    def known(self, node: fx.Node) -> Any:
        """Return the number that ``node`` yields, or a tensor without numbers of its shape."""
        shape = self.shapes.get(node)
        return torch.empty(shape, device="meta") if isinstance(shape, tuple) else shape

    def freeze(self, node: fx.Node, frozen: Mapping[str, str]) -> None:
        """Keep what ``node`` yields, or only what it adds to what it reads, if that is frozen."""
        value = self.values[node]
        value = value.value if isinstance(value, Rearranged) else value
        yields = value.parts if isinstance(value, Parts) else (value,) if isinstance(value, Value) else ()
        reads = [one.slots for one in map(self.values.get, node.all_input_nodes) if isinstance(one, Value)]
        for one in yields:
            if node.name in frozen:
                self.pin(one, frozen[node.name])
            elif f"{node.name}:own" in frozen:
                self.pin(one, frozen[f"{node.name}:own"], ~np.isin(one.slots, _joined(reads)))

    def weights(self, name: str) -> Weights | None:
        """Return a tensor that the network reads by itself."""
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(self.modules.get(owner), leaf, None)
        return Weights(name, tensor) if isinstance(tensor, torch.Tensor) else None

    def overwritten(self, node: fx.Node) -> fx.Node | None:
        """Return the view that ``node`` writes through into a tensor that something else reads."""
        view = _input(node)
        if not isinstance(view, fx.Node) or not _is_view(view) or not _in_place(self, node):
            return None
        under: Any = view
        while isinstance(under, fx.Node):
            several = isinstance(self.values.get(under), Parts)  # each part is its own
            if not several and sum(not _reads_sizes(user) for user in under.users) > 1:
                return view
            under = _input(under) if _is_view(under) or several else None
        return None

    def tensor(self, node: fx.Node) -> Value | None:
        """Return the channels of any tensor; those of one that is not followed are new ones, which stay."""
        value, shape = self.values.get(node), self.shapes.get(node)
        if value is not None or not isinstance(shape, tuple) or len(shape) < 2:
            return value if isinstance(value, Value) else None
        made = self.make(node.name, np.full(shape[1], np.nan))
        self.pin(made, f"belongs to {node.name}, which pyprune does not follow")
        return made

    def source(self, node: fx.Node) -> Value | None:
        """Return the channels of the tensor that ``node`` works on, its first argument."""
        value = self.values.get(_input(node)) if isinstance(_input(node), fx.Node) else None
        return value if isinstance(value, Value) else None

    def only(self, node: fx.Node) -> Value | None:
        """Return the channels that ``node`` works on; if it reads others too, keep them all."""
        others = (self.values.get(source) for source in node.all_input_nodes if source is not _input(node))
        if any(isinstance(other, (Value, Parts, Reading, Count)) for other in others):
            return self.pin_reads(node, f"feeds {node.name} together with other channels")
        return self.source(node)

    def produce(self, name: str) -> Value:
        """Return the new channels of layer ``name``: constant 0 where the mask zeroes the filter."""
        self.produced.add(name)
        slots = self.own_slots(name)
        constants = np.full(len(slots), np.nan)
        constants[self.dead.get(f"{name}.weight", [])] = 0.0
        self.alive[slots] |= np.isnan(constants)
        value = Value(slots, constants)
        for index in self.staying.get(name, ()):
            self.pin(Value(slots[[index]], constants[[index]]), "is to stay")
        if name in self.fixed:
            self.pin(value, self.fixed[name])
        return value

    def make(self, name: str, constants: FloatArray) -> Value:
        """Return new channels that are no layer's filters: those of a sum or a product, or padded ones."""
        first = len(self.alive)
        self.others.append((first, name))
        self.alive = np.concatenate([self.alive, np.isnan(constants)])
        self.pinned = np.concatenate([self.pinned, np.zeros(len(constants), np.int64)])
        return Value(np.arange(first, first + len(constants)), constants)

    def consume(self, node: fx.Node, name: str) -> Value | None:
        """Note that layer ``name`` mixes what ``node`` reads, and return that."""
        value = self.source(node)
        if value is not None and name in self.fixed:
            self.pin(value, f"feeds {name}, which {self.fixed[name]}")
            return None
        self.read(name, value)
        return value

    def read(self, name: str, value: Value | None) -> None:
        """Note what a sized module reads: at every call, and under every name, the same channels stay.

        A constant is one to the layer only if every call reads the same; ``None`` is what is not followed.
        """
        names = self.shared.get(name, [name])
        first = self.inputs.get(names[0])
        if value is None:
            self.unread |= set(names)
        elif first is None:
            self.inputs |= dict.fromkeys(names, value)
        else:
            self.tie(first.slots, value.slots, f"is read by {name} too", joins=name not in self.groups)
            same = first.constants == value.constants
            other = ~same & ~np.isnan(first.constants) & ~np.isnan(value.constants)
            self.pin(value, f"is another constant at another call of {name}", other)
            both = Value(first.slots, np.where(same, first.constants, np.nan), first.dim)
            self.inputs |= dict.fromkeys(names, both)

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
        if node.name in self.lines:
            reason = f"{reason} ({self.lines[node.name]})"
        for value in [self.values.get(source) for source in node.all_input_nodes]:
            if isinstance(value, Count):
                self.pin(value.value, f"has its number of channels read by {value.reader}")
        for value in [self.values.get(source) for source in node.all_input_nodes]:
            if isinstance(value, Weights):
                self.whole.add(value.name)
            elif isinstance(value, Parts):
                for part in value.parts:
                    self.pin(part, reason)
            elif isinstance(value, Value):
                self.pin(value, reason)
            elif isinstance(value, (Reading, Rearranged)):
                self.pin(value.value, reason)
        return None

    def hold(self, by: IntArray, held: IntArray, reason: str) -> None:
        """Note that the slots in ``held`` stay where those in ``by`` do."""
        self.holds.append(_Hold(by, held, reason))

    def tie(self, one: IntArray, other: IntArray, reason: str, joins: bool = False) -> None:
        """Note that the slots stay or leave together; what ``joins`` may be removed by a lossy union."""
        self.hold(one, other, reason)
        self.hold(other, one, reason)
        self.ties.append(self.holds[-1])
        if joins:
            self.joins.append(self.holds[-1])

    def slice_weights(self, name: str, dim: int, value: Value) -> None:
        """Note that a parameter loses the entries of the channels that leave, at each of its uses the same."""
        owner = name.rpartition(".")[0]
        fixed = f"is {self.tied[name]} too" if name in self.tied else self.fixed_owner(owner)
        if fixed:
            self.pin(value, f"meets {name}, which {fixed}")
        elif name not in self.parameters:
            self.parameters[name] = Sliced(dim, value.slots)
        elif self.parameters[name].dim == dim:
            self.tie(self.parameters[name].slots, value.slots, f"meets {name}")
        else:
            self.whole.add(name)
            self.pin(value, f"meets {name}, which is read in several ways")

    def fixed_owner(self, owner: str) -> str:
        """Say why the parameters of a module cannot be cut by their readers alone, or nothing."""
        called = any(node.op == "call_module" and node.target == owner for node in self.graph.nodes)
        return "belongs to a layer that is called too" if called else ""

    def _needed(self) -> BoolArray:
        """Return [slots] which layers read that mix channels, and as anything but constants."""
        needed = np.zeros(len(self.alive), np.bool_)
        for name, value in self.inputs.items():
            if name in self.counts and name not in self.groups:  # those hold theirs group by group
                needed[value.slots[np.isnan(value.constants)]] = True
        return needed

    def result(self) -> Channels:
        """Decide what leaves; a tensor never loses its last channel."""
        for name in self.whole & self.parameters.keys():
            slots = self.parameters[name].slots
            self.pin(Value(slots, np.zeros(len(slots))), f"meets {name}, which is read elsewhere too")
        for name in self.unread & self.inputs.keys():
            self.pin(self.inputs[name], f"feeds {name}, which reads something else too that pyprune does not follow")
        for name in self.counts.keys() - self.produced:
            self.pin(self.produce(name), self.fixed.get(name, "is a filter of a layer that is not followed"))
        needed, edges = self._needed(), self._edges()
        stays = np.zeros_like(needed)
        while True:
            reached(edges, stays, np.flatnonzero((needed | (self.pinned > 0)) & ~stays))
            leaves = ~stays
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
        origins, through = self._origins(needed, stays)
        return Channels(
            self.counts, self.first, self.inputs, leaves, self._classes(self.ties), self._classes(self.joins),
            frozenset(self.flattens), self.sums, self.pads, self.slices, self.splits, self.views, self.parameters,
            self.groups,
            {node.name: value for node, value in self.values.items() if isinstance(value, (Value, Rearranged))},
            tuple(self.others), self._explain(origins, through),
        )  # fmt: skip

    def _edges(self) -> csr_array:
        """Return the holds as a matrix: row i has an entry at every slot that stays if slot i does."""
        by, held = _joined(hold.by for hold in self.holds), _joined(hold.held for hold in self.holds)
        return csr_array((np.ones(len(by), np.int8), (by, held)), shape=(len(self.alive), len(self.alive)))

    def _origins(self, needed: BoolArray, stays: BoolArray) -> tuple[IntArray, IntArray]:
        """Return, for each slot that stays, the nearest slot that explains it; and the hold that it came through.

        Both are -1 for a slot that leaves; the hold is -1 for one that stays by itself.
        """
        by, held = _joined(hold.by for hold in self.holds), _joined(hold.held for hold in self.holds)
        which = np.repeat(np.arange(len(self.holds)), [len(hold.by) for hold in self.holds])
        # A sum that is alive is so because a filter is, and that is what explains it: filters come first. What is
        # needed and no filter's, say the difference of a parameter and nothing, explains itself.
        places = np.arange(len(stays))
        own = self.alive & (places < self.filters)
        origins, through = np.full(len(stays), -1), np.full(len(stays), -1)
        for seeds in (own | (self.pinned > 0), needed):
            origins = np.where(stays & seeds & (origins < 0), places, origins)
            while (new := np.flatnonzero((origins[by] >= 0) & (origins[held] < 0))).size:
                origins[held[new]], through[held[new]] = origins[by[new]], which[new]
        return origins, through

    def _classes(self, ties: list[_Hold]) -> IntArray:
        """Return [slots] the classes of slots that can leave only together."""
        count = len(self.alive)
        if not count:
            return np.zeros(0, np.int64)
        ends = (_joined(tie.by for tie in ties), _joined(tie.held for tie in ties))
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


def reached(edges: csr_array, stays: BoolArray, start: IntArray) -> None:
    """Let everything stay, in place, that an edge leads to from ``start``, one after another."""
    while start.size:
        stays[start] = True
        counts = edges.indptr[start + 1] - edges.indptr[start]
        offsets = np.repeat(edges.indptr[start] - np.cumsum(counts) + counts, counts)
        held = edges.indices[offsets + np.arange(counts.sum())]
        start = np.unique(held[~stays[held]])


def _joined(arrays: Iterable[IntArray]) -> IntArray:
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _fixed_modules(
    graph: fx.Graph, modules: Mapping[str, nn.Module], tied: Mapping[str, str], shared: Collection[str]
) -> dict[str, str]:
    """Return the modules whose parameters must keep their shape, and why."""
    fixed: dict[str, str] = {}
    for name in graphs.call_counts(graph):
        if change := graphs.is_changed(modules[name]):
            fixed[name] = change
    for name, other in tied.items():
        if name.rpartition(".")[0] in shared:
            continue
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


def _reads_sizes(node: fx.Node) -> bool:
    return node.target is getattr or (node.op == "call_method" and node.target in ("size", "dim"))


def _is_view(node: fx.Node) -> bool:
    """Say whether the result of ``node`` may lie in the memory of what it reads."""
    if node.op == "call_method":
        return str(node.target) in ops.VIEW_METHODS
    return node.op == "call_function" and node.target in ops.VIEW_FUNCTIONS


def _input(node: fx.Node) -> Any:
    """Return the tensor that ``node`` works on: its first argument, or in 2 * x the only one that is a node."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(first, fx.Node) and len(node.all_input_nodes) == 1:
        return node.all_input_nodes[0]
    return first


_Handler = Callable[[_Walk, fx.Node], Found]
_HANDLERS: dict[tuple[str, Any], _Handler] = {}
_PRODUCERS = ops.CONVOLUTIONS | ops.TRANSPOSED | {nn.Linear}


_ANYWHERE: set[_Handler] = set()  # those that know what to do with channels along any dimension


def _handles(op: str, *keys: Any, anywhere: bool = False) -> Callable[[_Handler], _Handler]:
    def register(handler: _Handler) -> _Handler:
        _HANDLERS.update({(op, key): handler for key in keys})
        if anywhere:
            _ANYWHERE.add(handler)
        return handler

    return register


@_handles("call_module", nn.Linear, anywhere=True)
def _linear(walk: _Walk, node: fx.Node) -> Value | None:
    """Mix the entries of the last dimension, which must be the channels."""
    name, last = str(node.target), len(walk.shapes[node]) - 1
    output = replace(walk.produce(name), dim=last)
    value = walk.values.get(_input(node))
    if last == 0 or isinstance(value, Rearranged) or (isinstance(value, Value) and value.dim != last):
        walk.pin_reads(node, f"feeds {name} with its channels not along the last dimension")
        walk.pin(output, "reads another dimension than the channels")
        return None
    walk.consume(node, name)
    return output


@_handles("call_module", *ops.ACTIVATIONS, anywhere=True)
def _activation(walk: _Walk, node: fx.Node) -> Value | None:
    name, value = str(node.target), walk.source(node)
    if value is None:
        return None
    module = walk.modules[name]
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        if value.dim != 1:
            return walk.pin_reads(node, f"feeds {name} with its channels not along dimension 1")
        if name in walk.fixed:
            walk.pin(value, f"feeds {name}, which {walk.fixed[name]}")
        else:
            walk.read(name, value)
    weights = [weight.detach().to("cpu", torch.float64) for weight in module.parameters()]
    if weights:  # PReLU, the only activation with parameters
        return _mapped(walk, node, value, lambda x: nn.functional.prelu(x, *weights))
    return _mapped(walk, node, value, module)


@_handles("call_function", *ops.ACTIVATION_FUNCTIONS, *ops.SCALAR_FUNCTIONS, anywhere=True)
@_handles("call_method", *ops.ACTIVATION_METHODS, anywhere=True)
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
    return _written(walk, node, value, replace(value, constants=constants))


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
    return bool(node.kwargs.get("inplace")) or title.endswith("_") or node.target in ops.IN_PLACE_FUNCTIONS


@_handles("call_module", *ops.DROPOUTS, *ops.ADAPTIVE_AVG_POOLS, *ops.UPSAMPLES)
@_handles("call_function", *ops.DROPOUT_FUNCTIONS, *ops.ADAPTIVE_AVG_POOL_FUNCTIONS, *ops.INTERPOLATE_FUNCTIONS)
def _same(walk: _Walk, node: fx.Node) -> Value | None:
    return walk.only(node)


@_handles("call_module", nn.Dropout, nn.AlphaDropout, nn.Identity, anywhere=True)
@_handles("call_function", F.dropout, F.alpha_dropout, anywhere=True)
@_handles("call_method", *ops.SAME_METHODS, anywhere=True)
def _same_entries(walk: _Walk, node: fx.Node) -> Found:
    found = walk.values.get(_input(node))
    return found if isinstance(found, Rearranged) and node.target in ops.SAME_METHODS else walk.only(node)


@_handles("call_module", *ops.MOVE_MODULES, anywhere=True)
@_handles("call_function", *ops.MOVE_FUNCTIONS, anywhere=True)
@_handles("call_method", *ops.MOVE_METHODS, anywhere=True)
def _view(walk: _Walk, node: fx.Node) -> Found:
    """Move entries about: find out, on a tensor of their places, where the channels are afterwards."""
    found, before, after = walk.values.get(_input(node)), walk.shapes.get(_input(node)), walk.shapes.get(node)
    if not isinstance(found, (Value, Rearranged)) or not isinstance(before, tuple):
        return walk.pin_reads(node, f"gives a size to {_title(node, walk.key(node))}")
    start = found.places if isinstance(found, Rearranged) else views.start(before, found.dim)
    at = found if isinstance(found, Rearranged) else Rearranged(_input(node), found, start)
    places = views.moved(node, at.places, walk.modules, walk.known)
    if places is None or tuple(places.entries.shape) != after or not _agrees(walk, node, found):
        return walk.pin_reads(node, f"is reshaped by {_title(node, walk.key(node))}")
    codes, first = views.combined(at.value.slots, at.value.constants)
    line = views.along_one_dimension(torch.from_numpy(codes)[places.channels()])
    if line is None:
        _keep_counts(walk, node, at.value.slots)
        return Rearranged(at.node, at.value, places)
    value = Value(at.value.slots[first[line[1]]], at.value.constants[first[line[1]]], line[0])
    taken = places.permuted()
    shuffles = walk.key(node) in (nn.ChannelShuffle, torch.channel_shuffle)  # in groups, which may fit no longer
    if isinstance(found, Value) and not shuffles and (taken is None or np.array_equal(taken, np.arange(len(taken)))):
        _resize(walk, node, found, value)
        return value
    _keep_counts(walk, node, at.value.slots)
    if taken is None:
        walk.pin(at.value, f"is rearranged by {node.name} together with other dimensions")
        return value
    copies = node.name in walk.rewritten and not np.array_equal(taken, np.arange(len(at.value.slots)))
    walk.slices[node.name] = Slice(at.value.slots, taken, (slice(None),) * len(after), at.node.name, copies=copies)
    return value


def _agrees(walk: _Walk, node: fx.Node, found: Value | Rearranged) -> bool:
    """Say whether the channels of every tensor whose shape a view takes can stay or leave with those of its own."""
    for other in node.all_input_nodes[1:]:
        if not isinstance(walk.shapes.get(other), tuple):
            continue
        value = walk.values.get(other)
        if not isinstance(value, Value) or not isinstance(found, Value):
            return False
        if value.dim != found.dim or len(value.slots) != len(found.slots):
            return False
        walk.tie(value.slots, found.slots, f"reaches {node.name}")
    return True


def _keep_counts(walk: _Walk, node: fx.Node, slots: IntArray, written: Any = None) -> None:
    """Keep the channels whose number a view reads, unless it is the view's own or ``written`` anew."""
    for source in node.all_input_nodes[1:]:
        count = walk.values.get(source)
        if isinstance(count, Count) and source is not written and not np.array_equal(count.value.slots, slots):
            walk.pin(count.value, f"has its number of channels read by {count.reader}")


def _resize(walk: _Walk, node: fx.Node, before: Value, after: Value) -> None:
    """Note which size of a view must be written anew: the one that counts channels, unless that is read off."""
    shape, given = walk.shapes[node], views.sizes(node, walk.modules, len(walk.shapes[node]))
    widened = "expand" in _name(node) and len(before.slots) == 1 < len(after.slots)
    if given is None or widened:
        _keep_counts(walk, node, np.zeros(0, np.int64))
        kept = views.squeezed(node, before.dim, len(walk.shapes[_input(node)]))
        if kept is not None and len(before.slots) > 1:
            walk.views[node.name] = View(after.slots, after.dim, None, kept)
        return
    place = after.dim - given.first
    inside = 0 <= place < len(given.sizes)
    size = given.sizes[place] if inside else None
    _keep_counts(walk, node, np.zeros(0, np.int64), size)
    if isinstance(size, fx.Node) and _is_count(walk, size, before):
        return
    whole = after.dim == 1 and len(shape) == 2 and shape[0] == walk.shapes[_input(node)][0]
    if whole and size != -1:
        walk.flattens.add(node.name)
    elif inside:
        walk.views[node.name] = View(after.slots, after.dim, given)


def _is_count(walk: _Walk, size: fx.Node, value: Value) -> bool:
    """Say whether a number is the number of channels of ``value`` as the network reads it, and not computed from it."""
    count, read = walk.values.get(size), size.target is operator.getitem or size.target == "size"
    return isinstance(count, Count) and read and np.array_equal(count.value.slots, value.slots)


@_handles("call_function", *ops.MEAN_FUNCTIONS)
@_handles("call_method", "mean")
def _mean(walk: _Walk, node: fx.Node) -> Value | None:
    value = walk.source(node)
    if value is None or ops.spatial_mean(node, len(walk.shapes[_input(node)])) is None:
        return walk.pin_reads(node, f"is averaged with other channels by {node.name}")
    return value


@_handles("call_function", getattr, anywhere=True)
def _attribute(walk: _Walk, node: fx.Node) -> Found:
    value = walk.source(node)
    sized = isinstance(walk.values.get(_input(node)), Rearranged) and node.args[1] == "shape"
    if node.args[1] not in ("shape", "ndim", "dtype", "device") or sized:
        return walk.pin_reads(node, f"feeds .{node.args[1]}, which pyprune does not know")
    return _sizes(walk, node, value) if value is not None and node.args[1] == "shape" else None


@_handles("call_method", "size", "dim", anywhere=True)
def _size(walk: _Walk, node: fx.Node) -> Found:
    if isinstance(walk.values.get(_input(node)), Rearranged):
        return None if node.target == "dim" else walk.pin_reads(node, f"has its size read by {node.name}")
    value = walk.source(node)
    if value is None or node.target == "dim":
        return None
    dim = ops.argument(node, 1, "dim")
    if dim is None:
        return _sizes(walk, node, value)
    return Count(value, node.name) if dim % len(walk.shapes[_input(node)]) == value.dim else None


def _sizes(walk: _Walk, node: fx.Node, value: Value) -> Reading:
    return Reading(value, tuple(range(len(walk.shapes[_input(node)]))))


@_handles("call_function", *ops.COUNT_FUNCTIONS)
def _counted(walk: _Walk, node: fx.Node) -> Found:
    """Compute with numbers, one of which counts channels."""
    counts = [value for value in map(walk.values.get, node.all_input_nodes) if isinstance(value, Count)]
    numbers = all(isinstance(walk.shapes.get(source), int) for source in node.all_input_nodes)
    if numbers and counts and all(np.array_equal(one.value.slots, counts[0].value.slots) for one in counts):
        return Count(counts[0].value, node.name)
    return walk.pin_reads(node, f"feeds {_title(node, node.target)}, which pyprune does not know")


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


from pyprune import joins as joins  # noqa: E402  at the end, since the handlers need the walk
from pyprune import kinds as kinds  # noqa: E402
