"""A slim network's widths and numbers in the modules of somebody's own class."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pyprune import graph as graphs
from pyprune import measure, slimfile
from pyprune import operations as ops
from pyprune.hints import did_you_mean

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest |own - slim| / max(1, max |slim|): the same sums, perhaps in another order."""

MAX_ELEMENTS = 1 << 27
"""Of all tensors of a forward pass on inputs that a file asks for: half a gigabyte in float32."""

_WIDTHS = frozenset({
    "in_channels", "out_channels", "groups", "num_features", "in_features", "out_features", "num_parameters",
    "num_groups", "num_channels", "normalized_shape",
})  # fmt: skip


def check_operations(who: str, slim: fx.GraphModule, model: nn.Module) -> None:
    """Refuse a slim network with indexed operations, which no ``forward`` of a full-width network has.

    Raises
    ------
    ValueError
        Naming the first.
    """
    found = next((node for node in slim.graph.nodes if node.target in ops.INDEX_FUNCTIONS), None)
    if found is not None:
        raise ValueError(
            f"{who}: the slim network computes {found.name} by torch.{found.target.__name__}, which the forward of "
            f'{type(model).__name__} does not. Use load_slim, or compact with residual="intersect".'
        )


def resize_(who: str, model: nn.Module, slim: fx.GraphModule) -> None:
    """Give the layers of ``model`` the widths and copies of the numbers of those of ``slim``.

    Raises
    ------
    ValueError
        If a layer is missing, of another type or with other settings, or ``model`` holds tensors that ``slim`` does
        not. Some layers may have been changed then.
    """
    modules = dict(model.named_modules())
    layers = {name: module for name, module in slim.named_modules() if _own(module) and name}
    for name, layer in layers.items():
        if name not in modules:
            hint = did_you_mean(name, modules, "Pass the class that was compacted.")
            raise ValueError(f"{who}: {type(model).__name__} has no layer {name!r}, and the slim network has.{hint}")
        _check_layer(who, name, modules[name], layer)
    spare = sorted(
        f"{name}.{leaf}" if name else leaf
        for name, module in modules.items()
        for leaf in _own(module)
        if name not in layers
    )
    if spare:
        raise ValueError(f"{who}: {type(model).__name__} has {spare[0]!r}, and the slim network does not.")
    for name, layer in layers.items():
        _resize(modules[name], layer)


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that a module itself holds and saves."""
    found = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {leaf: one for leaf, one in found.items() if leaf not in module._non_persistent_buffers_set}


def _check_layer(who: str, name: str, mine: Any, layer: nn.Module) -> None:
    kind = type(layer)
    if not isinstance(mine, kind):
        raise ValueError(
            f"{who}: {name!r} must be a {kind.__name__}, as in the slim network; it is a {type(mine).__name__}."
        )
    if change := graphs.is_changed(mine):
        raise ValueError(f"{who}: {name!r} {change}, so it cannot be resized. Take that off first.")
    for setting, sort, _ in slimfile.MODULES[kind]:
        if setting in _WIDTHS or sort == "present":
            continue
        have, need = (_plain(getattr(one, setting)) for one in (mine, layer))
        if have != need:
            raise ValueError(f"{who}: {name!r} must have {setting}={need}, as in the slim network; it has {have}.")
    spare = sorted(_own(mine).keys() - _own(layer).keys())
    lacking = sorted(_own(layer).keys() - _own(mine).keys() - {"bias"})  # constants may have been folded into a bias
    if spare or lacking:
        who_has, leaf = ("the model", spare[0]) if spare else ("the slim network", lacking[0])
        raise ValueError(f"{who}: only in {who_has} {name!r} has a {leaf}.")


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _resize(mine: Any, layer: Any) -> None:
    old = _own(mine)
    device = next(iter(old.values())).device
    trained = all(one.requires_grad for one in mine.parameters(recurse=False))
    for setting, _, _ in slimfile.MODULES[type(layer)]:
        if setting in _WIDTHS:
            setattr(mine, setting, getattr(layer, setting))
    for leaf, tensor in _own(layer).items():
        fresh = tensor.detach().clone().to(device)
        if leaf in layer._parameters:
            wanted = old[leaf].requires_grad if leaf in old else trained
            mine._parameters[leaf] = nn.Parameter(fresh, requires_grad=wanted)
        else:
            mine._buffers[leaf] = fresh


def fits_in_memory(slim: fx.GraphModule, shapes: Sequence[tuple[list[int], torch.dtype]]) -> bool:
    """Say whether a forward pass on inputs of these shapes works and stays small, without computing it."""
    total = 0

    class Sizes(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            nonlocal total
            result = super().run_node(node)
            total += sum(one.numel() for one in pytree.tree_leaves(result) if isinstance(one, torch.Tensor))
            if total > MAX_ELEMENTS:
                raise MemoryError
            return result

    try:
        with torch.no_grad():
            inputs = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes]
            Sizes(copy.deepcopy(slim).to("meta")).run(*inputs)
    except Exception:
        return False
    return True


def check_outputs(who: str, model: nn.Module, slim: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> None:
    """Raise unless both networks compute the same, in eval mode.

    Raises
    ------
    ValueError
        If ``model`` fails on ``inputs``, or its outputs differ.
    """
    with torch.no_grad():
        expected = _outputs(slim(*(one.clone() for one in inputs)))
        try:
            with measure.running(model) as place:
                found = _outputs(model(*(one.clone().to(place) for one in inputs)))
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{who}: the forward of {type(model).__name__} fails with the slim widths ({reason}). "
                "Numbers of channels written out in it must follow the layers: x.flatten(1), say, for x.view(-1, 512)."
            ) from None
    same = [one.shape for one in found] == [one.shape for one in expected]
    for one, other in zip(found, expected, strict=False):
        limit = TOLERANCES.get(other.dtype, 0.0) * max(1.0, float(other.double().abs().max()) if other.numel() else 1.0)
        same = same and bool(((one.cpu().double() - other.double()).abs() <= limit).all())
    if not same:
        raise ValueError(
            f"{who}: with the slim widths and numbers {type(model).__name__} computes something else than the slim "
            "network: its forward differs. Use load_slim."
        )


def _outputs(outputs: Any) -> list[torch.Tensor]:
    return [one for one in pytree.tree_leaves(outputs) if isinstance(one, torch.Tensor)]
