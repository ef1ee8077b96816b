"""The architecture of a slim network as plain JSON: a closed table of modules, functions and methods.

Writing refuses what is not in the table. Reading checks every name, type and range before anything is built, and
builds by looking names up in the table: nothing is imported, evaluated or executed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from pyprune import graph as graphs
from pyprune import operations as ops
from pyprune import slimcalls as calls
from pyprune.slimcalls import MAX_COUNT, MAX_NUMBER, MAX_SCALE, MAX_SIDE, is_number, is_whole

FORMAT = "pyprune.architecture"
VERSION = 1
MAX_BYTES = 8 << 20
MAX_NODES = 4096
MAX_MODULES = 4096
MAX_DEPTH = 16
_MAX_ITEMS = 4096
_NESTING = 6

DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
"""How safetensors calls each type."""

# Each setting is (name in the constructor, kind, default); a setting at its default is not written.
_Setting = tuple[str, str, Any]
REQUIRED = object()


def _conv(dims: int, transposed: bool = False) -> list[_Setting]:
    zero, one = [0] * dims, [1] * dims
    settings: list[_Setting] = [
        ("in_channels", "count", REQUIRED), ("out_channels", "count", REQUIRED),
        ("kernel_size", f"sides {dims}", REQUIRED), ("stride", f"sides {dims}", one),
        ("padding", f"margins {dims}" if transposed else f"padding {dims}", zero),
        ("dilation", f"sides {dims}", one), ("groups", "count", 1), ("bias", "present", True),
        ("padding_mode", "choice", "zeros"),
    ]  # fmt: skip
    return [*settings, ("output_padding", f"margins {dims}", zero)] if transposed else settings


_BATCH_NORM: list[_Setting] = [
    ("num_features", "count", REQUIRED), ("eps", "number", 1e-5), ("momentum", "momentum", 0.1),
    ("affine", "flag", True), ("track_running_stats", "flag", True),
]  # fmt: skip
_INSTANCE_NORM: list[_Setting] = [*_BATCH_NORM[:3], ("affine", "flag", False), ("track_running_stats", "flag", False)]
_POOL: list[_Setting] = [("kernel_size", "size", REQUIRED), ("stride", "size", None), ("padding", "size", 0)]
_MAX_POOL: list[_Setting] = [*_POOL, ("dilation", "size", 1), ("ceil_mode", "flag", False)]
_AVG_POOL: list[_Setting] = [*_POOL, ("ceil_mode", "flag", False), ("count_include_pad", "flag", True)]
_AVG_POOL_ND: list[_Setting] = [*_AVG_POOL, ("divisor_override", "optional", None)]
_OUTPUT: list[_Setting] = [("output_size", "output", REQUIRED)]
_P: list[_Setting] = [("p", "number", 0.5), ("inplace", "flag", False)]
_INPLACE: list[_Setting] = [("inplace", "flag", False)]
_SCALED: list[_Setting] = [("size", "output", None), ("scale_factor", "scale", None)]
_LP_POOL: list[_Setting] = [
    ("norm_type", "number", REQUIRED), ("kernel_size", "size", REQUIRED), ("stride", "size", None),
    ("ceil_mode", "flag", False),
]  # fmt: skip
_CONSTANT_PAD: list[_Setting] = [("padding", "widths", REQUIRED), ("value", "number", REQUIRED)]
_LAMBDA: list[_Setting] = [("lambd", "number", 0.5)]

MODULES: dict[type, list[_Setting]] = {
    nn.Conv1d: _conv(1), nn.Conv2d: _conv(2), nn.Conv3d: _conv(3),
    nn.ConvTranspose1d: _conv(1, True), nn.ConvTranspose2d: _conv(2, True), nn.ConvTranspose3d: _conv(3, True),
    nn.Linear: [("in_features", "count", REQUIRED), ("out_features", "count", REQUIRED), ("bias", "present", True)],
    nn.BatchNorm1d: _BATCH_NORM, nn.BatchNorm2d: _BATCH_NORM, nn.BatchNorm3d: _BATCH_NORM,
    nn.InstanceNorm1d: _INSTANCE_NORM, nn.InstanceNorm2d: _INSTANCE_NORM, nn.InstanceNorm3d: _INSTANCE_NORM,
    nn.GroupNorm: [
        ("num_groups", "count", REQUIRED), ("num_channels", "count", REQUIRED), ("eps", "number", 1e-5),
        ("affine", "flag", True),
    ],
    nn.LayerNorm: [
        ("normalized_shape", "sizes", REQUIRED), ("eps", "number", 1e-5), ("elementwise_affine", "flag", True),
        ("bias", "present", True),
    ],
    nn.LocalResponseNorm: [
        ("size", "side", REQUIRED), ("alpha", "number", 1e-4), ("beta", "number", 0.75), ("k", "number", 1.0),
    ],
    nn.ReLU: _INPLACE, nn.ReLU6: _INPLACE, nn.SELU: _INPLACE, nn.SiLU: _INPLACE, nn.Mish: _INPLACE,
    nn.Hardswish: _INPLACE, nn.Hardsigmoid: _INPLACE,
    nn.LeakyReLU: [("negative_slope", "number", 0.01), *_INPLACE],
    nn.ELU: [("alpha", "number", 1.0), *_INPLACE], nn.CELU: [("alpha", "number", 1.0), *_INPLACE],
    nn.GELU: [("approximate", "choice", "none")],
    nn.Sigmoid: [], nn.Tanh: [], nn.Softsign: [], nn.LogSigmoid: [], nn.Tanhshrink: [], nn.Identity: [],
    nn.Hardtanh: [("min_val", "number", -1.0), ("max_val", "number", 1.0), *_INPLACE],
    nn.Softplus: [("beta", "number", 1.0), ("threshold", "number", 20.0)],
    nn.Threshold: [("threshold", "number", REQUIRED), ("value", "number", REQUIRED), *_INPLACE],
    nn.Hardshrink: _LAMBDA, nn.Softshrink: _LAMBDA,
    nn.PReLU: [("num_parameters", "count", 1)],
    nn.Softmax2d: [], nn.Softmax: [("dim", "optional", None)], nn.LogSoftmax: [("dim", "optional", None)],
    nn.Dropout: _P, nn.Dropout1d: _P, nn.Dropout2d: _P, nn.Dropout3d: _P, nn.AlphaDropout: _P,
    nn.FeatureAlphaDropout: _P,
    nn.MaxPool1d: _MAX_POOL, nn.MaxPool2d: _MAX_POOL, nn.MaxPool3d: _MAX_POOL,
    nn.AvgPool1d: _AVG_POOL, nn.AvgPool2d: _AVG_POOL_ND, nn.AvgPool3d: _AVG_POOL_ND,
    nn.AdaptiveAvgPool1d: _OUTPUT, nn.AdaptiveAvgPool2d: _OUTPUT, nn.AdaptiveAvgPool3d: _OUTPUT,
    nn.AdaptiveMaxPool1d: _OUTPUT, nn.AdaptiveMaxPool2d: _OUTPUT, nn.AdaptiveMaxPool3d: _OUTPUT,
    nn.Flatten: [("start_dim", "whole", 1), ("end_dim", "whole", -1)],
    nn.Upsample: [*_SCALED, ("mode", "choice", "nearest"), ("align_corners", "flag or none", None)],
    nn.UpsamplingNearest2d: _SCALED, nn.UpsamplingBilinear2d: _SCALED,
    nn.RMSNorm: [
        ("normalized_shape", "sizes", REQUIRED), ("eps", "momentum", None), ("elementwise_affine", "flag", True),
    ],
    nn.LPPool1d: _LP_POOL, nn.LPPool2d: _LP_POOL, nn.LPPool3d: _LP_POOL,
    **{kind: [("padding", "widths", REQUIRED)] for kind in sorted(ops.PADS, key=lambda kind: kind.__name__)},
    nn.ConstantPad1d: _CONSTANT_PAD, nn.ConstantPad2d: _CONSTANT_PAD, nn.ConstantPad3d: _CONSTANT_PAD,
    nn.PixelShuffle: [("upscale_factor", "side", REQUIRED)],
    nn.PixelUnshuffle: [("downscale_factor", "side", REQUIRED)],
    nn.ChannelShuffle: [("groups", "count", REQUIRED)],
    nn.Unflatten: [("dim", "whole", REQUIRED), ("unflattened_size", "split", REQUIRED)],
}  # fmt: skip
MODULE_NAMES = {kind.__name__: kind for kind in MODULES}

CHOICES = frozenset({
    "zeros", "reflect", "replicate", "circular", "same", "valid", "none", "tanh", "nearest", "linear", "bilinear",
    "bicubic", "trilinear", "area", "nearest-exact", "constant", "shape", "floor", "trunc",
})  # fmt: skip
"""Every string that a setting or an argument may be."""

FUNCTIONS: dict[Any, str] = {
    **ops.CHANNELWISE_FUNCTIONS, **ops.SCALAR_FUNCTIONS, **ops.ADD_FUNCTIONS, **ops.SUB_FUNCTIONS,
    **ops.PRODUCT_FUNCTIONS, **ops.COUNT_FUNCTIONS, **ops.CAT_FUNCTIONS, **ops.SPLIT_FUNCTIONS,
    **ops.VIEW_FUNCTIONS, **ops.MOVE_FUNCTIONS, **ops.PIXEL_SHUFFLE_FUNCTIONS, **ops.PIXEL_UNSHUFFLE_FUNCTIONS,
    **ops.FLATTEN_FUNCTIONS, **ops.MEAN_FUNCTIONS, **ops.PAD_FUNCTIONS, **ops.INDEX_FUNCTIONS,
    getattr: "getattr", operator.matmul: "operator.matmul", torch.stack: "torch.stack", torch.sum: "torch.sum",
    torch.matmul: "torch.matmul", torch.softmax: "torch.softmax", F.softmax: "F.softmax",
    F.log_softmax: "F.log_softmax", torch.log_softmax: "torch.log_softmax",
    F.normalize: "F.normalize", F.layer_norm: "F.layer_norm",
}  # fmt: skip
FUNCTION_NAMES = {name: function for function, name in FUNCTIONS.items()}
METHODS = (
    ops.ACTIVATION_METHODS | ops.SAME_METHODS | ops.ADD_METHODS | ops.SUB_METHODS | ops.PRODUCT_METHODS
    | ops.RESHAPE_METHODS | ops.VIEW_METHODS
    | frozenset({"index_select", "mean", "sum", "size", "dim", "matmul", "softmax", "log_softmax", "amax"})
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Architecture:
    """A checked architecture: ``content`` is what the file holds, and nothing in it is left to believe."""

    content: Mapping[str, Any]

    @property
    def modules(self) -> Mapping[str, Mapping[str, Any]]:
        """The layers by qualified name: each has a type, settings and a dtype."""
        found: Mapping[str, Mapping[str, Any]] = self.content["modules"]
        return found

    @property
    def indices(self) -> Mapping[str, int]:
        """The index tensors that the operations read, by name, and how long each is."""
        found: Mapping[str, int] = self.content.get("indices", {})
        return found

    @property
    def tensors(self) -> Mapping[str, Mapping[str, Any]]:
        """The parameters and buffers that operations read by themselves, by name: kind, shape and dtype."""
        found: Mapping[str, Mapping[str, Any]] = self.content.get("tensors", {})
        return found

    @property
    def nodes(self) -> list[Mapping[str, Any]]:
        """The operations in order."""
        found: list[Mapping[str, Any]] = self.content["nodes"]
        return found


def describe(who: str, model: fx.GraphModule) -> Architecture:
    """Return the architecture of ``model``.

    Raises
    ------
    ValueError
        If it uses an operation, setting or name that the format does not hold; the message names it.
    """
    modules: dict[str, Any] = {}
    for node in model.graph.nodes:
        if node.op == "call_module":
            name = str(node.target)
            modules[name] = _describe_module(who, name, model.get_submodule(name))
    nodes = [_describe_node(who, node) for node in model.graph.nodes]
    content = {"format": FORMAT, "version": VERSION, "modules": modules, "nodes": nodes}
    indices, tensors = _describe_tensors(who, model, modules)
    content |= {"indices": indices} if indices else {}
    content |= {"tensors": tensors} if tensors else {}
    return check(who, content)


def _describe_tensors(
    who: str, model: fx.GraphModule, modules: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the index tensors that operations read, each with its length, and the other tensors that they read."""
    indices: dict[str, int] = {}
    tensors: dict[str, Any] = {}
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for node in model.graph.nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        tensor = parameters.get(name, buffers.get(name))
        dtype = str(getattr(tensor, "dtype", "")).removeprefix("torch.")
        if tensor is None or dtype not in CODES or name.rpartition(".")[0] in modules:
            raise ValueError(f"{who}: {node.name} reads {name} directly, which the slim format does not hold.")
        indexes = all(user.target in ops.INDEX_FUNCTIONS and user.args[2] is node for user in node.users)
        if indexes and dtype == "int64" and tensor.ndim == 1:
            indices[name] = len(tensor)
        else:
            kind = "parameter" if name in parameters else "buffer"
            tensors[name] = {"kind": kind, "shape": list(tensor.shape), "dtype": dtype}
    return indices, tensors


def _describe_module(who: str, name: str, module: Any) -> dict[str, Any]:
    kind = type(module)
    if kind not in MODULES:
        raise ValueError(f"{who}: {name} is a {kind.__name__}, which the slim format does not hold.")
    if change := graphs.is_changed(module):
        raise ValueError(f"{who}: {name} {change}, which the slim format does not hold.")
    if odd := _unwritable(module):
        raise ValueError(f"{who}: {name} {odd}, which the slim format does not hold.")
    settings: dict[str, Any] = {}
    for setting, sort, default in MODULES[kind]:
        value = getattr(module, setting) is not None if sort == "present" else getattr(module, setting)
        value = list(value) if isinstance(value, (tuple, torch.Size)) else value
        implied = settings.get("kernel_size") if setting == "stride" and default is None else default  # a pool's stride
        if default is REQUIRED or value not in (default, implied):
            settings[setting] = value
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in module.parameters()}
    dtypes |= {str(b.dtype).removeprefix("torch.") for b in module.buffers() if b.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(f"{who}: {name} holds tensors of several types, {sorted(dtypes)}; convert it to one.")
    return {"type": kind.__name__, "settings": settings, **({"dtype": dtypes.pop()} if dtypes else {})}


def _unwritable(module: Any) -> str:
    """Return what a module does that no setting in the table says, or nothing."""
    if getattr(module, "return_indices", False):
        return "returns indices"
    if type(module) in ops.NORMS | ops.GROUP_NORMS and module.affine and module.bias is None:
        return "has a weight and no bias"
    return "has its scale factor recomputed" if getattr(module, "recompute_scale_factor", None) else ""


def _describe_node(who: str, node: fx.Node) -> dict[str, Any]:
    described: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "call_function":
        if node.target not in FUNCTIONS:
            title = getattr(node.target, "__name__", str(node.target))
            raise ValueError(f"{who}: {node.name} calls {title}, which the slim format does not hold.")
        described["target"] = FUNCTIONS[node.target]
    elif node.op != "output":
        described["target"] = str(node.target)
    described["args"] = [_encoded(who, node, arg) for arg in node.args]
    described["kwargs"] = {key: _encoded(who, node, arg) for key, arg in node.kwargs.items()}
    return described


def _encoded(who: str, node: fx.Node, value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (tuple, torch.Size)):
        return {"tuple": [_encoded(who, node, item) for item in value]}
    if isinstance(value, list):
        return [_encoded(who, node, item) for item in value]
    if isinstance(value, slice):
        return {"slice": [_encoded(who, node, item) for item in (value.start, value.stop, value.step)]}
    if value is ...:
        return {"ellipsis": []}
    if isinstance(value, dict):
        return {"dict": [[key, _encoded(who, node, item)] for key, item in value.items()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(
        f"{who}: {node.name} has an argument of type {type(value).__name__}, which the format does not hold."
    )


def check(who: str, content: Mapping[str, Any]) -> Architecture:
    """Return ``content`` as an architecture after checking every name, type and range in it.

    Raises
    ------
    ValueError
        If anything in it is not what the format allows.
    """
    modules, nodes, indices = content.get("modules"), content.get("nodes"), content.get("indices", {})
    tensors = content.get("tensors", {})
    known = set(content) - {"indices", "tensors"} == {"format", "version", "modules", "nodes"}
    if not known or not (isinstance(modules, dict) and isinstance(indices, dict) and isinstance(tensors, dict)):
        raise ValueError(
            f"{who}: the architecture must hold format, version, modules, nodes, perhaps indices and tensors, and "
            "nothing else."
        )
    if not isinstance(nodes, list) or not 1 <= len(nodes) <= MAX_NODES or len(modules) > MAX_MODULES:
        raise ValueError(f"{who}: the architecture must have 1 to {MAX_NODES} nodes and at most {MAX_MODULES} modules.")
    for name, module in modules.items():
        _check_path(who, name, modules)
        _check_module(who, name, module)
    for name, size in indices.items():
        _check_path(who, name, {})
        if name in {path.partition(".")[0] for path in modules} or "." in name or name[0].isdigit():
            raise ValueError(f"{who}: the index name {name!r} is taken or no variable.")
        if not is_whole(size, 1):
            raise ValueError(
                f"{who}: the index {name!r} must have a length from 1 to {MAX_COUNT}; got {str(size)[:80]}."
            )
    taken = [*modules, *indices, *tensors]
    above = {path.rpartition(".")[0] for path in _with_parents(taken)}
    if len(indices) + len(tensors) > MAX_MODULES:
        raise ValueError(f"{who}: the architecture must have at most {MAX_MODULES} tensors.")
    for name, tensor in tensors.items():
        _check_tensor(who, name, tensor, {*modules, *indices}, above)
        _check_path(who, name, tensors)
    kinds: dict[str, calls.Kind] = {}
    for i, node in enumerate(nodes):
        _check_node(who, node, kinds, modules, {*indices, *tensors}, last=i == len(nodes) - 1)
    _check_uses(who, nodes, modules, indices, tensors)
    inputs = [node["target"] for node in nodes if node["op"] == "placeholder"]
    others = kinds.keys() - {node["name"] for node in nodes if node["op"] == "placeholder"}
    if len(set(inputs)) != len(inputs) or others & set(inputs) or _RESERVED & set(inputs):
        raise ValueError(f"{who}: the names of the inputs must be their own; got {inputs[:8]}.")
    return Architecture(content)


def _with_parents(paths: Iterable[str]) -> set[str]:
    """Return the paths, and all that they lie under."""
    found: set[str] = set()
    for path in paths:
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def kinds(architecture: Architecture) -> Mapping[str, calls.Kind]:
    """Return what every operation of a checked architecture yields, by name."""
    found: dict[str, calls.Kind] = {}
    for node in architecture.nodes:
        kind = _kind(node["op"], node.get("target", "output"), node["args"], node["kwargs"], found)
        found[node["name"]] = kind or calls.TENSOR
    return found


def _check_tensor(who: str, name: str, tensor: Any, taken: Collection[str], above: Collection[str]) -> None:
    """Refuse a parameter or buffer outside of layers whose name, kind, shape or dtype cannot be."""
    _check_path(who, name, taken)
    if name in taken or name in above or name.rpartition(".")[2][0].isdigit():
        raise ValueError(f"{who}: the tensor name {name!r} is taken or no variable.")
    if not isinstance(tensor, dict) or set(tensor) != {"kind", "shape", "dtype"}:
        raise ValueError(f"{who}: the tensor {name!r} must have a kind, a shape and a dtype.")
    kind, shape, dtype = tensor["kind"], tensor["shape"], tensor["dtype"]
    dtypes: Collection[str] = CODES if kind == "buffer" else DTYPES
    if kind not in ("parameter", "buffer") or not isinstance(dtype, str) or dtype not in dtypes:
        raise ValueError(f"{who}: the tensor {name!r} is a {str(kind)[:40]!r} of {str(dtype)[:40]!r}, which it cannot.")
    sizes = isinstance(shape, list) and len(shape) <= 8 and all(is_whole(one, 1) for one in shape)
    if not sizes or math.prod(shape) > MAX_NUMBER:
        raise ValueError(f"{who}: the tensor {name!r} has the shape {str(shape)[:80]}, which it cannot.")


def _check_uses(
    who: str, nodes: list[Any], modules: Collection[str], names: Mapping[str, Any], tensors: Mapping[str, Any]
) -> None:
    """Refuse what nothing uses, an index read by other than indexed operations, and one of those without an index."""
    if unused := set(modules) - {node["target"] for node in nodes if node["op"] == "call_module"}:
        raise ValueError(f"{who}: the module {min(unused)!r} is called by nothing.")
    read = {node["target"] for node in nodes if node["op"] == "get_attr"}
    if unread := set(names) - read:
        raise ValueError(f"{who}: the index {min(unread)!r} is read by nothing.")
    if unread := set(tensors) - read:
        raise ValueError(f"{who}: the tensor {min(unread)!r} is read by nothing.")
    indices = {node["name"] for node in nodes if node["op"] == "get_attr" and node["target"] in names}
    for node in nodes:
        indexes = node["op"] == "call_function" and node["target"] in _INDEXED
        if indexes and node["args"][2]["node"] not in indices:
            raise ValueError(f"{who}: the node {node['name']!r} needs an index as its third argument.")
        others = [arg for i, arg in enumerate(node["args"]) if not (indexes and i == 2)]
        if not indices.isdisjoint(_reads([*others, *node["kwargs"].values()])):
            raise ValueError(f"{who}: the node {node['name']!r} reads an index, which only {sorted(_INDEXED)} may.")


def _reads(value: Any) -> list[str]:
    """Return the name of every node that an argument reads."""
    if isinstance(value, dict):
        inner = next(iter(value.values()))
        return [inner] if "node" in value else _reads(inner)
    return [name for item in value for name in _reads(item)] if isinstance(value, list) else []


def _check_name(who: str, name: str) -> None:
    """Refuse what could be more than a name, and names that Python means something by."""
    graphs.check_name(who, name)
    if name.startswith("__"):
        raise ValueError(f"{who}: names must not begin with two underscores; got {name!r}. Rename it.")


def _check_path(who: str, path: str, modules: Collection[str]) -> None:
    parts = path.split(".")
    if len(parts) > MAX_DEPTH:
        raise ValueError(f"{who}: the module name {path[:140]!r} is nested too deep.")
    for i, part in enumerate(parts):
        _check_name(who, part)
        if hasattr(nn.ModuleDict if i else fx.GraphModule, part) or part == "training":
            raise ValueError(f"{who}: the module name {path!r} hides what every module has. Rename it.")
    for i in range(1, len(parts)):
        if ".".join(parts[:i]) in modules:
            raise ValueError(f"{who}: {'.'.join(parts[:i])!r} is a layer and cannot hold {path!r}.")


def _check_module(who: str, name: str, module: Any) -> None:
    if not isinstance(module, dict) or not {"type", "settings"} <= set(module) <= {"type", "settings", "dtype"}:
        raise ValueError(f"{who}: the module {name!r} must have a type, settings and perhaps a dtype.")
    if not isinstance(module["type"], str) or module["type"] not in MODULE_NAMES:
        raise ValueError(f"{who}: {name!r} is of type {module['type']!r}, which the slim format does not hold.")
    if "dtype" in module and (not isinstance(module["dtype"], str) or module["dtype"] not in DTYPES):
        raise ValueError(f"{who}: {name!r} has the dtype {module['dtype']!r}; it must be one of {sorted(DTYPES)}.")
    settings, table = module["settings"], MODULES[MODULE_NAMES[module["type"]]]
    kinds = {setting: sort for setting, sort, _ in table}
    needed = {setting for setting, _, default in table if default is REQUIRED}
    if not isinstance(settings, dict) or not needed <= set(settings) <= set(kinds):
        raise ValueError(f"{who}: {name!r} must have the settings of a {module['type']}: {', '.join(kinds)}.")
    for setting, value in settings.items():
        if not _KINDS[kinds[setting]](value):
            raise ValueError(f"{who}: {name!r} has {setting} = {repr(value)[:80]}, which is no possible value.")


def _is_list(value: Any, low: int, high: int = MAX_SIDE, most: int = 8, least: int = 1) -> bool:
    return isinstance(value, list) and least <= len(value) <= most and all(is_whole(one, low, high) for one in value)


def _is_side(value: Any, low: int) -> bool:
    return is_whole(value, low, MAX_SIDE) or _is_list(value, low, most=3)


def _is_choice(value: Any) -> bool:
    return isinstance(value, str) and value in CHOICES


def _is_output(value: Any) -> bool:
    listed = isinstance(value, list) and 1 <= len(value) <= 3
    return all(one is None or is_whole(one, 1, MAX_SIDE) for one in (value if listed else [value]))


def _is_scale(value: Any) -> bool:
    listed = isinstance(value, list) and 1 <= len(value) <= 3
    return all(is_number(one) and 0 < one <= MAX_SCALE for one in (value if listed else [value]))


def _are_sides(dims: int) -> Callable[[Any], bool]:
    return lambda value: _is_list(value, 1, most=dims, least=dims)


def _are_margins(dims: int) -> Callable[[Any], bool]:
    return lambda value: _is_list(value, 0, most=dims, least=dims)


def _are_padding(dims: int) -> Callable[[Any], bool]:
    return lambda value: _is_list(value, 0, most=dims, least=dims) or value in ("same", "valid")


_KINDS: dict[str, Callable[[Any], bool]] = {
    "count": lambda value: is_whole(value, 1),
    "side": lambda value: is_whole(value, 1, MAX_SCALE),
    "whole": is_whole,
    "optional": lambda value: value is None or is_whole(value),
    "size": lambda value: value is None or _is_side(value, 0),
    "sizes": lambda value: _is_list(value, 1, MAX_COUNT),
    "split": lambda value: _is_list(value, -1, MAX_COUNT),
    **{f"sides {dims}": _are_sides(dims) for dims in (1, 2, 3)},
    **{f"margins {dims}": _are_margins(dims) for dims in (1, 2, 3)},
    **{f"padding {dims}": _are_padding(dims) for dims in (1, 2, 3)},
    "widths": lambda value: _is_list(value, -MAX_SIDE),
    "output": _is_output,
    "scale": lambda value: value is None or _is_scale(value),
    "number": is_number,
    "momentum": lambda value: value is None or is_number(value),
    "flag": lambda value: type(value) is bool,
    "flag or none": lambda value: value is None or type(value) is bool,
    "present": lambda value: type(value) is bool,
    "choice": _is_choice,
}


def _check_node(
    who: str, node: Any, kinds: dict[str, calls.Kind], modules: Mapping[str, Any], tensors: Collection[str], last: bool
) -> None:
    if not isinstance(node, dict) or not {"name", "op", "args", "kwargs"} <= set(node) <= {
        "name", "op", "target", "args", "kwargs",
    }:  # fmt: skip
        raise ValueError(f"{who}: a node must have a name, an op, args, kwargs and perhaps a target.")
    name, op, target = node["name"], node["op"], node.get("target", "output")
    if not isinstance(name, str) or not isinstance(op, str) or not isinstance(target, str):
        raise ValueError(f"{who}: the name, op and target of a node must be text.")
    _check_name(who, name)
    if name in kinds or name[0].isdigit() or name in _RESERVED:
        raise ValueError(f"{who}: the node name {name!r} is taken or no variable.")
    targets: dict[str, Collection[str]] = {
        "placeholder": (target,), "call_module": modules, "call_function": FUNCTION_NAMES, "call_method": METHODS,
        "get_attr": tensors, "output": () if "target" in node else (target,),
    }  # fmt: skip
    if target not in targets.get(op, ()) or last != (op == "output"):
        raise ValueError(f"{who}: the node {name!r} has op {op[:40]!r} with target {target[:140]!r}, which it cannot.")
    if op == "placeholder":
        _check_name(who, target)
    if not isinstance(node["args"], list) or not isinstance(node["kwargs"], dict):
        raise ValueError(f"{who}: the arguments of {name!r} are malformed.")
    if len(node["args"]) > _MAX_ARGUMENTS or len(node["kwargs"]) > _MAX_ARGUMENTS:
        raise ValueError(f"{who}: the node {name!r} has more than {_MAX_ARGUMENTS} arguments.")
    for key in node["kwargs"]:
        _check_name(who, key)
    for value in [*node["args"], *node["kwargs"].values()]:
        _check_value(who, name, value, kinds, op == "output", 0)
    kind = _kind(op, target, node["args"], node["kwargs"], kinds)
    if kind is None:
        raise ValueError(f"{who}: the node {name!r} has arguments that {op} {target!r} cannot take.")
    kinds[name] = kind


def _kind(
    op: str, target: str, args: list[Any], kwargs: dict[str, Any], kinds: Mapping[str, calls.Kind]
) -> calls.Kind | None:
    """Return what a node yields, or ``None`` if it cannot take these arguments."""
    if op in ("placeholder", "output", "get_attr"):
        most = {"placeholder": 1, "output": 1, "get_attr": 0}[op]
        fits = not kwargs and (op == "output") <= len(args) <= most
        return calls.TENSOR if fits and (op != "placeholder" or not _reads(args)) else None
    if op == "call_module":
        return calls.fits("module", args, kwargs, kinds)
    if op == "call_function" and target in _INDEXED:
        placed = len(args) == _INDEXED[target] and is_whole(args[1], 1, 4) and not kwargs
        return calls.fits(target, args, kwargs, kinds) if placed else None
    return calls.fits(f".{target}" if op == "call_method" else target, args, kwargs, kinds)


_INDEXED = {"torch.index_add": 4, "torch.index_select": 3}
_LENGTHS = {"slice": 3, "ellipsis": 0}
_MAX_ARGUMENTS = 64
_RESERVED = frozenset({"self", "torch", "F", "nn", "operator", "getattr", "slice", "Path", "load_file", "device"})


def _check_value(who: str, name: str, value: Any, seen: Collection[str], names: bool, depth: int) -> None:
    """Check one argument; ``names`` lets an output's dictionary have any plain name as a key."""
    if depth > _NESTING:
        raise ValueError(f"{who}: the arguments of {name!r} are nested too deep.")
    items: list[Any] = []
    if isinstance(value, list):
        items = value
    elif isinstance(value, dict) and len(value) == 1:
        kind, inner = next(iter(value.items()))
        if kind == "node" and isinstance(inner, str) and inner in seen:
            return
        pairs = kind == "dict" and names and isinstance(inner, list)
        if pairs and all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in inner):
            for key, _ in inner:
                _check_name(who, key)
            items = [item for _, item in inner]
        elif isinstance(inner, list) and (kind == "tuple" or _LENGTHS.get(kind) == len(inner)):
            items = inner
        else:
            raise ValueError(f"{who}: {name!r} has a malformed argument, or one that is not computed before it.")
    elif not (value is None or type(value) is bool or is_number(value) or _is_choice(value)):
        raise ValueError(f"{who}: {name!r} has the argument {repr(value)[:80]}, which is no possible value.")
    if len(items) > _MAX_ITEMS:
        raise ValueError(f"{who}: {name!r} has an argument of more than {_MAX_ITEMS} items.")
    for item in items:
        _check_value(who, name, item, seen, names, depth + 1)


def build(who: str, architecture: Architecture) -> fx.GraphModule:
    """Return the network of a checked architecture, with tensors that have shapes and no memory.

    Raises
    ------
    ValueError
        If torch refuses the settings of a layer, or the operations do not make a graph.
    """
    parts: dict[str, Any] = {}
    for name, module in architecture.modules.items():
        parts[name] = _built(who, name, module)
    for name, size in architecture.indices.items():
        parts[name] = torch.empty(size, dtype=torch.int64, device="meta")
    for name, tensor in architecture.tensors.items():
        made = torch.empty(tensor["shape"], dtype=DTYPES.get(tensor["dtype"], torch.int64), device="meta")
        parts[name] = nn.Parameter(made) if tensor["kind"] == "parameter" else made
    try:
        graph = _graph(architecture)
        code = graph.python_code("self")
    except Exception as error:
        raise ValueError(f"{who}: the operations do not make a graph ({error}).") from None
    graphs.check_source(who, code.src, {*code.globals, "getattr", "slice", "Ellipsis"})
    return fx.GraphModule(parts, graph, "SlimModel")


def check_indices(
    who: str, model: fx.GraphModule, tensors: Mapping[str, torch.Tensor], found: Mapping[fx.Node, Any]
) -> None:
    """Refuse index tensors that reach beyond what they index, or add to one place twice.

    Parameters
    ----------
    model
        A built network.
    tensors
        Its tensors by name.
    found
        What its nodes yield, from :func:`pyprune.slimrun.follow`.

    Raises
    ------
    ValueError
        If an index is out of range, or an addition's does not increase strictly.
    """
    for node in model.graph.nodes:
        if node.op == "call_function" and node.target in ops.INDEX_FUNCTIONS:
            name = str(node.args[2].target)
            index = tensors[name]
            limit = found[node.args[0]].shape[node.args[1]] if node.args[0] in found else MAX_COUNT
            if int(index.min()) < 0 or int(index.max()) >= limit:
                raise ValueError(f"{who}: {name!r} must hold numbers from 0 to {limit - 1}; it reaches beyond.")
            if node.target is torch.index_add and not bool((index.diff() > 0).all()):
                raise ValueError(f"{who}: {name!r} must increase strictly, since it says where a branch is added.")


def _graph(architecture: Architecture) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for node in architecture.nodes:
        target = node.get("target", "output")
        if node["op"] == "call_function":
            target = FUNCTION_NAMES[target]
        args = tuple(_decoded(value, nodes) for value in node["args"])
        kwargs = {key: _decoded(value, nodes) for key, value in node["kwargs"].items()}
        nodes[node["name"]] = graph.create_node(node["op"], target, args, kwargs, name=node["name"])
    return graph


def _built(who: str, name: str, module: Mapping[str, Any]) -> nn.Module:
    kind: Any = MODULE_NAMES[module["type"]]
    dtype = DTYPES[module["dtype"]] if "dtype" in module else None
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in module["settings"].items()}
    try:
        with torch.device("meta"):
            built: nn.Module = kind(**settings)
        return built if dtype is None else built.to(dtype)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{who}: {name!r} cannot be a {module['type']} ({reason}).") from None


def _decoded(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    kind, inner = next(iter(value.items()))
    if kind == "node":
        return nodes[inner]
    if kind == "dict":
        return {key: _decoded(item, nodes) for key, item in inner}
    if kind == "ellipsis":
        return ...
    items = tuple(_decoded(item, nodes) for item in inner)
    return slice(*items) if kind == "slice" else items
