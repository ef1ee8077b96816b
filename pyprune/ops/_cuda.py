"""The compiled GPU kernels, called with torch tensors: on the tensors' device and torch's current stream there.

Nothing here waits for the device, so a CUDA graph can capture it. Callers check meaning; this checks memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rank(
    maps: torch.Tensor, rtol: float | None = None, layout: str = "", not_finite: torch.Tensor | None = None
) -> tuple[torch.Tensor, str]:
    """Return the ranks of maps on a GPU and the layout that the kernel used.

    Parameters
    ----------
    maps
        [N, C, H, W], float16, bfloat16, float32 or float64, any strides, read in place; min(H, W) up to
        ``_core.rank_cuda_layouts(device)["cuda_tile8"]``.
    rtol
        By default max(H, W) * eps(float32).
    layout
        One of ``_core.rank_cuda_layouts()``, or "" for the one that suits the maps.
    not_finite
        int64 [1] on the same device or in pinned host memory, which the device reaches by its own address: the number
        of maps with NaN or infinity, whose rank is -1, is added to it.

    Returns
    -------
    int32 [N, C] on the same device, and the layout's name.
    """
    import torch

    from pyprune import _core

    ranks = torch.empty(maps.shape[:2], dtype=torch.int32, device=maps.device)
    batch = (*_describe(maps), ranks.data_ptr(), 0, 0)
    (used,) = _core.rank_cuda([batch], rtol=rtol, layout=layout, **_where(maps, not_finite))
    return ranks, used


def rank_sums(
    maps: Sequence[torch.Tensor],
    labels: torch.Tensor,
    sums: torch.Tensor,
    *,
    rtol: float | None = None,
    layout: str = "",
    not_finite: torch.Tensor | None = None,
) -> list[str]:
    """Add the ranks of several layers' maps to the sums of their images' classes, without bringing ranks out.

    Parameters
    ----------
    maps
        Of each layer [N, C, H, W], as for :func:`rank`, all on one device.
    labels
        int64 or int32 [N]; a label outside [0, classes) adds nothing.
    sums
        int64 [classes, sum of all C], changed in place; the layers' columns in the order of ``maps``.
    rtol, layout, not_finite
        As for :func:`rank`. Maps that are not finite add nothing to the sums.

    Returns
    -------
    The layout's name for each layer.

    Raises
    ------
    ValueError
        If labels or sums do not fit the maps, or lie elsewhere.
    """
    import torch

    from pyprune import _core

    if not maps:
        return []
    N, columns = maps[0].shape[0], sum(layer.shape[1] for layer in maps)
    if labels.dtype not in (torch.int64, torch.int32) or labels.shape != (N,):
        raise ValueError(f"rank_sums: labels must be int64 or int32 [{N}]; got {labels.dtype} {list(labels.shape)}.")
    if sums.dtype != torch.int64 or sums.ndim != 2 or sums.shape[1] != columns or sums.stride(1) not in (0, 1):
        raise ValueError(
            f"rank_sums: sums must be int64 [classes, {columns}] with contiguous rows; "
            f"got {sums.dtype} {list(sums.shape)}."
        )
    tensors = (*maps, labels, sums)
    if len({tensor.device for tensor in tensors}) > 1 or any(layer.shape[0] != N for layer in maps):
        raise ValueError("rank_sums: maps, labels and sums must be on one device, and all maps of as many images.")
    labels = labels.contiguous()
    batches, column = [], 0
    for layer in maps:
        batches.append((*_describe(layer), 0, sums.data_ptr() + column * sums.element_size(), sums.stride(0)))
        column += layer.shape[1]
    return _core.rank_cuda(
        batches,
        rtol=rtol,
        layout=layout,
        labels=labels.data_ptr(),
        label_bits=8 * labels.element_size(),
        classes=sums.shape[0],
        **_where(maps[0], not_finite),
    )


def _describe(
    maps: torch.Tensor,
) -> tuple[int, str, tuple[int, int, int, int], tuple[int, int, int, int]]:
    if not maps.is_cuda or maps.ndim != 4:
        raise ValueError(f"rank: maps must be [N, C, H, W] on a GPU; got {list(maps.shape)} on {maps.device}.")
    N, C, H, W = maps.shape
    n, c, h, w = maps.stride()
    return maps.data_ptr(), str(maps.dtype).removeprefix("torch."), (N, C, H, W), (n, c, h, w)


def _where(maps: torch.Tensor, not_finite: torch.Tensor | None) -> dict[str, int]:
    import torch

    if not_finite is not None and (
        not_finite.dtype != torch.int64 or not (not_finite.device == maps.device or not_finite.is_pinned())
    ):
        raise ValueError(
            f"rank: not_finite must be int64 on {maps.device} or pinned; got {not_finite.dtype} on {not_finite.device}."
        )
    return {
        "not_finite": 0 if not_finite is None else not_finite.data_ptr(),
        "stream": torch.cuda.current_stream(maps.device).cuda_stream,
        "device": maps.device.index,
    }
