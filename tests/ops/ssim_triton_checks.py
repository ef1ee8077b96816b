"""What the Triton kernel SSIM must do, run by test_ssim_triton.py where TRITON_INTERPRET=1, or on a GPU.

Not collected by itself: triton decides at its import whether it interprets.
"""

import warnings

import numpy as np
import pytest
import torch
from test_ssim_twin import CONSTANTS, PAPER, expected, off, weights

import pyprune as pp
from pyprune import machine
from pyprune.ops._triton import ssim as kernel
from pyprune.ops.ssim import Constants, _run, kernel_ssim_statistics, ssim_variants
from tolerances import SSIM_GATE

DEVICE = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu").device
SIZES = [(1, 3, 3, 3), (2, 1, 3, 3), (33, 3, 3, 3), (31, 2, 1, 1), (65, 1, 1, 2), (40, 2, 5, 5)]


@pytest.fixture(autouse=True)
def quiet():
    """The interpreter rounds NaN to a whole number, which nothing reads."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        yield


def matrix(w, constants=PAPER):
    alpha, beta, gamma, eps, absolute = constants
    psi, ran = _run(w.to(DEVICE), Constants(alpha, beta, gamma, eps, absolute), "triton_tile")
    assert ran == "triton_tile"
    assert psi.device == DEVICE
    return psi.cpu()


def test_the_machine_knows():
    assert "triton_tile" in ssim_variants(machine.this_machine(), DEVICE.type)


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_within_the_gate(size):
    w = weights(*size)
    psi = matrix(w)
    assert off(psi, w) <= SSIM_GATE
    assert torch.equal(psi, psi.T)
    assert (psi.diagonal() == 1).all()
    w[-1, -1, -1, -1] += 0.1
    assert len(w) == 1 or size[2:] == (1, 1) or off(psi, w) > SSIM_GATE


@pytest.mark.parametrize("constants", CONSTANTS)
def test_every_constant(constants):
    w = weights(33, 2, 1, 3)
    assert off(matrix(w, constants), w, constants) <= SSIM_GATE


def test_float32_only_where_it_is_sure_to_do():
    w = weights(33, 2, 1, 3)
    sure = [kernel.simple(w, Constants(*constants)) for constants in CONSTANTS]
    assert sure == [True] * 3 + [False] * 5 + [True, False, False, True, True, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_type_and_any_strides(dtype):
    w = weights(12, 4, 3, 3, dtype)
    for view in (w, w.mT, w[::2, ::3], w.transpose(0, 1)):
        psi = matrix(view)
        assert psi.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert off(psi, view) <= SSIM_GATE


@pytest.mark.parametrize("options", [{}, {"top": 9, "nearest": True}, {"pairs": np.array([[3, 1], [0, 34]])}])
def test_statistics_are_those_of_the_matrix(options):
    w = weights(35, 2, 3, 3)
    options = {"thresholds": (0.0, 0.25, 0.6), "bins": 13, "top": 0, "nearest": False, "pairs": None, **options}
    want, _ = expected(w, matrix(w), **options)
    found = kernel_ssim_statistics(w.to(DEVICE), **options, variant="triton_tile")
    assert (found.variant, found.pairs) == ("triton_tile", want.pairs)
    assert found.mean == pytest.approx(want.mean, abs=1e-12)
    assert found.counts.tolist() == want.counts.tolist()
    assert found.histogram.tolist() == want.histogram.tolist()
    assert found.top.psi.tolist() == want.top.psi.tolist()
    assert (found.top.i.tolist(), found.top.j.tolist()) == (want.top.i.tolist(), want.top.j.tolist())
    if options["nearest"]:
        assert found.nearest.index.tolist() == want.nearest.index.tolist()


def test_one_filter_has_no_pairs():
    found = kernel_ssim_statistics(weights(1, 2, 3, 3).to(DEVICE), variant="triton_tile")
    assert (found.pairs, found.histogram.sum()) == (0, 0)
    assert np.isnan(found.mean)


@pytest.mark.parametrize("options", [{}, {"top": 1}])
def test_weights_that_are_not_finite(options):
    w = weights(4, 2, 3, 3).to(DEVICE)
    w[0, 0, 0, 0], w[1, 0, 0, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="weights must be finite; 2 of 72 are NaN or infinite"):
        kernel_ssim_statistics(w, variant="triton_tile", **options)
    counter = torch.full((1,), 5, dtype=torch.int64, device=DEVICE)
    assert kernel.matrices([w], [PAPER], counter)[0].isnan().all()
    assert counter.item() == 7


def test_the_public_function():
    w = weights(6, 2, 3, 3).to(DEVICE)
    assert torch.equal(pp.kernel_ssim(w, variant="triton_tile").cpu(), matrix(w))


@pytest.mark.slow
@pytest.mark.parametrize("F2", [1, 2, 31, 33, 65, 96])
@pytest.mark.parametrize("F1", [1, 17])
def test_every_size(F2, F1):
    for K1, K2 in [(1, 1), (1, 2), (3, 3), (5, 5)]:
        w = weights(F2, F1, K1, K2)
        assert off(matrix(w), w) <= SSIM_GATE
