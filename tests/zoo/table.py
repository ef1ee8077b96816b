"""Print how much of random plans leaves each network of the zoo: ``python tests/zoo/table.py [--whole]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pyprune as pp
from zoo import ENTRIES, checking

RATES = (0.3, 0.6)


def counted(entry, *, whole=False):
    """Return the :class:`zoo.checking.Count` of one network over the zoo's plans."""
    torch.manual_seed(0)
    model = checking.randomised((entry.whole if whole else entry.build)())
    x = torch.randn(entry.whole_shape if whole else entry.shape, dtype=torch.float64)
    total = checking.Count()
    for seed, rate in enumerate(RATES):
        plan = checking.random_plan(model, seed, rate, run=entry.run, heads=entry.heads)
        slim = pp.compact(model, plan, x, latency=False, verify=not whole)
        total.add(checking.count(model, plan, x, slim))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--whole", action="store_true", help="networks at full size")
    parser.add_argument("names", nargs="*", help="only these")
    asked = parser.parse_args()
    print("| network | parameters | planned | removed of those | | reasons of the filters that stay |")
    print("|---|---:|---:|---:|---:|---|")
    for name, entry in ENTRIES.items():
        if asked.names and name not in asked.names:
            continue
        try:
            found = counted(entry, whole=asked.whole)
        except (RuntimeError, ValueError) as error:
            print(f"| {name} | | | | | {str(error).splitlines()[0]} |", flush=True)
            continue
        why = "; ".join(f"{count} {reason}" for reason, count in found.refusals.most_common(3)) or "none"
        numbers = f"{found.parameters // len(RATES):,} | {found.planned:,} | {found.removed:,} | {found.share:.0f} %"
        print(f"| {name} | {numbers} | {why} |", flush=True)


if __name__ == "__main__":
    main()
