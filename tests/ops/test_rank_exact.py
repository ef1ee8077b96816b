"""The promise: ranks equal those of the float64 SVD of the same bits, except within a band around the threshold."""

import numpy as np
import pytest
import torch
from rank_families import EPS32, FAMILIES, make, near_threshold

from pyprune import _core, machine
from pyprune.ops import _reference
from pyprune.ops.rank import _run
from tolerances import RANK_BAND

CPU = machine.this_machine().cpu_variants
VARIANTS = (*machine.this_machine().cpu_variants, "torch_eigvalsh", "torch_svd")
SHAPES = [(1, 1), (1, 6), (2, 2), (3, 3), (4, 4), (5, 3), (7, 7), (8, 8), (6, 9), (13, 17), (16, 16), (33, 20)]
WIDE_SHAPES = [
    *[(n, n) for n in (*range(1, 34), 40, 47, 55, 56, 63, 64, 65, 96, 112, 127, 128, 129)],
    *[(1, 129), (129, 1), (2, 100), (9, 64), (64, 9), (31, 33), (100, 30), (57, 129), (129, 56)],
]


def ambiguous(maps):
    """Which maps have a singular value in the band, where either answer is right."""
    n = max(maps.shape[-2:])
    s = np.linalg.svd(maps.astype(np.float64), compute_uv=False)
    t = n * EPS32 * s[..., :1]
    return (np.abs(s - t) < RANK_BAND / n**2 * t).any(axis=-1)


def disagreements(maps, variant):
    ranks, ran = _run(maps, variant=variant)
    assert ran == variant
    assert ranks.dtype == np.int32
    return int(((ranks != _reference.matrix_rank(maps)) & ~ambiguous(maps)).sum())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_variant_equals_the_float64_svd(family, variant):
    for H, W in SHAPES:
        assert disagreements(make(family, H * 1000 + W, 21, H, W), variant) == 0, (H, W)


def layout_disagreements(maps, variant, layout):
    """Like disagreements() for a native layout that is forced; returns also how many maps were clear of the band."""
    ranks = _core.rank(maps[None], max(maps.shape[1:]) * EPS32, variant, 1, layout=layout)
    clear = ~ambiguous(maps)
    return int(((ranks != _reference.matrix_rank(maps)) & clear).sum()), int(clear.sum())


@pytest.mark.parametrize("layout", ["lanes", "inside"])
@pytest.mark.parametrize("variant", CPU)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_equal_the_float64_svd(family, variant, layout):
    clear = 0
    for H, W in [*SHAPES, (24, 25), (25, 24), (31, 31)]:
        maps = make(family, H * 1000 + W, 11, H, W)
        for given in (maps, maps.astype(np.float64) * 1e150):
            wrong, sure = layout_disagreements(given, variant, layout)
            assert wrong == 0, (H, W, given.dtype)
            clear += sure
    assert clear > 150


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["lanes", "inside"])
@pytest.mark.parametrize("variant", CPU)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_at_every_size(family, variant, layout):
    for side in range(1, 225):
        H, W = side, side if side % 3 else side + 1 + side // 4
        maps = make(family, side, 8 if side < 64 else 2, H, W)
        assert layout_disagreements(maps, variant, layout)[0] == 0, (H, W)


@pytest.mark.slow
@pytest.mark.parametrize("variant", CPU)
def test_maps_far_beyond_the_usual(variant):
    for family in ("relu", "duplicated", "smooth_relu", "at_noise", "log_uniform", "weak_rows"):
        for H, W in [(300, 257), (512, 512), (1024, 1030)]:
            maps = make(family, H, 2, H, W)
            assert _core.rank_layout(variant, H, W, 1) == "inside"
            assert layout_disagreements(maps, variant, "auto")[0] == 0, (family, H, W)


def test_the_layout_is_the_measured_one():
    """See benchmarks/rank_layouts.py."""
    for variant, lanes, full in [("cpu_baseline", 2, 512), ("cpu_avx2", 4, 104), ("cpu_avx512", 8, 106)]:
        if variant in CPU:
            assert [_core.rank_layout(variant, side, side + 9, lanes) for side in (4, full - 1, full)] == [
                "lanes",
                "lanes",
                "inside",
            ]
            assert _core.rank_layout(variant, 4, 4, 1) == "lanes"
            assert _core.rank_layout(variant, 16, 16, 1) == "inside"
    with pytest.raises(ValueError, match="no layout across; there are auto, lanes and inside"):
        _core.rank(np.ones((1, 1, 2, 2), np.float32), 1e-6, "cpu_baseline", 1, layout="across")


@pytest.mark.parametrize("variant", VARIANTS)
def test_large_maps(variant):
    for family in ("relu", "smooth", "log_uniform"):
        for H, W in [(64, 64), (65, 40), (129, 112)]:
            assert disagreements(make(family, 5, 9, H, W), variant) == 0, (family, H, W)


@pytest.mark.parametrize("variant", VARIANTS)
def test_long_maps_are_read_in_several_tiles(variant):
    for H, W in [(3, 5000), (5000, 3), (40, 333), (333, 41)]:
        for family in ("relu", "duplicated"):
            assert disagreements(make(family, 8, 5, H, W), variant) == 0, (family, H, W)
            assert disagreements(make(family, 8, 5, H, W).astype(np.float64) * 1e200, variant) == 0, (family, H, W)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_size(family, variant):
    for H, W in WIDE_SHAPES:
        assert disagreements(make(family, H * 1000 + W, 200 if H * W < 2000 else 20, H, W), variant) == 0, (H, W)


@pytest.mark.parametrize("variant", VARIANTS)
def test_singular_values_just_outside_the_band(variant):
    rng = np.random.default_rng(3)
    for H, W in [(2, 2), (3, 5), (4, 4), (8, 8), (12, 7), (16, 16), (32, 32), (20, 45)]:
        maps, ranks = near_threshold(rng, 40, H, W, 1.0, 1.2)
        assert (_run(maps, variant=variant)[0] == ranks).all(), (H, W)


def test_the_near_family_would_show_a_threshold_that_is_off():
    maps, ranks = near_threshold(np.random.default_rng(3), 40, 16, 16, 1.0, 1.2)
    for factor in (1 - 1.5 / (4 * 16**2), 1 + 1.5 / (4 * 16**2)):
        assert (_run(maps, rtol=16 * EPS32 * factor)[0] != ranks).any()


def test_one_changed_element_changes_a_rank():
    maps = make("duplicated", 0, 30, 8, 8)
    maps[:, 1] = maps[:, 0]
    before = _run(maps)[0]
    maps[7, 1, 3] += np.float32(1e-3)
    assert np.flatnonzero(_run(maps)[0] != before).tolist() == [7]


@pytest.mark.parametrize("variant", VARIANTS)
def test_vanishing_pivots_are_caught(variant):
    """First rows exactly as long as the threshold: the first pivot cancels and its column of the factor explodes.

    Without the growth monitor up to 99 % of these maps come out wrong.
    """
    rng = np.random.default_rng(0)
    for n in (3, 4, 8):
        maps = rng.standard_normal((500, n, 1)) * rng.standard_normal((500, 1, n))
        maps += 1e-3 * rng.standard_normal((500, n, n))
        top = np.linalg.svd(maps[:, 1:], compute_uv=False)[:, 0]
        maps[:, 0] *= (n * EPS32 * top / np.linalg.norm(maps[:, 0], axis=1))[:, None]
        maps[:, 0] *= 1 + 1e-15 * rng.integers(-3, 4, (500, 1))
        assert disagreements(maps, variant) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_strides_do_not_matter(variant, dtype):
    rng = np.random.default_rng(1)
    maps = np.maximum(rng.standard_normal((3, 5, 12, 9)), 0).astype(dtype)
    expected = _reference.matrix_rank(maps)
    wide = np.zeros((6, 5, 24, 27), dtype)
    wide[::2, :, ::2, ::3] = maps
    views = {
        "channels last": np.ascontiguousarray(maps.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        "transposed maps": np.ascontiguousarray(maps.swapaxes(2, 3)).swapaxes(2, 3),
        "steps": wide[::2, :, ::2, ::3],
        "row gaps": np.concatenate([maps, maps], axis=3)[..., :9],
        "reversed": np.ascontiguousarray(maps[:, :, ::-1, ::-1])[:, :, ::-1, ::-1],
        "batch reversed": np.ascontiguousarray(maps[::-1])[::-1],
        "broadcast": np.broadcast_to(maps[:, :1], maps.shape),
    }
    for name, view in views.items():
        want = np.broadcast_to(expected[:, :1], expected.shape) if name == "broadcast" else expected
        assert (_run(view, variant=variant)[0] == want).all(), name


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "torch_svd"])
def test_float64_maps_of_any_scale(variant):
    rng = np.random.default_rng(2)
    maps = np.maximum(rng.standard_normal((60, 7, 7)), 0)
    maps[::3, 4:] = maps[::3, :3]
    ranks = _reference.matrix_rank(maps)
    exponents = rng.integers(-1000, 1000, (60, 1, 1))
    exponents[:4] = np.array([-1060, -1022, 1021, 1022])[:, None, None]
    assert (_run(np.ldexp(maps, exponents), variant=variant)[0][1:] == ranks[1:]).all()  # the first is denormal
    assert (_run(np.full((1, 2, 2), np.finfo(np.float64).max), variant=variant)[0] == 1).all()


def test_channels_last_tensor_is_read_in_place():
    maps = torch.randn(4, 16, 8, 8).relu().to(memory_format=torch.channels_last)
    assert (_run(maps)[0] == _run(maps.contiguous())[0]).all()
    assert _run(maps)[0].numpy().tolist() == _reference.matrix_rank(maps.numpy()).tolist()
