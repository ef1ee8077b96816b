"""The compiled kernel SSIM on a GPU: equal to its twin within the gate, on any stream, in graphs, over many layers."""

import numpy as np
import pytest
import torch
from test_ssim_twin import CONSTANTS, PAPER, SIZES, equal_to_the_matrix, matrix, off, weights

import pyprune as pp
from pyprune import _core
from pyprune.ops import _cuda_ssim
from pyprune.ops.ssim import Constants, _run, kernel_ssim_statistics
from tolerances import SSIM_GATE

REASON = _core.cuda_device_reason(0) if torch.cuda.is_available() else "torch finds no CUDA device"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(REASON), reason=f"needs the CUDA kernels: {REASON}")]


@pytest.mark.parametrize("size", [*SIZES, (129, 130, 3, 3), (300, 512, 3, 3), (257, 20, 1, 343)])
def test_the_matrix_is_within_the_gate(size):
    w = weights(*size)
    psi = matrix(w.cuda())
    assert off(psi, w) <= SSIM_GATE
    assert torch.equal(psi, psi.T)
    assert (psi.diagonal() == 1).all()
    assert torch.equal(psi, matrix(w.cuda()))  # the same bits again
    assert (psi.cpu() - matrix(w)).abs().max() <= 2 * SSIM_GATE


@pytest.mark.parametrize("constants", CONSTANTS)
@pytest.mark.parametrize("K", [3, 5])
def test_every_constant(constants, K):
    w = weights(35, 4, K, K)
    assert off(matrix(w.cuda(), constants), w, constants) <= SSIM_GATE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_type_and_any_strides(dtype):
    w = weights(20, 6, 3, 3, dtype).cuda()
    for view in (w, w.contiguous(memory_format=torch.channels_last), w[::2, ::3], w.transpose(0, 1), w.mT):
        psi, ran = _run(view, Constants())
        assert ran == "cuda_tile"
        assert psi.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert off(psi, view) <= SSIM_GATE


@pytest.mark.parametrize("F2", [1, 2, 33, 65, 130, 700])
@pytest.mark.parametrize("constants", [PAPER, (0.1, 0.5, 1, 1e-2, None)])
def test_statistics_are_those_of_the_matrix(F2, constants, monkeypatch):
    w = weights(F2, 3, 3, 3).cuda()
    count = F2 * (F2 - 1) // 2
    for bins in (10, 5000):
        equal_to_the_matrix(w, constants, thresholds=(0, 0.2, 0.6), bins=bins, top=min(count, 40), nearest=True)
    monkeypatch.setattr(_cuda_ssim, "BAND_PAIRS", 64 * F2)
    equal_to_the_matrix(w, constants, thresholds=(0.2,), bins=10, top=min(count, 500), nearest=True)
    if F2 > 1:
        rng = np.random.default_rng(0)
        pairs = np.array([rng.choice(F2, 2, replace=False) for _ in range(300)])
        equal_to_the_matrix(w, constants, thresholds=(0.2,), bins=5, top=300, nearest=True, pairs=pairs)


def test_many_layers_at_once():
    layers = [weights(F2, F1, K, K, seed=K).cuda() for F2 in (5, 66, 200) for F1 in (3, 70) for K in (1, 3, 7)] * 3
    constants = [(0.1, 1 + i % 5 // 4, 1, (1e-12, 1e-2, 1e-1)[i // 18], None) for i in range(len(layers))]
    for w, values, psi in zip(layers, constants, _cuda_ssim.matrices(layers, constants), strict=True):
        assert torch.equal(psi, matrix(w, values))


def test_the_current_stream_is_used():
    w = weights(64, 64, 3, 3).cuda()
    expected = matrix(torch.zeros_like(w))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        w.zero_()
        psi = matrix(w)
    stream.synchronize()
    assert torch.equal(psi, expected)


def test_a_graph_captures_the_launches():
    layers = [weights(100, 70, 3, 3).cuda(), weights(40, 3, 7, 7).cuda(), weights(20, 4, 3, 3).cuda()]
    constants = [PAPER, PAPER, (0.1, 2, 1, 1e-2, None)]
    fresh = [weights(*layer.shape, seed=5).cuda() for layer in layers]
    expected = _cuda_ssim.matrices(fresh, constants)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _cuda_ssim.matrices(layers, constants)
        public = pp.kernel_ssim(layers[0])
    for layer, new in zip(layers, fresh, strict=True):
        layer.copy_(new)
    for _ in range(3):
        graph.replay()
        for psi, want in zip(found, expected, strict=True):
            assert torch.equal(psi, want)
        assert torch.equal(public, expected[0])


def test_weights_that_are_not_finite_are_told_later():
    w = weights(70, 5, 3, 3).cuda()
    w[3, 3, 1, 1] = torch.nan
    psi = pp.kernel_ssim(w)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="kernel_ssim: weights must be finite; 1 of those compared before on cuda:0"):
        pp.kernel_ssim(w)
    assert psi.isnan().all()
    with pytest.raises(ValueError, match="weights must be finite; 1 of 3150 are NaN or infinite"):
        kernel_ssim_statistics(w)
    assert off(pp.kernel_ssim(w.nan_to_num()), w.nan_to_num()) <= SSIM_GATE


def test_cupy_arrays_come_back_as_cupy_on_their_stream():
    cupy = pytest.importorskip("cupy")
    w = weights(33, 5, 3, 3)
    with cupy.cuda.Stream(non_blocking=True):
        psi = pp.kernel_ssim(cupy.asarray(w.numpy()))
        assert isinstance(psi, cupy.ndarray)
        assert np.abs(cupy.asnumpy(psi) - matrix(w.cuda()).cpu().numpy()).max() == 0


def test_weights_far_into_memory():
    """Offsets beyond 2^31 elements: 64-bit indices."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free GPU memory")
    w = torch.zeros(8, 2**31 // 72 + 1000, 3, 3, device="cuda")
    w[:, -1] = torch.randn(8, 3, 3, device="cuda")
    (found,) = _cuda_ssim.statistics([w], [(0.1, 1, 1, 1e-2, None)], thresholds=(0.5,), bins=2)
    assert found.counts.tolist() == [28]
    assert found.histogram.tolist() == [0, 28]
    assert off(matrix(w[:, -200:]), w[:, -200:]) <= SSIM_GATE
