"""Criteria side by side: the same network, rates, fine-tuning and seeds, several runs each, and the statistics."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from pyprune import criteria, files, graph
from pyprune.compaction import compact
from pyprune.comparing import Attempt, Trial
from pyprune.criteria import Criterion
from pyprune.criteria.weights import Random
from pyprune.equity import fairness
from pyprune.finetuning import finetune
from pyprune.measure import evaluate, first_image, profile
from pyprune.progress import bar
from pyprune.ranks import rank_filters
from pyprune.reporting import report
from pyprune.resuming import Run
from pyprune.selection import select
from pyprune.types import ClassRanks, Evaluation, Plan

DEFAULT = ("crank", "hrank", "l1", "fpgm", "random")
"""The criteria that are compared if none are named."""

_OWNED = ("run.json", "*.safetensors", "rates.json", "original.json", "trial.json", "*/run_*.json", "*/*.safetensors")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")


@dataclass(frozen=True)
class Loaders:
    """What a trial reads: ``train`` fine-tunes, ``val`` chooses the epoch, ``test`` measures, ``ranking`` is ranked."""

    train: Iterable[Any]
    test: Iterable[Any]
    val: Iterable[Any] | None = None
    ranking: Iterable[Any] | None = None


def trial(
    model: nn.Module,
    methods: Sequence[str | Criterion] | Mapping[str, str | Criterion] = DEFAULT,
    data: Loaders | Sequence[Any] | None = None,
    *,
    runs: int = 3,
    rates: Any = None,
    num_classes: int | None = None,
    images_per_class: int = 50,
    taps: str = "activation",
    exclude: Sequence[str] = (),
    residual: Literal["scatter", "intersect", "union"] = "scatter",
    epochs: int = 30,
    steps: int | None = None,
    lr: float = 0.01,
    seed: int = 0,
    device: str | torch.device | None = None,
    folder: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    progress: bool = True,
) -> Trial:
    """Prune ``model`` by several criteria at the same rates, fine-tune each slim network alike, and compare.

    Parameters
    ----------
    model
        A trained classifier of images [N, C, H, W]. Never changed.
    methods
        Criteria, by name or as objects (see :func:`pyprune.select`); a mapping gives them labels of one's own.
    data
        :class:`Loaders`, or loaders of (images, labels) in the order train, validation, test, ranking; validation and
        ranking may be ``None`` or missing. With two, they are train and test. ``ranking``, without augmentation, is
        what criteria look at; by default ``train``. Test images only measure: nothing is chosen on them.
    runs
        Fine-tunings of each method. Run i of every method has the seed ``seed + i``; ``"random"`` draws anew each time.
    rates
        As for :func:`pyprune.select`; by default those that CRank finds, so that CRank's own plan takes part.
    num_classes, images_per_class, taps
        Of the ranks, if any method reads them or ``rates`` is not given; see :func:`pyprune.rank_filters`.
    exclude, residual
        As for :func:`pyprune.select` and :func:`pyprune.compact`.
    epochs, steps, lr
        Of fine-tuning the compacted networks; see :func:`pyprune.finetune`.
    seed
        Of the sample of ranked images, and of the first run.
    device
        Where to compute; by default where the model is.
    folder
        Where everything is written as soon as it exists: a trial that was stopped goes on from what it finds, and one
        that is asked for more methods or runs adds those. ``trial.json`` is the result.
    fresh
        Whether to start over in a folder that holds a trial.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Trial
        ``print`` shows means, deviations, tests and overlaps.

    Raises
    ------
    ValueError
        If an argument is out of range, a method is unknown, or ``folder`` holds another trial. Those of the stages
        name themselves.
    TypeError
        If ``data`` or ``methods`` are of the wrong kind.
    """
    chosen = _methods(methods)
    loaders = _loaders(data)
    if not isinstance(runs, int) or isinstance(runs, bool) or runs < 1:
        raise ValueError(f"trial: runs must be a whole number of at least 1; got {runs!r}.")
    settings = {
        "weights": files.fingerprint(model.state_dict()), "rates": _plain_rates(rates), "taps": taps,
        "images_per_class": images_per_class, "exclude": sorted(exclude), "residual": residual, "epochs": epochs,
        "steps": steps, "lr": lr, "seed": seed,
    }  # fmt: skip
    run = Run("trial", folder, settings, fresh, _OWNED)
    quiet: dict[str, Any] = {"device": device, "progress": False}
    looked_at = loaders.train if loaders.ranking is None else loaders.ranking
    example = first_image("trial", loaders.train)

    def rank() -> ClassRanks:
        return rank_filters(
            model, looked_at, num_classes=num_classes, images_per_class=images_per_class, taps=taps, seed=seed,
            device=device, progress=progress, checkpoint=run.path("ranking.safetensors"),
        )  # fmt: skip

    def plan_by(method: str | Criterion, at: Any) -> Plan:
        return select(
            model, method, ranks=ranks, data=looked_at, example_inputs=example, rates=at, exclude=exclude, **quiet
        )

    crank = criteria.settings(criteria.find("trial", "crank", {}))
    ranked = rates is None or any("ranks" in one.needs for one in chosen.values())
    ranks = run.stage("rank", "ranks.safetensors", ClassRanks, rank) if ranked else None
    base = run.stage("select", "rates.json", Plan, partial(plan_by, "crank", None)) if rates is None else rates
    scored = partial(evaluate, loader=loaders.test, num_classes=num_classes, **quiet)
    original = run.stage("evaluate", "original.json", Evaluation, partial(scored, model))
    classes = len(original.confusion)
    plans: dict[str, Plan] = {}
    untuned: dict[str, Evaluation] = {}

    def planned(label: str, criterion: Criterion) -> Plan:
        if rates is None and criteria.settings(criterion) == crank and criterion.name == "crank":
            return base
        if label not in plans:
            plans[label] = plan_by(criterion, base)
        return plans[label]

    def attempt(label: str, criterion: Criterion, number: int) -> Attempt:
        if isinstance(criterion, Random):  # each run another draw
            plans.pop(label, None)
            untuned.pop(label, None)
            criterion = replace(criterion, seed=criterion.seed + number)
        plan = planned(label, criterion)
        slim = compact(model, plan, example, residual=residual, latency=False)
        if label not in untuned:
            untuned[label] = evaluate(slim.model, loaders.test, num_classes=classes, **quiet)
        finetune(
            slim.model, loaders.train, loaders.val, epochs=epochs, steps=steps, lr=lr, seed=seed + number,
            checkpoint=run.path(f"{label}/training_{number}.safetensors"), **quiet,
        )  # fmt: skip
        finetuned = evaluate(slim.model, loaders.test, num_classes=classes, **quiet)
        return Attempt(
            seed + number, plan.keep, untuned[label], finetuned, slim.after.parameters, slim.after.macs,
            _measures(original, finetuned), criteria.settings(chosen[label]),
        )  # fmt: skip

    attempts: dict[str, list[Attempt]] = {label: [] for label in chosen}
    with bar("comparing criteria", len(chosen) * runs, progress) as advance:
        for number in range(runs):  # every method once before any a second time: a stopped trial still compares
            for label, criterion in chosen.items():
                advance(0, f"{label}, run {number + 1}")
                name = f"{label}/run_{number}.json"
                found = run.stage("attempts", name, Attempt, partial(attempt, label, criterion, number))
                if found.settings != criteria.settings(criterion):
                    raise ValueError(
                        f"trial: {run.path(name)} is of {label!r} with other settings, {dict(found.settings)}. "
                        "Give the method another label, or start over with fresh=True (--fresh)."
                    )
                attempts[label].append(found)
                if (checkpoint := run.path(f"{label}/training_{number}.safetensors")) is not None:
                    checkpoint.unlink(missing_ok=True)
                advance()
    costs = profile(model, example, latency=False)
    result = Trial(
        original, costs.parameters, costs.macs,
        {name: layer.out_channels for name, layer in graph.convolutions(model).items()},
        {label: tuple(found) for label, found in attempts.items()},
        {**settings, "runs": runs, "methods": {label: criteria.settings(one) for label, one in chosen.items()}},
    )  # fmt: skip
    if run.folder is not None:
        result.save(run.folder / "trial.json")
        report(result, run.folder / "report.html")
    return result


def _methods(methods: Any) -> dict[str, Criterion]:
    """Return the criteria by label, after checking the labels."""
    if isinstance(methods, str):
        methods = [methods]
    if not isinstance(methods, (Mapping, Sequence)) or not methods:
        raise TypeError(f"trial: methods must be criteria in a list, or by label; got {methods!r}.")
    if isinstance(methods, Mapping):
        given = list(methods.items())
    else:
        given = [(one if isinstance(one, str) else one.name, one) for one in methods]
    found: dict[str, Criterion] = {}
    for label, one in given:
        if not isinstance(label, str) or not _LABEL.fullmatch(label):
            raise ValueError(f"trial: labels of methods become folders: letters, digits, . _ + and -; got {label!r}.")
        if label in found:
            raise ValueError(f"trial: {label!r} is there twice. Give one of them a label: {{'{label}-2': ...}}.")
        found[label] = criteria.find("trial", one, {})
    return found


def _loaders(data: Any) -> Loaders:
    if isinstance(data, Loaders):
        return data
    if not isinstance(data, (tuple, list)) or not 2 <= len(data) <= 4:
        raise TypeError(
            "trial: data must be pyprune.trials.Loaders, or two to four loaders: train, validation, test and ranking, "
            f"or train and test; got {type(data).__name__}."
        )
    train, *rest = data
    val, test, ranking = {1: (None, *rest, None), 2: (*rest, None), 3: tuple(rest)}[len(rest)]
    if train is None or test is None:
        raise ValueError("trial: loaders of training and test images are needed; got None for one of them.")
    return Loaders(train, test, val, ranking)


def _plain_rates(rates: Any) -> Any:
    if isinstance(rates, Plan):
        return rates.to_json()["keep"]
    return dict(rates) if isinstance(rates, Mapping) else rates


def _measures(before: Evaluation, after: Evaluation) -> dict[str, float]:
    """Return the measures of fairness that are one number; none where fewer than two classes have images."""
    if np.count_nonzero(before.confusion.sum(axis=1)) < 2:
        return {}
    found = fairness(before, after)
    names = ("eopp0", "eopp1", "eodd", "eodd_separate")
    return {**{name: float(getattr(found, name)) for name in names}, "excess": float(found.errors.largest)}
