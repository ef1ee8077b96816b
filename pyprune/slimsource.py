"""The architecture of a slim network as plain torch source, for people without pyprune.

pyprune writes this source and never runs it. Lines break where ruff's formatter would break them at 88 columns.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pyprune import graph as graphs
from pyprune.slimfile import MODULE_NAMES, MODULES, REQUIRED, Architecture, kinds

_WIDTH = 88
_INFIX = {
    "operator.add": "+", "operator.sub": "-", "operator.mul": "*", "operator.truediv": "/",
    "operator.floordiv": "//", "operator.matmul": "@", "operator.pow": "**",
}  # fmt: skip
_PLAIN_ARGUMENTS: Mapping[str, Any] = {
    "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False, "inplace": False,
    "mode": "constant", "value": None, "scale_factor": None, "align_corners": None,
    "recompute_scale_factor": None, "antialias": False,
}  # fmt: skip
"""Arguments of F.* at their defaults, which torch.fx writes out and a person would not."""

_SAME_ALONG_DIMENSIONS = frozenset({"kernel_size", "stride", "padding", "dilation", "output_padding"})
_NAMES = frozenset({
    "torch", "nn", "F", "operator", "Path", "Any", "load_file", "super", "str", "slice", "getattr", "float", "int",
    "__file__", "__getitem__", "dict", "zip", "map",
})  # fmt: skip
_IMPORTS = frozenset({"operator", "pathlib", "typing", "torch", "torch.nn.functional", "safetensors.torch"})


def write_source(who: str, architecture: Architecture) -> str:
    """Return Python source with a class ``SlimModel`` and a function ``load``; it needs torch and safetensors.

    Raises
    ------
    ValueError
        If the source would hold anything but layers and operations on tensors.
    """
    forward = _forward(architecture)
    body = "\n".join(forward)
    layers = [*_layers(architecture), *_indices(architecture), *_tensors(architecture)]
    source = "\n".join([*_head(body, layers, architecture), *layers, "", *forward, "", "", *_LOAD, ""])
    graphs.check_source(who, source, _NAMES, _IMPORTS)
    return source


_LOAD = '''
def load(folder: str | Path = Path(__file__).parent) -> SlimModel:
    """Return the network in eval mode, with the weights that lie in ``folder``."""
    with torch.device("meta"):
        model = SlimModel()
    weights = load_file(Path(folder) / "model.safetensors")
    aligned = dict(zip(weights, map(torch.clone, weights.values()), strict=True))
    model.load_state_dict(aligned, assign=True)
    return model.eval()
'''.strip().splitlines()


_NESTED = '''
class Layers(nn.ModuleDict):
    """Layers by name, of types that only the name tells."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)
'''.strip().splitlines()


def _head(body: str, layers: list[str], architecture: Architecture) -> list[str]:
    """Return the docstring, the imports that are used, and the start of the class."""
    nested = any("Layers(" in line for line in layers)
    imports = ["import operator"] if "operator." in body else []
    imports += ["from pathlib import Path"]
    imports += ["from typing import Any"] if nested or "Any" in body else []
    functional = ["import torch.nn.functional as F"] if "F." in body else []
    read = {node["target"] for node in architecture.nodes if node["op"] == "get_attr" and "." not in node["target"]}
    tensors = [f"    {name}: torch.Tensor" for name in (*architecture.indices, *architecture.tensors) if name in read]
    return [
        '"""A slim network, written by pyprune; it needs torch and safetensors."""', "",
        *imports, "", "import torch", *functional,
        "from safetensors.torch import load_file", "from torch import nn", "", "",
        *([*_NESTED, "", ""] if nested else []),
        "class SlimModel(nn.Module):", '    """The layers and what happens between them."""', "",
        *tensors, *([""] if tensors else []),
        "    def __init__(self) -> None:", "        super().__init__()",
    ]  # fmt: skip


def _returns(architecture: Architecture) -> str:
    output = architecture.nodes[-1]["args"]
    return "torch.Tensor" if len(output) == 1 and isinstance(output[0], dict) and "node" in output[0] else "Any"


def _layers(architecture: Architecture) -> list[str]:
    """Return the lines that make the layers, containers as ``Layers``."""
    tree: dict[str, Any] = {}
    for path, module in architecture.modules.items():
        *parents, leaf = path.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[leaf] = _constructor(module)
    for path in architecture.tensors:
        place = tree
        for parent in path.split(".")[:-1]:
            place = place.setdefault(parent, {})
    lines: list[str] = []
    for name, layer in tree.items():
        if name.isdigit():
            lines += _numbered(name, layer)
        else:
            lines += _assigned(f"self.{name} = ", layer, 8, "")
    return lines


def _indices(architecture: Architecture) -> list[str]:
    """Return the lines that make room for the index tensors."""
    lines: list[str] = []
    for name, size in architecture.indices.items():
        arguments = [f'"{name}"', f"torch.empty({size}, dtype=torch.int64)"]
        lines += _call("        self.register_buffer", arguments, 8)
    return lines


def _tensors(architecture: Architecture) -> list[str]:
    """Return the lines that make room for the parameters and buffers that operations read by themselves."""
    lines: list[str] = []
    for path, tensor in architecture.tensors.items():
        owner, _, leaf = path.rpartition(".")
        start = f'        self.get_submodule("{owner}")' if owner else "        self"
        empty = f"torch.empty({', '.join(map(str, tensor['shape'])) or '()'})"
        if tensor["kind"] == "parameter":
            empty = f"nn.Parameter({empty})"
        lines += _call(f"{start}.register_{tensor['kind']}", [f'"{leaf}"', empty], 8)
    return lines


_Constructor = tuple[str, list[str]]


def _numbered(name: str, layer: Any) -> list[str]:
    """Return the lines that put a layer under a number, which cannot be an attribute."""
    if isinstance(layer, tuple):
        line = f'        self.add_module("{name}", {layer[0]}({", ".join(layer[1])}))'
        if len(line) <= _WIDTH:
            return [line]
    inner = _assigned("", layer, 12, ",")
    return ["        self.add_module(", f'            "{name}",', *inner, "        )"]


def _assigned(prefix: str, layer: Any, indent: int, suffix: str) -> list[str]:
    """Return ``prefix`` and the layer, or the container and all that it holds, as formatted lines."""
    space = " " * indent
    if isinstance(layer, tuple):
        return _call(f"{space}{prefix}{layer[0]}", layer[1], indent, suffix)
    if not layer:
        return [f"{space}{prefix}Layers(){suffix}"]
    lines = [f"{space}{prefix}Layers(", f"{space}    {{"]
    for name, inner in layer.items():
        lines += _assigned(f'"{name}": ', inner, indent + 8, ",")
    return [*lines, f"{space}    }}", f"{space}){suffix}"]


def _call(start: str, arguments: list[str], indent: int, suffix: str = "") -> list[str]:
    """Return a call on one line, or with its arguments on one line or one each, whatever fits."""
    joined = ", ".join(arguments)
    line = f"{start}({joined}){suffix}"
    if len(line) <= _WIDTH or not arguments:
        return [line]
    space = " " * (indent + 4)
    if len(space + joined) <= _WIDTH:
        inner = [space + joined]
    else:
        inner = [line for one in arguments for line in _spread("", one, indent + 4, ",")]
    return [f"{start}(", *inner, f"{' ' * indent}){suffix}"]


def _spread(start: str, text: str, indent: int, suffix: str = "") -> list[str]:
    """Return an expression on one line, or a list, tuple or dictionary with an item a line where that is too long."""
    space = " " * indent
    line = f"{space}{start}{text}{suffix}"
    if len(line) <= _WIDTH or text[:1] not in "[({" or text[-1:] not in "])}":
        return [line]
    items = [one for item in _parts(text[1:-1]) for one in _spread("", item, indent + 4, ",")]
    return [f"{space}{start}{text[0]}", *items, f"{space}{text[-1]}{suffix}"]


def _parts(text: str) -> list[str]:
    """Return what the commas outside of brackets divide; words in quotes hold neither."""
    found, depth, begin = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            found.append(text[begin:i].strip())
            begin = i + 1
    return [one for one in (*found, text[begin:].strip()) if one]


def _constructor(module: Mapping[str, Any]) -> _Constructor:
    """Return the type and the arguments of a layer: required ones by position, kernels excepted."""
    arguments = []
    for name, _, default in MODULES[MODULE_NAMES[module["type"]]]:
        if name in module["settings"]:
            value = module["settings"][name]
            if name in _SAME_ALONG_DIMENSIONS and isinstance(value, list) and len(set(value)) == 1:
                value = value[0]
            text = _literal(tuple(value) if isinstance(value, list) else value)
            by_position = default is REQUIRED and name != "kernel_size"
            arguments.append(text if by_position else f"{name}={text}")
    return f"nn.{module['type']}", arguments


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        inner = ", ".join(_literal(item) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def _forward(architecture: Architecture) -> list[str]:
    """Return the lines of forward; a value that nothing else reads gives its variable to the next of its kind."""
    returns = _returns(architecture)
    inputs, lines, result = _body(architecture, "")
    if returns == "torch.Tensor":
        inputs, lines, result = _body(architecture, result)
    return [*_signature(inputs, returns), *lines, *_spread("return ", result, 8)]


def _body(architecture: Architecture, typed: str) -> tuple[list[str], list[str], str]:
    """Return the inputs, the lines and what is returned; where ``typed`` gets its first value, its type stands too."""
    uses: Counter[str] = Counter()
    for node in architecture.nodes:
        uses.update(_reads([*node["args"], *node["kwargs"].values()]))
    yields = kinds(architecture)
    variables: dict[str, str] = {}
    inputs, lines, assigned, result = ["self"], [], {"self"}, "None"
    for node in architecture.nodes:
        if node["op"] == "placeholder":
            default = f" = {_text(node['args'][0], variables)}" if node["args"] else ""
            variables[node["name"]] = node["target"]
            inputs.append(f"{node['target']}: {'Any' if default else 'torch.Tensor'}{default}")
            assigned.add(node["target"])
            continue
        if node["op"] == "get_attr":
            variables[node["name"]] = _read(node["target"], architecture)
            continue
        if node["op"] == "output":
            result = _text(node["args"][0], variables)
            continue
        start, arguments = _expression(node, variables)
        first = next(iter(_reads(node["args"][:1])), "")
        reused = variables[first] if uses[first] == 1 and yields[first].name == yields[node["name"]].name else ""
        variable = reused if reused.isidentifier() else node["name"]
        variables[node["name"]] = variable
        kind = ": torch.Tensor" if variable == typed and variable not in assigned else ""
        assigned.add(variable)
        start = f"        {variable}{kind} = {start}"
        lines += [start] if arguments is None else _call(start, arguments, 8)
    return inputs, lines, result


def _read(path: str, architecture: Architecture) -> str:
    """Return how an operation reads a tensor by itself."""
    kind = architecture.tensors[path]["kind"] if "." in path else ""
    return f'self.get_{kind}("{path}")' if kind else f"self.{path}"


def _signature(inputs: list[str], returns: str) -> list[str]:
    line = f"    def forward({', '.join(inputs)}) -> {returns}:"
    if len(line) <= _WIDTH:
        return [line]
    return ["    def forward(", *(f"        {one}," for one in inputs), f"    ) -> {returns}:"]


def _reads(values: Any) -> list[str]:
    """Return the names of the nodes in an encoded argument, each as often as it is read."""
    if isinstance(values, list):
        return [name for value in values for name in _reads(value)]
    if not isinstance(values, dict):
        return []
    kind, inner = next(iter(values.items()))
    if kind == "node":
        return [inner]
    return _reads([item for _, item in inner] if kind == "dict" else inner)


def _expression(node: Mapping[str, Any], variables: Mapping[str, str]) -> tuple[str, list[str] | None]:
    """Return what a node computes: a function and its arguments, or a whole expression and ``None``."""
    target, kwargs = node["target"], node["kwargs"]
    if target.startswith("F."):
        kwargs = {key: v for key, v in kwargs.items() if key not in _PLAIN_ARGUMENTS or v != _PLAIN_ARGUMENTS[key]}
    arguments = [_text(value, variables) for value in node["args"]]
    named = [f"{key}={_text(value, variables)}" for key, value in kwargs.items()]
    if node["op"] == "call_module":
        return _access(target), [*arguments, *named]
    if node["op"] == "call_method":
        return f"{arguments[0]}.{target}", [*arguments[1:], *named]
    if target in _INFIX and len(arguments) == 2 and not named:
        space = "" if target == "operator.pow" else " "
        return f"{arguments[0]}{space}{_INFIX[target]}{space}{arguments[1]}", None
    if target == "operator.neg":
        return f"-{arguments[0]}", None
    if target == "operator.getitem":
        return f"{arguments[0]}[{_index(node['args'][1], variables)}]", None
    if target == "getattr":
        return f"{arguments[0]}.shape", None
    return target, [*arguments, *named]


def _access(path: str) -> str:
    first, *rest = path.split(".")
    start = f'getattr(self, "{first}")' if first.isdigit() else f"self.{first}"
    return start + "".join(f'["{part}"]' for part in rest)


def _index(value: Any, variables: Mapping[str, str]) -> str:
    """Return an index as it stands between brackets."""
    if isinstance(value, dict) and "tuple" in value and len(value["tuple"]) > 1:
        return ", ".join(_index(item, variables) for item in value["tuple"])
    if isinstance(value, dict) and "slice" in value:
        start, stop, step = ("" if item is None else _text(item, variables) for item in value["slice"])
        return f"{start}:{stop}" + (f":{step}" if step else "")
    return _text(value, variables)


def _text(value: Any, variables: Mapping[str, str]) -> str:
    """Return an argument as source."""
    if isinstance(value, list):
        return f"[{', '.join(_text(item, variables) for item in value)}]"
    if not isinstance(value, dict):
        return _literal(value)
    kind, inner = next(iter(value.items()))
    if kind == "node":
        return variables[inner]
    if kind == "ellipsis":
        return "..."
    if kind == "dict":
        return "{" + ", ".join(f"{json.dumps(key)}: {_text(item, variables)}" for key, item in inner) + "}"
    items = [_text(item, variables) for item in inner]
    if kind == "slice":
        return f"slice({', '.join(items)})"
    return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
