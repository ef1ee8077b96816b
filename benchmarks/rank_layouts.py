"""Print what one map costs in each layout, and from how many maps on a block of lanes is faster.

    OMP_NUM_THREADS=1 python benchmarks/rank_layouts.py

Processor time of one thread, the least of several runs. The last column is what RankVariant's inside_slope and
inside_offset follow: below so many maps, one at a time is faster.
"""

import sys
import time
from pathlib import Path

from pyprune import _core, machine

sys.path.insert(0, str(Path(__file__).parent))
from test_bench_rank import relu_maps

SIDES = (4, 8, 16, 24, 32, 48, 64, 96, 112, 160, 224, 384)
LANES = {"cpu_baseline": 2, "cpu_avx2": 4, "cpu_avx512": 8}


def seconds(maps, variant, layout, rounds=7):
    """Return the least processor time of a map."""
    least = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        _core.rank(maps, maps.shape[2] * 2.0**-23, variant, 1, layout=layout)
        least = min(least, time.process_time() - began)
    return least / maps.shape[1]


def main():
    print("| side | variant | us in lanes | us alone | maps that pay for a block | chosen for a full block |")
    print("| ---: | --- | ---: | ---: | ---: | --- |")
    for side in SIDES:
        lanes_in_a_row = max(8, 20_000_000 // side**3 // 8 * 8)
        maps = relu_maps(min(lanes_in_a_row, 40_000), side).numpy()[None]
        for variant in machine.this_machine().cpu_variants:
            block, alone = (seconds(maps, variant, layout) for layout in ("lanes", "inside"))
            lanes = LANES[variant]
            pays = f"{lanes * block / alone:.1f} of {lanes}"
            chosen = _core.rank_layout(variant, side, side, lanes)
            print(f"| {side} | {variant} | {block * 1e6:.3g} | {alone * 1e6:.3g} | {pays} | {chosen} |", flush=True)


if __name__ == "__main__":
    main()
