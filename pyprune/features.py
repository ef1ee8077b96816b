"""Where a convolution's feature maps are read: its tap in the traced graph."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from pyprune import graph, operations
from pyprune.hints import did_you_mean

TAPS = ("activation", "norm", "hrank")
"""What ``taps`` may say."""

Layers = Sequence[str] | Mapping[str, str] | None
"""Convolutions: all (``None``), some by name, or by name with the module whose output is the map."""

_NORMS = (*operations.NORMS, nn.SyncBatchNorm, nn.GroupNorm)
_ACTIVATIONS = (*operations.ACTIVATIONS, nn.RReLU)
_SAME = tuple(operations.DROPOUTS)

# Functions and methods go by name, without the underscore of in-place forms: F.relu, torch.relu_ and x.relu() are one.
# Reading a map asks less of an operation than removing channels does, so more of them are known here.
_NORM_NAMES = frozenset({"batch_norm", "instance_norm", "group_norm"})
_ACTIVATION_NAMES = frozenset(
    {label.rpartition(".")[2] for label in operations.ACTIVATION_FUNCTIONS.values()}
    | {"prelu", "rrelu", "clamp_min", "clamp_max", "clip"}
)
_SAME_NAMES = frozenset(
    {label.rpartition(".")[2] for label in operations.DROPOUT_FUNCTIONS.values()}
    | operations.SAME_METHODS
    | {"detach", "stochastic_depth"}
)
_ADD_NAMES = frozenset({"add", "iadd"})
_PAIR_NAMES = _ADD_NAMES | {"mul", "imul", "sub", "isub"}  # joins, where both are tensors
_LIST_NAMES = frozenset({"cat", "concat", "concatenate", "stack"})
_POOLS = (nn.MaxPool2d, nn.AvgPool2d)
_POOL_NAMES = frozenset({"max_pool2d", "avg_pool2d"})


@dataclass(frozen=True)
class Tap:
    """Where the maps of one convolution are read.

    ``node`` is the name of a node of the traced graph, or of a module where taps were named by hand. ``note`` says
    why the map is not read at the layer's first activation, and is empty where it is.
    """

    layer: str
    node: str
    note: str = ""


def find_taps(
    model: nn.Module, layers: Layers = None, taps: str = "activation", *, traced: fx.Graph | None = None
) -> dict[str, Tap]:
    """Find where the feature maps of each 2-d convolution are read.

    With ``taps="activation"`` that is the first activation on the convolution's single-consumer path, through norms
    and dropout and, where the convolution has no activation of its own, through a residual addition: the second
    convolution of a basic block is read after the addition, as HRank reads it. Where the path forks or meets anything
    else before an activation, the output of the last norm passed is read, or the convolution's own, and the tap's note
    says so. ``taps="norm"`` reads there in every layer.

    ``taps="hrank"`` reads where HRank's published code does: behind that activation, and behind the pool where nothing
    but a pool consumes it and convolutions follow. In a chain the last convolution is not read: it gets the tap, and so
    the ranks, of the one before, if they have equally many filters. Networks with other joins than additions are
    read as with ``"activation"``. The notes say where either was done.

    Parameters
    ----------
    model
        The network. It is traced by torch.fx, unless ``layers`` is a mapping.
    layers
        ``None``: every 2-d convolution that one forward pass calls exactly once; the others are left out. A sequence
        of names: those. A mapping from the name of a convolution to the name of a module: the module's output is
        the map, no graph is needed, and the model need not be traceable.
    taps
        ``"activation"``, ``"norm"`` or ``"hrank"``.
    traced
        The graph of ``model``, if at hand.

    Returns
    -------
    dict
        A :class:`Tap` for each convolution, in order of definition (or of ``layers``).

    Raises
    ------
    ValueError
        If ``taps`` is unknown, a name is unknown or doubled or no 2-d convolution, a convolution asked for by name
        is called more than once or never, the model cannot be traced, or there is nothing to read.
    TypeError
        If ``layers`` is one string.
    """
    if taps not in TAPS:
        raise ValueError(f"find_taps: taps must be one of {', '.join(map(repr, TAPS))}; got {taps!r}.")
    if isinstance(layers, Mapping):
        return _named_by_hand(model, layers)
    names = _check_layers(model, layers)
    traced = graph.trace(model, "find_taps") if traced is None else traced
    calls = convolution_calls(model, traced)
    modules = dict(model.named_modules())
    joins = _joins(traced)
    previous = _before_the_last(calls) if taps == "hrank" and not joins else {}
    found: dict[str, Tap] = {}
    for name in names:
        nodes = calls[name]
        if len(nodes) == 1:
            node, note = _read_at(nodes[0], modules, taps)
            if taps == "hrank":
                node, note = _as_hrank(node, note, nodes[0], previous, joins, modules)
            found[name] = Tap(name, node.name, note)
        elif layers is not None:
            raise ValueError(
                f"find_taps: {name!r} {why_left_out(nodes)}, so it has no one map. Leave it out of layers."
            )
    if not found:
        raise ValueError("find_taps: the model has no 2-d convolution that one forward pass calls exactly once.")
    return found


def convolution_calls(model: nn.Module, traced: fx.Graph) -> dict[str, list[fx.Node]]:
    """Return, for each 2-d convolution of ``model``, the nodes of ``traced`` that call it."""
    calls: dict[str, list[fx.Node]] = {name: [] for name in _convolutions_2d(model)}
    for node in traced.nodes:
        if node.op == "call_module" and node.target in calls:
            calls[str(node.target)].append(node)
    return calls


def why_left_out(nodes: Sequence[fx.Node]) -> str:
    """Say why a convolution with these calls has no tap."""
    return f"is called {len(nodes)} times in one forward pass" if nodes else "is never called by the model's forward"


def _convolutions_2d(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: layer for name, layer in graph.convolutions(model).items() if isinstance(layer, nn.Conv2d)}


def _check_layers(model: nn.Module, layers: Sequence[str] | None) -> list[str]:
    """Return the names asked for after checking that each is a 2-d convolution of ``model``, named once."""
    if layers is None:
        return list(_convolutions_2d(model))
    if isinstance(layers, str):
        raise TypeError(f"find_taps: layers must be a sequence of names; got one string. Pass [{layers!r}].")
    every = graph.convolutions(model)
    for name in layers:
        graph.check_layer("find_taps", name, every)
        if not isinstance(every[name], nn.Conv2d):
            raise ValueError(
                f"find_taps: ranks need the maps of 2-d convolutions; {name!r} is a {type(every[name]).__name__}. "
                "Leave it out of layers."
            )
    if len(set(layers)) != len(layers):
        raise ValueError(f"find_taps: layers names a convolution twice: {', '.join(layers)}.")
    return list(layers)


def _named_by_hand(model: nn.Module, layers: Mapping[str, str]) -> dict[str, Tap]:
    """Return the taps of a mapping from convolutions to modules, after checking both."""
    _check_layers(model, list(layers))
    modules = [name for name, _ in model.named_modules() if name]
    for layer, module in layers.items():
        if module not in modules:
            hint = did_you_mean(module, modules)
            raise ValueError(f"find_taps: the tap of {layer!r} must be a module of the model; got {module!r}.{hint}")
    if not layers:
        raise ValueError("find_taps: layers names no convolution.")
    return {layer: Tap(layer, module, "named by hand") for layer, module in layers.items()}


def _read_at(convolution: fx.Node, modules: Mapping[str, nn.Module], taps: str) -> tuple[fx.Node, str]:
    """Return the node to read for ``convolution``, and why it is not the one that ``taps`` asks for, if it is not."""
    path, end = _follow(convolution, modules)
    if taps != "norm" and path and path[-1][1] == "activation":
        return path[-1][0], ""
    own = list(itertools.takewhile(lambda step: step[1] in ("norm", "same"), path))
    norms = [node for node, kind in own if kind == "norm"]
    place = "its norm's output" if norms else "its own output"
    if taps != "norm":
        return (norms or [convolution])[-1], f"read at {place}: the path {end} before an activation"
    return (norms or [convolution])[-1], "" if norms else f"read at {place}: it has no norm of its own"


def _joins(traced: fx.Graph) -> set[str]:
    """Return how ``traced`` joins branches: "add", "cat" and so on; nothing for a chain."""
    functions = [node for node in traced.nodes if node.op in ("call_function", "call_method")]
    pairs = {_operation(node.target) for node in functions if len(node.all_input_nodes) > 1} & _PAIR_NAMES
    return pairs | {_operation(node.target) for node in functions} & _LIST_NAMES


def _before_the_last(calls: Mapping[str, Sequence[fx.Node]]) -> dict[fx.Node, fx.Node]:
    """Return the last convolution of a chain with the one before, or nothing if the chain is too short."""
    in_order = sorted(node for nodes in calls.values() for node in nodes)  # nodes compare by their place in the graph
    return {in_order[-1]: in_order[-2]} if len(in_order) > 1 else {}


def _as_hrank(
    node: fx.Node, note: str, convolution: fx.Node, previous: Mapping[fx.Node, fx.Node], joins: set[str],
    modules: Mapping[str, nn.Module],
) -> tuple[fx.Node, str]:  # fmt: skip
    """Return where HRank reads ``convolution``, given its activation's ``node`` and what that lacks."""
    if note or joins - _ADD_NAMES:
        return node, note or "read at its activation: HRank's places are known for chains and residual networks only"
    if convolution in previous:
        other = previous[convolution]
        filters = [modules[str(call.target)].out_channels for call in (convolution, other)]
        if filters[0] == filters[1]:
            there, _ = _as_hrank(*_read_at(other, modules, "hrank"), other, {}, joins, modules)
            return there, f"HRank does not read a chain's last convolution: it gets the ranks of {other.target}"
        return node, f"HRank would copy the ranks of {other.target}, which has {filters[1]} filters; read for itself"
    at = node
    while len(at.users) == 1:
        at = next(iter(at.users))
        if _is_pool(at, modules) and _leads_to_convolution(at, modules):
            return at, ""
        if _kind(at, at.all_input_nodes[0], modules) != "same":
            break
    return node, ""


def _is_pool(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _POOLS)
    return node.op == "call_function" and _operation(node.target) in _POOL_NAMES


def _leads_to_convolution(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Say whether a 2-d convolution comes after ``node``: a global pool before the classifier is no place to read."""
    seen, left = {node}, [node]
    while left:
        for user in left.pop().users:
            if user.op == "call_module" and isinstance(modules[str(user.target)], nn.Conv2d):
                return True
            if user not in seen:
                seen.add(user)
                left.append(user)
    return False


def _follow(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[list[tuple[fx.Node, str]], str]:
    """Follow the single-consumer path from ``node`` up to its first activation, that included.

    Returns the nodes passed, each with its kind (see :func:`_kind`), and how the path ends.
    """
    path: list[tuple[fx.Node, str]] = []
    while True:
        if len(node.users) != 1:
            return path, f"forks after {node.name}" if node.users else f"ends at {node.name}"
        user = next(iter(node.users))
        kind = _kind(user, node, modules)
        if not kind:
            return path, f"meets {user.name}"
        path.append((user, kind))
        if kind == "activation":
            return path, f"reaches {user.name}"
        node = user


def _kind(user: fx.Node, node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """Return what ``user`` does with ``node``: "activation", "norm", "same", "add", or "" for anything else."""
    if user.op == "call_module":
        return _module_kind(modules[str(user.target)])
    if user.op not in ("call_function", "call_method"):
        return ""
    name = _operation(user.target)
    if name in _ADD_NAMES:
        return "add" if len(user.all_input_nodes) == 2 else ""
    if operations.argument(user, 0, "input") is not node:
        return ""
    kinds = {"activation": _ACTIVATION_NAMES, "norm": _NORM_NAMES, "same": _SAME_NAMES}
    return next((kind for kind, names in kinds.items() if name in names), "")


def _module_kind(module: nn.Module) -> str:
    kinds: dict[str, tuple[Any, ...]] = {"activation": _ACTIVATIONS, "norm": _NORMS, "same": _SAME}
    return next((kind for kind, types in kinds.items() if isinstance(module, types)), "")


def _operation(target: Any) -> str:
    """Return the plain name of a function or method: "relu" for F.relu, torch.relu_ and x.relu()."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return str(name).rstrip("_")
