"""The counter of maps that are not finite on a GPU: raised once, later, and never while a graph is recorded."""

import pytest
import torch

import pyprune as pp
from pyprune.ops import _finite

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
