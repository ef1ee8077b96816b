"""The whole road of CRank on one screen: rank, select, mask, fine-tune, compact, save. Read this first."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from pyprune import files
from pyprune.compaction import compact
from pyprune.criteria import Criterion
from pyprune.export import save_slim
from pyprune.finetuning import finetune
from pyprune.masks import mask_
from pyprune.measure import evaluate, first_image
from pyprune.ranks import rank_filters
from pyprune.reporting import report
from pyprune.resuming import Run
from pyprune.selection import check_method, select
from pyprune.types import ClassRanks, Evaluation, Plan, PruneResult


def prune(
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    test: Iterable[Any] | None = None,
    ranking: Iterable[Any] | None = None,
    num_classes: int | None = None,
    images_per_class: int = 50,
    taps: str = "activation",
    method: str | Criterion = "crank",
    rates: Any = None,
    exclude: Sequence[str] = (),
    residual: Literal["scatter", "intersect", "union"] = "scatter",
    finetune_on: Literal["slim", "masked"] = "slim",
    epochs: int = 30,
    steps: int | None = None,
    lr: float = 0.01,
    device: str | torch.device | None = None,
    folder: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
    **selection: Any,
) -> PruneResult:
    """Prune ``model`` from end to end and return the slim network with everything learnt on the way.

    Parameters
    ----------
    model
        A trained classifier of images [N, C, H, W]. It is copied and never changed.
    train, val, test
        Loaders of (images, labels). ``train`` fine-tunes, ``val`` chooses the best epoch, ``test`` only measures;
        without ``test`` the evaluations use ``val``, and without that ``train``.
    ranking
        Where the ranked images come from, without augmentation; by default ``train``.
    num_classes
        Number of classes; by default the largest label seen while ranking, plus one.
    images_per_class, taps
        Images a class that are ranked (thesis: 50, and 10 for ImageNet), and where their maps are read.
    method, rates, exclude
        As for :func:`pyprune.select`. Criteria that look at data are given ``ranking``.
    residual
        What happens where branches are added; see :func:`pyprune.compact`.
    finetune_on
        ``"slim"`` fine-tunes the compacted network: several times cheaper, and equivalent for chains with affine
        norms. ``"masked"`` fine-tunes the masked network and compacts afterwards, as the thesis does.
    epochs, steps, lr
        Of the fine-tuning: stochastic gradient descent, annealed (thesis section 5.1); see :func:`pyprune.finetune`.
    device
        Where to compute; by default where the model's parameters are.
    folder
        If given, ranks, plan, history, evaluations, the slim folder and ``report.html`` are written there, each as
        soon as it exists. A run that was stopped goes on from what it finds, and ends as if it had not been.
    fresh
        Whether to start over in a folder that holds a run.
    seed
        For the sample of images and the order of training.
    log
        Receives one row per epoch of fine-tuning.
    **selection
        More for :func:`pyprune.select`: ``budget``, ``coupled``, ``min_keep``, and options of the criterion.

    Raises
    ------
    ValueError
        From the stage that was given something it cannot work with; each names itself. Also if ``folder`` holds the
        run of another model or of other settings.
    """
    if finetune_on not in ("slim", "masked"):
        raise ValueError(f'prune: finetune_on must be "slim" or "masked"; got {finetune_on!r}.')
    criterion, chosen = check_method("prune", method, selection)
    settings = {
        "weights": files.fingerprint(model.state_dict()), "images_per_class": images_per_class, "taps": taps,
        "method": criterion.name, "rates": rates.to_json()["keep"] if isinstance(rates, Plan) else rates,
        "exclude": sorted(exclude), "residual": residual, "finetune_on": finetune_on, "epochs": epochs, "steps": steps,
        "lr": lr, "seed": seed, "selection": chosen,
    }  # fmt: skip
    run = Run("prune", folder, settings, fresh, _OURS)
    place: dict[str, Any] = {"device": device, "progress": progress}
    judge = next(loader for loader in (test, val, train) if loader is not None)

    def score(name: str, network: nn.Module) -> None:
        def measured() -> Evaluation:
            return evaluate(network, judge, num_classes=ranks.num_classes, **place)

        scores[name] = run.stage("evaluate", f"evaluation_{name}.json", Evaluation, measured)

    def tune(network: nn.Module, **masks: Any) -> Any:
        with run.timed("finetune"):
            return finetune(
                network, train, val, epochs=epochs, steps=steps, lr=lr, seed=seed, log=log,
                checkpoint=run.path("training.safetensors"), **place, **masks,
            )  # fmt: skip

    def rank() -> ClassRanks:
        return rank_filters(
            model, train if ranking is None else ranking, num_classes=num_classes, images_per_class=images_per_class,
            taps=taps, seed=seed, checkpoint=run.path("ranking.safetensors"), **place,
        )  # fmt: skip

    def choose() -> Plan:
        return select(
            model, method, ranks=ranks, data=train if ranking is None else ranking, example_inputs=example, rates=rates,
            exclude=exclude, **place, **selection,
        )  # fmt: skip

    scores: dict[str, Evaluation] = {}
    example = first_image("prune", train)
    ranks = run.stage("rank", "ranks.safetensors", ClassRanks, rank)
    plan = run.stage("select", "plan.json", Plan, choose)

    masked = copy.deepcopy(model)
    masks = mask_(masked, plan)
    score("original", model)
    score("masked", masked)
    if finetune_on == "masked":
        history = tune(masked, masks=masks)
        score("finetuned", masked)
    with run.timed("compact"):
        slim = compact(masked, plan, example, residual=residual)
    if finetune_on == "slim":
        history = tune(slim.model)
    score("slim", slim.model)

    result = PruneResult(ranks, plan, history, slim, scores, run.seconds)
    if run.folder is not None:
        history.save(run.folder / "history.json")
        save_slim(slim, run.folder / "slim")
        report(result, run.folder / "report.html")
    return result


_OURS = (
    "run.json", "ranks.safetensors", "ranking.safetensors", "plan.json", "training.safetensors", "history.json",
    "evaluation_*.json",
)  # fmt: skip
