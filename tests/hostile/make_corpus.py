"""Make ``corpus.json.xz``: ``python tests/hostile/make_corpus.py``. Run when cases are added, never by the tests.

Cases lie over small valid folders. Every case is read once before it is written: one that is not refused must stand
among the harmless ones, so the list of those is what to look at.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyprune as pp
from hostile import corpus
from hostile.corpus import Case
from hostile.readers import READERS
from pyprune import slimcalls, slimfile
from pyprune.comparing import Attempt
from pyprune.types import Epoch, Plan

FROZEN = Path(__file__).resolve().parents[1] / "frozen" / "v1"
HUGE = 1 << 40
ARCHITECTURE, WEIGHTS = "architecture.json", "model.safetensors"


class Residual(nn.Module):
    """Indexed additions, paddings and a slice of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(*i, 3, padding=1) for i in ((2, 6), (6, 6), (6, 12)))
        self.last = nn.Conv2d(9, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.a(x) + x)
        x = self.b(x[:, :, ::2, ::2]) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3))
        return self.last(F.pad(x, (1, 1), "constant", 0.0)[:, 2:11]).mean((2, 3))


class Decoder(nn.Module):
    """Downwards and upwards, with a parameter of its own, counts, and an output of several parts."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(2, 8, 3, 2, 1), nn.ConvTranspose2d(4, 4, 2, 2)
        self.blocks = nn.ModuleDict({"a": nn.Sequential(nn.Upsample(scale_factor=2), nn.ZeroPad2d(1))})
        self.shuffle, self.scale = nn.PixelShuffle(2), nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = F.leaky_relu(self.down(x), 0.1)
        first, second = y.chunk(2, 1)
        z = torch.cat((self.up(first * self.scale), F.interpolate(second, size=(x.shape[2], x.shape[3]))), 1)
        z = F.interpolate(self.blocks["a"](z), scale_factor=0.5)
        n = z.size(0)
        return {"image": self.shuffle(z), "flat": z.view(n, -1)}


def _slim(model: nn.Module, plan: Plan, shape: tuple[int, ...]) -> dict[str, object]:
    slim = pp.compact(model, plan, torch.randn(shape), latency=False)
    with tempfile.TemporaryDirectory() as place:
        folder = pp.save_slim(slim, place)
        return {
            ARCHITECTURE: corpus.packed((folder / ARCHITECTURE).read_bytes()),
            WEIGHTS: corpus.packed(_ordered((folder / WEIGHTS).read_bytes())),
        }


def _ordered(data: bytes) -> bytes:
    """Return a safetensors file with its metadata in order: the library writes them in any."""
    length = struct.unpack("<Q", data[:8])[0]
    text = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def bases() -> dict[str, dict[str, object]]:
    """Return the valid files, by what they are."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 3)]
    found = {
        "chain": _slim(nn.Sequential(*layers), Plan({"0": [0, 2, 4]}), (2, 1, 8, 8)),
        "residual": _slim(Residual(), Plan({"stem": [0, 1, 3], "a": [1, 2, 5], "b": [0, 4, 5, 7, 10]}), (2, 2, 8, 8)),
        "decoder": _slim(Decoder(), Plan({}), (1, 2, 8, 8)),
    }
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        pp.History((Epoch(1, 0.1, 2.0, 1.5, 0.5, 3.0),), 1, {"seed": 0}).save(place / "history.json")
        before, after = (pp.Evaluation(np.array(told), 0.5, None, 0.9) for told in ([[3, 1], [0, 4]], [[2, 2], [1, 3]]))
        before.save(place / "evaluation.json")
        pp.fairness(before, after).save(place / "fairness.json")
        tried = Attempt(0, {"0": np.array([0, 2])}, after, before, 40, 900, {"eodd": 0.25}, {"norm": 1})
        pp.Trial(before, 60, 1200, {"0": 3}, {"l1": (tried,), "l2": (tried,)}, {"runs": 1}).save(place / "trial.json")
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)
        )
        pp.profile(model, torch.zeros(1, 1, 8, 8), latency=False).save(place / "profile.json")
        for known in ("plan.json", "ckrm.json", "width_search.json", "ranks.safetensors"):
            (place / known).write_bytes((FROZEN / known).read_bytes())
        from safetensors.torch import save_file

        save_file(model.state_dict(), place / "checkpoint")
        np.save(place / "rank.npy", np.array([1.0, 2.0, 3.5]))
        np.savez_compressed(place / "data.npz", images=np.zeros((40, 8, 8), np.uint8), labels=np.arange(40) % 2)
        for file, kind in (
            ("history.json", "history"),
            ("evaluation.json", "evaluation"),
            ("profile.json", "profile"),
            ("plan.json", "plan"),
            ("ckrm.json", "ckrm"),
            ("fairness.json", "fairness"),
            ("trial.json", "trial"),
            ("width_search.json", "width search"),
            ("ranks.safetensors", "ranks"),
            ("checkpoint", "checkpoint"),
            ("rank.npy", "rank file"),
            ("data.npz", "npz"),
        ):
            data = (place / file).read_bytes()
            found[kind] = {file: corpus.packed(_ordered(data) if kind in ("ranks", "checkpoint") else data)}
    return found


BASES = bases()


def tree(base: str) -> dict[str, Any]:
    """Return the architecture of a base, to be changed."""
    content: dict[str, Any] = json.loads(corpus.unpacked(BASES[base][ARCHITECTURE]))
    return content


def header(base: str, file: str = WEIGHTS) -> tuple[dict[str, Any], bytes]:
    """Return the header of a base's tensors, and their bytes."""
    data = corpus.unpacked(BASES[base][file])
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def tensors(head: object, data: bytes) -> object:
    """Return the bytes of a safetensors file, as the archive holds them."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return corpus.packed(struct.pack("<Q", len(text)) + text + data)


def at(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return ``content`` with another value at ``path``; ``...`` takes it out."""
    content = copy.deepcopy(content)
    *parents, last = path
    place = content
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


def slim(name: str, content: object, base: str = "chain", **more: Any) -> Case:
    """Return a case whose architecture is ``content``, a tree or text."""
    text = content if isinstance(content, str) else json.dumps(content)
    return Case(name, "slim", base, files={ARCHITECTURE: corpus.packed(text.encode())}, **more)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield every path in a tree."""
    if path:
        yield path
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield from places(content[key], (*path, key))


def node(name: str, op: str, target: str, args: list[Any], **kwargs: Any) -> dict[str, Any]:
    """Return an operation."""
    return {"name": name, "op": op, "target": target, "args": args, "kwargs": kwargs}


def ref(name: str) -> dict[str, str]:
    """Return an argument that reads a node."""
    return {"node": name}


def calls(name: str, *nodes: dict[str, Any], base: str = "decoder", output: Any = None, **more: Any) -> Case:
    """Return a case with operations before the output, which becomes the last one's result."""
    content = tree(base)
    content["nodes"][-1:] = [*nodes, {**content["nodes"][-1], "args": [output or ref(nodes[-1]["name"])]}]
    return slim(name, content, base, **more)


NAMES = {
    "dunder": "__class__",
    "dunder init": "__init__",
    "keyword": "class",
    "lambda": "lambda",
    "none": "None",
    "statement": "a;import os",
    "line break": "a\nimport os",
    "call": "eval('1')",
    "space": "a b",
    "path": "../../etc",
    "absolute": "/etc/passwd",
    "empty": "",
    "long": "a" * 129,
    "accent": "\u00e9",
    "fullwidth": "\uff41",
    "right to left": "a\u202eb",
    "nul": "a\0b",
    "brace": "{0.__class__}",
    "dollar": "$(id)",
    "comment": "a#b",
    "quote": "a'b",
    "walrus": "a:=1",
    "star": "*a",
    "assigned": "a=1",
    "surrogate": "\ud800",
}


def names() -> Iterator[Case]:
    """Names that are more than names, wherever a name may stand."""
    for word, name in NAMES.items():
        content = tree("chain")
        module = content["modules"].pop("0")
        content["modules"] = {name: module, **content["modules"]}
        content["nodes"][1]["target"] = name
        yield slim(f"module named: {word}", content, verdict="refused")
        if word not in ("dunder", "dunder init"):
            yield slim(f"node named: {word}", at(tree("chain"), ("nodes", 1, "name"), name))
        yield slim(f"input named: {word}", at(tree("chain"), ("nodes", 0, "target"), name))
        yield slim(f"keyword named: {word}", at(tree("chain"), ("nodes", 1, "kwargs"), {name: 1}))
        yield slim(f"function named: {word}", at(tree("decoder"), ("nodes", 2, "target"), name), "decoder")
        yield slim(f"index named: {word}", at(tree("residual"), ("indices", name), 2), "residual")
        entry = {"kind": "buffer", "shape": [1], "dtype": "float32"}
        yield slim(f"tensor named: {word}", at(tree("decoder"), ("tensors", name), entry), "decoder")
        head, data = header("chain")
        head[name] = head.pop("0.bias")
        yield Case(f"weights named: {word}", "slim", "chain", files={WEIGHTS: tensors(head, data)})
    for name in ("forward", "training", "children", "state_dict", "to", "0.x", "a.b.c.forward", "a..b", ".a", "a."):
        content = tree("chain")
        content["modules"][name] = content["modules"].pop("2")
        content["nodes"][3]["target"] = name
        yield slim(f"module named {name}", content)
    for name in ("self", "torch", "nn", "operator", "slice", "getattr", "device", "load_file", "7"):
        yield slim(f"node named {name}", at(tree("chain"), ("nodes", 1, "name"), name))


ODD: dict[str, Any] = {
    "2^40": HUGE,
    "2^70": 1 << 70,
    "-1": -1,
    "a fraction": 1.5,
    "true": True,
    "text": "3",
    "null": None,
    "a list": [],
    "a dict": {},
    "nested": [[3]],
    "code": "__import__('os')",
    "10^30": 1e30,
}


def settings() -> Iterator[Case]:
    """Values that no setting can have, and for every type of layer settings that it does not have."""
    where = {
        "out_channels": "0",
        "kernel_size": "0",
        "eps": "1",
        "momentum": "1",
        "affine": "1",
        "inplace": "2",
        "padding": "3",
        "dilation": "3",
        "ceil_mode": "3",
        "start_dim": "4",
        "in_features": "5",
        "bias": "5",
    }
    allowed = {
        ("eps", "-1"),
        ("eps", "a fraction"),
        ("momentum", "-1"),
        ("momentum", "a fraction"),
        ("momentum", "null"),
        ("affine", "true"),
        ("inplace", "true"),
        ("ceil_mode", "true"),
        ("start_dim", "-1"),
        ("bias", "true"),
    }
    for setting, name in where.items():
        for word, value in ODD.items():
            if (setting, word) not in allowed:
                yield slim(f"{setting} is {word}", at(tree("chain"), ("modules", name, "settings", setting), value))
    for kind, table in slimfile.MODULE_NAMES.items():
        known = {setting: sort for setting, sort, default in slimfile.MODULES[table]}
        needed = [setting for setting, _, default in slimfile.MODULES[table] if default is slimfile.REQUIRED]
        layer = {"type": kind, "settings": dict.fromkeys(needed, 1)}
        yield slim(
            f"{kind} with a device", at(tree("chain"), ("modules", "2"), {**layer, "settings": {"device": "cuda"}})
        )
        for setting in list(known)[:3]:
            odd = {**layer, "settings": {**layer["settings"], setting: "__import__('os')"}}
            yield slim(f"{kind} with {setting} of code", at(tree("chain"), ("modules", "2"), odd))
            odd = {**layer, "settings": {**layer["settings"], setting: [HUGE]}}
            yield slim(f"{kind} with {setting} of 2^40", at(tree("chain"), ("modules", "2"), odd))
    for kind in (
        "Embedding",
        "Transformer",
        "LSTM",
        "Module",
        "Sequential",
        "ModuleDict",
        "Bilinear",
        "os.system",
        "torch.nn.ReLU",
        "relu",
        "",
        "__class__",
        3,
        None,
        ["ReLU"],
        {"a": 1},
    ):
        yield slim(f"layer of type {kind!r}", at(tree("chain"), ("modules", "2", "type"), kind))
    for dtype in ("object", "complex64", "int64", "torch.float32", "F32", 32, None, [], {}, "float8_e4m3fn"):
        yield slim(f"layer of dtype {dtype!r}", at(tree("chain"), ("modules", "0", "dtype"), dtype))


def structure() -> Iterator[Case]:
    """Graphs that are none, keys too many or too few, foreign versions."""
    chain = tree("chain")
    for version in (0, 2, -1, "1", 1.0, True, None, [], 10**30):
        yield slim(f"version {version!r}", at(chain, ("version",), version))
    for kind in ("", "pyprune.plan", None, 1, [], {}):
        yield slim(f"format {kind!r}", at(chain, ("format",), kind))
    for key in list(chain):
        yield slim(f"without {key}", at(chain, (key,), ...))
    for key in ("code", "source", "__reduce__", "pickle"):
        yield slim(f"with {key}", at(chain, (key,), "import os"))
    for key in ("name", "op", "args", "kwargs", "target"):
        yield slim(f"a node without {key}", at(chain, ("nodes", 1, key), ...))
        for word, value in (
            ("null", None),
            ("a number", 7),
            ("a dict", {"a": 1}),
            ("a list of lists", [[[[[[[[1]]]]]]]]),
        ):
            yield slim(f"a node's {key} is {word}", at(chain, ("nodes", 1, key), value))
    yield slim("a node with more", at(chain, ("nodes", 1, "code"), "x"))
    for op in ("exec", "call_function", "call_method", "get_attr", "root", "placeholder", "output", "", "__call__"):
        yield slim(f"a layer's node has op {op!r}", at(chain, ("nodes", 1, "op"), op))
    for key in ("modules", "nodes", "indices", "tensors"):
        for word, value in (
            ("null", None),
            ("a number", 1),
            ("text", "x"),
            ("list of null", [None]),
            ("null in it", {"a": None}),
        ):
            yield slim(f"{key} is {word}", at(chain, (key,), value))
    name = chain["nodes"][1]["name"]
    yield slim("reads itself", at(chain, ("nodes", 1, "args"), [ref(name)]))
    yield slim("reads what comes later", at(chain, ("nodes", 1, "args"), [ref(chain["nodes"][3]["name"])]))
    cycle = at(at(chain, ("nodes", 1, "args"), [ref(chain["nodes"][2]["name"])]), ("nodes", 2, "args"), [ref(name)])
    yield slim("a cycle", cycle)
    yield slim("reads what is not there", at(chain, ("nodes", 1, "args"), [ref("nobody")]))
    yield slim("a doubled node name", at(chain, ("nodes", 2, "name"), name))
    yield slim("backwards", {**chain, "nodes": chain["nodes"][::-1]})
    yield slim("no output", {**chain, "nodes": chain["nodes"][:-1]})
    yield slim("two outputs", {**chain, "nodes": [*chain["nodes"], {**chain["nodes"][-1], "name": "more"}]})
    yield slim("output first", {**chain, "nodes": [chain["nodes"][-1], *chain["nodes"][:-1]]})
    yield slim("no input", {**chain, "nodes": chain["nodes"][1:]})
    yield slim(
        "an input twice",
        {**chain, "nodes": [chain["nodes"][0], {**chain["nodes"][0], "name": "y"}, *chain["nodes"][1:]]},
    )
    yield slim(
        "an input more", {**chain, "nodes": [chain["nodes"][0], node("y", "placeholder", "y", []), *chain["nodes"][1:]]}
    )
    yield slim("input named as a node", at(chain, ("nodes", 0, "target"), name))
    yield slim("input's default is code", at(chain, ("nodes", 0, "args"), ["os.system('id')"]))
    yield slim("a layer that nothing calls", at(chain, ("modules", "spare"), chain["modules"]["2"]))
    yield slim("a layer called by another name", at(chain, ("nodes", 1, "target"), "00"))
    yield slim("a layer's weight read by itself", at(chain, ("nodes", 2), node("w", "get_attr", "0.weight", [])))
    yield slim("layers in another order", at(at(chain, ("nodes", 1, "target"), "5"), ("nodes", 6, "target"), "0"))
    deep: Any = ref(name)
    for _ in range(8):
        deep = [deep]
    yield slim("deep arguments", at(chain, ("nodes", -1, "args"), [deep]))
    yield slim("many arguments", at(chain, ("nodes", 1, "args"), [ref("input_1")] * 65))
    yield slim("a long list", at(chain, ("nodes", -1, "args"), [[1] * 5000]))
    yield slim("deep module name", at(chain, ("modules", ".".join("a" * 17)), chain["modules"]["2"]))
    for word, value in {
        "a word": "eval",
        "half a slice": {"slice": [1]},
        "two keys": {"node": name, "tuple": []},
        "unknown": {"call": []},
        "a tuple of text": {"tuple": "ab"},
        "a node of number": {"node": 1},
        "a node of list": {"node": [name]},
        "a dict": {"dict": [["a", 1]]},
        "a full ellipsis": {"ellipsis": [1]},
        "infinite": 1 << 80,
    }.items():
        yield slim(f"an argument is {word}", at(chain, ("nodes", 1, "args"), [value]))
        yield slim(f"a function's argument is {word}", at(tree("decoder"), ("nodes", 2, "args", 0), value), "decoder")
    for key in NAMES.values():
        yield slim(f"output named {key!r}", at(chain, ("nodes", -1, "args"), [{"dict": [[key, ref(name)]]}]))
    million = {
        "repeat": ['{"format": "pyprune.architecture", "version": 1, "modules": {}, "nodes": [{}', ", {}", 10**6, "]}"]
    }
    yield Case("a million empty nodes", "slim", "chain", files={ARCHITECTURE: million})
    one = json.dumps(node("a", "call_function", "torch.relu", [ref("x")]))
    start = '{"format": "pyprune.architecture", "version": 1, "modules": {}, "nodes": ['
    for count in (8_192, 60_000, 1_000_000):
        content = {"repeat": [start + one, f", {one}", count, "]}"]}
        yield Case(f"{count} nodes", "slim", "chain", files={ARCHITECTURE: content})
    content = tree("chain")
    content["modules"] |= {f"m{i}": {"type": "ReLU", "settings": {}} for i in range(5000)}
    yield slim("5000 modules", content)
    content = at(
        chain, ("tensors",), {f"t{i}": {"kind": "buffer", "shape": [1], "dtype": "float32"} for i in range(4000)}
    )
    yield slim("4000 tensors", content)
    content = at(chain, ("indices",), {f"t{i}": 2 for i in range(4000)})
    yield slim("4000 indices", content)


def texts() -> Iterator[Case]:
    """Text that is no JSON, or JSON made to hurt."""
    text = corpus.unpacked(BASES["chain"][ARCHITECTURE]).decode()
    for share in (0, 1, 10, 25, 50, 75, 90, 99):
        yield Case(f"truncated at {share} %", "slim", "chain", files={ARCHITECTURE: text[: len(text) * share // 100]})
    for word in (
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "9" * 5000,
        "1e",
        "01",
        "+1",
        "0x10",
        "1_000",
        "'a'",
    ):
        yield slim(f"a number is {word[:12]}", text.replace('"in_channels": 1', f'"in_channels": {word}'))
        yield slim(
            f"an eps is {word[:12]}",
            text.replace('"settings": {\n    "num_features": 3', f'"settings": {{"eps": {word}, "num_features": 3'),
        )
    for word, content in {
        "empty list": "[]",
        "null": "null",
        "a number": "1",
        "text": '"x"',
        "nothing in it": "{}",
        "only space": " \n ",
        "a comment": "// x\n" + text,
        "a trailing comma": text.replace("}", ",}", 1),
        "text behind": text + "x",
        "twice": text + text,
        "a byte order mark": None,
        "python": "__import__('os')",
        "yaml": "format: x",
    }.items():
        yield (
            slim(f"the file is {word}", content)
            if content is not None
            else Case(
                f"the file has {word}",
                "slim",
                "chain",
                files={ARCHITECTURE: corpus.packed(b"\xef\xbb\xbf" + text.encode())},
            )
        )
    for word, data in {
        "utf-16": text.encode("utf-16"),
        "utf-8 cut": text.encode() + b"\xc3",
        "latin": text.encode()[:-3] + b"\xe9}",
        "overlong": text.replace("placeholder", "\0").encode().replace(b"\0", b"\xc0\xaf"),
        "zeros": bytes(500),
        "a pickle": pickle.dumps({"a": 1}),
        "surrogate": text.encode().replace(b"placeholder", b"\xed\xa0\x80"),
    }.items():
        yield Case(f"the file is {word}", "slim", "chain", files={ARCHITECTURE: corpus.packed(data)})
    for key in ("format", "version", "modules", "nodes"):
        yield slim(f"{key} twice", text.rstrip()[:-1] + f', "{key}": {json.dumps(tree("chain")[key])}}}')
    yield slim("a setting twice", text.replace('"in_channels": 1', '"in_channels": 1, "in_channels": 1'))
    yield slim("a layer twice", text.replace('"modules": {', '"modules": {"0": {"type": "ReLU", "settings": {}},'))
    for word, opening, closing in (("lists", "[", "]"), ("dicts", '{"a":', "}")):
        for count in (1000, 100_000, 1_000_000, 2_000_000):
            content = {"repeat": [{"repeat": ["", opening, count, "1"]}, closing, count, ""]}
            yield Case(f"{count} {word} in one another", "slim", "chain", files={ARCHITECTURE: content})
    for word, unit in (("empty lists", "[],"), ("empty dicts", "{},"), ("numbers", "1,"), ("text", '"",')):
        content = {"repeat": ['{"nodes": [', unit, (8 << 20) // len(unit) - 10, "1]}"]}
        yield Case(f"8 MB of {word}", "slim", "chain", files={ARCHITECTURE: content})
    content = {"repeat": ['{"nodes": [', "[],", 22_000_000, "1]}"]}
    yield Case("66 MB of empty lists", "slim", "chain", files={ARCHITECTURE: content})
    yield Case("a terabyte of zeros", "slim", "chain", holes={ARCHITECTURE: 1 << 40})
    yield Case("8 MB of spaces", "slim", "chain", files={ARCHITECTURE: {"repeat": ["", " ", 8 << 20, ""]}})


def arguments() -> Iterator[Case]:
    """For every operation of the table: too few arguments, too many, and of other kinds."""
    for target, signature in slimcalls.SIGNATURES.items():
        op = "call_method" if target.startswith(".") else "call_function"
        name, first = target.removeprefix("."), tree("decoder")["nodes"][1]["name"]
        if target == "module":
            op, name = "call_module", "down"
        for word, args in {
            "nothing": [],
            "text": ["zeros"],
            "a number": [1],
            "a list": [[ref(first)]]
            if name not in ("cat", "stack", "torch.cat", "torch.concat", "torch.concatenate", "torch.stack")
            else [[1]],
            "too much": [ref(first)] * 12,
        }.items():
            yield calls(f"{target} of {word}", node("odd", op, name, args))
        yield calls(f"{target} with a foreign keyword", node("odd", op, name, [ref(first)], out=1))
        yield calls(
            f"{target} with its argument twice",
            node("odd", op, name, [ref(first)], **{(signature.names or ("self",))[0]: 1}),
        )


def misfits() -> Iterator[Case]:
    """Operations that are plausible one by one and do not fit together."""
    x = "leaky_relu"
    size = node("size", "call_method", "size", [ref(x)])
    shape = node("shape", "call_function", "getattr", [ref(x), "shape"])
    count = node("count", "call_method", "size", [ref(x), 2])
    yield calls("a view of too many", node("odd", "call_method", "view", [ref(x), 7, 11]))
    yield calls("a view with two unknowns", node("odd", "call_method", "view", [ref(x), -1, -1]))
    yield calls("a dimension that is not there", node("odd", "call_function", "torch.mean", [ref(x), 7]))
    yield calls("a dimension of 2^40", node("odd", "call_function", "torch.mean", [ref(x), HUGE]))
    yield calls("a permutation of too few", node("odd", "call_method", "permute", [ref(x), 0, 1]))
    yield calls("a permutation with a repetition", node("odd", "call_method", "permute", [ref(x), 0, 1, 1, 2]))
    yield calls(
        "a part that is not there",
        node("p", "call_function", "torch.chunk", [ref(x), 2, 1]),
        node("odd", "call_function", "operator.getitem", [ref("p"), 5]),
    )
    yield calls("an index by text", node("odd", "call_function", "operator.getitem", [ref(x), "shape"]))
    yield calls("an index by a tensor", node("odd", "call_function", "operator.getitem", [ref(x), ref(x)]))
    yield calls(
        "an index of too many dimensions",
        node("odd", "call_function", "operator.getitem", [ref(x), {"tuple": [0] * 6}]),
    )
    yield calls(
        "a step of zero", node("odd", "call_function", "operator.getitem", [ref(x), {"slice": [None, None, 0]}])
    )
    yield calls(
        "a step backwards", node("odd", "call_function", "operator.getitem", [ref(x), {"slice": [None, None, -1]}])
    )
    yield calls(
        "a channel that is not there",
        node("odd", "call_function", "operator.getitem", [ref(x), {"tuple": [{"slice": [None, None, None]}, 99]}]),
    )
    yield calls("a slice beyond", node("odd", "call_function", "torch.narrow", [ref(x), 1, 5, 9]))
    yield calls(
        "a sum of unlike shapes",
        node("y", "call_function", "torch.flatten", [ref(x), 1]),
        node("odd", "call_function", "operator.add", [ref(x), ref("y")]),
    )
    yield calls("tensors of unlike shapes together", node("odd", "call_function", "torch.cat", [[ref(x), ref("x")], 1]))
    later = tree("residual")
    place = next(i for i, one in enumerate(later["nodes"]) if one.get("target") == "torch.index_add")
    base = later["nodes"][place]["args"][0]
    half = node("half", "call_function", "torch.narrow", [base, 2, 0, 2])
    later["nodes"][place]["args"][0] = ref("half")
    later["nodes"].insert(place, half)
    yield slim("an addition by index to fewer places", later, "residual")
    yield calls("a layer for other channels", node("odd", "call_module", "down", [ref(x)]))
    yield calls("shuffled into too many", node("odd", "call_function", "F.pixel_shuffle", [ref(x), 3]))
    yield calls("padded below nothing", node("odd", "call_function", "F.pad", [ref(x), [-9, -9]]))
    yield calls("padded by odd widths", node("odd", "call_function", "F.pad", [ref(x), [1, 1, 1]]))
    yield calls("padded in an unknown way", node("odd", "call_function", "F.pad", [ref(x), [1, 1], "bilinear"]))
    yield calls("resized in an unknown way", node("odd", "call_function", "F.interpolate", [ref(x), 4], mode="zeros"))
    yield calls("a module on a shape", size, node("odd", "call_module", "down", [ref("size")]))
    yield calls("a function on a shape", shape, node("odd", "call_function", "F.relu", [ref("shape")]))
    yield calls("a method on a shape", shape, node("odd", "call_method", "relu", [ref("shape")]))
    yield calls("a method on a number", count, node("odd", "call_method", "add", [ref("count"), 1]))
    yield calls("an attribute of code", node("odd", "call_function", "getattr", [ref(x), "__class__"]))
    yield calls("an attribute of numbers", node("odd", "call_function", "getattr", [ref(x), 1]))
    yield calls("another attribute", node("odd", "call_function", "getattr", [ref(x), "data"]))
    yield calls(
        "a power of a number", count, node("odd", "call_function", "operator.pow", [ref("count"), 2_000_000_000])
    )
    yield calls("a number over zero", count, node("odd", "call_function", "operator.truediv", [ref("count"), 0]))
    yield calls(
        "a shape a billion times", shape, node("odd", "call_function", "operator.mul", [ref("shape"), 1_000_000_000])
    )
    yield calls("a shape and itself", shape, node("odd", "call_function", "operator.add", [ref("shape"), ref("shape")]))
    yield calls("a list a billion times", node("odd", "call_function", "operator.mul", [[1], 1_000_000_000]))
    yield calls("numbers only", node("odd", "call_function", "operator.add", [1, 2]))
    squares = [count]
    for i in range(40):
        squares.append(node(f"square_{i}", "call_function", "operator.mul", [ref(squares[-1]["name"])] * 2))
    yield calls("a number squared forty times", *squares)
    yield calls(
        "indices wanted",
        node("i", "placeholder", "i", []),
        node("odd", "call_function", "F.max_pool2d", [ref(x), 2], return_indices=True),
    )
    yield calls("into a tensor", node("odd", "call_function", "F.normalize", [ref(x)], out=ref(x)))
    yield calls("another type", node("odd", "call_function", "torch.softmax", [ref(x), 1], dtype="zeros"))


HARMLESS: dict[str, list[Any]] = {
    "F.relu": [],
    "F.elu": [0.5],
    "torch.clamp": [-1, 1],
    "F.max_pool2d": [2],
    "F.avg_pool2d": [2, 1, 1],
    "F.interpolate": [[3, 5]],
    "F.pad": [{"tuple": [1, 1, 2, 2]}, "reflect"],
    "F.normalize": [2.0, 1],
    "F.softmax": [1],
    "operator.mul": [2.5],
    "operator.add": [ref("x_1")],
    "torch.flatten": [1],
    "torch.permute": [{"tuple": [0, 2, 3, 1]}],
    "torch.transpose": [1, 2],
    "torch.unsqueeze": [-1],
    "torch.squeeze": [0],
    "torch.mean": [[2, 3], True],
    "torch.unflatten": [1, [2, 4]],
    "torch.channel_shuffle": [4],
    "F.pixel_shuffle": [2],
    "F.pixel_unshuffle": [2],
    "torch.movedim": [1, 3],
    "torch.narrow": [1, 2, 3],
    "operator.getitem": [{"tuple": [{"ellipsis": []}, {"slice": [None, None, 2]}]}],
    ".view": [1, -1],
    ".permute": [[0, 3, 1, 2]],
    ".reshape": [{"tuple": [1, -1]}],
    ".contiguous": [],
    ".expand": [3, -1, -1, -1],
    ".unflatten": [1, {"tuple": [4, 2]}],
    ".mean": [[2, 3]],
    ".clamp": [-1.0],
    ".swapaxes": [1, 2],
    ".div": [2],
    ".flatten": [2],
    ".amax": [1],
    "F.dropout": [0.5, False],
}


def sound() -> Iterator[Case]:
    """Operations as they should be: what is refused elsewhere is not refused for standing there."""
    for target, args in HARMLESS.items():
        op = "call_method" if target.startswith(".") else "call_function"
        given = [ref("leaky_relu"), *args] if args != [ref("x_1")] else [ref("leaky_relu")] * 2
        yield calls(f"a sound {target}", node("even", op, target.removeprefix("."), given), verdict="harmless")
    for kind, stated in {
        "ChannelShuffle": {"groups": 4},
        "PixelUnshuffle": {"downscale_factor": 2},
        "Unflatten": {"dim": 1, "unflattened_size": [2, 4]},
        "Softmax2d": {},
        "LPPool2d": {"norm_type": 2, "kernel_size": 2},
        "LocalResponseNorm": {"size": 5},
        "ReflectionPad2d": {"padding": [1, 1, 1, 1]},
    }.items():
        content = tree("decoder")
        content["modules"]["even"] = {"type": kind, "settings": stated}
        content["nodes"][-1:] = [
            node("even_1", "call_module", "even", [ref("leaky_relu")]),
            {**content["nodes"][-1], "args": [ref("even_1")]},
        ]
        yield slim(f"a sound {kind}", content, "decoder", verdict="harmless")
    product = [
        node("n", "call_method", "size", [ref("x"), 2]),
        node("m", "call_function", "operator.mul", [ref("n"), ref("n")]),
    ]
    yield calls(
        "a sound product of counts",
        *product,
        node("even", "call_method", "view", [ref("leaky_relu"), -1, ref("n")]),
        verdict="harmless",
    )


def floods() -> Iterator[Case]:
    """Networks that would fill the memory, when they are built or when they run."""
    x = "leaky_relu"
    for factor in (65, 1e6, 1 << 30, [1, 1e6], 0, -1, [2, 2, 2, 2]):
        yield calls(
            f"resized by {factor}", node("odd", "call_function", "F.interpolate", [ref(x)], scale_factor=factor)
        )
        yield slim(
            f"a layer resizes by {factor}",
            at(tree("decoder"), ("modules", "blocks.a.0", "settings", "scale_factor"), factor),
            "decoder",
        )
    for size in (1 << 15, HUGE, [1 << 14, 1 << 14], [HUGE, 1], 0, -5):
        yield calls(f"resized to {size}", node("odd", "call_function", "F.interpolate", [ref(x), size]))
        yield calls(f"pooled to {size}", node("odd", "call_function", "F.adaptive_avg_pool2d", [ref(x), size]))
        yield calls(f"max-pooled to {size}", node("odd", "call_function", "F.adaptive_max_pool2d", [ref(x), size]))
    for width in (10**9, 1 << 15, HUGE, [1 << 14] * 4, [10**6] * 4):
        widths = width if isinstance(width, list) else [width, width]
        yield calls(f"padded by {width}", node("odd", "call_function", "F.pad", [ref(x), widths]))
        yield slim(
            f"a layer pads by {width}",
            at(tree("decoder"), ("modules", "blocks.a.1", "settings", "padding"), (widths * 2)[:4]),
            "decoder",
        )
    for setting, kind in (
        ("padding", "down"),
        ("stride", "up"),
        ("output_padding", "up"),
        ("kernel_size", "down"),
        ("dilation", "up"),
        ("out_channels", "down"),
        ("in_channels", "up"),
        ("groups", "down"),
    ):
        for value in (1 << 14, 1 << 20, HUGE):
            stated = value if setting in ("out_channels", "in_channels", "groups") else [value, value]
            yield slim(
                f"{kind} has {setting} {value}",
                at(tree("decoder"), ("modules", kind, "settings", setting), stated),
                "decoder",
            )
    yield slim(
        "shuffles by 2^20",
        at(tree("decoder"), ("modules", "shuffle", "settings", "upscale_factor"), 1 << 20),
        "decoder",
    )
    kinds = {
        "LocalResponseNorm": {"size": 1 << 20},
        "ConstantPad2d": {"padding": [1 << 14] * 4, "value": 1.0},
        "ReplicationPad2d": {"padding": [1 << 14] * 4},
        "AdaptiveAvgPool2d": {"output_size": [1 << 14, 1 << 14]},
        "AdaptiveMaxPool2d": {"output_size": 1 << 14},
        "Upsample": {"size": [1 << 14, 1 << 14]},
        "PixelShuffle": {"upscale_factor": 64},
        "Unflatten": {"dim": 1, "unflattened_size": [1 << 20] * 5},
        "LayerNorm": {"normalized_shape": [1 << 20] * 4},
        "Linear": {"in_features": 1 << 20, "out_features": 1 << 20},
        "Conv3d": {"in_channels": 1 << 20, "out_channels": 1 << 20, "kernel_size": [1 << 14] * 3},
        "BatchNorm2d": {"num_features": 1 << 20},
        "PReLU": {"num_parameters": 1 << 20},
        "RMSNorm": {"normalized_shape": [1 << 20] * 3},
        "ConvTranspose2d": {"in_channels": 4, "out_channels": 4, "kernel_size": [1, 1], "stride": [1 << 14, 1 << 14]},
        "GroupNorm": {"num_groups": 1 << 19, "num_channels": 1 << 20},
    }
    for kind, stated in kinds.items():
        content = tree("decoder")
        content["modules"]["odd"] = {"type": kind, "settings": stated}
        content["nodes"][-1:] = [
            node("odd_1", "call_module", "odd", [ref(x)]),
            {**content["nodes"][-1], "args": [ref("odd_1")]},
        ]
        yield slim(f"a {kind} without end", content, "decoder")

    def chained(
        count: int, op: str, target: str, make: Callable[[str], list[Any]], **kwargs: Any
    ) -> list[dict[str, Any]]:
        nodes = [node("odd_0", op, target, make(x), **kwargs)]
        for i in range(1, count):
            nodes.append(node(f"odd_{i}", op, target, make(f"odd_{i - 1}"), **kwargs))
        return nodes

    yield calls(
        "resized by 64 three times",
        *chained(3, "call_function", "F.interpolate", lambda one: [ref(one)], scale_factor=64),
    )
    yield calls(
        "resized by 2 forty times",
        *chained(40, "call_function", "F.interpolate", lambda one: [ref(one)], scale_factor=2.0),
    )
    yield calls(
        "doubled forty times", *chained(40, "call_function", "torch.cat", lambda one: [[ref(one), ref(one)], 1])
    )
    yield calls("stacked forty times", *chained(40, "call_function", "torch.stack", lambda one: [[ref(one)] * 2]))
    yield calls(
        "a thousand times itself, thrice", *chained(3, "call_function", "torch.cat", lambda one: [[ref(one)] * 1000, 2])
    )
    yield calls(
        "padded two thousand times", *chained(2000, "call_function", "F.pad", lambda one: [ref(one), [16, 16, 16, 16]])
    )
    yield calls(
        "expanded",
        node("y", "call_method", "unsqueeze", [ref(x), 0]),
        node("odd", "call_method", "expand", [ref("y"), 1 << 20, -1, -1, -1, -1]),
    )
    yield calls("expanded to 2^40", node("odd", "call_method", "expand", [ref(x), HUGE]))
    yield calls("a view of 2^31", node("odd", "call_method", "view", [ref(x), 1 << 20, 1 << 20]))
    products, last = [], "flat"
    products.append(node("flat", "call_function", "torch.flatten", [ref(x)]))
    for i in range(6):
        products.append(node(f"column_{i}", "call_method", "unsqueeze", [ref(last), -1]))
        products.append(node(f"table_{i}", "call_function", "operator.mul", [ref(f"column_{i}"), ref("flat")]))
        last = f"table_{i}"
    yield calls("everything times everything, six times", *products)
    powers: list[dict[str, Any]] = [node("n0", "call_function", "torch.mean", [ref(x), {"tuple": [0, 1, 3]}])]
    for i in range(7):
        powers += [
            node(f"m{i}", "call_method", "unsqueeze", [ref(f"n{i}"), -1]),
            node(f"n{i + 1}", "call_function", "operator.add", [ref(f"m{i}"), ref("n0")]),
        ]
    yield calls("a side to the power of eight", *powers)
    head, data = header("decoder")
    small = {**head, "__metadata__": {**head["__metadata__"], "inputs": '[[[1, 2, 2, 2], "float32"]]'}}
    case = calls("a side to the power of eight, for a small image", *powers)
    yield replace(case, files={**case.files, WEIGHTS: tensors(small, data)})
    yield calls(
        "split into single numbers",
        node("wide", "call_function", "F.pad", [ref(x), [1 << 14, 0]]),
        node("odd", "call_function", "torch.split", [ref("wide"), 1, 3]),
        output=ref("wide"),
    )
    yield calls("split into nothing", node("odd", "call_function", "torch.split", [ref(x), 0, 1]), output=ref(x))
    yield calls("a million chunks", node("odd", "call_function", "torch.chunk", [ref(x), 1 << 20, 1]), output=ref(x))
    for words, recorded in {
        "misfit": '[[[1, 7, 8, 8], "float32"]]',
        "few dimensions": '[[[1, 2], "float32"]]',
        "one too many": '[[[1, 2, 8, 8], "float32"], [[1], "float32"]]',
        "whole numbers": '[[[1, 2, 8, 8], "int64"]]',
        "another type": '[[[1, 2, 8, 8], "float64"]]',
    }.items():
        more = {**head, "__metadata__": {**head["__metadata__"], "inputs": recorded}}
        yield Case(f"recorded inputs: {words}", "slim", "decoder", files={WEIGHTS: tensors(more, data)})
    for words, text in {
        "none": None,
        "nothing": "",
        "no JSON": "[",
        "a number": "7",
        "negative": '[[[1, -2, 8, 8], "float32"]]',
        "an object": "{}",
        "fractions": '[[[1e3, 2], "float32"]]',
        "huge": '[[[1, 2, 1000000, 1000000], "float32"]]',
        "deep": "[" * 4000,
        "long": "[" + '[[1], "float32"],' * 9000,
        "code": "__import__('os')",
        "an object type": '[[[1, 2, 8, 8], "object"]]',
    }.items():
        metadata = {key: value for key, value in head["__metadata__"].items() if key != "inputs"} | (
            {} if text is None else {"inputs": text}
        )
        yield Case(
            f"no recorded inputs: {words}",
            "slim",
            "decoder",
            "harmless",
            files={WEIGHTS: tensors({**head, "__metadata__": metadata}, data)},
        )
        case = calls(f"a flood without recorded inputs: {words}", *products)
        yield replace(case, files={**case.files, WEIGHTS: tensors({**head, "__metadata__": metadata}, data)})


def weights() -> Iterator[Case]:
    """Weights that are damaged, lie about themselves, or belong to another network."""
    data = corpus.unpacked(BASES["chain"][WEIGHTS])
    head, body = header("chain")
    for size in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1):
        yield Case(f"weights cut at {size}", "slim", "chain", files={WEIGHTS: corpus.packed(data[:size])})
    yield Case("weights and more", "slim", "chain", files={WEIGHTS: corpus.packed(data + b"\0")})
    yield from (
        replace(case, base="chain", files={WEIGHTS: case.files["checkpoint"]}, reader="slim")
        for case in headers(head, body)
    )
    for name in head:
        if name != "__metadata__":
            yield Case(
                f"weights without {name}",
                "slim",
                "chain",
                files={WEIGHTS: tensors({k: v for k, v in head.items() if k != name}, body)},
            )
            for dtype in ("F64", "I32", "F16"):
                other = {**head, name: {**head[name], "dtype": dtype}}
                yield Case(f"{name} as {dtype}", "slim", "chain", files={WEIGHTS: tensors(other, body)})
            turned = {**head, name: {**head[name], "shape": [*head[name]["shape"][::-1], 1]}}
            yield Case(f"{name} turned", "slim", "chain", files={WEIGHTS: tensors(turned, body)})
    end = len(body)
    for name in ("extra", "0.weight.x", "../x", "__class__", "", "a\nb"):
        more = {**head, name: {"dtype": "U8", "shape": [4], "data_offsets": [end, end + 4]}}
        yield Case(f"weights with {name!r} besides", "slim", "chain", files={WEIGHTS: tensors(more, body + bytes(4))})
    for other in ("residual", "decoder"):
        yield Case(f"weights of the {other}", "slim", "chain", files={WEIGHTS: BASES[other][WEIGHTS]})
        yield Case(f"architecture of the {other}", "slim", "chain", files={ARCHITECTURE: BASES[other][ARCHITECTURE]})
    for out in (4, 2, 1, 1000, 1 << 20):
        yield slim(
            f"a layer of {out} for weights of 3", at(tree("chain"), ("modules", "0", "settings", "out_channels"), out)
        )
    for inputs in (2, 1 << 20):
        yield slim(
            f"a layer of {inputs} inputs", at(tree("chain"), ("modules", "0", "settings", "in_channels"), inputs)
        )
    yield slim("a norm of other channels", at(tree("chain"), ("modules", "1", "settings", "num_features"), 5))
    yield slim("a layer without its bias", at(tree("chain"), ("modules", "0", "settings", "bias"), False))
    yield slim(
        "a norm without statistics", at(tree("chain"), ("modules", "1", "settings", "track_running_stats"), False)
    )
    nan = np.frombuffer(body, np.uint8).copy()
    begin, stop = head["0.weight"]["data_offsets"]
    nan[begin:stop] = np.frombuffer(np.full((stop - begin) // 4, np.nan, np.float32).tobytes(), np.uint8)
    yield Case("weights of NaN", "slim", "chain", "harmless", files={WEIGHTS: tensors(head, nan.tobytes())})
    head, body = header("residual")
    for name, size in tree("residual")["indices"].items():
        begin, stop = head[name]["data_offsets"]
        for word, values in {
            "negative": [-1] * size,
            "beyond": [99] * size,
            "2^62": [1 << 62] * size,
            "the least": [-(1 << 63)] * size,
            "just beyond": [*range(size - 1), 12],
        }.items():
            odd = body[:begin] + np.array(values, np.int64).tobytes() + body[stop:]
            yield Case(f"{name} is {word}", "slim", "residual", files={WEIGHTS: tensors(head, odd)})
        for dtype in ("F64", "U64"):
            yield Case(
                f"{name} as {dtype}",
                "slim",
                "residual",
                files={WEIGHTS: tensors({**head, name: {**head[name], "dtype": dtype}}, body)},
            )
        for value in (0, -1, size + 1, HUGE, True, "3", None, [size], 1.5):
            yield slim(f"{name} has {value!r} entries", at(tree("residual"), ("indices", name), value), "residual")
        if "grown" not in name:
            for word, values in {"falling": list(range(size))[::-1], "doubled": [1] * size}.items():
                odd = body[:begin] + np.array(values, np.int64).tobytes() + body[stop:]
                yield Case(f"{name} is {word}", "slim", "residual", files={WEIGHTS: tensors(head, odd)})
    for i, one in enumerate(tree("residual")["nodes"]):
        if one.get("target") in ("torch.index_add", "torch.index_select"):
            for word, value in {"0": 0, "-1": -1, "5": 5, "2^40": HUGE, "text": "zeros", "true": True}.items():
                yield slim(
                    f"{one['name']} along {word}", at(tree("residual"), ("nodes", i, "args", 1), value), "residual"
                )
            yield slim(
                f"{one['name']} without an index",
                at(tree("residual"), ("nodes", i, "args", 2), one["args"][0]),
                "residual",
            )
            yield slim(
                f"{one['name']} with alpha", at(tree("residual"), ("nodes", i, "kwargs"), {"alpha": 2}), "residual"
            )
    for word, value in {
        "shape of 2^40": [HUGE],
        "negative": [-1],
        "of zero": [0],
        "text": "4",
        "deep": [[4]],
        "long": [1] * 9,
        "2^40 in parts": [1 << 14] * 3,
        "true": [True],
        "other": [1, 5, 1, 1],
        "null": None,
    }.items():
        yield slim(
            f"a parameter's shape is {word}", at(tree("decoder"), ("tensors", "scale", "shape"), value), "decoder"
        )
    for kind in ("module", "", None, 1, "buffer\n", []):
        yield slim(
            f"a parameter's kind is {kind!r}", at(tree("decoder"), ("tensors", "scale", "kind"), kind), "decoder"
        )
    for dtype in ("int64", "bool", "object", None, 1, []):
        yield slim(
            f"a parameter's dtype is {dtype!r}", at(tree("decoder"), ("tensors", "scale", "dtype"), dtype), "decoder"
        )
    yield slim(
        "a parameter more", at(tree("decoder"), ("tensors", "more"), tree("decoder")["tensors"]["scale"]), "decoder"
    )
    yield slim(
        "a parameter under a layer",
        at(tree("decoder"), ("tensors", "down.x"), tree("decoder")["tensors"]["scale"]),
        "decoder",
    )
    yield slim(
        "a parameter as a layer",
        at(tree("decoder"), ("tensors", "down"), tree("decoder")["tensors"]["scale"]),
        "decoder",
    )


def headers(head: dict[str, Any], body: bytes) -> Iterator[Case]:
    """Headers of safetensors files that lie."""

    def case(name: str, content: object) -> Case:
        return Case(f"header: {name}", "checkpoint", files={"checkpoint": content})

    first, second = [name for name in head if name != "__metadata__"][:2]
    entry = head[first]
    for claim in (88_900_000, 1 << 62, (1 << 64) - 1, (8 << 20) + 1, 1 << 40, len(body) + 10_000):
        yield case(f"claims {claim}", corpus.packed(struct.pack("<Q", claim) + b"{}" + body))
    text = json.dumps(head)
    long = len(text) + 88_900_000
    yield case(
        "88.9 MB of spaces",
        {
            "repeat": [
                {"base64": __import__("base64").b64encode(struct.pack("<Q", long)).decode()},
                " ",
                88_900_000,
                text,
            ]
        },
    )
    many = '{"__metadata__": {"a": "b"}' + ', "0": {}'
    yield case(
        "8 MB of empty tensors",
        {
            "repeat": [
                {"base64": __import__("base64").b64encode(struct.pack("<Q", len(many) + 15 * 500_000 + 1)).decode()},
                ', "000000": {}}'[:14] + " ",
                500_000,
                "}",
            ]
        },
    )
    yield case("deep", tensors(b"[" * 200_000, b""))
    yield case("no JSON", tensors(b"not json", body))
    yield case("a list", tensors([], body))
    yield case("a pickle", corpus.packed(pickle.dumps({"a": 1}) + bytes(100)))
    yield case("code", tensors(b"__import__('os').system('id')", body))
    yield case("not utf-8", tensors(text.encode().replace(b"F32", b"\xff\xfe"), body))
    yield case("a tensor twice", tensors(f'{text[:-1]}, "{first}": {json.dumps(entry)}}}'.encode(), body))
    yield case("metadata twice", tensors(f'{text[:-1]}, "__metadata__": {{}}, "__metadata__": {{}}}}'.encode(), body))
    for metadata in ({"a": 1}, {"a": None}, {"a": {}}, [], "x", 1, None):
        yield case(f"metadata {metadata!r}", tensors({**head, "__metadata__": metadata}, body))
    for word, value in {
        "PICKLE": "PICKLE",
        "F128": "F128",
        "empty": "",
        "a number": 1,
        "a list": [],
        "a dict": {},
        "null": None,
        "lower case": "f32",
        "C64": "C64",
    }.items():
        yield case(f"dtype {word}", tensors({**head, first: {**entry, "dtype": value}}, body))
    for word, shape in {
        "[2^40, 0]": [HUGE, 0],
        "[2^40]": [HUGE],
        "[2^70]": [1 << 70],
        "[-1]": [-1],
        "[-1, -1]": [-1, -1],
        "[true]": [True],
        "[1.5]": [1.5],
        "text": "3",
        "[text]": ["3"],
        "null": None,
        "[null]": [None],
        "nested": [[3]],
        "a number": 3,
        "a dict": {},
        "long": [1] * 100,
        "[0]": [0],
        "[2^31, 2^31]": [1 << 31, 1 << 31],
    }.items():
        yield case(f"shape {word}", tensors({**head, first: {**entry, "shape": shape}}, body))
    begin, stop = entry["data_offsets"]
    for word, offsets in {
        "reversed": [stop, begin],
        "negative": [-4, stop - begin - 4],
        "beyond": [len(body), len(body) + stop - begin],
        "2^62": [1 << 62, (1 << 62) + stop - begin],
        "one": [begin],
        "three": [begin, stop, stop],
        "none": [],
        "null": None,
        "text": ["0", "12"],
        "true": [False, True],
        "fractions": [0.0, 12.0],
        "another's": head[second]["data_offsets"],
        "too short": [begin, stop - 1],
        "too long": [begin, stop + 4],
        "a dict": {"a": 1},
        "nested": [[begin], [stop]],
    }.items():
        yield case(f"offsets {word}", tensors({**head, first: {**entry, "data_offsets": offsets}}, body))
    yield case("two tensors in one place", tensors({**head, "alias": entry}, body))
    for key in ("dtype", "shape", "data_offsets"):
        yield case(f"without {key}", tensors({**head, first: {k: v for k, v in entry.items() if k != key}}, body))
    for value in (None, 1, "x", [], {}, {**entry, "more": 1}):
        yield case(f"an entry is {value!r:.20}", tensors({**head, first: value}, body))


def places_of_files() -> Iterator[Case]:
    """Files that are no files."""
    for file in (ARCHITECTURE, WEIGHTS):
        yield Case(f"{file} is missing", "slim", "chain", absent=[file])
        yield Case(f"{file} is a pipe", "slim", "chain", pipes=[file])
        for word, target in {
            "/dev/zero": "/dev/zero",
            "/dev/stdin": "/dev/tty",
            "itself": file,
            "nowhere": "nowhere",
            "a folder": ".",
            "the folder above": "..",
            "/proc/self/environ": "/proc/self/environ",
            "/etc/passwd": "/etc/passwd",
            "/proc/kcore": "/proc/kcore",
            "memory": "/proc/self/mem",
        }.items():
            yield Case(f"{file} points at {word}", "slim", "chain", links={file: target})
        other = WEIGHTS if file == ARCHITECTURE else ARCHITECTURE
        yield Case(f"{file} points at {other}", "slim", "chain", links={file: other})
        content = {"there": BASES["chain"][file]}
        yield Case(
            f"{file} points at a file like it", "slim", "chain", "harmless", files=content, links={file: "there"}
        )
    yield Case("weights with a terabyte behind", "slim", "chain", holes={WEIGHTS: 1 << 40})
    source = "import os\nos.abort()\n"
    extra = {
        "slim_model.py": source,
        "__init__.py": source,
        "setup.py": source,
        "conftest.py": source,
        "model.pkl": "cos\nabort\n(tR.",
    }
    yield Case("code beside", "slim", "chain", "harmless", files=extra)


def documents() -> Iterator[Case]:
    """The other JSON files: every value in them another, as the first one of its path."""
    odd = {
        "null": None,
        "2^70": 1 << 70,
        "-1": -1,
        "text": "x",
        "a list": [],
        "a dict": {},
        "deep": [[["a"]]],
        "true": True,
    }
    for reader, file in (
        ("plan", "plan.json"),
        ("history", "history.json"),
        ("evaluation", "evaluation.json"),
        ("profile", "profile.json"),
        ("ckrm", "ckrm.json"),
        ("fairness", "fairness.json"),
        ("trial", "trial.json"),
        ("width search", "width_search.json"),
    ):
        text = corpus.unpacked(BASES[reader][file]).decode()
        content = json.loads(text)
        seen: set[tuple[Any, ...]] = set()
        for path in places(content):
            plain = tuple(0 if isinstance(part, int) else part for part in path)
            if plain in seen or len(path) > 6 or "redundancy" in path[:-1]:  # which is a CKRM
                continue
            seen.add(plain)
            if reader == "ckrm" and path[1:2] == ("run 1",) and path[2:3] != ("first",):
                continue
            for word, value in (list(odd.items()) * 2)[len(seen) % 8 :][: 1 if reader == "ckrm" else 3]:
                yield Case(
                    f"{reader}: {'/'.join(map(str, path))} is {word}",
                    reader,
                    reader,
                    "either",
                    {file: json.dumps(at(content, path, value))},
                )
            if isinstance(path[-1], str) and (reader != "ckrm" or "run 1" not in path):
                yield Case(
                    f"{reader}: without {'/'.join(map(str, path))}",
                    reader,
                    reader,
                    "either",
                    {file: json.dumps(at(content, path, ...))},
                )
        for key in content:
            yield Case(f"{reader}: {key} twice", reader, reader, files={file: text.rstrip()[:-1] + f', "{key}": 1}}'})
        for share in (0, 1, 30, 60, 99):
            yield Case(f"{reader}: cut at {share} %", reader, reader, files={file: text[: len(text) * share // 100]})
        for word in ("NaN", "Infinity", "1e999"):
            yield Case(
                f"{reader}: with {word}", reader, reader, files={file: text.rstrip()[:-1] + f', "more": {word}}}'}
            )
        yield Case(f"{reader}: deep", reader, reader, files={file: {"repeat": ["", "[", 1_000_000, ""]}})
        yield Case(
            f"{reader}: 60 MB of empty lists",
            reader,
            reader,
            files={file: {"repeat": ['{"a": [', "[],", 20_000_000, "1]}"]}},
        )
        yield Case(f"{reader}: a terabyte", reader, reader, holes={file: 1 << 40})
        yield Case(f"{reader}: a pipe", reader, reader, pipes=[file])
        yield Case(f"{reader}: latin", reader, reader, files={file: corpus.packed(text.encode() + b"\xe9")})


def archives() -> Iterator[Case]:
    """Weights, ranks and data sets in formats of others."""
    head, body = header("checkpoint", "checkpoint")
    for case in headers(head, body):
        yield replace(case, name=f"checkpoint {case.name}", base="checkpoint")
    for case in list(headers(head, body))[::4]:
        yield replace(case, name=f"kernels {case.name}", reader="kernels", base="checkpoint")
    head, body = header("ranks", "ranks.safetensors")
    for case in list(headers(head, body))[::3]:
        yield replace(
            case,
            name=f"ranks {case.name}",
            reader="ranks",
            base="ranks",
            files={"ranks.safetensors": case.files["checkpoint"]},
        )
    about = json.loads(head["__metadata__"]["about"])
    for path in places(about):
        for word, value in {"null": None, "text": "x", "2^70": 1 << 70, "a dict": {"a": 1}}.items():
            if path[0] == "info" and len(path) > 1:
                continue
            metadata = {**head["__metadata__"], "about": json.dumps(at(about, path, value))}
            yield Case(
                f"ranks: {'/'.join(map(str, path))} is {word}",
                "ranks",
                "ranks",
                "either",
                {"ranks.safetensors": tensors({**head, "__metadata__": metadata}, body)},
            )
    for key, values in {
        "version": ("2", "-1", "x", "", "9" * 6000, "\u0661"),
        "format": ("x", ""),
        "about": ("", "[]", "{", "NaN", "[" * 9000),
    }.items():
        for value in values:
            metadata = {**head["__metadata__"], key: value}
            yield Case(
                f"ranks: {key} {value[:9]!r}",
                "ranks",
                "ranks",
                files={"ranks.safetensors": tensors({**head, "__metadata__": metadata}, body)},
            )
    for name in head:
        if name != "__metadata__" and head[name]["dtype"] == "F64":
            begin, stop = head[name]["data_offsets"]
            for word, value in {"nan": np.nan, "infinite": np.inf, "negative": -1.0}.items():
                odd = body[:begin] + np.full((stop - begin) // 8, value).tobytes() + body[stop:]
                yield Case(
                    f"ranks: {name} is {word}", "ranks", "ranks", files={"ranks.safetensors": tensors(head, odd)}
                )

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return eval, ("1",)

    def zipped(**members: bytes) -> object:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name, data in members.items():
                info = zipfile.ZipInfo(
                    name.replace("__", "/").replace("_pkl", ".pkl").replace("_npy", ".npy"), (1980, 1, 1, 0, 0, 0)
                )
                archive.writestr(info, data)
        return corpus.packed(stream.getvalue())

    for word, data in {
        "of code": zipped(archive__data_pkl=pickle.dumps(Evil(), 2)),
        "of an unknown protocol": zipped(archive__data_pkl=pickle.dumps({"a": 1}, 5)),
        "without a pickle": zipped(archive__data=b"1"),
        "of TorchScript": zipped(archive__code=b"1", archive__constants_pkl=b"1"),
        "of nothing": zipped(),
        "of a bare pickle": corpus.packed(pickle.dumps(Evil(), 2) + bytes(300)),
        "of an empty pickle": zipped(archive__data_pkl=b""),
        "of a number": zipped(archive__data_pkl=pickle.dumps(1, 2)),
        "of lists in lists": zipped(archive__data_pkl=b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
        "of a bomb": zipped(archive__data_pkl=b"\x80\x02](K\x01" + b"2" * 100 + b"e."),
        "cut": corpus.packed(corpus.unpacked(zipped(archive__data_pkl=pickle.dumps({}, 2)))[:-30]),
    }.items():
        yield Case(f"checkpoint {word}", "checkpoint", files={"checkpoint": data})

    def npy(shape: str, descr: str = "'<f8'", data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
        text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
        text += b" " * (-(len(text) + 11) % 64) + b"\n"
        return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data

    for word, data in {
        "of 2^40": npy(f"({HUGE},)"),
        "of 2^70": npy(f"({1 << 70},)"),
        "negative": npy("(-1,)"),
        "of objects": npy("(1,)", "'|O'", pickle.dumps([1])),
        "of code": npy("(1,)", "__import__('os')"),
        "of two dimensions": npy("(1, 1)", data=bytes(8)),
        "of nothing": npy("(0,)"),
        "of text": npy("(1,)", "'<U4'", bytes(16)),
        "of fields": npy("(1,)", "[('a', '<f8')]", bytes(8)),
        "of nan": npy("(1,)", data=struct.pack("<d", float("nan"))),
        "too short": npy("(2,)", data=bytes(8)),
        "too long": npy("(1,)", data=bytes(16)),
        "of version 9": npy("(1,)", data=bytes(8), version=b"\x09\x00"),
        "deep": npy("(" * 3000 + ")" * 3000),
        "a call": npy("(1,).__class__()"),
        "cut": npy("(1,)")[:20],
        "empty": b"",
        "zero width": npy(f"({HUGE},)", "'<f0'"),
        "void": npy("(1,)", "'|V0'"),
    }.items():
        yield Case(f"rank file {word}", "rank file", files={"rank.npy": corpus.packed(data)})
        yield Case(
            f"npz {word}", "npz", files={"data.npz": zipped(images_npy=data, labels_npy=npy("(1,)", "'<i8'", bytes(8)))}
        )
    good, labels = npy("(40, 8, 8)", "'|u1'", bytes(2560)), npy("(40,)", "'<i8'", np.arange(40).astype("<i8").tobytes())
    for word, members in {
        "without labels": {"images_npy": good},
        "without images": {"labels_npy": labels},
        "of unlike lengths": {"images_npy": good, "labels_npy": npy("(3,)", "'<i8'", bytes(24))},
        "of negative labels": {
            "images_npy": good,
            "labels_npy": npy("(40,)", "'<i8'", np.full(40, -5).astype("<i8").tobytes()),
        },
        "of endless labels": {
            "images_npy": good,
            "labels_npy": npy("(40,)", "'<i8'", np.full(40, 1 << 40).astype("<i8").tobytes()),
        },
        "of flat images": {"images_npy": npy("(40,)", "'|u1'", bytes(40)), "labels_npy": labels},
        "of empty images": {"images_npy": npy("(40, 0, 8)", "'|u1'"), "labels_npy": labels},
        "of paths": {"..__..__images_npy": good, "labels_npy": labels},
        "of jpegs that are none": {
            "jpeg_npy": npy("(40,)", "'|u1'", bytes(40)),
            "offsets_npy": npy("(2,)", "'<i8'", struct.pack("<qq", 0, 40)),
            "labels_npy": npy("(1,)", "'<i8'", bytes(8)),
        },
        "of offsets beyond": {
            "jpeg_npy": npy("(40,)", "'|u1'", bytes(40)),
            "offsets_npy": npy("(2,)", "'<i8'", struct.pack("<qq", -9, 1 << 40)),
            "labels_npy": npy("(1,)", "'<i8'", bytes(8)),
        },
    }.items():
        yield Case(f"npz {word}", "npz", files={"data.npz": zipped(**members)})
    batch = pickle.dumps({b"data": [1], b"labels": [0]}, 2)
    for word, data in {
        "of code": pickle.dumps(Evil(), 2),
        "of nothing": b"",
        "of lists": batch,
        "of a number": pickle.dumps(3, 2),
        "of endless memos": b"\x80\x02]" + b"r\xff\xff\xff\x7f" + b".",
        "of depth": b"(" * 100_000,
        "of a long number": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30),
        "of a doubling": b"\x80\x02]q\x00" + b"(h\x00h\x00tq\x00" * 60 + b".",
    }.items():
        files = {
            name: corpus.packed(data)
            for name in (
                "data_batch_1",
                "data_batch_2",
                "data_batch_3",
                "data_batch_4",
                "data_batch_5",
                "test_batch",
                "batches.meta",
            )
        }
        yield Case(f"cifar {word}", "cifar10", files=files)
    own = {"format": "pyprune.finetune", "version": "1", "about": "{}"}
    for reader, file, kind in (
        ("finetune", "finetune.safetensors", "pyprune.finetune"),
        ("ranking", "ranking.safetensors", "pyprune.ranks.checkpoint"),
    ):
        for word, content in {
            "empty": "",
            "foreign": tensors({"__metadata__": {"format": "x"}}, b""),
            "bare": tensors({"__metadata__": {**own, "format": kind}}, b""),
            "of lists": tensors({"__metadata__": {**own, "format": kind, "about": "[]"}}, b""),
            "of nonsense": tensors(
                {
                    "__metadata__": {
                        **own,
                        "format": kind,
                        "about": json.dumps({"run": [], "fingerprint": 3, "history": 1, "done": "x"}),
                    }
                },
                b"",
            ),
            "deep": tensors({"__metadata__": {**own, "format": kind, "about": "[" * 99_999}}, b""),
            "newer": tensors({"__metadata__": {**own, "format": kind, "version": "9"}}, b""),
        }.items():
            yield Case(f"{reader} checkpoint {word}", reader, files={file: content})


def verdict(case: Case, place: Path) -> tuple[str, str]:
    """Return what the first reader says: a verdict and its words."""
    corpus.lay_out(case, BASES, place)
    try:
        READERS[case.reader][0](place)
    except ValueError as error:
        return "refused", str(error)
    except Exception as error:  # a bug: to be mended before the corpus is written
        return "wrong", f"{type(error).__name__}: {error}"
    return "harmless", ""


def main() -> None:
    groups = (
        names,
        settings,
        structure,
        texts,
        arguments,
        misfits,
        sound,
        floods,
        weights,
        places_of_files,
        documents,
        archives,
    )
    cases: dict[str, Case] = {}
    for group in groups:
        for case in group():
            key = f"{case.reader}/{case.name}"
            if key not in cases:
                cases[key] = replace(case, name=case.name.encode("ascii", "backslashreplace").decode())
    wrong = 0

    with tempfile.TemporaryDirectory() as place:
        for i, (key, case) in enumerate(cases.items()):
            found, words = verdict(case, Path(place) / str(i))
            if case.verdict == "either" and found != "wrong":
                cases[key] = replace(case, verdict=found)
                if found == "harmless":
                    print("harmless:", case.name)
            elif found != case.verdict:
                wrong += 1
                print(f"WRONG {case.reader}/{case.name}: {found}, not {case.verdict}: {words[:200]!r}", flush=True)
    corpus.write(BASES, list(cases.values()))
    print(len(cases), "cases;", wrong, "wrong;", corpus.ARCHIVE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
