"""What kernel_ssim takes, returns and refuses; which variant runs."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyprune as pp
from pyprune import machine
from pyprune.machine import Machine
from pyprune.ops import _reference
from pyprune.ops.ssim import Constants, _run, choose_ssim, kernel_ssim_statistics, ssim_variants
from tolerances import SSIM_GATE

HERE = machine.this_machine()
ALL = ssim_variants(HERE)


def weights(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(
    ("device", "here", "want"),
    [
        ("cpu", Machine(("cpu_baseline", "cpu_avx2", "cpu_avx512")), "cpu_avx512"),
        ("cpu", Machine(("cpu_baseline", "cpu_avx2")), "cpu_avx2"),
        ("cpu", Machine(("cpu_baseline",)), "cpu_baseline"),
        ("cpu", Machine(), "reference"),
        ("cuda", Machine(("cpu_baseline", "cpu_avx2")), "torch_chunked"),
    ],
)
def test_chooser(device, here, want):
    assert choose_ssim((64, 64, 3, 3), "float32", device, here) == want


def test_auto_runs_the_fastest_native_variant():
    assert _run(torch.randn(3, 4, 3, 3), Constants())[1] == HERE.cpu_variants[-1]
    assert kernel_ssim_statistics(torch.randn(3, 4, 3, 3)).variant == HERE.cpu_variants[-1]


@pytest.mark.parametrize("variant", ALL)
def test_hand_computed(variant):
    w = np.zeros((3, 1, 1, 2), np.float32)
    w[0, 0, 0] = [1, 3]  # m = 2, s = 1
    w[1, 0, 0] = [5, 1]  # m = 3, s = 2, covariance with the first -2
    psi, ran = _run(w, Constants(alpha=1, eps_absolute=1), variant)
    assert ran == variant
    want = (2 * 6 + 1) / (4 + 9 + 1) * (2 * 2 + 1) / (1 + 4 + 1) * (2 + 1) / (2 + 1)
    zero = (0 + 1) / (4 + 0 + 1) * (0 + 1) / (1 + 0 + 1) * (0 + 1) / (0 + 1)
    assert psi[0, 1] == pytest.approx(want, abs=SSIM_GATE)
    assert psi[0, 2] == pytest.approx(zero, abs=SSIM_GATE)
    assert (np.diag(psi) == 1).all()


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_same_kind_and_dtype_come_back(variant, dtype):
    w = torch.from_numpy(weights(5, 3, 3, 3)).to(getattr(torch, dtype)).requires_grad_()
    psi = pp.kernel_ssim(w, variant=variant)
    wide = dtype == "float64"
    assert isinstance(psi, torch.Tensor)
    assert (psi.dtype, psi.shape, psi.requires_grad) == (torch.float64 if wide else torch.float32, (5, 5), False)
    assert np.abs(psi.numpy() - _reference.kernel_ssim(w.detach().double().numpy())).max() <= SSIM_GATE
    if dtype != "bfloat16":
        ours = pp.kernel_ssim(w.detach().numpy(), variant=variant)
        assert isinstance(ours, np.ndarray)
        assert ours.dtype == (np.float64 if wide else np.float32)
        assert np.array_equal(ours, psi.numpy())


@pytest.mark.parametrize("variant", ALL)
def test_strides_do_not_matter(variant):
    w = torch.from_numpy(weights(20, 6, 3, 5))
    want = pp.kernel_ssim(w, variant=variant)
    others = [
        w.to(memory_format=torch.channels_last),
        w.flip(1).flip(1),
        torch.stack([w, w], dim=-1)[..., 0],
        w.repeat_interleave(2, 0)[::2],
        w.transpose(0, 3).contiguous().transpose(0, 3),
    ]
    for other in others:
        assert (pp.kernel_ssim(other, variant=variant) - want).abs().max() <= SSIM_GATE
        assert torch.equal(pp.kernel_ssim(other.contiguous(), variant=variant), want)
    flipped = w.numpy()[:, :, ::-1, ::-1]
    assert np.abs(pp.kernel_ssim(flipped, variant=variant) - want.numpy()).max() <= SSIM_GATE
    disturbed = w.clone()
    disturbed[3, 2, 1, 1] += 0.5
    assert (pp.kernel_ssim(disturbed, variant=variant) - want).abs().max() > SSIM_GATE


class OnlyDLPack:
    """An array of another library, as far as pyprune can tell."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self):
        return type("namespace", (), {"from_dlpack": lambda psi: ("theirs", psi)})


def test_anything_with_dlpack():
    kind, psi = pp.kernel_ssim(OnlyDLPack(torch.ones(2, 1, 3, 3)))
    assert (kind, psi.tolist()) == ("theirs", [[1, 1], [1, 1]])
    assert kernel_ssim_statistics(OnlyDLPack(torch.ones(2, 1, 3, 3))).counts.tolist() == [1]


def test_foreign_byte_order_and_read_only_arrays():
    w = weights(4, 2, 3, 3)
    want = pp.kernel_ssim(w)
    assert np.array_equal(pp.kernel_ssim(w.astype(">f4")), want)
    w.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(np.abs(pp.kernel_ssim(w, variant=variant) - want).max() <= SSIM_GATE for variant in ALL)


@pytest.mark.parametrize("variant", ALL)
def test_one_filter_has_no_pairs(variant):
    assert pp.kernel_ssim(weights(1, 3, 3, 3), variant=variant).tolist() == [[1]]
    found = kernel_ssim_statistics(weights(1, 3, 3, 3), nearest=True, variant=variant)
    assert (found.pairs, found.counts.tolist(), found.histogram.sum(), len(found.top.psi)) == (0, [0], 0, 0)
    assert math.isnan(found.mean)
    assert (found.nearest.index.tolist(), np.isnan(found.nearest.psi).all()) == ([-1], True)


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_are_those_of_the_matrix(variant, dtype):
    w = weights(37, 5, 3, 3, dtype=dtype)
    w[7], w[30], w[31] = -w[2], w[4], w[4]
    psi = pp.kernel_ssim(w, variant=variant)
    i, j = np.triu_indices(37, 1)
    values = psi[i, j].astype(float)
    limits = (0, 0.2, 0.3, 0.6, 1)
    found = kernel_ssim_statistics(w, thresholds=limits, bins=64, top=50, nearest=True, variant=variant)
    assert (found.variant, found.pairs) == (variant, 37 * 36 // 2)
    assert found.counts.tolist() == [(values > t).sum() for t in limits]
    assert found.histogram.tolist() == np.histogram(values, 64, (0, 1))[0].tolist()  # 1 / 64 is exact
    assert found.mean == pytest.approx(values.mean(), rel=1e-12)
    order = sorted(range(len(i)), key=lambda p: (-values[p], i[p], j[p]))[:50]
    assert found.top.i.tolist() == i[order].tolist()
    assert found.top.j.tolist() == j[order].tolist()
    assert found.top.psi.tolist() == values[order].tolist()
    alone = psi - 2 * np.eye(37, dtype=dtype)
    assert found.nearest.index.tolist() == alone.argmax(1).tolist()  # the lowest on a tie
    assert found.nearest.psi.tolist() == alone.max(1).tolist()
    assert found.top.psi.dtype == found.nearest.psi.dtype == dtype
    assert found.nearest.index[[30, 31]].tolist() == [4, 4]


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("shape", [(35, 70, 3, 3), (33, 5, 1, 1), (18, 3, 2, 3)])
def test_explicit_pairs_are_entries_of_the_matrix(variant, shape):
    w = weights(*shape)
    every = np.array(list(itertools.combinations(range(shape[0]), 2)))
    options = {"thresholds": (0.2, 0.25), "top": 9, "nearest": True, "variant": variant}
    all_of_them = kernel_ssim_statistics(w, **options)
    turned = np.random.default_rng(0).permutation(every)[:, ::-1]
    for pairs in (turned, torch.from_numpy(turned.copy()), turned.tolist()):
        chosen = kernel_ssim_statistics(w, pairs=pairs, **options)
        assert chosen.pairs == all_of_them.pairs
        assert chosen.mean == pytest.approx(all_of_them.mean, rel=1e-12)
        for field in ("counts", "histogram"):
            assert getattr(chosen, field).tolist() == getattr(all_of_them, field).tolist()
        assert chosen.top.psi.tolist() == all_of_them.top.psi.tolist()
        assert chosen.top.i.tolist() == all_of_them.top.i.tolist()
        assert chosen.nearest.index.tolist() == all_of_them.nearest.index.tolist()
    few = kernel_ssim_statistics(w, pairs=[[5, 2], [5, 2], [0, 9]], top=3, nearest=True, variant=variant)
    psi = pp.kernel_ssim(w, variant=variant)
    assert sorted(few.top.psi.tolist()) == sorted([psi[2, 5], psi[2, 5], psi[0, 9]])
    assert few.nearest.index[:6].tolist() == [9, -1, 5, -1, -1, 2]
    none = kernel_ssim_statistics(w, pairs=np.zeros((0, 2), int), variant=variant)
    assert (none.pairs, none.counts.tolist(), math.isnan(none.mean)) == (0, [0], True)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 35), st.integers(1, 20), st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 1000),
    eps=st.sampled_from([1e-9, 1e-3, 1e-2, 1.0]),
    exponents=st.tuples(*[st.sampled_from([0, 0.1, 0.5, 1])] * 3),
    power=st.integers(-60, 60),
)
def test_properties(shape, seed, eps, exponents, power):
    w = weights(*shape, seed=seed)
    w[seed % shape[0]] = -w[0]
    options = dict(zip(("alpha", "beta", "gamma"), exponents, strict=True), eps=eps)
    psi = pp.kernel_ssim(w, **options)
    assert np.array_equal(psi, psi.T)
    assert ((psi >= 0) & (psi <= 1)).all()
    assert (np.diag(psi) == 1).all()
    assert psi[0, seed % shape[0]] >= 1 - SSIM_GATE
    assert np.array_equal(pp.kernel_ssim(np.ldexp(w, power), **options), psi)  # eps is relative
    order = np.random.default_rng(seed).permutation(shape[0])
    assert np.abs(pp.kernel_ssim(w[order], **options) - psi[np.ix_(order, order)]).max() <= SSIM_GATE


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_that_are_not_finite(variant, value, dtype):
    w = torch.ones(3, 2, 3, 3, dtype=dtype)
    w[1, 0, 2, 1] = w[2, 1, 0, 0] = value
    for layout in (w, w.to(memory_format=torch.channels_last), w.flip(3)):
        with pytest.raises(ValueError, match="kernel_ssim: weights must be finite; 2 of 54 are NaN or infinite"):
            pp.kernel_ssim(layout, variant=variant)
        with pytest.raises(ValueError, match="weights must be finite; 2 of 54"):
            kernel_ssim_statistics(layout, variant=variant)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((64, 27), r"must be \[F2, F1, K1, K2\]; got \[64, 27\]\. Pass them before flattening\."),
        ((8, 4, 3), r"got \[8, 4, 3\]\. Those of a 1-d convolution go in as w\[:, :, None\], \[F2, F1, 1, K\]"),
        ((8, 4, 3, 3, 3), r"3-d convolution go in as w.flatten\(2\)\[:, :, None\], \[F2, F1, 1, K1 K2 K3\]"),
        ((8,), r"must be \[F2, F1, K1, K2\]; got \[8\]\.$"),
        ((8, 0, 3, 3), r"must not be empty; got \[8, 0, 3, 3\]"),
        ((0, 4, 3, 3), r"must not be empty; got \[0, 4, 3, 3\]"),
    ],
)
def test_wrong_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        pp.kernel_ssim(torch.ones(shape))


def test_the_advice_for_other_convolutions_works():
    line, volume = torch.from_numpy(weights(6, 4, 3)), torch.from_numpy(weights(6, 4, 3, 2, 2))
    assert pp.kernel_ssim(line[:, :, None]).shape == (6, 6)
    want = pp.kernel_ssim(volume.flatten(2)[:, :, None])
    assert torch.equal(pp.kernel_ssim(volume.reshape(6, 4, 6, 2)), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, "eps must be positive and finite; got 0"),
        ({"eps": -1e-3}, "eps must be positive and finite; got -0.001"),
        ({"eps": math.nan}, "eps must be positive and finite; got nan"),
        ({"eps_absolute": 0}, "eps_absolute must be positive and finite; got 0"),
        ({"eps_absolute": math.inf}, "eps_absolute must be positive and finite; got inf"),
        ({"alpha": -1}, "alpha must be finite and not negative; got -1"),
        ({"beta": math.inf}, "beta must be finite and not negative; got inf"),
        ({"gamma": math.nan}, "gamma must be finite and not negative; got nan"),
    ],
)
def test_constants_out_of_range(options, message):
    for function in (pp.kernel_ssim, kernel_ssim_statistics):
        with pytest.raises(ValueError, match=message):
            function(torch.ones(4, 2, 3, 3), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": (0.5, 1.5)}, r"thresholds must be in \[0, 1\]; got \(0.5, 1.5\)"),
        ({"thresholds": -0.1}, r"thresholds must be in \[0, 1\]; got -0.1"),
        ({"thresholds": math.nan}, r"thresholds must be in \[0, 1\]; got nan"),
        ({"bins": 0}, "bins must be at least 1; got 0"),
        ({"top": 7}, "top must be between 0 and the 6 pairs there are; got 7"),
        ({"top": -1}, "top must be between 0 and the 6 pairs there are; got -1"),
        ({"top": 2, "pairs": [[0, 1]]}, "top must be between 0 and the 1 pairs there are; got 2"),
        ({"pairs": [[0, 1], [0, 4]]}, r"different filters in 0 .. 3; 1 of 2 are not, the first is \[0, 4\]"),
        ({"pairs": [[-1, 1]]}, r"different filters in 0 .. 3; 1 of 1 are not, the first is \[-1, 1\]"),
        ({"pairs": [[2, 2]]}, r"different filters in 0 .. 3; 1 of 1 are not, the first is \[2, 2\]"),
        ({"pairs": [0, 1, 2]}, r"pairs must be \[P, 2\]; got \[3\]"),
    ],
)
def test_statistics_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        kernel_ssim_statistics(torch.ones(4, 2, 3, 3), **options)


def test_wrong_types():
    with pytest.raises(TypeError, match="w must be a torch tensor, a numpy array or have __dlpack__; got"):
        pp.kernel_ssim([[[[1.0]]]])
    with pytest.raises(TypeError, match="weights must be float16, bfloat16, float32, float64; got int64"):
        pp.kernel_ssim(torch.ones(2, 2, 3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="pairs must be whole numbers; got float64"):
        kernel_ssim_statistics(torch.ones(2, 2, 3, 3), pairs=[[0.0, 1.0]])


def test_unknown_missing_and_misplaced_variants(monkeypatch):
    with pytest.raises(ValueError, match="variant 'cpu_mmx' is unknown; here are auto, cpu_baseline"):
        pp.kernel_ssim(torch.ones(2, 2, 3, 3), variant="cpu_mmx")
    with pytest.raises(ValueError, match="takes weights in host memory; these are on meta"):
        pp.kernel_ssim(torch.ones(2, 2, 3, 3, device="meta"), variant="cpu_baseline")
    monkeypatch.setattr(machine, "this_machine", lambda gpu=0: Machine(("cpu_baseline",)))
    monkeypatch.setattr(machine, "cpu_variants", lambda: {"cpu_avx2": "this CPU lacks AVX2 and FMA"})
    with pytest.raises(ValueError, match="variant 'cpu_avx2' is not usable: this CPU lacks AVX2 and FMA; here are"):
        pp.kernel_ssim(torch.ones(2, 2, 3, 3), variant="cpu_avx2")


def test_the_binding_checks_memory():
    from pyprune import _core

    good, constants = weights(4, 2, 3, 3), (0.1, 1.0, 1.0, 1e-2, None)
    with pytest.raises(ValueError, match=r"weights must be \[F2, F1, K1, K2\]"):
        _core.ssim_matrix(good[0], constants, "cpu_baseline", 1)
    with pytest.raises(ValueError, match="must not be empty"):
        _core.ssim_matrix(good[:0], constants, "cpu_baseline", 1)
    with pytest.raises(TypeError, match="float16, float32 or float64"):
        _core.ssim_matrix(good.astype(int), constants, "cpu_baseline", 1)
    with pytest.raises(TypeError, match="float16, float32 or float64"):
        _core.ssim_matrix(good, constants, "cpu_baseline", 1, "bfloat16")
    with pytest.raises(ValueError, match="no variant cpu_mmx"):
        _core.ssim_matrix(good, constants, "cpu_mmx", 1)

    def statistics(top=0, pairs=None):
        return _core.ssim_statistics(good, constants, [0.5], 10, top, False, pairs, "cpu_baseline", 1)

    with pytest.raises(ValueError, match="top is more than there are pairs"):
        statistics(top=7)
    with pytest.raises(ValueError, match=r"pairs must be \[P, 2\]"):
        statistics(pairs=np.zeros((3, 3), np.int64))
    with pytest.raises(ValueError, match="pairs must be of filters there are"):
        statistics(pairs=np.array([[0, 4]]))
