"""What CRank and CKRM find that the other does not, and whether joining their plans is worth anything.

    python examples/crank_and_ckrm.py                                    # a small network on digits, in seconds
    python examples/crank_and_ckrm.py --widths 32 32 64 64 128 128 --epochs 12 --tuning 6 --runs 3    # minutes
    PYPRUNE_DATA=... python examples/crank_and_ckrm.py --network resnet20 --steps 100 --runs 3
    PYPRUNE_DATA=... python examples/crank_and_ckrm.py --network resnet56 --runs 0    # the plans only

``PYPRUNE_DATA`` is a folder with CIFAR-10 as JPEG and pretrained ResNets. First the plans: by layer, how many filters
each criterion removes, how many both do, how many blind draws would share, and how their scores correlate. Then the
networks: top-1 on the test images before and after fine-tuning, at equal numbers of filters. On digits also a network
that is narrow from the start, pruned by CRank, beside the wide one pruned by CRank to the same parameters. Everything
goes into runs/crank_and_ckrm as JSON and SVG; what is there already is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats
from torch.utils.data import Subset

import pyprune as pp
from pyprune import comparing, drawing, files, graph
from pyprune.data import digits, loader, open_data

if TYPE_CHECKING:
    from torch import nn

FOLDER = Path("runs/crank_and_ckrm")
HALF = 0.5
WEIGHTS = {
    "resnet20": "cifar10_resnet20-12fca82f.safetensors",
    "resnet56": "cifar10_resnet56-4bfd9763.safetensors",
}


def main() -> None:
    """Compare the plans, then the networks."""
    options = arguments()
    splits = open_splits(options.network)
    # Every fourth test image of CIFAR-10: 2,500 are right to about a point, in a quarter of the time.
    test = splits.test if options.network == "digits" else Subset(splits.test, range(0, len(splits.test), 4))
    loaders = {
        "train": loader(splits.train, shuffle=True, workers=0), "val": loader(splits.val, workers=0),
        "test": loader(test, workers=0), "ranking": loader(splits.train, workers=0),
    }  # fmt: skip
    name = options.network if options.network != "digits" else f"digits_{'_'.join(map(str, options.widths))}"
    results = Results(FOLDER / f"{name}.json", vars(options))
    model = trained(options, loaders, options.widths, seed=0)
    plans = make_plans(model, loaders)
    compare_plans(name, plans, results)
    for seed in range(options.runs):
        if seed and options.network == "digits":  # every run has a network of its own
            model = trained(options, loaders, options.widths, seed)
            plans = make_plans(model, loaders)
        for label, plan in at_equal_counts(model, plans, seed).items():
            results.once("networks", f"{label}, {seed}", lambda: tried(model, plan, loaders, options, seed))  # noqa: B023
    show_networks(results, "networks")
    if options.network == "digits":
        for seed in range(options.runs):
            results.once("widths", str(seed), lambda: narrow_and_wide(options, loaders, seed))  # noqa: B023
        show_widths(results)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="What CRank and CKRM find that the other does not.")
    parser.add_argument("--network", choices=["digits", *WEIGHTS], default="digits")
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 8, 16, 16], help="of the network on digits")
    parser.add_argument(
        "--narrow", type=int, nargs="+", help="widths of the narrow one, as pp.optimize_widths finds them"
    )
    parser.add_argument("--epochs", type=int, default=2, help="of training on digits")
    parser.add_argument("--tuning", type=int, default=1, help="epochs of fine-tuning")
    parser.add_argument("--steps", type=int, help="steps of fine-tuning instead")
    parser.add_argument("--runs", type=int, default=1, help="fine-tunings of each plan; 0 compares the plans only")
    return parser.parse_args()


class Results:
    """What was measured, in a file that grows: nothing in it is measured twice."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        settings = {key: value for key, value in settings.items() if key != "runs"}
        found = json.loads(path.read_text()) if path.exists() else {}
        self.content = found if found.get("settings") == settings else {"settings": settings}

    def once(self, part: str, key: str, measure: Any) -> Any:
        """Return what the file has under ``part`` and ``key``, measuring it first if need be."""
        known = self.content.setdefault(part, {})
        if key not in known:
            known[key] = measure()
            self.save()
        return known[key]

    def save(self) -> None:
        """Write what is known so far."""
        files.make_folder("crank_and_ckrm", self.path.parent)
        files.write_json(self.path, self.content)


def open_splits(network: str) -> pp.data.Splits:
    """Open digits, or CIFAR-10 as JPEG under PYPRUNE_DATA."""
    if network == "digits":
        return digits()
    folder = os.environ["PYPRUNE_DATA"]
    parts = ",".join(f"{folder}/cifar10_{part}_jpegbytes.npz" for part in ("train", "test"))
    return open_data(f"npz:{parts}", normalise="imagenet")


def trained(options: argparse.Namespace, loaders: dict[str, Any], widths: list[int], seed: int) -> nn.Module:
    """Return a network trained on digits, or a pretrained one."""
    if options.network != "digits":
        model: nn.Module = getattr(pp.models, options.network)()
        pp.load_checkpoint(model, Path(os.environ["PYPRUNE_DATA"]) / WEIGHTS[options.network])
        return model.eval()
    torch.manual_seed(seed)
    model = pp.models.vgg_digits(widths=tuple(widths))
    pp.finetune(model, loaders["train"], loaders["val"], epochs=options.epochs, lr=0.05, seed=seed, progress=False)
    return model.eval()


def make_plans(model: nn.Module, loaders: dict[str, Any]) -> dict[str, pp.Plan]:
    """Return plans at the criteria's own rates, by CKRM and L1 at CRank's, and by all three at half."""
    ranks = pp.rank_filters(model, loaders["ranking"], progress=False)
    crank = pp.select(model, "crank", ranks=ranks, progress=False)
    half = pp.select(model, "crank", ranks=ranks, rates=HALF, progress=False)
    return {
        "crank, own": crank, "ckrm, own": pp.select(model, "ckrm"), "crank, half": half,
        **{f"{one}, as crank": pp.select(model, one, rates=crank) for one in ("ckrm", "l1")},
        **{f"{one}, half": pp.select(model, one, rates=half) for one in ("ckrm", "l1")},
    }  # fmt: skip


def compare_plans(name: str, plans: dict[str, pp.Plan], results: Results) -> None:
    """Print and draw what two plans both remove, and how their scores correlate."""
    pairs = [
        ("crank, own", "ckrm, own"), ("crank, own", "ckrm, as crank"), ("crank, half", "ckrm, half"),
        ("crank, half", "l1, half"), ("ckrm, half", "l1, half"),
    ]  # fmt: skip
    for first, second in pairs:
        found = comparing.removed_by_both(plans[first], plans[second])
        rho = {layer: correlation(plans, first, second, layer) for layer in found}
        whole = comparing.pooled(found.values())
        print(f"\nRemoved by {first} ({whole.first}) and {second} ({whole.second}) of {whole.filters}: {told(whole)}")
        print(f"Spearman of the scores: {told_correlations(rho)}")
        for kind in ("conv1", "conv2"):  # of residual blocks: CRank reads the second behind the sum
            if part := [one for layer, one in found.items() if layer.endswith(f".{kind}")]:
                print(f"  {kind} of the blocks: {told(comparing.pooled(part))}")
        if (first, second) == ("crank, half", "ckrm, half"):
            for layer, one in found.items():
                print(f"  {layer:16} {one.filters:4} {told(one)}, Spearman {rho[layer]:+.2f}")
            results.save()
            files.write_bytes(FOLDER / f"{name}.svg", drawing.encoded(overlap_figure(found)))
        results.content.setdefault("plans", {})[f"{first}; {second}"] = {
            "all": asdict(whole), "layers": {layer: asdict(one) for layer, one in found.items()}, "spearman": rho,
        }  # fmt: skip
    results.save()


def told(one: comparing.Overlap) -> str:
    """Say what two plans both remove, beside chance."""
    return f"{one.common} by both, {one.chance:.1f} by chance (p {one.p:.2g} of more, {one.p_fewer:.2g} of fewer)"


def correlation(plans: dict[str, pp.Plan], first: str, second: str, layer: str) -> float:
    """Return Spearman's coefficient of two criteria's scores; NaN where one does not vary."""
    scores = [[one.score for one in plans[f"{label.split(',')[0]}, half"].why[layer]] for label in (first, second)]
    if any(np.ptp(one) == 0 for one in scores):
        return float("nan")
    return float(stats.spearmanr(*scores).statistic)


def told_correlations(rho: dict[str, float]) -> str:
    """Sum up the coefficients of all layers."""
    known = np.array([one for one in rho.values() if np.isfinite(one)])
    above = f"above 0 in {(known > 0).sum()} of {len(known)} layers"
    return f"median {np.median(known):+.2f}, {known.min():+.2f} to {known.max():+.2f}, {above}"


def overlap_figure(found: dict[str, comparing.Overlap]) -> Any:
    """Draw, along depth, the share of one plan's removals that the other shares, and 95 % of blind draws."""
    figure, axes = drawing.new_axes(6.4, 2.8)
    layers = [(name, one) for name, one in found.items() if min(one.first, one.second)]
    x = np.arange(len(layers))
    sizes = np.array([min(one.first, one.second) for _, one in layers])
    draws = [stats.hypergeom(one.filters, one.first, one.second) for _, one in layers]
    low, high = ([one.ppf(q) for one in draws] / sizes for q in (0.025, 0.975))
    axes.fill_between(x, low, high, color=drawing.LIGHT, step="mid", label="95 % of blind draws")
    axes.plot(
        x, [one.chance for _, one in layers] / sizes, color=drawing.GREY, linewidth=0.8, label="chance, on average"
    )
    axes.plot(
        x, [one.common for _, one in layers] / sizes, "o", color=drawing.ACCENT, markersize=4, label="CRank and CKRM"
    )
    step = max(1, len(layers) // 12)
    axes.set_xticks(x[::step], [name for name, _ in layers][::step], rotation=45, ha="right", fontsize=7)
    axes.set(ylabel="removed by both, share", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper left")
    return figure


def at_equal_counts(model: nn.Module, plans: dict[str, pp.Plan], seed: int) -> dict[str, pp.Plan]:
    """Return the plans at half, joined, and each criterion, and chance, with as many filters as what was joined."""
    halves = [plans["crank, half"], plans["ckrm, half"]]
    union, common = pp.combine(halves), pp.combine(halves, "intersection")
    ranks = plans["crank, half"]
    found = {"nothing removed": everything(model)}
    for label, joined in (("half", halves[0]), ("union", union), ("intersection", common)):
        found |= {label: joined} if label != "half" else {}
        found |= {f"crank at {label}": best(ranks, joined), f"ckrm at {label}": pp.select(model, "ckrm", rates=joined)}
        found[f"random at {label}"] = pp.select(model, "random", rates=joined, seed=seed)
    return found


def everything(model: nn.Module) -> pp.Plan:
    """Return the plan that removes nothing."""
    counts = {name: layer.out_channels for name, layer in graph.convolutions(model).items()}
    return pp.Plan({name: range(count) for name, count in counts.items()}, filters=counts)


def best(scored: pp.Plan, counts: pp.Plan) -> pp.Plan:
    """Keep as many filters as ``counts`` does, by the scores in ``scored``."""
    keep = {}
    for name, kept in counts.keep.items():
        scores = np.array([one.score for one in scored.why[name]])
        keep[name] = np.argsort(-scores, kind="stable")[: len(kept)]
    return pp.Plan(keep, filters=counts.filters, method=scored.method)


def tried(
    model: nn.Module, plan: pp.Plan, loaders: dict[str, Any], options: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """Compact, fine-tune, and measure on the test images before and after."""
    slim = pp.compact(model, plan, next(iter(loaders["test"]))[0][:1], latency=False)
    before = pp.evaluate(slim.model, loaders["test"], progress=False).top1
    few = None if options.steps else loaders["val"]  # validation would take longer than so few steps
    pp.finetune(
        slim.model, loaders["train"], few, epochs=options.tuning, steps=options.steps, seed=seed, progress=False
    )
    return {
        "filters": sum(map(len, plan.keep.values())), "parameters": slim.after.parameters, "before": before,
        "after": pp.evaluate(slim.model, loaders["test"], progress=False).top1,
    }  # fmt: skip


def show_networks(results: Results, part: str) -> None:
    """Print one row a plan: means over the runs."""
    runs = defaultdict(list)
    for key, one in results.content.get(part, {}).items():
        runs[key.rpartition(", ")[0]].append(one)
    if runs:
        print(f"\n{'':26} {'filters':>8} {'parameters':>10} {'untuned':>8} {'tuned':>8} {'+-':>6} {'runs':>5}")
    for label, found in runs.items():
        mean = {key: np.mean([one[key] for one in found]) for key in found[0]}
        spread = comparing.deviation(np.array([one["after"] for one in found])) or 0.0
        print(
            f"{label:26} {mean['filters']:8.0f} {mean['parameters']:10,.0f} {mean['before']:8.2%} {mean['after']:8.2%} "
            f"{spread:6.2%} {len(found):5}"
        )


def narrow_and_wide(options: argparse.Namespace, loaders: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train a narrow and a wide network; prune the narrow one by CRank, the wide one to the same parameters."""
    example = next(iter(loaders["test"]))[0][:1]
    wide = trained(options, loaders, options.widths, seed)
    groups = pp.select(wide, "ckrm").keep.values()  # lambda above 0 narrows a layer to its groups; at 0, half is tried
    widths = options.narrow or [min(len(one), W // 2) for one, W in zip(groups, options.widths, strict=True)]
    narrow = trained(options, loaders, widths, seed)
    found: dict[str, Any] = {"widths": widths}
    for label, model in (("narrow", narrow), ("wide", wide)):
        found[label] = tried(model, everything(model), loaders, options, seed)
        ranks = pp.rank_filters(model, loaders["ranking"], progress=False)
        if label == "narrow":
            plan = pp.select(model, "crank", ranks=ranks, ease=0.5, progress=False)
            found["narrow, then CRank"] = tried(model, plan, loaders, options, seed)
        else:
            for other in ("narrow", "narrow, then CRank"):
                budget = {"parameters": found[other]["parameters"]}
                plan = pp.select(model, "crank", ranks=ranks, budget=budget, example_inputs=example, progress=False)
                found[f"wide, CRank to {other}"] = tried(model, plan, loaders, options, seed)
    return found


def show_widths(results: Results) -> None:
    """Print the narrow and the wide networks: means over the runs."""
    flat = {
        f"{label}, {seed}": one
        for seed, found in results.content.get("widths", {}).items()
        for label, one in found.items()
        if label != "widths"
    }
    show_networks(type("Flat", (), {"content": {"flat": flat}})(), "flat")


if __name__ == "__main__":
    main()
