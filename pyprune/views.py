"""Views: operations that move the entries of a tensor about and compute nothing, such as a channel shuffle.

None of them is understood by its name. Each is run on a tensor of places, whole numbers that say where every entry
came from, and what it does to the channels is read off the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from pyprune import operations as ops
from pyprune.types import IntArray


@dataclass(frozen=True, eq=False)
class Places:
    """Where the entries of a tensor lay in a tensor of ``shape`` before it, whose channels are along ``dim``."""

    entries: torch.Tensor  # int64, of the shape of the tensor: flat indices
    shape: tuple[int, ...]
    dim: int = 1

    def channels(self) -> torch.Tensor:
        """Return, for each entry, the channel that it belonged to."""
        return (self.entries // math.prod(self.shape[self.dim + 1 :])) % self.shape[self.dim]

    def permuted(self) -> IntArray | None:
        """Return which channels the tensor has, in order; ``None`` if anything but the channels was moved."""
        ndim = len(self.shape)
        if self.entries.ndim != ndim or 0 in self.entries.shape:
            return None
        taken = self.channels().movedim(self.dim, 0).reshape(self.entries.shape[self.dim], -1)[:, 0]
        wanted = start(self.shape, self.dim).entries.index_select(self.dim, taken)
        return taken.numpy() if torch.equal(wanted, self.entries) else None


def start(shape: Sequence[int], dim: int = 1) -> Places:
    """Return the places in a tensor of ``shape`` that nothing has moved yet."""
    return Places(torch.arange(math.prod(shape)).reshape(tuple(shape)), tuple(shape), dim)


def moved(
    node: fx.Node, places: Places, modules: Mapping[str, nn.Module], known: Callable[[fx.Node], Any]
) -> Places | None:
    """Run a view on places; ``known`` gives the numbers that it reads, or tensors of the shape that it reads.

    ``None`` if one of them is not known, or the view does not fit.
    """
    source = node.args[0] if node.args else node.kwargs.get("input")

    def value(one: fx.Node) -> Any:
        found = places.entries if one is source else known(one)
        if found is None:
            raise LookupError
        return found

    try:
        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        if node.op == "call_module":
            entries = modules[str(node.target)](places.entries)
        elif isinstance(node.target, str):
            name = "reshape" if node.target == "view" else node.target  # the memory format is not the network's
            entries = getattr(args[0], name)(*args[1:], **kwargs)
        else:
            function: Any = node.target
            entries = function(*args, **kwargs)
    except (LookupError, TypeError, ValueError, RuntimeError):
        return None
    return Places(entries, places.shape, places.dim)


def along_one_dimension(codes: torch.Tensor) -> tuple[int, IntArray] | None:
    """Return the dimension behind the batch that alone decides the codes, and the code at each of its entries."""
    if 0 in codes.shape:
        return None
    for dim in range(1, codes.ndim):
        rows = codes.movedim(dim, 0).reshape(codes.shape[dim], -1)
        if bool((rows == rows[:, :1]).all()):
            return dim, rows[:, 0].numpy()
    return None


def is_view(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Say whether ``node`` only moves entries about."""
    if node.op == "call_module":
        return type(modules[str(node.target)]) in ops.MOVE_MODULES
    return node.target in (ops.MOVE_METHODS if node.op == "call_method" else ops.MOVE_FUNCTIONS)


@dataclass(frozen=True)
class Sizes:
    """The sizes that a view is given, as it is written, and the dimension of its result that the first stands for."""

    sizes: tuple[Any, ...]
    first: int = 0


def sizes(node: fx.Node, modules: Mapping[str, nn.Module], ndim: int) -> Sizes | None:
    """Return the sizes that ``node`` is given for a result of ``ndim`` dimensions; ``None`` if it needs none."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if not isinstance(module, nn.Unflatten):
            return None
        return _unflattened(module.dim, module.unflattened_size, ndim)
    title = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if title in ("view", "reshape", "expand"):
        given: Any = node.args[1:] if node.op == "call_method" else (ops.argument(node, 1, "shape"),)
        given = given or tuple(node.kwargs.values())
        return Sizes(tuple(given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given))
    if title == "unflatten":
        return _unflattened(ops.argument(node, 1, "dim"), ops.argument(node, 2, "sizes"), ndim)
    return None


def _unflattened(dim: Any, given: Any, ndim: int) -> Sizes | None:
    if not isinstance(dim, int) or not isinstance(given, (tuple, list)):
        return None
    return Sizes(tuple(given), dim % (ndim - len(given) + 1))


def resized(node: fx.Node, given: Sizes, new: Sequence[Any]) -> None:
    """Write ``node`` anew with other sizes."""
    title = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    source = node.all_input_nodes[0]
    if node.op == "call_module" or title == "unflatten":
        node.op, node.target, node.args = "call_method", "unflatten", (source, given.first, tuple(new))
    elif node.op == "call_method":
        node.args = (source, *new)
    else:
        node.args = (source, tuple(new))
    node.kwargs = {}


def combined(slots: IntArray, constants: Any) -> tuple[IntArray, IntArray]:
    """Return one code for each pair of slot and constant, and the first entry that has each code."""
    pairs = np.stack([slots.astype(np.int64), np.asarray(constants, np.float64).view(np.int64)])
    _, first, codes = np.unique(pairs, axis=1, return_index=True, return_inverse=True)
    return codes.reshape(-1), first


def squeezed(node: fx.Node, channels: int, ndim: int) -> tuple[int, ...] | None:
    """Return the dimensions that a squeeze looks at, without that of the channels; ``None`` if it leaves those alone.

    Where a slim network has a single channel left, squeezing must not drop that dimension too.
    """
    title = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if title != "squeeze":
        return None
    given = ops.argument(node, 1, "dim")
    listed = range(ndim) if given is None else [given] if isinstance(given, int) else given
    dims = [dim % ndim for dim in listed]
    return tuple(dim for dim in dims if dim != channels) if channels in dims else None
