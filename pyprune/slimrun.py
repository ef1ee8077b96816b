"""A slim network followed without computing: whether its operations fit together, and what they would hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from pyprune import operations as ops
from pyprune.slimcalls import MAX_PARTS

MAX_NUMBERS = 1 << 26
"""Of one tensor of a forward pass on the recorded inputs, 256 MB in float32; larger inputs may make larger tensors."""
MAX_GROWTH = 1 << 10
"""How many times the numbers of the inputs one tensor may have, where that is more."""
MAX_TOTAL = 64
"""How many times as many all tensors of a forward pass together may have as one."""
MAX_INPUT = 1 << 30
_SIDES = {3: 512, 4: 64, 5: 16}
"""Of larger inputs, by their dimensions: attention over 4096 places makes 2^24 numbers a head."""

Shapes = Sequence[tuple[list[int], torch.dtype]]


class _TooLargeError(Exception):
    """What a forward pass would hold."""


class _Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses every tensor, also inside of an operation, of more numbers than the limit; keeps the largest."""

    def __init__(self, limit: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit, self.largest, self.total = limit, 0, 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
                self.total += one.numel()
        if self.largest > self.limit or self.total > MAX_TOTAL * self.limit:
            raise _TooLargeError(f"tensors of {max(self.largest, self.total)} numbers")
        return result


class _Followed(fx.Interpreter):
    """Runs a network without memory; with ``partly`` what fails is unknown, and so is all that follows from it."""

    def __init__(self, model: fx.GraphModule, partly: bool) -> None:
        super().__init__(model, garbage_collect_values=False)
        self.partly = partly
        self.unknown: set[fx.Node] = set()
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        if not self.unknown.isdisjoint(n.all_input_nodes):
            self.unknown.add(n)
            return None
        try:
            self._check(n, [self.env[one] if isinstance(one, fx.Node) else one for one in n.args])
            return super().run_node(n)
        except _TooLargeError:
            raise
        except Exception as error:
            if not self.partly:
                raise _MisfitError(f"{n.name}: {_first_line(error)}") from None
            self.unknown.add(n)
            return None

    def _check(self, node: fx.Node, args: list[Any]) -> None:
        """Refuse a split into more parts than anyone can want, and an addition by an index of another length."""
        if node.target in (torch.split, "split") and type(args[1]) is int:
            size = args[0].shape[ops.argument(node, 2, "dim", 0)]
            if size > args[1] * MAX_PARTS:
                raise _TooLargeError(f"{size} numbers split into parts of {args[1]}")
        if node.target is torch.index_add:
            base, dim, index, branch = args
            name = str(getattr(node.args[2], "target", ""))
            if branch.shape[dim] != len(index):
                raise _MisfitError(f"{name!r} must have one entry a channel of its branch; it has {len(index)}")
            if [*base.shape[:dim], len(index), *base.shape[dim + 1 :]] != [*branch.shape]:
                raise _MisfitError(f"{name!r} adds {list(branch.shape)} to {list(base.shape)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _MisfitError(Exception):
    """Which operation cannot take what it is given, and why."""


def follow(who: str, model: fx.GraphModule, recorded: Shapes) -> Mapping[fx.Node, Any]:
    """Return what every node of ``model`` yields, as tensors without memory; what cannot be followed is left out.

    Parameters
    ----------
    model
        In eval mode, on the meta device.
    recorded
        Shapes and types of inputs on which the network must run; where there are none, the first layers tell.

    Raises
    ------
    ValueError
        If an operation cannot take what it gets, or a forward pass would hold impossibly much: on these inputs, or
        on larger ones more than their size explains.
    """
    credible = sum(math.prod(shape) for shape, _ in recorded) <= MAX_INPUT
    shapes = list(recorded) if recorded and credible else _guessed(model)
    if not shapes:
        raise ValueError(f"{who}: the slim folder does not say what its inputs are, and its layers do not tell.")
    guessed = shapes != list(recorded)
    if len(shapes) > sum(node.op == "placeholder" for node in model.graph.nodes):
        raise ValueError(f"{who}: the slim folder records {len(shapes)} inputs; its network takes fewer.")
    numbers = max(math.prod(shape) for shape, _ in shapes)
    found, largest = _run(who, model, shapes, max(MAX_NUMBERS, MAX_GROWTH * numbers), partly=guessed)
    larger = [
        ([*shape[:2], *(max(2 * size, _SIDES.get(len(shape), 0)) for size in shape[2:])], dtype)
        for shape, dtype in shapes
    ]
    growth = max(math.prod(shape) for shape, _ in larger) / numbers
    if growth > 1:  # numbers may grow as the inputs do; where those double, as their square
        _run(who, model, larger, max(4 * MAX_NUMBERS, 8 * growth * largest), partly=True)
    odd = [node.name for node in model.graph.nodes if guessed and node not in found and _enlarges(model, node)]
    if odd:
        raise ValueError(
            f"{who}: the slim folder does not say what its inputs are, and what {odd[0]} makes of them is unknown."
        )
    return found


def _run(
    who: str, model: fx.GraphModule, shapes: Shapes, limit: float, *, partly: bool
) -> tuple[dict[fx.Node, Any], int]:
    followed = _Followed(model, partly)
    try:
        inputs = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes]
        with torch.no_grad(), _Sizes(limit) as sizes:
            followed.run(*inputs, enable_io_processing=False)
    except _TooLargeError as error:
        listed = ", ".join(str(shape) for shape, _ in shapes)
        raise ValueError(f"{who}: on inputs of {listed} the network would make {error}; that is refused.") from None
    except Exception as error:
        listed = ", ".join(str(shape) for shape, _ in shapes)
        raise ValueError(
            f"{who}: the operations do not fit together on inputs of {listed} ({_first_line(error)})."
        ) from None
    return {node: value for node, value in followed.env.items() if node not in followed.unknown}, sizes.largest


def _guessed(model: fx.GraphModule) -> list[tuple[list[int], torch.dtype]]:
    """Return one image for each input, of the channels and dimensions of the layer that it goes to."""
    found = []
    for node in model.graph.nodes:
        if node.op != "placeholder":
            continue
        layer = _first_layer(model, node)
        if layer is None:
            return []
        dtype = layer.weight.dtype
        if hasattr(layer, "in_features"):
            found.append(([1, layer.in_features], dtype))
        else:
            found.append(([1, layer.in_channels, *[32] * len(layer.kernel_size)], dtype))
    return found


def _first_layer(model: fx.GraphModule, source: fx.Node) -> Any:
    """Return the first convolution or linear layer that is reached from ``source`` in the order of the nodes."""
    reached = {source}
    for node in model.graph.nodes:
        if reached.isdisjoint(node.all_input_nodes):
            continue
        reached.add(node)
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            if hasattr(module, "in_channels") or hasattr(module, "in_features"):
                return module
    return None


_KEEPING: frozenset[Any] = frozenset({
    *ops.ACTIVATION_FUNCTIONS, *ops.DROPOUT_FUNCTIONS, *ops.MEAN_FUNCTIONS, *ops.VIEW_FUNCTIONS, getattr,
    *ops.ACTIVATION_METHODS, *ops.RESHAPE_METHODS, "flatten", "mean", "size", "dim", "contiguous",
})  # fmt: skip


def _enlarges(model: fx.GraphModule, node: fx.Node) -> bool:
    """Say whether a node could make more numbers than it is given."""
    if node.op == "call_module":
        kind = type(model.get_submodule(str(node.target)))
        return kind in ops.UPSAMPLES | ops.PADS | ops.TRANSPOSED | ops.CONVOLUTIONS
    return node.op not in ("get_attr", "output") and node.target not in _KEEPING
