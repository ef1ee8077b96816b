"""Speed of the kernels beside their peers and the machine's own limits, every answer checked: ``pyprune bench``."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyprune.machine import this_machine
from pyprune.measure import as_device
from pyprune.ops import _cuda, _reference
from pyprune.ops import rank as rank_op
from pyprune.ops import ssim as ssim_op
from pyprune.ops._reference import EPS32
from pyprune.progress import bar

OPS = ("rank", "ssim")

RANK_SIDES = (2, 4, 8, 16, 32, 56, 112)
VGG16 = ((64, 32),) * 2 + ((128, 16),) * 2 + ((256, 8),) * 3 + ((512, 4),) * 3 + ((512, 2),) * 3
"""Channels and side of the map of every convolution of VGG-16 on 32 x 32 images."""

RESNET50_MAPS = (
    (64, 112), *((64, 56), (64, 56), (256, 56)) * 3,
    (128, 56), (128, 28), (512, 28), *((128, 28), (128, 28), (512, 28)) * 3,
    (256, 28), (256, 14), (1024, 14), *((256, 14), (256, 14), (1024, 14)) * 5,
    (512, 14), (512, 7), (2048, 7), *((512, 7), (512, 7), (2048, 7)) * 2,
)  # fmt: skip
"""The same of ResNet-50 on 224 x 224 images, without the projections, which are read where the last ones are."""

RESNET50 = (((64, 3, 7), 1), ((64, 64, 3), 3), ((128, 128, 3), 4), ((256, 256, 3), 6), ((512, 512, 3), 3))
"""F2, F1 and K of the convolutions of ResNet-50 larger than 1 x 1, and how many there are of each: 17."""

SSIM_ARITHMETIC = 17
"""Float32 products and multiply-adds of psi behind the product of two slices. Six additions, two divisions and the
look-ups of a power come on top, but some processors have other units for them."""

_CHECKED = 2000  # maps of a case that are held against the float64 SVD
_CHECKED_FILTERS = 48  # filters of a case that are compared by the float64 reference
_SECONDS = {"cpu": 0.03, "cuda": 0.002}  # a call lasts at least this long, so that clocks and launches do not show
_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # and moves no more than this


@dataclass(frozen=True)
class Floor:
    """What the machine can do at best, measured: bytes/s read, multiply-adds/s in float64 and float32."""

    device: str
    threads: int
    bandwidth: float
    fma64: float
    fma32: float

    def seconds(self, nbytes: float, fma64: float = 0, fma32: float = 0) -> float:
        """Return the least time in which so many bytes can be read and so many multiply-adds done."""
        return max(nbytes / self.bandwidth, fma64 / self.fma64 + fma32 / self.fma32)


@dataclass(frozen=True)
class Row:
    """One rival on one case.

    ``rate`` counts items (maps, slice pairs) per second, ``ratio`` is that over the first peer's, ``floor`` the least
    possible time over the measured one. Of ``checked`` answers ``d0`` break our promise and ``d1`` differ from torch's
    float32 answer where that one is certain (ranks only).
    """

    op: str
    case: str
    rival: str
    items: int
    seconds: float
    rate: float
    ratio: float
    floor: float | None
    checked: int
    d0: int
    d1: int | None


@dataclass(frozen=True)
class Bench:
    """All rows, the floor, and where they were measured."""

    rows: tuple[Row, ...]
    floor: Floor
    machine: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain JSON values."""
        return {"machine": dict(self.machine), "floor": asdict(self.floor), "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        limit = self.floor
        lines = [
            f"{self.machine['processor']}, {limit.threads} thread(s), torch {self.machine['torch']}: "
            f"reads {limit.bandwidth / 1e9:.1f} GB/s, {limit.fma64 / 1e9:.1f} G multiply-adds/s in float64, "
            f"{limit.fma32 / 1e9:.1f} in float32"
        ]
        for op, what in (("rank", "maps/s"), ("ssim", "slice pairs/s")):
            rows = [row for row in self.rows if row.op == op]
            if rows:
                lines += ["", f"| {op} | by | {what} | over the first | of the floor | wrong | unlike torch |"]
                lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |", *map(_line, rows)]
        return "\n".join(lines)


def _line(row: Row) -> str:
    share = "" if row.floor is None else f"{row.floor:.0%}"
    wrong = f"{row.d0} of {row.checked:,}" if row.checked else ""
    unlike = "" if row.d1 is None else f"{row.d1}"
    return f"| {row.case} | {row.rival} | {row.rate:,.0f} | {row.ratio:.3g}x | {share} | {wrong} | {unlike} |"


def bench(
    ops: Sequence[str] = OPS, *, device: str = "cpu", variants: Sequence[str] | None = None,
    sides: Sequence[int] = RANK_SIDES, rounds: int = 7, progress: bool = True,
) -> Bench:  # fmt: skip
    """Time every variant of the kernels beside its peers, interleaved, and check every answer.

    Parameters
    ----------
    ops
        Of ``"rank"`` and ``"ssim"``.
    device
        ``"cpu"``, with as many threads as torch is set to, or a CUDA device.
    variants
        Ours to time; by default all that can run there and were made for speed.
    sides
        Sides of the square maps that are ranked, beside all maps of VGG-16 on 500 images.
    rounds
        Runs of each rival, of which the median counts; a round runs all of them, so that noise hits them alike.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Bench
        Print it for a table; ``to_json()`` for programs.

    Raises
    ------
    ValueError
        If an operation, a variant or the device is unknown here, or a number is below 1.
    """
    _check(ops, sides, rounds)
    where = as_device(device)
    if where.type not in _SECONDS:
        raise ValueError(f"bench: device must be cpu or cuda; got {device!r}.")
    floor = measure_floor(where, rounds)
    cases: dict[str, Callable[[], list[Row]]] = {}
    if "rank" in ops:
        cases |= {f"{side} x {side} maps": partial(_rank_case, side, floor, where, variants, rounds) for side in sides}
        cases["maps of VGG-16"] = partial(_network_case, "VGG-16", VGG16, 500, floor, where, variants, rounds)
        if where.type == "cuda":  # hours for torch on a CPU
            maps = RESNET50_MAPS
            cases["maps of ResNet-50"] = partial(_network_case, "ResNet-50", maps, 50, floor, where, variants, rounds)
    if "ssim" in ops:
        for (F2, F1, K), _ in RESNET50:
            cases[f"{F2} x {F1} x {K} x {K}"] = partial(_ssim_case, (F2, F1, K, K), floor, where, variants, rounds)
        cases["kernels of ResNet-50"] = partial(_resnet50_case, floor, where, variants, rounds)
    rows: list[Row] = []
    with bar("Measuring", len(cases), progress) as advance:
        for name, measure in cases.items():
            advance(0, name)
            rows += measure()
            advance()
    about = {
        "processor": _processor(where), "threads": torch.get_num_threads(), "torch": str(torch.__version__),
        "numpy": np.__version__, "python": platform.python_version(), "rounds": rounds,
    }  # fmt: skip
    return Bench(tuple(rows), floor, about)


def _check(ops: Sequence[str], sides: Sequence[int], rounds: int) -> None:
    unknown = [op for op in ops if op not in OPS]
    if unknown or not ops:
        raise ValueError(f"bench: operations are {' and '.join(OPS)}; got {', '.join(unknown) or 'none'}.")
    if rounds < 1 or min(sides, default=1) < 1:
        raise ValueError(f"bench: rounds and sides must be 1 or more; got {rounds} rounds and sides {list(sides)}.")


def measure_floor(device: torch.device, rounds: int = 7) -> Floor:
    """Measure the bandwidth of reading a large array, and multiply-adds: the best of several times.

    On the CPU they are timed in registers of the widest vectors that run here, on a GPU in large matrix products.
    """
    threads = torch.get_num_threads()
    big = torch.ones(_BYTES[device.type], device=device)  # four times as many bytes: beyond any cache
    bandwidth = big.numel() * 4 / _best(big.sum, device, rounds)
    if device.type == "cpu" and (variants := this_machine().cpu_variants):
        from pyprune import _core

        fma64 = max(_core.multiply_adds(variants[-1], threads) for _ in range(100 * rounds))
        return Floor(str(device), threads, bandwidth, fma64, 2 * fma64)
    side, rates = 1024 if device.type == "cpu" else 8192, []
    for dtype in (torch.float64, torch.float32):
        square = torch.rand(side, side, dtype=dtype, device=device)
        rates.append(side**3 / _best(partial(torch.mm, square, square), device, rounds))
    return Floor(str(device), threads, bandwidth, rates[0], rates[1])


def _best(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    run()
    return min(_seconds(run, device) for _ in range(rounds))


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        start.record()
        run()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1000


Rival = Callable[[int], Any]
"""Do the work on the first so many items."""


def _interleaved(
    rivals: Mapping[str, Rival], items: int, device: torch.device, rounds: int, fewest: int = 8
) -> dict[str, tuple[int, float]]:
    """Return for each rival how many items a call took, and its median seconds."""
    counts = {name: _calibrated(run, items, device, fewest) for name, run in rivals.items()}
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            times[name].append(_seconds(partial(run, counts[name]), device))
    return {name: (counts[name], statistics.median(found)) for name, found in times.items()}


def _calibrated(run: Rival, items: int, device: torch.device, fewest: int) -> int:
    """Return as many items as take long enough to time, at most all; slow rivals get few."""
    count = min(items, fewest)
    run(count)  # warm-up
    while count < items and _seconds(partial(run, count), device) < _SECONDS[device.type]:
        count = min(items, 4 * count)
    return count


def relu_maps(count: int, side: int, device: torch.device) -> torch.Tensor:
    """Return maps [count, side, side] as after a ReLU; every third repeats rows, so that ranks differ."""
    maps = torch.randn(count, side, side, generator=torch.Generator().manual_seed(side)).relu()
    maps[::3, side // 2 :] = maps[::3, : side - side // 2]
    return maps.to(device)


def _rank_case(side: int, floor: Floor, device: torch.device, variants: Sequence[str] | None, rounds: int) -> list[Row]:
    maps = relu_maps(_BYTES[device.type] // (4 * side * side), side, device)
    rivals: dict[str, Rival] = {"torch_batched": lambda count: torch.linalg.matrix_rank(maps[:count])}
    if device.type == "cuda":
        rivals |= _cupy_rival(maps)
    ours = _rank_variants(maps, variants)
    rivals |= {name: partial(_rank_layers, [maps], name) for name in ours}
    found = _interleaved(rivals, len(maps), device, rounds)
    few = maps[:: -(-len(maps) // _CHECKED)].contiguous()
    right = _RightRanks(few)
    checks = {name: right.check(rank_op.matrix_rank(few, variant=name)) for name in ours}
    checks["torch_batched"] = right.check(torch.linalg.matrix_rank(few))
    return _rows("rank", f"{side} x {side}", found, _least(side, floor), 1, checks)


class _RightRanks:
    """Ranks by the float64 SVD, where nothing lies so near the threshold that another answer is as right."""

    def __init__(self, maps: torch.Tensor) -> None:
        n = max(maps.shape[-2:])
        s = torch.linalg.svdvals(maps.double())
        t = n * EPS32 * s[..., :1]
        self._ranks = (s > t).sum(-1)
        self._sure = ((s - t).abs() * 4 * n * n >= t).all(-1)
        torch_error = min(8, 1.25 * n) * 2.0**-24 * s[..., :1]
        self._torch, self._torch_sure = torch.linalg.matrix_rank(maps), ((s - t).abs() > torch_error).all(-1)

    def check(self, ranks: torch.Tensor) -> tuple[int, int, int | None]:
        """Return how many ranks were checked, how many are wrong, and how many unlike torch's."""
        wrong, unlike = (ranks != self._ranks) & self._sure, (ranks != self._torch) & self._torch_sure
        return len(ranks), int(wrong.sum()), int(unlike.sum())


def _rows(
    op: str, case: str, found: Mapping[str, tuple[int, float]], least: float, items: int,
    checks: Mapping[str, tuple[int, int, int | None]] | None = None,
) -> list[Row]:  # fmt: skip
    """Return a row for each rival; a unit of ``found`` counts as so many items and takes at least so long."""
    rates = {name: count / seconds for name, (count, seconds) in found.items()}
    first = next(iter(rates.values()))
    return [
        Row(
            op, case, name, count * items, seconds, items * rates[name], rates[name] / first, least * rates[name],
            *(checks or {}).get(name, (0, 0, None)),
        )
        for name, (count, seconds) in found.items()
    ]  # fmt: skip


def _rank_variants(maps: torch.Tensor, wanted: Sequence[str] | None) -> list[str]:
    """Return the variants to time on such maps: those asked for, or each that is made for the device and the size."""
    if wanted:
        return list(wanted)
    here = this_machine(maps.device.index or 0)
    if maps.device.type == "cpu":
        return list(here.cpu_variants)
    chosen = rank_op.choose_rank(maps.shape, "float32", "cuda", here)
    triton = ["triton"] if here.triton and min(maps.shape[-2:]) <= rank_op.TRITON_SIDE else []
    return list(dict.fromkeys([chosen, *triton, "torch_eigvalsh"]))


def _cupy_rival(maps: torch.Tensor) -> dict[str, Rival]:
    try:
        import cupy
    except ImportError:
        return {}
    view = cupy.from_dlpack(maps)
    return {"cupy_svd": lambda count: cupy.linalg.svd(view[:count], compute_uv=False)}


def _network_case(
    name: str, network: Sequence[tuple[int, int]], images: int, floor: Floor, device: torch.device,
    variants: Sequence[str] | None, rounds: int,
) -> list[Row]:  # fmt: skip
    """Rank every map of a network on so many images: layer by layer, and on a GPU also all layers at once."""
    layers = [torch.randn(images, channels, side, side, device=device).relu() for channels, side in network]
    ours = _rank_variants(layers[0], variants) if device.type == "cpu" else ["auto"]
    rivals: dict[str, Rival] = {
        "torch_batched": lambda count: [torch.linalg.matrix_rank(maps[:count]) for maps in layers],
        **{variant: partial(_rank_layers, layers, variant) for variant in ours},
    }
    if device.type == "cuda" and this_machine(device.index or 0).cuda:
        labels = torch.arange(images, device=device) % 10
        sums = torch.zeros(10, sum(channels for channels, _ in network), dtype=torch.int64, device=device)
        rivals["rank_sums"] = lambda count: _cuda.rank_sums([maps[:count] for maps in layers], labels[:count], sums)
    found = _interleaved(rivals, images, device, rounds)
    least = sum(channels * _least(side, floor) for channels, side in network)  # seconds an image
    return _rows("rank", name, found, least, sum(channels for channels, _ in network))


def _rank_layers(layers: Sequence[torch.Tensor], variant: str, images: int) -> None:
    for maps in layers:
        rank_op.matrix_rank(maps[:images], variant=variant)


def _least(side: int, floor: Floor) -> float:
    """Return the least time for one map: read it, form half of its Gram matrix, factorise that once."""
    return floor.seconds(4 * side * side, fma64=side * side * (side + 1) / 2 + side**3 / 6)


def _ssim_case(
    shape: tuple[int, int, int, int], floor: Floor, device: torch.device, variants: Sequence[str] | None, rounds: int
) -> list[Row]:
    """Compare all pairs of filters of one layer; rivals that are slow take the first filters only."""
    F2, F1 = shape[:2]
    w = random_kernels(shape, device)
    rivals: dict[str, Rival] = {
        "torch_broadcast": lambda filters: broadcast_ssim(w[:filters]),
        "torch_einsum": lambda filters: broadcast_ssim(w[:filters], einsum_ssim_block),
    }
    if (compiled := _compiled(einsum_ssim_block)) is not None:
        rivals["torch_compiled"] = lambda filters: broadcast_ssim(w[:filters], compiled)
    ours = _ssim_variants(shape, device, variants)
    rivals |= {name: partial(_ssim_layers, [w], name) for name in ours}
    found = _interleaved(rivals, F2, device, rounds, fewest=64)
    pairs = {name: (filters * (filters - 1) // 2 * F1, seconds) for name, (filters, seconds) in found.items()}
    few = w[:_CHECKED_FILTERS]
    right = torch.from_numpy(_reference.kernel_ssim(few.cpu().numpy().astype(np.float64)))
    checks = {name: _unlike(ssim_op.kernel_ssim(few, variant=name), right) for name in ours}
    return _rows("ssim", " x ".join(map(str, shape)), pairs, _least_ssim(shape, floor), 1, checks)


def _resnet50_case(floor: Floor, device: torch.device, variants: Sequence[str] | None, rounds: int) -> list[Row]:
    """Compare all pairs of filters of every layer of ResNet-50 that is larger than 1 x 1, as `ckrm` does."""
    shapes = [(F2, F1, K, K) for (F2, F1, K), count in RESNET50 for _ in range(count)]
    layers = [random_kernels(shape, device) for shape in shapes]
    rivals: dict[str, Rival] = {
        name: partial(_ssim_layers, layers, name) for name in _ssim_variants(shapes[0], device, variants)
    }
    found = {name: (1, seconds) for name, (_, seconds) in _interleaved(rivals, 1, device, rounds).items()}
    counts = [F2 * (F2 - 1) // 2 * F1 for F2, F1, *_ in shapes]
    least = sum(count * _least_ssim(shape, floor) for count, shape in zip(counts, shapes, strict=True))
    return _rows("ssim", "ResNet-50", found, least, sum(counts))


def random_kernels(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return normal kernels; every third filter is the one before it, scaled and a little disturbed."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    w[2::3] = 0.9 * w[1::3][: len(w[2::3])] + 0.1 * w[2::3]
    return w.to(device)


def _ssim_layers(layers: Sequence[torch.Tensor], variant: str, filters: int) -> None:
    ssim_op.layer_statistics(layers if len(layers) > 1 else [layers[0][:filters]], variant=variant)


def broadcast_ssim(w: torch.Tensor, block: Callable[..., torch.Tensor] | None = None) -> torch.Tensor:
    """Return Psi [F2, F2], upper triangle, as one writes it in torch: broadcasting in float32, some rows at a time."""
    x = w.flatten(2)
    mean = x.mean(2)
    centred = x - mean[..., None]
    std = centred.square().mean(2).sqrt()
    e = 1e-2 * w.square().mean()
    rows = max(1, (1 << 22) // w.numel())  # 16 MiB a temporary
    psi = w.new_zeros(len(w), len(w))
    for i in range(0, len(w), rows):
        one, others = slice(i, i + rows), slice(i, None)
        psi[one, others] = (block or broadcast_ssim_block)(
            centred[one], mean[one], std[one], centred[others], mean[others], std[others], e
        )
    return psi


def broadcast_ssim_block(
    cx: torch.Tensor, mx: torch.Tensor, sx: torch.Tensor, cy: torch.Tensor, my: torch.Tensor, sy: torch.Tensor,
    e: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Return Psi of some filters [I] with others [J]: [I, J]."""
    return _mean_psi((cx[:, None] * cy).mean(3), mx[:, None], sx[:, None], my, sy, e)


def einsum_ssim_block(
    cx: torch.Tensor, mx: torch.Tensor, sx: torch.Tensor, cy: torch.Tensor, my: torch.Tensor, sy: torch.Tensor,
    e: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Return the same with the products of slices as batched matrix products."""
    sxy = torch.einsum("ick,jck->ijc", cx, cy) / cx.shape[2]
    return _mean_psi(sxy, mx[:, None], sx[:, None], my, sy, e)


def _mean_psi(
    sxy: torch.Tensor, mx: torch.Tensor, sx: torch.Tensor, my: torch.Tensor, sy: torch.Tensor, e: torch.Tensor
) -> torch.Tensor:
    luminance = (2 * (mx * my).abs() + e) / (mx * mx + my * my + e)
    contrast = (2 * sx * sy + e) / (sx * sx + sy * sy + e)
    structure = (sxy.abs() + e) / (sx * sy + e)
    return (luminance**0.1 * contrast * structure).mean(2)


def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor] | None:
    """Return ``function`` compiled by torch, or nothing where it finds no compiler."""
    compiled = torch.compile(function, dynamic=True)
    small = torch.rand(2, 2, 4), torch.rand(2, 2), torch.rand(2, 2)
    try:
        compiled(*small, *small, torch.tensor(0.01))
    except Exception:
        return None
    return compiled


def _least_ssim(shape: Sequence[int], floor: Floor) -> float:
    """Return the least time for one pair of slices: their product and psi; weights are read once and do not count."""
    return floor.seconds(0, fma32=shape[2] * shape[3] + SSIM_ARITHMETIC)


def _ssim_variants(shape: Sequence[int], device: torch.device, wanted: Sequence[str] | None) -> list[str]:
    here = this_machine(device.index or 0)
    if wanted:
        return list(wanted)
    return list(here.cpu_variants) if device.type == "cpu" else [ssim_op.choose_ssim(shape, "float32", "cuda", here)]


def _unlike(psi: torch.Tensor, right: torch.Tensor) -> tuple[int, int, None]:
    """Return how many similarities were checked, and how many are further than 1e-6 from the reference."""
    return psi.numel(), int(((psi.cpu().double() - right).abs() > 1e-6).sum()), None


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.machine()
