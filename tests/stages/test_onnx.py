"""Files for other runtimes: what onnxruntime computes is what the slim network computes, for any number of images."""

import copy
import importlib.util
import logging

import pytest
import torch
import torch.nn.functional as F
from test_compaction import half, randomised
from test_residual import NETS
from torch import nn

import pyprune as pp
from pyprune import deployment
from pyprune.types import Plan

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def compacted(model, *shape, **options):
    torch.manual_seed(0)
    return pp.compact(randomised(model), half(model), torch.randn(shape), latency=False, **options)


@pytest.fixture(scope="module")
def slim():
    return compacted(NETS["option A"](), 2, 2, 8, 8)


@pytest.fixture(scope="module")
def exported(slim, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "new" / "slim.onnx"
    return path, pp.export_onnx(slim, path)


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def scores(path, images):
    return torch.from_numpy(session(path).run(None, {"input": images.numpy()})[0])


def test_indexed_additions_are_exported_for_any_number_of_images(slim, exported):
    path, found = exported
    assert sum(node.target is torch.index_add for node in slim.model.graph.nodes) > 1
    graph = onnx.load(path).graph
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert "ScatterND" in {node.op_type for node in graph.node}
    for count in (1, 3, 11):
        images = torch.randn(count, 2, 8, 8)
        expected = slim.model.eval()(images).detach()
        assert (scores(path, images) - expected).abs().max() <= found.tolerance * max(1, expected.abs().max())
        assert (scores(path, 10 * images + 1) - expected).abs().max() > found.tolerance


def test_what_is_reported(slim, exported):
    path, found = exported
    assert isinstance(found, pp.Exported)
    assert (found.path, found.kind, found.opset, found.verified) == (str(path), "onnx", 18, True)
    assert found.bytes == path.stat().st_size
    assert found.inputs == (
        "example inputs (2 images)", "normal random inputs (1 images)", "normal random inputs (3 images)",
    )  # fmt: skip
    assert found.max_difference <= found.tolerance == deployment.TOLERANCES[torch.float32]
    assert f"opset 18, {found.bytes:,} bytes; largest relative difference" in str(found)
    assert [item.name for item in path.parent.iterdir()] == ["slim.onnx"]


class Two(nn.Module):
    """Two inputs, one without images, outputs in a dictionary."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 3, 1)

    def forward(self, x, y):
        x = self.last(F.silu(self.conv(x)))
        return {"sum": x + y, "mean": x.mean((2, 3))}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["two inputs", "vgg", "resnet56", "channels last", "float16", "bare", "trained"])
def test_networks_are_exported(case, tmp_path):
    path, example = tmp_path / "slim.onnx", None
    if case == "two inputs":
        inputs = (torch.randn(3, 1, 8, 8), torch.randn(1, 3, 1, 1))
        slim = pp.compact(Two(), Plan({"conv": [0, 4]}), inputs, latency=False)
    elif case == "vgg":
        slim = compacted(pp.models.vgg16_bn(width=0.25), 1, 3, 32, 32)
    elif case == "resnet56":
        slim = compacted(pp.models.resnet56(), 1, 3, 32, 32)
    elif case == "channels last":
        slim = compacted(NETS["projection"]().to(memory_format=torch.channels_last), 2, 2, 8, 8)
    elif case == "float16":
        model = NETS["option A"]().half()
        slim = pp.compact(model, half(model), torch.randn(2, 2, 8, 8).half(), residual="intersect", latency=False)
    elif case == "bare":
        slim, example = nn.DataParallel(NETS["three branches"]().train()), torch.randn(1, 2, 8, 8)
    else:
        slim = compacted(NETS["pre-activation"](), 2, 2, 8, 8)
        slim.model.train()
        slim.model(torch.randn(4, 2, 8, 8)).sum().backward()
    found = pp.export_onnx(slim, path, example_inputs=example)
    assert found.verified
    assert found.max_difference <= found.tolerance
    inputs = session(path).get_inputs()
    assert not isinstance(inputs[0].shape[0], int)
    if case == "two inputs":
        assert [one.name for one in inputs] == ["input_0", "input_1"]
        assert inputs[1].shape == [1, 3, 1, 1]
    if case == "trained":
        assert slim.model.training
        assert slim.model.linear.weight.grad is not None
    if case == "bare":
        assert slim.training


def test_the_model_is_not_changed_and_logging_goes_on(slim, tmp_path):
    model = copy.deepcopy(slim.model).train()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    level = logging.getLogger("torch.onnx").level
    found = pp.export_onnx(model, tmp_path / "a.onnx", example_inputs=torch.randn(1, 2, 8, 8), verify=False)
    assert not found.verified
    assert found.max_difference is None
    assert str(found).endswith("not compared")
    assert model.training
    assert all(one.requires_grad for one in model.parameters())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert logging.getLogger("torch.onnx").level == level


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, x):
        return self.conv(x).view(2, 64)


def test_a_network_that_counts_its_images_needs_a_fixed_number(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 2, 6, 6)
    with pytest.raises(ValueError, match=r"export_onnx: the network .* Pass dynamic_batch=False if it"):
        pp.export_onnx(Fixed(), tmp_path / "a.onnx", example_inputs=x)
    assert not (tmp_path / "a.onnx").exists()
    found = pp.export_onnx(Fixed(), tmp_path / "a.onnx", example_inputs=x, dynamic_batch=False)
    assert found.inputs == ("example inputs (2 images)", "normal random inputs (2 images)")
    assert session(tmp_path / "a.onnx").get_inputs()[0].shape == [2, 2, 6, 6]


def test_a_wrong_file_is_not_written(slim, tmp_path, monkeypatch):
    right = deployment._runtime

    def wrong(who, data):
        run = right(who, data)
        return lambda batch: [one + 1e-2 for one in run(batch)]

    monkeypatch.setattr(deployment, "_runtime", wrong)
    with pytest.raises(RuntimeError, match=r"differs from the slim one by 0\.0.*, more than 1e-05; nothing is written"):
        pp.export_onnx(slim, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(slim, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    with pytest.raises(ValueError, match=r"needs onnx and onnxscript and onnxruntime, which are not .*pyprune\[onnx\]"):
        pp.export_onnx(slim, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=r"needs onnx and onnxscript, which are not installed"):
        pp.export_onnx(slim, tmp_path / "a.onnx", verify=False)


@pytest.mark.parametrize(
    ("what", "options", "error", "words"),
    [
        ("slim", {"opset": 9}, ValueError, "opset must be a whole number from 18 to 25; got 9"),
        ("slim", {"opset": True}, ValueError, "opset must be a whole number"),
        (
            "slim",
            {"example_inputs": torch.ones(1, 5, 8, 8)},
            ValueError,
            r"the network cannot take inputs of \[1, 5, 8",
        ),
        ("slim", {"example_inputs": "x"}, TypeError, "example_inputs must be a tensor"),
        ("model", {}, ValueError, "a bare network needs example_inputs"),
        ("plan", {}, TypeError, "needs what compact returned, or a network; got Plan"),
    ],
)
@pytest.mark.parametrize("export", [pp.export_onnx, pp.export_pt2])
def test_arguments_are_checked(slim, tmp_path, export, what, options, error, words):
    if export is pp.export_pt2 and "opset" in options:
        return
    given = {"slim": slim, "model": slim.model, "plan": slim.plan}[what]
    with pytest.raises(error, match=f"{export.__name__}: {words}"):
        export(given, tmp_path / "a", **options)
    assert list(tmp_path.iterdir()) == []


def test_pt2_files(slim, tmp_path):
    found = pp.export_pt2(slim, tmp_path / "slim.pt2")
    assert (found.kind, found.opset, found.verified) == ("pt2", None, True)
    assert found.max_difference <= 1e-6
    loaded = torch.export.load(tmp_path / "slim.pt2").module()
    for count in (1, 5):
        images = torch.randn(count, 2, 8, 8)
        assert torch.allclose(loaded(images), slim.model.eval()(images), atol=1e-6)


@pytest.mark.slow
def test_what_onnxruntime_lacks_is_said(tmp_path):
    model = NETS["option A"]().half()
    slim = pp.compact(model, half(model), torch.randn(2, 2, 8, 8).half(), latency=False)
    words = r"fails on example inputs \(2 images\) .*ScatterND.*Convert the network to float32, or pass verify=False"
    with pytest.raises(ValueError, match=words):
        pp.export_onnx(slim, tmp_path / "a.onnx")
    assert not pp.export_onnx(slim, tmp_path / "a.onnx", verify=False).verified


@pytest.mark.gpu
def test_from_a_gpu(slim, tmp_path):
    model = copy.deepcopy(slim.model).cuda()
    found = pp.export_onnx(model, tmp_path / "a.onnx", example_inputs=torch.randn(1, 2, 8, 8, device="cuda"))
    assert found.verified
    assert next(model.parameters()).is_cuda
