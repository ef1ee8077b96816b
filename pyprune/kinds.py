"""What the walk over channels does at each kind of layer: convolutions, norms and pools.

:mod:`pyprune.channels` loads this module, so every walk has these handlers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from pyprune import graph as graphs
from pyprune import operations as ops
from pyprune.channels import Value, _handles, _Walk


@_handles("call_module", *ops.CONVOLUTIONS)
def _convolution(walk: _Walk, node: fx.Node) -> Value | None:
    name = str(node.target)
    module = walk.modules[name]
    output = walk.produce(node, name)
    if module.groups != 1:
        walk.pin_reads(node, f"feeds {name}, a grouped convolution")
        walk.pin(output, "is a filter of a grouped convolution")
    elif len(walk.shapes[node]) != len(module.kernel_size) + 2:
        walk.pin_reads(node, f"feeds {name} without a batch dimension")
        walk.pin(output, "has no batch dimension")
        return None
    else:
        walk.consume(node, name, takes_constants=_pads_nothing(module))
    return output


def _pads_nothing(module: Any) -> bool:
    """Say whether a constant channel gives a constant result: at the border as in the middle."""
    if module.padding_mode != "zeros" or module.padding == "valid":
        return True
    if module.padding == "same":
        return all(size == 1 for size in module.kernel_size)
    return not any(module.padding)


@_handles("call_module", *ops.NORMS)
def _norm(walk: _Walk, node: fx.Node) -> Value | None:
    name, value = str(node.target), walk.source(node)
    if value is None:
        return None
    module = walk.modules[name]
    if name in walk.fixed or len(value.slots) != module.num_features:
        walk.pin(value, f"feeds {name}, which {walk.fixed.get(name, 'normalises another dimension')}")
    else:
        walk.inputs[name] = value
    constants = np.full(len(value.slots), np.nan)
    if graphs.kind_without_statistics(module):
        constants[value.constants == 0] = 0.0
    else:
        constants[walk.dead.get(f"{name}.weight", [])] = 0.0
    lost = ~np.isnan(value.constants) & np.isnan(constants)
    walk.pin(value, f"reaches {name}, a norm that is not masked there", lost)
    return Value(value.slots, constants)


@_handles("call_module", *ops.MAX_POOLS)
@_handles("call_function", *ops.MAX_POOL_FUNCTIONS)
def _max_pool(walk: _Walk, node: fx.Node) -> Value | None:
    if _option(walk, node, "return_indices", 6, False):
        return walk.pin_reads(node, f"feeds {node.name}, which returns indices too")
    return walk.only(node)  # padding is -inf, so a constant stays what it is


@_handles("call_module", *ops.AVG_POOLS)
@_handles("call_function", *ops.AVG_POOL_FUNCTIONS)
def _avg_pool(walk: _Walk, node: fx.Node) -> Value | None:
    value = walk.only(node)
    padding = _option(walk, node, "padding", 3, 0)
    padded = any(padding) if isinstance(padding, (list, tuple)) else padding != 0
    uneven = _option(walk, node, "ceil_mode", 4, False) or _option(walk, node, "divisor_override", 6, None)
    if value is not None and (padded or uneven):
        walk.pin_constants(value, f"into {node.name}, which averages it with padding")
    return value


def _option(walk: _Walk, node: fx.Node, name: str, position: int, default: Any) -> Any:
    """Return a setting of a pool, be it a module or a function."""
    if node.op == "call_module":
        return getattr(walk.modules[str(node.target)], name, default)
    return ops.argument(node, position, name, default)
