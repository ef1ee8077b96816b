"""What the walk over channels does at each kind of layer: convolutions, norms and pools.

:mod:`pyprune.channels` loads this module, so every walk has these handlers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx, nn

from pyprune import graph as graphs
from pyprune import operations as ops
from pyprune.channels import BoolArray, Value, _handles, _Hold, _Walk
from pyprune.types import FloatArray, IntArray


def outputs(module: Any) -> int:
    """Return how many filters a convolution or linear layer has."""
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)


@_handles("call_module", *ops.CONVOLUTIONS, *ops.TRANSPOSED)
def _convolution(walk: _Walk, node: fx.Node) -> Value | None:
    name = str(node.target)
    module = walk.modules[name]
    again = name in walk.produced
    output = walk.produce(name)
    if module.groups > 1:
        walk.groups[name] = module.groups
    if len(walk.shapes[node]) != len(module.kernel_size) + 2:
        walk.pin_reads(node, f"feeds {name} without a batch dimension")
        walk.pin(output, "has no batch dimension")
        return None
    value = walk.consume(node, name)
    if value is None:
        return output
    if not _is_uniform(module):
        read = np.repeat(
            np.isnan(output.constants).reshape(module.groups, -1).any(1), module.in_channels // module.groups
        )
        kind = "whose borders see other values" if type(module) in ops.TRANSPOSED else "which pads with zeros"
        walk.pin_constants(Value(value.slots[read], value.constants[read]), f"into {name}, {kind}")
    if module.groups == 1:
        return output
    made = output.slots.reshape(module.groups, -1)
    if len(value.slots) == module.groups:
        _tie_depthwise(walk, name, value.slots, made)
    else:
        _need_groups(walk, name, value, made)
    constants = _constant_outputs(walk, name, module, value)
    constants = np.where(np.isnan(output.constants), constants, output.constants)
    if again:
        walk.alive[output.slots] |= np.isnan(constants)
    else:
        walk.alive[output.slots] = np.isnan(constants)
    return Value(output.slots, constants)


def _is_uniform(module: Any) -> bool:
    """Say whether a constant channel gives a constant result: at the border as in the middle."""
    if type(module) in ops.TRANSPOSED:
        sizes = (*module.kernel_size, *module.stride)
        return all(size == 1 for size in sizes) and not any((*module.padding, *module.output_padding))
    if module.padding_mode != "zeros" or module.padding == "valid":
        return True
    if module.padding == "same":
        return all(size == 1 for size in module.kernel_size)
    return not any(module.padding)


def _tie_depthwise(walk: _Walk, name: str, read: IntArray, made: IntArray) -> None:
    """Let the filters [C, multiplier] over each input channel [C] hold it, and a single one be held by it."""
    walk.holds += [_Hold(column, read, f"reaches {name}") for column in made.T]
    if made.shape[1] == 1:
        walk.holds.append(_Hold(read, made[:, 0], f"reaches {name}"))
        walk.ties.append(walk.holds[-1])


def _need_groups(walk: _Walk, name: str, value: Value, made: IntArray) -> None:
    """Let the filters [groups, F / groups] of each group hold what is alive in the inputs of the group."""
    read = value.slots.reshape(len(made), -1)
    alive = np.isnan(value.constants).reshape(read.shape)
    by, held = np.broadcast_arrays(made[:, :, None], read[:, None, :])
    there = np.broadcast_to(alive[:, None, :], by.shape)
    walk.holds.append(_Hold(by[there], held[there], f"reaches {name}"))


def _constant_outputs(walk: _Walk, name: str, module: Any, value: Value) -> FloatArray:
    """Return [F] what filters make of groups whose inputs are all constant; NaN elsewhere.

    A constant other than 0 counts only where it stays one at the border. The weights are those of the model, and a
    mask leaves them as they are wherever the filter is not dead.
    """
    constants = value.constants.reshape(module.groups, -1)
    allowed = ~np.isnan(constants) if _is_uniform(module) else constants == 0
    known: BoolArray = np.asarray(allowed.all(axis=1))
    made = folded(module, np.where(known[:, None], constants, 0.0).ravel())
    if module.bias is not None:
        made = made + module.bias.detach().double()
    run = len(made) // module.groups
    return np.where(np.repeat(known, run), made.cpu().numpy(), np.nan)


def folded(module: Any, constants: FloatArray) -> torch.Tensor:
    """Return [F] what constant inputs [C] add to the outputs of a layer, in float64."""
    weight = ops.grouped_weight(module).double()
    weight = weight.flatten(3).sum(3) if weight.ndim > 3 else weight
    used = torch.from_numpy(constants.reshape(len(weight), -1)).to(weight.device)
    return torch.einsum("gfc,gc->gf", weight, used).flatten()


def balance(walk: _Walk, leaves: BoolArray) -> bool:
    """Bring channels back until the groups of every grouped convolution are equal; say whether that took any.

    Groups that read and yield nothing any more leave as a whole. Every other gets as many inputs, and outputs, as
    the one that keeps most. Of the channels that can come back, those go first that other unequal groups need as
    well, then those that bring the fewest others back.
    """
    lacking = [(name, slots, stays, most) for name in walk.groups for slots, stays, most in _sides(walk, name, leaves)]
    wanted = np.zeros(len(leaves), np.int64)
    for _, slots, stays, most in lacking:
        short = (stays.sum(1) < most)[:, None] & ~stays
        wanted[slots[short]] += 1
    holding = np.zeros(len(leaves), np.bool_)
    for hold in walk.holds:
        holding[hold.by] = True
    for name, slots, stays, most in lacking:
        found = False
        for row, there in zip(slots, stays, strict=True):
            missing = most - int(there.sum())
            if missing > 0:
                gone = row[~there]
                order = np.lexsort((np.arange(len(gone)), holding[gone], -wanted[gone]))
                found = True
                _bring_back(walk, gone[order[:missing]], f"keeps the groups of {name} equal")
        if found:  # the other layers' groups look different now
            return True
    return False


def _sides(walk: _Walk, name: str, leaves: BoolArray) -> list[tuple[IntArray, BoolArray, int]]:
    """Return, for the inputs and outputs of the groups that stay: slots, which stay, and the most in one group."""
    groups = walk.groups[name]
    made = np.arange(walk.first[name], walk.first[name] + walk.counts[name]).reshape(groups, -1)
    value = walk.inputs.get(name)
    if value is None:  # what is read is no layer's, and stays
        return [(made, ~leaves[made], max(1, int((~leaves[made]).sum(1).max())))]
    read = value.slots.reshape(groups, -1)
    left = ~(leaves[read].all(1) & leaves[made].all(1))
    sides = [(side[left], ~leaves[side[left]]) for side in (read, made)]
    return [(slots, stays, max(1, int(stays.sum(1).max(initial=0)))) for slots, stays in sides]


def _bring_back(walk: _Walk, slots: IntArray, reason: str) -> None:
    walk.pin(Value(slots, np.zeros(len(slots))), reason)


@_handles("call_module", *ops.NORMS)
def _norm(walk: _Walk, node: fx.Node) -> Value | None:
    name, value = str(node.target), walk.source(node)
    if value is None:
        walk.read(name, None)
        return None
    module = walk.modules[name]
    if name in walk.fixed or len(value.slots) != module.num_features:
        walk.pin(value, f"feeds {name}, which {walk.fixed.get(name, 'normalises another dimension')}")
    else:
        walk.read(name, value)
    if graphs.keeps_zeros(module):
        return _silenced(walk, value, value.constants == 0, f"reaches {name}, a norm by the statistics of the input")
    return _silenced(walk, value, _masked_at(walk, name, value), f"reaches {name}, a norm that is not masked there")


def _masked_at(walk: _Walk, name: str, value: Value) -> BoolArray:
    """Return [C] where the mask zeroes weight and bias of a norm."""
    masked = np.zeros(len(value.slots), np.bool_)
    masked[walk.dead.get(f"{name}.weight", [])] = True
    return masked


def _silenced(walk: _Walk, value: Value, silent: BoolArray, reason: str) -> Value:
    """Return ``value`` behind a norm: 0 where it is ``silent``, alive elsewhere, where a constant channel must stay."""
    walk.pin(value, reason, ~np.isnan(value.constants) & ~silent)
    return Value(value.slots, np.where(silent, 0.0, np.nan))


@_handles("call_module", *ops.GROUP_NORMS)
def _group_norm(walk: _Walk, node: fx.Node) -> Value | None:
    """Normalise groups of channels: they leave as wholes, once all of their channels are dead."""
    name, value = str(node.target), walk.source(node)
    if value is None:
        walk.read(name, None)
        return None
    module = walk.modules[name]
    if name in walk.fixed or len(value.slots) != module.num_channels:
        walk.pin(value, f"feeds {name}, which {walk.fixed.get(name, 'normalises another dimension')}")
        return _silenced(walk, value, np.zeros(len(value.slots), np.bool_), f"reaches {name}, a GroupNorm")
    walk.read(name, value)
    run = module.num_channels // module.num_groups
    reason = f"reaches {name}, a GroupNorm, which mixes it with other channels"
    groups = value.slots.reshape(-1, run)
    walk.holds.append(_Hold(groups.ravel(), np.roll(groups, 1, axis=1).ravel(), reason))
    walk.ties.append(walk.holds[-1])
    silent = _masked_at(walk, name, value) if module.affine else value.constants == 0
    whole = np.repeat((silent & ~np.isnan(value.constants)).reshape(-1, run).all(axis=1), run)
    return _silenced(walk, value, whole, reason)


@_handles("call_module", *ops.MIXING_NORMS, anywhere=True)
def _mixing_norm(walk: _Walk, node: fx.Node) -> Value | None:
    """Refuse what normalises over channels; what normalises positions without a bias leaves zeros alone."""
    name, value = str(node.target), walk.source(node)
    module, kind = walk.modules[name], type(walk.modules[name]).__name__
    if value is None or value.dim != 1 or not ops.normalises_positions(module, len(walk.shapes[node])):
        return walk.pin_reads(node, f"reaches {name}, a {kind}, which mixes it with other channels")
    if getattr(module, "bias", None) is not None:
        return _silenced(walk, value, np.zeros(len(value.slots), np.bool_), f"reaches {name}, a {kind} with a bias")
    return _silenced(walk, value, value.constants == 0, f"reaches {name}, a {kind}, which shifts constants")


@_handles("call_module", *ops.MAX_POOLS)
@_handles("call_function", *ops.MAX_POOL_FUNCTIONS)
def _max_pool(walk: _Walk, node: fx.Node) -> Value | None:
    if _option(walk, node, "return_indices", 6, False):
        return walk.pin_reads(node, f"feeds {node.name}, which returns indices too")
    return walk.only(node)  # padding is -inf, so a constant stays what it is


@_handles("call_module", *ops.AVG_POOLS)
@_handles("call_function", *ops.AVG_POOL_FUNCTIONS)
def _avg_pool(walk: _Walk, node: fx.Node) -> Value | None:
    """Average windows: a constant stays what it is unless padding counts, or the divisor is given."""
    value = walk.only(node)
    if value is None:
        return None
    padded = bool(np.any(_option(walk, node, "padding", 3, 0)))
    divisor = _option(walk, node, "divisor_override", 6, None)
    if padded and (divisor or _option(walk, node, "count_include_pad", 5, True)):
        walk.pin_constants(value, f"into {node.name}, which averages it with padding")
    elif divisor and _option(walk, node, "ceil_mode", 4, False):
        walk.pin_constants(value, f"into {node.name}, whose last windows are smaller")
    elif divisor:
        size = _window(walk, node, 1)
        return Value(value.slots, value.constants * (size / divisor))
    return value


def _window(walk: _Walk, node: fx.Node, position: int) -> int:
    """Return the number of entries in a window of a pool."""
    size: Any = _option(walk, node, "kernel_size", position, 1)
    space = len(walk.shapes[node]) - 2
    return int(np.prod(size)) if isinstance(size, (tuple, list)) else int(size) ** space


@_handles("call_module", *ops.LP_POOLS)
@_handles("call_function", *ops.LP_POOL_FUNCTIONS)
def _lp_pool(walk: _Walk, node: fx.Node) -> Value | None:
    """Add up the powers in windows: 0 stays 0, and other constants are kept."""
    value = walk.only(node)
    if value is not None:
        walk.pin_constants(value, f"into {node.name}, which adds up its powers")
    return value


@_handles("call_module", *ops.PADS)
def _pad_module(walk: _Walk, node: fx.Node) -> Value | None:
    """Pad space; what is repeated or mirrored keeps a constant, and so does padding with that constant."""
    name, value = str(node.target), walk.source(node)
    module = walk.modules[name]
    if value is None or not ops.pads_space(module, len(walk.shapes[node])):
        return walk.pin_reads(node, f"feeds {name}, which pads channels")
    if type(module) in ops.CONSTANT_PADS and any(width > 0 for width in module.padding):
        other = ~np.isnan(value.constants) & (value.constants != module.value)
        walk.pin(value, f"carries a constant into {name}, which pads with {module.value:g}", other)
    return value


@_handles("call_module", nn.PixelShuffle)
@_handles("call_function", *ops.PIXEL_SHUFFLE_FUNCTIONS)
def _pixel_shuffle(walk: _Walk, node: fx.Node) -> Value | None:
    """Make one channel of r * r: they leave together, once all are dead."""
    value = walk.only(node)
    if value is None:
        return None
    run = len(value.slots) // walk.shapes[node][1]
    slots, constants = value.slots.reshape(-1, run), value.constants.reshape(-1, run)
    same = (constants == constants[:, :1]).all(1)
    walk.pin(value, f"meets other constants at {node.name}", np.repeat(~same, run) & ~np.isnan(value.constants))
    result = walk.make(node.name, np.where(same, constants[:, 0], np.nan))
    for column in slots.T:
        walk.tie(column, result.slots, f"reaches {node.name}")
    return result


@_handles("call_module", nn.PixelUnshuffle)
@_handles("call_function", *ops.PIXEL_UNSHUFFLE_FUNCTIONS)
def _pixel_unshuffle(walk: _Walk, node: fx.Node) -> Value | None:
    """Make r * r channels of each."""
    value = walk.only(node)
    if value is None:
        return None
    run = walk.shapes[node][1] // len(value.slots)
    return Value(np.repeat(value.slots, run), np.repeat(value.constants, run))


def _option(walk: _Walk, node: fx.Node, name: str, position: int, default: Any) -> Any:
    """Return a setting of a pool, be it a module or a function."""
    if node.op == "call_module":
        return getattr(walk.modules[str(node.target)], name, default)
    return ops.argument(node, position, name, default)
