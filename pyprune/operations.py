"""What the operations of a network do to channels: the closed tables that every stage reads.

An operation is known only if it stands here. Whatever does not is treated as mixing channels in a way that
nobody understands, so nothing is removed across it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

CONVOLUTIONS: frozenset[type] = frozenset({nn.Conv1d, nn.Conv2d, nn.Conv3d})
TRANSPOSED: frozenset[type] = frozenset({nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d})
BATCH_NORMS: frozenset[type] = frozenset({nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d})
INSTANCE_NORMS: frozenset[type] = frozenset({nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d})
MIXING_NORMS: frozenset[type] = frozenset({nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm})
NORMS = BATCH_NORMS | INSTANCE_NORMS
GROUP_NORMS: frozenset[type] = frozenset({nn.GroupNorm})

ACTIVATIONS: frozenset[type] = frozenset({
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.GELU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Threshold, nn.Hardshrink,
    nn.Softshrink, nn.Tanhshrink, nn.PReLU,
})  # fmt: skip
DROPOUTS: frozenset[type] = frozenset({
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity,
})  # fmt: skip
MAX_POOLS: frozenset[type] = frozenset({
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
})  # fmt: skip
AVG_POOLS: frozenset[type] = frozenset({nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d})
LP_POOLS: frozenset[type] = frozenset({nn.LPPool1d, nn.LPPool2d, nn.LPPool3d})
CONSTANT_PADS: frozenset[type] = frozenset({
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
})  # fmt: skip
PADS = CONSTANT_PADS | frozenset({
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d,
    nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
})  # fmt: skip
ADAPTIVE_AVG_POOLS: frozenset[type] = frozenset({nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d})
UPSAMPLES: frozenset[type] = frozenset({nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d})
CHANNELWISE = ACTIVATIONS | DROPOUTS | MAX_POOLS | AVG_POOLS | LP_POOLS | ADAPTIVE_AVG_POOLS | UPSAMPLES
"""Modules whose output channel i depends on input channel i alone, and on it in the same way for every i."""

ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "F.relu", torch.relu: "torch.relu", torch.relu_: "torch.relu_", F.relu6: "F.relu6",
    F.leaky_relu: "F.leaky_relu", F.elu: "F.elu", F.selu: "F.selu", torch.selu: "torch.selu", F.celu: "F.celu",
    F.silu: "F.silu", F.gelu: "F.gelu", F.mish: "F.mish", F.sigmoid: "F.sigmoid", torch.sigmoid: "torch.sigmoid",
    F.tanh: "F.tanh", torch.tanh: "torch.tanh", F.hardtanh: "F.hardtanh", F.hardswish: "F.hardswish",
    F.hardsigmoid: "F.hardsigmoid", F.softplus: "F.softplus", F.softsign: "F.softsign",
    F.logsigmoid: "F.logsigmoid", F.threshold: "F.threshold", F.hardshrink: "F.hardshrink",
    F.softshrink: "F.softshrink", F.tanhshrink: "F.tanhshrink", torch.abs: "torch.abs", torch.clamp: "torch.clamp",
    torch.exp: "torch.exp", torch.cos: "torch.cos", torch.sin: "torch.sin", torch.erf: "torch.erf",
    torch.square: "torch.square", torch.tanh: "torch.tanh",
}  # fmt: skip
ACTIVATION_METHODS = frozenset(
    {
        "relu",
        "relu_",
        "sigmoid",
        "sigmoid_",
        "tanh",
        "tanh_",
        "abs",
        "clamp",
        "clamp_",
        "exp",
        "cos",
        "sin",
        "erf",
        "square",
    }
)
DROPOUT_FUNCTIONS: dict[Any, str] = {
    F.dropout: "F.dropout", F.dropout1d: "F.dropout1d", F.dropout2d: "F.dropout2d", F.dropout3d: "F.dropout3d",
    F.alpha_dropout: "F.alpha_dropout", F.feature_alpha_dropout: "F.feature_alpha_dropout",
}  # fmt: skip
DROPOUT_MODULES: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout, F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}  # fmt: skip
SAME_METHODS = frozenset({"contiguous", "clone"})
MAX_POOL_FUNCTIONS: dict[Any, str] = {
    F.max_pool1d: "F.max_pool1d", F.max_pool2d: "F.max_pool2d", F.max_pool3d: "F.max_pool3d",
    F.adaptive_max_pool1d: "F.adaptive_max_pool1d", F.adaptive_max_pool2d: "F.adaptive_max_pool2d",
    F.adaptive_max_pool3d: "F.adaptive_max_pool3d",
}  # fmt: skip
AVG_POOL_FUNCTIONS: dict[Any, str] = {
    F.avg_pool1d: "F.avg_pool1d", F.avg_pool2d: "F.avg_pool2d", F.avg_pool3d: "F.avg_pool3d",
}  # fmt: skip
LP_POOL_FUNCTIONS: dict[Any, str] = {
    F.lp_pool1d: "F.lp_pool1d", F.lp_pool2d: "F.lp_pool2d", F.lp_pool3d: "F.lp_pool3d",
}  # fmt: skip
ADAPTIVE_AVG_POOL_FUNCTIONS: dict[Any, str] = {
    F.adaptive_avg_pool1d: "F.adaptive_avg_pool1d", F.adaptive_avg_pool2d: "F.adaptive_avg_pool2d",
    F.adaptive_avg_pool3d: "F.adaptive_avg_pool3d",
}  # fmt: skip
INTERPOLATE_FUNCTIONS: dict[Any, str] = {F.interpolate: "F.interpolate"}
CHANNELWISE_FUNCTIONS: dict[Any, str] = {
    **ACTIVATION_FUNCTIONS, **DROPOUT_FUNCTIONS, **MAX_POOL_FUNCTIONS, **AVG_POOL_FUNCTIONS,
    **LP_POOL_FUNCTIONS, **ADAPTIVE_AVG_POOL_FUNCTIONS, **INTERPOLATE_FUNCTIONS,
}  # fmt: skip

ADD_FUNCTIONS: dict[Any, str] = {operator.add: "operator.add", operator.iadd: "operator.iadd", torch.add: "torch.add"}
SCALAR_FUNCTIONS: dict[Any, str] = {
    operator.neg: "operator.neg", torch.neg: "torch.neg", operator.pow: "operator.pow",
}  # fmt: skip
"""Channelwise where everything but the first argument is a number."""
ADD_METHODS = frozenset({"add", "add_"})
SUB_FUNCTIONS: dict[Any, str] = {operator.sub: "operator.sub", operator.isub: "operator.isub", torch.sub: "torch.sub"}
SUB_METHODS = frozenset({"sub", "sub_"})
MUL_FUNCTIONS: dict[Any, str] = {operator.mul: "operator.mul", operator.imul: "operator.imul", torch.mul: "torch.mul"}
MUL_METHODS = frozenset({"mul", "mul_"})
PRODUCT_FUNCTIONS: dict[Any, str] = {
    **MUL_FUNCTIONS, operator.truediv: "operator.truediv", operator.itruediv: "operator.itruediv",
    torch.div: "torch.div", torch.maximum: "torch.maximum", torch.minimum: "torch.minimum",
}  # fmt: skip
"""Of two tensors entry by entry: the channels of both and of the result go together."""
PRODUCT_METHODS = MUL_METHODS | {"div", "div_", "maximum", "minimum"}
IN_PLACE_FUNCTIONS: dict[Any, tuple[str, Any]] = {
    operator.iadd: ("add_", operator.add), operator.isub: ("sub_", operator.sub),
    operator.imul: ("mul_", operator.mul), operator.itruediv: ("div_", operator.truediv),
}  # fmt: skip
"""Python's ``a += b`` and what it is for tensors, a method, and for numbers, another operation."""
COUNT_FUNCTIONS: dict[Any, str] = {operator.floordiv: "operator.floordiv"}
CAT_FUNCTIONS: dict[Any, str] = {
    torch.cat: "torch.cat", torch.concat: "torch.concat", torch.concatenate: "torch.concatenate",
}  # fmt: skip
SPLIT_FUNCTIONS: dict[Any, str] = {
    torch.chunk: "torch.chunk", torch.split: "torch.split", torch.tensor_split: "torch.tensor_split",
}  # fmt: skip
SPLIT_METHODS = frozenset({"chunk", "split", "tensor_split"})
SPLIT_NAMES = {"chunk": "chunks", "split": "split_size_or_sections", "tensor_split": "indices_or_sections"}
VIEW_FUNCTIONS: dict[Any, str] = {
    **SPLIT_FUNCTIONS, operator.getitem: "operator.getitem", torch.narrow: "torch.narrow",
    torch.flatten: "torch.flatten", torch.reshape: "torch.reshape", torch.permute: "torch.permute",
    torch.transpose: "torch.transpose", torch.squeeze: "torch.squeeze", torch.unsqueeze: "torch.unsqueeze",
}  # fmt: skip
VIEW_METHODS = SPLIT_METHODS | {
    "narrow", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "expand",
    "expand_as", "contiguous", "detach", "swapaxes", "movedim",
}  # fmt: skip
"""What may yield the memory that it reads."""
MOVE_FUNCTIONS: dict[Any, str] = {
    torch.reshape: "torch.reshape", torch.flatten: "torch.flatten", torch.permute: "torch.permute",
    torch.transpose: "torch.transpose", torch.swapaxes: "torch.swapaxes", torch.movedim: "torch.movedim",
    torch.squeeze: "torch.squeeze", torch.unsqueeze: "torch.unsqueeze", torch.unflatten: "torch.unflatten",
    torch.channel_shuffle: "torch.channel_shuffle",
}  # fmt: skip
MOVE_METHODS = frozenset(
    {
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "swapaxes",
        "movedim",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
    }
)
MOVE_MODULES: frozenset[type] = frozenset({nn.Flatten, nn.Unflatten, nn.ChannelShuffle})
"""What moves entries about and computes nothing; :mod:`pyprune.views` finds out where to."""
FLATTEN_FUNCTIONS: dict[Any, str] = {torch.flatten: "torch.flatten"}
MEAN_FUNCTIONS: dict[Any, str] = {torch.mean: "torch.mean"}
RESHAPE_METHODS = frozenset({"view", "reshape"})
PIXEL_SHUFFLE_FUNCTIONS: dict[Any, str] = {torch.pixel_shuffle: "F.pixel_shuffle"}
PIXEL_UNSHUFFLE_FUNCTIONS: dict[Any, str] = {torch.pixel_unshuffle: "F.pixel_unshuffle"}
PAD_FUNCTIONS: dict[Any, str] = {F.pad: "F.pad"}
INDEX_FUNCTIONS: dict[Any, str] = {torch.index_add: "torch.index_add", torch.index_select: "torch.index_select"}
"""What compaction writes where branches have different channels."""


def grouped_weight(module: Any) -> torch.Tensor:
    """Return a view [groups, outputs, inputs, ...] of the weight of any convolution or linear layer."""
    weight: torch.Tensor = module.weight.detach()
    if type(module) in TRANSPOSED:
        return weight.view(module.groups, -1, *weight.shape[1:]).transpose(1, 2)
    return weight.view(getattr(module, "groups", 1), -1, *weight.shape[1:])


def pads_space(module: Any, ndim: int) -> bool:
    """Say whether ``module`` pads dimensions behind the channels of a tensor of ``ndim`` dimensions only."""
    return type(module) in PADS and len(module.padding) // 2 <= ndim - 2


def normalises_positions(module: Any, ndim: int) -> bool:
    """Say whether ``module`` normalises dimensions behind the channels of a tensor of ``ndim`` dimensions only."""
    return type(module) in (nn.LayerNorm, nn.RMSNorm) and ndim - len(module.normalized_shape) >= 2


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call node, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_flatten(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Say whether ``node`` makes [N, C * ...] of [N, C, ...], each channel's entries staying together."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, nn.Flatten) and (type(module), module.start_dim, module.end_dim) == (
            nn.Flatten,
            1,
            -1,
        )
    if node.target in FLATTEN_FUNCTIONS or (node.op == "call_method" and node.target == "flatten"):
        return bool(argument(node, 1, "start_dim", 0) == 1 and argument(node, 2, "end_dim", -1) == -1)
    shape = _new_shape(node)
    return len(shape) == 2 and bool(shape[1] == -1) and _is_batch_size(shape[0])


def _new_shape(node: fx.Node) -> list[Any]:
    """Return what a view or reshape is given as the shape; nothing for another node."""
    if node.op != "call_method" or node.target not in RESHAPE_METHODS:
        return []
    shape: Any = node.args[1:]
    return list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)


def _is_batch_size(value: Any) -> bool:
    """Say whether ``value`` is x.size(0), x.size()[0] or x.shape[0], of any x: no known operation changes it."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method" and value.target == "size" and not is_shape(value):
        return bool(argument(value, 1, "dim") == 0)
    if value.op == "call_function" and value.target is operator.getitem and value.args[1] == 0:
        return is_shape(value.args[0])
    return False


def is_shape(value: Any) -> bool:
    """Say whether ``value`` is x.shape or x.size()."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method":
        return str(value.target) == "size" and len(value.args) == 1 and not value.kwargs
    return value.target is getattr and str(value.args[1]) == "shape"


def spatial_mean(node: fx.Node, ndim: int) -> list[int] | None:
    """Return the dimensions of a mean over dimensions after the channels, or ``None`` if ``node`` is no such mean."""
    if not (node.target in MEAN_FUNCTIONS or (node.op == "call_method" and node.target == "mean")):
        return None
    dims = argument(node, 1, "dim")
    listed = [dims] if isinstance(dims, int) else dims
    if not isinstance(listed, (list, tuple)) or not all(type(dim) is int for dim in listed):
        return None
    found = sorted(dim % ndim for dim in listed)
    return found if found and found[0] >= 2 else None


def whole_batch_index(node: fx.Node, ndim: int) -> tuple[slice, ...] | None:
    """Return x[...] as one slice a dimension, the first taking the batch whole; ``None`` if it is anything else."""
    index: Any = node.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    places = [i for i, item in enumerate(items) if item is ...]
    if len(places) == 1:
        items[places[0] : places[0] + 1] = [slice(None)] * (ndim - len(items) + 1)
    items += [slice(None)] * (ndim - len(items))
    if len(items) != ndim or ndim < 2 or not all(_is_literal_slice(item) for item in items):
        return None
    return tuple(items) if items[0] in (slice(None), slice(None, None, 1)) else None


def leaves_channels(node: fx.Node, ndim: int, dim: int) -> bool:
    """Say whether x[...] takes dimension ``dim`` whole: the index is literal, and has None and numbers elsewhere."""
    index: Any = node.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    if sum(item is ... for item in items) == 1:
        place = next(i for i, item in enumerate(items) if item is ...)
        items[place : place + 1] = [slice(None)] * (ndim - sum(item is not None for item in items) + 1)
    plain = all(item is None or type(item) is int or _is_literal_slice(item) for item in items)
    taken = [item for item in items if item is not None]
    return plain and (len(taken) <= dim or taken[dim] in (slice(None), slice(None, None, 1)))


def _is_literal_slice(item: Any) -> bool:
    if not isinstance(item, slice):
        return False
    return all(end is None or type(end) is int for end in (item.start, item.stop, item.step))


@dataclass(frozen=True)
class Padding:
    """What F.pad does: channels added before and after, the value, and whether that value meets others in space."""

    channels: tuple[int, int]
    value: float
    mixes: bool


def padding(node: fx.Node, ndim: int) -> Padding | None:
    """Return what a call of F.pad pads, or ``None`` if it is not written out or reaches beyond the channels."""
    widths, mode = argument(node, 1, "pad"), argument(node, 2, "mode", "constant")
    value = argument(node, 3, "value", None) or 0
    if not isinstance(widths, (list, tuple)) or not all(type(width) is int for width in widths):
        return None
    if len(widths) % 2 or type(value) not in (int, float):
        return None
    pairs = [(widths[i], widths[i + 1]) for i in range(0, len(widths), 2)]  # the last dimension comes first
    space, rest = pairs[: ndim - 2], pairs[ndim - 2 :]
    if any(width for pair in rest[1:] for width in pair) or (mode != "constant" and rest):
        return None
    grows = any(width > 0 for pair in space for width in pair)
    return Padding(rest[0] if rest else (0, 0), float(value), grows and mode == "constant")
