"""Which values of a traced graph nobody writes to once they exist, so that they may be read later."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn
from torch.nn.modules import module as hooks

from pyprune import operations

FRESH, SAME, WRITES, UNKNOWN = "fresh", "same", "writes", "unknown"
"""What a call makes of its inputs: a new tensor; maybe one of them, or a view; one of them, changed; who knows."""

_FRESH_MODULES = frozenset(
    {*operations.CONVOLUTIONS, *operations.TRANSPOSED, *operations.ACTIVATIONS, nn.RReLU, nn.Softmax, nn.LogSoftmax}
    | {nn.Linear, *operations.NORMS, *operations.GROUP_NORMS, *operations.MIXING_NORMS}
)
_SAME_MODULES = frozenset(
    {*operations.DROPOUTS, *operations.MAX_POOLS, *operations.AVG_POOLS, *operations.ADAPTIVE_AVG_POOLS}
    | {*operations.LP_POOLS, *operations.PADS, *operations.UPSAMPLES}
    | {nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle}
)

# Functions and methods by their plain names: F.relu, torch.relu and x.relu() are one; x.relu_() is named apart.
_FRESH_NAMES = frozenset(
    {label.rpartition(".")[2] for label in operations.ACTIVATION_FUNCTIONS.values()}
    | {"prelu", "rrelu", "clip", "softmax", "log_softmax", "batch_norm", "instance_norm", "group_norm", "layer_norm"}
    | {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul"}
    | {"add", "sub", "mul", "truediv", "div", "neg", "pow", "exp", "sqrt", "mean", "sum", "amax", "max", "min"}
    | {"maximum", "minimum", "size", "dim", "cat", "concat", "concatenate", "stack"}
)
_SAME_NAMES = frozenset(
    {label.rpartition(".")[2] for label in operations.DROPOUT_FUNCTIONS.values()}
    | {label.rpartition(".")[2] for label in operations.MAX_POOL_FUNCTIONS.values()}
    | {label.rpartition(".")[2] for label in operations.AVG_POOL_FUNCTIONS.values()}
    | {label.rpartition(".")[2] for label in operations.ADAPTIVE_AVG_POOL_FUNCTIONS.values()}
    | {"interpolate", "pad", "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "expand"}
    | {"contiguous", "clone", "detach", "getitem", "getattr", "chunk", "split", "narrow", "unbind", "t"}
    | {"index_select", "stochastic_depth", "float", "half", "to", "channel_shuffle", "pixel_shuffle"}
)
_WRITE_NAMES = frozenset({"iadd", "isub", "imul", "itruediv"})
_FLAGGED_NAMES = frozenset(
    {label.rpartition(".")[2] for label in operations.ACTIVATION_FUNCTIONS.values()}
    | {label.rpartition(".")[2] for label in operations.DROPOUT_FUNCTIONS.values()}
    | {"prelu", "rrelu"}
)
"""Those that take ``inplace=True``."""


def lasting(model: nn.Module, traced: fx.Graph, names: Iterable[str]) -> set[str]:
    """Return those of the nodes in ``names`` whose values last: nothing later writes to them, and nobody gets them.

    Two values that may share memory are one class: a view and its base, the result of an in-place operation and what
    it changed, and everything that an unknown operation touches. A value lasts if no operation after it writes to its
    class and the class holds neither an input nor an output of the graph, which belong to the caller. Modules with
    hooks are unknown operations, since hooks may do anything.
    """
    order, kinds, classes, writes = _follow(model, traced)
    last = {
        found: max(len(order) if node.op in _OUTSIDE else order[node] for node in nodes)
        for found, nodes in writes.items()
    }
    wanted = set(names)
    return {
        node.name for node in traced.nodes
        if node.name in wanted and kinds[node] != UNKNOWN and last.get(classes.find(node), -1) <= order[node]
    }  # fmt: skip


def written_later(model: nn.Module, traced: fx.Graph) -> set[str]:
    """Return the nodes whose memory a later operation writes to, or may, as an unknown one that reads it."""
    order, _, classes, writes = _follow(model, traced)
    last = {
        found: max((order[node] for node in nodes if node.op not in _OUTSIDE), default=-1)
        for found, nodes in writes.items()
    }
    return {node.name for node in traced.nodes if last.get(classes.find(node), -1) > order[node]}


def overwritten(model: nn.Module, traced: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each operation that writes to what it reads, the values before it that may lie in that memory."""
    order, kinds, classes, _ = _follow(model, traced)
    before: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    found = {}
    for node in order:
        alike = before[classes.find(node)]
        if kinds[node] == WRITES:
            found[node] = list(alike)
        alike.append(node)
    return found


_OUTSIDE = ("placeholder", "get_attr", "output")  # what belongs to the caller, who may do anything


def _follow(
    model: nn.Module, traced: fx.Graph
) -> tuple[dict[fx.Node, int], dict[fx.Node, str], _Classes, dict[fx.Node, list[fx.Node]]]:
    """Return the place and kind of each node, which nodes may share memory, and those that write to each class."""
    modules = dict(model.named_modules(remove_duplicate=False))
    classes, writes = _Classes(), defaultdict(list)
    order = {node: i for i, node in enumerate(traced.nodes)}
    kinds = {node: _kind(node, modules) for node in traced.nodes}
    for node, kind in kinds.items():
        for used in _shared(node, kind):
            classes.join(node, used)
    for node, kind in kinds.items():
        if kind in (WRITES, UNKNOWN):
            writes[classes.find(node)].append(node)
    return order, kinds, classes, writes


class _Classes:
    """Nodes whose values may share memory (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}

    def find(self, node: fx.Node) -> fx.Node:
        while (parent := self._parent.get(node, node)) is not node:
            self._parent[node] = self._parent.get(parent, parent)
            node = parent
        return node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        self._parent[self.find(a)] = self.find(b)


def _shared(node: fx.Node, kind: str) -> list[fx.Node]:
    """Return the inputs of ``node`` with which its value may share memory."""
    if kind == FRESH:
        return []
    if kind == WRITES:
        return [used for used in node.args[:1] if isinstance(used, fx.Node)]
    return node.all_input_nodes


def _kind(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    if node.op == "call_module":
        return _module_kind(modules[str(node.target)])
    if node.op in ("call_function", "call_method"):
        return _function_kind(node)
    return UNKNOWN  # inputs, outputs and parameters belong to others


def _module_kind(module: nn.Module) -> str:
    # Exact types: a subclass may do anything.
    if type(module) not in _FRESH_MODULES | _SAME_MODULES or _hooked(module):
        return UNKNOWN
    if getattr(module, "inplace", False):
        return WRITES
    return FRESH if type(module) in _FRESH_MODULES else SAME


def _hooked(module: nn.Module) -> bool:
    own = (module._forward_hooks, module._forward_pre_hooks, module.__dict__.get("forward"))
    return any(own) or bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def _function_kind(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    known = _FRESH_NAMES | _SAME_NAMES
    if "out" in node.kwargs or not node.args or not _is_torchs(node.target):
        return UNKNOWN
    if name in _WRITE_NAMES or (name.endswith("_") and name.removesuffix("_") in known):
        return WRITES
    if name not in known:
        return UNKNOWN
    # Which argument says so differs from function to function; taking another flag for it does no harm.
    if name in _FLAGGED_NAMES and any(value is True for value in itertools.chain(node.args, node.kwargs.values())):
        return WRITES
    return FRESH if name in _FRESH_NAMES else SAME


def _is_torchs(target: Any) -> bool:
    """Say whether a function or method is one of Python's or torch's own, not somebody's of the same name."""
    home = "torch" if isinstance(target, str) else str(getattr(target, "__module__", None) or "torch")
    return home.partition(".")[0] in ("torch", "torchvision", "_operator", "builtins", "math")
