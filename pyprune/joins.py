"""What the walk over channels does where tensors meet or are cut: sums, products, concatenations, splits, slices, pads.

:mod:`pyprune.channels` loads this module, so every walk has these handlers.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from pyprune import operations as ops
from pyprune.channels import (
    Count,
    Found,
    Pad,
    Parts,
    Reading,
    Slice,
    Split,
    Sum,
    Value,
    Weights,
    _activation_function,
    _counted,
    _handles,
    _in_place,
    _input,
    _name,
    _title,
    _view,
    _Walk,
    _written,
)
from pyprune.types import FloatArray, IntArray


@_handles("call_function", operator.getitem, anywhere=True)
def _item(walk: _Walk, node: fx.Node) -> Found:
    value, index = walk.values.get(_input(node)), node.args[1]
    if isinstance(value, Value):
        ndim = len(walk.shapes[_input(node)])
        if len(node.all_input_nodes) == 1 and ops.leaves_channels(node, ndim, value.dim):
            return _view(walk, node)
        return _slice(walk, node, value)
    if not isinstance(value, (Reading, Parts)) or not isinstance(index, (int, slice)) or len(node.all_input_nodes) > 1:
        return walk.pin_reads(node, "feeds an indexing, which pyprune does not know")
    if isinstance(value, Parts):
        return value.parts[index] if isinstance(index, int) else Parts(value.parts[index])
    dims = value.dims[index]
    if isinstance(dims, int):
        return Count(value.value, node.name) if dims == value.value.dim else None
    return Reading(value.value, dims) if value.value.dim in dims else None


def _slice(walk: _Walk, node: fx.Node, value: Value) -> Value | None:
    """Slice space, as in x[:, :, ::2, ::2], and channels where the bounds are written out."""
    index = ops.whole_batch_index(node, len(walk.shapes[_input(node)]))
    if index is None or len(node.all_input_nodes) > 1 or value.dim != 1:
        return walk.pin_reads(node, "feeds an indexing, which pyprune does not know")
    taken = np.arange(len(value.slots))[index[1]]
    if node.name in walk.rewritten and index[1].step not in (None, 1):  # a view that may have to become a copy
        return walk.pin_reads(node, f"is overwritten while {node.name}, a view of it, is read")
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
    walk.pads[node.name] = Pad(before.slots, after.slots, len(walk.shapes[node]), node.name in walk.rewritten)
    parts = (before, value, after)
    return Value(np.concatenate([p.slots for p in parts]), np.concatenate([p.constants for p in parts]))


@_handles("call_function", *ops.ADD_FUNCTIONS, *ops.SUB_FUNCTIONS)
@_handles("call_method", *ops.ADD_METHODS, *ops.SUB_METHODS)
def _add(walk: _Walk, node: fx.Node) -> Found:
    """Add two tensors channel by channel; adding a number, or a tensor to itself, maps the constants."""
    sources = node.all_input_nodes
    if any(isinstance(walk.values.get(source), Count) for source in sources):
        return _counted(walk, node)
    if len(sources) == 1:
        return _alone(walk, node)
    shapes = {walk.shapes.get(source) for source in sources}
    plain = len(shapes) == 1 and len(sources) == len(node.args) == 2 and not node.kwargs
    if not plain or any(isinstance(walk.values.get(source), Weights) for source in sources):
        return _pair(walk, node)
    if not any(isinstance(walk.values.get(source), Value) for source in sources):
        return walk.pin_reads(node, f"reaches {node.name}, an addition that pyprune does not follow")
    sides = [walk.tensor(source) for source in sources]
    first, second = sides
    if first is None or second is None:
        return walk.pin_reads(node, f"reaches {node.name}, an addition whose other side pyprune does not follow")
    subtracts = node.target in ops.SUB_FUNCTIONS or node.target in ops.SUB_METHODS
    result = walk.make(node.name, first.constants + (-second.constants if subtracts else second.constants))
    walk.sums[node.name] = Sum((first.slots, second.slots), result.slots, len(walk.shapes[node]), subtracts)
    overwrites = _in_place(walk, node) and len(_input(node).users) > 1  # then it cannot be written anew
    for side in (first, second):
        if not walk.scatters or overwrites:
            walk.tie(side.slots, result.slots, f"reaches {node.name}", joins=True)
            continue
        walk.hold(side.slots, result.slots, f"reaches {node.name}")
        alive = np.isnan(side.constants)
        walk.hold(result.slots[alive], side.slots[alive], f"reaches {node.name}")
        carry = ~alive & (side.constants != 0)
        reason = f"carries a constant other than 0 into {node.name}"
        walk.hold(result.slots[carry], side.slots[carry], reason)
    return _written(walk, node, first, result)


@_handles("call_function", *ops.PRODUCT_FUNCTIONS)
@_handles("call_method", *ops.PRODUCT_METHODS)
def _product(walk: _Walk, node: fx.Node) -> Found:
    """Multiply, divide or compare two tensors channel by channel."""
    if any(isinstance(walk.values.get(source), Count) for source in node.all_input_nodes):
        return _counted(walk, node)
    return _alone(walk, node) if len(node.all_input_nodes) == 1 else _pair(walk, node)


def _alone(walk: _Walk, node: fx.Node) -> Found:
    """Combine a tensor with a number or with itself, or a number of channels with a number."""
    return None if walk.values.get(node.all_input_nodes[0]) is None else _activation_function(walk, node)


def _pair(walk: _Walk, node: fx.Node) -> Value | None:
    """Combine two tensors entry by entry, where one may be repeated along dimensions of size 1.

    The channels of both and of the result stay or leave together, except that what is repeated along the channels, or
    has none, only has to stay. Zero in either factor makes zero of the product, whatever the other is.
    """
    reason = f"feeds {_title(node, node.target)} together with another tensor"
    shape = walk.shapes.get(node)
    if len(node.args) != 2 or node.kwargs or not isinstance(shape, tuple) or len(shape) < 2:
        return walk.pin_reads(node, reason)
    sides = [_side(walk, arg, shape) for arg in node.args]
    first, second = sides
    if first is None or second is None or not any(isinstance(walk.values.get(a), Value) for a in node.all_input_nodes):
        return walk.pin_reads(node, reason)
    constants = _combined(node, first.constants, second.constants)
    known = ~np.isnan(first.constants) & ~np.isnan(second.constants) & ~np.isfinite(constants)
    for side in sides:
        if side is not None and side.value is not None:
            where = known if len(side.value.slots) == shape[1] else np.full(len(side.value.slots), known.any())
            walk.pin(side.value, f"becomes infinite or undefined at {node.name}", where)
    result = walk.make(node.name, constants)
    for one, other in ((first, second), (second, first)):
        if one.value is None:
            continue
        if len(one.value.slots) == shape[1]:
            # A gate with one entry a channel multiplies a stream; what a union removes is the stream's.
            walk.tie(one.value.slots, result.slots, f"reaches {node.name}", joins=not one.gates or other.gates)
        else:
            walk.hold(result.slots, np.repeat(one.value.slots, shape[1]), f"reaches {node.name}")
    for side in sides:
        if side is not None and side.weights:
            walk.slice_weights(side.weights, side.dim, result)
    own = walk.values.get(_input(node))
    return _written(walk, node, own, result) if isinstance(own, Value) else result


@dataclass(frozen=True, eq=False)
class _Side:
    """One operand: its channels if it has any, and its constants [C] as the result sees them."""

    value: Value | None
    constants: FloatArray
    gates: bool = True  # whether it is repeated over space
    weights: str = ""
    dim: int = 0


def _side(walk: _Walk, arg: Any, shape: Sequence[int]) -> _Side | None:
    """Return what an operand is to a result of that ``shape``; ``None`` if that is not known."""
    own = walk.shapes.get(arg) if isinstance(arg, fx.Node) else None
    if not isinstance(own, tuple):
        return None
    dim, unknown = len(own) - (len(shape) - 1), np.full(shape[1], np.nan)  # which of its dimensions meets channels
    value = walk.values.get(arg)
    if isinstance(value, Weights):
        constants = _entries(value.tensor, dim, shape[1])
        cut = dim >= 0 and own[dim] == shape[1] > 1
        return _Side(None, constants, weights=value.name if cut else "", dim=dim)
    if dim < 0 or own[dim] == 1 != shape[1]:
        if isinstance(value, Value):
            return _Side(value, np.repeat(value.constants, shape[1]), False) if dim == 1 else None
        return _Side(None, unknown)
    if dim != 1 or own[1] != shape[1]:
        return None
    made = walk.tensor(arg)
    return None if made is None else _Side(made, made.constants, all(size == 1 for size in own[2:]))


def _entries(tensor: torch.Tensor, dim: int, count: int) -> FloatArray:
    """Return [count] the entry that each channel meets, NaN where it meets several."""
    found = tensor.detach().to("cpu", torch.float64)
    if dim >= 0 and found.shape[dim] == count:
        found = found.movedim(dim, 0).reshape(count, -1)
    else:
        found = found.reshape(1, -1).expand(count, -1)
    same = (found == found[:, :1]).all(1)
    return np.where(same.numpy(), found[:, 0].numpy(), np.nan)


def _combined(node: fx.Node, first: FloatArray, second: FloatArray) -> FloatArray:
    """Return the constants of what ``node`` makes of two operands."""
    one, other = torch.from_numpy(first.copy()), torch.from_numpy(second.copy())
    function: Any = node.target
    found = getattr(one, function)(other) if isinstance(function, str) else function(one, other)
    constants = np.asarray(found, np.float64)
    if node.target in ops.MUL_FUNCTIONS or node.target in ops.MUL_METHODS:
        constants = np.where((first == 0) | (second == 0), 0.0, constants)
    return constants


@_handles("call_function", *ops.CAT_FUNCTIONS)
def _cat(walk: _Walk, node: fx.Node) -> Value | None:
    """Put tensors side by side along the channels, or along another dimension, where their channels must agree."""
    tensors, ndim = ops.argument(node, 0, "tensors"), len(walk.shapes[node])
    dim = ops.argument(node, 1, "dim", node.kwargs.get("axis", 0))
    listed = _listed(walk, tensors)
    if listed is None or not isinstance(dim, int) or ndim < 2:
        return walk.pin_reads(node, f"feeds {_title(node, node.target)} in a way that pyprune does not follow")
    if not any(isinstance(walk.values.get(source), (Value, Parts)) for source in node.all_input_nodes):
        return None
    if dim % ndim == 1:
        joined = [np.concatenate([getattr(value, key) for value in listed]) for key in ("slots", "constants")]
        return Value(joined[0], joined[1])
    first, *others = listed
    constants = first.constants
    for other in others:
        constants = np.where(constants == other.constants, constants, np.nan)
    result = walk.make(node.name, constants)
    for value in listed:
        walk.tie(value.slots, result.slots, f"reaches {node.name}", joins=True)
        differ = np.isnan(constants) & np.all([~np.isnan(one.constants) for one in listed], 0)
        walk.pin(value, f"is another constant on the other side of {node.name}", differ)
    return result


def _listed(walk: _Walk, tensors: Any) -> list[Value] | None:
    """Return the channels of each tensor in a list, or of what chunk yields; ``None`` if one is no such tensor."""
    found = walk.values.get(tensors) if isinstance(tensors, fx.Node) else None
    if isinstance(found, Parts):
        return list(found.parts)
    if not isinstance(tensors, (list, tuple)) or not tensors:
        return None
    values = [walk.tensor(one) if isinstance(one, fx.Node) else None for one in tensors]
    listed = [value for value in values if value is not None]
    return listed if len(listed) == len(values) else None


@_handles("call_function", *ops.SPLIT_FUNCTIONS)
@_handles("call_method", *ops.SPLIT_METHODS)
def _split(walk: _Walk, node: fx.Node) -> Found:
    """Cut a tensor into several, along the channels or along another dimension."""
    value = walk.source(node)
    where = fx.map_arg(ops.argument(node, 1, ops.SPLIT_NAMES[_name(node)]), walk.shapes.get)
    dim = ops.argument(node, 2, "dim", 0)
    shape = walk.shapes.get(_input(node))
    if value is None or not isinstance(shape, tuple) or not isinstance(dim, int) or dim % len(shape) == 0:
        return walk.pin_reads(node, f"feeds {_title(node, node.target)} in a way that pyprune does not follow")
    dim %= len(shape)
    try:
        cuts = getattr(torch, _name(node))(torch.arange(shape[dim]), where)
    except (TypeError, RuntimeError):
        return walk.pin_reads(node, f"feeds {_title(node, node.target)} in a way that pyprune does not follow")
    if dim != 1:
        return Parts((value,) * len(cuts))
    parts = tuple(Value(value.slots[cut.numpy()], value.constants[cut.numpy()]) for cut in cuts)
    walk.splits[node.name] = Split(tuple(part.slots for part in parts))
    return Parts(parts)


@_handles("call_function", torch.narrow)
@_handles("call_method", "narrow")
def _narrow(walk: _Walk, node: fx.Node) -> Value | None:
    """Take neighbouring channels, or a part of space."""
    value, shape = walk.source(node), walk.shapes.get(_input(node))
    dim, start, length = (ops.argument(node, i, name) for i, name in ((1, "dim"), (2, "start"), (3, "length")))
    if value is None or not isinstance(shape, tuple) or not all(type(one) is int for one in (dim, start, length)):
        return walk.pin_reads(node, f"feeds {_title(node, node.target)} in a way that pyprune does not follow")
    dim %= len(shape)
    if dim != 1:
        return value if dim else walk.pin_reads(node, f"feeds {_title(node, node.target)} over the batch")
    start %= shape[1]
    return _taken(walk, node, value, np.arange(start, start + length), (slice(None), slice(start, start + length)))


@_handles("call_function", torch.index_select)
@_handles("call_method", "index_select")
def _index_select(walk: _Walk, node: fx.Node) -> Value | None:
    """Take channels by a tensor that the model holds, or a part of space."""
    value, shape = walk.source(node), walk.shapes.get(_input(node))
    index = walk.values.get(ops.argument(node, 2, "index"))
    dim = ops.argument(node, 1, "dim")
    if value is None or not isinstance(shape, tuple) or not isinstance(dim, int) or not isinstance(index, Weights):
        return walk.pin_reads(node, f"feeds {_title(node, node.target)} in a way that pyprune does not follow")
    walk.whole.add(index.name)
    if dim % len(shape) != 1:
        return walk.pin_reads(node, f"feeds {_title(node, node.target)} over another dimension")
    taken = index.tensor.detach().cpu().numpy().astype(np.int64).reshape(-1)
    return _taken(walk, node, value, taken, (slice(None), slice(None)))


def _taken(walk: _Walk, node: fx.Node, value: Value, taken: IntArray, index: tuple[slice, ...]) -> Value:
    walk.slices[node.name] = Slice(value.slots, taken, index, copies=node.name in walk.rewritten)
    return Value(value.slots[taken], value.constants[taken])
