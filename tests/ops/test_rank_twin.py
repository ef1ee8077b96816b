"""The GPU's rank kernel, run on the host from the same source: every layout against the float64 SVD."""

import numpy as np
import pytest
from rank_families import EPS32, FAMILIES, make, near_threshold

from pyprune import _core
from pyprune.ops import _reference
from tolerances import RANK_BAND

LAYOUTS = {
    "cuda_thread": 4,
    "cuda_group8": 8,
    "cuda_group16": 16,
    "cuda_group32": 32,
    "cuda_tile4": 64,
    "cuda_tile8": 224,
}
QUICK = {
    "cuda_thread": [(1, 1), (1, 6), (2, 2), (3, 3), (4, 4), (4, 9), (7, 3)],
    "cuda_group8": [(1, 1), (2, 3), (5, 5), (7, 7), (8, 8), (8, 9), (17, 6), (3, 40)],
    "cuda_group16": [(4, 4), (9, 9), (14, 14), (16, 16), (16, 17), (33, 11)],
    "cuda_group32": [(8, 8), (17, 17), (28, 28), (32, 32), (32, 33), (65, 20)],
    "cuda_tile4": [(1, 1), (5, 4), (33, 33), (37, 64)],
    "cuda_tile8": [(3, 9), (9, 9), (65, 66), (41, 41)],
}
WIDE = {
    "cuda_thread": [(n, n) for n in range(1, 5)] + [(4, 5000), (5000, 3)],
    "cuda_group8": [(n, n) for n in range(1, 9)] + [(8, 5000), (5000, 7)],
    "cuda_group16": [(n, n) for n in range(1, 17)] + [(16, 1000), (1000, 13)],
    "cuda_group32": [(n, n) for n in range(1, 33)] + [(32, 500), (500, 29)],
    "cuda_tile4": [(n, n) for n in (*range(33, 65, 3), 56, 64)] + [(47, 200), (200, 50), (9, 300)],
    "cuda_tile8": [(n, n) for n in (65, 79, 80, 96, 97)] + [(72, 300), (150, 70), (10, 400)],
}
PATHS = 6  # full at the upper end, both ends, the same two after power steps, tridiagonal, trivial


def ambiguous(maps, rtol=None):
    """Which maps have a singular value in the band, where either answer is right."""
    n = max(maps.shape[-2:])
    rtol = n * EPS32 if rtol is None else rtol
    s = np.linalg.svd(maps.astype(np.float64), compute_uv=False)
    t = rtol * s[..., :1]
    return (np.abs(s - t) < RANK_BAND / n**2 * t).any(axis=-1)


def twin(maps, layout, rtol=None, backwards=False):
    rtol = max(maps.shape[-2:]) * EPS32 if rtol is None else rtol
    return _core.rank_twin(maps if maps.ndim == 4 else maps[:, None], rtol, layout, backwards)


def disagreements(maps, layout):
    ranks, _ = twin(maps, layout)
    assert ranks.dtype == np.int32
    return int(((ranks != _reference.matrix_rank(maps)) & ~ambiguous(maps)).sum())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_equals_the_float64_svd(family, layout):
    for H, W in QUICK[layout]:
        assert disagreements(make(family, H * 1000 + W, 9, H, W), layout) == 0, (H, W)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_size(family, layout):
    for H, W in WIDE[layout]:
        assert disagreements(make(family, H * 1000 + W, 100 if H * W < 400 else 20, H, W), layout) == 0, (H, W)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_sides(family):
    for H, W in [(112, 112), (113, 140), (217, 220), (224, 224)]:
        assert disagreements(make(family, H, 2, H, W), "cuda_tile8") == 0, (H, W)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_of_a_phase_may_run_in_any_order(layout):
    """Otherwise one would read what another writes without a barrier between them: a race on a GPU."""
    for family in ("relu", "log_uniform", "at_noise", "weak_rows", "scaled"):
        for H, W in QUICK[layout][-3:]:
            maps = make(family, 3, 6, H, W)
            forwards, backwards = twin(maps, layout), twin(maps, layout, backwards=True)
            assert (forwards[0] == backwards[0]).all()
            assert (forwards[1] == backwards[1]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_path_decides_some_maps(layout):
    """The families reach each way to an answer, so the comparisons above are of all of them."""
    H, W = QUICK[layout][3]
    seen = np.zeros(PATHS, int)
    for family in ("relu", "duplicated", "log_uniform", "at_noise", "weak_rows"):
        seen += np.bincount(twin(make(family, 1, 150 if H < 30 else 40, H, W), layout)[1], minlength=PATHS)
    seen += np.bincount(twin(np.zeros((2, H, W), np.float32), layout)[1], minlength=PATHS)
    assert (seen[[0, 1, 4, 5]] > 0).all(), seen
    assert seen[2] + seen[3] > 0, seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_singular_values_just_outside_the_band(layout):
    rng = np.random.default_rng(3)
    for H, W in QUICK[layout][-4:]:
        maps, ranks = near_threshold(rng, 12, H, W, 1.0, 1.2)
        assert (twin(maps, layout)[0] == ranks).all(), (H, W)
        if min(H, W) > 2:
            off = (
                max(H, W) * EPS32 * (1 - 1.5 / (4 * max(H, W) ** 2)),
                max(H, W) * EPS32 * (1 + 1.5 / (4 * max(H, W) ** 2)),
            )
            assert any((twin(maps, layout, rtol)[0] != ranks).any() for rtol in off), (H, W)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vanishing_pivots_are_caught(layout):
    """First rows exactly as long as the threshold: the first pivot cancels and its column of the factor explodes."""
    rng = np.random.default_rng(0)
    for n in (3, 4, 8):
        if n > LAYOUTS[layout]:
            continue
        maps = rng.standard_normal((200, n, 1)) * rng.standard_normal((200, 1, n))
        maps += 1e-3 * rng.standard_normal((200, n, n))
        top = np.linalg.svd(maps[:, 1:], compute_uv=False)[:, 0]
        maps[:, 0] *= (n * EPS32 * top / np.linalg.norm(maps[:, 0], axis=1))[:, None]
        maps[:, 0] *= 1 + 1e-15 * rng.integers(-3, 4, (200, 1))
        assert disagreements(maps, layout) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_changed_element_changes_a_rank(layout):
    maps = make("duplicated", 0, 10, 4, 4)
    maps[:, 1] = maps[:, 0]
    before, _ = twin(maps, layout)
    maps[7, 1, 3] += np.float32(1e-3)
    assert np.flatnonzero(twin(maps, layout)[0] != before).tolist() == [7]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout):
    rng = np.random.default_rng(1)
    H, W = QUICK[layout][-1]
    maps = np.maximum(rng.standard_normal((2, 3, H, W)), 0).astype(np.float32)
    maps[:, 1, H // 2 :] = maps[:, 1, :1]
    expected = _reference.matrix_rank(maps).ravel()
    views = {
        "contiguous": maps,
        "channels last": np.ascontiguousarray(maps.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        "transposed maps": np.ascontiguousarray(maps.swapaxes(2, 3)).swapaxes(2, 3),
        "reversed": np.ascontiguousarray(maps[:, :, ::-1, ::-1])[:, :, ::-1, ::-1],
        "row gaps": np.concatenate([maps, maps], axis=3)[..., :W],
    }
    for name, view in views.items():
        assert (twin(view, layout)[0] == expected).all(), name
        assert (twin(view.swapaxes(2, 3), layout)[0] == expected).all(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_input_type(layout):
    rng = np.random.default_rng(4)
    H, W = QUICK[layout][3]
    maps = np.maximum(rng.standard_normal((20, 1, H, W)), 0)
    maps[:10, :, H // 2 :] = maps[:10, :, :1]
    half = maps.astype(np.float16)
    half[3] = 6e-8  # the smallest denormal
    bits = (maps.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    brain = (bits.astype(np.uint32) << 16).view(np.float32)
    for given, same in (
        (half, half.astype(np.float32)),
        (bits, brain),
        (maps, maps),
        (-half, -half.astype(np.float32)),
    ):
        assert (twin(given, layout)[0] == _reference.matrix_rank(same[:, 0])).all()
    with pytest.raises(TypeError, match="float16, bfloat16, float32 or float64; got int32"):
        twin(np.zeros((1, 1, 2, 2), np.int32), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_maps_of_any_scale(layout):
    rng = np.random.default_rng(2)
    H, W = QUICK[layout][3]
    maps = np.maximum(rng.standard_normal((12, H, W)), 0)
    maps[::3, H // 2 :] = maps[::3, :1]
    ranks = _reference.matrix_rank(maps)
    exponents = rng.integers(-1000, 1000, (12, 1, 1))
    exponents[:3] = np.array([-1022, 1021, 1022])[:, None, None]
    assert (twin(np.ldexp(maps, exponents), layout)[0] == ranks).all()
    assert (twin(np.full((1, 2, 2), np.finfo(np.float64).max), layout)[0] == 1).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_not_finite_maps_are_minus_one(layout, dtype):
    maps = np.ones((5, 3, 4), dtype)
    maps[1, 2, 3], maps[2, 0, 0], maps[3, 1, 1] = np.nan, np.inf, -np.inf
    assert twin(maps, layout)[0].tolist() == [1, -1, -1, -1, 1]


def test_no_maps_and_empty_maps():
    assert twin(np.zeros((0, 3, 4), np.float32), "cuda_thread")[0].tolist() == []
    assert twin(np.zeros((2, 0, 4), np.float32), "cuda_thread")[0].tolist() == [0, 0]


def test_layouts_refuse_what_they_cannot_hold():
    with pytest.raises(ValueError, match="cuda_group8 takes short sides up to 8; got 9"):
        twin(np.zeros((1, 9, 9), np.float32), "cuda_group8")
    with pytest.raises(ValueError, match="no layout cuda_warp"):
        twin(np.zeros((1, 9, 9), np.float32), "cuda_warp")


def butterfly(values):
    """The order that csrc/include/pyprune/team.h documents."""
    warps = []
    for start in range(0, len(values), 32):
        lanes = [float(v) for v in values[start : start + 32]]
        offset = len(lanes) // 2
        while offset:
            lanes = [v + lanes[t ^ offset] for t, v in enumerate(lanes)]
            offset //= 2
        warps.append(lanes[0])
    total = warps[0]
    for warp in warps[1:]:
        total += warp
    return total


@pytest.mark.parametrize("size", [1, 8, 16, 32, 96, 416])
def test_sums_are_butterflies(size):
    rng = np.random.default_rng(size)
    differs = 0
    for _ in range(20):
        values = rng.standard_normal(size) * 10.0 ** rng.uniform(-8, 8, size)
        total, top = _core.rank_twin_reduce(values)
        assert total == butterfly(values)
        assert top == values.max()
        differs += total != sum(values.tolist())
    assert differs > 0 or size == 1  # the order shows


def test_a_build_without_cuda_says_so():
    built, architectures = _core.cuda_built()
    assert built == bool(architectures)
    if not built:
        assert "no CUDA kernels" in _core.cuda_device_reason(0)
        assert _core.rank_cuda_layouts() == {}
        with pytest.raises(RuntimeError, match="no CUDA kernels"):
            _core.rank_cuda([])
    else:
        assert _core.rank_cuda_layouts() == LAYOUTS
