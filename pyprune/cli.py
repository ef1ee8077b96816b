"""The command line. Every command is a thin shell around one public function; heavy imports wait until it runs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from pyprune.data import Splits
    from pyprune.types import Plan, PruneResult

app = typer.Typer(
    help="Find the redundant filters of a convolutional network, remove them, and get back a slim one that "
    "computes exactly the same.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Arch = Annotated[str, typer.Option(help="Architecture: a name from pyprune.models, or package.module:factory.")]
Weights = Annotated[Path, typer.Option(help="Trained weights: a safetensors file of the state dict.")]
Data = Annotated[str, typer.Option(help="Data: digits (embedded).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling, splitting and training.", min=0)]
Device = Annotated[str | None, typer.Option(help="Device to compute on, such as cpu or cuda:0.")]


def main() -> None:
    """Run the command line; bad input ends with one line on standard error and exit status 2."""
    interrupted = 130
    try:
        status = app(standalone_mode=False)
    except (ValueError, TypeError, OSError) as error:
        status = _fail(str(error))
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
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo-results"),
    epochs: Annotated[int, typer.Option(help="Epochs of training from scratch.", min=1)] = 12,
    finetune_epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning.", min=1)] = 12,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a small network on real handwritten digits, prune it by CRank, and show every stage."""
    from pyprune import files
    from pyprune.demo import train_digits
    from pyprune.pipeline import prune

    folder = files.make_folder("demo", out)
    model, splits = train_digits(folder / "original.safetensors", epochs=epochs, seed=seed)
    train, val, test, ranking = _loaders(splits, seed)
    result = prune(
        model, train, val, test=test, ranking=ranking, finetune_on="masked", epochs=finetune_epochs, seed=seed,
        num_classes=len(splits.classes), folder=folder,
    )  # fmt: skip
    _show_result(result, folder, as_json)


@app.command()
def rank(
    arch: Arch,
    weights: Weights,
    data: Data = "digits",
    out: Annotated[Path, typer.Option(help="File for the ranks.")] = Path("ranks.safetensors"),
    images_per_class: Annotated[int, typer.Option(help="Images a class that are ranked.", min=1)] = 50,
    taps: Annotated[str, typer.Option(help="Where maps are read: activation or norm.")] = "activation",
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Read the class-conditional ranks of every filter in one pass over a sample of the training images."""
    from pyprune.ranks import rank_filters

    model, splits = _network(arch, weights, data, seed)
    *_, ranking = _loaders(splits, seed)
    ranks = rank_filters(
        model, ranking, num_classes=len(splits.classes), images_per_class=images_per_class, taps=taps,
        device=device, seed=seed,
    )  # fmt: skip
    ranks.save(out)
    rows = [
        {
            "layer": name, "filters": len(R), "tap": ranks.taps.get(name, ""),
            "map": "x".join(map(str, ranks.shapes[name])),
            "mean_rank": round(float(R.mean()), 3), "at_full_rank": round(ranks.full_rank_share(name) or 0.0, 4),
            "uninformative": name in ranks.uninformative,
        }
        for name, R in ranks.layers.items()
    ]  # fmt: skip
    _show("Class ranks", rows, {"out": str(out), "info": dict(ranks.info)}, as_json)


@app.command()
def select(
    arch: Arch,
    ranks: Annotated[Path, typer.Option(help="Ranks that `pyprune rank` wrote.")],
    out: Annotated[Path, typer.Option(help="File for the plan.")] = Path("plan.json"),
    method: Annotated[str, typer.Option(help="Criterion: crank or hrank.")] = "crank",
    rates: Annotated[
        str | None, typer.Option(help="For hrank: one rate in [0, 1), or a plan file whose rates are used.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A convolution to leave alone; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Choose the filters that stay."""
    from pyprune.selection import select as choose
    from pyprune.types import ClassRanks

    found = ClassRanks.load(ranks)
    model = _build(arch, found.num_classes)
    options: dict[str, Any] = {} if rates is None else {"rates": _rates(rates)}
    plan = choose(model, method, ranks=found, exclude=tuple(exclude or ()), **options)
    plan.save(out)
    _show(f"Plan by {method}", _plan_rows(plan), {"out": str(out)}, as_json)


@app.command()
def compact(
    arch: Arch,
    weights: Weights,
    plan: Annotated[Path, typer.Option(help="Plan that `pyprune select` wrote.")],
    data: Data = "digits",
    out: Annotated[Path, typer.Option(help="The slim folder.")] = Path("slim"),
    round_to: Annotated[int, typer.Option(help="Keep a multiple of this many filters.", min=1)] = 1,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Remove the filters that the plan drops, prove that nothing changed, and write the slim folder."""
    from pyprune import compaction, export
    from pyprune.types import Plan

    wanted = Plan.load(plan)
    model, splits = _network(arch, weights, data, seed)
    slim = compaction.compact(model, wanted, splits.test[0][0][None], round_to=round_to)
    export.save_slim(slim, out)
    more = {"out": str(out), **_costs(slim), "certificate": _certificate(slim)}
    _show("Slim network", _plan_rows(wanted, slim.kept), more, as_json)


@app.command()
def prune(
    arch: Arch,
    weights: Weights,
    data: Data = "digits",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("pruned"),
    images_per_class: Annotated[int, typer.Option(help="Images a class that are ranked.", min=1)] = 50,
    exclude: Annotated[list[str] | None, typer.Option(help="A convolution to leave alone; repeatable.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning.", min=1)] = 30,
    lr: Annotated[float, typer.Option(help="Learning rate of fine-tuning.")] = 0.01,
    finetune_on: Annotated[str, typer.Option(help="Fine-tune the slim or the masked network.")] = "slim",
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Rank, select, fine-tune and compact in one go; leaves the slim folder, the plan, the ranks and a report."""
    from pyprune import pipeline

    model, splits = _network(arch, weights, data, seed)
    train, val, test, ranking = _loaders(splits, seed)
    result = pipeline.prune(
        model, train, val, test=test, ranking=ranking, images_per_class=images_per_class,
        exclude=tuple(exclude or ()), finetune_on=finetune_on,  # type: ignore[arg-type]  # prune checks it
        epochs=epochs, lr=lr, num_classes=len(splits.classes), device=device, folder=out, seed=seed,
    )  # fmt: skip
    _show_result(result, out, as_json)


def _build(arch: str, num_classes: int) -> nn.Module:
    """Build a network by the name of its architecture, or by ``package.module:factory``."""
    import difflib
    import importlib

    from torch import nn

    from pyprune import models

    if ":" in arch:
        module, _, factory = arch.partition(":")
        sys.path.insert(0, "")  # one's own module in the current folder
        try:
            build = getattr(importlib.import_module(module), factory)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"--arch: {arch} must name a callable as package.module:factory; {error}.") from None
        finally:
            sys.path.pop(0)
        model = build()
    elif arch in models.__all__:
        model = getattr(models, arch)(num_classes=num_classes)
    else:
        near = difflib.get_close_matches(arch, models.__all__, n=1) or models.__all__
        raise ValueError(f"--arch: there is no {arch!r}. Did you mean {', '.join(near)}?")
    if not isinstance(model, nn.Module):
        raise ValueError(f"--arch: {arch} must return a torch.nn.Module; it returned {type(model).__name__}.")
    return model


def _network(arch: str, weights: Path, data: str, seed: int) -> tuple[nn.Module, Splits]:
    from pyprune.data import open_data
    from pyprune.files import read_tensors

    splits = open_data(data, seed=seed)
    model = _build(arch, len(splits.classes))
    state, _ = read_tensors("--weights", weights)
    have = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: list(tensor.shape) for name, tensor in state.items()}
    for name in sorted(have.keys() | given.keys()):
        if have.get(name) != given.get(name):
            raise ValueError(
                f"--weights: {weights} does not fit {arch}: {name!r} is {have.get(name, 'absent')} in the network "
                f"and {given.get(name, 'absent')} in the file."
            )
    model.load_state_dict(state)
    return model.eval(), splits


def _loaders(splits: Splits, seed: int) -> tuple[Any, Any, Any, Any]:
    """Return loaders for training, validation, testing and ranking."""
    from pyprune.data import loader

    return (
        loader(splits.train, shuffle=True, seed=seed),
        loader(splits.val),
        loader(splits.test),
        loader(splits.train),
    )


def _rates(text: str) -> Any:
    from pyprune.types import Plan

    try:
        return float(text)
    except ValueError:
        return Plan.load(text)


def _plan_rows(plan: Plan, kept: Any = None) -> list[dict[str, Any]]:
    return [
        {
            "layer": name,
            "before": plan.filters.get(name),
            "after": len(keep) + len((kept or {}).get(name, ())),
            "clusters": plan.why[name].k if name in plan.why else None,
            "note": (plan.why[name].note if name in plan.why else "")
            or ("; ".join(sorted(set(kept[name].values()))) if kept and kept.get(name) else ""),
        }
        for name, keep in plan.keep.items()
    ]


def _costs(slim: Any) -> dict[str, Any]:
    before, after = slim.before, slim.after
    return {
        "parameters": [before.parameters, after.parameters],
        "macs": [before.macs, after.macs],
        "latency_ms": [before.latency_ms, after.latency_ms],
        "device": after.device,
    }


def _certificate(slim: Any) -> str:
    proof = slim.certificate
    if not proof.verified:
        return "not verified"
    return (
        f"slim = masked: largest relative difference {proof.max_difference:.1e} in float64 "
        f"(allowed {proof.tolerance:.0e}) with randomised norms over {len(proof.inputs)} inputs; "
        f"{proof.native_difference:.1e} in {proof.dtype} (allowed {proof.native_tolerance:.0e})"
    )


def _show_result(result: PruneResult, folder: Path, as_json: bool) -> None:
    more = {
        "out": str(folder),
        "accuracy": {name: evaluation.top1 for name, evaluation in result.evaluations.items()},
        **_costs(result.slim),
        "certificate": _certificate(result.slim),
        "seconds": {name: round(seconds, 2) for name, seconds in result.seconds.items()},
    }
    _show("Filters per layer", _plan_rows(result.plan, result.slim.kept), more, as_json)


def _show(title: str, rows: list[dict[str, Any]], more: dict[str, Any], as_json: bool) -> None:
    """Print ``rows`` as a table and ``more`` below it, or both as one JSON object."""
    if as_json:
        _print_json({"layers": rows, **more})
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right" if isinstance(rows[0][column], int | float) else "left")
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    console.print(table)
    for name, value in more.items():
        console.print(f"[bold]{name:>12}[/bold]  {_plain(value)}", highlight=False, soft_wrap=True)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(one)}" for name, one in value.items())
    if isinstance(value, list):
        return " -> ".join(_plain(one) for one in value)
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=1))
