"""The counter of maps that are not finite on a GPU: raised once, later, and never while a graph is recorded."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import pyprune as pp
from pyprune import machine
from pyprune.machine import Machine
from pyprune.ops import _cuda, _finite
from pyprune.ops.rank import _run

GPU = torch.device("cuda", 0)
OTHER = torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch, request):
    """Counters in ordinary memory; none from other tests."""
    monkeypatch.setattr(_finite, "_counters", {})
    monkeypatch.setattr(_finite, "_raised", {})
    if "gpu" not in request.keywords:
        monkeypatch.setattr(_finite, "_pinned", lambda: torch.zeros(1, dtype=torch.int64))


def test_what_a_kernel_counts_is_raised_once():
    _finite.counter(GPU).add_(2)
    with pytest.raises(
        ValueError, match="maps must be finite; 2 of those ranked before on cuda:0 hold NaN or infinity"
    ):
        _finite.poll(GPU)
    _finite.poll(GPU)
    _finite.counter(GPU).add_(1)
    with pytest.raises(ValueError, match="maps must be finite; 1 of those"):
        _finite.poll()
    _finite.poll()


def test_every_device_has_its_own():
    assert _finite.counter(GPU) is _finite.counter(GPU)
    assert _finite.counter(GPU) is not _finite.counter(OTHER)
    _finite.counter(OTHER).add_(1)
    _finite.poll(GPU)
    with pytest.raises(ValueError, match="on cuda:1"):
        _finite.poll()


def test_looking_where_nothing_was_counted():
    _finite.poll()
    _finite.poll(GPU)
    assert _finite._counters == {}


@pytest.fixture
def launches(monkeypatch):
    """The compiled kernels of a GPU that is not here: what they are called with."""
    calls = []

    def launch(maps, rtol, layout, not_finite):
        calls.append((tuple(maps.shape), rtol, layout, not_finite))
        return maps.new_empty(maps.shape[:2], dtype=torch.int32), layout

    here = Machine((), (("cuda_thread", 4), ("cuda_group8", 8)), "cuda")
    monkeypatch.setattr(machine, "this_machine", lambda gpu=0: here)
    monkeypatch.setattr(_cuda, "rank", launch)
    return calls


def test_a_checked_call_hands_the_counter_to_the_kernel_and_looks_at_it_first(launches):
    counter = _finite.counter(GPU)
    with FakeTensorMode():
        maps = torch.empty(5, 2, 3, 8, 6, device="cuda")
    ranks, ran = _run(maps)
    assert (tuple(ranks.shape), ranks.device.type, ran) == ((5, 2, 3), "cuda", "cuda_group8")
    assert launches == [((10, 3, 8, 6), None, "cuda_group8", counter)]
    counter.add_(1)
    with pytest.raises(ValueError, match="1 of those ranked before on cuda:0"):
        _run(maps)
    assert len(launches) == 1


def test_nothing_is_counted_unchecked_or_into_a_graph(launches, monkeypatch):
    _finite.counter(GPU).add_(1)
    with FakeTensorMode():
        maps = torch.empty(2, 1, 7, 3, 3, device="cuda")
    _run(maps, check=False, rtol=1e-3)
    monkeypatch.setattr(_finite, "capturing", lambda: True)
    _run(maps)
    assert launches == [((2, 7, 3, 3), 1e-3, "cuda_thread", None), ((2, 7, 3, 3), None, "cuda_thread", None)]


@pytest.mark.gpu
def test_on_a_gpu_a_later_call_raises():
    maps = torch.ones(1000, 8, 8, device="cuda")
    maps[17, 3, 4] = torch.nan
    ranks = pp.matrix_rank(maps)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="maps must be finite; 1 of those ranked before on cuda:0"):
        pp.matrix_rank(maps[:5])
    assert ranks.tolist() == [1] * 17 + [-1] + [1] * 982
    assert pp.matrix_rank(maps, check=False).tolist() == ranks.tolist()
    torch.cuda.synchronize()
    _finite.poll()


@pytest.mark.gpu
def test_nothing_is_raised_into_a_graph():
    maps = torch.ones(1000, 8, 8, device="cuda")
    pp.matrix_rank(maps)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert _finite.capturing()
        ranks = pp.matrix_rank(maps)
    maps[3, 1, 1] = torch.inf
    maps[4] = torch.eye(8)
    graph.replay()
    torch.cuda.synchronize()
    assert ranks[:5].tolist() == [1, 1, 1, -1, 8]
    _finite.poll()


@pytest.mark.gpu
def test_the_way_that_all_maps_take_does_not_wait():
    maps = torch.ones(1000, 8, 8, device="cuda")
    pp.matrix_rank(maps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pp.matrix_rank(maps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
