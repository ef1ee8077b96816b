"""The slim folder: what goes in comes out, without pyprune too, and nothing hostile gets in."""

import copy
import importlib.util
import json
import operator
import struct
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyprune as pp
from pyprune import files, graph, slimcalls, slimfile
from pyprune.types import Plan
from zoo import ENTRIES, checking


class Net(nn.Module):
    """Layers in containers and under numbers, functions, methods, a sum, sizes."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.block = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(6, 6, 3, padding="same"), nn.PReLU(6))})
        self.more = nn.Conv2d(6, 4, (3, 1), stride=(2, 1), padding=(1, 0), dilation=1, padding_mode="reflect")
        self.classifier_with_a_long_name = nn.Linear(4 * 4 * 8, 3)

    def forward(self, x):
        x = self.features(x)
        x = F.gelu(self.block["a"](x) + x, approximate="tanh")
        x = F.dropout(F.leaky_relu(self.more(x), 0.2), 0.5, self.training)
        x = F.interpolate(x, size=(4, x.shape[3]), mode="nearest").clamp(min=-5.0)
        return {"logits": -self.classifier_with_a_long_name(x.view(x.size(0), -1)), "size": x.shape[2:]}


class Residual(nn.Module):
    """Sums of branches that lose different channels, zero channels, and a slice of channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(*i, 3, padding=1) for i in ((2, 6), (6, 6), (6, 12)))
        self.last = nn.Conv2d(9, 3, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.a(x) + x)
        x = self.b(x[:, :, ::2, ::2]) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3))
        return self.last(F.pad(x, (1, 1), "constant", 0.0)[:, 2:11]).mean((2, 3))


RESIDUAL = Plan({"stem": [0, 1, 3], "a": [1, 2, 5], "b": [0, 4, 5, 7, 10]})


def compacted(model, inputs):
    layers = graph.convolutions(model)
    if isinstance(model, Residual):
        return pp.compact(model, RESIDUAL, inputs, latency=False)
    plan = Plan({name: range(0, layer.out_channels, 2) for name, layer in layers.items()})
    return pp.compact(model, plan, inputs, latency=False)


@pytest.fixture(scope="module")
def slim():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 3)
    )
    return compacted(model, torch.randn(2, 1, 8, 8))


@pytest.fixture
def folder(slim, tmp_path):
    return pp.save_slim(slim, tmp_path / "new" / "slim")


def plain(outputs):
    return next(iter(outputs.values())) if isinstance(outputs, dict) else outputs


WITHOUT_PYPRUNE = """
import importlib.util, sys
sys.modules["pyprune"] = None
import torch
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("slim_model", folder + "/slim_model.py")
    slim_model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(slim_model)
    found = slim_model.load()(load_file(folder + "/x.safetensors")["x"])
    found = next(iter(found.values())) if isinstance(found, dict) else found
    save_file({"found": found}, folder + "/found.safetensors")
assert not [name for name in sys.modules if name.startswith("pyprune.")]
"""


NETWORKS = {
    "mixed": (Net, (2, 2, 8, 8)),
    "residual": (Residual, (2, 2, 8, 8)),
    "channels last": (lambda: Residual().to(memory_format=torch.channels_last), (2, 2, 8, 8)),
    "resnet": (lambda: pp.models.resnet20(width=0.5), (2, 3, 8, 8)),
    "vgg": (lambda: pp.models.vgg16_bn(num_classes=10, width=0.125), (2, 3, 32, 32)),
    "double": (lambda: pp.models.vgg16_bn(num_classes=10, width=0.125).double(), (1, 3, 32, 32)),
    "bfloat16": (lambda: nn.Sequential(nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Conv1d(4, 2, 3)).bfloat16(), (2, 1, 8)),
}


def test_a_stride_as_wide_as_the_kernel_comes_back(tmp_path):
    """A pool's stride is its kernel's size unless it says otherwise; a convolution's is 1."""
    layers = [nn.Conv2d(2, 4, 2, stride=2), nn.MaxPool2d(2), nn.MaxPool2d(2, 1), nn.ConvTranspose2d(4, 3, 3, stride=3)]
    model, x = nn.Sequential(*layers, nn.AvgPool2d(3, stride=3)).eval(), torch.randn(2, 2, 16, 16)
    slim = pp.compact(model, Plan({}), x, latency=False)
    loaded = pp.load_slim(pp.save_slim(slim, tmp_path))
    assert [loaded.get_submodule(str(i)).stride for i in (0, 3)] == [(2, 2), (3, 3)]
    assert torch.equal(loaded(x), model(x))


def test_saved_and_loaded_networks_give_the_same_bits(tmp_path):
    torch.manual_seed(0)
    expected = {}
    for name, (build, shape) in NETWORKS.items():
        model = build()
        x = torch.randn(shape).to(next(model.parameters()).dtype)
        slim = compacted(model, x)
        place = pp.save_slim(slim, tmp_path / name)
        assert sorted(one.name for one in place.iterdir()) == [
            "README.md", "architecture.json", "model.safetensors", "slim_model.py",
        ]  # fmt: skip
        expected[name] = plain(slim.model.eval()(x))
        loaded = pp.load_slim(place)
        assert not loaded.training
        assert torch.equal(plain(loaded(x)), expected[name])
        assert list(loaded.state_dict()) == list(slim.model.state_dict())
        assert all(torch.equal(one, loaded.state_dict()[key]) for key, one in slim.model.state_dict().items())
        files.write_tensors(place / "x.safetensors", {"x": x}, {})
    folders = [str(tmp_path / name) for name in NETWORKS]
    subprocess.run([sys.executable, "-c", WITHOUT_PYPRUNE, *folders], check=True, timeout=120)
    for name, outputs in expected.items():
        found, _ = files.read_tensors("test", tmp_path / name / "found.safetensors")
        assert torch.equal(found["found"], outputs)


def test_the_source_is_formatted_linted_and_typed(tmp_path):
    place = pp.save_slim(compacted(Net(), torch.randn(2, 2, 8, 8)), tmp_path)
    source = (place / "slim_model.py").read_text()
    for command in (["format", "--check"], ["check", "--select", "E,F,W,I,UP"]):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--isolated", str(place / "slim_model.py")],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if "No module named ruff" in run.stderr:
            pytest.skip("ruff is not installed")
        assert run.returncode == 0, run.stdout + source
    assert 'padding_mode="reflect"' in source
    assert "kernel_size=(3, 1)" in source
    assert "x = self.features[" in source
    assert ' = F.gelu(block_a_0, approximate="tanh")' in source
    assert ', size=(4, getitem), mode="nearest")' in source
    assert "self.dropout = nn.Dropout()" in source
    assert ".shape" in source
    assert "def forward(self, x: torch.Tensor) -> Any:" in source


@pytest.mark.slow
def test_the_zoo_comes_back_and_its_source_is_formatted_typed_and_the_same(tmp_path):
    expected = {}
    for i, entry in enumerate(ENTRIES.values()):
        torch.manual_seed(0)
        model, x = checking.randomised(entry.build()), torch.randn(entry.shape, dtype=torch.float64)
        plan = checking.random_plan(model, 0, 0.4, run=entry.run, heads=entry.heads)
        slim = pp.compact(model, plan, x, latency=False, verify=False)
        place = pp.save_slim(slim, tmp_path / f"{i}")
        expected[place] = plain(slim.model.eval()(x.clone()))
        assert torch.equal(plain(pp.load_slim(place)(x.clone())), expected[place])
        files.write_tensors(place / "x.safetensors", {"x": x}, {})
        (tmp_path / f"slim_{i}.py").write_text((place / "slim_model.py").read_text())
    folders = [str(place) for place in expected]
    subprocess.run([sys.executable, "-c", WITHOUT_PYPRUNE, *folders], check=True, timeout=300)
    for place, outputs in expected.items():
        found, _ = files.read_tensors("test", place / "found.safetensors")
        assert torch.equal(found["found"], outputs), place
    sources = sorted(str(path) for path in tmp_path.glob("slim_*.py"))
    for tool, *options in (
        ("ruff", "format", "--check", "--isolated"), ("ruff", "check", "--isolated", "--select", "E,F,W,I,UP,RUF"),
        ("mypy", "--strict", "--config-file="),
    ):  # fmt: skip
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"{tool} is not installed")
        run = subprocess.run(
            [sys.executable, "-m", tool, *options, *sources], capture_output=True, text=True, timeout=300, cwd=tmp_path
        )
        assert run.returncode == 0, (tool, run.stdout[-3000:])


def test_layers_under_numbers_at_the_top(folder):
    source = (folder / "slim_model.py").read_text()
    assert 'self.add_module("0", nn.Conv2d(1, 3, kernel_size=3))' in source
    assert 'getattr(self, "0")(' in source


def test_the_page_tells_cost_proof_and_how_to_load(slim, folder):
    page = (folder / "README.md").read_text()
    assert f"| parameters (compact) | {slim.before.parameters:,} | {slim.after.parameters:,} |" in page
    assert f"| MACs (hrank_v1) | {slim.before.hrank_v1_macs:,} | {slim.after.hrank_v1_macs:,} |" in page
    assert "latency | not measured" in page
    assert "pp.load_slim(" in page
    assert "from slim_model import load" in page
    assert "(allowed 1e-10)" in page
    assert f"pyprune {pp.__version__}, torch {torch.__version__}" in page
    assert "plan by `manual`" in page


def test_training_after_compaction_is_saved(slim, tmp_path):
    trained = copy.deepcopy(slim)
    with torch.no_grad():
        trained.model.get_parameter("5.bias").add_(1)
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(pp.load_slim(pp.save_slim(trained, tmp_path))(x), trained.model.eval()(x))


def test_the_file_is_json_of_the_table(folder):
    content = json.loads((folder / "architecture.json").read_text())
    assert (content["format"], content["version"]) == ("pyprune.architecture", 1)
    assert content["modules"]["0"] == {
        "type": "Conv2d", "settings": {"in_channels": 1, "out_channels": 3, "kernel_size": [3, 3]}, "dtype": "float32",
    }  # fmt: skip
    assert content["nodes"][0] == {"name": "input_1", "op": "placeholder", "target": "input", "args": [], "kwargs": {}}


class Calls(nn.Module):
    def __init__(self, call, part=None):
        super().__init__()
        self.conv, self.call, self.part = nn.Conv2d(1, 2, 1), call, part

    def forward(self, x):
        return self.call(self, self.conv(x))


def hooked():
    module = nn.ReLU()
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("call", "part", "message"),
    [
        (lambda s, x: torch.fft.fft(x).real, None, "calls fft_fft, which the slim format does not hold"),
        (lambda s, x: x.cumsum(1), None, "'call_method' with target 'cumsum'"),
        (lambda s, x: x.mT, None, "no possible value"),
        (lambda s, x: s.part(x), nn.Bilinear(1, 1, 1), "part is a Bilinear, which the slim format does not hold"),
        (lambda s, x: s.part(x), hooked(), "part has a forward hook, which the slim format does not hold"),
        (lambda s, x: s.part(x)[0], nn.MaxPool2d(1, return_indices=True), "part returns indices, which"),
        (lambda s, x: x * s.conv.weight.sum(), None, "reads conv.weight directly"),
        (lambda s, x: x.to(torch.float64), None, "argument of type dtype"),
    ],
)
def test_what_the_table_lacks_is_named_and_nothing_is_written(call, part, message, tmp_path):
    model = Calls(call, part)
    if isinstance(part, nn.Bilinear):
        model.call = lambda s, x: s.part(x.flatten(0).unsqueeze(1), x.flatten(0).unsqueeze(1))
    slim = pp.compact(model, Plan({"conv": [0, 1]}), torch.randn(1, 1, 3, 3), latency=False, verify=False)
    with pytest.raises(ValueError, match=message):
        pp.save_slim(slim, tmp_path / "slim")
    assert not (tmp_path / "slim").exists()


def test_names_that_hide_a_modules_own_are_refused(tmp_path):
    model = nn.Sequential(nn.Sequential())
    model[0].values = nn.Conv2d(1, 2, 1)
    slim = pp.compact(model, Plan({"0.values": [0]}), torch.randn(1, 1, 3, 3), latency=False, verify=False)
    with pytest.raises(ValueError, match=r"'0\.values' hides what every module has"):
        pp.save_slim(slim, tmp_path)


def test_other_objects_and_places_are_refused(slim, tmp_path):
    with pytest.raises(TypeError, match="save_slim: needs what compact returned; got Sequential"):
        pp.save_slim(nn.Sequential(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_slim: the output folder must be writable"):
        pp.save_slim(slim, tmp_path / "file" / "slim")


def edited(folder, change):
    path = folder / "architecture.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def settle(path, value):
    """Return a change that puts ``value`` at ``path``."""

    def change(content):
        *parents, last = path
        for parent in parents:
            content = content[parent]
        content[last] = value

    return change


def drop(path):
    def change(content):
        *parents, last = path
        for parent in parents:
            content = content[parent]
        del content[last]

    return change


def renamed(old, new):
    def change(content):
        content["modules"] = {new if name == old else name: module for name, module in content["modules"].items()}
        for node in content["nodes"]:
            if node.get("target") == old:
                node["target"] = new

    return change


NODE = ("nodes", 1)


def call(op, target, args):
    return settle(NODE, {"name": "x", "op": op, "target": target, "args": args, "kwargs": {}})


HUGE = {"in_channels": 1 << 20, "out_channels": 1 << 20, "kernel_size": [1 << 20] * 2}
HOSTILE = {
    "foreign": (settle(["format"], "other"), "must be a 'pyprune.architecture' file"),
    "newer": (settle(["version"], 2), "format version 2"),
    "more keys": (settle(["code"], "x"), "and nothing else"),
    "no nodes": (settle(["nodes"], []), "must have 1 to"),
    "many nodes": (settle(["nodes"], [{}] * 20_001), "must have 1 to"),
    "nodes of text": (settle(["nodes"], ["x"]), "a node must have"),
    "modules a list": (settle(["modules"], []), "must hold format"),
    "unknown type": (settle(["modules", "2", "type"], "Embedding"), "'Embedding', which the slim format does not hold"),
    "type of number": (settle(["modules", "2", "type"], 3), "of type 3"),
    "unknown dtype": (settle(["modules", "0", "dtype"], "object"), "has the dtype 'object'"),
    "huge count": (settle(["modules", "0", "settings", "out_channels"], 1 << 40), "no possible value"),
    "true count": (settle(["modules", "0", "settings", "out_channels"], True), "no possible value"),
    "negative size": (settle(["modules", "0", "settings", "kernel_size"], [-1, 3]), "no possible value"),
    "long size": (settle(["modules", "0", "settings", "kernel_size"], [3] * 9), "no possible value"),
    "overflow": (
        settle(["modules", "0", "settings"], HUGE), "no possible value",
    ),
    "infinite": (settle(["modules", "1", "settings", "eps"], 1e999), "not readable JSON"),
    "large number": (settle(["modules", "1", "settings", "eps"], 1e30), "no possible value"),
    "text": (settle(["modules", "0", "settings", "padding_mode"], "import os"), "no possible value"),
    "unknown setting": (settle(["modules", "0", "settings", "device"], "cuda"), "must have the settings of a Conv2d"),
    "missing setting": (drop(["modules", "0", "settings", "kernel_size"]), "must have the settings of a Conv2d"),
    "bad groups": (settle(["modules", "0", "settings", "groups"], 7), "cannot be a Conv2d"),
    "other shape": (settle(["modules", "0", "settings", "out_channels"], 4), "must be F32 .* by the architecture"),
    "other dtype": (settle(["modules", "0", "dtype"], "float16"), "must be F16 .* by the architecture"),
    "module lost": (drop(["modules", "2"]), "has op 'call_module' with target '2'"),
    "tensor lost": (renamed("0", "7"), "the files do not belong together"),
    "code in a name": (renamed("0", "x=__import__('os').system('id')"), "names must be ASCII identifiers"),
    "dotted nothing": (renamed("0", "a..b"), "names must be ASCII identifiers"),
    "deep name": (renamed("0", ".".join("a" * 40)), "nested too deep"),
    "hiding name": (renamed("0", "forward"), "hides what every module has"),
    "child of a layer": (renamed("0", "2.x"), "is a layer and cannot hold"),
    "node of code": (settle([*NODE, "name"], "x;import os"), "names must be ASCII identifiers"),
    "node of number": (settle([*NODE, "name"], "1"), "taken or no variable"),
    "node self": (settle([*NODE, "name"], "self"), "taken or no variable"),
    "doubled node": (settle([*NODE, "name"], "input_1"), "taken or no variable"),
    "unknown op": (settle([*NODE, "op"], "exec"), "has op 'exec'"),
    "early output": (settle([*NODE, "op"], "output"), "has op 'output'"),
    "get_attr": (settle([*NODE, "op"], "get_attr"), "has op 'get_attr'"),
    "function": (call("call_function", "os.system", ["ls"]), "'os.system'"),
    "dunder": (call("call_method", "__reduce__", [{"node": "input_1"}]), "'__reduce__'"),
    "attribute": (call("call_function", "getattr", [{"node": "input_1"}, "__class__"]), "no possible value"),
    "method of a number": (call("call_method", "view", [5]), "cannot take"),
    "string argument": (settle([*NODE, "args"], [{"node": "input_1"}, "rm -rf"]), "no possible value"),
    "huge argument": (settle([*NODE, "args"], [1 << 70]), "no possible value"),
    "later node": (settle([*NODE, "args"], [{"node": "_5"}]), "not computed before it"),
    "odd argument": (settle([*NODE, "args"], [{"lambda": []}]), "malformed argument"),
    "nested argument": (settle([*NODE, "args"], [[[[[[[[[1]]]]]]]]]), "nested too deep"),
    "long argument": (settle([*NODE, "args"], [[1] * 5000]), "more than 4096 items"),
    "many arguments": (settle([*NODE, "args"], [1] * 65), "more than 64 arguments"),
    "keyword of code": (settle([*NODE, "kwargs"], {"a=1": 1}), "names must be ASCII identifiers"),
    "starred input": (settle(["nodes", 0, "target"], "*args"), "names must be ASCII identifiers"),
    "input self": (settle(["nodes", 0, "target"], "self"), "the names of the inputs must be their own"),
    "input as a node": (settle(["nodes", 0, "target"], "_1"), "the names of the inputs must be their own"),
    "no output": (drop(["nodes", -1]), "has op 'call_module'"),
    "empty output": (settle(["nodes", -1, "args"], []), "cannot take"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_architectures_are_refused(case, folder, monkeypatch):
    change, message = HOSTILE[case]
    edited(folder, change)
    monkeypatch.setattr(files, "read_tensors", lambda *_: pytest.fail("tensors were read"))
    with pytest.raises(ValueError, match=message):
        pp.load_slim(folder)


@pytest.fixture
def residual(tmp_path):
    torch.manual_seed(0)
    return pp.save_slim(compacted(Residual(), torch.randn(2, 2, 8, 8)), tmp_path / "residual")


def test_the_indices_stand_in_the_file_and_in_the_source(residual):
    content = json.loads((residual / "architecture.json").read_text())
    assert content["indices"] == {"add_grown": 5, "add_index": 3, "add_1_grown": 7, "add_1_index": 4}
    source = (residual / "slim_model.py").read_text()
    assert 'self.register_buffer("add_index", torch.empty(3, dtype=torch.int64))' in source
    assert ", 1, self.add_index, " in source
    assert "F.pad(a, (0, 0, 0, 0, 0, 1))" in source
    check = [sys.executable, "-m", "ruff", "format", "--check", "--isolated", str(residual / "slim_model.py")]
    run = subprocess.run(check, capture_output=True, text=True, timeout=60)
    if "No module named ruff" in run.stderr:
        pytest.skip("ruff is not installed")
    assert run.returncode == 0, source


def of_node(name, key, value):
    def change(content):
        node = next(node for node in content["nodes"] if node.get("target") == name)
        node[key] = value

    return change


def reading(content):
    reader = next(node for node in content["nodes"] if node.get("target") == "F.relu")
    place = next(i for i, node in enumerate(content["nodes"]) if node["op"] == "get_attr")
    index = content["nodes"].pop(place)
    content["nodes"].insert(1, index)
    reader["args"] = [{"node": index["name"]}]


ADD = "torch.index_add"
HOSTILE_INDICES = {
    "a list": (settle(["indices"], []), "must hold format"),
    "no length": (settle(["indices", "add_index"], 0), "must have a length from 1"),
    "true length": (settle(["indices", "add_index"], True), "must have a length from 1"),
    "huge length": (settle(["indices", "add_index"], 1 << 40), "must have a length from 1"),
    "other length": (settle(["indices", "add_index"], 4), r"must be I64 \[4\] by the architecture"),
    "lost": (drop(["indices", "add_index"]), "has op 'get_attr' with target 'add_index'"),
    "unread": (settle(["indices", "more"], 2), "the index 'more' is read by nothing"),
    "code": (settle(["indices", "x;import os"], 2), "names must be ASCII identifiers"),
    "dotted": (settle(["indices", "stem.x"], 2), "is taken or no variable"),
    "a layer's": (settle(["indices", "stem"], 2), "is taken or no variable"),
    "number": (settle(["indices", "7"], 2), "is taken or no variable"),
    "hiding": (settle(["indices", "forward"], 2), "hides what every module has"),
    "an argument": (of_node("add_index", "args", [1]), "cannot take"),
    "a parameter": (of_node("add_index", "target", "stem.weight"), "has op 'get_attr' with target 'stem.weight'"),
    "read by another": (reading, "reads an index, which only"),
    "no index": (of_node(ADD, "args", [{"node": "a"}, 1, {"node": "a"}, {"node": "a"}]), "needs an index as its third"),
    "an index of numbers": (of_node(ADD, "args", [{"node": "a"}, 1, [0, 1], {"node": "a"}]), "cannot take"),
    "the batch": (of_node(ADD, "args", [{"node": "a"}, 0, {"node": "add_index"}, {"node": "a"}]), "cannot take"),
    "few arguments": (of_node(ADD, "args", [{"node": "a"}, 1]), "cannot take"),
    "keywords": (of_node(ADD, "kwargs", {"alpha": 2}), "cannot take"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_INDICES)
def test_hostile_descriptions_of_indices_are_refused(case, residual, monkeypatch):
    change, message = HOSTILE_INDICES[case]
    edited(residual, change)
    monkeypatch.setattr(files, "read_tensors", lambda *_: pytest.fail("tensors were read"))
    with pytest.raises(ValueError, match=message):
        pp.load_slim(residual)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("add_index", [0, 1, 5], "'add_index' must hold numbers from 0 to 4; it reaches beyond"),
        ("add_index", [-1, 1, 2], "'add_index' must hold numbers from 0 to 4"),
        ("add_index", [0, 2, 1], "'add_index' must increase strictly"),
        ("add_index", [1, 1, 2], "'add_index' must increase strictly"),
        ("add_grown", [0, 1, 2, 3, 4], "'add_grown' must hold numbers from 0 to 3"),
        ("add_1_grown", [1 << 40] * 7, "'add_1_grown' must hold numbers from 0 to"),
    ],
)
def test_hostile_indices_are_refused(name, values, message, residual):
    tensors, metadata = files.read_tensors("test", residual / "model.safetensors")
    tensors[name] = torch.tensor(values)
    files.write_tensors(residual / "model.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=message):
        pp.load_slim(residual)


def test_an_index_that_does_not_fit_its_branch_is_refused(residual):
    tensors, metadata = files.read_tensors("test", residual / "model.safetensors")
    tensors["add_index"] = torch.tensor([0, 1])
    files.write_tensors(residual / "model.safetensors", tensors, metadata)
    edited(residual, settle(["indices", "add_index"], 2))
    with pytest.raises(ValueError, match="'add_index' must have one entry a channel of its branch; it has 2"):
        pp.load_slim(residual)


def test_a_union_is_called_lossy_on_the_page(tmp_path):
    model = Residual()
    slim = pp.compact(model, RESIDUAL, torch.randn(2, 2, 8, 8), latency=False, residual="union")
    assert "of those filters are not in the plan" in (pp.save_slim(slim, tmp_path) / "README.md").read_text()


def test_truncated_and_missing_files_are_refused(folder):
    data = {name: (folder / name).read_bytes() for name in ("architecture.json", "model.safetensors")}
    for name, content in data.items():
        for size in {0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 3}:
            (folder / name).write_bytes(content[:size])
            with pytest.raises(ValueError, match="load_slim"):
                pp.load_slim(folder)
        (folder / name).unlink()
        with pytest.raises(ValueError, match="load_slim"):
            pp.load_slim(folder)
        (folder / name).write_bytes(content)
    assert pp.load_slim(folder) is not None
    with pytest.raises(ValueError, match="load_slim: needs a file; there is none"):
        pp.load_slim(folder / "nowhere")


def header_of(folder):
    content = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def weights(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_hostile_weights_are_refused(folder):
    path = folder / "model.safetensors"
    header, data = header_of(folder)
    first = header["0.bias"]
    doubled = f'{json.dumps(header)[:-1]}, "0.bias": {json.dumps(first)}}}'
    cases = {
        "claims": struct.pack("<Q", 1 << 60) + b"{}",
        "impossible size": weights({**header, "0.bias": {**first, "shape": [1 << 40, 0]}}, data),
        "does not,": weights({**header, "more": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, data),
        "stands twice": weights(doubled.encode(), data),
        "lacks the tensor": weights({"x": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}, data),
        "by the architecture": weights({**header, "0.bias": {**first, "dtype": "I32"}}, data),
        "malformed": weights({**header, "0.bias": {**first, "dtype": "PICKLE"}}, data),
    }  # fmt: skip
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            pp.load_slim(folder)


def test_the_tables_agree():
    """Every operation that compaction follows can be saved, and every name in the tables finds its way back."""
    from pyprune import channels

    for op, key in channels._HANDLERS:
        table = {"call_module": slimfile.MODULES, "call_function": slimfile.FUNCTIONS, "call_method": slimfile.METHODS}
        assert key in table[op], key
    assert len(slimfile.FUNCTION_NAMES) == len(slimfile.FUNCTIONS)
    operations = {*slimfile.FUNCTION_NAMES, *(f".{name}" for name in slimfile.METHODS), "module"}
    assert operations == slimcalls.SIGNATURES.keys()  # what each may be given
    for signature in slimcalls.SIGNATURES.values():
        assert {*signature.sorts, signature.rest or "tensor"} <= slimcalls._SORTS.keys()
    for name, function in slimfile.FUNCTION_NAMES.items():
        home, leaf = name.rsplit(".", 1) if "." in name else ("", name)
        owner = {"F": F, "torch": torch, "operator": operator, "": __builtins__}[home]
        assert (owner[leaf] if isinstance(owner, dict) else getattr(owner, leaf)) is function


class Own(nn.Module):
    """Somebody's own class, of any width, with a residual sum and a folded constant."""

    def __init__(self, a=8, b=6, c=6, literal=False):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, a, 3, padding=1, bias=False), nn.BatchNorm2d(a)
        self.block = nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.Sigmoid())
        self.middle = nn.Conv2d(b, a, 1, bias=False)
        self.last, self.linear = nn.Conv2d(a, c, 3), nn.Linear(c * 16, 3)
        self.literal = literal

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.last(x + self.middle(self.block(x))))
        return self.linear(x.view(-1, 96) if self.literal else x.flatten(1))


OWN = Plan({"stem": [0, 1, 3, 6], "block.0": [1, 2, 5], "middle": [0, 1, 2, 6], "last": [0, 4, 5]})


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    torch.manual_seed(0)
    slim = pp.compact(Own(), OWN, torch.randn(3, 2, 6, 6), residual="intersect", latency=False)
    return slim, pp.save_slim(slim, tmp_path_factory.mktemp("own"))


def test_a_class_of_ones_own_gets_the_slim_network(own):
    slim, folder = own
    for model in (Own(), Own(5, 3, 3), nn.DataParallel(Own()), Own().double()):
        inside = getattr(model, "module", model)
        inside.stem.weight.requires_grad_(False)
        inside.last.train(False)
        assert pp.load_into(model, folder) is model
        x = torch.randn(4, 2, 6, 6)
        assert inside.training
        assert not inside.last.training
        assert not inside.stem.weight.requires_grad
        assert inside.middle.bias.requires_grad  # folded sigmoids made it
        assert (inside.stem.out_channels, inside.block[0].out_channels, inside.linear.in_features) == (5, 3, 48)
        assert torch.equal(inside.eval()(x), slim.model.eval()(x))
        assert {name: one.shape for name, one in inside.state_dict().items()} == {
            name: one.shape for name, one in slim.model.state_dict().items()
        }
        inside.train()(x).sum().backward()
        with torch.no_grad():
            inside.linear.bias[0] += 1
        assert not torch.equal(inside.eval()(x), slim.model.eval()(x))


def other(change):
    model = Own()
    change(model)
    return model


def without_examples(folder, tmp_path, text=None):
    place = tmp_path / "copy"
    place.mkdir()
    for name in ("architecture.json", "model.safetensors"):
        (place / name).write_bytes((folder / name).read_bytes())
    tensors, metadata = files.read_tensors("test", place / "model.safetensors")
    metadata.pop("inputs")
    more = {} if text is None else {"inputs": text}
    files.write_tensors(place / "model.safetensors", tensors, {**metadata, **more})
    return place


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: delattr(m, "block"), "Own has no layer 'block.0', and the slim network has"),
        (
            lambda m: setattr(m, "stem", nn.Conv1d(2, 8, 3)),
            "'stem' must be a Conv2d, as in the slim network; it is a C",
        ),
        (lambda m: setattr(m, "stem", nn.Conv2d(2, 8, 3)), r"'stem' must have padding=\(1, 1\), .* it has \(0, 0\)"),
        (lambda m: setattr(m, "norm", nn.BatchNorm2d(8, eps=1e-3)), r"'norm' must have eps=1e-05, .*; it has 0\.001"),
        (lambda m: setattr(m, "norm", nn.BatchNorm2d(8, affine=False)), "'norm' must have affine=True"),
        (lambda m: setattr(m, "stem", nn.Conv2d(2, 8, 3, padding=1)), "only in the model 'stem' has a bias"),
        (lambda m: setattr(m, "extra", nn.Linear(2, 2)), r"Own has 'extra\.bias', and the slim network does not"),
        (lambda m: m.stem.register_forward_hook(print), "'stem' has a forward hook, so it cannot be resized"),
        (lambda m: setattr(m, "literal", True), r"the forward of Own fails with the slim widths .*x\.flatten\(1\)"),
        (lambda m: setattr(m.block, "2", nn.Tanh()), "with the slim widths and numbers Own computes something else"),
    ],
)
def test_a_class_that_does_not_fit_is_refused_and_untouched(own, change, words):
    model = other(change)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    widths = model.stem.out_channels, model.linear.in_features
    with pytest.raises(ValueError, match=f"load_into: {words}"):
        pp.load_into(model, own[1])
    assert (model.stem.out_channels, model.linear.in_features) == widths
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_indexed_additions_are_not_in_ones_own_forward(tmp_path):
    torch.manual_seed(0)
    slim = pp.compact(Own(), OWN, torch.randn(3, 2, 6, 6), latency=False)
    folder = pp.save_slim(slim, tmp_path)
    with pytest.raises(ValueError, match=r"computes index_\w+ by torch\.index_\w+, .* residual=\"intersect\""):
        pp.load_into(Own(), folder)


@pytest.mark.parametrize(
    "text",
    [None, "", "[", "[[[1, 2, 6, 6], \"object\"]]", "[[[2, 2, 6, 6]]]", "[[[1, -2, 6, 6], \"float32\"]]", "{}", "7",
     "[[[1, 2, 1000000, 1000000], \"float32\"]]", "[" * 4000, "[]",
     "[[[1e3, 2], \"float32\"]]", "[[\"ab\", \"float32\"]]", "[[[true, 2, 6, 6], [1]]]"],
)  # fmt: skip
def test_a_folder_without_usable_examples_needs_some(own, tmp_path, text):
    place = without_examples(own[1], tmp_path, text)
    model = Own()
    with pytest.raises(ValueError, match=r"load_into: the folder records no inputs .* or impossible ones"):
        pp.load_into(model, place)
    assert model.stem.out_channels == 8
    pp.load_into(model, place, example_inputs=torch.randn(2, 2, 6, 6))
    assert model.stem.out_channels == 5


def test_a_folder_that_records_inputs_it_cannot_take_is_refused(own, tmp_path):
    place = without_examples(own[1], tmp_path, '[[[1, 5, 6, 6], "float32"]]')
    with pytest.raises(ValueError, match=r"load_into: the operations do not fit together .*\[1, 5, 6, 6\] \(stem: "):
        pp.load_into(Own(), place, example_inputs=torch.randn(2, 2, 6, 6))


def test_a_foreign_folder_is_refused_by_name(own, tmp_path):
    with pytest.raises(ValueError, match=r"load_into: .*architecture\.json"):
        pp.load_into(Own(), tmp_path)
    place = without_examples(own[1], tmp_path)
    files.write_tensors(place / "model.safetensors", {"x": torch.ones(1)}, {})
    with pytest.raises(ValueError, match=r"load_into: .* lacks the tensor|load_into: .* has, and the architecture"):
        pp.load_into(Own(), place)
