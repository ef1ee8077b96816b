"""What matrix_rank takes, returns and refuses; which variant runs."""

import array
import re
import tracemalloc
import warnings

import numpy as np
import pytest
import torch

import pyprune as pp
from pyprune import machine
from pyprune.machine import Machine
from pyprune.ops import _reference, rank
from pyprune.ops.rank import _run, choose_rank, rank_variants

HERE = machine.this_machine()
ALL = rank_variants(HERE)
AVX512 = Machine(("cpu_baseline", "cpu_avx2", "cpu_avx512"))
LAYOUTS = (("cuda_thread", 4), ("cuda_group8", 8), ("cuda_group16", 16), ("cuda_group32", 32), ("cuda_tile4", 64))
GPU = Machine(AVX512.cpu_variants, (*LAYOUTS, ("cuda_tile8", 224)), "cuda")
TRITON = Machine(AVX512.cpu_variants, (), "cuda")
INTERPRETER = Machine(AVX512.cpu_variants, (), "cpu")
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
        ((1024, 3000), "cpu", AVX512, None, "cpu_avx512"),
        ((1025, 1025), "cpu", AVX512, None, "reference"),
        ((64, 4, 1000), "cuda", GPU, None, "cuda_thread"),
        ((64, 5, 5), "cuda", GPU, None, "cuda_group8"),
        ((64, 17, 32), "cuda", GPU, None, "cuda_group32"),
        ((64, 33, 33), "cuda", GPU, None, "cuda_tile4"),
        ((64, 224, 224), "cuda", GPU, None, "cuda_tile8"),
        ((64, 225, 300), "cuda", GPU, None, "torch_eigvalsh"),
        ((64, 8, 8), "cuda", GPU, 1e-8, "torch_svd"),
        ((64, 8, 8), "cpu", GPU, None, "cpu_avx512"),
        ((64, 64, 99), "cuda", TRITON, None, "triton"),
        ((64, 65, 65), "cuda", TRITON, None, "torch_eigvalsh"),
        ((64, 8, 8), "cuda", TRITON, 1e-8, "torch_svd"),
        ((64, 8, 8), "cuda", INTERPRETER, None, "torch_eigvalsh"),
        ((64, 8, 8), "cpu", INTERPRETER, None, "cpu_avx512"),
        ((64, 32, 32), "cuda", AVX512, None, "torch_eigvalsh"),
    ],
)
def test_chooser(shape, device, here, rtol, want):
    assert choose_rank(shape, "float32", device, here, rtol) == want


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("mps", "maps must be on cpu or cuda; these are on mps. Pass x.cpu(), or variant='torch_eigvalsh' if torch"),
        ("xpu", "maps must be on cpu or cuda; these are on xpu"),
        ("meta", "maps must have values; these are on meta"),
    ],
)
def test_devices_without_a_backend(device, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_rank((3, 3), "float32", device, GPU)


def test_variants_of_each_device():
    assert rank_variants(GPU) == (*AVX512.cpu_variants, "reference", "torch_eigvalsh", "torch_svd")
    assert rank_variants(GPU, "cuda") == (*dict(GPU.cuda), "triton", "torch_eigvalsh", "torch_svd")
    assert "triton" in rank_variants(INTERPRETER)
    assert rank_variants(GPU, "mps") == ("torch_eigvalsh", "torch_svd")


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


@pytest.mark.parametrize(
    ("variant", "device", "here", "message"),
    [
        (
            "cpu_mmx",
            "cpu",
            AVX2,
            "is unknown; here are auto, cpu_baseline, cpu_avx2, reference, torch_eigvalsh, torch_svd",
        ),
        ("cpu_avx22", "cpu", AVX2, "Did you mean 'cpu_avx2'?"),
        ("torch_eigvals", "cuda", GPU, "Did you mean 'torch_eigvalsh'?"),
        ("cpu_avx512", "cpu", AVX2, "is not usable: this CPU lacks AVX-512; here are auto, cpu_baseline, cpu_avx2,"),
        (
            "cpu_avx2",
            "cuda",
            GPU,
            "takes maps in host memory; these are on cuda. Pass x.to('cpu'), or one of auto, cuda",
        ),
        ("reference", "meta", AVX2, "takes maps in host memory; these are on meta"),
        (
            "cuda_tile8",
            "cpu",
            GPU,
            "takes maps on a GPU; these are in host memory. Pass x.to('cuda'), or one of auto, cpu",
        ),
        ("cuda_tile8", "cuda", TRITON, "is not usable: no CUDA kernels in this build"),
        ("triton", "cpu", TRITON, "takes maps on a GPU; these are in host memory"),
        ("triton", "cuda", AVX2, "is not usable: not installed: pip install triton"),
        ("triton", "cuda", INTERPRETER, "takes maps in host memory; these are on cuda"),
    ],
)
def test_a_variant_that_cannot_run_says_why(variant, device, here, message, monkeypatch):
    lacks = {"cpu_baseline": "", "cpu_avx2": "", "cpu_avx512": "this CPU lacks AVX-512"}
    monkeypatch.setattr(machine, "cpu_variants", lambda: lacks)
    monkeypatch.setattr(machine, "cuda_reason", lambda: "no CUDA kernels in this build")
    monkeypatch.setattr(machine, "_found", lambda module: False)
    with pytest.raises(ValueError, match=re.escape(f"matrix_rank: variant {variant!r} ") + ".*" + re.escape(message)):
        rank._resolve(variant, (3, 3), "float32", device, None, here)


def test_a_variant_that_takes_only_smaller_maps():
    with pytest.raises(
        ValueError, match=r"'cuda_group8' takes maps with a short side of at most 8; got 9 x 100\. Pass"
    ):
        rank._resolve("cuda_group8", (2, 9, 100), "float32", "cuda", None, GPU)
    assert rank._resolve("cuda_group8", (2, 100, 8), "float32", "cuda", None, GPU) == "cuda_group8"
    with pytest.raises(ValueError, match="'triton' takes maps with a short side of at most 64; got 65 x 65"):
        rank._resolve("triton", (65, 65), "float32", "cuda", None, TRITON)


@pytest.mark.parametrize("variant", ["reference", "torch_svd", "torch_eigvalsh"])
@pytest.mark.parametrize("shape", [(40, 7), (3, 90), (90, 1), (0, 5), (5, 0)])
def test_many_maps_go_block_by_block(variant, shape, monkeypatch):
    maps = np.maximum(np.random.default_rng(0).standard_normal((*shape, 6, 5)), 0)
    want = _reference.matrix_rank(maps)
    for workspace in (1, 8 * 141 * 10, 8 * 141 * 100):
        monkeypatch.setattr(rank, "WORKSPACE", workspace)
        blocks = [(len(maps[n, c]), maps[n, c].size // 30) for n, c in rank._blocks(maps.shape)]
        assert sum(count for _, count in blocks) == maps.size // 30
        assert all(count <= max(1, workspace // (8 * 141)) for _, count in blocks)
        assert (pp.matrix_rank(maps, variant=variant) == want).all()
        assert (pp.matrix_rank(torch.from_numpy(maps), variant=variant).numpy() == want).all()


def test_memory_stays_bounded_however_many_maps(monkeypatch):
    monkeypatch.setattr(rank, "WORKSPACE", 1 << 20)
    maps = np.broadcast_to(np.eye(16, dtype=np.float32), (2, 4000, 16, 16))  # as float64 they would take 16 MB
    tracemalloc.start()
    assert (pp.matrix_rank(maps, variant="reference") == 16).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_the_binding_checks_memory():
    from pyprune import _core

    with pytest.raises(ValueError, match=r"maps must be \[N, C, H, W\]"):
        _core.rank(np.ones((3, 3), np.float32), 1e-6, "cpu_baseline", 1)
    with pytest.raises(TypeError, match="float32 or float64"):
        _core.rank(np.ones((1, 1, 3, 3), np.int32), 1e-6, "cpu_baseline", 1)
    with pytest.raises(ValueError, match="no variant cpu_mmx"):
        _core.rank(np.ones((1, 1, 3, 3), np.float32), 1e-6, "cpu_mmx", 1)
