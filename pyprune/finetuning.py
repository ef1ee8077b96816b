"""Fine-tuning: training that respects masks, picks its best epoch, survives being killed, and repeats bit for bit."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pyprune import files, measure, randomness
from pyprune.loggers import as_log
from pyprune.progress import bar
from pyprune.types import Epoch, History

FORMAT = "pyprune.training"
VERSION = 1

CHOSEN_BY = {"top1": "validation top-1, then loss", "auc": "validation AUC, then loss"}
SCHEDULES = ("cosine", "step", "constant")
PRECISIONS = {"auto": None, "off": None, "bf16": torch.bfloat16, "fp16": torch.float16}

CHECK_EVERY = 32
"""Batches between two looks at the losses: each look makes the host wait for the GPU."""

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Objective = Callable[[nn.Module, tuple[Any, ...]], torch.Tensor]


class Diverged(ValueError):  # noqa: N818  a state of the training, named as such
    """Training came to NaN or infinity in ``epoch``, counted from 1; another seed or a lower rate may not."""

    def __init__(self, message: str, epoch: int = 0) -> None:
        super().__init__(message)
        self.epoch = epoch


class HasMasks(Protocol):
    """What fine-tuning needs of :class:`pyprune.masks.Masks`."""

    @property
    def model(self) -> nn.Module:
        """The masked model."""

    @property
    def dead(self) -> Mapping[str, Any]:
        """Masked rows by parameter name."""

    def reapply(self) -> None:
        """Zero them again."""


def finetune(
    model: nn.Module,
    train: Iterable[Any],
    val: Iterable[Any] | None = None,
    *,
    masks: HasMasks | None = None,
    epochs: int = 30,
    steps: int | None = None,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    schedule: Literal["cosine", "step", "constant"] = "cosine",
    loss: Loss | None = None,
    objective: Objective | None = None,
    patience: int | None = None,
    choose: Literal["top1", "auc"] = "top1",
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto",
    device: str | torch.device | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    log: Any = None,
    progress: bool = True,
) -> History:
    """Train ``model`` in place by stochastic gradient descent and leave it with the weights of its best epoch.

    The defaults are those of the thesis (section 5.1): 30 epochs, learning rate 0.01, momentum 0.9, weight decay
    5e-4, annealed. Batches come from ``train`` (the thesis uses 128 images).

    Every random number of an epoch, the order of the batches included, follows from ``seed`` and the epoch's
    number: the same call gives the same bits on a CPU with the same number of threads, and a run that was killed
    and continued ends with the bits of one that was not. The caller's random states are left alone.

    Parameters
    ----------
    model
        Returns class scores [N, C] for images [N, ...]. Only parameters that ask for gradients are trained.
    train
        Yields (images, labels) with labels [N] in [0, C); more than once.
    val
        The same, for choosing the epoch: highest top-1 (or AUC), then lowest loss, then the earliest. Never pass test
        data here. Without it the last epoch is kept, and ``History.options["chosen_by"]`` says so.
    masks
        What :func:`pyprune.mask_` returned for this model; reapplied after each optimizer step.
    epochs
        Passes over ``train``.
    steps
        Optimizer steps in all, instead of ``epochs``: the last pass ends early. ``train`` must have a length.
    lr, momentum, weight_decay
        Of torch's SGD.
    schedule
        ``"cosine"`` anneals from ``lr`` to zero, batch by batch (epoch by epoch where ``train`` has no length);
        ``"step"`` divides by ten after half and after three quarters of the epochs; ``"constant"`` does not anneal.
    loss
        Mean loss of a batch from (scores, labels); cross-entropy by default. Validation uses cross-entropy.
    objective
        In place of ``loss``, for losses that need more than scores and labels: ``objective(model, batch)`` runs the
        model itself and returns the mean loss of the batch, a scalar. ``batch`` is the tuple that ``train`` yielded,
        which may be longer than (images, labels), with its tensors on the device. Of what ``val`` yields only the
        first two are read.
    patience
        Stop after so many epochs without a better one on ``val``; the schedule is still that of all ``epochs``, and
        ``History.stopped`` says what happened.
    choose
        What makes an epoch the best on ``val``: ``"top1"``, or ``"auc"``, the mean one-against-rest AUC, where classes
        are unbalanced; every class then needs an image in ``val``.
    amp
        Mixed precision: ``"auto"`` is bfloat16 on a GPU that computes in it, float16 with loss scaling on an older
        one, and off on a CPU.
    device
        Where to train; by default where the model is. The model is moved back afterwards.
    seed
        Of the order of batches, dropout and augmentation in this process.
    checkpoint
        A file that holds the run after each epoch. If it is there, the run is continued from it; it must come
        from the same settings, masks and starting weights.
    log
        Receives a row per epoch (epoch, lr, train_loss, val_loss, val_top1, val_auc, seconds): a path for JSON lines,
        any callable, an object with ``.log_metrics``, ``.add_scalar`` or ``.log``, a :class:`pyprune.Watch`, or a list.
    progress
        Whether a progress bar is shown on a terminal.

    Returns
    -------
    History
        Epochs count from 1; ``best`` is the one whose weights the model holds now. The training loss is the mean
        over the images of the epoch, ``lr`` the rate of its first step.

    Raises
    ------
    TypeError, ValueError
        If a setting, a loader, a label or the checkpoint is not usable.
    Diverged
        A ValueError: a loss, or a score on ``val``, is NaN or infinite; its ``epoch`` says when. Whenever training is
        broken off, the model gets its best weights so far, or those it came with.

    Examples
    --------
    >>> from pyprune import data, models
    >>> digits = data.digits()
    >>> history = finetune(models.vgg_digits(widths=(4, 4)), data.loader(digits.train, shuffle=True), epochs=1)
    >>> history.best
    1
    """
    if steps is not None:
        epochs = _epochs_of(steps, train)
    options = {
        "epochs": epochs, "steps": steps, "lr": lr, "momentum": momentum, "weight_decay": weight_decay,
        "schedule": schedule,
        "loss": _name(objective or loss or F.cross_entropy), "amp": amp, "patience": patience,
        "seed": seed, "chosen_by": "last epoch, no validation data" if val is None else CHOSEN_BY.get(choose, choose),
    }  # fmt: skip
    _check_options(options)
    if loss is not None and objective is not None:
        raise ValueError("finetune: needs loss or objective; got both. Put what loss computes into the objective.")
    if choose not in CHOSEN_BY:
        raise ValueError(f"finetune: choose must be one of {', '.join(CHOSEN_BY)}; got {choose!r}.")
    if choose == "auc" and val is None:
        raise ValueError("finetune: choose='auc' needs val, on which the AUC is measured; got none. Pass val.")
    if patience is not None and val is None:
        raise ValueError(f"finetune: patience={patience} needs val, on which an epoch is better; got none. Pass val.")
    for name, loader in (("train", train), ("val", val)):
        _check_loader(name, loader)
    write = as_log("finetune", log)
    with measure.running(model, device, train=True) as place, _own_random_state(place, train, val) as reseed:
        run = _Run(model, train, loss or F.cross_entropy, objective, options, _precision(amp, place), place, masks)
        path = None if checkpoint is None else Path(checkpoint)
        try:
            if path is not None:
                run.open(path)
            with bar("fine-tune", steps or _steps(train, epochs), progress) as advance:
                for epoch in range(len(run.history) + 1, epochs + 1):
                    if run.stopped:
                        break
                    reseed(seed, epoch)
                    run.train_epoch(epoch, val, advance)
                    if path is not None:
                        run.save(path)
                    write(asdict(run.history[-1]))
        finally:
            run.finish()
    return History(tuple(run.history), run.best.epoch, options, run.stopped)


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` or ``TypeError`` for a setting that cannot be meant."""
    if isinstance(options["epochs"], bool) or not isinstance(options["epochs"], int) or options["epochs"] < 1:
        raise ValueError(f"finetune: epochs must be a whole number of at least 1; got {options['epochs']}.")
    if not 0 < options["lr"] < math.inf:
        raise ValueError(f"finetune: lr must be positive; got {options['lr']}.")
    if not 0 <= options["momentum"] < 1:
        raise ValueError(f"finetune: momentum must be in [0, 1); got {options['momentum']}.")
    if not 0 <= options["weight_decay"] < math.inf:
        raise ValueError(f"finetune: weight_decay must not be negative; got {options['weight_decay']}.")
    if options["schedule"] not in SCHEDULES:
        raise ValueError(f"finetune: schedule must be one of {', '.join(SCHEDULES)}; got {options['schedule']!r}.")
    if options["amp"] not in PRECISIONS:
        raise ValueError(f"finetune: amp must be one of {', '.join(PRECISIONS)}; got {options['amp']!r}.")
    patience = options["patience"]
    if patience is not None and (isinstance(patience, bool) or not isinstance(patience, int) or patience < 1):
        raise ValueError(f"finetune: patience must be a whole number of at least 1, or None; got {patience!r}.")
    if isinstance(options["seed"], bool) or not isinstance(options["seed"], int):
        raise TypeError(f"finetune: seed must be a whole number; got {options['seed']!r}.")


def _check_loader(name: str, loader: Iterable[Any] | None) -> None:
    """Raise for a loader that can be seen to be useless before anything is trained."""
    if isinstance(loader, Iterator):
        raise TypeError(
            f"finetune: {name} must be iterable once per epoch; got a {type(loader).__name__}. Pass a loader."
        )
    if isinstance(loader, Sized) and len(loader) == 0:
        raise ValueError(f"finetune: needs at least one image; the {name} loader is empty.")


def _epochs_of(steps: int, train: Iterable[Any]) -> int:
    """Return how many passes over ``train`` hold ``steps`` optimizer steps."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"finetune: steps must be a whole number of at least 1; got {steps!r}.")
    if not isinstance(train, Sized):
        raise TypeError("finetune: steps needs a training loader with a length. Give epochs instead.")
    return math.ceil(steps / max(1, len(train)))


def _steps(train: Iterable[Any], epochs: int) -> int | None:
    return epochs * len(train) if isinstance(train, Sized) else None


def _precision(amp: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of mixed precision on ``device``, or ``None`` for none."""
    if amp != "auto":
        return PRECISIONS[amp]
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _annealed(schedule: str, lr: float, done: float) -> float:
    """Return the learning rate when the share ``done`` of the training, in [0, 1), lies behind."""
    if schedule == "cosine":
        return lr * (1 + math.cos(math.pi * done)) / 2
    if schedule == "step":
        return lr * 0.1 ** ((done >= 0.5) + (done >= 0.75))
    return lr


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


@dataclass(frozen=True)
class _Best:
    """The weights to end with: those of ``epoch``, or the ones the model came with (epoch 0)."""

    epoch: int
    tensors: dict[str, torch.Tensor]


@dataclass
class _Run:
    """One training run: the model, its optimizer, and everything that a checkpoint holds."""

    model: nn.Module
    train: Iterable[Any]
    loss: Loss
    objective: Objective | None
    options: Mapping[str, Any]
    precision: torch.dtype | None
    device: torch.device
    masks: HasMasks | None
    history: list[Epoch] = field(default_factory=list)
    start: str = ""  # digest of the first weights, if there is a checkpoint

    def __post_init__(self) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("finetune: the model must have parameters that ask for gradients; it has none.")
        self.optimizer = torch.optim.SGD(
            parameters, self.options["lr"],
            momentum=self.options["momentum"], weight_decay=self.options["weight_decay"],
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision is torch.float16)
        if self.masks is not None:
            self._attach(self.masks)
        self.best = _Best(0, self._copy())

    def _attach(self, masks: HasMasks) -> None:
        own = {id(parameter) for parameter in self.model.parameters()}
        if any(id(masks.model.get_parameter(name)) not in own for name in masks.dead):
            raise ValueError(
                "finetune: masks must be of the model that is trained; these are of another. "
                "Pass what mask_ returned for it."
            )
        masks.reapply()
        # An own hook and not masks.attach, so that the masks' other optimizers stay theirs.
        self.optimizer.register_step_post_hook(lambda *_: masks.reapply())

    def train_epoch(self, epoch: int, val: Iterable[Any] | None, advance: Callable[..., None]) -> None:
        """Train one epoch, validate, and remember the weights if they are the best."""
        began = time.perf_counter()
        lr, train_loss = self._pass(epoch, advance)
        val_loss, val_top1, val_auc = (None, None, None) if val is None else self._validate(epoch, val)
        self.history.append(Epoch(epoch, lr, train_loss, val_loss, val_top1, time.perf_counter() - began, val_auc))
        advance(0, note=_note(self.history[-1]))
        if val is None or _goodness(self.history[-1]) > max(map(_goodness, self.history[:-1]), default=(-1.0, 0.0)):
            self.best = _Best(epoch, self._copy())

    @property
    def stopped(self) -> str:
        """Why training ends here although epochs are left, or nothing."""
        patience, epochs = self.options["patience"], len(self.history)
        if patience is None or epochs - self.best.epoch < patience or epochs == self.options["epochs"]:
            return ""
        return f"after epoch {epochs} of {self.options['epochs']}: none was better than {self.best.epoch} on val"

    def _validate(self, epoch: int, val: Iterable[Any]) -> tuple[float, float, float | None]:
        """Return loss, top-1 and, where it chooses, AUC on ``val``, which may yield more than images and labels."""
        pairs = val if self.objective is None else map(_pair, val)
        try:
            if self.options["chosen_by"] != CHOSEN_BY["auc"]:
                return *measure.loss_and_top1("finetune", self.model, pairs), None
            found = measure.evaluate(self.model, pairs, progress=False)
        except measure.NotFinite as error:
            raise Diverged(f"{error} That was on val after epoch {epoch}. {self._advice()}", epoch) from None
        if found.auc is None:
            raise ValueError("finetune: choose='auc' needs an image of every class in val; one has none.")
        return found.loss, found.top1, found.auc

    def _pass(self, epoch: int, advance: Callable[..., None]) -> tuple[float, float]:
        """Run over the training data once; return the first learning rate and the mean loss of an image."""
        batches = len(self.train) if isinstance(self.train, Sized) else None
        left = None if self.options["steps"] is None else self.options["steps"] - (epoch - 1) * (batches or 0)
        losses: list[torch.Tensor] = []
        sizes: list[int] = []
        first = self._lr(epoch, 0.0)
        for position, batch in enumerate(itertools.islice(self.train, left)):
            lr = self._lr(epoch, min(position / batches, 1.0) if batches else 0.0)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            checked = self._as_batch(batch, position)
            losses.append(self._step(checked))
            sizes.append(len(checked[0]))
            if len(losses) % CHECK_EVERY == 0:
                self._check_losses(epoch, losses[-CHECK_EVERY:], len(losses) - CHECK_EVERY)
            advance()
        if not sum(sizes):
            raise ValueError("finetune: needs at least one image to train on; the training loader is empty.")
        self._check_losses(epoch, losses, 0)
        values = torch.stack(losses).double().cpu()
        return first, float(values @ torch.tensor(sizes, dtype=torch.float64)) / sum(sizes)

    def _lr(self, epoch: int, within: float) -> float:
        """Return the learning rate when the share ``within`` of ``epoch`` is over."""
        passes = self.options["epochs"]
        if self.options["steps"] is not None and isinstance(self.train, Sized):
            passes = self.options["steps"] / len(self.train)
        return _annealed(self.options["schedule"], self.options["lr"], (epoch - 1 + within) / passes)

    def _as_batch(self, batch: Any, position: int) -> tuple[Any, ...]:
        """Return images, labels and, for an objective, whatever else the loader yields."""
        if self.objective is None:
            return measure.as_batch("finetune", batch, position)
        rest = batch[2:] if isinstance(batch, (tuple, list)) else ()
        return (*measure.as_batch("finetune", _pair(batch), position), *rest)

    def _step(self, batch: tuple[Any, ...]) -> torch.Tensor:
        """Take one optimizer step and return the batch's loss, detached and on the device."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            value = _check_value(self._value(batch))
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.scaler.scale(value))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return value.detach()

    def _value(self, batch: tuple[Any, ...]) -> Any:
        """Return the loss of a batch; labels are checked where they come from, so that no GPU is waited for."""
        there = tuple(x.to(self.device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in batch)
        if self.objective is not None:
            return self.objective(self.model, there)
        outputs = self.model(there[0])
        measure.check_outputs("finetune", outputs, len(batch[0]))
        measure.check_labels("finetune", batch[1], outputs.shape[1])
        return self.loss(outputs, there[1].long())

    def _check_losses(self, epoch: int, losses: list[torch.Tensor], first: int) -> None:
        values = torch.stack(losses).cpu()
        if not values.isfinite().all():
            at = int((~values.isfinite()).nonzero()[0])
            raise Diverged(
                f"finetune: the loss must stay finite; it was {float(values[at])} in epoch {epoch}, batch {first + at}"
                f" (counted from 0). {self._advice()}",
                epoch,
            )

    def _advice(self) -> str:
        came = f"epoch {self.best.epoch}" if self.best.epoch else "before training"
        return f"Lower lr ({self.options['lr']}) or look at the data. The model has its weights of {came} again."

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return what training changes, by name: parameters and buffers."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()}

    def finish(self) -> None:
        """Give the model its best weights."""
        _copy_into(self._tensors(), self.best.tensors)

    def _fingerprint(self) -> dict[str, Any]:
        """Return what a checkpoint must agree with, apart from the starting weights."""
        masked = (
            {} if self.masks is None else {name: np.asarray(rows).tolist() for name, rows in self.masks.dead.items()}
        )
        shapes = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in self._tensors().items()}
        return {
            **self.options,
            "precision": str(self.precision),
            "batches": len(self.train) if isinstance(self.train, Sized) else None,
            "masks": hashlib.sha256(json.dumps(masked, sort_keys=True).encode()).hexdigest(),
            "model": hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest(),
        }

    def open(self, path: Path) -> None:
        """Continue from ``path`` if it is there, and be ready to write it."""
        self.start = files.fingerprint(self.best.tensors)
        if path.exists():
            self._load(path)

    def save(self, path: Path) -> None:
        """Write the run as it stands at the end of an epoch."""
        tensors = {f"now/{name}": tensor for name, tensor in self._copy().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.tensors.items()}
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                tensors[f"momentum/{name}"] = buffer
        about = {
            "fingerprint": self._fingerprint(), "start": self.start, "best": self.best.epoch,
            "history": [asdict(epoch) for epoch in self.history], "scaler": self.scaler.state_dict(),
        }  # fmt: skip
        files.write_described(path, tensors, FORMAT, VERSION, about)

    def _load(self, path: Path) -> None:
        """Take up the run in ``path``; raise ``ValueError`` if it is not this one."""
        tensors, about = files.read_described("finetune", path, FORMAT, VERSION)
        self._check_same_run(path, about, tensors)
        try:
            history = [Epoch(**epoch) for epoch in about["history"]]
            named = {part: _part(tensors, part) for part in ("now", "best", "momentum")}
            _copy_into(self._tensors(), named["now"])
            for name, parameter in self.model.named_parameters():
                if name in named["momentum"]:
                    buffer = torch.empty_like(parameter, requires_grad=False)
                    _copy_into({name: buffer}, named["momentum"])
                    self.optimizer.state[parameter]["momentum_buffer"] = buffer
            self.scaler.load_state_dict(about["scaler"])
            best = self._copy()
            _copy_into(best, named["best"])
            self.best, self.history = _Best(int(about["best"]), best), history
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"finetune: {path} lacks or garbles {error}. Delete it to start again.") from None

    def _check_same_run(self, path: Path, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise unless the checkpoint has this run's settings and began with the model's weights.

        A model that still holds the best weights of the interrupted run is as good as one that holds the first.
        """
        mine, theirs = self._fingerprint(), about.get("fingerprint", {})
        different = [name for name in mine if not isinstance(theirs, dict) or theirs.get(name) != mine[name]]
        if not different and self.start not in (about.get("start"), files.fingerprint(_part(tensors, "best"))):
            different = ["starting weights"]
        if different:
            raise ValueError(
                f"finetune: {path} must come from the same run; it differs in {', '.join(different)}. "
                "Delete it to start again, or choose another checkpoint."
            )
        self.start = str(about["start"])


def _pair(batch: Any) -> Any:
    return batch[:2] if isinstance(batch, (tuple, list)) else batch


def _check_value(value: Any) -> torch.Tensor:
    """Return ``value`` if it is a loss to descend; raise ``TypeError`` otherwise."""
    if isinstance(value, torch.Tensor) and value.ndim == 0 and value.requires_grad:
        return value
    came = type(value).__name__
    if isinstance(value, torch.Tensor):
        came = f"shape {list(value.shape)}" if value.ndim else "one that no parameter leads to"
    raise TypeError(f"finetune: the loss must be a scalar tensor with a gradient; got {came}. Return the mean.")


def _goodness(epoch: Epoch) -> tuple[float, float]:
    return (epoch.val_top1 or 0.0 if epoch.val_auc is None else epoch.val_auc, -(epoch.val_loss or 0.0))


def _note(epoch: Epoch) -> str:
    top1 = "" if epoch.val_top1 is None else f", top-1 {epoch.val_top1:.2%}"
    return f"epoch {epoch.epoch}: loss {epoch.train_loss:.4f}{top1}"


def _part(tensors: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}


def _copy_into(targets: Mapping[str, torch.Tensor], sources: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, target in targets.items():
            if sources[name].shape != target.shape:  # copy_ would broadcast
                raise TypeError(f"{name!r} of shape {list(target.shape)}")
            target.copy_(sources[name])


@contextmanager
def _own_random_state(device: torch.device, *loaders: Iterable[Any] | None) -> Iterator[Callable[[int, int], None]]:
    """Yield ``reseed(seed, epoch)``; afterwards every generator is as it was, those of the loaders included."""
    generators = list({id(own): own for loader in loaders for own in _generators(loader)}.values())
    states = [(generator, generator.get_state(), generator.initial_seed()) for generator in generators]

    def reseed(seed: int, epoch: int) -> None:
        mixed = seed * 1_000_003 + epoch
        randomness.seed_all(mixed, device)
        for generator, _, own_seed in states:
            generator.manual_seed((own_seed + mixed) % 2**63)
        for owner in _samplers(loaders):
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)

    try:
        with randomness.given_back(device):
            yield reseed
    finally:
        for generator, state, _ in states:
            generator.set_state(state)


def _samplers(loaders: Iterable[Any]) -> list[Any]:
    return [getattr(loader, name, None) for loader in loaders for name in ("sampler", "batch_sampler")]


def _generators(loader: Any) -> list[torch.Generator]:
    """Return the generators that a torch DataLoader draws its order from."""
    found = [getattr(owner, "generator", None) for owner in (loader, *_samplers([loader]))]
    return [generator for generator in found if isinstance(generator, torch.Generator)]
