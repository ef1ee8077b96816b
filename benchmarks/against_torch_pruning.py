"""Put Torch-Pruning and pyprune side by side on the zoo's architectures and on one small network a trap.

    pip install pyprune[compare]
    python benchmarks/against_torch_pruning.py [--rate 0.5]

Both remove the same filters by index and are compared, in float64 with random norm statistics, with the masked network:
exact (difference at most 1e-10), kept (nothing was removed, and pyprune says why), silently wrong, or crashed. Plans of
architectures come from Torch-Pruning's own groups: coupled layers lose the same filters.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from zoo import ENTRIES, checking
from zoo import torch_pruning as rival


def cell(found: rival.Outcome) -> str:
    """Return one outcome as the cells of a table."""
    gap = f" ({found.difference:.1g})" if found.word == "silently wrong" and found.difference < 1e9 else ""
    return f"{found.word}{gap} | {'' if found.word == 'crashed' else f'{found.parameters:,}'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=0.5, help="share of every group that architectures lose")
    options = parser.parse_args()
    if not rival.INSTALLED:
        raise SystemExit("against_torch_pruning: Torch-Pruning is missing; pip install pyprune[compare].")
    warnings.filterwarnings("ignore")
    print("| network | parameters | Torch-Pruning | left | pyprune | left |\n|---|---:|---|---:|---|---:|")
    totals = Counter(), Counter()
    for name, entry in ENTRIES.items():
        torch.manual_seed(0)
        model, x = checking.randomised(entry.build()), torch.randn(entry.shape, dtype=torch.float64)
        report(name, model, rival.agreeing_plan(model, x, options.rate, 0, entry.heads), x, totals)
    for name, found in rival.TRAPS.items():
        report(f"trap: {name}", found.model, found.plan, found.x, totals)
    for title, words in zip(("Torch-Pruning", "pyprune"), totals, strict=True):
        print(f"\n{title}: " + ", ".join(f"{count} {word}" for word, count in words.most_common()))


def report(name, model, plan, x, totals) -> None:
    """Print the row of one network."""
    found = rival.compared(model, plan, x)
    for words, one in zip(totals, found, strict=True):
        words[one.word] += 1
    whole = sum(one.numel() for one in model.parameters())
    print(f"| {name} | {whole:,} | {cell(found[0])} | {cell(found[1])} |", flush=True)


if __name__ == "__main__":
    main()
