"""Measure how close to the threshold a singular value may come before a rank is wrong.

    python benchmarks/rank_band.py

Dense float64 maps are made with singular values at t (1 +- f / (4 n^2)): at f = 1 they sit on the edge of the
promised band.
"""

import sys
from pathlib import Path

import numpy as np

from pyprune import machine
from pyprune.ops.rank import _run

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "ops"))
from rank_families import near_threshold

SIDES = (2, 4, 8, 16, 32, 64, 112)
FRACTIONS = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02)


def main():
    rng = np.random.default_rng(0)
    variants = machine.this_machine().cpu_variants
    print("| f |", " | ".join(variants), "| maps |")
    print("| ---: |", " | ".join("---:" for _ in variants), "| ---: |")
    for fraction in FRACTIONS:
        wrong = dict.fromkeys(variants, 0)
        total = 0
        for side in SIDES:
            maps, ranks = near_threshold(rng, 1000 if side < 64 else 200, side, side, fraction, fraction)
            total += len(maps)
            for variant in variants:
                wrong[variant] += int((_run(maps, variant=variant)[0] != ranks).sum())
        print(
            f"| {fraction} |", " | ".join(f"{wrong[variant]:,}" for variant in variants), f"| {total:,} |", flush=True
        )


if __name__ == "__main__":
    main()
