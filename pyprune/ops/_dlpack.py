"""Arrays of other libraries: in without a copy, and the result back as the same kind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_HOST = (1, 3)  # kDLCPU, kDLCUDAHost


def view(x: Any) -> Any:
    """Return the numbers of ``x`` where they are: a numpy array in host memory, else a torch tensor.

    The producer is asked for versioned DLPack, so that it may hand out read-only memory, on torch's current stream, and
    not to copy.

    Raises
    ------
    BufferError
        By the producer, if it cannot do without a copy.
    """
    producer = _Producer(x)
    if x.__dlpack_device__()[0] in _HOST:
        try:
            return np.from_dlpack(producer)  # torch ends the process at a negative stride
        except RuntimeError as error:
            if "dtype" not in str(error):  # numpy has no bfloat16, torch has
                raise
    import torch

    strides = getattr(x, "strides", None)
    if isinstance(strides, tuple) and any(stride < 0 for stride in strides):
        producer = _Producer(x.copy())
    return torch.utils.dlpack.from_dlpack(producer)


class _Producer:
    """An array that is asked not to copy, and asked again with fewer words where it is older than the question."""

    def __init__(self, x: Any) -> None:
        self._x = x

    def __dlpack_device__(self) -> Any:
        return self._x.__dlpack_device__()

    def __dlpack__(self, **asked: Any) -> Any:
        words = {**{name: value for name, value in asked.items() if value is not None}, "copy": False}
        for newer in ((), ("copy", "dl_device"), ("max_version",)):
            words = {name: value for name, value in words.items() if name not in newer}
            try:
                return self._x.__dlpack__(**words)
            except TypeError:
                if not words.keys() - {"stream"}:
                    raise
        return self._x.__dlpack__(**words)


def like(x: Any, result: Any) -> Any:
    """Return ``result`` as the kind of array that ``x`` is, or as it is where that library cannot take it."""
    root = sys.modules[type(x).__module__.partition(".")[0]]
    home = x.__array_namespace__() if hasattr(x, "__array_namespace__") else root
    return home.from_dlpack(result) if hasattr(home, "from_dlpack") else result


@contextmanager
def stream_of(x: Any) -> Iterator[None]:
    """Make CuPy's current stream torch's as well: it is the caller's, and then neither waits for the other."""
    cupy = sys.modules.get("cupy")
    if cupy is None or not isinstance(x, cupy.ndarray):
        yield
        return
    import torch

    device = torch.device("cuda", x.device.id)
    with torch.cuda.device(device):
        make: Any = torch.cuda.ExternalStream  # torch leaves it untyped
        stream = make(cupy.cuda.get_current_stream().ptr, device=device)
        with torch.cuda.stream(stream):
            yield
