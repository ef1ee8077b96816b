"""Optimizers that go on with the slim network where they were with the original one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from pyprune.types import Compacted, Origin
from pyprune.wrappers import unwrapped

WHO = "Compacted.carry"


def carried(slim: Compacted, optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """Return an optimizer like ``optimizer`` for the parameters of ``slim.model``, its state cut as they were.

    This is :meth:`pyprune.types.Compacted.carry`, which says more.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{WHO}: needs a torch optimizer; got {type(optimizer).__name__}.")
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            f"{WHO}: LBFGS keeps one state for all parameters together, which cannot be cut. "
            "Make a new one for slim.model."
        )
    names = _names(optimizer, slim, unwrapped(model)[0])
    slimmed = dict(slim.model.named_parameters())
    by_source = {origin.name: name for name, origin in slim.origins.items() if name in slimmed}
    fresh = _like(optimizer)
    for number, group in enumerate(optimizer.param_groups):
        held = [by_source[names[id(old)]] for old in group["params"] if names[id(old)] in by_source]
        held += [name for name, owner in _owners(optimizer, slim, names).items() if owner == number]
        fresh.param_groups.append(_group(group, held, slimmed))
    for old, state in optimizer.state.items():
        name = by_source.get(names.get(id(old), ""))
        if name is not None:
            fresh.state[slimmed[name]] = {
                key: _cut(value, old, slimmed[name], slim.origins[name], f"{key!r} of {name!r}")
                for key, value in state.items()
            }
    return fresh


def _names(optimizer: Optimizer, slim: Compacted, model: nn.Module) -> dict[int, str]:
    """Return the names of the model's parameters by identity, after checking that the three belong together."""
    known = dict(model.named_parameters(remove_duplicate=False))
    names: dict[int, str] = {}
    for name, parameter in known.items():
        if id(parameter) not in names or name in slim.origins:
            names[id(parameter)] = name
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in names for parameter in held)
    if foreign:
        raise ValueError(
            f"{WHO}: the optimizer must train the given model; {foreign} of its {len(held)} parameters are not the "
            "model's. Pass the model that it was made for, as it was compacted."
        )
    for name, origin in slim.origins.items():
        came = None if origin.name not in known else list(known[origin.name].shape)
        if came != list(origin.shape):
            raise ValueError(
                f"{WHO}: the model must be the one that was compacted; {name!r} comes from a parameter of shape "
                f"{list(origin.shape)} and the model has {came or 'none of that name'}."
            )
    return names


def _owners(optimizer: Optimizer, slim: Compacted, names: Mapping[int, str]) -> dict[str, int]:
    """Return, for each parameter that compaction made, the group that trains the rest of its layer."""
    groups = {
        names[id(old)].rpartition(".")[0]: number
        for number, group in enumerate(optimizer.param_groups)
        for old in group["params"]
    }
    made = [name for name, _ in slim.model.named_parameters() if name not in slim.origins]
    return {name: groups[layer] for name in made if (layer := name.rpartition(".")[0]) in groups}


def _like(optimizer: Optimizer) -> Optimizer:
    """Return an optimizer of that type and with those settings, without parameters, state and hooks.

    Its constructor is not called, since the defaults of some optimizers are no arguments of theirs. What schedulers
    and masks have hung onto the old one refers to the old parameters and stays there.
    """
    kind = type(optimizer)
    fresh: Any = kind.__new__(kind)
    own = {key: value for key, value in vars(optimizer).items() if not key.endswith("_hooks") and not callable(value)}
    vars(fresh).update(own)
    fresh.__setstate__({"defaults": dict(optimizer.defaults), "state": defaultdict(dict), "param_groups": []})
    return fresh  # type: ignore[no-any-return]


def _group(group: Mapping[str, Any], held: list[str], slimmed: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Return ``group`` with other parameters; hyperparameters that are tensors become the new group's own."""
    settings = {key: _copied(value) for key, value in group.items() if key not in ("params", "param_names")}
    named = {"param_names": held} if "param_names" in group else {}
    return {"params": [slimmed[name] for name in held], **named, **settings}


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _cut(value: Any, old: torch.Tensor, parameter: torch.Tensor, origin: Origin, what: str) -> Any:
    """Return one entry of the state for the slim parameter: numbers per element are cut, others are copied."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        if isinstance(value, (list, tuple, dict)):
            raise ValueError(f"{WHO}: cannot tell what belongs to which element in {what}, a {type(value).__name__}.")
        return _copied(value)
    if value.shape == old.shape:
        taken = origin.take(value.detach())
        return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(taken)
    if not origin.index:
        return _copied(value)
    raise ValueError(
        f"{WHO}: {what} has shape {list(value.shape)}, not its parameter's {list(old.shape)}, so it cannot be cut by "
        "index. Make a new optimizer for slim.model."
    )
