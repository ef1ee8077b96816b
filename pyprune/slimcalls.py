"""What every operation of a slim file may be given: a closed table of arguments, and of what comes out.

Values that pass between operations are tensors, lists of tensors, shapes and counts. Knowing which is which keeps a
file from computing with anything else: a shape repeated a billion times or a count squared twenty times over fills
the memory as surely as a tensor does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_COUNT = 1 << 20
MAX_NUMBER = 1 << 31
MAX_SIDE = 1 << 14
"""Of what an operation states along one dimension: a padding, a kernel, a size to resize to."""
MAX_SCALE = 64
MAX_PARTS = 4096
_MAX_BITS = 128
_COUNT_BITS = 31
_MAX_DIMS = 8


@dataclass(frozen=True)
class Kind:
    """What a value is: ``"tensor"``, ``"tensors"``, ``"shape"``, or a ``"count"`` of at most so many bits."""

    name: str
    bits: int = 0


TENSOR, TENSORS, SHAPE, COUNT = Kind("tensor"), Kind("tensors"), Kind("shape"), Kind("count", _COUNT_BITS)

_TABLE = """
module: input=tensor
F.relu F.relu6 F.selu F.silu F.mish F.hardswish F.hardsigmoid: input=tensor inplace=flag?
F.leaky_relu: input=tensor negative_slope=number? inplace=flag?
F.elu F.celu: input=tensor alpha=number? inplace=flag?
F.gelu: input=tensor approximate=word?
F.hardtanh: input=tensor min_val=number? max_val=number? inplace=flag?
F.softplus: input=tensor beta=number? threshold=number?
F.threshold: input=tensor threshold=number value=number inplace=flag?
F.hardshrink F.softshrink: input=tensor lambd=number?
F.sigmoid F.tanh F.softsign F.logsigmoid F.tanhshrink: input=tensor
torch.relu torch.relu_ torch.selu torch.sigmoid torch.tanh torch.abs torch.exp torch.cos torch.sin: input=tensor
torch.erf torch.square torch.neg: input=tensor
torch.clamp: input=tensor min=number? max=number?
F.dropout F.dropout1d F.dropout2d F.dropout3d: input=tensor p=number? training=flag? inplace=flag?
F.alpha_dropout F.feature_alpha_dropout: input=tensor p=number? training=flag? inplace=flag?
F.max_pool1d F.max_pool2d F.max_pool3d: input=tensor kernel_size=sizes stride=sizes? padding=sizes? dilation=sizes?
    ceil_mode=flag? return_indices=no?
F.adaptive_max_pool1d F.adaptive_max_pool2d F.adaptive_max_pool3d: input=tensor output_size=output return_indices=no?
F.avg_pool1d: input=tensor kernel_size=sizes stride=sizes? padding=sizes? ceil_mode=flag? count_include_pad=flag?
F.avg_pool2d F.avg_pool3d: input=tensor kernel_size=sizes stride=sizes? padding=sizes? ceil_mode=flag?
    count_include_pad=flag? divisor_override=whole?
F.lp_pool1d F.lp_pool2d F.lp_pool3d: input=tensor norm_type=number kernel_size=sizes stride=sizes? ceil_mode=flag?
F.adaptive_avg_pool1d F.adaptive_avg_pool2d F.adaptive_avg_pool3d: input=tensor output_size=output
F.interpolate: input=tensor size=output? scale_factor=scale? mode=word? align_corners=flag?
    recompute_scale_factor=flag? antialias=flag?
F.pad: input=tensor pad=widths mode=word? value=number?
F.normalize: input=tensor p=number? dim=dims? eps=number? out=none?
F.layer_norm: input=tensor normalized_shape=shape weight=tensor? bias=tensor? eps=number?
F.softmax F.log_softmax: input=tensor dim=dim? _stacklevel=dim? dtype=none?
torch.softmax torch.log_softmax: input=tensor dim=dim dtype=none?
F.pixel_shuffle: input=tensor upscale_factor=parts
F.pixel_unshuffle: input=tensor downscale_factor=parts
torch.channel_shuffle: input=tensor groups=parts
operator.add operator.iadd operator.sub operator.isub operator.mul operator.imul: a=operand b=operand -> join
operator.truediv operator.itruediv operator.floordiv: a=operand b=operand -> join
operator.neg: a=operand -> join
operator.pow: a=tensor b=number
operator.matmul torch.matmul: input=tensor other=tensor
torch.add torch.sub: input=operand other=operand alpha=number? -> join
torch.mul torch.maximum torch.minimum: input=operand other=operand -> join
torch.div: input=operand other=operand rounding_mode=word? -> join
torch.cat torch.concat torch.concatenate torch.stack: tensors=tensors dim=dim? axis=dim?
torch.chunk: input=tensor chunks=parts dim=dim? -> tensors
torch.split: tensor=tensor split_size_or_sections=sections dim=dim? -> tensors
torch.tensor_split: input=tensor indices_or_sections=sections dim=dim? -> tensors
torch.narrow: input=tensor dim=dim start=whole length=whole
torch.flatten: input=tensor start_dim=dim? end_dim=dim?
torch.unflatten: input=tensor dim=dim sizes=shape
torch.reshape: input=tensor shape=shape
torch.permute: input=tensor dims=dims
torch.transpose: input=tensor dim0=dim dim1=dim
torch.swapaxes: input=tensor axis0=dim axis1=dim
torch.movedim: input=tensor source=dims destination=dims
torch.squeeze: input=tensor dim=dims?
torch.unsqueeze: input=tensor dim=dim
torch.mean torch.sum: input=tensor dim=dims? keepdim=flag?
torch.index_select: input=tensor dim=dim index=tensor
torch.index_add: input=tensor dim=dim index=tensor source=tensor
getattr: a=tensor b=shape_word -> shape
operator.getitem: a=any b=index -> item
.relu .relu_ .sigmoid .sigmoid_ .tanh .tanh_ .abs .exp .cos .sin .erf .square: self=tensor
.contiguous .clone .detach: self=tensor
.clamp .clamp_: self=tensor min=number? max=number?
.add .add_ .sub .sub_: self=tensor other=operand alpha=number?
.mul .mul_ .maximum .minimum: self=tensor other=operand
.div .div_: self=tensor other=operand rounding_mode=word?
.matmul .expand_as: self=tensor other=tensor
.view .reshape .expand: self=tensor *shape=whole
.permute: self=tensor *dims=dim
.chunk: self=tensor chunks=parts dim=dim? -> tensors
.split: self=tensor split_size=sections dim=dim? -> tensors
.tensor_split: self=tensor indices_or_sections=sections dim=dim? -> tensors
.narrow: self=tensor dim=dim start=whole length=whole
.flatten: self=tensor start_dim=dim? end_dim=dim?
.unflatten: self=tensor dim=dim sizes=shape
.transpose: self=tensor dim0=dim dim1=dim
.swapaxes: self=tensor axis0=dim axis1=dim
.movedim: self=tensor source=dims destination=dims
.squeeze: self=tensor dim=dims?
.unsqueeze: self=tensor dim=dim
.mean .sum .amax: self=tensor dim=dims? keepdim=flag?
.index_select: self=tensor dim=dim index=tensor
.softmax .log_softmax: self=tensor dim=dim dtype=none?
.size: self=tensor dim=dim? -> size
.dim: self=tensor -> count
"""
"""``names: arguments -> result``; a method has a dot in front, ``?`` marks what may be missing, ``*`` the rest."""


@dataclass(frozen=True)
class Signature:
    """The arguments of an operation in order, each with its sort and whether it must be there; and what it yields."""

    names: tuple[str, ...]
    sorts: tuple[str, ...]
    needed: int
    rest: str
    result: str


def _parsed(table: str) -> dict[str, Signature]:
    found = {}
    for line in table.strip().replace("\n    ", " ").splitlines():
        names, _, rest = line.partition(": ")
        arguments, _, result = rest.partition(" -> ")
        pairs = [one.split("=") for one in arguments.split()]
        star = next((sort for name, sort in pairs if name.startswith("*")), "")
        plain = [(name, sort) for name, sort in pairs if not name.startswith("*")]
        signature = Signature(
            tuple(name for name, _ in plain),
            tuple(sort.removesuffix("?") for _, sort in plain),
            sum(not sort.endswith("?") for _, sort in plain),
            star,
            result or "tensor",
        )
        found.update(dict.fromkeys(names.split(), signature))
    return found


SIGNATURES: Mapping[str, Signature] = _parsed(_TABLE)

Kinds = Mapping[str, Kind]


def fits(target: str, args: list[Any], kwargs: Mapping[str, Any], kinds: Kinds) -> Kind | None:
    """Return what an operation yields, or ``None`` if it cannot take these arguments.

    Parameters
    ----------
    target
        A function's name, or a method's with a dot in front.
    args, kwargs
        As they stand in the file.
    kinds
        What the results of the operations before it are, by name.
    """
    signature = SIGNATURES.get(target)
    if signature is None:
        return None
    named = signature.names
    values: dict[str, Any] = dict(zip(named, args, strict=False))
    over = args[len(named) :]
    if (over and not signature.rest) or (signature.rest and kwargs) or any(key in values for key in kwargs):
        return None
    values |= kwargs
    if not set(values) <= set(named) or not set(named[: signature.needed]) <= set(values):
        return None
    for position, (name, sort) in enumerate(zip(named, signature.sorts, strict=True)):
        if name not in values or (values[name] is None and position >= signature.needed):
            continue
        if not _SORTS[sort](values[name], kinds):
            return None
    if signature.rest and not _rest(signature.rest, over, kinds):
        return None
    return _result(signature.result, values, kinds)


def is_whole(value: Any, low: int = -MAX_COUNT, high: int = MAX_COUNT) -> bool:
    """Say whether ``value`` is a whole number, no boolean, within limits."""
    return type(value) is int and low <= value <= high


def is_number(value: Any) -> bool:
    """Say whether ``value`` is a finite number, no boolean, of at most 2^31."""
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER and math.isfinite(value)


def _kind(value: Any, kinds: Kinds) -> Kind | None:
    """Return the kind of a value that is another operation's result."""
    if isinstance(value, dict) and set(value) == {"node"} and isinstance(value["node"], str):
        return kinds.get(value["node"])
    return None


def _is(value: Any, kinds: Kinds, name: str) -> bool:
    found = _kind(value, kinds)
    return found is not None and found.name == name


def _items(value: Any) -> list[Any] | None:
    """Return what a list or tuple holds, at most 4096 values."""
    if isinstance(value, dict) and set(value) == {"tuple"}:
        value = value["tuple"]
    return value if isinstance(value, list) and len(value) <= MAX_PARTS else None


def _whole(value: Any, kinds: Kinds, low: int = -MAX_COUNT, high: int = MAX_COUNT) -> bool:
    return is_whole(value, low, high) or _is(value, kinds, "count")


def _all(value: Any, test: Callable[[Any], bool], most: int = _MAX_DIMS) -> bool:
    items = _items(value)
    return items is not None and len(items) <= most and all(map(test, items))


def _dim(value: Any, _: Kinds) -> bool:
    return is_whole(value, -_MAX_DIMS, _MAX_DIMS)


def _dims(value: Any, kinds: Kinds) -> bool:
    return _dim(value, kinds) or _all(value, lambda one: _dim(one, kinds))


def _number(value: Any, kinds: Kinds) -> bool:
    return is_number(value) or _is(value, kinds, "count")


def _operand(value: Any, kinds: Kinds) -> bool:
    return _number(value, kinds) or _is(value, kinds, "tensor")


def _tensors(value: Any, kinds: Kinds) -> bool:
    items = _items(value)
    listed = items is not None and len(items) >= 1 and all(_is(one, kinds, "tensor") for one in items)
    return listed or _is(value, kinds, "tensors")


def _sizes(value: Any, kinds: Kinds) -> bool:
    return _whole(value, kinds, 0, MAX_SIDE) or _all(value, lambda one: _whole(one, kinds, 0, MAX_SIDE), 3)


def _output(value: Any, kinds: Kinds) -> bool:
    def one(size: Any) -> bool:
        return size is None or _whole(size, kinds, 1, MAX_SIDE)

    return one(value) or _is(value, kinds, "shape") or _all(value, one, 3)


def _scale(value: Any, _: Kinds) -> bool:
    def one(factor: Any) -> bool:
        return is_number(factor) and 0 < factor <= MAX_SCALE

    return one(value) or _all(value, one, 3)


def _widths(value: Any, kinds: Kinds) -> bool:
    return _all(value, lambda one: _whole(one, kinds, -MAX_SIDE, MAX_SIDE), 2 * _MAX_DIMS)


def _shape(value: Any, kinds: Kinds) -> bool:
    if _is(value, kinds, "shape"):
        return True
    written = [one for one in _items(value) or [] if type(one) is int]
    return _all(value, lambda one: _whole(one, kinds, -1)) and math.prod(written) <= MAX_NUMBER


def _sections(value: Any, kinds: Kinds) -> bool:
    return _whole(value, kinds, 1) or _all(value, lambda one: _whole(one, kinds, 0), MAX_PARTS)


def _index(value: Any, kinds: Kinds) -> bool:
    if isinstance(value, dict) and set(value) == {"slice"}:
        ends = value["slice"]
        plain = isinstance(ends, list) and len(ends) == 3
        return plain and all(end is None or _whole(end, kinds) for end in ends) and ends[2] != 0
    return value is None or value == {"ellipsis": []} or _whole(value, kinds)


_SORTS: Mapping[str, Callable[[Any, Kinds], bool]] = {
    "any": lambda value, kinds: _kind(value, kinds) is not None,
    "tensor": lambda value, kinds: _is(value, kinds, "tensor"),
    "tensors": _tensors,
    "operand": _operand,
    "number": _number,
    "flag": lambda value, _: type(value) is bool,
    "no": lambda value, _: value is False,
    "none": lambda value, _: value is None,
    "word": lambda value, _: isinstance(value, str),
    "shape_word": lambda value, _: value == "shape",
    "dim": _dim,
    "dims": _dims,
    "whole": _whole,
    "parts": lambda value, _: is_whole(value, 1, MAX_PARTS),
    "sizes": _sizes,
    "output": _output,
    "scale": _scale,
    "widths": _widths,
    "shape": _shape,
    "sections": _sections,
    "index": lambda value, kinds: _index(value, kinds) or _all(value, lambda one: _index(one, kinds)),
}


def _rest(sort: str, values: list[Any], kinds: Kinds) -> bool:
    """Say whether arguments given one by one, or as one list, are a shape or a list of dimensions."""
    listed: Any = values[0] if len(values) == 1 and not _SORTS[sort](values[0], kinds) else values
    return bool(values) and (_shape if sort == "whole" else _dims)(listed, kinds)


def _result(result: str, values: Mapping[str, Any], kinds: Kinds) -> Kind | None:
    if result == "size":
        return SHAPE if values.get("dim") is None else COUNT
    if result == "join":
        return _joined(list(values.values()), kinds)
    if result == "item":
        return _item(_kind(values["a"], kinds), values["b"])
    return {"tensor": TENSOR, "tensors": TENSORS, "shape": SHAPE, "count": COUNT}[result]


def _joined(values: list[Any], kinds: Kinds) -> Kind | None:
    """Return a tensor where one takes part; else a count, whose digits must stay few."""
    found = [_kind(value, kinds) for value in values]
    if TENSOR in found:
        return TENSOR
    bits = sum(_COUNT_BITS if one is None else one.bits for one in found)
    return Kind("count", bits) if any(found) and bits <= _MAX_BITS else None


def _item(source: Kind | None, index: Any) -> Kind | None:
    """Return what an index takes out of a tensor, a list of tensors or a shape."""
    if source == TENSOR:
        return TENSOR
    if source not in (TENSORS, SHAPE):
        return None
    if isinstance(index, dict) and set(index) == {"slice"}:
        return source
    if type(index) is not int:
        return None
    return TENSOR if source == TENSORS else COUNT
