"""Every variant of kernel SSIM against its float64 definition: families of slices, constants, sizes, exponents."""

import numpy as np
import pytest

from pyprune import _core, machine
from pyprune.ops import _reference
from pyprune.ops.ssim import Constants, _run, kernel_ssim_statistics
from tolerances import SSIM_FLOAT64, SSIM_GATE

VARIANTS = machine.this_machine().cpu_variants
FUSED = [name for name in VARIANTS if name in ("cpu_avx2", "cpu_avx512")]
EPS = [1e-12, 1e-6, 1e-2, 1e-1, 1.0]


def normal(rng, shape):
    return rng.standard_normal(shape)


def trained(rng, shape):
    """Smooth kernels around a mean, of very different strength, some of them nearly dead."""
    F2, F1, K1, K2 = shape
    rows, columns = np.mgrid[:K1, :K2] / max(K1, K2)
    waves = rng.standard_normal((F2, F1, 3, 1, 1)) * np.stack(
        [np.ones_like(rows), np.cos(3 * rows), np.cos(3 * columns)]
    )
    return waves.sum(2) * np.exp(2 * rng.standard_normal((F2, 1, 1, 1))) + 0.05 * rng.standard_normal(shape)


def duplicated(rng, shape):
    return rng.standard_normal(shape)[rng.integers(0, max(1, shape[0] // 3), shape[0])]


def negated(rng, shape):
    return duplicated(rng, shape) * rng.choice([-1, 1], (*shape[:1], 1, 1, 1))


def scaled(rng, shape):
    return duplicated(rng, shape) * np.exp(3 * rng.standard_normal((*shape[:1], 1, 1, 1)))


def constant(rng, shape):
    """Half of the slices are constant, of a value that is no power of two."""
    flat = rng.random((*shape[:2], 1, 1)) < 0.5
    return np.where(flat, rng.standard_normal((*shape[:2], 1, 1)), rng.standard_normal(shape))


def zero(rng, shape):
    return rng.standard_normal(shape) * (rng.random((*shape[:2], 1, 1)) < 0.5)


def near_zero(rng, shape):
    return rng.standard_normal(shape) * np.where(rng.random((*shape[:2], 1, 1)) < 0.5, 1, 1e-19)


def sparse(rng, shape):
    return rng.standard_normal(shape) * (rng.random(shape) < 0.1)


def offset(rng, shape):
    """A mean a thousand times the deviation."""
    return 1 + 1e-3 * rng.standard_normal(shape)


def balanced(rng, shape):
    """Whole numbers whose mean is exactly zero, as an edge detector's."""
    half = rng.integers(-5, 6, shape)
    return half - half[..., ::-1, ::-1] + 0.0


FAMILIES = [normal, trained, duplicated, negated, scaled, constant, zero, near_zero, sparse, offset, balanced]


def family(which, shape, dtype=np.float32):
    return which(np.random.default_rng(shape), shape).astype(dtype)


def psi_of(w, variant, **constants):
    psi, ran = _run(w, Constants(**constants), variant)
    assert ran == variant
    assert np.array_equal(psi, psi.T)
    assert (np.diag(psi) == 1).all()
    return psi.astype(np.float64)


def want_of(w, **constants):
    return _reference.kernel_ssim(w.astype(np.float64), **constants)


def worst(w, **constants):
    want = want_of(w, **constants)
    return {variant: np.abs(psi_of(w, variant, **constants) - want).max() for variant in VARIANTS}


@pytest.mark.parametrize("which", FAMILIES)
@pytest.mark.parametrize("eps", EPS)
def test_the_gate(which, eps):
    for shape in ((33, 1, 3, 3), (35, 6, 3, 3)):
        assert max(worst(family(which, shape), eps=eps).values()) <= SSIM_GATE


def test_a_disturbed_weight_leaves_the_gate():
    w = family(normal, (33, 4, 3, 3))
    other = w.copy()
    other[5, 2, 1, 1] *= 1.001
    want = want_of(other)
    for variant in VARIANTS:
        assert np.abs(psi_of(w, variant) - want)[5].max() > SSIM_GATE


SHAPES = [(2, 1, 1, 2), (16, 3, 1, 1), (17, 2, 1, 7), (31, 1, 2, 2), (18, 5, 5, 5), (33, 2, 7, 7), (17, 3, 11, 11),
          (19, 3, 2, 5), (17, 2, 4, 9), (3, 2, 23, 23)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which", [normal, trained, sparse])
def test_sizes_of_slices(which, shape):
    for eps in (1e-12, 1e-2):
        assert max(worst(family(which, shape), eps=eps).values()) <= SSIM_GATE


@pytest.mark.parametrize("channels", [1, 63, 64, 65, 129, 300])
def test_sums_over_channels(channels):
    """Sums are emptied every 64 channels and hold at most 255."""
    for which in (normal, duplicated):
        assert max(worst(family(which, (17, channels, 3, 3))).values()) <= SSIM_GATE
    ones = np.ones((17, channels, 3, 3), np.float32)
    assert all((psi_of(ones, variant) == 1).all() for variant in VARIANTS)


EXPONENTS = [
    (0, 1, 1), (0.5, 1, 1), (1, 1, 1), (0.01, 1, 1), (0.9, 1, 1), (1.7, 1, 1), (2, 1, 1),
    (0, 0, 0), (0.1, 0, 1), (0.1, 0.5, 0.5), (0.3, 1.2, 0.7), (1, 2, 0.5), (0, 0, 2),
    (0.1, 3, 1), (5, 5, 5), (0.1, 1, 2.5), (30, 0, 0), (0, 100, 1),
]  # fmt: skip


@pytest.mark.parametrize("exponents", EXPONENTS)
def test_exponents(exponents):
    constants = dict(zip(("alpha", "beta", "gamma"), exponents, strict=True))
    for shape in ((33, 3, 3, 3), (18, 5, 1, 1), (17, 2, 2, 3)):
        for which in (normal, trained, near_zero):
            for eps in (1e-6, 1e-2):
                assert max(worst(family(which, shape), eps=eps, **constants).values()) <= SSIM_GATE


@pytest.mark.parametrize("power", [-307, -200, -60, -15, 0, 8, 60, 200, 300])
@pytest.mark.parametrize("which", [normal, near_zero, constant, balanced])
def test_plain_constants_of_any_size(which, power):
    """Out of float32's reach float64 lanes take over; constants and zeros stay exact where e is nothing."""
    assert (
        max(worst(family(which, (20, 5, 3, 3)), eps_absolute=10.0**power if power > -308 else 1e-308).values())
        <= SSIM_GATE
    )


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-10, 1e10, 1e30, 1e38])
@pytest.mark.parametrize("which", [normal, sparse, near_zero])
def test_layers_of_any_scale(which, scale):
    w = family(which, (20, 5, 3, 3), np.float64)
    w = (w / np.abs(w).max() * scale).astype(np.float32)
    for eps in (1e-12, 1e-2):
        assert max(worst(w, eps=eps).values()) <= SSIM_GATE
    assert max(worst(w, eps_absolute=1e-6).values()) <= SSIM_GATE


@pytest.mark.parametrize("which", FAMILIES)
@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1.0, 1e200, 1e307])
def test_float64_weights_get_float64_answers(which, scale):
    w = family(which, (20, 5, 3, 3), np.float64)
    w *= scale / np.abs(w).max()
    if which is near_zero and scale < 1e-300:
        pytest.skip("1e-19 of a denormal number is zero")
    for eps in (1e-6, 1e-2):
        for variant, off in worst(w, eps=eps).items():
            assert off <= SSIM_FLOAT64, variant
    disturbed = w.copy()
    disturbed[3, 1, 1, 1] += scale * 1e-6
    want = want_of(disturbed)
    assert all(np.abs(psi_of(w, variant) - want).max() > SSIM_FLOAT64 for variant in VARIANTS)


def test_layers_of_zeros_and_of_constants():
    for w in (np.zeros((5, 3, 3, 3)), np.full((5, 3, 3, 3), 0.1)):
        for dtype in (np.float16, np.float32, np.float64):
            for variant in VARIANTS:
                assert (psi_of(w.astype(dtype), variant) == 1).all()


@pytest.mark.parametrize("eps", EPS)
def test_a_filter_is_like_itself_and_its_negative(eps):
    w = family(trained, (40, 3, 3, 3))
    both = np.concatenate([w, w, -w])
    for variant in VARIANTS:
        psi = psi_of(both, variant, eps=eps)
        i = np.arange(40)
        assert (1 - psi[i, i + 40]).max() <= SSIM_GATE
        assert (1 - psi[i, i + 80]).max() <= SSIM_GATE


@pytest.mark.parametrize("which", [normal, trained, sparse])
def test_counts_differ_at_most_within_the_band(which):
    w = family(which, (100, 8, 3, 3))
    want = want_of(w)[np.triu_indices(100, 1)]
    limits = np.quantile(want, np.linspace(0, 1, 21))  # on psi itself: some thresholds lie within the band of a pair
    for variant in VARIANTS:
        counts = kernel_ssim_statistics(w, thresholds=np.clip(limits, 0, 1), variant=variant).counts
        for t, count in zip(np.clip(limits, 0, 1), counts, strict=True):
            assert (want > t + SSIM_GATE).sum() <= count <= (want > t - SSIM_GATE).sum()
        away = [t for t in np.linspace(0.05, 0.95, 37) if np.abs(want - t).min() > SSIM_GATE]
        assert len(away) > 20
        counts = kernel_ssim_statistics(w, thresholds=away, variant=variant).counts
        assert counts.tolist() == [(want > t).sum() for t in away]


TUPLES = [(0.1, 1, 1, 1e-2, None), (0, 1, 1, 1e-6, None), (0.5, 1, 1, 1e-2, None), (1, 1, 1, 1e-2, None),
          (0.3, 0.7, 0.2, 1e-3, None), (0.1, 1, 1, 1e-12, None), (0.1, 1, 1, 1e-2, 1e-5)]  # fmt: skip


@pytest.mark.parametrize("constants", TUPLES)
@pytest.mark.parametrize("shape", [(33, 7, 3, 3), (20, 70, 1, 1), (17, 3, 5, 5), (20, 3, 7, 7), (20, 4, 6, 3)])
def test_variants_with_fused_multiply_adds_have_the_bits_of_the_scalar_formula(constants, shape):
    w = family(trained, shape)
    want = _core.ssim_matrix(w, constants, "scalar", 1)
    assert np.abs(want - _reference.kernel_ssim(w.astype(np.float64), *constants)).max() <= SSIM_GATE
    for variant in FUSED:
        assert np.array_equal(_core.ssim_matrix(w, constants, variant, 1), want)
        pairs = np.argwhere(np.triu(np.ones((shape[0],) * 2), 1))
        found = _core.ssim_statistics(w, constants, [], 0, len(pairs), False, pairs, variant, 1)
        assert np.array_equal(want[found[4], found[5]], found[6])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_panels_and_slabs_do_not_show(variant, dtype):
    """Layers that do not fit the memory for prepared slices are cut: here 513 filters, and slices of 23 x 23."""
    for shape in ((513, 5, 3, 3), (40, 70, 23, 23)):
        w = family(normal, shape, dtype)
        psi = _core.ssim_matrix(w, TUPLES[0], variant, 1)
        some = np.unique(np.random.default_rng(0).integers(0, shape[0], (300, 2)), axis=0)
        some = some[some[:, 0] < some[:, 1]]
        few = np.unique(some)[:12]
        found = kernel_ssim_statistics(w, pairs=some, top=len(some), variant=variant).top
        assert np.array_equal(psi[found.i, found.j], found.psi)
        eps = 1e-2 * np.mean(np.square(w.astype(np.float64)))
        want = want_of(w[few], eps_absolute=eps)
        assert np.abs(psi[np.ix_(few, few)] - want).max() <= (SSIM_GATE if dtype == np.float32 else SSIM_FLOAT64)
        found = kernel_ssim_statistics(w, thresholds=(0.2, 0.25, 0.3), top=20, nearest=True, variant=variant)
        values = psi[np.triu_indices(len(psi), 1)]
        assert found.counts.tolist() == [(values > t).sum() for t in (0.2, 0.25, 0.3)]
        assert found.top.psi.tolist() == np.sort(values)[::-1][:20].tolist()
        assert found.nearest.psi.tolist() == (psi - 2 * np.eye(len(psi), dtype=dtype)).max(1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("which", FAMILIES)
@pytest.mark.parametrize("F1", [1, 3])
def test_the_gate_over_many_pairs(which, F1):
    """Six million slice pairs a family and number of channels: few channels average least."""
    for seed in range(4):
        w = which(np.random.default_rng(seed), (512, F1, 3, 3)).astype(np.float32)
        for eps in (1e-12, 1e-2):
            assert max(worst(w, eps=eps).values()) <= SSIM_GATE
