"""NaN and infinity on a GPU: counted by the kernels there, raised here once that costs no waiting.

A kernel that meets a map that is not finite gives it rank -1 and adds one to a counter in pinned host memory, which the
device reaches by its own address. So the way that all maps take has no copy, no event and no allocation, and looking
means reading one number that is here already. What is seen is what the device has finished: look after anything that
waits for the device, and every call is covered; look without, and earlier calls mostly are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_counters: dict[int, torch.Tensor] = {}
_raised: dict[int, int] = {}


def counter(device: torch.device) -> torch.Tensor:
    """Return the counter of a GPU: int64 [1] in pinned host memory, for kernels to add to."""
    index = _index(device)
    if index not in _counters:
        _counters[index] = _pinned()
        _raised[index] = 0
    return _counters[index]


def poll(device: torch.device | None = None) -> None:
    """Raise if the counter of that GPU (by default any) has moved since the last look; this does not wait for it.

    Raises
    ------
    ValueError
        Naming how many maps were not finite. The next call starts anew.
    """
    for index in list(_counters) if device is None else [_index(device)]:
        total = int(_counters[index]) if index in _counters else 0
        new, _raised[index] = total - _raised.get(index, 0), total
        if new:
            raise ValueError(
                f"matrix_rank: maps must be finite; {new} of those ranked before on cuda:{index} hold NaN or infinity, "
                "and their rank is -1. Find what makes them, or pass check=False to get -1 for these."
            )


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
