"""Time whole networks beside the MACs that were removed from them: smaller is not always faster.

    python benchmarks/latency_table.py [--threads N] [--batches 1 16] [--rounds N] [--only resnet50]

prints a table: for each network, the original and its slim versions for scatter, intersect and round_to=8, from one
random plan that keeps half of every layer; beside them plans that remove half of the MACs, with layers of one width
keeping different filters (apart) or the same (agreeing), and the latter in multiples of 8, 16 and 32. The networks of
one batch size take turns, and the order turns round every time; medians are printed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

import pyprune as pp
from pyprune.graph import convolutions
from pyprune.measure import device_name
from pyprune.types import Plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from zoo import ENTRIES

NETWORKS = {
    "ResNet-56": (pp.models.resnet56, (3, 32, 32)),
    "ResNet-50": (pp.models.resnet50, (3, 224, 224)),
    "VGG-16": (pp.models.vgg16_bn, (3, 32, 32)),
    "MobileNet v2": (ENTRIES["MobileNet v2"].whole, (3, 224, 224)),
}
WAYS = {
    "scatter": {"residual": "scatter"},
    "intersect": {"residual": "intersect"},
    "scatter, round_to=8": {"residual": "scatter", "round_to": 8},
    "intersect, round_to=8": {"residual": "intersect", "round_to": 8},
}


def plan_of(model: torch.nn.Module, share: float, agree: bool) -> Plan:
    """Return a random plan that keeps ``share`` of every layer.

    With ``agree`` layers of one width keep the same filters, which is where coupling costs least: about what criteria
    reach that score coupled layers jointly.
    """
    rng = np.random.default_rng(0)
    layers = convolutions(model)
    orders = {width: rng.permutation(width) for width in sorted({one.out_channels for one in layers.values()})}
    keep = {}
    for name, layer in layers.items():
        order = orders[layer.out_channels] if agree else rng.permutation(layer.out_channels)
        keep[name] = np.sort(order[: max(1, round(layer.out_channels * share))])
    return Plan(keep)


def half_the_macs(model: torch.nn.Module, x: torch.Tensor, agree: bool, round_to: int = 1) -> pp.Compacted:
    """Return the slim network of the largest shares that removes at least half of the MACs, by bisection."""

    def slimmed(share: float) -> pp.Compacted:
        plan = plan_of(model, share, agree)
        return pp.compact(model, plan, x, verify=False, latency=False, round_to=round_to)

    low, high = 0.3, 1.0
    for _ in range(6):
        share = (low + high) / 2
        slim = slimmed(share)
        low, high = (low, share) if slim.after.macs > 0.5 * slim.before.macs else (share, high)
    return slimmed(low)


def medians(models: dict[str, torch.nn.Module], x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Return each network's median milliseconds, the networks taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    order = list(models)
    with torch.no_grad():
        for name in order:
            models[name](x)
        for _ in range(rounds):
            for name in order:
                start = time.perf_counter()
                models[name](x)
                taken[name].append((time.perf_counter() - start) * 1e3)
            order.reverse()
    return {name: statistics.median(times) for name, times in taken.items()}


def slimmed(model: torch.nn.Module, x: torch.Tensor) -> dict[str, pp.Compacted]:
    """Return the slim versions of ``model``, by name."""
    half = plan_of(model, 0.5, agree=False)
    found = {
        f"half the filters, {way}": pp.compact(model, half, x, verify=False, latency=False, **options)
        for way, options in WAYS.items()
    }
    found["half the MACs, apart"] = half_the_macs(model, x, agree=False)
    for multiple in (1, 8, 16, 32):
        rounded = f", round_to={multiple}" if multiple > 1 else ""
        found[f"half the MACs, agreeing{rounded}"] = half_the_macs(model, x, agree=True, round_to=multiple)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="part of a network's name")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{device_name(torch.device('cpu'))}, torch {torch.__version__}, Python {platform.python_version()}\n")
    batches = "".join(f" batch {count}, ms | times faster |" for count in options.batches)
    print(f"| network | MACs removed |{batches}\n|---|---:|{'---:|---:|' * len(options.batches)}")
    for title, (build, shape) in NETWORKS.items():
        if options.only.lower() not in title.lower().replace("-", ""):
            continue
        torch.manual_seed(0)
        model = build().eval()
        x = torch.randn(1, *shape)
        slims = slimmed(model, x)
        models = {"original": model, **{name: slim.model.eval() for name, slim in slims.items()}}
        times = [medians(models, x.repeat(count, 1, 1, 1), options.rounds) for count in options.batches]
        for name in models:
            removed = 0.0 if name == "original" else 1 - slims[name].after.macs / slims[name].before.macs
            cells = "".join(f" {found[name]:.3g} | {found['original'] / found[name]:.2f} |" for found in times)
            print(f"| {title}, {name} | {removed:.0%} |{cells}", flush=True)


if __name__ == "__main__":
    main()
