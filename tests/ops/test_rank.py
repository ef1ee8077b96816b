"""What matrix_rank takes, returns and refuses; which variant runs."""

import array
import warnings

import numpy as np
import pytest
import torch

import pyprune as pp
from pyprune import machine
from pyprune.machine import Machine
from pyprune.ops import _reference
from pyprune.ops.rank import _run, choose_rank, rank_variants

HERE = machine.this_machine()
ALL = rank_variants(HERE)
AVX512 = Machine(("cpu_baseline", "cpu_avx2", "cpu_avx512"))
AVX2 = Machine(("cpu_baseline", "cpu_avx2"))


@pytest.mark.parametrize(
    ("shape", "device", "here", "rtol", "want"),
    [
        ((64, 32, 32), "cpu", AVX512, None, "cpu_avx512"),
        ((64, 32, 32), "cpu", AVX2, None, "cpu_avx2"),
        ((64, 32, 32), "cpu", Machine(("cpu_baseline",)), None, "cpu_baseline"),
        ((64, 32, 32), "cpu", Machine(), None, "reference"),
        ((64, 32, 32), "cpu", AVX512, 1e-8, "reference"),
        ((64, 32, 32), "cpu", AVX512, 1e-6, "cpu_avx512"),
        ((256, 1000), "cpu", AVX512, None, "cpu_avx512"),
        ((257, 257), "cpu", AVX512, None, "reference"),
        ((64, 32, 32), "cuda", AVX512, None, "torch_svd"),
    ],
)
def test_chooser(shape, device, here, rtol, want):
    assert choose_rank(shape, "float32", device, here, rtol) == want


def test_auto_runs_the_fastest_native_variant():
    assert _run(torch.randn(3, 4, 4))[1] == HERE.cpu_variants[-1]
    assert HERE.cpu_variants[0] == "cpu_baseline"


@pytest.mark.parametrize("variant", ALL)
def test_hand_computed(variant):
    maps = np.zeros((6, 3, 4), np.float32)
    maps[1, 2, 3] = -5
    maps[2, :2, :2] = [[1, 2], [2, 4]]
    maps[3, :2, :2] = [[1, 2], [2, 5]]
    maps[4, :, :3] = np.diag([1, 5e-7, 4e-7])  # the threshold is 4 * 2^-23 = 4.77e-7
    maps[5, :, :3] = np.eye(3)
    ranks, ran = _run(maps, variant=variant)
    assert ran == variant
    assert ranks.tolist() == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("variant", ALL)
def test_rtol(variant):
    maps = np.diag(np.float32([1, 0.1, 0.01, 0.001]))
    assert [int(pp.matrix_rank(maps, rtol=rtol, variant=variant)) for rtol in (0.5, 0.05, 0.005, 0.0005)] == [
        1,
        2,
        3,
        4,
    ]


def test_tiny_rtol_goes_to_the_float64_svd():
    maps = np.diag([1, 1e-9, 1e-12])
    assert [int(pp.matrix_rank(maps, rtol=rtol)) for rtol in (0, 1e-10, 1e-7)] == [3, 2, 1]
    assert _run(maps, rtol=1e-10)[1] == "reference"


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_same_kind_dtype_and_shape_come_back(variant, dtype):
    maps = torch.randn(2, 3, 1, 6, 5).relu().to(getattr(torch, dtype)).requires_grad_()
    ranks = pp.matrix_rank(maps, variant=variant)
    assert isinstance(ranks, torch.Tensor)
    assert (ranks.dtype, ranks.shape, ranks.device) == (torch.int32, (2, 3, 1), maps.device)
    assert ranks.tolist() == _reference.matrix_rank(maps.detach().double().numpy(), 6 * 2.0**-23).tolist()
    if dtype != "bfloat16":
        ours = pp.matrix_rank(maps.detach().numpy(), variant=variant)
        assert isinstance(ours, np.ndarray)
        assert (ours.dtype, ours.tolist()) == (np.int32, ranks.tolist())


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0), (2, 0, 0), (0, 4), (4, 0, 2, 2), (4, 4)])
def test_empty_and_single(variant, shape):
    for maps in (np.ones(shape, np.float32), torch.ones(shape)):
        ranks = pp.matrix_rank(maps, variant=variant)
        assert tuple(ranks.shape) == shape[:-2]
        assert (ranks == (shape == (4, 4))).all()


def test_leading_dimensions_that_no_two_strides_walk():
    maps = torch.randn(3, 2, 4, 5, 6).relu().transpose(0, 2)
    assert (pp.matrix_rank(maps) == pp.matrix_rank(maps.contiguous())).all()


class OnlyDLPack:
    """An array of another library, as far as pyprune can tell."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self):
        return type("namespace", (), {"from_dlpack": lambda ranks: ("theirs", ranks)})


def test_anything_with_dlpack():
    kind, ranks = pp.matrix_rank(OnlyDLPack(torch.eye(3).repeat(2, 1, 1)))
    assert (kind, ranks.tolist()) == ("theirs", [3, 3])


def test_foreign_byte_order_and_read_only_arrays():
    maps = np.eye(4, dtype=">f4")
    assert pp.matrix_rank(maps) == 4
    maps.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [int(pp.matrix_rank(maps, variant=variant)) for variant in ALL] == [4] * len(ALL)


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_maps_that_are_not_finite(variant, dtype, value):
    maps = np.ones((5, 2, 3, 3), dtype)
    maps[1, 0, 2, 1] = maps[4, 1, 0, 0] = value
    with pytest.raises(ValueError, match="maps must be finite; 2 of 10 hold NaN or infinity"):
        pp.matrix_rank(maps, variant=variant)
    ranks = pp.matrix_rank(maps, variant=variant, check=False)
    assert ranks.tolist() == [[1, 1], [-1, 1], [1, 1], [1, 1], [1, -1]]


@pytest.mark.parametrize("rtol", [-0.1, 1.0, float("nan"), float("inf")])
def test_rtol_out_of_range(rtol):
    with pytest.raises(ValueError, match=r"rtol must be in \[0, 1\); got"):
        pp.matrix_rank(torch.eye(2), rtol=rtol)


@pytest.mark.parametrize("maps", [torch.ones(3, 3, dtype=torch.int64), np.ones((3, 3), bool), torch.ones(3, 3) * 1j])
def test_wrong_dtype(maps):
    with pytest.raises(TypeError, match="maps must be float16, bfloat16, float32, float64; got"):
        pp.matrix_rank(maps)


def test_no_array_and_too_few_dimensions():
    with pytest.raises(TypeError, match="x must be a torch tensor, a numpy array or have __dlpack__"):
        pp.matrix_rank([[1.0]])
    with pytest.raises(TypeError, match="x must be a torch tensor"):
        pp.matrix_rank(array.array("f", [1.0]))
    with pytest.raises(ValueError, match=r"maps must be \[..., H, W\]; got \[3\]"):
        pp.matrix_rank(torch.ones(3))


def test_unknown_missing_and_misplaced_variants(monkeypatch):
    with pytest.raises(ValueError, match="variant 'cpu_mmx' is unknown; here are auto, cpu_baseline"):
        pp.matrix_rank(torch.eye(2), variant="cpu_mmx")
    with pytest.raises(ValueError, match="takes maps in host memory; these are on meta"):
        pp.matrix_rank(torch.eye(2, device="meta"), variant="cpu_baseline")
    monkeypatch.setattr(machine, "this_machine", lambda: Machine(("cpu_baseline",)))
    monkeypatch.setattr(machine, "cpu_variants", lambda: {"cpu_avx2": "this CPU lacks AVX2 and FMA"})
    with pytest.raises(ValueError, match="variant 'cpu_avx2' is not usable: this CPU lacks AVX2 and FMA; here are"):
        pp.matrix_rank(torch.eye(2), variant="cpu_avx2")


def test_the_binding_checks_memory():
    from pyprune import _core

    with pytest.raises(ValueError, match=r"maps must be \[N, C, H, W\]"):
        _core.rank(np.ones((3, 3), np.float32), 1e-6, "cpu_baseline", 1)
    with pytest.raises(TypeError, match="float32 or float64"):
        _core.rank(np.ones((1, 1, 3, 3), np.int32), 1e-6, "cpu_baseline", 1)
    with pytest.raises(ValueError, match="no variant cpu_mmx"):
        _core.rank(np.ones((1, 1, 3, 3), np.float32), 1e-6, "cpu_mmx", 1)
