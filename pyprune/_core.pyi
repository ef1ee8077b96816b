from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

def k_search(
    x: npt.NDArray[np.float64],
    k_min: int,
    k_max: int,
    n_init: int,
    max_iter: int,
    seed: int,
    refine: bool,
    variant: str,
    threads: int,
    progress: Callable[[int], object] | None,
    elsewhere: str = "",
    option: int = 0,
) -> tuple[
    npt.NDArray[np.int32],
    npt.NDArray[np.float64],
    npt.NDArray[np.float64],
    npt.NDArray[np.float64],
    npt.NDArray[np.int32],
    npt.NDArray[np.int32],
]: ...
def rank_variants() -> dict[str, str]: ...
def rank(
    maps: npt.NDArray[np.floating] | npt.NDArray[np.uint16],
    rtol: float,
    variant: str,
    threads: int,
    dtype: str = "",
    layout: str = "auto",
) -> npt.NDArray[np.int32]: ...
def multiply_adds(variant: str, threads: int) -> float: ...
def rank_layout(variant: str, H: int, W: int, maps: int) -> str: ...
def cuda_built() -> tuple[bool, str]: ...
def cuda_device_reason(device: int) -> str: ...
def rank_cuda_layouts(device: int = -1) -> dict[str, int]: ...
def rank_cuda(
    batches: Sequence[tuple[int, str, tuple[int, int, int, int], tuple[int, int, int, int], int, int, int]],
    *,
    rtol: float | None = None,
    layout: str = "",
    labels: int = 0,
    label_bits: int = 64,
    classes: int = 0,
    not_finite: int = 0,
    stream: int = 0,
    device: int = 0,
) -> list[str]: ...
def rank_twin(
    maps: npt.NDArray[Any], rtol: float, layout: str, backwards: bool = False
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]: ...
def rank_twin_reduce(values: npt.NDArray[np.float64]) -> tuple[float, float]: ...
def ssim_matrix(
    weights: npt.NDArray[np.floating] | npt.NDArray[np.uint16],
    constants: tuple[float, float, float, float, float | None],
    variant: str,
    threads: int,
    dtype: str = "",
) -> npt.NDArray[np.floating]: ...
def ssim_statistics(
    weights: npt.NDArray[np.floating] | npt.NDArray[np.uint16],
    constants: tuple[float, float, float, float, float | None],
    thresholds: list[float],
    bins: int,
    top: int,
    nearest: bool,
    pairs: npt.NDArray[np.int64] | None,
    variant: str,
    threads: int,
    dtype: str = "",
) -> tuple[
    int,
    float,
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
    npt.NDArray[np.float64],
    npt.NDArray[np.int64],
    npt.NDArray[np.float64],
]: ...
def ssim_scratch(layer: dict[str, Any]) -> int: ...
def ssim_cuda(layers: Sequence[dict[str, Any]], *, not_finite: int = 0, stream: int = 0, device: int = 0) -> None: ...
def ssim_twin(
    layers: Sequence[dict[str, Any]], *, not_finite: int = 0, backwards: bool = False, worst: int = 0
) -> None: ...
