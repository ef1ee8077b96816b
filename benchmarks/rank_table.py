"""Print maps per second of every rank variant and of batched torch: medians of interleaved runs.

python benchmarks/rank_table.py [--threads 1] [--rounds 7]
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from pyprune import _core, machine, matrix_rank

sys.path.insert(0, str(Path(__file__).parent))
from test_bench_rank import rank_with, relu_maps

VGG16 = [(64, 32)] * 2 + [(128, 16)] * 2 + [(256, 8)] * 3 + [(512, 4)] * 3 + [(512, 2)] * 3  # channels, side
SIDES = {2: 400_000, 4: 200_000, 8: 100_000, 16: 40_000, 32: 10_000, 56: 2000, 64: 1600, 112: 320, 224: 64}


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def clock():
    """Return seconds: processor time for one thread, which other programs disturb less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def rates(side, count, rivals, rounds):
    """Median maps per second of each rival; one round runs them all, so that noise hits them alike."""
    maps = relu_maps(count, side)
    few = maps[: max(8, count // 40)]
    want = torch.linalg.matrix_rank(maps.double(), rtol=side * 2.0**-23)
    seconds = {rival: [] for rival in rivals}
    for _ in range(rounds):
        for rival in rivals:
            given = maps if rival.startswith("cpu") else few
            began = clock()
            ranks = rank_with(rival, given)
            seconds[rival].append((clock() - began) / len(given))
            if not torch.equal(ranks.long(), want[: len(given)]):
                raise SystemExit(f"{rival} disagrees with the float64 SVD at side {side}")
    return {rival: 1 / statistics.median(times) for rival, times in seconds.items()}


def vgg16_seconds(rounds):
    """Median time for every map of VGG-16 on 500 images of 32 x 32, and the number of maps."""
    layers = [torch.randn(500, channels, side, side).relu() for channels, side in VGG16]
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        began = clock()
        for maps in layers:
            matrix_rank(maps)
        times.append(clock() - began)
    return statistics.median(times[1:]), 500 * sum(channels for channels, _ in VGG16)


def bandwidth():
    """Bytes per second that torch reads from memory: the best of several sums over 256 MiB."""
    block = torch.ones(1 << 26)
    return 4 * block.numel() / least(block.sum)


def least(call, rounds=15):
    """Least time of a call."""
    times = []
    for _ in range(rounds):
        began = clock()
        call()
        times.append(clock() - began)
    return min(times)


def vgg16_floor():
    """Least time for all maps of VGG-16: each is read once and has one Gram matrix and one factorisation."""
    variant = machine.this_machine().cpu_variants[-1]
    bytes_a_second = bandwidth()
    products_a_second = max(_core.multiply_adds(variant, torch.get_num_threads()) for _ in range(300))
    seconds = sum(
        500 * channels * max(4 * side**2 / bytes_a_second, (side**3 / 2 + side**3 / 6) / products_a_second)
        for channels, side in VGG16
    )
    return seconds, bytes_a_second, products_a_second


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rivals = ("torch_batched", *machine.this_machine().cpu_variants)
    print(f"{cpu_name()}, {options.threads} thread(s), torch {torch.__version__}, numpy {np.__version__}")
    print("| side |", " | ".join(rivals), "| fastest / torch |")
    print("| ---: |", " | ".join("---:" for _ in rivals), "| ---: |")
    for side, count in SIDES.items():
        found = rates(side, count, rivals, options.rounds)
        ratio = found[rivals[-1]] / found["torch_batched"]
        print(f"| {side} |", " | ".join(f"{found[rival]:,.0f}" for rival in rivals), f"| {ratio:.0f} |", flush=True)
    seconds, count = vgg16_seconds(options.rounds)
    floor, bytes_a_second, products_a_second = vgg16_floor()
    print(f"memory {bytes_a_second / 1e9:.1f} GB/s, float64 multiply-adds {products_a_second / 1e9:.1f} G/s")
    print(
        f"VGG-16, 500 images, {count:,} maps: {seconds * 1e3:.0f} ms;",
        f"floor {floor * 1e3:.0f} ms; ratio {seconds / floor:.1f}",
    )


if __name__ == "__main__":
    main()
