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
    found = {}
    for group in ([leaf for leaf in leaves if leaf == "weight"], [leaf for leaf in leaves if leaf != "weight"]):
        if group:
            twin = cut(path, _coded(module, group))
            for leaf in group:
                found[leaf] = _index(twin.get_parameter(leaf).detach(), module.get_parameter(leaf).shape)
    return found


def _coded(module: nn.Module, leaves: list[str]) -> nn.Module:
    """Return a copy of ``module`` in float64 whose ``leaves`` number their entries in the first two dimensions.

    The others, kernels, are never cut; they are left out.
    """
    held = [*module.parameters(), *module.buffers()]
    twin: Any = copy.deepcopy(module, {id(one): one for one in held})  # each is replaced below
    for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        shape = (*tensor.shape[:2], *([1] * (tensor.ndim - 2)))
        coded = torch.zeros(shape, dtype=torch.float64)
        if leaf in leaves:
            coded = torch.arange(coded.numel(), dtype=torch.float64).view(shape)
        is_parameter = leaf in module._parameters
        setattr(twin, leaf, nn.Parameter(coded, requires_grad=False) if is_parameter else coded)
    return twin  # type: ignore[no-any-return]


def _index(codes: torch.Tensor, shape: torch.Size) -> tuple[IntArray, ...]:
    """Return ``codes`` as an index of arrays that broadcast: rows [F], or rows [F, 1] and columns [1 or F, C]."""
    flat: IntArray = codes.cpu().numpy().reshape(codes.shape[:2]).astype(np.int64)
    if flat.ndim == 1:
        return (flat,)
    rows, columns = np.divmod(flat, shape[1])
    if (columns == columns[:1]).all():
        columns = columns[:1].copy()  # a view would keep all of them
    return rows[:, :1].copy(), columns
