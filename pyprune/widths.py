"""Widths from redundancy (CKRM paper, section 3.3): train, measure, narrow what is redundant, train again."""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from pyprune import files, randomness
from pyprune.convolutions import read_networks
from pyprune.finetuning import Diverged
from pyprune.hints import did_you_mean
from pyprune.progress import bar
from pyprune.redundancy import ckrm, distinct_filters
from pyprune.reporting import report
from pyprune.resuming import Run
from pyprune.searching import WidthRun, WidthSearch, WidthStep
from pyprune.types import Evaluation, History, reading

Build = Callable[[dict[str, int]], nn.Module]

LEAST_STEP = 1 / 8
"""A redundant layer loses at least this share of its filters in a step: trainings are dear."""

CLOSE = 1.1
"""Between a width that held and one that did not there is nothing to try where they differ by less than this factor."""

REPEATED = 1_000_003
"""What is added to the seed of a run that is repeated."""

_OWNED = ("run.json", "search.json", "report.html", "narrow.safetensors", "step_*/run_*")


@dataclass(frozen=True)
class _Rules:
    """What decides on widths, apart from what is measured."""

    threshold: float
    target: float
    tolerance: float
    shrink: float
    smallest: int
    round_to: int
    silent: str
    patience: int
    runs: int
    budget: int
    eps: float
    seed: int


class _GivenUpError(Exception):
    """A run that diverged, and its repetition too."""


def optimize_widths(
    build: Build,
    train: Callable[..., Any],
    evaluate: Callable[[nn.Module], Any],
    *,
    widths: Mapping[str, int],
    threshold: float = 0.6,
    target: float = 0.01,
    tolerance: float = 0.01,
    runs: int = 3,
    budget: int = 12,
    coupled: Sequence[Sequence[str]] = (),
    silent: Literal["narrow", "keep"] = "narrow",
    shrink: float = 0.5,
    smallest: int = 4,
    round_to: int = 1,
    patience: int = 2,
    metric: str | None = None,
    test: Callable[[nn.Module], Any] | None = None,
    eps: float = 1e-2,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> WidthSearch:
    """Make a network narrower where its kernels are redundant, while it does as well (CKRM paper, section 3.3).

    Trains ``runs`` networks from scratch, reads lambda of every convolution, proposes narrower widths, and repeats,
    until no lambda exceeds that of random kernels by more than ``target`` and nothing else is left to narrow, or
    ``budget`` trainings are spent.

    A width whose lambda does so in one of its layers goes to the number of this layer's filters of which no two are
    alike (mean over the runs), but loses at least an eighth and at most the share 1 - ``shrink``. One whose lambda does
    not in the standard network says nothing: it is narrowed by ``shrink`` under the validation tolerance alone, unless
    ``silent="keep"``. One whose lambda has come down stays. A lambda of 0 by itself never widens. Widths widen where
    validation falls by more than ``tolerance``: first those that lambda had not asked to narrow, half of the way back
    (in logarithms), and so on between what held and what did not.

    Parameters
    ----------
    build
        ``build(widths)`` returns a new, untrained network. It must respond to every width.
    train
        ``train(model)`` trains it in place. If its signature has ``seed``, it is given the run's; if it has
        ``checkpoint``, a file in ``folder`` from which it can go on after it was killed:
        ``functools.partial(pyprune.finetune, train=..., val=...)`` has both. Random numbers are to come from ``seed``
        or from the generators of torch, numpy and random, which are seeded for each run.
    evaluate
        ``evaluate(model)`` returns the validation score: a number, or scores by name, or an
        :class:`pyprune.types.Evaluation`, of which AUC decides where it is defined, and top-1 elsewhere. Higher is
        better.
    widths
        The standard network's: filters by name, as ``build`` takes them; one a layer, or one a stage.
        ``pyprune.models.standard_widths`` has those of pyprune's networks.
    threshold
        t: two filters with Psi above it are alike.
    target
        How far lambda may lie above that of random kernels of the same shape (0.05 for 3x3 kernels on one channel, 0 on
        many: see docs/ckrm.md).
    tolerance
        How far the mean validation score of a step may lie below that of the standard network, in its units.
    runs
        Networks that are trained at each set of widths; run i of every step has the seed ``seed + i``.
    budget
        Trainings in all. Repetitions count, and one that is due is made even beyond it.
    coupled
        Groups of names that must stay equal.
    silent
        What happens to widths whose lambda says nothing from the start: ``"narrow"`` or ``"keep"``.
    shrink
        Smallest share of a width that stays in one step, in (0, 1).
    smallest
        No width goes below it, at least 2: a single filter is like no other.
    round_to
        Widths are multiples of it, rounded up.
    patience
        The search stops early after so many steps in a row whose validation fell.
    metric
        Name of the score that decides; by default the first.
    test
        Like ``evaluate``, on images that nothing is decided by; its scores are reported.
    eps
        Of :func:`pyprune.ckrm`.
    seed
        Of the first run.
    folder
        Where every run is kept as soon as it exists, with its weights: a search that was stopped, at whatever point,
        goes on from there, and one that is given a larger budget adds to it. ``search.json`` is the result,
        ``report.html`` shows it, and ``narrow.safetensors`` is the best run of the smallest network that holds.
    fresh
        Whether to start over in a folder that holds a search.
    about
        What else the results depend on, such as data and epochs, as plain JSON values; kept in the result, and
        ``folder`` is refused if it holds a search with others.
    progress
        Whether to show a progress bar.

    Returns
    -------
    WidthSearch
        ``widths`` are those of the smallest network that holds; ``print`` shows all steps. A run whose loss or score
        is not finite is repeated once with another seed, then given up: its step does not hold, and is kept with the
        reason. If that is the first step, the search ends there.

    Raises
    ------
    ValueError
        If an argument is out of range; a coupling names an unknown width or joins different ones; ``build`` fails,
        ignores a width, or returns the same network twice; the network has no kernel larger than 1x1; scores are
        missing; or ``folder`` holds another search.
    TypeError
        If ``build`` returns no module, or a score is no number.

    Examples
    --------
    >>> import functools
    >>> import pyprune as pp
    >>> from pyprune import data, models
    >>> digits = data.digits()
    >>> search = pp.optimize_widths(
    ...     lambda widths: models.vgg_digits(widths=widths),
    ...     functools.partial(pp.finetune, train=data.loader(digits.train, shuffle=True), epochs=1),
    ...     lambda model: pp.evaluate(model, data.loader(digits.val)),
    ...     widths={"block1": 8, "block2": 8}, runs=1, budget=2,
    ... )
    >>> len(search.steps)
    2
    """
    rules = _rules(
        threshold=threshold, target=target, tolerance=tolerance, shrink=shrink, smallest=smallest, round_to=round_to,
        silent=silent, patience=patience, runs=runs, budget=budget, eps=eps, seed=seed,
    )  # fmt: skip
    units = _units(widths, coupled)
    with _seeded(seed):
        layers = _responding(build, dict(widths), units, rules)
    settings = {
        "widths": dict(widths), "coupled": sorted(map(list, units)), "metric": metric, "test": test is not None,
        **{name: value for name, value in vars(rules).items() if name != "budget"}, **(about or {}),
    }  # fmt: skip
    run = Run("optimize_widths", folder, settings, fresh, _OWNED)
    trainer = _Trainer(build, train, evaluate, test, metric, rules, run)
    options = {**settings, "budget": budget}
    steps: list[WidthStep] = []
    proposal = {name: (width, "as given") for name, width in widths.items()}

    def search(stopped: str) -> WidthSearch:
        decides = trainer.metric or metric or "score"
        plain = WidthSearch(tuple(steps), layers, decides, stopped, options=options)
        return replace(plain, notes=_notes(plain, rules))

    with bar("width search", budget, progress) as advance:
        while True:
            trained = trainer.trained
            steps.append(trainer.step(len(steps), proposal, steps[0] if steps else None, advance))
            found = search("not yet")
            if trainer.trained > trained and run.folder is not None:  # one that goes on never shows less than before
                found.save(run.folder / "search.json")
            decided = _next(found, units, rules)
            if isinstance(decided, str):
                break
            proposal = decided
    result = search(decided)
    if run.folder is not None:
        _keep(result, run.folder)
    return result


def _keep(search: WidthSearch, folder: Path) -> None:
    """Write the result last, behind what is made from it: where it lies already, nothing is left to be done."""
    path, step = folder / "search.json", search.narrow
    if path.exists() and WidthSearch.load(path).to_json() == search.to_json():
        return
    if step.runs:
        best = int(np.argmax(step.validation(search.metric)))
        name = f"step_{search.steps.index(step)}/run_{best}_{len(step.runs[best].failures)}.safetensors"
        files.write_bytes(folder / "narrow.safetensors", (folder / name).read_bytes())
    report(search, folder / "report.html")
    search.save(path)


def _rules(**given: Any) -> _Rules:
    """Check every number."""
    rules = _Rules(**given)
    for name, least in (("smallest", 2), ("round_to", 1), ("patience", 1), ("runs", 1), ("budget", 1)):
        value = getattr(rules, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"optimize_widths: {name} must be a whole number of at least {least}; got {value!r}.")
    for name, high in (("threshold", 1), ("target", 1), ("tolerance", math.inf)):
        if not 0 <= getattr(rules, name) <= high or not math.isfinite(getattr(rules, name)):
            top = "finite" if high == math.inf else f"at most {high}"
            raise ValueError(f"optimize_widths: {name} must be at least 0 and {top}; got {getattr(rules, name)!r}.")
    if not 0 < rules.eps < math.inf:
        raise ValueError(f"optimize_widths: eps must be positive and finite; got {rules.eps!r}.")
    if not 0 < rules.shrink < 1:
        raise ValueError(f"optimize_widths: shrink must lie between 0 and 1; got {rules.shrink!r}.")
    if rules.silent not in ("narrow", "keep"):
        raise ValueError(f"optimize_widths: silent must be 'narrow' or 'keep'; got {rules.silent!r}.")
    if isinstance(rules.seed, bool) or not isinstance(rules.seed, int):
        raise TypeError(f"optimize_widths: seed must be a whole number; got {rules.seed!r}.")
    if rules.budget < rules.runs:
        raise ValueError(
            f"optimize_widths: budget must allow the {rules.runs} runs of the standard network; got {rules.budget} "
            "trainings. Raise it, or ask for fewer runs."
        )
    return rules


def _units(widths: Mapping[str, int], coupled: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Return the names that change together, in the order of ``widths``."""
    if not isinstance(widths, Mapping) or not widths:
        raise ValueError(f"optimize_widths: widths must map at least one name to its filters; got {widths!r}.")
    for name, width in widths.items():
        if not isinstance(name, str) or isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(
                f"optimize_widths: widths must be whole numbers of at least 1, by name; got {name!r}: {width!r}."
            )
    group = {name: {name} for name in widths}
    for names in coupled:
        if isinstance(names, str):
            raise TypeError(f"optimize_widths: coupled must hold groups of names; got {names!r}. Put it in a list.")
        for name in names:
            if name not in widths:
                hint = did_you_mean(name, widths, f"There are {', '.join(list(widths)[:8])}.")
                raise ValueError(f"optimize_widths: coupled names no width {name!r}.{hint}")
        joined = set().union(*(group[name] for name in names))
        for name in joined:
            group[name] = joined
        if len({widths[name] for name in joined}) > 1:
            shown = ", ".join(f"{name} {widths[name]}" for name in widths if name in joined)
            raise ValueError(
                f"optimize_widths: coupled widths must be equal, and these are not: {shown}. Give them one width, or "
                "couple them apart."
            )
    return list(dict.fromkeys(tuple(name for name in widths if name in group[first]) for first in widths))


def _responding(
    build: Build, widths: dict[str, int], units: list[tuple[str, ...]], rules: _Rules
) -> dict[str, tuple[str, ...]]:
    """Return, by name, the convolutions with kernels larger than 1x1 whose filters change with a width.

    That is tried: one network is built as it stands, and one more for each width that is free.
    """
    whole = _built(build, widths)
    measured = read_networks("optimize_widths", whole)["network"].layers
    filters, shapes = _filters(whole), _shapes(whole)
    found: dict[str, tuple[str, ...]] = {}
    for unit in units:
        width = widths[unit[0]]
        narrower = _rounded(width * rules.shrink, rules.round_to)
        other = narrower if narrower < width else width + rules.round_to
        changed = _built(build, {**widths, **dict.fromkeys(unit, other)}, unit)
        if changed is whole:
            raise ValueError("optimize_widths: build must return a new network each time; it returned the same one.")
        if _shapes(changed) == shapes:
            raise ValueError(
                f"optimize_widths: build must use every width; {_named(unit)} = {other} instead of {width} changed "
                "nothing. Leave it out of widths, or have build use it."
            )
        own = _filters(changed)
        layers = tuple(name for name in measured if name in own and own[name] != filters[name])
        found.update(dict.fromkeys(unit, layers))
    if not any(measured[layer].pairs for layers in found.values() for layer in layers):
        raise ValueError(
            "optimize_widths: no width belongs to a 2-d convolution with pairs of kernels larger than 1x1, so that "
            f"lambda says nothing about any. Free those of {', '.join(list(measured)[:4])}."
        )
    return found


def _built(build: Build, widths: dict[str, int], unit: Sequence[str] = ()) -> nn.Module:
    """Return the network of ``build``, whose own errors are told with the widths that it got."""
    try:
        model = build(dict(widths))
    except Exception as error:
        if unit:
            hint = (
                f"with {_named(unit)} = {widths[unit[0]]} and all others as given. Every width must be free: couple it "
                "with those that must equal it (coupled=[(...), ...]), or leave it out"
            )
        else:
            hint = f"for widths {widths}"
        raise ValueError(f"optimize_widths: build failed {hint} ({type(error).__name__}: {error}).") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize_widths: build must return a torch.nn.Module; it returned {type(model).__name__}.")
    return model


def _named(unit: Sequence[str]) -> str:
    return " = ".join(unit)


def _filters(model: nn.Module) -> dict[str, int]:
    return {name: int(module.out_channels) for name, module in model.named_modules() if hasattr(module, "out_channels")}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _rounded(width: float, round_to: int) -> int:
    """Return ``width`` rounded up to a multiple; what floating point adds to a whole number does not count."""
    return math.ceil(width / round_to - 1e-9) * round_to


@dataclass
class _Trainer:
    """Trains the runs of one step after the other, and keeps each in the folder."""

    build: Build
    train: Callable[..., Any]
    evaluate: Callable[[nn.Module], Any]
    test: Callable[[nn.Module], Any] | None
    metric: str | None
    rules: _Rules
    run: Run
    trained: int = 0

    def step(
        self, number: int, proposal: Mapping[str, tuple[int, str]], standard: WidthStep | None,
        advance: Callable[..., None],
    ) -> WidthStep:  # fmt: skip
        """Train all runs of a step and say whether it holds."""
        widths = {name: width for name, (width, _) in proposal.items()}
        why = {name: reason for name, (_, reason) in proposal.items()}
        runs: list[WidthRun] = []
        given_up: dict[str, str] = {}
        for index in range(self.rules.runs):
            advance(0, f"step {number}, run {index}")
            name = f"step_{number}/run_{index}"
            try:
                made = self.run.stage("train", f"{name}.json", WidthRun, partial(self._attempts, name, index, widths))
            except _GivenUpError as error:
                given_up[str(index)] = str(error)
                advance(2)
                continue
            if dict(made.widths) != widths:
                raise ValueError(
                    f"optimize_widths: {self.run.path(name)}.json is of other widths, {dict(made.widths)}. Choose "
                    "another folder, or start over with fresh=True (--fresh)."
                )
            self._decides(made.validation)
            runs.append(made)
            advance(1 + len(made.failures))
        found = WidthStep(widths, why, tuple(runs), given_up, holds=not given_up)
        if standard is None or given_up:
            return found
        before, after = (float(step.validation(str(self.metric)).mean()) for step in (standard, found))
        return replace(found, holds=after >= before - self.rules.tolerance)

    def _attempts(self, name: str, index: int, widths: dict[str, int]) -> WidthRun:
        """Train a network, and once more with another seed if the first try diverges."""
        path = self.run.path(f"{name}.failed.json")
        failures: list[str] = []
        if path is not None and path.exists():
            content = files.read_json("optimize_widths", path, "pyprune.width_failures", 1)
            try:
                failures = list(reading.texts(content, "failures"))
            except (KeyError, TypeError) as error:
                raise ValueError(f"optimize_widths: {path} lacks or garbles {error}.") from None
        while len(failures) < 2:
            seed = self.rules.seed + index + REPEATED * len(failures)
            try:
                return replace(self._attempt(f"{name}_{len(failures)}", seed, widths), failures=tuple(failures))
            except (Diverged, ArithmeticError) as error:
                failures.append(f"run {index} (seed {seed}): {error}")
            if path is not None:
                files.write_json(path, {"format": "pyprune.width_failures", "version": 1, "failures": failures})
        raise _GivenUpError("; ".join(failures))

    def _attempt(self, name: str, seed: int, widths: dict[str, int]) -> WidthRun:
        self.trained += 1
        checkpoint, weights = (self.run.path(f"{name}{end}.safetensors") for end in (".training", ""))
        known = {"seed": seed} | ({} if checkpoint is None else {"checkpoint": checkpoint})
        start = time.perf_counter()
        with _seeded(seed):
            model = _built(self.build, widths)
            told = self.train(model, **_asked(self.train, known))
            bad = [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
            if bad:
                raise Diverged(f"weights of {bad[0]} are NaN or infinite after training")
            validation = _scores("evaluate", self.evaluate(model))
            test = {} if self.test is None else _scores("test", self.test(model))
        seconds = time.perf_counter() - start
        self._decides(validation)
        if weights is not None:
            files.write_tensors(weights, model.state_dict(), {"seed": str(seed)})
            if isinstance(told, History):
                told.save(weights.with_suffix(".history.json"))
        redundancy = ckrm(model, thresholds=self.rules.threshold, eps=self.rules.eps, progress=False)
        distinct = distinct_filters(model, threshold=self.rules.threshold, eps=self.rules.eps)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        return WidthRun(seed, widths, parameters, validation, test, distinct, redundancy, seconds)

    def _decides(self, validation: Mapping[str, float]) -> None:
        """Settle which score decides: the one asked for, or the first that comes."""
        self.metric = self.metric or next(iter(validation))
        if self.metric not in validation:
            raise ValueError(
                f"optimize_widths: evaluate must return {self.metric!r}, which decides; it returned "
                f"{', '.join(validation)}."
            )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed every generator on every device, and give the caller's states back."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    with randomness.given_back(*devices):
        randomness.seed_all(seed, *devices)
        yield


def _asked(function: Callable[..., Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of ``known`` the signature of ``function`` names and the caller has not bound already."""
    bound = function.keywords if isinstance(function, partial) else {}
    try:
        names = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return {}
    return {name: value for name, value in known.items() if name in names and name not in bound}


def _scores(who: str, given: Any) -> dict[str, float]:
    """Return scores by name: AUC and top-1 of an evaluation, a mapping as it is, a number as ``"score"``."""
    if isinstance(given, Evaluation):
        named: dict[str, Any] = {"auc": given.auc, "top1": given.top1}
        named = {name: value for name, value in named.items() if value is not None}
    else:
        named = dict(given) if isinstance(given, Mapping) else {"score": given}
    found = {}
    for name, value in named.items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several numbers
            raise TypeError(
                f"optimize_widths: {who} must return a number, numbers by name, or a pyprune Evaluation; {name!r} is "
                f"{type(value).__name__}."
            ) from None
    if not found:
        raise ValueError(f"optimize_widths: {who} must return at least one score; it returned none.")
    for name, number in found.items():
        if not math.isfinite(number):
            raise Diverged(f"{who} returned {name} = {number}")
    return found


def _next(search: WidthSearch, units: list[tuple[str, ...]], rules: _Rules) -> dict[str, tuple[int, str]] | str:
    """Return the widths to try next, each with its reason, or why the search ends."""
    steps = search.steps
    if not steps[0].holds:
        return f"the standard network could not be trained: {'; '.join(steps[0].given_up.values())}"
    fallen = next((n for n, step in enumerate(reversed(steps)) if step.holds), 0)  # steps in a row that do not hold
    if fallen >= rules.patience:
        return f"validation fell in {fallen} steps in a row"
    proposal = _widened(search, units, rules) if fallen else _narrowed(search, units, rules)
    if all(width == steps[-1].widths[name] for name, (width, _) in proposal.items()):
        return _settled(search, rules)
    if any(all(width == step.widths[name] for name, (width, _) in proposal.items()) for step in steps):
        return _settled(search, rules)
    if search.trainings + rules.runs > rules.budget:
        return f"the budget is spent: {search.trainings} of {rules.budget} trainings"
    return proposal


def _settled(search: WidthSearch, rules: _Rules) -> str:
    above = [
        f"{name} (lambda {search.redundancy(search.narrow, name):.4f})"
        for name in search.widths
        if search.excess(search.narrow, name) > rules.target
    ]
    if above:
        return f"nothing narrower is left to try; still redundant: {', '.join(above)}"
    return "no width is redundant any more, and nothing narrower is left to try"


def _narrowed(search: WidthSearch, units: list[tuple[str, ...]], rules: _Rules) -> dict[str, tuple[int, str]]:
    """Propose narrower widths after a step that holds."""
    last = search.steps[-1]
    proposal: dict[str, tuple[int, str]] = {}
    for unit in units:
        width = last.widths[unit[0]]
        wanted, why = _wanted(search, unit, rules)
        floor = _floor(search, unit[0])
        if floor:  # narrower than this validation fell
            between = _rounded(math.sqrt(width * floor), rules.round_to)
            if width < CLOSE * floor or between in (width, floor):
                wanted, why = width, f"stays: {floor} was too few"
            elif wanted < between:
                wanted, why = between, f"between {floor}, where validation fell, and {width}"
        smallest = _rounded(rules.smallest, rules.round_to)
        bounded = min(max(wanted, smallest), width)
        if bounded > wanted:
            why = f"{why}; no fewer than {smallest}"
        proposal.update(dict.fromkeys(unit, (bounded, why)))
    return proposal


def _wanted(search: WidthSearch, unit: tuple[str, ...], rules: _Rules) -> tuple[int, str]:
    """Return the width that lambda asks for, and why: the rule of section 3.3, made definite."""
    standard, last, name = search.standard, search.steps[-1], unit[0]
    width, excess = last.widths[name], search.excess(last, name)
    least = _rounded(width * rules.shrink, rules.round_to)
    if excess > rules.target:
        layer, distinct = _most_redundant(search, last, name, rules)
        found, chance = search.by_layer(last, name)[layer]
        most = int(width * (1 - LEAST_STEP)) // rules.round_to * rules.round_to
        why = f"lambda {found:.4f} in {layer}, {chance:.4f} by chance: {distinct:.4g} of {width} filters are distinct"
        return max(least, min(_rounded(distinct, rules.round_to), most)), why
    started = search.excess(standard, name)
    if started > rules.target:
        return width, f"stays: lambda has come down to {search.redundancy(last, name):.4f}"
    if rules.silent == "keep":
        return width, "stays: lambda says nothing"
    told = "no kernels with pairs" if math.isnan(started) else f"lambda {search.redundancy(standard, name):.4f}"
    return least, f"{told} at the start: narrowed under the validation tolerance"


def _most_redundant(search: WidthSearch, step: WidthStep, name: str, rules: _Rules) -> tuple[str, float]:
    """Return the redundant layer of a width with the fewest distinct filters (mean over the runs), and their number."""
    by_layer = search.by_layer(step, name)
    distinct = {
        layer: float(np.mean([run.distinct[layer] for run in step.runs]))
        for layer, (found, chance) in by_layer.items()
        if found - chance > rules.target
    }
    return min(distinct.items(), key=lambda item: item[1])


def _floor(search: WidthSearch, name: str) -> int:
    """Return the widest at which validation fell since the width was narrowed there; 0 if it never did."""
    held = search.narrow.widths[name]
    return max((step.widths[name] for step in search.steps if not step.holds and step.widths[name] < held), default=0)


def _widened(search: WidthSearch, units: list[tuple[str, ...]], rules: _Rules) -> dict[str, tuple[int, str]]:
    """Propose wider widths after a step that does not hold: first those that lambda had not asked to narrow."""
    last = search.steps[-1]
    held = next(step for step in reversed(search.steps) if step.holds)
    narrower = [unit for unit in units if last.widths[unit[0]] < held.widths[unit[0]]]
    silent = [unit for unit in narrower if not search.excess(held, unit[0]) > rules.target]
    proposal = {name: (width, "stays") for name, width in last.widths.items()}
    for unit in silent or narrower:
        low, high = last.widths[unit[0]], held.widths[unit[0]]
        between = min(_rounded(math.sqrt(low * high), rules.round_to), high)
        wide = high if high < CLOSE * low or between in (low, high) else between
        proposal.update(dict.fromkeys(unit, (wide, f"validation fell at {low}, and held at {high}")))
    return proposal


def _notes(search: WidthSearch, rules: _Rules) -> tuple[str, ...]:
    """Say what the figures alone do not."""
    standard = search.standard
    silent = [name for name in search.layers if standard.runs and not search.excess(standard, name) > rules.target]
    notes = []
    if silent:
        what = "narrowed under the validation tolerance alone" if rules.silent == "narrow" else "left as they are"
        notes.append(
            f"from the start lambda is at most {rules.target:g} above that of random kernels in {', '.join(silent)}: "
            f"it says nothing about these widths, which are {what}."
        )
    free = {layer for own in search.layers.values() for layer in own}
    fixed = [name for run in standard.runs[:1] for name in run.redundancy.layers() if name not in free]
    if fixed:
        notes.append(f"no width changes {', '.join(fixed)}.")
    for number, step in enumerate(search.steps):
        notes += [f"step {number}, run {run} was given up: {why}." for run, why in step.given_up.items()]
    return tuple(notes)
