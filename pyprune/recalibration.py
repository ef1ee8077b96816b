"""Recalibration: the running statistics of norms, estimated anew for the network as it is now."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pyprune import measure
from pyprune.progress import bar
from pyprune.wrappers import unwrapped

_STATISTICS = ("running_mean", "running_var")


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    reset: bool = True,
    momentum: float | None = None,
    batches: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> tuple[str, ...]:
    """Estimate the running statistics of every norm anew, from images alone, in place.

    Filters that left, or weights that were trained without the norms, leave statistics behind that no longer fit
    what reaches the norms. One pass over some images without gradients mends that and changes no parameter. Each
    batch counts the same: the statistics are the plain mean over the batches, as torch computes it with
    ``momentum=None``, with unbiased variances.

    Only norms with running statistics are in training mode meanwhile, so that dropout stays off; the training flags,
    momenta and counters of batches are as before afterwards. The same images in the same batches give the same bits.

    Parameters
    ----------
    model
        Any network, wrapped for data parallelism or not.
    loader
        Yields tensors of images [N, ...], or tuples that begin with one, as (images, labels).
    reset
        Forget the statistics so far. Otherwise the mean goes on from them, weighed with the number of batches that
        each norm has counted.
    momentum
        Weigh later batches more: ``running = (1 - momentum) * running + momentum * batch``, from 0 and 1 after a
        reset. ``None`` is the mean over the batches.
    batches
        How many batches to take; all by default.
    device
        Where to run; by default where the model is. The model is moved back afterwards.
    progress
        Whether a progress bar is shown on a terminal.

    Returns
    -------
    tuple of str
        The norms that have new statistics. It is empty, with a warning, where the model has none to estimate.

    Raises
    ------
    ValueError, TypeError
        If a setting is out of range, the loader is empty or yields no images, or statistics come out as NaN or
        infinite. Whenever it is broken off, the model has its old statistics.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    >>> recalibrate(model, [torch.ones(4, 1, 3, 3)], progress=False)
    ('1',)
    """
    _check(momentum, batches)
    model, _ = unwrapped(model)
    norms = {name: module for name, module in model.named_modules() if _has_statistics(module)}
    if not norms:
        warnings.warn(
            f"recalibrate: {type(model).__name__} has no norm with running statistics; nothing was done.", stacklevel=2
        )
        return ()
    with measure.running(model, device) as place, _restoring(norms) as settle, torch.no_grad():
        calls = _count_calls(norms, reset, momentum)
        seen = 0
        total = batches if not isinstance(loader, Sized) else min(len(loader), batches or len(loader))
        with calls as counts, bar("recalibrate", total, progress) as advance:
            for position, batch in enumerate(itertools.islice(loader, batches)):
                images = _images(batch, position)
                model(images.to(place))
                seen += len(images)
                advance()
        if not seen:
            raise ValueError("recalibrate: needs at least one image; the loader is empty.")
        found = tuple(name for name in norms if counts[name])
        _check_finite(norms, found)
        settle(found)
    return found


def _check(momentum: float | None, batches: int | None) -> None:
    if momentum is not None and not (isinstance(momentum, (int, float)) and 0 < momentum <= 1):
        raise ValueError(f"recalibrate: momentum must be above 0 and at most 1, or None; got {momentum!r}.")
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise ValueError(f"recalibrate: batches must be a whole number of at least 1, or None; got {batches!r}.")


def _has_statistics(module: nn.Module) -> bool:
    """Say whether ``module`` is a batch or instance norm, of torch's or derived from one, that keeps statistics."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    return isinstance(module, kinds) and all(isinstance(getattr(module, leaf), torch.Tensor) for leaf in _STATISTICS)


@contextmanager
def _restoring(norms: Mapping[str, nn.Module]) -> Iterator[Any]:
    """Put everything back on leaving, but for the statistics of the norms that ``settle`` was called with."""
    before = {
        name: {leaf: value.clone() for leaf, value in module.named_buffers(recurse=False)}
        for name, module in norms.items()
    }
    momenta = {name: module.momentum for name, module in norms.items()}
    settled: set[str] = set()
    try:
        yield settled.update
    finally:
        with torch.no_grad():
            for name, module in norms.items():
                module.momentum = momenta[name]
                for leaf, value in before[name].items():
                    if leaf not in _STATISTICS or name not in settled:
                        getattr(module, leaf).copy_(value)


@contextmanager
def _count_calls(norms: Mapping[str, nn.Module], reset: bool, momentum: float | None) -> Iterator[dict[str, int]]:
    """Let the norms estimate, each call of one with the weight that it must have; yield the calls so far.

    The weight is set rather than left to ``momentum=None``, which instance norms take for "keep the old ones".
    """
    counts = dict.fromkeys(norms, 0)
    before = {name: 0 if reset else _counted(module) for name, module in norms.items()}
    names = {module: name for name, module in norms.items()}

    def weigh(module: Any, _: Any) -> None:
        name = names[module]
        counts[name] += 1
        module.momentum = 1.0 / float(before[name] + counts[name]) if momentum is None else momentum

    handles = []
    try:
        for module in norms.values():
            if reset:
                module.reset_running_stats()  # type: ignore[operator]
            module.training = True
            handles.append(module.register_forward_pre_hook(weigh))
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _counted(module: nn.Module) -> int:
    count = module.num_batches_tracked
    return int(count) if isinstance(count, torch.Tensor) else 0


def _images(batch: Any, position: int) -> torch.Tensor:
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, torch.Tensor) or images.ndim == 0:
        raise TypeError(
            "recalibrate: the loader must yield images [N, ...], alone or first in a tuple; "
            f"batch {position} is of type {type(batch).__name__}."
        )
    return images


def _check_finite(norms: Mapping[str, nn.Module], found: tuple[str, ...]) -> None:
    for name in found:
        for leaf in _STATISTICS:
            wrong = int((~getattr(norms[name], leaf).isfinite()).sum())
            if wrong:
                raise ValueError(
                    f"recalibrate: the statistics must be finite; {name}.{leaf} came out with {wrong} that are not. "
                    "Look for NaN or infinity in the images; the old statistics are back."
                )
