"""Float16 and bfloat16 maps are read in place, each bit pattern as its number. No torch: sanitizers run this."""

import numpy as np
import pytest
from rank_families import EPS32, make

from pyprune import _core, machine
from pyprune.ops import _reference

VARIANTS = machine.this_machine().cpu_variants
HALVES = ("float16", "bfloat16")


def widened(bits, dtype):
    """Return the float32 numbers that these uint16 bits stand for."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        return (
            bits.view(np.float16).astype(np.float32)
            if dtype == "float16"
            else (bits.astype(np.uint32) << 16).view("f4")
        )


def narrowed(maps, dtype):
    """Return the bits of ``maps``, rounded to float16, or cut to bfloat16."""
    with np.errstate(over="ignore"):  # infinity is a half too
        return (
            maps.astype(np.float16).view(np.uint16) if dtype == "float16" else (maps.view(np.uint32) >> 16).astype("u2")
        )


def native(bits, dtype, variant, rtol=None, threads=1):
    maps = bits.view(np.float16) if dtype == "float16" else bits
    rtol = max(bits.shape[2:]) * EPS32 if rtol is None else rtol
    return _core.rank(maps, rtol, variant, threads, dtype).reshape(bits.shape[:2])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_bit_pattern(variant, dtype):
    """Beside three numbers of about its size, each one gives the very ranks that its float32 copy gives."""
    rng = np.random.default_rng(0)
    bits = np.arange(1 << 16, dtype=np.uint16)[None, :, None, None].repeat(2, 2).repeat(2, 3)
    near = rng.integers(-0x90, 0x90, bits.shape) if dtype == "bfloat16" else rng.integers(-0x480, 0x480, bits.shape)
    near[..., 0, 0] = 0
    maps = (bits + near.astype(np.uint16)) ^ rng.choice(np.uint16([0, 0x8000]), bits.shape)
    wide = widened(maps, dtype)
    seen = set()
    for rtol in 2.0 ** -np.arange(0.1, 9, 0.4):
        ranks = _core.rank(wide, rtol, variant, 1)
        assert (native(maps, dtype, variant, rtol)[0] == ranks).all()
        seen |= set(ranks.tolist())
        if rtol < 0.9:
            finite = np.isfinite(wide[0]).all(axis=(1, 2))
            s = np.linalg.svd(np.where(finite[:, None, None], wide[0], 0).astype(np.float64), compute_uv=False)
            clear = (np.abs(s - rtol * s[:, :1]) >= rtol * s[:, :1] / 16).all(axis=1)
            want = np.where(finite, (s > rtol * s[:, :1]).sum(axis=1), -1)
            assert (ranks == want)[clear].all()
    assert seen >= {-1, 1, 2}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["relu", "duplicated", "zero_padded", "smooth_relu", "rank_one"])
def test_ranks_are_those_of_the_widened_maps(family, variant, dtype):
    for H, W in [(1, 1), (3, 5), (8, 8), (13, 7), (16, 16), (33, 20)]:
        bits = narrowed(make(family, H * 100 + W, 24, H, W), dtype)[None]
        wide = widened(bits, dtype)
        s = np.linalg.svd(wide.astype(np.float64), compute_uv=False)
        t = max(H, W) * EPS32 * s[..., :1]
        clear = (np.abs(s - t) >= t / (4 * max(H, W) ** 2)).all(axis=-1)
        assert (native(bits, dtype, variant) == _reference.matrix_rank(wide))[clear].all(), (H, W)
        assert clear.mean() > 0.5


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_strides(variant, dtype):
    maps = narrowed(make("zero_padded", 5, 57, 12, 9).reshape(3, 19, 12, 9), dtype)
    want = native(maps, dtype, variant)
    assert len(np.unique(want)) > 3
    wide = np.zeros((6, 19, 24, 27), np.uint16)
    wide[::2, :, ::2, ::3] = maps
    views = {
        "channels last": np.ascontiguousarray(maps.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        "transposed": np.ascontiguousarray(maps.swapaxes(2, 3)).swapaxes(2, 3),
        "steps": wide[::2, :, ::2, ::3],
        "row gaps": np.concatenate([maps, maps], axis=3)[..., :9],
        "reversed": np.ascontiguousarray(maps[:, :, ::-1, ::-1])[:, :, ::-1, ::-1],
    }
    for name, view in views.items():
        assert (native(view, dtype, variant) == want).all(), name


@pytest.mark.parametrize("dtype", HALVES)
def test_bad_maps_are_flagged(dtype):
    maps = narrowed(np.ones((1, 9, 3, 3), np.float32), dtype)
    maps[0, 4, 1, 1] = 0x7C00 if dtype == "float16" else 0x7F80
    maps[0, 6, 2, 0] = 0xFFFF
    assert native(maps, dtype, "cpu_baseline").tolist() == [[1, 1, 1, 1, -1, 1, -1, 1, 1]]


def test_the_name_and_the_numbers_must_fit():
    bits = np.zeros((1, 1, 2, 2), np.uint16)
    for maps, dtype in [(bits, ""), (bits, "float16"), (bits.view(np.float16), "bfloat16"), (bits.view(">f2"), "")]:
        with pytest.raises(TypeError, match="must be float16, float32 or float64 in native byte order, or uint16 as"):
            _core.rank(maps, 1e-6, "cpu_baseline", 1, dtype)
