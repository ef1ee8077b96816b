"""Where the numbers of a slim network come from: each parameter's place in the network that it was cut from.

Rather than repeat how every kind of layer is cut, a layer whose tensors hold their own places is cut by the same code,
and what is left of them is read off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import nn

from pyprune.types import IntArray, Origin

Cut = Callable[[str, nn.Module], nn.Module]


def origins(slim: nn.Module, source: nn.Module, names: Collection[str], cut: Cut) -> dict[str, Origin]:
    """Return the origin of every parameter of ``slim`` that has one.

    Parameters
    ----------
    slim
        The slim network.
    source
        The network that it was cut from, whose modules have the same names.
    names
        The parameters that the original has: weights that were computed from others are no parameters of its.
    cut
        Returns a slim copy of the module of that name, which is given.
    """
    known = {name: one for name, one in source.named_parameters(remove_duplicate=False) if name in names}
    found: dict[str, Origin] = {}
    for path, module in slim.named_modules():
        own = {leaf: f"{path}.{leaf}" if path else leaf for leaf, _ in module.named_parameters(recurse=False)}
        cuts = [leaf for leaf, name in own.items() if name in known and known[name].shape != _shape(module, leaf)]
        places = _places(path, source.get_submodule(path), cuts, cut) if cuts else {}
        for leaf, name in own.items():
            if name in known:
                found[name] = Origin(name, tuple(known[name].shape), places.get(leaf, ()))
    return found


def _shape(module: nn.Module, leaf: str) -> torch.Size:
    return module.get_parameter(leaf).shape


def _places(path: str, module: nn.Module, leaves: list[str], cut: Cut) -> dict[str, tuple[IntArray, ...]]:
    """Return, for each of ``leaves``, the index into its tensor that yields what a cut leaves of it.

    The weight is coded apart from the rest: what is folded into a bias is a weight times a constant, so a weight of
    zeros folds nothing.
    """
    found: dict[str, tuple[IntArray, ...]] = {}
    for group in ([leaf for leaf in leaves if leaf == "weight"], [leaf for leaf in leaves if leaf != "weight"]):
        dims = range(max((min(2, module.get_parameter(leaf).ndim) for leaf in group), default=0))
        twins = [cut(path, _coded(module, group, dim)) for dim in dims]
        for leaf in group:
            codes = [twin.get_parameter(leaf).detach() for twin in twins[: module.get_parameter(leaf).ndim]]
            found[leaf] = _index([one.reshape(one.shape[:2]).cpu().numpy() for one in codes])
    return found


def _coded(module: nn.Module, leaves: list[str], dim: int) -> nn.Module:
    """Return a copy of ``module`` whose ``leaves`` hold, at each entry, its place along ``dim``, 0 or 1.

    Kernels are never cut; they are left out. Other tensors are zero.
    """
    held = [*module.parameters(), *module.buffers()]
    twin: Any = copy.deepcopy(module, {id(one): one for one in held})  # each is replaced below
    for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        shape = (*tensor.shape[:2], *([1] * (tensor.ndim - 2)))
        coded = torch.zeros((), dtype=torch.float64).expand(shape)
        if leaf in leaves and dim < tensor.ndim:
            line = [1] * len(shape)
            line[dim] = shape[dim]
            coded = torch.arange(shape[dim], dtype=torch.float64).view(line).expand(shape)
        is_parameter = leaf in module._parameters
        setattr(twin, leaf, nn.Parameter(coded, requires_grad=False) if is_parameter else coded)
    return twin  # type: ignore[no-any-return]


def _index(codes: list[np.ndarray[Any, Any]]) -> tuple[IntArray, ...]:
    """Return an index of arrays that broadcast: rows [F], or rows [F, 1] and columns [1 or F, C]."""
    if len(codes) == 1:
        return (codes[0].astype(np.int64),)
    rows, columns = codes
    if (columns == columns[:1]).all():
        columns = columns[:1]
    return rows[:, :1].astype(np.int64), columns.astype(np.int64)
