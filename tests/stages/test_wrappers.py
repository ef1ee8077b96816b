"""Types, devices, memory formats and wrappers: compaction gives back what it was given, and shares nothing with it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from test_compaction import half, masked, randomised
from test_residual import NETS
from torch import nn

import pyprune as pp
from pyprune import graph, proving, wrappers
from pyprune.types import Plan
from tolerances import COMPACTED_FLOAT64

SHAPE = (3, 2, 8, 8)


def network(net="option A"):
    torch.manual_seed(0)
    return randomised(NETS[net]())


def storages(model):
    return {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers()) if one.numel()}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_proved_in_float64_and_stay_halves(net, dtype):
    model, x = network(net).to(dtype), torch.randn(SHAPE, dtype=dtype)
    slim = pp.compact(model, half(model), x, latency=False)
    found = slim.certificate
    assert found.verified
    assert found.max_difference <= COMPACTED_FLOAT64
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert found.native_difference <= found.native_tolerance == proving.NATIVE_TOLERANCES[dtype]
    assert {one.dtype for one in slim.model.parameters()} == {dtype} == {one.dtype for one in model.parameters()}
    expected, got = masked(model, slim.plan).eval()(x), slim.model.eval()(x)
    assert got.dtype == dtype
    assert (got - expected).abs().max() <= found.native_tolerance * max(1, expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["default", "channels last"])
def test_flags_and_layout_survive_and_nothing_is_shared(dtype, layout):
    model = network("projection").to(dtype=dtype, memory_format=layout)
    model.blocks[1].train(False)
    model.stem.weight.requires_grad_(False)
    model.linear.requires_grad_(False)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    slim = pp.compact(model, half(model), torch.randn(SHAPE, dtype=dtype), latency=False).model
    modules = dict(model.named_modules())
    for name, module in slim.named_modules():
        assert module.training == modules.get(name, model).training
    for name, parameter in slim.named_parameters():
        assert parameter.requires_grad == model.get_parameter(name).requires_grad, name
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=layout), name
    assert not storages(model) & storages(slim)
    with torch.no_grad():
        for one in slim.parameters():
            one.fill_(7)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def wrapped(model):
    return {
        "DataParallel": lambda: (nn.DataParallel(model), ("DataParallel",)),
        "compiled": lambda: (torch.compile(model), ("OptimizedModule",)),
        "both": lambda: (torch.compile(nn.DataParallel(model)), ("OptimizedModule", "DataParallel")),
    }


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.compile's own imports
@pytest.mark.parametrize("kind", ["DataParallel", "compiled", "both"])
def test_wrappers_are_taken_off_and_named(kind):
    model, x = network(), torch.randn(SHAPE)
    outer, names = wrapped(model)[kind]()
    plan, bare = half(outer), half(model)
    assert all(name.startswith(("module.", "_orig_mod.")) for name in plan.keep)
    slim = pp.compact(outer, plan, x, latency=False)
    assert slim.unwrapped == names
    assert list(slim.plan.keep) == list(bare.keep)
    expected = pp.compact(model, bare, x, latency=False)
    assert expected.unwrapped == ()
    assert torch.equal(slim.model.eval()(x), expected.model.eval()(x))
    assert slim.model.state_dict().keys() == expected.model.state_dict().keys()
    assert pp.analyse(outer, plan, x).parameters_left == expected.after.parameters
    assert pp.analyse(outer, bare, x).parameters_left == expected.after.parameters


def test_only_names_that_need_it_lose_their_prefix():
    plan = Plan({"module.a": [0, 2], "b": [1]}, filters={"module.a": 4, "b": 2}, method="x")
    found = wrappers.unwrapped_plan(plan, ["a", "b"])
    assert {name: kept.tolist() for name, kept in found.keep.items()} == {"a": [0, 2], "b": [1]}
    assert (dict(found.filters), found.method) == ({"a": 4, "b": 2}, "x")
    assert wrappers.unwrapped_plan(plan, ["module.a", "b"]) is plan
    model = nn.Sequential()
    model.add_module("module", nn.Sequential(nn.Conv2d(1, 4, 1)))
    assert wrappers.unwrapped(model) == (model, ())
    with pytest.raises(ValueError, match=r"no convolution named 'module\.nowhere'"):
        pp.compact(nn.DataParallel(model), Plan({"module.nowhere": [0]}), torch.ones(1, 1, 4, 4))


DISTRIBUTED = """
import sys, torch, torch.distributed as dist, pyprune as pp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from pyprune.types import Plan

rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3),
                      nn.Flatten(), nn.Linear(64, 3))
plan = Plan({"module.0": [0, 2, 5], "module.3": [1, 2]})
outer = DistributedDataParallel(model)
optimizer = torch.optim.SGD(outer.parameters(), lr=0.05, momentum=0.9)


def train(network, optimizer, steps, after):
    network.train()
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 * step + rank)
        x, y = torch.randn(4, 2, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
        after()


masks = pp.mask_(model, Plan({"0": [0, 2, 5], "3": [1, 2]}))
train(outer, optimizer, 3, masks.reapply)
slim = pp.compact(outer, plan, torch.randn(2, 2, 8, 8), latency=False)
assert slim.unwrapped == ("DistributedDataParallel",) and slim.certificate.verified
carried = slim.carry(optimizer, outer)
again = DistributedDataParallel(slim.model)
train(again, carried, 3, lambda: None)
train(outer, optimizer, 3, masks.reapply)
gathered = [None, None]
weights = {name: one.detach() for name, one in slim.model.named_parameters()}
dist.all_gather_object(gathered, weights)
assert all(torch.equal(one, gathered[1 - rank][name]) for name, one in weights.items())
own = dict(model.named_parameters())
worst = max(float((one - slim.origins[name].take(own[name]).detach()).abs().max()) for name, one in weights.items())
start = max(float(one.abs().max()) for one in weights.values())
assert pp.recalibrate(outer, [torch.randn(4, 2, 8, 8)]) == ("1",)
print(f"RESULT {worst / start}")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_compact_and_train_on(tmp_path):
    command = [sys.executable, "-c", DISTRIBUTED]
    children = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    for out, _ in outputs:
        assert float(out.split("RESULT")[1]) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["default", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("net", NETS)
def test_on_a_gpu(net, dtype, layout):
    model = network(net).to("cuda", dtype, memory_format=layout)
    x = torch.randn(SHAPE, device="cuda", dtype=dtype)
    slim = pp.compact(model, half(model), x, latency=False)
    assert slim.certificate.max_difference <= COMPACTED_FLOAT64
    assert {one.device.type for one in (*slim.model.parameters(), *slim.model.buffers())} == {"cuda"}
    assert {one.dtype for one in slim.model.parameters()} == {dtype}
    assert not storages(model) & storages(slim.model)
    for name, origin in slim.origins.items():
        kept = origin.take(model.get_parameter(name))
        assert kept.shape == slim.model.get_parameter(name).shape
        assert np.prod(origin.shape) == model.get_parameter(name).numel()
    assert set(graph.convolutions(slim.model)) == set(graph.convolutions(model))
