"""Give Torch-Pruning and pyprune the same indices, and print what each made of them.

    python benchmarks/against_torch_pruning.py [--whole] [--rounds N] [NAME ...]

takes the traps and the networks of the tests' zoo (tests/zoo/traps.py, tests/zoo/entries.py); ``--whole`` takes the
networks at full size instead, under the agreeing plan only. Each line has Torch-Pruning's verdict, the parameters that
it left, the filters that went beyond the plan and the time it took, then pyprune's on the same plan, with the share of
the planned parameters that left, and last the parameters that pyprune leaves when it is given all the filters that
Torch-Pruning removed. tests/zoo/beside.py says what the verdicts mean. Both start from a copy in memory and run on one
thread; pyprune's time is given without and with its proof. The two take turns, and medians are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import pyprune as pp
from pyprune.measure import device_name
from zoo import ENTRIES, beside, checking
from zoo.traps import TRAPS


def whole_cases(names):
    """Yield the networks of the zoo at full size, as ``beside.cases`` does."""
    for name, entry in ENTRIES.items():
        if entry.whole and (names is None or name in names):
            torch.manual_seed(0)
            model = checking.randomised(entry.whole())
            x = torch.randn(entry.whole_shape, dtype=torch.float64)
            yield name, "agreeing", model, beside.zoo_plans(model, entry)["agreeing"], x, entry.heads


def proved(model, plan, x):
    """Return the seconds that compact takes with its proof, or NaN if it refuses."""
    began = time.perf_counter()
    try:
        pp.compact(model, plan, x, latency=False)
    except ValueError:
        return float("nan")
    return time.perf_counter() - began


def compared(model, plan, x, heads, rounds):
    """Return both results, their seconds medians, pyprune's on what Torch-Pruning removed, and seconds with proof."""
    runs = [
        (beside.torch_pruning(model, plan, x, heads), beside.pyprune(model, plan, x, count=i == 0),
         proved(model, plan, x))
        for i in range(rounds)
    ]  # fmt: skip
    theirs, ours, seconds = zip(*runs, strict=True)
    first = [
        dataclasses.replace(one[0], seconds=statistics.median(each.seconds for each in one)) for one in (theirs, ours)
    ]
    same = None
    if first[0].verdict == beside.EXACT:
        same = beside.pyprune(model, beside.plan_of(model, first[0].gone), x)
    return *first, same, statistics.median(seconds)


def line(name, kind, model, plan, theirs, ours, same, proof):
    """Return one row of the table."""
    left = [f"{one.parameters:,}" if one.parameters else "" for one in (theirs, ours)]
    beyond = beside.beyond(model, plan, theirs.gone) if theirs.model is not None else ""
    time_of = [f"{1000 * one.seconds:.0f}" if one.model is not None else "" for one in (theirs, ours)]
    verdict = f"{theirs.verdict} ({theirs.note})" if theirs.note else theirs.verdict
    again = f"{same.verdict} {same.parameters:,}" if same else ""
    return (
        f"| {name} | {kind} | {verdict} | {left[0]} | {beyond} | {time_of[0]} | {ours.verdict} | {left[1]} "
        f"| {ours.note} | {time_of[1]} | {1000 * proof:.0f} | {again} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="networks at full size")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, of which medians are printed")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model, plan, x, heads = beside.trap_case(TRAPS["chain with norms"])
    compared(model, plan, x, heads, 1)  # warms up both
    print(f"{device_name(torch.device('cpu'))}, one thread, Python {platform.python_version()}, torch "
          f"{torch.__version__}, Torch-Pruning {beside.version()}, pyprune {pp.__version__}, float64\n")  # fmt: skip
    print("| network | plan | Torch-Pruning | parameters | beyond the plan | ms | pyprune | parameters "
          "| removed of the planned | ms | ms with proof | pyprune on what Torch-Pruning removed |")  # fmt: skip
    print("|---|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|")
    verdicts, no_larger, planned = Counter(), 0, Counter()
    for name, kind, model, plan, x, heads in (whole_cases if asked.whole else beside.cases)(asked.names or None):
        theirs, ours, same, proof = compared(model, plan, x, heads, asked.rounds)
        print(line(name, kind, model, plan, theirs, ours, same, proof), flush=True)
        group = "traps" if name in TRAPS else "zoo"
        verdicts[group, "Torch-Pruning", theirs.verdict] += 1
        verdicts[group, "pyprune", ours.verdict] += 1
        no_larger += same is not None and same.verdict == beside.EXACT and same.parameters <= theirs.parameters
        if same is not None and beside.as_planned(model, plan, theirs.gone):
            planned[ours.verdict == beside.EXACT and ours.parameters <= theirs.parameters] += 1
    print()
    for (group, tool, verdict), count in sorted(verdicts.items()):
        print(f"{group}: {tool} {verdict} on {count}")
    print(f"on what Torch-Pruning removed exactly: pyprune exact and no larger on {no_larger}")
    print(f"where that is just the plan: no larger on {planned[True]}, larger on {planned[False]}")


if __name__ == "__main__":
    main()
