"""Channels that leave only together: their classes over all layers, who reads them, and what that costs a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from pyprune import graph
from pyprune.channels import Channels
from pyprune.measure import Costs, Counted, Transposed
from pyprune.types import FloatArray, IntArray, Plan


def classes(costs: Costs) -> dict[str, IntArray]:
    """Return [F] by layer: filters with the same number can leave only together, in whatever layers they are."""
    channels = costs.leaving(Plan({}), "intersect")
    layers = graph.prunable(costs.model)
    return {name: _tied(channels, name) for name in channels.first if name in layers}


def outgoing(costs: Costs) -> dict[str, FloatArray]:
    """Return the norms of the slices through which others read each filter's channel, [F, P] by layer (eq. 3.18).

    P counts the outputs of all layers that read any channel which can leave only together with one of the layer's.
    """
    channels = costs.leaving(Plan({}), "intersect")
    readers = {name: _read_by(channels, name, costs.model.get_submodule(name)) for name in channels.inputs}
    known = {name: found for name, found in readers.items() if found is not None}
    layers = graph.prunable(costs.model)
    return {name: _gathered(_tied(channels, name), known) for name in channels.first if name in layers}


def _tied(channels: Channels, name: str) -> IntArray:
    first = channels.first[name]
    return channels.tied[first : first + channels.filters[name]]


def _read_by(channels: Channels, name: str, module: nn.Module) -> tuple[IntArray, FloatArray] | None:
    """Return the classes [U] that a layer reads, and the norms [U, P] of what each of its P outputs takes of them."""
    if not isinstance(module, Counted):
        return None
    found, index = np.unique(channels.tied[channels.inputs[name].slots], return_inverse=True)
    squares = np.zeros((len(found), _outputs(module)))
    np.add.at(squares, index, _squares(module))
    return found, np.sqrt(squares)


def _outputs(module: Any) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)


def _squares(module: Any) -> FloatArray:
    """Return the sums of squares [C, F] of the weights between each input and each output."""
    weight = module.weight.detach().double().cpu()
    if isinstance(module, nn.Linear):
        found: FloatArray = (weight.T**2).numpy()
        return found
    groups, C, F = module.groups, module.in_channels, module.out_channels
    sums = (weight.reshape(*weight.shape[:2], -1) ** 2).sum(2)
    if not isinstance(module, Transposed):
        sums = sums.reshape(groups, F // groups, C // groups).transpose(1, 2)
    blocks = sums.reshape(groups, C // groups, F // groups).numpy()
    found = np.zeros((C, F))
    for g, block in enumerate(blocks):
        found[g * (C // groups) : (g + 1) * (C // groups), g * (F // groups) : (g + 1) * (F // groups)] = block
    return found


def _gathered(own: IntArray, readers: Mapping[str, tuple[IntArray, FloatArray]]) -> FloatArray:
    """Return [F, P] for one layer, out of what is read by whom."""
    parts = [np.zeros((len(own), 0))]
    for found, norms in readers.values():
        if not np.isin(own, found).any():
            continue
        at = np.minimum(np.searchsorted(found, own), len(found) - 1)
        parts.append(np.where((found[at] == own)[:, None], norms[at], 0.0))
    return np.concatenate(parts, axis=1)


def cost(costs: Costs, plan: Plan) -> dict[str, Any]:
    """Return what a plan saves, and what coupling keeps from it.

    Returns
    -------
    dict
        ``parameters`` and ``macs``, before and after. ``stays``: how many planned filters leave channels behind because
        other branches keep them, so that only ``residual="scatter"`` removes the filters, and nothing removes the
        channels; and ``parameters_intersect`` and ``macs_intersect``, after, where indexed additions are not wanted.
    """
    before, after, together = costs.profile(), costs.profile(plan), costs.profile(plan, "intersect")
    apart, tied = costs.leaving(plan), costs.leaving(plan, "intersect")
    stays = sum(int((apart.leaving(name) & ~tied.leaving(name)).sum()) for name in plan.keep if name in apart.first)
    return {
        "parameters": [before.parameters, after.parameters], "macs": [before.macs, after.macs], "stays": stays,
        "parameters_intersect": together.parameters, "macs_intersect": together.macs,
    }  # fmt: skip
