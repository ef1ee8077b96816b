"""The GPU's kernel SSIM, run on the host from the same source: against the float64 definition, and bit against bit."""

import numpy as np
import pytest
import torch

from pyprune.ops import _cuda_ssim, _reference
from pyprune.ops._cuda_ssim import How
from pyprune.ops.ssim import Constants, _statistics_of, _wanted
from tolerances import SSIM_GATE

PAPER = (0.1, 1.0, 1.0, 1e-2, None)
SIZES = [
    (1, 3, 3, 3), (2, 1, 3, 3), (31, 17, 3, 3), (65, 3, 3, 3), (33, 65, 3, 3), (70, 450, 3, 3), (64, 64, 3, 3),
    (2, 1, 1, 1), (65, 17, 1, 1), (33, 3, 1, 2), (31, 3, 5, 5), (65, 2, 7, 7), (33, 5, 11, 11), (3, 3, 13, 17),
]  # fmt: skip
WAYS = [How(), How(backwards=True), How(worst=1), How(worst=-1)]


def weights(F2, F1, K1, K2, dtype=torch.float32, seed=0):
    """Filters of which some are each other's negative, copy or double, with dead and constant slices."""
    w = torch.randn(F2, F1, K1, K2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w[:, 0] += 2
    w[F2 // 2, F1 // 2] = 0
    w[-1, -1] = 0.3
    if F2 > 5:
        w[1], w[4], w[5] = -w[0], 2 * w[3], w[3]
    return w.to(dtype)


def matrix(w, constants=PAPER, how=WAYS[0]):
    return _cuda_ssim.matrices([w], [constants], how=how)[0]


def off(psi, w, constants=PAPER):
    assert psi.shape == (len(w), len(w))
    return float(
        np.abs(psi.double().cpu().numpy() - _reference.kernel_ssim(w.double().cpu().numpy(), *constants)).max()
    )


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_within_the_gate(size, how):
    """Also where a GPU's reciprocal, logarithm and power are as far off as they may be."""
    w = weights(*size)
    psi = matrix(w, how=how)
    assert off(psi, w) <= SSIM_GATE
    assert psi.dtype == torch.float32
    assert torch.equal(psi, psi.T)
    assert (psi.diagonal() == 1).all()
    assert ((psi >= 0) & (psi <= 1)).all()


def test_a_disturbed_weight_shows():
    w = weights(31, 17, 3, 3)
    psi = matrix(w)
    w[3, 5, 1, 1] += 0.01
    assert off(psi, w) > SSIM_GATE


@pytest.mark.parametrize("F1", [1, 17])
def test_a_filter_is_like_itself_and_its_negative(F1):
    w = weights(40, F1, 3, 3)
    psi = matrix(torch.cat([w, -w, w]))
    i = torch.arange(40)
    for other in (i + 40, i + 80):
        assert (1 - psi[i, other]).abs().max() <= SSIM_GATE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_type(dtype):
    w = weights(20, 5, 3, 3, dtype)
    psi = matrix(w)
    assert psi.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert off(psi, w) <= SSIM_GATE


def test_any_strides():
    w = weights(20, 6, 3, 3)
    for view in (w.contiguous(memory_format=torch.channels_last), w[::2, ::3], w.transpose(0, 1), w.flip(2), w.mT):
        assert torch.equal(matrix(view), matrix(view.clone(memory_format=torch.contiguous_format)))


CONSTANTS = [
    (0.0, 1, 1, 1e-2, None), (0.5, 1, 1, 1e-2, None), (1, 1, 1, 1e-1, None), (1.5, 1, 1, 1e-2, None),
    (0.1, 0.5, 1, 1e-2, None), (1, 2, 3, 1e-2, None), (0.0, 0.0, 0.0, 1e-2, None), (0.1, 0, 2, 1e-12, None),
    (0.1, 1, 1, 1e-12, None), (0.1, 1, 1, 1e-30, None), (0.1, 1, 1, 1e-300, None), (0.1, 1, 1, 3.0, None),
    (0.1, 1, 1, 1e6, None), (0.1, 1, 1, 1e30, None), (0.1, 1, 1, 1e-2, 1e-4), (0.1, 1, 1, 1e-2, 1e-100),
    (0.1, 1, 1, 1e-2, 1e100),
]  # fmt: skip


@pytest.mark.parametrize("constants", CONSTANTS)
@pytest.mark.parametrize("K", [3, 5])
def test_every_constant(constants, K):
    w = weights(35, 4, K, K)
    for how in WAYS:
        assert off(matrix(w, constants, how), w, constants) <= SSIM_GATE


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-3, 1e30, 3e38])
def test_every_scale(scale):
    w = weights(35, 4, 3, 3, torch.float64).clamp(-1, 1) * scale
    for dtype in (torch.float32, torch.float64):
        for constants in (PAPER, (0.1, 1, 1, 1e-12, None), (0.1, 1, 1, 1, 1e-10)):
            v = w.to(dtype)
            assert off(matrix(v, constants), v, constants) <= SSIM_GATE
    for power in (-1060, -600, 600, 1020):
        v = torch.ldexp(w / scale, torch.tensor(power))
        assert off(matrix(v), v) <= SSIM_GATE


@pytest.mark.parametrize("spread", [1e-3, 1e-6, 1e-12, 1e-18])
def test_slices_of_very_different_size(spread):
    """With a tiny constant dead slices still have structure, and float32 must not lose it."""
    w = weights(35, 4, 3, 3)
    w[::2] *= spread
    for eps in (1e-2, 1e-12, 1e-24, 1e-40):
        constants = (0.1, 1, 1, eps, None)
        assert off(matrix(w, constants), w, constants) <= SSIM_GATE


def test_a_layer_of_zeros_is_alike():
    assert (matrix(torch.zeros(5, 3, 3, 3)) == 1).all()


@pytest.mark.parametrize("size", [(70, 200, 3, 3), (33, 65, 1, 2), (40, 70, 11, 11)])
@pytest.mark.parametrize("constants", [PAPER, (0.1, 2, 1, 1e-2, None)])
def test_no_order_of_threads_and_blocks_shows(size, constants):
    """Otherwise a thread would read what another writes without a barrier between: a race on a GPU."""
    w = weights(*size)
    assert torch.equal(matrix(w, constants), matrix(w, constants, How(backwards=True)))
    options = {"thresholds": (0.1, 0.5), "bins": 7, "top": 50, "nearest": True}
    forwards, backwards = (
        _cuda_ssim.statistics([w], [constants], **options, how=how)[0] for how in (How(), How(backwards=True))
    )
    for name, value in vars(forwards).items():
        assert np.array_equal(value, getattr(backwards, name)), name


def expected(w, psi, **options):
    wanted = _wanted(
        **{"thresholds": (), "bins": 1, "top": 0, "nearest": False, "pairs": None, **options}, filters=len(w)
    )
    return _statistics_of(psi.float().cpu().numpy(), wanted, ""), wanted


def equal_to_the_matrix(w, constants=PAPER, how=WAYS[0], **options):
    """Compare statistics with those that numpy makes of the matrix: equal to the last bit, except the mean."""
    want, wanted = expected(w, matrix(w, constants, how), **options)
    (found,) = _cuda_ssim.statistics(
        [w], [constants], wanted.thresholds.tolist(), wanted.bins, wanted.top, wanted.nearest, wanted.pairs, how
    )
    assert found.pairs == want.pairs
    assert found.mean == pytest.approx(want.mean, abs=1e-12, nan_ok=True)
    assert found.counts.tolist() == want.counts.tolist()
    assert found.histogram.tolist() == want.histogram.tolist()
    assert found.top_i.tolist() == want.top.i.tolist()
    assert found.top_j.tolist() == want.top.j.tolist()
    assert found.top_psi.tolist() == want.top.psi.tolist()
    if wanted.nearest:
        assert found.nearest.tolist() == want.nearest.index.tolist()
        assert np.array_equal(found.nearest_psi, want.nearest.psi, equal_nan=True)
    return found


@pytest.mark.parametrize("F2", [1, 2, 31, 33, 64, 65, 130])
@pytest.mark.parametrize("K", [3, 5])
def test_statistics_are_those_of_the_matrix(F2, K):
    w = weights(F2, 3, K, K)
    count = F2 * (F2 - 1) // 2
    for top in {0, min(count, 1), min(count, 40), count}:
        equal_to_the_matrix(w, thresholds=(0, 0.2, 0.6, 1), bins=10, top=top, nearest=True)


def test_ties_go_to_the_lowest():
    w = weights(3, 2, 3, 3)[[0, 1, 0, 1, 2, 0, 1] * 10]
    found = equal_to_the_matrix(w, top=700, nearest=True)
    assert found.nearest[:4].tolist() == [2, 3, 0, 1]
    equal_to_the_matrix(torch.ones(70, 2, 3, 3), thresholds=(0.5,), bins=3, top=9, nearest=True)


def test_many_thresholds_and_bins():
    w = weights(66, 3, 3, 3)
    equal_to_the_matrix(w, thresholds=np.linspace(0, 1, 101), bins=1)
    for bins in (1, 4000, 5000, 100_000):  # the latter beyond what shared memory counts
        equal_to_the_matrix(w, thresholds=(0.3, 0.7), bins=bins)


@pytest.mark.parametrize("constants", [PAPER, (0.1, 0.5, 1, 1e-2, None)])
def test_given_pairs(constants):
    w = weights(70, 40, 3, 3)
    rng = np.random.default_rng(0)
    pairs = np.array([rng.choice(70, 2, replace=False) for _ in range(300)] + [[1, 0], [3, 4], [3, 4]])
    equal_to_the_matrix(w, constants, thresholds=(0.2,), bins=5, top=300, nearest=True, pairs=pairs)
    equal_to_the_matrix(w, constants, thresholds=(0.2,), bins=5, pairs=np.zeros((0, 2), np.int64), nearest=True)


def test_bands_join_to_the_whole(monkeypatch):
    w = weights(200, 2, 3, 3)
    w[150], w[190] = w[3], w[120]
    monkeypatch.setattr(_cuda_ssim, "BAND_PAIRS", 64 * 200)
    assert len(list(_cuda_ssim._bands(200, _cuda_ssim.BAND_PAIRS))) == 4
    equal_to_the_matrix(w, thresholds=(0.2,), bins=10, top=500, nearest=True)
    equal_to_the_matrix(w, (0.1, 0.5, 1, 1e-2, None), thresholds=(0.2,), bins=10, top=500, nearest=True)


def test_many_layers_at_once():
    """More than a launch takes, some with a longer row, some in float64; the same layer with several constants."""
    sizes = [(F2, F1, K, K) for F2 in (5, 66) for F1 in (3, 70) for K in (1, 3, 7)]
    layers = [weights(*size, seed=i) for i, size in enumerate(sizes)] * 3
    constants = [(0.1, 1, 1, eps, None) for eps in (1e-12, 1e-2, 1e-1) for _ in sizes]
    constants[4] = (0.1, 2, 1, 1e-2, None)
    together = _cuda_ssim.matrices(layers, constants)
    found = _cuda_ssim.statistics(layers, constants, (0.3,), 4, top=5)
    for w, values, psi, one in zip(layers, constants, together, found, strict=True):
        assert torch.equal(psi, matrix(w, values))
        alone = _cuda_ssim.statistics([w], [values], (0.3,), 4, top=5)[0]
        assert (one.mean, one.counts, one.top_psi.tolist()) == (alone.mean, alone.counts, alone.top_psi.tolist())


@pytest.mark.parametrize("size", [(70, 3, 3, 3), (5, 100, 5, 5)])
def test_weights_that_are_not_finite(size):
    w = weights(*size)
    w[0, 0, 0, 0], w[-1, -1, -1, -1] = torch.nan, -torch.inf
    counter = torch.full((1,), 7, dtype=torch.int64)
    good = weights(3, 3, 3, 3)
    psi, other = _cuda_ssim.matrices([w, good], [PAPER] * 2, counter)
    assert psi.isnan().all()
    assert counter.item() == 9
    assert torch.equal(other, matrix(good))
    with pytest.raises(ValueError, match=rf"kernel_ssim: weights must be finite; 2 of {w.numel()} are NaN or infinite"):
        _cuda_ssim.statistics([w], [PAPER], (0.5,), 4, top=1, nearest=True)
    with pytest.raises(ValueError, match=r"2 are NaN"):
        _cuda_ssim.statistics([good, w], [PAPER] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first": 3}, "first must be a multiple of 64"),
        ({"last": 6}, "last must be a multiple of 64"),
        ({"shape": (0, 1, 1)}, r"weights must be \[F2, F1, K\]"),
        ({"bins": 3}, "bins need a histogram"),
        ({"threshold_count": 3}, "thresholds need counts"),
        ({"scratch": 8}, "scratch must be aligned"),
        ({"weights": 0}, "weights and scratch must be given"),
    ],
)
def test_the_binding_checks_memory(change, message):
    item, _ = _cuda_ssim._item(weights(7, 1, 3, 3), PAPER)
    with pytest.raises(ValueError, match=message):
        _cuda_ssim._core.ssim_twin([{**item, **change}])


def test_a_build_without_cuda_says_so():
    if _cuda_ssim._core.cuda_built()[0]:
        pytest.skip("this build has the CUDA kernels")
    with pytest.raises(RuntimeError, match="this build has no CUDA kernels"):
        _cuda_ssim._core.ssim_cuda([])


@pytest.mark.slow
@pytest.mark.parametrize("F2", [1, 2, 31, 33, 65, 129])
@pytest.mark.parametrize("F1", [1, 3, 17, 130])
def test_every_size(F2, F1):
    for K1, K2 in [(1, 1), (1, 2), (2, 2), (3, 3), (1, 10), (5, 5), (7, 7), (1, 50), (1, 51), (11, 11), (1, 343)]:
        w = weights(F2, F1, K1, K2, seed=F2)
        for how in WAYS:
            assert off(matrix(w, how=how), w) <= SSIM_GATE
        constants = Constants(beta=2)
        values = (constants.alpha, constants.beta, constants.gamma, constants.eps, None)
        assert off(matrix(w, values), w, values) <= SSIM_GATE
