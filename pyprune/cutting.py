"""Cutting: the layers of a masked network without what leaves, constants folded, and the graph over them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

from pyprune import graph as graphs
from pyprune import kinds, measure
from pyprune import operations as ops
from pyprune.channels import BoolArray, Channels
from pyprune.rewiring import Rewiring
from pyprune.types import IntArray

if TYPE_CHECKING:
    from pyprune.deciding import Decision


SIZED = ops.CONVOLUTIONS | ops.TRANSPOSED | ops.NORMS | {nn.Linear, nn.PReLU, nn.GroupNorm}
"""Layers whose weights have the sizes of channels."""


def masked_copy(model: nn.Module, dead: Mapping[str, IntArray]) -> nn.Module:
    """Return a copy of ``model`` with the dead slices zeroed."""
    masked = copy.deepcopy(model)
    zero(masked, dead)
    return masked


def zero(model: nn.Module, dead: Mapping[str, IntArray]) -> None:
    """Zero the dead filters of every layer, as a mask does."""
    for name, indices in dead.items():
        graphs.zero_filters(model, name, indices)


def adopted(model: nn.Module, channels: Channels) -> nn.Module:
    """Return a copy of ``model`` with cut layers: whatever refers to a layer refers to the cut one."""
    memo: dict[int, Any] = {}
    parts: dict[str, Any] = {}
    for name, module in model.named_modules():
        if name in channels.filters or name in channels.inputs:
            parts[name] = memo[id(module)] = cut(name, module, channels, memo)
    _tie(model, parts)
    for name in channels.parameters:
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(model.get_submodule(owner), leaf)
        if (left := sliced(name, tensor, channels)) is not tensor:
            memo[id(tensor)] = left
    slim = copy.deepcopy(model, memo)
    for parameter in slim.parameters():
        parameter.grad = None
    return slim


def rebuild(masked: nn.Module, decision: Decision) -> nn.Module:
    """Return the slim network: a copy of the graph over cut layers, in which no tensor is the masked model's."""
    if decision.own_forward:
        return adopted(masked, decision.channels)
    graph = _copied(decision)
    parts: dict[str, Any] = {}
    memo: dict[int, Any] = {}
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and target not in parts:
            parts[target] = cut(target, masked.get_submodule(target), decision.channels, memo)
    for node in graph.nodes:
        if node.op == "get_attr":
            tensor = _attribute(masked, parts, str(node.target), memo)
            parts[str(node.target)] = sliced(str(node.target), tensor, decision.channels)
    _tie(masked, parts)
    _name_dropouts(graph, parts, decision.dropouts)
    taken = {path.partition(".")[0] for path in parts}
    rewiring = Rewiring(graph, decision.channels, taken, measure.model_device(masked), _is_last(masked))
    rewiring.rewire()
    parts |= rewiring.indices
    title = type(masked).__name__
    return _module(graph, parts, title if title.startswith("Slim") else f"Slim{title}", masked)


def _tie(masked: nn.Module, parts: Mapping[str, Any]) -> None:
    """Let layers that share their parameters share what is left of them."""
    firsts: dict[int, nn.Parameter] = {}
    for name, parameter in masked.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if owner in parts and (own := getattr(parts[owner], leaf)) is not None:
            setattr(parts[owner], leaf, firsts.setdefault(id(parameter), own))


def _copied(decision: Decision) -> fx.Graph:
    """Return a copy of the traced graph without types and metadata, literal sizes replaced by a flatten."""
    graph = fx.Graph()
    output = graph.graph_copy(decision.graph, {})
    graph.output(output)
    for node in list(graph.nodes):
        node.type, node.meta = None, {}
        if node.name in decision.channels.flattens:
            node.op, node.target, node.args, node.kwargs = "call_function", torch.flatten, (node.args[0], 1), {}
    return graph


def _name_dropouts(graph: fx.Graph, parts: dict[str, Any], follow: frozenset[str]) -> None:
    """Make modules of the functional dropouts in ``follow``, so that they know the training flag."""
    for node in graph.nodes:
        if node.name in follow and node.op == "call_function":
            name = node.name
            while name in {path.partition(".")[0] for path in parts}:
                name += "_"
            parts[name] = ops.DROPOUT_MODULES[node.target](ops.argument(node, 1, "p", 0.5))
            node.op, node.target, node.args, node.kwargs = "call_module", name, (node.all_input_nodes[0],), {}


def _is_last(model: nn.Module) -> bool:
    """Say whether the weights of ``model`` have their channels last in memory."""
    kernels = [one for one in model.parameters() if one.ndim == 4 and not one.is_contiguous()]
    return any(_memory_format(one) == torch.channels_last for one in kernels)


def _attribute(masked: nn.Module, parts: Mapping[str, Any], target: str, memo: dict[int, Any]) -> Any:
    """Return the copy of a tensor that the model reads directly; a layer that also runs owns the same one."""
    owner, _, leaf = target.rpartition(".")
    if owner in parts:
        return getattr(parts[owner], leaf)
    return copy.deepcopy(getattr(masked.get_submodule(owner), leaf), memo)


def cut_whole(name: str, module: nn.Module, channels: Channels) -> Any:
    """Return a copy of ``module`` without what leaves of it, be it a layer or one whose parameters the model reads."""
    slim = cut(name, module, channels, {})
    for leaf, parameter in list(slim.named_parameters(recurse=False)):
        setattr(slim, leaf, sliced(f"{name}.{leaf}" if name else leaf, parameter, channels))
    return slim


def sliced(name: str, tensor: Any, channels: Channels) -> Any:
    """Return a tensor that the model reads directly without the entries that leave."""
    if name not in channels.parameters or not channels.leaving_entries(name).any():
        return tensor
    left = torch.from_numpy(np.flatnonzero(~channels.leaving_entries(name))).to(tensor.device)
    data = tensor.detach().index_select(channels.parameters[name].dim, left)
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _module(graph: fx.Graph, parts: dict[str, Any], title: str, like: nn.Module) -> fx.GraphModule:
    """Return ``graph`` as a module, its generated code checked before it is compiled."""
    code = graph.python_code("self")
    graphs.check_source("compact", code.src, {*code.globals, "getattr", "slice", "Ellipsis"})
    slim = fx.GraphModule(parts, graph, title)
    known = dict(like.named_modules())
    for name, module in slim.named_modules():
        module.training = known.get(name, like).training
    for parameter in slim.parameters():
        parameter.grad = None
    return slim


def cut(name: str, module: Any, channels: Channels, memo: dict[int, Any]) -> Any:
    """Return a copy of ``module`` without the channels that leave."""
    inputs = channels.leaving_inputs(name) if name in channels.inputs else None
    outputs = channels.leaving(name) if name in channels.filters else inputs
    gone = (outputs is not None and outputs.any()) or (inputs is not None and inputs.any())
    if not gone or type(module) not in SIZED:
        return copy.deepcopy(module, memo)
    held = [*module.parameters(), *module.buffers()]
    slim: Any = copy.deepcopy(module, {id(tensor): tensor for tensor in held})  # each is replaced below
    out = None if outputs is None else ~outputs
    if name not in channels.filters:
        _cut_channelwise(slim, out)
        return slim
    _cut_weight(slim, module, out, None if inputs is None else ~inputs, channels.groups.get(name, 1))
    bias = None if module.bias is None else _picked(slim.bias, out)
    folded = None if inputs is None else _folded(module, channels.inputs[name].constants, inputs, out)
    if folded is not None:
        bias = (folded if bias is None else folded + bias.double()).to(slim.weight.dtype)
    _set(slim, "bias", bias, like=slim.weight)
    _count(slim, channels.groups_left(name))
    return slim


def _cut_weight(slim: Any, module: Any, out: BoolArray | None, inputs: BoolArray | None, groups: int) -> None:
    """Cut a weight [F, C, ...], or [C, F, ...] of a transposed convolution, within its groups if there are several."""
    rows, columns = (inputs, out) if type(module) in ops.TRANSPOSED else (out, inputs)
    if groups == 1:
        _set(slim, "weight", _picked(module.weight, rows, columns))
        return
    weight = module.weight.detach()
    there = np.ones(len(weight), np.bool_) if rows is None else rows
    across = np.ones(weight.shape[1] * groups, np.bool_) if columns is None else columns
    left = np.flatnonzero(there)
    inside = across.reshape(groups, -1)[left // (len(there) // groups)]  # [rows left, columns]
    index = np.nonzero(inside)[1].reshape(len(left), -1)
    picked = weight[torch.from_numpy(left)[:, None].to(weight.device), torch.from_numpy(index).to(weight.device)]
    _set(slim, "weight", picked.to(memory_format=_memory_format(weight)))


def _cut_channelwise(slim: Any, out: BoolArray | None) -> None:
    """Cut a norm's or an activation's own tensors, all of which have one entry a channel or none."""
    for leaf, tensor in [*slim.named_parameters(), *slim.named_buffers()]:
        _set(slim, leaf, _picked(tensor, out if tensor.ndim == 1 else None))
    count = 0 if out is None else int(out.sum())
    if isinstance(slim, nn.GroupNorm):
        slim.num_groups = count * slim.num_groups // slim.num_channels
    names = {nn.PReLU: "num_parameters", nn.GroupNorm: "num_channels"}
    setattr(slim, names.get(type(slim), "num_features"), count)


def _folded(module: Any, constants: Any, leaving: BoolArray, out: BoolArray | None) -> torch.Tensor | None:
    """Return what the leaving input channels add to every output of ``module``, in float64; ``None`` if nothing."""
    used = np.where(leaving, constants, 0.0)
    return _picked(kinds.folded(module, used), out) if used.any() else None


def _set(module: Any, leaf: str, tensor: torch.Tensor | None, like: torch.Tensor | None = None) -> None:
    """Put ``tensor`` in the place of a parameter or buffer, which says whether it is trained."""
    old = getattr(module, leaf)
    if tensor is None or leaf in module._buffers:
        setattr(module, leaf, tensor)
        return
    pattern = like if old is None else old
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=pattern is None or pattern.requires_grad))


def _count(module: Any, groups: int) -> None:
    """Make the sizes that a layer states about itself those of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
        return
    rows, columns = module.weight.shape[0], module.weight.shape[1] * groups
    transposed = type(module) in ops.TRANSPOSED
    module.in_channels, module.out_channels = (rows, columns) if transposed else (columns, rows)
    module.groups = groups


def _picked(tensor: torch.Tensor, out: BoolArray | None, inputs: BoolArray | None = None) -> torch.Tensor:
    """Return a copy of ``tensor`` with the entries at ``out`` [dim 0] and ``inputs`` [dim 1], in its memory format."""
    picked = tensor.detach()
    for dim, keep in enumerate((out, inputs)):
        if keep is not None and not keep.all():
            picked = picked.index_select(dim, torch.from_numpy(np.flatnonzero(keep)).to(tensor.device))
    picked = picked.clone() if picked.data_ptr() == tensor.data_ptr() else picked
    return picked.to(memory_format=_memory_format(tensor))


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.ndim in formats:
        last = torch.empty(tensor.shape, device="meta", memory_format=formats[tensor.ndim])
        if tensor.stride() == last.stride():
            return formats[tensor.ndim]
    return torch.contiguous_format
