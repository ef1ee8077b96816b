"""NaN and infinity on a GPU: counted by the kernels there, raised here once that costs no waiting.

A kernel that meets a map that is not finite gives it rank -1 and adds one to a counter in pinned host memory, which the
device reaches by its own address; kernel SSIM gives NaN and adds the number of weights. So the way that all take has no
copy, no event and no allocation, and looking means reading one number that is here already. What is seen is what the
device has finished: look after anything that waits for the device, and every call is covered; look without, and earlier
calls mostly are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_counters: dict[tuple[str, int], torch.Tensor] = {}
_raised: dict[tuple[str, int], int] = {}

_MESSAGES = {
    "matrix_rank": "maps must be finite; {new} of those ranked before on cuda:{index} hold NaN or infinity, "
    "and their rank is -1. Find what makes them, or pass check=False to get -1 for these.",
    "kernel_ssim": "weights must be finite; {new} of those compared before on cuda:{index} are NaN or infinite, "
    "and Psi of their layers is NaN. Find what makes them.",
}


def counter(device: torch.device, op: str = "matrix_rank") -> torch.Tensor:
    """Return an op's counter of a GPU: int64 [1] in pinned host memory, for kernels to add to."""
    key = op, _index(device)
    if key not in _counters:
        _counters[key] = _pinned()
        _raised[key] = 0
    return _counters[key]


def poll(device: torch.device | None = None) -> None:
    """Raise if a counter of that GPU (by default any) has moved since the last look; this does not wait for it.

    Raises
    ------
    ValueError
        Naming the op and how many maps or weights were not finite. The next call starts anew.
    """
    wanted = None if device is None else _index(device)
    for op, index in [key for key in _counters if wanted in (None, key[1])]:
        total = int(_counters[op, index])
        new, _raised[op, index] = total - _raised[op, index], total
        if new:
            raise ValueError(f"{op}: {_MESSAGES[op].format(new=new, index=index)}")


def capturing() -> bool:
    """Return whether the current stream records a CUDA graph: nothing can be looked at then, nor raised."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _index(device: torch.device) -> int:
    import torch

    return torch.cuda.current_device() if device.index is None else device.index


def _pinned() -> torch.Tensor:
    import torch

    return torch.zeros(1, dtype=torch.int64).pin_memory()
