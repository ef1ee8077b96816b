"""The whole road of CRank on one screen: rank, select, mask, fine-tune, compact, save. Read this first."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from pyprune import files
from pyprune.compaction import compact
from pyprune.export import save_slim
from pyprune.finetuning import finetune
from pyprune.masks import mask_
from pyprune.measure import evaluate
from pyprune.ranks import rank_filters
from pyprune.reporting import report
from pyprune.selection import select
from pyprune.types import Evaluation, PruneResult


def prune(
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    test: Iterable[Any] | None = None,
    ranking: Iterable[Any] | None = None,
    images_per_class: int = 50,
    exclude: tuple[str, ...] = (),
    finetune_on: Literal["slim", "masked"] = "slim",
    epochs: int = 30,
    lr: float = 0.01,
    num_classes: int | None = None,
    device: str | torch.device | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    log: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> PruneResult:
    """Prune ``model`` by CRank from end to end and return the slim network with everything learnt on the way.

    Parameters
    ----------
    model
        A trained classifier of images [N, C, H, W]. It is copied and never changed.
    train, val, test
        Loaders of (images, labels). ``train`` fine-tunes, ``val`` chooses the best epoch, ``test`` only measures;
        without ``test`` the evaluations use ``val``, and without that ``train``.
    ranking
        Where the ranked images come from, without augmentation; by default ``train``.
    images_per_class
        Images a class that are ranked (thesis: 50, and 10 for ImageNet).
    exclude
        Convolutions that keep every filter.
    finetune_on
        ``"slim"`` fine-tunes the compacted network: several times cheaper, and equivalent for chains with affine
        norms. ``"masked"`` fine-tunes the masked network and compacts afterwards, as the thesis does.
    epochs, lr
        Of the fine-tuning: stochastic gradient descent, annealed (thesis section 5.1).
    num_classes
        Number of classes; by default the largest label seen while ranking, plus one.
    device
        Where to compute; by default where the model's parameters are.
    folder
        If given, ranks, plan, history, evaluations, the slim folder and ``report.html`` are written there.
    seed
        For the sample of images and the order of training.
    log
        Receives one row per epoch of fine-tuning; see :func:`pyprune.finetune`.

    Raises
    ------
    ValueError
        From the stage that was given something it cannot work with; each names itself.
    """
    if finetune_on not in ("slim", "masked"):
        raise ValueError(f'prune: finetune_on must be "slim" or "masked"; got {finetune_on!r}.')
    out = None if folder is None else files.make_folder("prune", folder)
    seconds: dict[str, float] = {}
    scores: dict[str, Evaluation] = {}
    judge = next(loader for loader in (test, val, train) if loader is not None)

    def score(name: str, network: nn.Module) -> None:
        with _timed(seconds, "evaluate"):
            scores[name] = evaluate(network, judge, num_classes=ranks.num_classes, device=device, progress=progress)

    def tune(network: nn.Module, **masks: Any) -> Any:
        with _timed(seconds, "finetune"):
            return finetune(
                network, train, val, epochs=epochs, lr=lr, device=device, seed=seed, log=log, progress=progress, **masks
            )  # fmt: skip

    with _timed(seconds, "rank"):
        ranks = rank_filters(
            model, train if ranking is None else ranking, num_classes=num_classes,
            images_per_class=images_per_class, device=device, seed=seed, progress=progress,
        )  # fmt: skip
    with _timed(seconds, "select"):
        plan = select(model, "crank", ranks=ranks, exclude=exclude, progress=progress)

    example = _example(train)
    masked = copy.deepcopy(model)
    masks = mask_(masked, plan)
    score("original", model)
    score("masked", masked)
    if finetune_on == "masked":
        history = tune(masked, masks=masks)
        score("finetuned", masked)
    with _timed(seconds, "compact"):
        slim = compact(masked, plan, example)
    if finetune_on == "slim":
        history = tune(slim.model)
    score("slim", slim.model)

    result = PruneResult(ranks, plan, history, slim, scores, seconds)
    if out is not None:
        with _timed(seconds, "save"):
            ranks.save(out / "ranks.safetensors")
            plan.save(out / "plan.json")
            history.save(out / "history.json")
            for name, evaluation in scores.items():
                evaluation.save(out / f"evaluation_{name}.json")
            save_slim(slim, out / "slim")
            report(result, out / "report.html")
    return result


def _example(train: Iterable[Any]) -> torch.Tensor:
    """Return one image as a batch, [1, C, H, W]."""
    for images, _ in train:
        first: torch.Tensor = images[:1]
        return first
    raise ValueError("prune: the training loader is empty; it must yield (images, labels).")


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
