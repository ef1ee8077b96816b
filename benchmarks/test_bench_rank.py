"""Rank of many maps: every variant of ours, batched torch and a loop over maps, side by side for each size."""

import pytest
import torch

from pyprune import machine
from pyprune.ops.rank import _run, rank_variants

COUNTS = {2: 40_000, 4: 20_000, 8: 10_000, 16: 4000, 32: 1000, 64: 200, 112: 50, 224: 16}
RIVALS = ("torch_batched", "torch_loop", *(name for name in rank_variants(machine.this_machine()) if name[:3] == "cpu"))


def relu_maps(count, side):
    """Maps [count, side, side] as after a ReLU; every third repeats rows, so that ranks differ."""
    maps = torch.randn(count, side, side, generator=torch.Generator().manual_seed(side)).relu()
    maps[::3, side // 2 :] = maps[::3, : side - side // 2]
    return maps


def rank_with(rival, maps):
    if rival == "torch_batched":
        return torch.linalg.matrix_rank(maps)
    if rival == "torch_loop":
        return torch.stack([torch.linalg.matrix_rank(one) for one in maps])
    ranks, ran = _run(maps, variant=rival)
    assert ran == rival
    return ranks


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("side", COUNTS)
def test_matrix_rank(benchmark, side, rival):
    benchmark.group = f"rank of {side} x {side} maps"
    count = COUNTS[side]
    maps = relu_maps(count, side)
    benchmark.extra_info.update(maps=count, threads=torch.get_num_threads())
    ranks = benchmark.pedantic(rank_with, (rival, maps), rounds=5, warmup_rounds=1)
    assert torch.equal(ranks.long(), torch.linalg.matrix_rank(maps.double(), rtol=side * 2.0**-23))
    benchmark.extra_info["maps_per_second"] = count / benchmark.stats.stats.median if benchmark.stats else None
