"""Changes to a slim folder by choices that a fuzzer makes: to its tree of JSON, its header of weights, its bytes."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from typing import Any

from pyprune import slimcalls, slimfile

Choose = Callable[[int], int]
"""A number from 0 to below its argument."""

NUMBERS = (0, 1, 2, 3, 5, 8, 64, 127, 4096, 1 << 14, 1 << 20, 1 << 31, 1 << 40, 1 << 63, 1 << 70)
WORDS = (
    "", "__class__", "eval", "class", "a;b", "../x", "x" * 200, "\ud800", "forward", "self", "shape", "zeros",
    "reflect", "same", "nearest", "bilinear", "float16", "int64", "parameter", "buffer",
)  # fmt: skip
DTYPES = ("F32", "F64", "I64", "U8", "BOOL", "F8_E4M3", "PICKLE")


def _paths(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(content, dict):
        for key, value in content.items():
            found += _paths(value, (*path, key))
    elif isinstance(content, list):
        for i, value in enumerate(content):
            found += _paths(value, (*path, i))
    return found


def _names(content: dict[str, Any]) -> list[Any]:
    """Return the names of the operations but for the last, or one that is none."""
    nodes = content.get("nodes")
    listed = nodes[:-1] if isinstance(nodes, list) else []
    return [node.get("name") for node in listed if isinstance(node, dict)] or ["x"]


def _value(choose: Choose, content: dict[str, Any]) -> Any:
    """Return a value that may stand anywhere: plausible more often than not."""
    nodes = _names(content)
    kind = choose(12)
    if kind == 0:
        return NUMBERS[choose(len(NUMBERS))]
    if kind == 1:
        return -NUMBERS[choose(len(NUMBERS))]
    if kind == 2:
        return (True, False, None, 0.5, 1.5, 1e30, 1e-30)[choose(7)]
    if kind == 3:
        return WORDS[choose(len(WORDS))]
    if kind == 4:
        return [choose(6) - 1 for _ in range(choose(5))]
    if kind == 5:
        return {"tuple": [choose(6) - 1 for _ in range(choose(5))]}
    if kind == 6:
        return {"slice": [(None, choose(9) - 4)[choose(2)] for _ in range(3)]}
    if kind == 7:
        return [{"node": nodes[choose(len(nodes))]} for _ in range(choose(4))]
    if kind == 8:
        return ({}, [], {"ellipsis": []}, {"dict": [["a", 1]]}, [[[[[[[[1]]]]]]]])[choose(5)]
    return {"node": nodes[choose(len(nodes))]}


def _node(choose: Choose, content: dict[str, Any]) -> dict[str, Any]:
    """Return an operation of the table, with arguments of about the right number."""
    targets = sorted(slimcalls.SIGNATURES)
    target = targets[choose(len(targets))]
    signature = slimcalls.SIGNATURES[target]
    op = "call_method" if target.startswith(".") else "call_module" if target == "module" else "call_function"
    modules = content.get("modules")
    names = sorted(modules) if isinstance(modules, dict) and modules else ["x"]
    plain = names[choose(len(names))] if op == "call_module" else target.removeprefix(".")
    count = signature.needed + choose(len(signature.names) - signature.needed + 2)
    nodes = _names(content)
    args = [{"node": nodes[choose(len(nodes))]}, *(_value(choose, content) for _ in range(count - 1))]
    return {"name": f"new_{choose(10_000)}", "op": op, "target": plain, "args": args, "kwargs": {}}


def _layer(choose: Choose, content: dict[str, Any]) -> dict[str, Any]:
    """Return a layer of the table with the settings that it must have."""
    kinds = sorted(slimfile.MODULE_NAMES)
    kind = kinds[choose(len(kinds))]
    settings: dict[str, Any] = {}
    for name, sort, default in slimfile.MODULES[slimfile.MODULE_NAMES[kind]]:
        if default is slimfile.REQUIRED or choose(4) == 0:
            few = 1 + choose(4)
            dims = sort.rpartition(" ")[2]
            lists = sort in ("widths", "split") or sort.split(" ")[0] in ("sides", "margins", "padding")
            settings[name] = [few] * (int(dims) if dims.isdigit() else 2 + 2 * choose(2)) if lists else few
            if sort in ("flag", "present"):
                settings[name] = bool(few % 2)
    return {"type": kind, "settings": settings}


def tree(choose: Choose, content: dict[str, Any]) -> dict[str, Any]:
    """Return the architecture after one to four changes."""
    content = copy.deepcopy(content)
    for _ in range(1 + choose(4)):
        paths = _paths(content)
        if not paths:
            return content
        *parents, last = paths[choose(len(paths))]
        place = content
        for parent in parents:
            place = place[parent]
        nodes = content.get("nodes")
        kind = choose(10)
        if kind <= 2:
            place[last] = _value(choose, content)
        elif kind == 3:
            del place[last]
        elif kind == 4 and isinstance(place, dict):
            place[WORDS[choose(len(WORDS))]] = place.pop(last)
        elif kind == 5 and isinstance(place, list) and place:
            other = choose(len(place))
            place[last], place[other] = place[other], place[last]
        elif isinstance(nodes, list) and nodes and kind in (6, 7):
            node = _node(choose, content)
            nodes.insert(len(nodes) - 1, node)
            if choose(2) and isinstance(nodes[-1], dict):
                nodes[-1]["args"] = [{"node": node["name"]}]
        elif isinstance(nodes, list) and isinstance(content.get("modules"), dict) and nodes:
            name = f"layer_{choose(1000)}"
            content["modules"][name] = _layer(choose, content)
            source = nodes[choose(len(nodes))]
            given = source.get("name", "x") if isinstance(source, dict) else "x"
            node = {"name": f"{name}_1", "op": "call_module", "target": name, "args": [{"node": given}], "kwargs": {}}
            nodes.insert(len(nodes) - 1, node)
            if choose(2) and isinstance(nodes[-1], dict):
                nodes[-1]["args"] = [{"node": node["name"]}]
    return content


def weights(choose: Choose, data: bytes) -> bytes:
    """Return the file of the weights after changes to its header or its bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    head, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = choose(8)
    if kind == 0:
        changed = bytearray(data)
        for _ in range(1 + choose(8)):
            changed[choose(len(changed))] ^= 1 << choose(8)
        return bytes(changed)
    if kind == 1:
        return data[: choose(len(data))]
    if kind == 2:
        at = 8 + length + choose(max(1, len(body)))  # the numbers: indices, NaN, subnormals
        return data[:at] + bytes(choose(256) for _ in range(min(8, len(data) - at))) + data[at + 8 :]
    names = [name for name in head if name != "__metadata__"]
    name = names[choose(len(names))]
    entry = head[name]
    if kind == 3:
        entry["dtype"] = DTYPES[choose(len(DTYPES))]
    elif kind == 4:
        entry["shape"] = [NUMBERS[choose(len(NUMBERS))] for _ in range(choose(6))]
    elif kind == 5:
        entry["data_offsets"] = [choose(len(body) + 9), choose(len(body) + 9)]
    elif kind == 6:
        head[WORDS[choose(len(WORDS))]] = head.pop(name)
    else:
        sides = [1 + choose(70) for _ in range(choose(5))]
        head["__metadata__"]["inputs"] = json.dumps([[sides, ("float32", "int64")[choose(2)]]])
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + body
