"""What compaction asks of a model before it looks at channels: real numbers in memory, and weights that are weights.

Weights that are computed from other parameters (weight norm, spectral norm, orthogonal weights, torch's pruning masks)
are computed once, on a copy: in eval mode they do not change.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_COMPUTED = (parametrizations._WeightNorm, parametrizations._SpectralNorm, parametrizations._Orthogonal)
"""Parametrizations that give the same weight every time in eval mode; of others nobody knows."""

_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)


def check_model(who: str, model: nn.Module) -> None:
    """Refuse a model whose tensors cannot be cut: without values, complex or quantised.

    Raises
    ------
    ValueError
        If it holds any; the message names the first and says what to do.
    """
    for name, module in model.named_modules():
        if "quantized" in type(module).__module__.split("."):
            raise ValueError(
                f"{who}: {name!r} is a quantised {type(module).__name__}, whose weights cannot be cut. "
                "Compact the model in floating point, then quantise the slim one."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{who}: {name or 'the model'!r} is compiled by torch.jit, which nothing can look into. Pass the model "
                "from before torch.jit.script or torch.jit.trace."
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(
                f"{who}: {name!r} has no shape yet, since its lazy layer has seen no data. "
                "Run the model on one batch first."
            )
        if tensor.is_meta:
            raise ValueError(f"{who}: {name!r} lies on the meta device, without values. Load the weights first.")
        if tensor.is_complex() or tensor.is_quantized:
            kind = "complex" if tensor.is_complex() else "quantised"
            raise ValueError(
                f"{who}: tensors must be of real floating-point numbers; {name!r} is {kind} "
                f"({str(tensor.dtype).removeprefix('torch.')}). Convert the model first."
            )


def baked(model: nn.Module) -> nn.Module:
    """Return ``model``, or a copy whose computed weights are plain parameters if it has any.

    Weight norm, spectral norm and orthogonal weights, as parametrizations and as hooks of older torch, and the masks of
    ``torch.nn.utils.prune`` are evaluated as in eval mode. A weight is trainable if anything that it was computed from
    is. Other parametrizations and hooks are left as they are.
    """
    if not any(_is_computed(module) or _hooks(module) for module in model.modules()):
        return model
    copied = _copied(model)
    flags = {module: module.training for module in copied.modules()}
    copied.eval()
    with torch.no_grad():
        for module in list(copied.modules()):
            if _is_computed(module):
                _bake_parametrizations(module)
            for hook in _hooks(module):
                _bake_hook(module, hook)
    for module in copied.modules():
        module.training = flags.get(module, module.training)
    return copied


def _is_computed(module: Any) -> bool:
    """Say whether ``module`` has parametrizations, all of them known."""
    found = module.parametrizations.values() if parametrize.is_parametrized(module) else ()
    return bool(found) and all(type(one) in _COMPUTED for steps in found for one in steps)


def _bake_parametrizations(module: Any) -> None:
    """Put values in the place of what is computed.

    ``remove_parametrizations`` would take the properties from the class, which the model that was copied shares.
    """
    trained = {
        name: nn.Parameter(getattr(module, name).detach().clone(), any(one.requires_grad for one in steps.parameters()))
        for name, steps in module.parametrizations.items()
    }
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, parameter in trained.items():
        module.register_parameter(name, parameter)


def _hooks(module: nn.Module) -> list[Any]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _HOOKS)]


def _bake_hook(module: nn.Module, hook: Any) -> None:
    name = str(hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name)
    sources = [one for leaf, one in module.named_parameters(recurse=False) if leaf.startswith(f"{name}_")]
    trains = any(one.requires_grad for one in sources)
    if isinstance(hook, WeightNorm):
        remove_weight_norm(module, name)
    elif isinstance(hook, SpectralNorm):
        remove_spectral_norm(module, name)
    else:
        prune.remove(module, name)  # type: ignore[no-untyped-call]
    getattr(module, name).requires_grad_(trains)


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy of ``model``; what its hooks computed last is taken over without its history."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)
