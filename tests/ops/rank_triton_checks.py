"""What the Triton kernel must do, run by test_rank_triton.py in a process where TRITON_INTERPRET=1, or on a GPU.

Not collected by itself: triton decides at its import whether it interprets.
"""

import warnings

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from rank_families import FAMILIES, make, near_threshold
from test_rank_exact import ambiguous

import pyprune as pp
from pyprune import machine
from pyprune.ops import _reference
from pyprune.ops._triton import rank as kernel
from pyprune.ops.rank import _run, choose_rank

GPU = torch.cuda.is_available()
DEVICE = torch.zeros(1, device="cuda").device if GPU else torch.device("cpu")
SHAPES = [(1, 6), (2, 2), (5, 3), (8, 8), (13, 9)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch, request):
    """Divisions by zero are meant: what they spoil, the growth shows. Programs of many maps keep numpy busy."""
    if not GPU and "real_blocking" not in request.keywords:
        monkeypatch.setattr(kernel, "blocking", lambda side: (32, max(4, 1 << (side - 1).bit_length()), 1))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        yield


def ranks_of(maps, **options):
    ranks, ran = _run(torch.as_tensor(maps, device=DEVICE), variant="triton", **options)
    assert ran == "triton"
    assert (ranks.dtype, ranks.device) == (torch.int32, DEVICE)
    return ranks.cpu().numpy()


def test_the_machine_knows():
    assert machine.this_machine().triton == DEVICE.type
    assert (choose_rank((8, 8), "float32", "cpu", machine.this_machine()) == "triton") is False


def test_hand_computed():
    maps = np.zeros((6, 3, 4), np.float32)
    maps[1, 2, 3] = -5
    maps[2, :2, :2] = [[1, 2], [2, 4]]
    maps[3, :2, :2] = [[1, 2], [2, 5]]
    maps[4, :, :3] = np.diag([1, 5e-7, 4e-7])  # the threshold is 4 * 2^-23 = 4.77e-7
    maps[5, :, :3] = np.eye(3)
    assert ranks_of(maps).tolist() == [0, 1, 1, 2, 2, 3]
    assert ranks_of(np.diag(np.float32([1, 0.1, 0.01])), rtol=0.05) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_float64_svd(family):
    for H, W in SHAPES:
        maps = make(family, H * 1000 + W, 21, H, W)
        assert not ((ranks_of(maps) != _reference.matrix_rank(maps)) & ~ambiguous(maps)).any(), (H, W)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_float64_svd_up_to_the_largest(family):
    for H, W in [
        (1, 1),
        (4, 4),
        (7, 7),
        (13, 17),
        (16, 16),
        (31, 33),
        (33, 20),
        (32, 32),
        (47, 64),
        (64, 64),
        (64, 129),
    ]:
        maps = make(family, H * 1000 + W, 200 if GPU else 32, H, W)
        assert not ((ranks_of(maps) != _reference.matrix_rank(maps)) & ~ambiguous(maps)).any(), (H, W)


def test_long_maps():
    maps = make("diagonal_near", 8, 30, 3, 700)
    assert (ranks_of(maps) == _reference.matrix_rank(maps)).all()
    maps = maps.swapaxes(1, 2).astype(np.float64) * 1e200
    assert (ranks_of(maps) == _reference.matrix_rank(maps)).all()


def test_singular_values_just_outside_the_band():
    rng = np.random.default_rng(3)
    for H, W in [(2, 2), (3, 5), (8, 8), (16, 13)]:
        maps, ranks = near_threshold(rng, 32, H, W, 1.0, 1.2)
        assert (ranks_of(maps) == ranks).all(), (H, W)
        wrong = ranks_of(maps, rtol=max(H, W) * 2.0**-23 * (1 + 1.5 / (4 * max(H, W) ** 2)))
        assert (wrong != ranks).any()


def test_vanishing_pivots_go_to_the_tridiagonal_path(monkeypatch):
    rng = np.random.default_rng(0)
    for n in (3, 8):
        maps = rng.standard_normal((96, n, 1)) * rng.standard_normal((96, 1, n))
        maps += 1e-3 * rng.standard_normal((96, n, n))
        top = np.linalg.svd(maps[:, 1:], compute_uv=False)[:, 0]
        maps[:, 0] *= (n * 2.0**-23 * top / np.linalg.norm(maps[:, 0], axis=1))[:, None]
        maps[:, 0] *= 1 + 1e-15 * rng.integers(-3, 4, (96, 1))
        assert not ((ranks_of(maps) != _reference.matrix_rank(maps)) & ~ambiguous(maps)).any()


@triton.jit
def undecided(G, shift, m, B: tl.constexpr, M: tl.constexpr):
    return shift.to(tl.int32) * 0 - 1, shift * 0 + float("inf")


def test_the_tridiagonal_path_alone(monkeypatch):
    """Were nothing decided before it, the answers would be the same."""
    if GPU:
        pytest.skip("the path is forced by replacing a function, which compiled code does not notice")

    monkeypatch.setattr(kernel, "_count_above", undecided)
    for family in FAMILIES:
        for H, W in [(1, 1), (5, 4), (7, 9)]:
            maps = make(family, 4, 32, H, W)
            assert not ((ranks_of(maps) != _reference.matrix_rank(maps)) & ~ambiguous(maps)).any(), (family, H, W)


@pytest.mark.real_blocking
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (2, 5, 4, 4), (4, 4), (2, 1, 3, 2, 2), (9, 8, 8), (3, 17, 17)])
def test_shapes_as_blocked_on_a_gpu(shape):
    maps = np.maximum(np.random.default_rng(0).standard_normal(shape), 0).astype(np.float32)
    assert ranks_of(maps).shape == shape[:-2]
    assert (ranks_of(maps) == _reference.matrix_rank(maps)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_and_strides(dtype):
    rng = np.random.default_rng(1)
    maps = torch.from_numpy(np.maximum(rng.standard_normal((2, 5, 6, 9)), 0)).to(DEVICE, getattr(torch, dtype))
    want = _reference.matrix_rank(maps.double().cpu().numpy())
    wide = torch.zeros(4, 5, 12, 27, dtype=maps.dtype, device=DEVICE)
    wide[::2, :, ::2, ::3] = maps
    views = {
        "plain": maps,
        "channels last": maps.to(memory_format=torch.channels_last),
        "transposed": maps.mT.contiguous().mT,
        "steps": wide[::2, :, ::2, ::3],
        "five": maps.reshape(2, 5, 1, 6, 9).transpose(0, 1).contiguous().transpose(0, 1),
    }
    for name, view in views.items():
        assert (ranks_of(view).reshape(want.shape) == want).all(), name
    assert (ranks_of(maps[:, :1].expand(2, 5, 6, 9)) == want[:, :1]).all()


def test_float64_maps_of_any_scale():
    rng = np.random.default_rng(2)
    maps = np.maximum(rng.standard_normal((60, 7, 7)), 0)
    maps[::3, 4:] = maps[::3, :3]
    exponents = rng.integers(-1000, 1000, (60, 1, 1))
    exponents[:3] = np.array([-1022, 1021, 1022])[:, None, None]
    assert (ranks_of(np.ldexp(maps, exponents))[1:] == _reference.matrix_rank(maps)[1:]).all()
    assert ranks_of(np.full((2, 2), np.finfo(np.float64).max)) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_maps_that_are_not_finite(dtype, value):
    maps = np.ones((5, 2, 3, 3), dtype)
    maps[1, 0, 2, 1] = maps[4, 1, 0, 0] = value
    maps[2] = np.eye(3) + 1e-7
    want = [[1, 1], [-1, 1], [3, 3], [1, 1], [1, -1]]
    assert ranks_of(maps, check=False).tolist() == want
    counter = torch.full((1,), 5, dtype=torch.int64)
    counter = counter.pin_memory() if GPU else counter
    ranks, _ = kernel.rank(torch.as_tensor(maps, device=DEVICE), not_finite=counter)
    assert ranks.tolist() == want
    assert int(counter) == 7


def test_through_the_public_function():
    maps = torch.randn(3, 4, 6, 5, device=DEVICE).relu()
    assert torch.equal(pp.matrix_rank(maps, variant="triton"), pp.matrix_rank(maps, variant="torch_svd"))
    if not GPU:
        assert isinstance(pp.matrix_rank(maps.numpy(), variant="triton"), np.ndarray)
        broken = torch.full((2, 2), torch.nan)
        with pytest.raises(ValueError, match="maps must be finite; 1 of 1"):
            pp.matrix_rank(broken, variant="triton")
    with pytest.raises(ValueError, match="'triton' takes maps with a short side of at most 64; got 65 x 70"):
        pp.matrix_rank(torch.ones(65, 70, device=DEVICE), variant="triton")


def test_one_changed_element_changes_a_rank():
    maps = make("duplicated", 0, 30, 8, 8)
    maps[:, 1] = maps[:, 0]
    before = ranks_of(maps)
    maps[7, 1, 3] += np.float32(1e-3)
    assert np.flatnonzero(ranks_of(maps) != before).tolist() == [7]
