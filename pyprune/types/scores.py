"""How training went, how well a network classifies, and what changed for each class."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pyprune import files
from pyprune.types import reading
from pyprune.types.common import FloatArray, IntArray, plain, printable


@dataclass(frozen=True)
class Epoch:
    """One epoch of training, counted from 1: first learning rate, mean training loss of an image, validation if any.

    ``val_loss`` is the mean cross-entropy and ``val_top1`` lies in [0, 1]; ``val_auc``, the mean one-against-rest area
    under the ROC curve, is there where it chooses the epoch.
    """

    epoch: int
    lr: float
    train_loss: float
    val_loss: float | None
    val_top1: float | None
    seconds: float
    val_auc: float | None = None


@dataclass(frozen=True)
class History:
    """What :func:`pyprune.finetune` did; ``best`` is the number of the epoch whose weights the model holds now.

    ``options["chosen_by"]`` says how that epoch was chosen; ``stopped`` says when and why training ended before all
    epochs were over, and is empty where it did not.
    """

    epochs: tuple[Epoch, ...]
    best: int
    options: Mapping[str, Any] = field(default_factory=dict)
    stopped: str = ""

    FORMAT = "pyprune.history"
    VERSION = 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON."""
        files.write_json(path, {"format": self.FORMAT, "version": self.VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what :meth:`save` wrote; ``ValueError`` if it cannot be that."""
        content = files.read_json("History.load", path, cls.FORMAT, cls.VERSION)
        try:
            epochs = tuple(reading.record(Epoch, epoch) for epoch in reading.listed(content, "epochs"))
            stopped = reading.text({"stopped": "", **content}, "stopped")
            return cls(epochs, reading.whole(content, "best"), dict(reading.mapped(content, "options")), stopped)
        except (KeyError, TypeError) as error:
            raise ValueError(f"History.load: {path} lacks or garbles {error}.") from None


@dataclass(frozen=True)
class GroupScore:
    """How well a model classifies the images of one group: their number, mean cross-entropy, and top-1."""

    images: int
    loss: float
    top1: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well a model classifies.

    ``confusion`` [C, C] int64 counts images by true class (rows) and predicted class (columns); ``top1`` and
    ``top5`` are shares in [0, 1] (``top5`` is ``None`` below six classes); ``auc`` is the mean one-against-rest
    area under the ROC curve, ``None`` where a class has no image. ``class_loss`` and ``class_auc`` [C] are the same by
    true class, NaN where undefined, ``None`` in files of before they were measured; ``groups`` has the scores by
    attribute and group.
    """

    confusion: IntArray
    loss: float
    top5: float | None
    auc: float | None
    class_loss: FloatArray | None = None
    class_auc: FloatArray | None = None
    groups: Mapping[str, Mapping[str, GroupScore]] = field(default_factory=dict)

    FORMAT = "pyprune.evaluation"
    VERSION = 1

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Share of images whose most likely class is the true one."""
        return float(np.trace(self.confusion) / self.images)

    @property
    def per_class(self) -> FloatArray:
        """[C] float64: top-1 within each true class; NaN for a class without images."""
        totals = self.confusion.sum(axis=1)
        hits: FloatArray = np.diagonal(self.confusion).astype(np.float64)
        shares: FloatArray = np.divide(hits, totals, out=np.full(len(totals), np.nan), where=totals > 0)
        return shares

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON values."""
        return {
            "format": self.FORMAT, "version": self.VERSION, "images": self.images, "top1": self.top1,
            "top5": self.top5, "auc": self.auc, "loss": self.loss, "confusion": self.confusion.tolist(),
            "class_loss": plain(self.class_loss), "class_auc": plain(self.class_auc),
            "groups": {
                name: {group: asdict(score) for group, score in scores.items()} for name, scores in self.groups.items()
            },
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON."""
        files.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read what :meth:`save` wrote; ``ValueError`` if it cannot be that."""
        return cls.from_json(files.read_json("Evaluation.load", path, cls.FORMAT, cls.VERSION), str(path))

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str = "the content") -> Evaluation:
        """Return what :meth:`to_json` gave; ``ValueError`` naming ``where`` if it cannot be that."""
        try:
            confusion = reading.wholes(content, "confusion")
            if confusion.ndim != 2 or len(confusion) != confusion.shape[1] or (confusion < 0).any():
                raise TypeError(reading.garbled("confusion", content["confusion"]))
            loss, auc = (
                None if content.get(name) is None else reading.numbers(content, name)
                for name in ("class_loss", "class_auc")
            )
            groups = {
                str(name): {str(group): reading.record(GroupScore, score) for group, score in scores.items()}
                for name, scores in content.get("groups", {}).items()
            }
            top5, mean_auc = (reading.number_or_none(content, name) for name in ("top5", "auc"))
            return cls(confusion, reading.number(content, "loss"), top5, mean_auc, loss, auc, groups)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Evaluation.load: {where} lacks or garbles {error}.") from None


VERDICTS = ((0.10, "fair"), (0.25, "moderate"))
"""Shares of the range below which a network is called so (thesis section 5.1.5); above it is unfair."""


@dataclass(frozen=True)
class Correlation:
    """A coefficient in [-1, 1] and its two-tailed p; both ``None`` where it is not defined."""

    coefficient: float | None
    p: float | None


@dataclass(frozen=True)
class Excess:
    """What pruning costs group by group (thesis eq. 3.14 and 3.15).

    ``losses`` is R(a), the mean loss of each group after minus before; ``largest`` is xi, the largest difference
    between two groups, and ``between`` names them, the one that fared better first. ``images`` counts each group's.
    """

    losses: Mapping[str, float]
    largest: float
    between: tuple[str, str]
    images: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Fairness:
    """Whether pruning treats all classes alike (thesis section 5.1.5); ``print`` shows it as a table.

    Parameters
    ----------
    before, after
        [K, 3] float64: TPR, TNR and FPR of every class (eq. 5.1, 5.2 and 5.5).
    classes
        Which classes they are: those without images, or with no others, are left out.
    eopp0, eopp1
        Sums over the classes of |change of TNR| and |change of TPR| (eq. 5.3 and 5.4).
    eodd
        Sum of |change of TPR + change of FPR| (eq. 5.6), in which a fall of one can hide a rise of the other.
    eodd_separate
        Sum of |change of TPR| + |change of FPR|, in which it cannot.
    pearson, spearman
        Of the TPRs before and after.
    errors, losses
        What pruning costs class by class, in errors and in cross-entropy; the latter ``None`` where not measured.
    groups
        The same in cross-entropy for every attribute that was measured.
    auc
        The mean one-against-rest AUC before and after.
    """

    before: FloatArray
    after: FloatArray
    classes: tuple[int, ...]
    eopp0: float
    eopp1: float
    eodd: float
    eodd_separate: float
    pearson: Correlation
    spearman: Correlation
    errors: Excess
    losses: Excess | None = None
    groups: Mapping[str, Excess] = field(default_factory=dict)
    auc: tuple[float | None, float | None] = (None, None)

    FORMAT = "pyprune.fairness"
    VERSION = 1

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """For each measure the largest value that can be attained, K or 2K, and the one that the thesis takes."""
        K = len(self.classes)
        return {"eopp0": (K, 2 * K), "eopp1": (K, 2 * K), "eodd": (2 * K, 4 * K), "eodd_separate": (2 * K, 4 * K)}

    @property
    def verdicts(self) -> dict[str, str]:
        """``"fair"`` below 10 % of what can be attained, ``"moderate"`` below 25 %, ``"unfair"`` above."""
        return {name: self.verdict(getattr(self, name) / most) for name, (most, _) in self.ranges.items()}

    @staticmethod
    def verdict(share: float) -> str:
        """Return what a share of a range is called."""
        return next((name for limit, name in VERDICTS if share < limit), "unfair")

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        content = asdict(self) | {"before": self.before.tolist(), "after": self.after.tolist()}
        content |= {"ranges": self.ranges, "verdicts": self.verdicts}  # for readers of the file
        plain: dict[str, Any] = json.loads(json.dumps(content))  # tuples become lists, as they do in a file
        return {"format": self.FORMAT, "version": self.VERSION, **plain}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON."""
        files.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fairness:
        """Read what :meth:`save` wrote; ``ValueError`` if it cannot be that."""
        content = files.read_json("Fairness.load", path, cls.FORMAT, cls.VERSION)
        try:
            one, other = reading.listed(content, "auc")
            return cls(
                _rates(content, "before"), _rates(content, "after"),
                tuple(reading.wholes(content, "classes").tolist()),
                **{name: reading.number(content, name) for name in ("eopp0", "eopp1", "eodd", "eodd_separate")},
                pearson=reading.record(Correlation, content["pearson"]),
                spearman=reading.record(Correlation, content["spearman"]), errors=_excess(content["errors"]),
                losses=None if content["losses"] is None else _excess(content["losses"]),
                groups={str(name): _excess(own) for name, own in reading.mapped(content, "groups").items()},
                auc=(reading.number_or_none({"auc": one}, "auc"), reading.number_or_none({"auc": other}, "auc")),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Fairness.load: {path} lacks or garbles {error}.") from None

    def __str__(self) -> str:
        titles = {
            "eopp0": "EOpp0", "eopp1": "EOpp1", "eodd": "EOdd, eq. 5.6", "eodd_separate": "EOdd, TPR and FPR apart",
        }  # fmt: skip
        lines = [f"{'':24}  {'value':>8}  {'attainable':>10}  {'share':>6}  {'as in the thesis':>16}"]
        for name, (most, thesis) in self.ranges.items():
            value, verdict = getattr(self, name), self.verdicts[name]
            shares = f"{value / most:6.1%}  {f'{value / thesis:.1%} of {thesis}':>16}"
            lines.append(f"{titles[name]:24}  {value:8.4f}  {most:10}  {shares}  {verdict}")
        for title, found in (("Pearson", self.pearson), ("Spearman", self.spearman)):
            undefined = found.coefficient is None
            lines.append(
                f"{title:24}  " + ("not defined" if undefined else f"{found.coefficient:8.4f}  p {found.p:.3g}")
            )
        excesses = {"classes, errors": self.errors, "classes, loss": self.losses, **self.groups}
        for title, excess in excesses.items():
            if excess is not None:
                better, worse = excess.between
                lines.append(
                    f"{'excess, ' + printable(title):24}  {excess.largest:8.4f}  {printable(worse)} "
                    f"({excess.losses[worse]:+.4f}) against {printable(better)} ({excess.losses[better]:+.4f})"
                )
        if None not in self.auc:
            lines.append(f"{'mean AUC':24}  {self.auc[0]:8.4f}  > {self.auc[1]:.4f}")
        return "\n".join(lines)


def _rates(content: Mapping[str, Any], name: str) -> FloatArray:
    """Return [K, 3] numbers."""
    found = reading.numbers(content, name)
    if found.ndim != 2 or found.shape[1] != 3:
        raise TypeError(reading.garbled(name, content[name]))
    return found


def _excess(content: Any) -> Excess:
    if not isinstance(content, Mapping):
        raise TypeError(reading.garbled("excess", content))
    better, worse = reading.texts(content, "between")
    losses, images = reading.scores(content, "losses"), reading.counts(content, "images")
    if not {better, worse} <= losses.keys():
        raise KeyError("between")
    return Excess(losses, reading.number(content, "largest"), (better, worse), images)
