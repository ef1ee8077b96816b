"""Networks that torch.fx cannot trace, recorded while they run: the graph of the way that ``forward`` takes.

torch.fx runs ``forward`` on proxies, so that control flow on shapes, assertions and loops over sizes stop it. Here
``forward`` runs on the example inputs, and every call of torch that it makes is written down under the name it was
called by, with layers as leaves: the graph has the words of a trace, and compaction reads it like one. Numbers of
images and of channels stay symbolic; sizes of space do so in views only, and are numbers elsewhere, say in paddings.

Whatever depends on the *values* of a tensor is refused, by its line. (torch.export refuses the same, but its graphs
hold operations of ATen in which sizes that follow the layers look like sizes that are written out; those that are
written out are what a network with its own ``forward`` must not lose.)

Since ``forward`` stays as it is, a slim network is recorded again: :func:`to_freeze` finds the calls that do not move
the channels that are left to the places where they belong, and what must stay for them to do so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
import sys
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from pyprune import operations as ops
from pyprune.channels import Channels, Rearranged, Residual, Value, follow
from pyprune.types import IntArray

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OWN = __file__
_GENERATED = ("<eval_with_key", "<frozen", "<string>", contextlib.__file__)

_HARMLESS = frozenset({
    "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "get_device", "type",
    "is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_inference", "is_same_size", "is_pinned",
    "is_shared", "is_conj", "is_neg", "has_names", "get_default_dtype", "result_type", "can_cast", "__len__",
    "__hash__", "__repr__", "__format__", "__dir__", "is_set_to", "is_storage", "is_tensor", "size", "__get__",
})  # fmt: skip
"""Calls on a tensor that read none of its values, or only to show them; ``__get__`` is any attribute."""

_PLAIN = (int, float, complex, str, type(None), type(...), torch.dtype, torch.device, torch.memory_format, torch.layout)

_OPERATORS: dict[str, Any] = {
    "__getitem__": operator.getitem, "__rsub__": operator.sub, "__rdiv__": operator.truediv,
    "__rtruediv__": operator.truediv, "__rpow__": operator.pow, "__pow__": operator.pow, "pow": operator.pow,
    "__floordiv__": operator.floordiv, "__rfloordiv__": operator.floordiv, "__matmul__": operator.matmul,
    "__rmatmul__": operator.matmul,
}  # fmt: skip


def _assigned(tensor: Any, index: Any, value: Any) -> Any:
    """Write ``value`` into ``tensor`` and return that."""
    tensor[index] = value
    return tensor


def _touched(tensor: Any, _: Any) -> Any:
    """Return ``tensor``, whose memory another operation has written to."""
    return tensor


_assigned.__module__, _assigned.__name__ = "operator", "setitem"  # what reasons call them
_touched.__module__, _touched.__name__ = "memory", "written_through_another_tensor"


class _Constant:
    """A tensor that is no parameter, buffer or attribute of the network."""

    __name__ = "constant"

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __call__(self) -> torch.Tensor:
        return self.tensor


class _Size(int):
    """A size of a tensor, or what is computed from some by whole numbers, and the node that it becomes.

    ``space`` says that it counts neither images nor channels.
    """

    node: Callable[[], fx.Node]
    recorder: _Recorder
    space: bool

    def _combined(self, function: Any, other: Any, turned: bool = False) -> Any:
        if type(other) not in (int, _Size):
            return NotImplemented
        first, second = (other, self) if turned else (self, other)
        return self.recorder.size(
            function(int(first), int(second)),
            lambda: self.recorder.number(function, tuple(_symbol(one) for one in (first, second))),
            all(one.space for one in (first, second) if isinstance(one, _Size)),
        )

    def __add__(self, other: Any) -> Any:
        return self._combined(operator.add, other)

    def __radd__(self, other: Any) -> Any:
        return self._combined(operator.add, other, True)

    def __sub__(self, other: Any) -> Any:
        return self._combined(operator.sub, other)

    def __rsub__(self, other: Any) -> Any:
        return self._combined(operator.sub, other, True)

    def __mul__(self, other: Any) -> Any:
        return self._combined(operator.mul, other)

    def __rmul__(self, other: Any) -> Any:
        return self._combined(operator.mul, other, True)

    def __floordiv__(self, other: Any) -> Any:
        return self._combined(operator.floordiv, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._combined(operator.floordiv, other, True)

    def __mod__(self, other: Any) -> Any:
        return self._combined(operator.mod, other)

    def __neg__(self) -> Any:
        return self._combined(operator.mul, -1)


@dataclass(frozen=True, eq=False)
class Recording:
    """The way that ``forward`` took.

    ``shapes`` holds the shape of every tensor and the value of every number, by node; ``lines`` the line of the
    model's source that made each node, by the node's name; ``reads`` where sizes were read: how many nodes there were
    by then, the node of the tensor, and the line. ``failure`` is the exception that ended it, if one did, and
    ``inside`` says whether a call of torch raised that, rather than Python between them.
    """

    graph: fx.Graph
    shapes: dict[fx.Node, Any]
    lines: dict[str, str]
    reads: list[tuple[int, fx.Node, str]]
    outputs: list[torch.Tensor]
    failure: Exception | None
    inside: bool

    def takes(self, graph: fx.Graph) -> bool:
        """Say whether it calls what ``graph`` calls, with other sizes perhaps."""
        ways = [[(node.op, _named(node), *node.all_input_nodes) for node in one.nodes] for one in (self.graph, graph)]
        return self.failure is None and str(ways[0]) == str(ways[1])


def record(who: str, model: nn.Module, inputs: Sequence[torch.Tensor]) -> Recording:
    """Run ``model`` on ``inputs`` and return what it called.

    Parameters
    ----------
    who
        Who asks, for messages.
    model
        A copy that may be thrown away, in eval mode: a ``forward`` may store things in it.
    inputs
        Tensors, which in-place operations may overwrite.

    Returns
    -------
    Recording
        With a ``failure`` if ``forward`` raised; the graph ends there, without an output.

    Raises
    ------
    ValueError
        If ``forward`` does what no graph holds, named by its line: it reads values of tensors, replaces their data,
        uses parameters that are not its own, or returns an object that holds tensors in ways of its own.
    """
    recorder = _Recorder(who, model)
    with torch.no_grad():
        return recorder.run(inputs)


def check(who: str, model: nn.Module, recording: Recording, inputs: Sequence[torch.Tensor]) -> None:
    """Compare the graph with ``forward`` on other numbers than those it was recorded on, bit for bit.

    Raises
    ------
    ValueError
        If they differ: something goes past torch's functions, or is drawn at random.
    """
    others = [_other(one, seed) for seed, one in enumerate(inputs)]
    with torch.no_grad():
        found = fx.Interpreter(model, graph=recording.graph).run(*(one.clone() for one in others))
        expected = tensors(model(*(one.clone() for one in others)))
    if len(found) != len(expected) or not all(map(_same, found, expected)):
        raise ValueError(
            f"{who}: the forward of {type(model).__name__} computes something else than the calls of torch that were "
            "recorded, be it by chance, by what it stored before, or outside torch. Make it a function of its inputs."
        )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or (one.is_floating_point() and torch.equal(one.nan_to_num(), other.nan_to_num()))


def _other(one: torch.Tensor, seed: int) -> torch.Tensor:
    if not one.is_floating_point():
        return one.clone()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one)


def tensors(output: Any) -> list[torch.Tensor]:
    """Return the tensors of what a network returns, in order: of tuples, lists, dictionaries and dataclasses.

    Raises
    ------
    TypeError
        If it holds an object of any other kind that is no number, text or ``None``.
    """
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        items: Any = output.values()
    elif isinstance(output, (list, tuple)):
        items = output
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        items = [getattr(output, one.name) for one in dataclasses.fields(output)]
    elif output is None or isinstance(output, (bool, int, float, str, torch.dtype, torch.device)):
        items = ()
    else:
        raise TypeError(
            f"networks must return tensors, in tuples, lists, dictionaries and dataclasses; got {type(output).__name__}"
        )
    return [tensor for item in items for tensor in tensors(item)]


def to_freeze(
    full: Recording, channels: Channels, slim: Recording, model: nn.Module, residual: Residual, frozen: Collection[str]
) -> dict[str, str] | None:
    """Return what has to stay for ``forward`` to do what it should, by node and with the reason; ``None`` if nothing.

    Parameters
    ----------
    full, channels
        The network of full width, and what is to leave of it.
    slim, model
        The slim network.
    residual
        How the channels were followed.
    frozen
        What was frozen before.

    Returns
    -------
    dict or None
        For :func:`pyprune.channels.follow`. Empty if something is wrong that no further freezing helps.
    """
    wrong, by_size = _disagreements(full, channels, slim, model, residual)
    if not wrong:
        return None
    found: dict[str, str] = {}
    order = list(full.graph.nodes)
    for node in wrong:
        if by_size:
            found |= _last_read(full, channels, order.index(node), frozen)
        if not found:
            found |= _literal(full, channels, node, frozen)
    if not found:
        found = _last_read(full, channels, order.index(wrong[0]), frozen)
    return found


def _literal(full: Recording, channels: Channels, node: fx.Node, frozen: Collection[str]) -> dict[str, str]:
    """Freeze what a call yields and reads; of a padding first only what it adds."""
    line = full.lines.get(node.name, "forward")
    if node.name in channels.pads and f"{node.name}:own" not in frozen:
        return {f"{node.name}:own": f"pads with channels whose number is written out in {line}"}
    names = [one.name for one in (node, *node.all_input_nodes) if one.name not in frozen]
    return dict.fromkeys(names, f"reaches {line}, where a size is written out")


def _last_read(full: Recording, channels: Channels, end: int, frozen: Collection[str]) -> dict[str, str]:
    """Freeze the tensor whose number of channels was read last before the node at ``end``, and changes."""
    for position, node, line in reversed(full.reads):
        value = channels.values.get(node.name)
        known = value.value if isinstance(value, Rearranged) else value
        if position <= end and node.name not in frozen and known is not None and channels.leaves[known.slots].any():
            return {node.name: f"has its number of channels read by {line}, which does something else for another one"}
    return {}


def _disagreements(
    full: Recording, channels: Channels, slim: Recording, model: nn.Module, residual: Residual
) -> tuple[list[fx.Node], bool]:
    """Return the calls that do something else in a slim network than ``channels`` says, each without those after it.

    These are nodes of ``full``: those whose tensor has another shape in the slim network, or other channels; or else
    the first that the slim network does not reach, or reaches with other numbers. Second comes whether that is because
    Python computed something else between the calls.
    """
    after = follow(model, slim.graph, slim.shapes, {}, residual)
    places = _places(channels, after)
    found: list[fx.Node] = []
    wrong: set[fx.Node] = set()
    mine, theirs = list(full.graph.nodes), list(slim.graph.nodes)
    for node, other in zip(mine, theirs, strict=False):
        if _call(node) != _call(other):
            return (found, False) if found else ([node], True)
        if wrong.intersection(node.all_input_nodes):
            wrong.add(node)
        elif not _agree(node, other, full, slim, channels, after, places):
            wrong.add(node)
            found.append(node)
    if found or (len(mine) == len(theirs) and slim.failure is None):
        return found, False
    return [mine[min(len(theirs), len(mine) - 1)]], not slim.inside


def _call(node: fx.Node) -> tuple[Any, ...]:
    """Return what is called with what, nodes by their names."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(plain(one) for one in value)
        if isinstance(value, slice):
            return ("slice", plain(value.start), plain(value.stop), plain(value.step))
        if isinstance(value, Mapping):
            return tuple((key, plain(one)) for key, one in value.items())
        if isinstance(value, fx.Node):
            return value.name
        return type(value), repr(value) if isinstance(value, _PLAIN) else ""

    return node.op, node.name, _named(node), plain(node.args), plain(node.kwargs)


def _named(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def _places(before: Channels, after: Channels) -> IntArray:
    """Return, for each slot of a slim network, the slot that it is in the full one; -1 where that is not clear."""
    places = np.full(len(after.leaves), -1, np.int64)
    for name, first in after.first.items():
        filters = np.flatnonzero(~before.leaving(name))
        places[first : first + len(filters)] = before.first[name] + filters
    mine, theirs = (_spans(one) for one in (before, after))
    for (name, start, end), (other, first, last) in zip(mine, theirs, strict=False):
        left = start + np.flatnonzero(~before.leaves[start:end])
        if name != other:
            break
        if len(left) == last - first:
            places[first:last] = left
    return places


def _spans(channels: Channels) -> list[tuple[str, int, int]]:
    """Return the slots that are no filter's: whose they are, the first and the one behind the last."""
    ends = [*(first for first, _ in channels.made), len(channels.leaves)][1:]
    return [(name, first, end) for (first, name), end in zip(channels.made, ends, strict=True)]


def _agree(
    node: fx.Node, other: fx.Node, full: Recording, slim: Recording, before: Channels, after: Channels, places: IntArray
) -> bool:
    """Say whether ``other`` yields the channels of ``node`` that are left, in order."""
    shape, found = full.shapes.get(node), slim.shapes.get(other)
    if not isinstance(shape, tuple) or not isinstance(found, tuple):
        return isinstance(shape, tuple) == isinstance(found, tuple)
    if node.op == "get_attr" and node.target in before.parameters:
        cut = before.parameters[str(node.target)].dim
        count = int((~before.leaving_entries(str(node.target))).sum())
        return found == torch.Size([*shape[:cut], count, *shape[cut + 1 :]])
    mine, theirs = before.values.get(node.name), after.values.get(other.name)
    if isinstance(mine, Rearranged) and isinstance(theirs, Rearranged):
        return True  # halfway through several views: the last of them is looked at
    if not isinstance(mine, Value) or not isinstance(theirs, Value):
        return shape == found and mine is theirs
    left = mine.slots[~before.leaves[mine.slots]]
    wanted = (*shape[: mine.dim], len(left), *shape[mine.dim + 1 :])
    return found == wanted and mine.dim == theirs.dim and np.array_equal(places[theirs.slots], left)


@dataclass(frozen=True)
class _Part:
    """A tensor that a call returned among others: not a node before somebody reads it."""

    node: fx.Node
    path: tuple[Any, ...]


@dataclass(frozen=True)
class _Changed:
    """A tensor in whose memory a call wrote that compaction does not follow."""

    before: Any
    by: fx.Node


@dataclass(eq=False)
class _Recorder:
    who: str
    model: nn.Module
    graph: fx.Graph = field(default_factory=fx.Graph)
    shapes: dict[fx.Node, Any] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)
    reads: list[tuple[int, fx.Node, str]] = field(default_factory=list)
    depth: int = 0
    refusal: ValueError | None = None
    inside: bool = False
    moves: bool = False  # whether the call is a view, which gets sizes of space as symbols too

    def __post_init__(self) -> None:
        self.names = {module: name for name, module in self.model.named_modules()}
        self.known: dict[int, tuple[weakref.ref[torch.Tensor], Any]] = {}
        self.derived: set[fx.Node] = set()  # what depends on the inputs
        self.held: list[torch.Tensor] = []
        self.attributes: dict[int, str] = {}
        for name, module in self.model.named_modules():
            own = {**vars(module), **module._buffers, **module._parameters}
            for leaf, tensor in own.items():
                if isinstance(tensor, torch.Tensor):
                    self.attributes.setdefault(id(tensor), f"{name}.{leaf}" if name else leaf)
                    self.held.append(tensor)

    def run(self, inputs: Sequence[torch.Tensor]) -> Recording:
        for i, one in enumerate(inputs):
            node = self.graph.placeholder(f"input_{i}")
            self.derived.add(node)
            self.shapes[node] = one.shape
            self.remember(one, node)
        failure, outputs = None, []
        handles = [handle for module in self.names if _is_leaf(module) for handle in self._hooks(module)]
        try:
            with _Calls(self):
                outputs = self.returned(self.model(*inputs))
        except Exception as error:
            failure = error.with_traceback(None)  # whose frames would hold every tensor
        finally:
            for handle in handles:
                handle.remove()
            self.held.clear()
            self.names.clear()
            self.known.clear()
            del self.model
        if self.refusal is not None:  # forward may have caught it
            raise self.refusal.with_traceback(None) from None
        return Recording(self.graph, self.shapes, self.lines, self.reads, outputs, failure, self.inside)

    def returned(self, output: Any) -> list[torch.Tensor]:
        self.depth += 1  # nothing is written down any more
        try:
            found = tensors(output)
        except TypeError as error:
            self.refuse(f"{error}. Return those from forward.")
        self.graph.output([self.argument(one) for one in found])
        return found

    def refuse(self, what: str) -> None:
        """Give up, in one sentence."""
        self.refusal = self.refusal or ValueError(f"{self.who}: {what}")
        raise self.refusal

    def _hooks(self, module: nn.Module) -> tuple[Any, Any]:
        stack: list[Any] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.depth += 1
            if self.depth == 1:
                stack.append((self.argument(args), self.argument(kwargs), _versions((args, kwargs)), _line()))
                self.inside = True

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.depth == 1 and stack:
                given, named, versions, line = stack.pop()
                if output is not None:
                    self.inside = False
                    self.note("call_module", self.names[module], given, named, output, versions, line)
            self.depth -= 1

        return (
            module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True, always_call=True),
        )

    def called(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write down one call of torch, make it, and return what it returns."""
        if self.depth:
            return function(*args, **kwargs)
        name = str(getattr(function, "__name__", function))
        line = _line()
        given = list(_tensors_in((args, kwargs)))
        if name == "__set__" and given:
            self.refuse(f"{line} replaces the data of a tensor. Compute with a new tensor instead.")
        if not given and not _contains_size((args, kwargs)):
            self.inside = True
            result = function(*args, **kwargs)
            self.inside = False
            if _tensors_in(result):
                self.note("call_function", function, self.argument(args), self.argument(kwargs), result, [], line)
            return result
        if name == "__setitem__":
            return self._assign(args, line)
        if name in _HARMLESS:
            result = function(*args, **kwargs)
            if not _tensors_in(result):
                return self._read(function, name, args, result, line)
            nodes = (self.argument(args[0]), _attribute(function))
            self.note("call_function", getattr, nodes, {}, result, [], line)
            return result
        versions, self.moves = _versions((args, kwargs)), name in ops.MOVE_METHODS
        nodes, named = self.argument(args), self.argument(kwargs)
        self.inside, self.moves = True, False
        result = function(*args, **kwargs)
        self.inside = False
        if not _tensors_in(result):
            return self._read(function, name, args, result, line)
        op, target, nodes = _spelled(function, name, nodes)
        self.note(op, target, nodes, named, result, versions, line)
        return result

    def _read(self, function: Any, name: str, args: tuple[Any, ...], result: Any, line: str) -> Any:
        """Return what a call returned that is no tensor: sizes as symbols, values of tensors never."""
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if tensor is not None and (name == "size" or (name == "__get__" and _attribute(function) == "shape")):
            return self._sizes(tensor, result, args[1] if len(args) > 1 else None, line)
        if tensor is not None and name in ("numel", "nelement", "stride", "__len__"):
            self._sizes(tensor, tensor.shape, None, line)
        if name not in _HARMLESS and any(self._depends(one) for one in _tensors_in(args)):
            self.refuse(
                f"{line} reads values of a tensor ({name}), so that what it does depends on the images, and a slim "
                "network would be right for some of them only. Compute both ways and choose by torch.where, or take "
                "that out of forward."
            )
        return result

    def _sizes(self, tensor: torch.Tensor, result: Any, dim: Any, line: str) -> Any:
        """Return sizes of a tensor that depends on the inputs: those of the first two dimensions as symbols."""
        if not self._depends(tensor):
            return result
        node = self.argument(tensor)
        self.reads.append((len(self.graph.nodes), node, line))

        def sized(index: int, value: int) -> int:
            return self.size(value, lambda: self.number("size", (node, index)), index > 1)

        if isinstance(result, torch.Size):
            return torch.Size([sized(i, int(one)) for i, one in enumerate(result)])
        return sized(int(dim) % tensor.ndim, int(result))

    def size(self, value: int, make: Callable[[], fx.Node], space: bool) -> _Size:
        """Return a number that becomes a node when a call is given it."""
        made: list[fx.Node] = []

        def node() -> fx.Node:
            if not made:
                made.append(make())
                self.shapes[made[0]] = value
            return made[0]

        found = _Size(value)
        found.node, found.recorder, found.space = node, self, space
        return found

    def number(self, function: Any, args: tuple[Any, ...]) -> fx.Node:
        """Return a node that yields a whole number."""
        op = "call_method" if isinstance(function, str) else "call_function"
        node = self.graph.create_node(op, function, args)
        self.lines[node.name] = _line()
        return node

    def _assign(self, args: tuple[Any, ...], line: str) -> None:
        tensor, index, value = args
        nodes = self.argument((tensor, index, value))
        self.inside = True
        tensor[index] = value
        self.inside = False
        node = self.create("call_function", _assigned, nodes, {}, line)
        self.shapes[node] = tensor.shape
        self._taint(tensor, node)
        self.remember(tensor, node)

    def create(self, op: str, target: Any, args: Any, kwargs: Any, line: str) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        self.lines[node.name] = line
        if self.derived.intersection(node.all_input_nodes):
            self.derived.add(node)
        return node

    def note(self, op: str, target: Any, args: Any, kwargs: Any, result: Any, versions: list[Any], line: str) -> None:
        """Write down a call that returned tensors, and what it did to the memory of others."""
        node = self.create(op, target, args, kwargs, line)
        changed = [one for one, version in versions if _version(one) != version or (version < 0 and _writes(node))]
        followed = self._is_followed(node) and len(changed) <= 1 and all(one is result for one in changed)
        for one in changed:
            self._taint(one, node)
        if not followed:
            for one in changed:
                self.remember(one, _Changed(self._entry(one), node))
        if isinstance(result, torch.Tensor):
            self.shapes[node] = result.shape
            self.remember(result, node)
            return
        for path, one in _paths(result):
            self.remember(one, _Part(node, path))

    def _is_followed(self, node: fx.Node) -> bool:
        """Say whether compaction knows what the call writes, if it writes over its first argument."""
        target: Any = node.target
        if node.op == "call_module":
            return type(self.model.get_submodule(target)) in ops.ACTIVATIONS | ops.DROPOUTS
        if node.op == "call_method":
            return target in ops.ACTIVATION_METHODS | ops.ADD_METHODS | ops.SUB_METHODS | ops.PRODUCT_METHODS
        return target in ops.ACTIVATION_FUNCTIONS or target in ops.DROPOUT_FUNCTIONS

    def _taint(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """Let every other tensor that lies in the memory of ``tensor`` be one that ``node`` has changed."""
        memory = _memory(tensor)
        for key, (reference, entry) in list(self.known.items()):
            one = reference()
            if one is not None and one is not tensor and _memory(one) == memory:
                self.known[key] = (reference, _Changed(entry, node))

    def remember(self, tensor: torch.Tensor, entry: Any) -> None:
        self.known[id(tensor)] = (weakref.ref(tensor), entry)

    def _depends(self, tensor: torch.Tensor) -> bool:
        """Say whether a tensor depends on the inputs."""
        entry = self._entry(tensor)
        while isinstance(entry, _Changed):
            if entry.by in self.derived:
                return True
            entry = entry.before
        return (entry.node if isinstance(entry, _Part) else entry) in self.derived

    def _entry(self, tensor: torch.Tensor) -> Any:
        reference, entry = self.known.get(id(tensor), (None, None))
        return entry if reference is not None and reference() is tensor else None

    def argument(self, value: Any) -> Any:
        """Return ``value`` with nodes for tensors and sizes."""
        if isinstance(value, torch.Tensor):
            return self._node(value)
        if isinstance(value, _Size):
            return int(value) if value.space and not self.moves else value.node()
        if isinstance(value, tuple):
            return tuple(self.argument(one) for one in value)
        if isinstance(value, list):
            return [self.argument(one) for one in value]
        if isinstance(value, dict):
            return {key: self.argument(one) for key, one in value.items()}
        if isinstance(value, slice):
            return slice(*(self.argument(one) for one in (value.start, value.stop, value.step)))
        return value

    def _node(self, tensor: torch.Tensor) -> fx.Node:
        entry = self._entry(tensor)
        node = self._made(tensor, entry)
        if node is not entry:
            self.shapes[node] = tensor.shape
            self.remember(tensor, node)
        return node

    def _made(self, tensor: torch.Tensor, entry: Any) -> fx.Node:
        """Return the node of a tensor, made now if it was not needed before."""
        if isinstance(entry, fx.Node):
            return entry
        if isinstance(entry, _Part):
            node = entry.node
            for key in entry.path:
                node = self.create("call_function", operator.getitem, (node, key), {}, self.lines[node.name])
            return node
        if isinstance(entry, _Changed):
            before = self._made(tensor, entry.before)
            return self.create("call_function", _touched, (before, entry.by), {}, self.lines[entry.by.name])
        if id(tensor) in self.attributes:
            return self.create("get_attr", self.attributes[id(tensor)], (), {}, _line())
        if isinstance(tensor, nn.Parameter):
            self.refuse(
                f"{_line()} uses a parameter of {list(tensor.shape)} that no module of the network holds. "
                "Functions that are stored in a model keep the layers of the original: call attributes of modules."
            )
        self.held.append(tensor)
        return self.create("call_function", _Constant(tensor), (), {}, _line())


def _symbol(value: int) -> Any:
    return value.node() if isinstance(value, _Size) else value


class _Calls(TorchFunctionMode):
    """Hands every call of torch to a recorder."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.recorder.called(func, tuple(args), dict(kwargs or {}))


def _is_leaf(module: nn.Module) -> bool:
    """Say whether torch.fx would take ``module`` as one operation."""
    home = type(module).__module__
    return home.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, (nn.Sequential, nn.ModuleList))


def _spelled(function: Any, name: str, args: Any) -> tuple[str, Any, Any]:
    """Return a call in the words of a trace: operators as such, methods by name."""
    if name in _OPERATORS and getattr(torch.Tensor, name, None) is not None and function is not torch.pow:
        return "call_function", _OPERATORS[name], args[::-1] if name.startswith("__r") else args
    if getattr(torch.Tensor, name, None) is function:
        return "call_method", name, args
    return "call_function", function, args


def _attribute(function: Any) -> str:
    return str(getattr(getattr(function, "__self__", None), "__name__", ""))


def _line() -> str:
    """Return the line of the model's source that is running, in words."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == _OWN or frame.f_code.co_filename.startswith((_TORCH, *_GENERATED)):
        if frame.f_code is _Recorder.run.__code__ or frame.f_back is None:
            return "a layer of the model itself"
        frame = frame.f_back
    owner = frame.f_locals.get("self")
    whose = f" of {type(owner).__name__}" if isinstance(owner, nn.Module) else ""
    return f"line {frame.f_lineno} of {frame.f_code.co_name}{whose} in {Path(frame.f_code.co_filename).name}"


def _tensors_in(value: Any) -> list[torch.Tensor]:
    return [one for _, one in _paths(value)]


def _contains_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_contains_size(one) for one in value)
    return _contains_size(list(value.values())) if isinstance(value, dict) else isinstance(value, _Size)


def _paths(value: Any) -> list[tuple[tuple[Any, ...], torch.Tensor]]:
    """Return every tensor of nested tuples, lists and dictionaries, and how to get at it."""
    if isinstance(value, torch.Tensor):
        return [((), value)]
    items: Collection[tuple[Any, Any]] = ()
    if isinstance(value, (tuple, list)):
        items = list(enumerate(value))
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, slice):
        items = list(enumerate((value.start, value.stop, value.step)))
    return [((key, *path), one) for key, item in items for path, one in _paths(item)]


def _versions(value: Any) -> list[tuple[torch.Tensor, int]]:
    return [(one, _version(one)) for one in _tensors_in(value)]


def _version(tensor: torch.Tensor) -> int:
    """Return how often the memory of ``tensor`` was written to, as far as that is counted."""
    return -1 if tensor.is_inference() else tensor._version


def _writes(node: fx.Node) -> bool:
    """Say whether a call looks as if it wrote over its argument."""
    return _named(node).rstrip("0123456789").endswith("_") or bool(node.kwargs.get("inplace"))


def _memory(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):  # sparse ones have none
        return id(tensor)
