"""The compiled rank kernels on a GPU: equal to their twin on the host, on any stream, in graphs, over many layers."""

import numpy as np
import pytest
import torch
from rank_families import EPS32, FAMILIES, make
from test_rank_twin import LAYOUTS, QUICK, WIDE, ambiguous, twin

from pyprune import _core
from pyprune.ops import _cuda, _reference

REASON = _core.cuda_device_reason(0) if torch.cuda.is_available() else "torch finds no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=f"needs the CUDA kernels: {REASON}")]


def ranks_of(maps, layout="", **options):
    ranks, used = _cuda.rank(torch.from_numpy(np.ascontiguousarray(maps))[:, None].cuda(), layout=layout, **options)
    assert layout in ("", used)
    return ranks[:, 0].cpu().numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_equals_its_twin_and_the_float64_svd(family, layout):
    for H, W in QUICK[layout] + WIDE[layout][-3:]:
        maps = make(family, H * 1000 + W, 40, H, W)
        ranks = ranks_of(maps, layout)
        assert (ranks == twin(maps, layout)[0]).all(), (H, W)
        assert ((ranks == _reference.matrix_rank(maps)) | ambiguous(maps)).all(), (H, W)


def test_the_largest_sides():
    largest = _core.rank_cuda_layouts(0)["cuda_tile8"]
    for side in {112, min(216, largest), largest}:
        for family in FAMILIES:
            maps = make(family, side, 3, side, side)
            assert (ranks_of(maps, "cuda_tile8") == twin(maps, "cuda_tile8")[0]).all(), (family, side)
    with pytest.raises(ValueError, match=f"cuda_tile8 takes short sides up to {largest}; got {largest + 1}"):
        ranks_of(np.zeros((1, largest + 1, largest + 1), np.float32))


def test_the_layout_follows_the_short_side():
    used = {
        side: _cuda.rank(torch.ones(1, 1, side, 70, device="cuda"))[1] for side in (1, 4, 5, 8, 9, 16, 17, 32, 33, 65)
    }
    assert list(used.values()) == [
        "cuda_thread", "cuda_thread", "cuda_group8", "cuda_group8", "cuda_group16", "cuda_group16", "cuda_group32",
        "cuda_group32", "cuda_tile4", "cuda_tile8",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_type_and_any_strides(dtype):
    for H, W in [(2, 2), (7, 7), (14, 14), (28, 28), (28, 20), (56, 56), (66, 80)]:
        maps = torch.randn(3, 37, H, W, device="cuda").relu().to(dtype)
        maps[:, ::3, H // 2 :] = maps[:, ::3, :1]
        s = torch.linalg.svdvals(maps.double())
        expected = (s > max(H, W) * EPS32 * s[..., :1]).sum(-1, dtype=torch.int32)
        wide = torch.zeros(6, 37, H, 2 * W, device="cuda", dtype=dtype)
        wide[::2, :, :, ::2] = maps
        views = (
            maps,
            maps.contiguous(memory_format=torch.channels_last),
            maps.mT.contiguous().mT,
            wide[::2, :, :, ::2],
        )
        for view in views:
            assert torch.equal(_cuda.rank(view)[0], expected), (H, W, view.stride())


def test_the_current_stream_is_used():
    maps = torch.randn(64, 64, 28, 28, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        maps.zero_()
        ranks, _ = _cuda.rank(maps)
    stream.synchronize()
    assert not ranks.any()


def test_a_graph_captures_the_launch():
    maps = torch.zeros(16, 8, 14, 14, device="cuda")
    big = torch.zeros(2, 3, 112, 112, device="cuda")
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    _cuda.rank(maps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ranks, _ = _cuda.rank(maps, not_finite=counter)
        large, _ = _cuda.rank(big, not_finite=counter)
    maps.copy_(torch.randn(16, 8, 14, 14))
    maps[0, 0, 0, 0] = torch.nan
    big.copy_(torch.randn(2, 3, 112, 112))
    graph.replay()
    assert ranks.flatten().tolist() == [-1] + [14] * 127
    assert (large == 112).all()
    assert counter.item() == 1


def test_maps_that_are_not_finite_are_counted():
    for side in (2, 8, 16, 32, 40, 70):
        counter = torch.full((1,), 5, dtype=torch.int64, device="cuda")
        maps = torch.ones(4, 3, side, side, device="cuda")
        maps[0, 1, 0, 1], maps[3, 2, 1, 1], maps[3, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
        ranks, _ = _cuda.rank(maps, not_finite=counter)
        assert counter.item() == 8
        assert (ranks < 0).nonzero().tolist() == [[0, 1], [3, 0], [3, 2]]


@pytest.mark.parametrize("label_type", [torch.int64, torch.int32])
def test_ragged_sums_equal_the_added_ranks(label_type):
    sides = [2, 4, 7, 8, 14, 16, 28, 32, 56, 70, 112] * 4  # more than one launch takes
    maps = [torch.randn(6, 5 + i % 3, side, side, device="cuda").relu() for i, side in enumerate(sides)]
    for layer in maps:
        layer[:, 1, layer.shape[2] // 2 :] = 0
    maps[3][2, 1, 0, 0] = torch.nan
    labels = torch.tensor([0, 2, 1, 2, 9, -1], device="cuda", dtype=label_type)
    sums = torch.full((3, sum(layer.shape[1] for layer in maps)), 100, device="cuda")
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    used = _cuda.rank_sums(maps, labels, sums, not_finite=counter)
    assert set(used) == set(LAYOUTS)
    ranks = torch.cat([_cuda.rank(layer)[0] for layer in maps], 1).clamp(min=0).long()
    expected = torch.full_like(sums, 100).index_add_(0, labels[:4].long(), ranks[:4])
    assert torch.equal(sums, expected)
    assert counter.item() == 1


def test_nothing_is_launched_for_nothing():
    assert _cuda.rank(torch.zeros(0, 3, 4, 4, device="cuda"))[0].shape == (0, 3)
    assert _cuda.rank(torch.zeros(2, 3, 0, 4, device="cuda"))[0].tolist() == [[0] * 3] * 2


def test_maps_far_into_memory():
    """Offsets beyond 2^31 elements: 64-bit indices."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    maps = torch.zeros(2**31 // (1024 * 64) + 8, 1024, 8, 8, device="cuda", dtype=torch.float16)
    maps[-1] = torch.eye(8, device="cuda")
    for layout in ("cuda_group8", "cuda_group32"):
        ranks, _ = _cuda.rank(maps, layout=layout)
        assert (ranks[-1] == 8).all()
        assert not ranks[:-1].any()
    assert (_cuda.rank(maps.transpose(0, 1)[:, -1:])[0] == 8).all()
