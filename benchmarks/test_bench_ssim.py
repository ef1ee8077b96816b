"""Kernel SSIM of all pairs of a layer: every variant of ours, torch broadcasting, plain and compiled, and numpy."""

import warnings

import numpy as np
import pytest
import torch

from pyprune import machine
from pyprune.benching import _compiled, broadcast_ssim, broadcast_ssim_block, random_kernels
from pyprune.ops import _reference
from pyprune.ops.ssim import Constants, _run, kernel_ssim_statistics

SHAPES = [(64, 3, 7, 7), (64, 64, 3, 3), (128, 128, 3, 3), (256, 256, 3, 3)]
OURS = machine.this_machine().cpu_variants
RIVALS = ("numpy_rows", "torch_broadcast", "torch_compiled", *OURS, *(f"{name}, statistics" for name in OURS))
SLOWEST = 64  # filters that rivals which are slow get: their time grows with the square


@pytest.fixture(scope="module")
def compiled():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of its own parts
        return _compiled(broadcast_ssim_block)


def ssim_with(rival, w, compiled):
    """Psi of all pairs, or, for statistics, what there is instead of it."""
    if rival == "numpy_rows":
        return torch.from_numpy(_reference.kernel_ssim(w.numpy()))
    if rival == "torch_broadcast":
        return broadcast_ssim(w)
    if rival == "torch_compiled":
        return broadcast_ssim(w, compiled)
    name, _, statistics = rival.partition(", ")
    if statistics:
        found = kernel_ssim_statistics(w, thresholds=(0.25, 0.6), variant=name)
        assert found.variant == name
        return found
    psi, ran = _run(w, Constants(), name)
    assert ran == name
    return psi


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_kernel_ssim(benchmark, shape, rival, compiled):
    if rival == "torch_compiled" and compiled is None:
        pytest.skip("torch.compile finds no compiler")
    benchmark.group = f"kernel SSIM of {' x '.join(map(str, shape))}"
    filters = shape[0] if rival.startswith("cpu") else min(SLOWEST, shape[0])
    w = random_kernels(shape, torch.device("cpu"))[:filters]
    pairs = filters * (filters - 1) // 2 * shape[1]
    benchmark.extra_info.update(slice_pairs=pairs, threads=torch.get_num_threads())
    found = benchmark.pedantic(ssim_with, (rival, w, compiled), rounds=5, warmup_rounds=1)
    if rival.endswith("statistics"):
        psi = _run(w, Constants(), rival.partition(",")[0])[0].double().numpy()[np.triu_indices(filters, 1)]
        assert found.counts.tolist() == [(psi > 0.25).sum(), (psi > 0.6).sum()]
        assert found.histogram.sum() == found.pairs == len(psi)
    else:
        few = w[: min(filters, 32)].double().numpy()
        want = _reference.kernel_ssim(few, eps_absolute=1e-2 * w.double().square().mean().item())
        above = np.triu_indices(len(few), 1)  # broadcasting leaves the rest
        assert np.abs(found.double().numpy()[above] - want[above]).max() <= 1e-6
    benchmark.extra_info["slice_pairs_per_second"] = pairs / benchmark.stats.stats.median if benchmark.stats else None
