"""The command line. Every command is a thin shell around one public function; heavy imports wait until it runs."""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from pyprune.data import Splits
    from pyprune.types import ClassRanks, Compacted, Plan, PruneResult

app = typer.Typer(
    help="Find the redundant filters of a convolutional network, remove them, and get back a slim one that "
    "computes exactly the same.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Arch = Annotated[
    str | None,
    typer.Option(
        help="Architecture: a name from pyprune.models, or the search.json of `pyprune widths` for its result."
    ),
]
Model = Annotated[str | None, typer.Option(help="A network of your own instead: package.module:factory.")]
Weights = Annotated[Path, typer.Option(help="Trained weights: safetensors, or a torch file read without unpickling.")]
Data = Annotated[str, typer.Option(help="Data: digits, cifar10:DIR, cifar100:DIR, folder:DIR or npz:FILE.")]
Size = Annotated[int | None, typer.Option(help="Height and width of images after resizing.", min=1)]
Normalise = Annotated[
    str | None, typer.Option(help="Mean and deviation: imagenet, cifar, data, or numbers as 0.5,0.5,0.5/0.2,0.2,0.2.")
]
Channels = Annotated[int | None, typer.Option(help="1 for grey images, 3 for colour; a network of --arch takes them.")]
Images = Annotated[
    int | None, typer.Option(help="Draw so many images in all; parts and classes keep their shares.", min=1)
]
Augment = Annotated[
    bool | None, typer.Option("--augment/--no-augment", help="Augment training images; by default where that is usual.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling, splitting and training.", min=0)]
Device = Annotated[str | None, typer.Option(help="Device to compute on, such as cpu or cuda:0.")]
ImagesPerClass = Annotated[int, typer.Option(help="Images a class that are ranked.", min=1)]
Taps = Annotated[str, typer.Option(help="Where maps are read: activation, norm or hrank.")]
Method = Annotated[
    str,
    typer.Option(
        help="Criterion: crank, hrank, l1, l2, fpgm, cup, tvs, ckrm, bn_scale, taylor, random, or a plugin's."
    ),
]
Rates = Annotated[
    str | None,
    typer.Option(help='Shares that go: one in [0, 1), a list like "[0.95]+[0.5]*6", or a plan file to take them from.'),
]
Budget = Annotated[
    list[str] | None,
    typer.Option(help="Most that the slim network may cost, as macs=0.5 or parameters=100000; repeatable."),
]
Ease = Annotated[float | None, typer.Option(help="For crank: from 0, its own selection, to 1, which removes nothing.")]
Preset = Annotated[str | None, typer.Option(help="For crank: thesis_text or thesis_code.")]
Coupled = Annotated[str, typer.Option(help="Score layers apart, or those whose channels leave together as joint.")]
MinKeep = Annotated[int, typer.Option(help="Filters that stay in every layer at least.", min=1)]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="An option of the criterion, as threshold=0.5; repeatable.")
]
Exclude = Annotated[list[str] | None, typer.Option(help="A convolution to leave alone; repeatable.")]
Epochs = Annotated[int, typer.Option(help="Epochs of fine-tuning.", min=1)]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps of fine-tuning in all, instead of epochs.", min=1)]
Lr = Annotated[float, typer.Option(help="Learning rate of fine-tuning.")]
StopAfter = Annotated[
    int | None, typer.Option(help="End a training after so many epochs in a row that are no better.", min=1)
]
Residual = Annotated[str, typer.Option(help="What happens where branches are added: scatter, intersect or union.")]


def main() -> None:
    """Run the command line; bad input ends with one line on standard error and exit status 2."""
    interrupted = 130
    try:
        status = app(standalone_mode=False)
    except (ValueError, TypeError) as error:
        status = _fail(str(error))
    except OSError as error:
        status = _fail(f"cannot read or write {error.filename}: {error.strerror}." if error.filename else str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = interrupted
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's own errors have it, wherever click lives
            raise
        status = _fail(error.format_message())
    if status == interrupted:
        _fail("interrupted; nothing half-written was left behind.")
    raise SystemExit(status)


def _fail(message: str) -> int:
    line = " ".join(message.split())
    print(line if line.startswith("pyprune") else f"pyprune: {line}", file=sys.stderr)  # noqa: T201
    return 2


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is built in, what this machine can use, and why the rest is missing."""
    from pyprune.machine import backends

    found = backends()
    _print_json(found.to_json()) if as_json else typer.echo(str(found))


@app.command()
def bench(
    op: Annotated[list[str] | None, typer.Option(help="Kernel to measure, rank or ssim; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or a CUDA device such as cuda:0.")] = "cpu",
    variant: Annotated[list[str] | None, typer.Option(help="Variant of ours to time; repeatable.")] = None,
    side: Annotated[list[int] | None, typer.Option(help="Side of the maps that are ranked; repeatable.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of ours and of torch; by default torch's.", min=1)
    ] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each, of which the median counts.", min=1)] = 7,
    out: Annotated[Path | None, typer.Option(help="File to write the same to, as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Time every kernel beside its peers and this machine's own limits, and check every answer."""
    import torch

    from pyprune import benching, files

    if out is not None:
        _check_out(out)
    if threads is not None:
        torch.set_num_threads(threads)
    found = benching.bench(
        op or benching.OPS, device=device, variants=variant, sides=side or benching.RANK_SIDES, rounds=rounds
    )
    if out is not None:
        files.write_json(out, found.to_json())
    _print_json(found.to_json()) if as_json else typer.echo(str(found))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-results"),
    epochs: Annotated[int, typer.Option(help="Epochs of training from scratch.", min=1)] = 12,
    finetune_epochs: Epochs = 12,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a small network on real handwritten digits, prune it by CRank, and show every stage."""
    from pyprune import files, pipeline
    from pyprune.demo import train_digits

    folder = files.make_folder("demo", out)
    model, splits = train_digits(folder / "original.safetensors", epochs=epochs, seed=seed)
    train, val, test, ranking = _loaders(splits, seed)
    result = pipeline.prune(
        model, train, val, test=test, ranking=ranking, finetune_on="masked", epochs=finetune_epochs, seed=seed,
        num_classes=len(splits.classes), folder=folder, fresh=True,
    )  # fmt: skip
    _show_result(result, folder, as_json)


@app.command()
def rank(
    weights: Weights,
    arch: Arch = None,
    model: Model = None,
    data: Data = "digits",
    size: Size = None,
    channels: Channels = None,
    normalise: Normalise = None,
    images: Images = None,
    augment: Augment = None,
    out: Annotated[Path, typer.Option(help="File for the ranks.")] = Path("ranks.safetensors"),
    images_per_class: ImagesPerClass = 50,
    taps: Taps = "activation",
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Read the class-conditional ranks of every filter in one pass over a sample of the training images."""
    from pyprune.ranks import rank_filters

    _check_out(out)
    network, splits = _network(
        arch, model, weights, data, seed, size=size, channels=channels, normalise=normalise, images=images,
        augment=augment,
    )  # fmt: skip
    *_, ranking = _loaders(splits, seed)
    ranks = rank_filters(
        network, ranking, num_classes=len(splits.classes), images_per_class=images_per_class, taps=taps,
        device=device, seed=seed,
    )  # fmt: skip
    ranks.save(out)
    rows = [
        {
            "layer": name, "filters": len(R), "tap": ranks.taps.get(name, ""),
            "map": "x".join(map(str, ranks.shapes[name])), "mean_rank": round(float(R.mean()), 3),
            "at_full_rank": round(ranks.full_rank_share(name) or 0.0, 4), "uninformative": name in ranks.uninformative,
        }
        for name, R in ranks.layers.items()
    ]  # fmt: skip
    _show({"Class ranks": rows}, {"written": str(out)}, {"layers": rows, "out": str(out), "info": ranks.info}, as_json)


@app.command()
def select(
    ranks: Annotated[Path | None, typer.Option(help="Ranks that `pyprune rank` wrote, for crank and hrank.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Trained weights, for criteria other than these.")] = None,
    arch: Arch = None,
    model: Model = None,
    data: Annotated[
        str | None, typer.Option(help="Data, as for rank: for criteria that look at them, budgets and coupling.")
    ] = None,
    size: Size = None,
    channels: Channels = None,
    normalise: Normalise = None,
    images: Images = None,
    augment: Augment = None,
    out: Annotated[Path, typer.Option(help="File for the plan.")] = Path("plan.json"),
    method: Method = "crank",
    rates: Rates = None,
    budget: Budget = None,
    ease: Ease = None,
    preset: Preset = None,
    coupled: Coupled = "apart",
    min_keep: MinKeep = 1,
    settings: Settings = None,
    exclude: Exclude = None,
    pictures: Annotated[Path | None, typer.Option(help="Folder for pictures of every step, layer by layer.")] = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Choose the filters that stay, by any criterion: at given rates, at a budget, or at its own rate."""
    from pyprune import criteria, files, selection, selection_plots
    from pyprune.types import ClassRanks

    _check_out(out)
    if pictures is not None:
        files.make_folder("--pictures", pictures)
    criterion = criteria.find("select", method, _options(ease, preset, settings))
    if weights is None and "ranks" not in criterion.needs:
        raise ValueError(f"select: {method!r} looks at trained weights. Pass --weights.")
    found = None if ranks is None else ClassRanks.load(ranks)
    network, splits = _network_for_selection(
        arch, model, weights, data, found, seed, size=size, channels=channels, normalise=normalise, images=images,
        augment=augment,
    )  # fmt: skip
    known = {} if splits is None else {"data": _loaders(splits, seed)[3], "example_inputs": splits.train[0][0][None]}
    plan = selection.select(
        network, criterion, ranks=found, rates=_rates(rates), budget=_pairs("--budget", budget),
        exclude=tuple(exclude or ()), coupled=coupled, min_keep=min_keep, device=device, **known,
    )  # fmt: skip
    plan.save(out)
    drawn = [] if pictures is None else selection_plots.plot_selection(plan, pictures, found)
    written = ", ".join(map(str, [out, *drawn]))
    rows = _plan_rows(plan)
    payload = {"layers": rows, "out": str(out), "pictures": [str(path) for path in drawn], **_met(plan)}
    _show({f"Plan by {method}": rows}, {**_met_lines(plan), "written": written}, payload, as_json)


@app.command()
def combine(
    plans: Annotated[list[Path], typer.Argument(help="Plans of the same network, two or more.")],
    how: Annotated[
        str, typer.Option(help="Remove what any plan removes, union, or only what all do, intersection.")
    ] = ("union"),
    min_keep: MinKeep = 1,
    out: Annotated[Path, typer.Option(help="File for the plan.")] = Path("plan.json"),
    as_json: Json = False,
) -> None:
    """Join plans by what they remove, and show what each two of them remove together beside what chance would."""
    from dataclasses import asdict
    from itertools import combinations

    from pyprune import combining, comparing
    from pyprune.types import Plan

    _check_out(out)
    given = [Plan.load(path) for path in plans]
    plan = combining.combine(given, how, min_keep=min_keep)
    plan.save(out)
    rows = _plan_rows(plan)
    labels = [one["label"] for one in plan.options["plans"]]
    overlaps = {}
    for i, j in combinations(range(len(given)), 2):
        found = comparing.removed_by_both(given[i], given[j])
        whole = {"all layers": comparing.pooled(found.values())} if len(found) > 1 else {}
        overlaps[f"{labels[i]}, {labels[j]}"] = [
            {"layer": name, **asdict(one)} for name, one in {**found, **whole}.items()
        ]
    tables = {f"Removed by {pair}": [_named(row) for row in found] for pair, found in overlaps.items() if found}
    payload = {"method": plan.method, "layers": rows, "overlaps": overlaps, "refilled": plan.options["refilled"],
               "out": str(out)}  # fmt: skip
    _show({f"Plan by {plan.method}": rows, **tables}, {"written": str(out)}, payload, as_json)


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """Return an overlap under the titles of its table."""
    titles = {"common": "both", "chance": "by chance", "p": "p of more", "p_fewer": "p of fewer"}
    return {titles.get(name, name): value for name, value in row.items()}


@app.command()
def trial(
    weights: Weights,
    arch: Arch = None,
    model: Model = None,
    data: Data = "digits",
    size: Size = None,
    channels: Channels = None,
    normalise: Normalise = None,
    images: Images = None,
    augment: Augment = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A criterion to compare; repeatable. crank, hrank, l1, fpgm and random.")
    ] = None,
    rates: Rates = None,
    runs: Annotated[int, typer.Option(help="Fine-tunings of each, with seeds of their own.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the results; a trial that was stopped goes on there.")] = Path(
        "trial-results"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a folder that holds a trial.")] = False,
    images_per_class: ImagesPerClass = 50,
    taps: Taps = "activation",
    exclude: Exclude = None,
    residual: Residual = "scatter",
    epochs: Epochs = 30,
    steps: Steps = None,
    lr: Lr = 0.01,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare criteria: the same rates, fine-tuning and seeds, several runs each, and whether they differ."""
    from pyprune import trials

    network, splits = _network(
        arch, model, weights, data, seed, size=size, channels=channels, normalise=normalise, images=images,
        augment=augment,
    )  # fmt: skip
    found = trials.trial(
        network, method or trials.DEFAULT, _loaders(splits, seed), runs=runs, rates=_rates(rates),
        num_classes=len(splits.classes), images_per_class=images_per_class, taps=taps, exclude=tuple(exclude or ()),
        residual=residual, epochs=epochs, steps=steps, lr=lr, seed=seed, device=device, folder=out,  # type: ignore[arg-type]
        fresh=fresh,
    )  # fmt: skip
    _print_json(found.to_json()) if as_json else typer.echo(f"{found}\nwritten: {out / 'trial.json'}")


@app.command()
def widths(
    arch: Arch = None,
    model: Annotated[
        str | None, typer.Option(help="A network of your own instead: package.module:build, which is given the widths.")
    ] = None,
    width: Annotated[
        list[str] | None, typer.Option("--width", help="A width to start from, as layer1=64; repeatable.")
    ] = None,
    per: Annotated[str, typer.Option(help="For --arch: one width for each stage, or each layer.")] = "stage",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="An option of the architecture, as conv_bias=true; repeatable.")
    ] = None,
    coupled: Annotated[list[str] | None, typer.Option(help="Widths that must stay equal, as a,b; repeatable.")] = None,
    data: Data = "digits",
    size: Size = None,
    normalise: Normalise = None,
    channels: Channels = None,
    images: Images = None,
    augment: Augment = None,
    batch: Annotated[int, typer.Option(help="Images of a batch.", min=1)] = 128,
    out: Annotated[Path, typer.Option(help="Folder for the results; a search that was stopped goes on there.")] = Path(
        "width-results"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a folder that holds a search.")] = False,
    runs: Annotated[int, typer.Option(help="Networks that are trained at each set of widths.")] = 3,
    budget: Annotated[int, typer.Option(help="Trainings in all.")] = 12,
    threshold: Annotated[float, typer.Option(help="Filters with Psi above it are alike.")] = 0.6,
    target: Annotated[float, typer.Option(help="How far lambda may lie above that of random kernels.")] = 0.01,
    tolerance: Annotated[float, typer.Option(help="How far the validation score may fall.")] = 0.01,
    metric: Annotated[
        str | None, typer.Option(help="Validation score that decides, of widths and of epochs: auc, or top1.")
    ] = None,
    silent: Annotated[
        str, typer.Option(help="Widths about which lambda says nothing: narrow under the tolerance, or keep.")
    ] = "narrow",
    shrink: Annotated[float, typer.Option(help="Smallest share of a width that stays in a step.")] = 0.5,
    smallest: Annotated[int, typer.Option(help="No width goes below it.")] = 4,
    round_to: Annotated[int, typer.Option(help="Widths are multiples of it.")] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs of each training.", min=1)] = 30,
    lr: Annotated[float, typer.Option(help="Learning rate of training.")] = 0.01,
    stop_after: StopAfter = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Narrow a network where its kernels are redundant: train, measure, narrow, train again, while it does as well."""
    from functools import partial

    import torch

    from pyprune import widths as searches
    from pyprune.data import loader, open_data
    from pyprune.datasets.labels import dataset_labels
    from pyprune.finetuning import finetune
    from pyprune.measure import evaluate

    _check_choice(arch, model)
    if metric not in (None, "auc", "top1"):
        raise ValueError(f"--metric: must be auc or top1; got {metric!r}.")
    start = _standard_widths(arch, model, per, width)
    splits = open_data(
        data, seed=seed, size=size, normalise=normalise, channels=channels, images=images, augment=augment
    )
    if metric is None:  # AUC is not defined where a class has no image
        metric = "auc" if len(set(dataset_labels("widths", splits.val))) == len(splits.classes) else "top1"
    options = _pairs("--set", settings) or {}

    def build(chosen: dict[str, int]) -> nn.Module:
        if model is not None:
            network = _own_network(model, chosen)
        else:
            network = _build(arch, None, len(splits.classes), in_channels=splits.channels, widths=chosen, **options)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # faster

    scored = partial(evaluate, num_classes=len(splits.classes), device=device, progress=False)
    found = searches.optimize_widths(
        build,
        partial(
            finetune, train=loader(splits.train, shuffle=True, seed=seed, augment=splits.augment, batch_size=batch),
            val=loader(splits.val), epochs=epochs, lr=lr, patience=stop_after, device=device,
            choose=metric,  # type: ignore[arg-type]
        ),
        lambda network: scored(network, loader(splits.val)),
        widths=start, threshold=threshold, target=target, tolerance=tolerance, runs=runs, budget=budget,
        coupled=[names.split(",") for names in coupled or ()], silent=silent, shrink=shrink, smallest=smallest,  # type: ignore[arg-type]
        round_to=round_to, metric=metric, test=lambda network: scored(network, loader(splits.test)), seed=seed,
        folder=out, fresh=fresh, about={
            "arch": arch, "model": model, "options": options, "data": data, "size": size, "normalise": normalise,
            "channels": channels, "images": images, "augment": augment, "batch": batch, "epochs": epochs, "lr": lr,
            "stop_after": stop_after,
        },
    )  # fmt: skip
    written = f"written: {out / 'search.json'}, {out / 'report.html'}"
    _print_json(found.to_json()) if as_json else typer.echo(f"{found}\n{written}")


def _standard_widths(arch: str | None, model: str | None, per: str, given: list[str] | None) -> dict[str, int]:
    """Return the widths to start from: those of the architecture, unless others are given."""
    from pyprune.models.standard import standard_widths

    named = _pairs("--width", given) or {}
    if arch is not None:
        return {**standard_widths(arch, per), **named}
    if not named:
        raise ValueError("widths: --model needs the widths to start from, as --width a=64 --width b=128.")
    return named


@app.command()
def finetune(
    weights: Weights,
    arch: Arch = None,
    model: Model = None,
    data: Data = "digits",
    size: Size = None,
    channels: Channels = None,
    normalise: Normalise = None,
    images: Images = None,
    augment: Augment = None,
    plan: Annotated[Path | None, typer.Option(help="Hold the filters that this plan drops at zero.")] = None,
    out: Annotated[Path, typer.Option(help="File for the trained weights.")] = Path("finetuned.safetensors"),
    epochs: Epochs = 30,
    steps: Steps = None,
    lr: Lr = 0.01,
    stop_after: StopAfter = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Fine-tune a network, masked by a plan or not; a stopped run goes on from its checkpoint beside the output."""
    from pyprune import files, finetuning
    from pyprune.masks import mask_
    from pyprune.measure import evaluate
    from pyprune.types import Plan

    _check_out(out)
    wanted = None if plan is None else Plan.load(plan)
    network, splits = _network(
        arch, model, weights, data, seed, size=size, channels=channels, normalise=normalise, images=images,
        augment=augment,
    )  # fmt: skip
    masks = None if wanted is None else mask_(network, wanted)
    train, val, test, _ = _loaders(splits, seed)
    checkpoint = out.with_name(out.name + ".checkpoint")
    before = evaluate(network, test, num_classes=len(splits.classes), device=device)
    history = finetuning.finetune(
        network, train, val, masks=masks, epochs=epochs, steps=steps, lr=lr, device=device, seed=seed,
        patience=stop_after, checkpoint=checkpoint,
    )  # fmt: skip
    after = evaluate(network, test, num_classes=len(splits.classes), device=device)
    files.write_tensors(out, network.state_dict(), {"epoch": str(history.best)})
    checkpoint.unlink(missing_ok=True)
    rows = [
        {"epoch": one.epoch, "train_loss": one.train_loss, "val_loss": one.val_loss, "val_top1": one.val_top1}
        for one in history.epochs
    ]
    more = {"accuracy": f"{before.top1:.2%} -> {after.top1:.2%}", "kept": f"epoch {history.best}", "written": str(out)}
    payload = {"epochs": rows, "best": history.best, "accuracy": [before.top1, after.top1], "out": str(out)}
    if history.stopped:
        more["stopped"] = payload["stopped"] = history.stopped
    _show({"Fine-tuning": rows}, more, payload, as_json)


@app.command()
def compact(
    weights: Weights,
    arch: Arch = None,
    model: Model = None,
    plan: Annotated[
        Path | None, typer.Option(help="Plan that `pyprune select` wrote; without one, filters that are zero go.")
    ] = None,
    data: Data = "digits",
    size: Size = None,
    channels: Channels = None,
    normalise: Normalise = None,
    images: Images = None,
    augment: Augment = None,
    out: Annotated[Path, typer.Option(help="The slim folder.")] = Path("slim"),
    residual: Residual = "scatter",
    round_to: Annotated[int, typer.Option(help="Keep a multiple of this many filters.", min=1)] = 1,
    onnx: Annotated[Path | None, typer.Option(help="Write an ONNX file too, checked with onnxruntime.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Remove the filters that the plan drops, prove that nothing changed, and write the slim folder."""
    from dataclasses import asdict

    from pyprune import compaction, deployment, export, files
    from pyprune.hrank import zero_filters
    from pyprune.types import Plan

    files.make_folder("--out", out)
    wanted = None if plan is None else Plan.load(plan)
    network, splits = _network(
        arch, model, weights, data, seed, size=size, channels=channels, normalise=normalise, images=images,
        augment=augment,
    )  # fmt: skip
    if wanted is None:
        wanted = zero_filters(network)
    slim = compaction.compact(
        network, wanted, splits.test[0][0][None], residual=residual, round_to=round_to,  # type: ignore[arg-type]
    )  # fmt: skip
    export.save_slim(slim, out)
    exported = None if onnx is None else deployment.export_onnx(slim, onnx)
    rows = _plan_rows(wanted, slim.kept)
    payload = {"layers": rows, "out": str(out), **_costs(slim), "certificate": _certificate(slim)}
    more = {"certificate": _certificate(slim), "written": str(out)}
    if exported is not None:
        payload["onnx"], more["onnx"] = asdict(exported), str(exported)
    _show({"Filters per layer": rows, "Cost": _cost_rows(slim)}, more, payload, as_json)


@app.command()
def prune(
    weights: Weights,
    arch: Arch = None,
    model: Model = None,
    data: Data = "digits",
    size: Size = None,
    channels: Channels = None,
    normalise: Normalise = None,
    images: Images = None,
    augment: Augment = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("pruned"),
    images_per_class: ImagesPerClass = 50,
    taps: Taps = "activation",
    method: Method = "crank",
    rates: Rates = None,
    budget: Budget = None,
    ease: Ease = None,
    preset: Preset = None,
    coupled: Coupled = "apart",
    min_keep: MinKeep = 1,
    settings: Settings = None,
    exclude: Exclude = None,
    residual: Residual = "scatter",
    finetune_on: Annotated[str, typer.Option(help="Fine-tune the slim or the masked network.")] = "slim",
    epochs: Epochs = 30,
    steps: Steps = None,
    lr: Lr = 0.01,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a folder that holds a run.")] = False,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Rank, select, fine-tune and compact in one go; a stopped run goes on from what its folder holds."""
    from pyprune import criteria, pipeline

    options = _options(ease, preset, settings)
    criterion = criteria.find("prune", method, options) if options else method
    network, splits = _network(
        arch, model, weights, data, seed, size=size, channels=channels, normalise=normalise, images=images,
        augment=augment,
    )  # fmt: skip
    train, val, test, ranking = _loaders(splits, seed)
    result = pipeline.prune(
        network, train, val, test=test, ranking=ranking, num_classes=len(splits.classes),
        images_per_class=images_per_class, taps=taps, method=criterion, rates=_rates(rates),
        exclude=tuple(exclude or ()),
        residual=residual, finetune_on=finetune_on,  # type: ignore[arg-type]  # checked by prune
        epochs=epochs, steps=steps, lr=lr, device=device, folder=out, fresh=fresh, seed=seed,
        budget=_pairs("--budget", budget), coupled=coupled, min_keep=min_keep,
    )  # fmt: skip
    _show_result(result, out, as_json)


@app.command()
def fairness(
    before: Annotated[Path, typer.Argument(help="An evaluation of the original, as `pyprune prune` leaves it.")],
    after: Annotated[Path, typer.Argument(help="An evaluation of the pruned network on the same images.")],
    out: Annotated[Path | None, typer.Option(help="File for the result, as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Say what pruning did to each class: equalised opportunity and odds, correlations, excessive loss."""
    from pyprune.equity import fairness as judge
    from pyprune.types import Evaluation

    if out is not None:
        _check_out(out)
    found = judge(Evaluation.load(before), Evaluation.load(after))
    if out is not None:
        found.save(out)
    _print_json(found.to_json()) if as_json else typer.echo(str(found))


@app.command()
def ckrm(
    weights: Annotated[
        list[Path], typer.Argument(help="Weights of one network or of several: safetensors files or slim folders.")
    ],
    arch: Arch = None,
    model: Model = None,
    num_classes: Annotated[int, typer.Option(help="Classes that --arch is built for.", min=1)] = 10,
    threshold: Annotated[list[float] | None, typer.Option(help="Pairs with Psi above count; repeatable.")] = None,
    pairs: Annotated[
        int | None, typer.Option(help="Compare so many pairs of each layer instead of all.", min=1)
    ] = None,
    eps: Annotated[float, typer.Option(help="Constant of SSIM, as a share of a layer's mean square weight.")] = 1e-2,
    eps_absolute: Annotated[float | None, typer.Option(help="The plain constant instead.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="Measure this layer only; repeatable.")] = None,
    include_1x1: Annotated[bool, typer.Option("--include-1x1", help="Measure 1x1 kernels as well.")] = False,
    top: Annotated[int, typer.Option(help="Most similar pairs to name in each layer.", min=0)] = 10,
    null: Annotated[bool, typer.Option(help="Compare every layer with random kernels of its shape.")] = True,
    out: Annotated[Path | None, typer.Option(help="File for the result, as JSON.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the figures and a page that holds them.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampled pairs and random kernels.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Measure how many pairs of filters in each convolution are alike, from weights alone."""
    from pyprune import files, redundancy, redundancy_plots

    if out is not None:
        _check_out(out)
    if plots is not None:
        files.make_folder("--plots", plots)
    networks = _networks(weights, arch, model, num_classes)
    found = redundancy.ckrm(
        networks, thresholds=tuple(threshold or (0.6,)), pairs=pairs, eps=eps, eps_absolute=eps_absolute,
        layers=layer, include_1x1=include_1x1, top=top, null=null, seed=seed,
    )  # fmt: skip
    written = [] if out is None else [out]
    if out is not None:
        found.save(out)
    if plots is not None:
        drawn = redundancy_plots.plot_ckrm(found, plots, networks)
        redundancy_plots.redundancy_page(found, plots / "ckrm.html", networks)
        written += [*map(Path, drawn.values()), plots / "ckrm.html"]
    if as_json:
        _print_json({**found.to_json(), "written": [str(path) for path in written]})
    else:
        typer.echo("\n".join([str(found), *(f"written: {path}" for path in written)]))


def _networks(weights: list[Path], arch: str | None, model: str | None, num_classes: int) -> dict[str, Any]:
    """Return each network by a short name that is its own: built and loaded where an architecture is given."""
    from pyprune.checkpoints import load_checkpoint

    stems = [path.stem for path in weights]
    networks: dict[str, Any] = {}
    for path, stem in zip(weights, stems, strict=True):
        network: Any = path
        if arch is not None or model is not None:
            network = _build(arch, model, num_classes)
            load_checkpoint(network, path)
        networks[stem if stems.count(stem) == 1 else str(path)] = network
    if len(networks) < len(weights):
        raise ValueError("ckrm: the same weights are named twice. Name each file once.")
    return networks


@app.command()
def report(
    result: Annotated[
        Path, typer.Argument(help="A result of ckrm, trial or widths: its JSON file, or the folder that holds it.")
    ],
    out: Annotated[Path, typer.Option(help="File for the page.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write the page of a result again: one HTML file with its pictures inside. `pyprune prune` writes its own."""
    from pyprune import files, reporting
    from pyprune.comparing import Trial
    from pyprune.searching import WidthSearch
    from pyprune.types import CKRM

    _check_out(out)
    kinds: dict[str, Any] = {kind.FORMAT: kind for kind in (CKRM, Trial, WidthSearch)}
    names = [result] if not result.is_dir() else [result / name for name in ("search.json", "trial.json", "ckrm.json")]
    path = next((name for name in names if name.exists()), names[0])
    form = files.parse_json("report", files.read_bytes("report", path, files.MAX_JSON_BYTES), str(path)).get("format")
    if form not in kinds:
        raise ValueError(f"report: {path} must be a result of ckrm, trial or widths; its format is {form!r}.")
    reporting.report(kinds[form].load(path), out)
    _print_json({"out": str(out), "format": form}) if as_json else typer.echo(f"written: {out}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint that torch.save wrote.")],
    target: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
) -> None:
    """Turn a torch checkpoint into safetensors, which any torch reads safely; nothing in it is executed."""
    from pyprune.checkpoints import convert_checkpoint

    names = convert_checkpoint(source, target)
    typer.echo(f"{target}: {len(names)} tensors.")


def _check_out(out: Path) -> None:
    """Refuse, before any work is done, a file that could not be written."""
    from pyprune import files

    if out.is_dir():
        raise ValueError(f"--out: needs the name of a file; {out} is a folder.")
    files.make_folder("--out", out.parent)


def _build(arch: str | None, model: str | None, num_classes: int, **options: Any) -> nn.Module:
    """Build a network by the name of its architecture, with ``options``, or by ``package.module:factory``."""
    from pyprune import models

    _check_choice(arch, model)
    if model is not None:
        return _own_network(model)
    name, own = _architecture(str(arch))
    network: nn.Module = getattr(models, name)(num_classes=num_classes, **{**own, **options})
    return network


def _architecture(arch: str) -> tuple[str, dict[str, Any]]:
    """Return the name of an architecture and its options: none, or the widths that a search found."""
    from pyprune import models
    from pyprune.searching import WidthSearch

    if not arch.endswith(".json"):
        return arch, {}
    search = WidthSearch.load(arch)
    name, options = search.options.get("arch"), search.options.get("options")
    if name not in models.__all__ or not isinstance(options, dict):
        raise ValueError(f"--arch: {arch} is not of a network of pyprune.models. Pass --model package.module:factory.")
    return str(name), {**options, "widths": search.widths}


def _check_choice(arch: str | None, model: str | None) -> None:
    """Refuse what names no network, or two."""
    from pyprune import models

    if (arch is None) == (model is None):
        raise ValueError("Give either --arch NAME or --model package.module:factory, and not both.")
    if arch is not None and arch not in models.__all__ and not arch.endswith(".json"):
        near = difflib.get_close_matches(arch, models.__all__, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(models.__all__)}."
        raise ValueError(f"--arch: there is no {arch!r}. {hint}")


def _own_network(name: str, *given: Any) -> nn.Module:
    """Call the factory that ``package.module:factory`` names; modules in the current folder are found too."""
    import importlib

    from torch import nn

    module, _, factory = name.partition(":")
    sys.path.insert(0, "")
    try:
        build = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--model: {name} must name a callable as package.module:factory; {error}.") from None
    finally:
        sys.path.remove("")
    if not callable(build):
        raise ValueError(f"--model: {name} must be callable; it is {type(build).__name__}.")
    network = build(*given)
    if not isinstance(network, nn.Module):
        raise ValueError(f"--model: {name} must return a torch.nn.Module; it returned {type(network).__name__}.")
    return network


def _network(
    arch: str | None, model: str | None, weights: Path, data: str, seed: int, **options: Any
) -> tuple[nn.Module, Splits]:
    """Build the network, load its weights, and open the data."""
    from pyprune.checkpoints import load_checkpoint
    from pyprune.data import open_data

    _check_choice(arch, model)  # before the data, which may take a while
    splits = open_data(data, seed=seed, **options)
    network = _build(arch, model, len(splits.classes), in_channels=splits.channels)
    load_checkpoint(network, weights)
    return network.eval(), splits


def _loaders(splits: Splits, seed: int) -> tuple[Any, Any, Any, Any]:
    """Return loaders for training (augmented where the data set is), validation, testing and ranking."""
    from pyprune.data import loader

    return (
        loader(splits.train, shuffle=True, seed=seed, augment=splits.augment),
        loader(splits.val),
        loader(splits.test),
        loader(splits.train),
    )


def _rates(text: str | None) -> Any:
    """Return what --rates says: nothing, one number, the rates of a plan file, or HRank's notation."""
    from pyprune.types import Plan

    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return Plan.load(text) if Path(text).is_file() else text


def _options(ease: float | None, preset: str | None, settings: list[str] | None) -> dict[str, Any]:
    """Return the options of the criterion that were given."""
    given = {"ease": ease, "preset": preset, **(_pairs("--set", settings) or {})}
    return {name: value for name, value in given.items() if value is not None}


def _pairs(option: str, texts: list[str] | None) -> dict[str, Any] | None:
    """Return name=value pairs; what is no number, true, false or null is text."""
    if not texts:
        return None
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option}: needs name=value; got {text!r}.")
        try:
            found[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            found[name.replace("-", "_")] = value
    return found


def _network_for_selection(
    arch: str | None, model: str | None, weights: Path | None, data: str | None, ranks: ClassRanks | None, seed: int,
    **options: Any,
) -> tuple[nn.Module, Splits | None]:  # fmt: skip
    """Build the network, with weights if there are any; open the data if they are named or needed to build it."""
    from pyprune.data import open_data

    if weights is not None:
        return _network(arch, model, weights, data or "digits", seed, **options)
    _check_choice(arch, model)
    splits = None if data is None else open_data(data, seed=seed, **options)
    if ranks is None and splits is None:
        raise ValueError("select: needs --ranks, which `pyprune rank` writes.")
    if splits is not None:
        return _build(arch, model, len(splits.classes), in_channels=splits.channels), splits
    return _build(arch, model, ranks.num_classes if ranks else 0), splits


def _met(plan: Plan) -> dict[str, Any]:
    return {name: plan.options[name] for name in ("budget", "coupling") if name in plan.options}


def _met_lines(plan: Plan) -> dict[str, str]:
    """Say how a budget was met and what coupling costs."""
    met = _met(plan)
    lines = {
        f"budget of {name}": f"{found['reached']:,} of {found['of']:,}, {found['allowed']:,.0f} allowed"
        for name, found in met.get("budget", {}).items()
    }
    if coupling := met.get("coupling"):
        (old, new), stays = coupling["macs"], coupling["stays"]
        lines["MACs an image"] = f"{old:,} > {new:,}"
        if stays:
            lines["coupling"] = (
                f"{stays} planned filters leave a channel behind that other branches keep; without indexed additions "
                f"{coupling['macs_intersect']:,} MACs would stay"
            )
    return lines


def _plan_rows(plan: Plan, kept: Any = None) -> list[dict[str, Any]]:
    against = kept or {}
    return [
        {
            "layer": name,
            "before": plan.filters.get(name),
            "after": len(keep) + len(against.get(name, ())),
            "clusters": plan.why[name].k if name in plan.why else None,
            "stability": plan.why[name].stability if name in plan.why else None,
            "note": "; ".join(
                [plan.why[name].note] * (name in plan.why and bool(plan.why[name].note))
                + sorted(set(against.get(name, {}).values()))
            ),
        }
        for name, keep in plan.keep.items()
    ]


def _costs(slim: Compacted) -> dict[str, Any]:
    before, after = slim.before, slim.after
    return {
        "parameters": [before.parameters, after.parameters],
        "macs": [before.macs, after.macs],
        "hrank_v1_parameters": [before.hrank_v1_parameters, after.hrank_v1_parameters],
        "hrank_v1_macs": [before.hrank_v1_macs, after.hrank_v1_macs],
        "latency_ms": [before.latency_ms, after.latency_ms],
        "device": after.device,
    }


def _cost_rows(slim: Compacted) -> list[dict[str, Any]]:
    names = {
        "parameters": "parameters", "macs": "MACs an image", "hrank_v1_parameters": "parameters as HRank counts",
        "hrank_v1_macs": "MACs as HRank counts", "latency_ms": f"latency, ms ({slim.after.device})",
    }  # fmt: skip
    costs = _costs(slim)
    return [
        {"": title, "before": costs[name][0], "after": costs[name][1],
         "saved": f"{1 - costs[name][1] / costs[name][0]:.1%}"}
        for name, title in names.items()
        if costs[name][0] and costs[name][1] is not None
    ]  # fmt: skip


def _certificate(slim: Compacted) -> str:
    proof = slim.certificate
    if not proof.verified:
        return "not verified"
    return (
        f"slim = masked: largest relative difference {proof.max_difference:.1e} in float64 "
        f"(allowed {proof.tolerance:.0e}) with randomised norms over {len(proof.inputs)} inputs; "
        f"{proof.native_difference:.1e} in {proof.dtype} (allowed {proof.native_tolerance:.0e})"
    )


def _show_result(result: PruneResult, folder: Path, as_json: bool) -> None:
    rows = _plan_rows(result.plan, result.slim.kept)
    accuracy = {name: evaluation.top1 for name, evaluation in result.evaluations.items()}
    seconds = {name: round(seconds, 2) for name, seconds in result.seconds.items()}
    tables = {
        "Filters per layer": rows,
        "Accuracy": [{"network": name, "top-1": f"{top1:.2%}"} for name, top1 in accuracy.items()],
        "Cost": _cost_rows(result.slim),
    }
    proof = _certificate(result.slim)
    more = {
        "certificate": proof,
        "seconds": ", ".join(f"{name} {value}" for name, value in seconds.items()),
        "written": f"{folder} (report.html is for looking)",
    }
    payload = {
        "layers": rows, "accuracy": accuracy, **_costs(result.slim), "certificate": proof, "seconds": seconds,
        "out": str(folder),
    }  # fmt: skip
    _show(tables, more, payload, as_json)


def _show(
    tables: dict[str, list[dict[str, Any]]], more: dict[str, str], payload: dict[str, Any], as_json: bool
) -> None:
    """Print ``tables`` and the lines of ``more`` below them, or ``payload`` as one JSON object."""
    if as_json:
        _print_json(payload)
        return
    from rich.console import Console

    console = Console()
    for title, rows in tables.items():
        console.print(_table(title, rows))
    for name, value in more.items():
        console.print(f"[bold]{name}[/bold]: {value}", highlight=False, soft_wrap=True)


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else ():
        values = [row[column] for row in rows]
        if any(value not in (None, "") for value in values):
            words = all(isinstance(value, str) and not value[:1].isdigit() for value in values if value is not None)
            table.add_column(column, justify="left" if words else "right")
        else:
            rows = [{name: value for name, value in row.items() if name != column} for row in rows]
    for row in rows:
        table.add_row(*map(_plain, row.values()))
    return table


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=1))
