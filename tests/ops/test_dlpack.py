"""Arrays of other libraries: what their producers are asked, and what comes back."""

import warnings

import numpy as np
import pytest
import torch

import pyprune as pp
from pyprune.ops import _dlpack


class Producer:
    """An array of another library that records what it is asked."""

    def __init__(self, held):
        self.held, self.asked = held, []

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        self.asked.append({"stream": stream, "max_version": max_version, "dl_device": dl_device, "copy": copy})
        options = {"max_version": max_version, "copy": copy} if max_version else {}
        return self.held.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.held.__dlpack_device__()

    def __array_namespace__(self):
        return type("namespace", (), {"from_dlpack": lambda ranks: ("theirs", np.from_dlpack(ranks))})


class Older(Producer):
    """A producer from before versioned DLPack."""

    def __dlpack__(self, stream=None):
        return super().__dlpack__(stream=stream)


class Stubborn(Producer):
    """A producer that cannot do without a copy."""

    def __dlpack__(self, **options):
        if options.get("copy") is False:
            raise BufferError("these numbers are elsewhere")
        return super().__dlpack__(**options)


@pytest.mark.parametrize("held", [np.eye(4, dtype=np.float32), torch.eye(4), torch.eye(4).bfloat16()], ids=str)
@pytest.mark.parametrize("kind", [Producer, Older])
def test_in_and_back_as_the_same_kind(kind, held):
    back, ranks = pp.matrix_rank(kind(held))
    assert (back, ranks.dtype, int(ranks)) == ("theirs", np.int32, 4)


def test_a_producer_is_asked_for_a_version_and_no_copy():
    array = Producer(np.eye(3))
    pp.matrix_rank(array)
    assert array.asked == [{"stream": None, "max_version": (1, 0), "dl_device": None, "copy": False}]


def test_the_maps_are_not_copied():
    maps = np.zeros((5, 3, 3), np.float32)
    view = _dlpack.view(Producer(maps))
    maps[2] = np.eye(3)
    assert pp.matrix_rank(view).tolist() == [0, 0, 3, 0, 0]
    tensor = torch.zeros(3, 3).bfloat16()
    assert _dlpack.view(Producer(tensor)).data_ptr() == tensor.data_ptr()


def test_a_copy_that_would_be_needed_is_refused():
    with pytest.raises(BufferError, match="these numbers are elsewhere"):
        pp.matrix_rank(Stubborn(np.eye(3)))


def test_read_only_and_reversed_arrays():
    """torch warns of the first and ends the process at the second, so neither may reach it."""
    maps = np.ascontiguousarray(np.triu(np.ones((2, 5, 5)))[:, ::-1])[:, ::-1]
    maps.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pp.matrix_rank(Producer(maps))[1].tolist() == [5, 5]


def test_a_type_error_of_the_producer_comes_through():
    class Broken(Producer):
        def __dlpack__(self, **options):
            raise TypeError("broken inside")

    with pytest.raises(TypeError, match="broken inside"):
        pp.matrix_rank(Broken(np.eye(3)))


@pytest.mark.parametrize("held", [np.ones((3, 3), np.int32), np.ones((3, 3), complex)], ids=str)
def test_dtypes_are_checked_as_ever(held):
    with pytest.raises(TypeError, match="maps must be float16, bfloat16, float32, float64; got"):
        pp.matrix_rank(Producer(held))


def test_options_reach_arrays_of_other_libraries():
    maps = np.diag([1, 0.1, np.nan])
    with pytest.raises(ValueError, match="maps must be finite; 1 of 1"):
        pp.matrix_rank(Producer(maps))
    assert pp.matrix_rank(Producer(maps), check=False)[1] == -1
    assert pp.matrix_rank(Producer(maps[:2, :2]), rtol=0.5, variant="reference")[1] == 1


@pytest.mark.gpu
def test_cupy_arrays_stay_on_their_device_and_stream():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed: pip install pyprune[cupy]")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        maps = cupy.tile(cupy.eye(6, dtype=cupy.float32), (500, 1, 1))
        maps[:, 1] = maps[:, 0]
        ranks = pp.matrix_rank(maps)
        assert isinstance(ranks, cupy.ndarray)
        assert (ranks.dtype, ranks.shape, ranks.device) == (cupy.int32, (500,), maps.device)
        assert (ranks == 5).all()
        assert (pp.matrix_rank(maps[:, ::-1]) == 5).all()
        with _dlpack.stream_of(maps):
            assert torch.cuda.current_stream().cuda_stream == stream.ptr
    assert torch.cuda.current_stream().cuda_stream != stream.ptr
