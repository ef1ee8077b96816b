"""The frozen dataclasses that the stages hand to one another. Nothing here computes more than a ratio."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from pyprune import files

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

T = TypeVar("T")
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

UNINFORMATIVE = 0.9
"""A layer with a larger share of R at full rank than this says nothing about its filters."""

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Region(StrEnum):
    """Where a filter lies in the (AVG, STD) plane, divided at the means of both (thesis section 4.2)."""

    LOW_AVG_LOW_STD = "LOW_AVG_LOW_STD"
    HIGH_AVG_LOW_STD = "HIGH_AVG_LOW_STD"
    HIGH_AVG_HIGH_STD = "HIGH_AVG_HIGH_STD"
    LOW_AVG_HIGH_STD = "LOW_AVG_HIGH_STD"


@dataclass(frozen=True, eq=False)
class ClassRanks:
    """Class-conditional feature-map ranks: what one pass over the data says about every filter.

    Parameters
    ----------
    layers
        For each convolution, R [F, C] float64: the mean rank of filter f's maps over the images of class c.
    counts
        [C] int64, how many images of each class were ranked.
    shapes
        For each convolution the (H, W) of the maps that were ranked; min(H, W) is full rank.
    taps
        For each convolution the node or module whose output was ranked.
    info
        How the ranks came about: seed, images a class, micro-batch size, variant, libraries.

    Raises
    ------
    ValueError
        If an R is not a finite, non-negative [F, C] array with the same C in every layer.
    """

    layers: Mapping[str, FloatArray]
    counts: IntArray | None = None
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    taps: Mapping[str, str] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    FORMAT = "pyprune.ranks"
    VERSION = 1

    def __post_init__(self) -> None:
        # In C order, as files give them back: numpy adds up in the order of memory, and no plan may depend on that.
        layers = {name: np.array(R, np.float64, order="C") for name, R in self.layers.items()}
        for name, R in layers.items():
            if R.ndim != 2 or 0 in R.shape:
                raise ValueError(f"ClassRanks: {name!r} needs R of [F, C]; got {list(R.shape)}.")
            if not np.isfinite(R).all() or (R < 0).any():
                raise ValueError(f"ClassRanks: {name!r} has ranks that are negative, NaN or infinite.")
            R.flags.writeable = False
        classes = {R.shape[1] for R in layers.values()}
        if len(classes) != 1:
            raise ValueError(f"ClassRanks: needs at least one layer and one number of classes; got {sorted(classes)}.")
        object.__setattr__(self, "layers", layers)
        if self.counts is not None:
            counts = np.array(self.counts, np.int64)
            if counts.shape != (classes.pop(),) or (counts < 1).any():
                raise ValueError(f"ClassRanks: counts must be one positive number per class; got {counts}.")
            object.__setattr__(self, "counts", counts)

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return int(next(iter(self.layers.values())).shape[1])

    def full_rank_share(self, name: str) -> float | None:
        """Share of R[name] that is at full rank, min(H, W); ``None`` where the map's size is not known."""
        if name not in self.shapes:
            return None
        return float((self.layers[name] >= min(self.shapes[name])).mean())

    @property
    def uninformative(self) -> tuple[str, ...]:
        """Layers with more than 90 % of R at full rank: CRank leaves them alone."""
        return tuple(name for name in self.layers if (self.full_rank_share(name) or 0.0) > UNINFORMATIVE)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as safetensors; :meth:`load` reads it back bit for bit."""
        import torch

        tensors = {f"R/{name}": torch.from_numpy(R.copy()) for name, R in self.layers.items()}
        if self.counts is not None:
            tensors["counts"] = torch.from_numpy(self.counts)
        about = {"shapes": self.shapes, "taps": self.taps, "info": self.info, "layers": list(self.layers)}
        files.write_described(path, tensors, self.FORMAT, self.VERSION, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ClassRanks:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If the file is missing, truncated, of another kind or from a newer pyprune.
        """
        tensors, about = files.read_described("ClassRanks.load", path, cls.FORMAT, cls.VERSION)
        try:
            return cls(
                layers={name: tensors[f"R/{name}"].numpy() for name in about["layers"]},
                counts=tensors["counts"].numpy() if "counts" in tensors else None,
                shapes={name: (int(shape[0]), int(shape[1])) for name, shape in about["shapes"].items()},
                taps={str(name): str(tap) for name, tap in about["taps"].items()},
                info=about["info"],
            )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"ClassRanks.load: {path} lacks or garbles {error}.") from None


@dataclass(frozen=True)
class FilterWhy:
    """Why one filter stays or goes. ``score`` is what its criterion gave it, higher for those to keep."""

    reason: str
    keep: bool
    cluster: int | None = None
    medoid: bool = False
    region: Region | None = None
    silhouette: float | None = None
    avg: float | None = None
    std: float | None = None
    score: float | None = None


@dataclass(frozen=True)
class LayerWhy(Sequence[FilterWhy]):
    """What the selection saw in one layer; indexing gives the :class:`FilterWhy` of a filter.

    ``note`` says why a layer was left alone and is empty otherwise. ``k`` and ``silhouette`` are the chosen
    number of clusters and its mean silhouette; ``avg_mean`` and ``std_mean`` the dividing point. ``stability`` is the
    mean overlap |A and B| / |A or B| of the kept filters with those that other seeds of k-means keep.
    """

    filters: tuple[FilterWhy, ...]
    note: str = ""
    k: int | None = None
    silhouette: float | None = None
    avg_mean: float | None = None
    std_mean: float | None = None
    stability: float | None = None

    def __getitem__(self, index: Any) -> Any:
        return self.filters[index]

    def __len__(self) -> int:
        return len(self.filters)

    def __iter__(self) -> Iterator[FilterWhy]:
        return iter(self.filters)


@dataclass(frozen=True, eq=False)
class Plan:
    """Which filters stay, layer by layer, and why.

    Parameters
    ----------
    keep
        For each convolution, the indices of the filters that stay: sorted to int64 [kept].
    filters
        For each convolution, how many filters it had. Optional in a plan made by hand.
    why
        For each convolution a :class:`LayerWhy`. Optional in a plan made by hand.
    method, options
        What made the plan, and with which settings.

    Raises
    ------
    ValueError, TypeError
        If an index list is empty, doubled, negative, out of range or not of integers.
    """

    keep: Mapping[str, IntArray]
    filters: Mapping[str, int] = field(default_factory=dict)
    why: Mapping[str, LayerWhy] = field(default_factory=dict)
    method: str = "manual"
    options: Mapping[str, Any] = field(default_factory=dict)

    FORMAT = "pyprune.plan"
    VERSION = 1

    def __post_init__(self) -> None:
        keep = {name: _indices(name, indices, self.filters.get(name)) for name, indices in self.keep.items()}
        object.__setattr__(self, "keep", keep)
        for name, why in self.why.items():
            if name not in keep or [i for i, one in enumerate(why) if one.keep] != keep[name].tolist():
                raise ValueError(f"Plan: the reasons for {name!r} disagree with its kept filters.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    @property
    def rates(self) -> dict[str, float]:
        """Share of the filters that goes, for each layer whose number of filters is known."""
        return {name: 1 - len(kept) / self.filters[name] for name, kept in self.keep.items() if name in self.filters}

    @property
    def stability(self) -> dict[str, float]:
        """Mean overlap of what is kept with what other seeds keep, for each layer where other seeds were tried."""
        return {name: why.stability for name, why in self.why.items() if why.stability is not None}

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "format": self.FORMAT,
            "version": self.VERSION,
            "method": self.method,
            "options": json.loads(json.dumps(dict(self.options))),  # tuples become lists, as they do in a file
            "filters": dict(self.filters),
            "keep": {name: kept.tolist() for name, kept in self.keep.items()},
            "why": {name: asdict(why) for name, why in self.why.items()},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON."""
        files.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If the file is missing, truncated, of another kind, inconsistent or from a newer pyprune.
        """
        content = files.read_json("Plan.load", path, cls.FORMAT, cls.VERSION)
        try:
            return cls(
                keep=content["keep"],
                filters={str(name): int(count) for name, count in content["filters"].items()},
                why={name: _layer_why(why) for name, why in content["why"].items()},
                method=str(content["method"]),
                options=dict(content["options"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Plan.load: {path} lacks or garbles {error}.") from None


def _layer_why(content: dict[str, Any]) -> LayerWhy:
    filters = tuple(
        FilterWhy(**{**one, "region": Region(one["region"]) if one["region"] else None}) for one in content["filters"]
    )
    return LayerWhy(**{**content, "filters": filters})


def _indices(name: str, indices: Any, count: int | None) -> IntArray:
    """Return ``indices`` sorted as int64 after checking that they can name filters."""
    given = np.asarray(indices)
    if given.size == 0:
        raise ValueError(f"Plan: {name!r} keeps no filter; keep at least one, or leave the layer out.")
    if given.ndim != 1 or given.dtype == np.bool_ or not np.issubdtype(given.dtype, np.integer):
        raise TypeError(
            f"Plan: {name!r} needs a flat list of filter indices; got {given.dtype} of shape {list(given.shape)}."
            + (" Pass np.flatnonzero(mask)." if given.dtype == np.bool_ else "")
        )
    kept = np.unique(given.astype(np.int64))
    if len(kept) != given.size:
        raise ValueError(f"Plan: {name!r} names a filter twice.")
    if kept[0] < 0 or (count is not None and kept[-1] >= count):
        limit = "" if count is None else f" to {count - 1}"
        raise ValueError(f"Plan: {name!r} needs indices from 0{limit}; got {kept[0]} to {kept[-1]}.")
    kept.flags.writeable = False
    return kept


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
            epochs = tuple(Epoch(**epoch) for epoch in content["epochs"])
            return cls(epochs, int(content["best"]), dict(content["options"]), str(content.get("stopped", "")))
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
            "class_loss": _plain(self.class_loss), "class_auc": _plain(self.class_auc),
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
            confusion = np.array(content["confusion"], np.int64)
            loss, auc = (
                None if content.get(name) is None else np.array(content[name], np.float64)
                for name in ("class_loss", "class_auc")
            )
            groups = {
                str(name): {str(group): GroupScore(**score) for group, score in scores.items()}
                for name, scores in content.get("groups", {}).items()
            }
            return cls(confusion, content["loss"], content["top5"], content["auc"], loss, auc, groups)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
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
            numbers = {name: float(content[name]) for name in ("eopp0", "eopp1", "eodd", "eodd_separate")}
            one, other = content["auc"]
            return cls(
                np.array(content["before"], np.float64), np.array(content["after"], np.float64),
                tuple(int(one) for one in content["classes"]), **numbers, pearson=Correlation(**content["pearson"]),
                spearman=Correlation(**content["spearman"]), errors=_excess(content["errors"]),
                losses=None if content["losses"] is None else _excess(content["losses"]),
                groups={str(name): _excess(one) for name, one in content["groups"].items()}, auc=(one, other),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
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
                    f"{'excess, ' + _printable(title):24}  {excess.largest:8.4f}  {_printable(worse)} "
                    f"({excess.losses[worse]:+.4f}) against {_printable(better)} ({excess.losses[better]:+.4f})"
                )
        if None not in self.auc:
            lines.append(f"{'mean AUC':24}  {self.auc[0]:8.4f}  > {self.auc[1]:.4f}")
        return "\n".join(lines)


def _excess(content: Mapping[str, Any]) -> Excess:
    better, worse = content["between"]
    return Excess(
        {str(name): float(loss) for name, loss in content["losses"].items()}, float(content["largest"]),
        (str(better), str(worse)), {str(name): int(count) for name, count in content["images"].items()},
    )  # fmt: skip


@dataclass(frozen=True)
class LayerCount:
    """One convolution or linear layer of a :class:`Profile`: outputs kept of how many, and its cost by ``compact``."""

    name: str
    kind: str
    outputs: int
    kept: int
    parameters: int
    macs: int


@dataclass(frozen=True)
class Profile:
    """What a network costs for one image, under both conventions of the field, never mixed.

    ``parameters`` and ``macs`` (multiply-accumulates) count the network as it really is, or, for a profile with
    a plan, as it is once compacted. ``hrank_v1_*`` count as HRank's published tables do: removed filters at
    full input width, no norms, biases in the parameters, the biases of linear layers in the MACs.
    ``latency_ms`` is the median wall time of one forward pass of ``batch`` images on ``device``.
    """

    parameters: int
    macs: int
    hrank_v1_parameters: int
    hrank_v1_macs: int
    latency_ms: float | None
    device: str
    layers: tuple[LayerCount, ...]
    batch: int = 1

    FORMAT = "pyprune.profile"
    VERSION = 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON."""
        files.write_json(path, {"format": self.FORMAT, "version": self.VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read what :meth:`save` wrote; ``ValueError`` if it cannot be that."""
        content = files.read_json("Profile.load", path, cls.FORMAT, cls.VERSION)
        try:
            layers = tuple(LayerCount(**layer) for layer in content.pop("layers"))
            del content["format"], content["version"]
            return cls(layers=layers, **content)
        except (KeyError, TypeError) as error:
            raise ValueError(f"Profile.load: {path} lacks or garbles {error}.") from None


@dataclass(frozen=True)
class LayerAnalysis:
    """What compaction does to one layer: its outputs, how many the plan removes, how many leave, and what stays.

    ``kept`` maps a filter that the plan removes and that stays all the same to the reason. ``inputs`` and
    ``inputs_left`` count the input channels before and after, ``parameters`` and ``parameters_left`` the weights
    and biases. ``coupled`` counts the planned filters that ``residual="intersect"`` would keep because another branch
    keeps the channel, and ``"scatter"`` removes; ``beyond`` lists what leaves although the plan keeps it: because
    nothing needs it any more, or by a lossy ``"union"``.
    """

    name: str
    kind: str
    outputs: int
    planned: int
    removed: int
    inputs: int
    inputs_left: int
    parameters: int
    parameters_left: int
    kept: Mapping[int, str]
    coupled: int = 0
    beyond: tuple[int, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """What compaction would do, layer by layer; ``print`` shows it as a table.

    ``parameters`` and ``parameters_left`` count the whole network, norms included. ``parameters_coupled`` is how many
    more ``residual="intersect"`` keeps than ``"scatter"``, because branches that are added have to keep the same
    channels. ``lossy`` says whether a union takes more than the plan does, so that the outputs change.
    """

    layers: tuple[LayerAnalysis, ...]
    parameters: int
    parameters_left: int
    residual: str = "scatter"
    parameters_coupled: int = 0
    lossy: bool = False

    FORMAT = "pyprune.analysis"
    VERSION = 1

    def to_json(self) -> dict[str, Any]:
        """Return the analysis as plain JSON values."""
        layers = [{**asdict(layer), "kept": {str(i): why for i, why in layer.kept.items()}} for layer in self.layers]
        return {
            "format": self.FORMAT, "version": self.VERSION, "parameters": self.parameters,
            "parameters_left": self.parameters_left, "residual": self.residual, "lossy": self.lossy,
            "parameters_coupled": self.parameters_coupled, "layers": layers,
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON."""
        files.write_json(path, self.to_json())

    def __str__(self) -> str:
        wide = max([5, *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':{wide}}  filters  planned  removed  inputs         parameters"]
        for layer in self.layers:
            counts = f"{layer.outputs:7}  {layer.planned:7}  {layer.removed:7}"
            inputs = f"{layer.inputs} > {layer.inputs_left}"
            lines.append(
                f"{layer.name:{wide}}  {counts}  {inputs:13}  {layer.parameters:,} > {layer.parameters_left:,}"
            )
            for why, filters in _grouped(layer.kept).items():
                lines.append(f"{'':{wide}}  kept {len(filters)} ({_listed(filters)}): {why}")
            if layer.beyond:
                why = "" if self.lossy else ": nothing needs them"
                lines.append(f"{'':{wide}}  removed beyond the plan {len(layer.beyond)} ({_listed(layer.beyond)}){why}")
        lines.append(f"parameters in all: {self.parameters:,} > {self.parameters_left:,}")
        if coupled := sum(layer.coupled for layer in self.layers):
            lines.append(
                f"coupling: {coupled} planned filters have a channel that another branch keeps; "
                f"intersect would keep them, {self.parameters_coupled:,} parameters more than scatter"
            )
        if self.lossy:
            lines.append("lossy: the network will differ from the one that the plan masks")
        return "\n".join(lines)


def _grouped(reasons: Mapping[T, str]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for one, why in reasons.items():
        groups.setdefault(why, []).append(one)
    return groups


def _listed(filters: Sequence[int]) -> str:
    shown = ", ".join(str(index) for index in filters[:8])
    return f"{shown}, ..." if len(filters) > 8 else shown


@dataclass(frozen=True)
class Certificate:
    """Proof that a slim model computes what the masked model computed.

    ``max_difference`` is the largest |slim - masked| / max(1, max |masked|) over ``inputs`` (described in words)
    in float64 with randomised norm statistics, held against ``tolerance``; ``native_difference`` the same in the
    model's own ``dtype`` on the example inputs. ``verified`` is false where verification was switched off.
    """

    verified: bool
    inputs: tuple[str, ...]
    max_difference: float | None
    tolerance: float
    dtype: str
    native_difference: float | None
    native_tolerance: float


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a parameter of a slim network comes from.

    ``name`` is a parameter of the original, ``shape`` its shape there. ``index`` says which of its numbers are left:
    nothing if all are; rows [F]; or rows [F, 1] and columns [1, C], for grouped convolutions columns [F, C]. They
    broadcast, so that ``original[origin.index]`` has the slim parameter's shape in every library.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[IntArray, ...] = ()

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the numbers of ``tensor`` [shape] that are left."""
        import torch

        index = tuple(torch.from_numpy(one).to(tensor.device) for one in self.index)
        return tensor[index] if index else tensor


@dataclass(frozen=True, eq=False)
class Compacted:
    """A slim model and its proof.

    ``model`` is the slim ``nn.Module``; ``kept`` says for each layer which filters stay against the plan, and why:
    ``{layer: {filter: reason}}``. ``before`` and ``after`` are profiles of the original and the slim network on
    ``example_inputs``, their latencies measured interleaved. ``residual`` says what happened where branches are added.
    ``beyond`` lists the filters that left although the plan keeps them, ``{layer: filters}``: those that nothing needs
    any more, and those that a ``"union"`` added to the plan. Then the network is ``lossy``, and the certificate is
    about the network masked by the plan and ``beyond``. ``origins`` says for each parameter of ``model``, by
    name, which numbers of the original's it holds; parameters that compaction made, biases with folded constants, have
    none. ``unwrapped`` names what the original was taken out of, outermost first, as ``("DistributedDataParallel",)``.
    ``own_forward`` is empty where ``model`` is a graph; else it says why torch.fx could not trace the original, whose
    class ``model`` then has: it is proved for the way that forward takes on ``example_inputs``, and ``residual`` is
    ``"intersect"`` at least.
    """

    model: nn.Module
    certificate: Certificate
    plan: Plan
    kept: Mapping[str, Mapping[int, str]]
    before: Profile
    after: Profile
    example_inputs: tuple[torch.Tensor, ...]
    residual: str = "scatter"
    beyond: Mapping[str, IntArray] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    unwrapped: tuple[str, ...] = ()
    lossy: bool = False
    own_forward: str = ""

    def carry(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        """Return an optimizer that goes on training the slim model where ``optimizer`` was with the original.

        Of every number per element, momentum and moments, those stay whose elements stay. Groups, hyperparameters
        and counters of steps are copied, as are state dicts of schedulers: make the scheduler anew for the result
        and load the old one's. Biases that compaction made join the group of their layer's weight, without any state.
        For chains with affine norms, training goes on as it would have gone on with masks, where it depends on no
        norm over all gradients.

        Parameters
        ----------
        optimizer
            Any torch optimizer that keeps its state per parameter: SGD, Adam, AdamW, RMSprop, ... It is not changed.
        model
            The model that was compacted and that ``optimizer`` trains, wrapped or not.

        Returns
        -------
        torch.optim.Optimizer
            Of the same type, over parameters of ``self.model``, sharing no tensor with ``optimizer``. Hooks, such as
            those of masks, stay behind.

        Raises
        ------
        TypeError, ValueError
            If ``optimizer`` is none, trains another model, or keeps state that cannot be cut by index.

        Examples
        --------
        >>> import torch
        >>> from pyprune import Plan, compact
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> slim = compact(model, Plan(keep={"0": [1, 2]}), torch.randn(2, 1, 8, 8), latency=False)
        >>> [list(one.shape) for one in slim.carry(optimizer, model).param_groups[0]["params"]]
        [[2, 1, 3, 3], [2], [2, 2, 3, 3], [2]]
        """
        from pyprune.optimizers import carried

        return carried(self, optimizer, model)


@dataclass(frozen=True)
class Exported:
    """A file for other runtimes, and how far its outputs were from the network's.

    ``kind`` is ``"onnx"`` or ``"pt2"``, ``opset`` the version of ONNX's operators, ``bytes`` the size of the file.
    ``max_difference`` is the largest |exported - network| / max(1, max |network|) over ``inputs`` (described in words),
    held against ``tolerance``; ``verified`` is false where the comparison was switched off.
    """

    path: str
    kind: str
    opset: int | None
    bytes: int
    verified: bool
    inputs: tuple[str, ...]
    max_difference: float | None
    tolerance: float

    def __str__(self) -> str:
        size = f"{self.path}: {self.kind}{f', opset {self.opset}' if self.opset else ''}, {self.bytes:,} bytes"
        if not self.verified:
            return f"{size}; not compared"
        return f"{size}; largest relative difference {self.max_difference:.2g} (allowed {self.tolerance:g})"


@dataclass(frozen=True, eq=False)
class PruneResult:
    """Everything that :func:`pyprune.prune` made, stage by stage.

    ``evaluations`` and ``seconds`` are keyed by stage; evaluations use test data if it was given, else validation.
    """

    ranks: ClassRanks
    plan: Plan
    history: History
    slim: Compacted
    evaluations: Mapping[str, Evaluation]
    seconds: Mapping[str, float]


EPSILONS = (1e-12, 1e-2, 1e-1)
"""The constants, relative to a layer's mean square weight, at which every redundancy is shown beside the one asked."""

BINS = 100
"""Bins of a histogram of similarities, uniform on [0, 1]."""


@dataclass(frozen=True, eq=False)
class RandomKernels:
    """What kernels of independent normal numbers give in the place of a layer's own: the null of its redundancy.

    ``lambdas`` [4, T] as in :class:`LayerRedundancy`; ``mean``, ``std`` and ``point99`` (the 99 % point) of the
    similarities of ``pairs`` pairs at the constant that was asked, and their ``histogram``.
    """

    pairs: int
    lambdas: FloatArray
    mean: float
    std: float
    point99: float
    histogram: IntArray

    def __post_init__(self) -> None:
        _freeze(self)


@dataclass(frozen=True, eq=False)
class LayerRedundancy:
    """The redundancy of one convolution (CKRM paper, section 3.2).

    Parameters
    ----------
    shape
        (F2, F1, K1, K2): filters, input channels of a group, kernel.
    groups
        Groups of the convolution; only filters of one group make a pair, since others read other channels.
    pairs, all_pairs
        How many pairs were compared, and how many there are.
    mean_square
        Mean of the squared weights, to which the constants are relative.
    eps
        The relative constant of row 0 of ``counts``; rows 1 to 3 belong to :data:`EPSILONS`.
    counts
        [4, T] int64: pairs with Psi above each threshold.
    intervals
        [4, T, 2] float64: Wilson interval of lambda; both ends are lambda itself where all pairs were compared.
    mean, histogram
        Of Omega at ``eps``; the histogram is int64 [100], uniform on [0, 1].
    top
        The most similar pairs (i, j, Psi), best first.
    twins, twin_psi
        [F2]: each filter's most similar one among the pairs compared, -1 where it is in none, and how similar it is.
    random
        The null of such kernels; ``None`` where it was switched off or there is no pair.
    above_random
        How many pairs lie above the 99 % point of the null: 1 % of them for random kernels.
    faint
        How many filters have a mean square weight below ``eps`` times the layer's: any two of them count as alike.
    variant, note
        Which kernel computed it, and what there is to know.
    """

    shape: tuple[int, int, int, int]
    groups: int
    pairs: int
    all_pairs: int
    mean_square: float
    eps: float
    counts: IntArray
    intervals: FloatArray
    mean: float
    histogram: IntArray
    top: tuple[tuple[int, int, float], ...]
    twins: IntArray
    twin_psi: FloatArray
    random: RandomKernels | None = None
    above_random: int | None = None
    faint: int = 0
    variant: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        _freeze(self)

    @property
    def lambdas(self) -> FloatArray:
        """[4, T] float64: lambda at the constant asked and at :data:`EPSILONS`; NaN without pairs."""
        shares: FloatArray = self.counts / self.pairs if self.pairs else np.full(self.counts.shape, np.nan)
        return shares

    @property
    def sampled(self) -> bool:
        """Whether only some of the pairs were compared."""
        return self.pairs < self.all_pairs

    @property
    def z(self) -> float:
        """Mean of Omega against the null, in standard deviations of one random pair; NaN without a null."""
        if self.random is None or not self.random.std:
            return float("nan")
        return (self.mean - self.random.mean) / self.random.std

    @property
    def above_random_share(self) -> float:
        """Share of the pairs above the 99 % point of the null; NaN without a null."""
        return float("nan") if self.above_random is None else self.above_random / self.pairs


@dataclass(frozen=True, eq=False)
class CKRM:
    """How redundant the kernels of one or several networks are, layer by layer.

    ``result["conv1"]`` is the :class:`LayerRedundancy` of a layer of the only network, ``result["run 0", "conv1"]``
    that of a named network.

    Parameters
    ----------
    networks
        For each network its layers, in order of depth.
    thresholds
        Every t of lambda^t, in the order of the last axis of ``counts``.
    options
        Settings: eps, eps_absolute, pairs, seed, alpha, beta, gamma, confidence.
    left_out
        For each network the layers that were not measured, and why.
    notes
        What there is to know about the result as a whole.
    """

    networks: Mapping[str, Mapping[str, LayerRedundancy]]
    thresholds: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    FORMAT = "pyprune.ckrm"
    VERSION = 1

    def __post_init__(self) -> None:
        if not self.networks or not all(self.networks.values()):
            raise ValueError("CKRM: needs at least one network, and each at least one layer.")
        for network, layers in self.networks.items():
            for name, layer in layers.items():
                if why := _unsound(layer, len(self.thresholds)):
                    raise ValueError(f"CKRM: layer {name!r} of {network!r} has {why}.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CKRM) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, key: str | tuple[str, str]) -> LayerRedundancy:
        network, layer = key if isinstance(key, tuple) else (None, key)
        layers = self.layers(network)
        if layer not in layers:
            raise KeyError(f"CKRM: there is no layer {layer!r}{_nearest(layer, layers)}")
        return layers[layer]

    def layers(self, network: str | None = None) -> Mapping[str, LayerRedundancy]:
        """Return the layers of a network by name; the network may be left out where there is one.

        Raises
        ------
        KeyError
            If there is no such network, or several and none is named.
        """
        if network is None:
            if len(self.networks) > 1:
                raise KeyError(f"CKRM: there are {len(self.networks)} networks; name one of {list(self.networks)}.")
            return next(iter(self.networks.values()))
        if network not in self.networks:
            raise KeyError(f"CKRM: there is no network {network!r}{_nearest(network, self.networks)}")
        return self.networks[network]

    def lambdas(
        self, threshold: float | None = None, network: str | None = None, *, eps: float | None = None
    ) -> dict[str, float]:
        """Return lambda^t of every layer: the share of its pairs whose similarity is above t.

        Parameters
        ----------
        threshold
            One of ``thresholds``; the first by default.
        network
            May be left out where there is one.
        eps
            One of :data:`EPSILONS`, or nothing for the constant that was asked.

        Returns
        -------
        dict
            By layer; NaN for a layer without pairs.

        Raises
        ------
        ValueError
            If it was not measured at this threshold or constant.
        """
        row, column = self.row(eps), self.column(threshold)
        return {name: float(layer.lambdas[row, column]) for name, layer in self.layers(network).items()}

    def row(self, eps: float | None = None) -> int:
        """Return the row of ``counts`` that belongs to a constant; 0 is the one that was asked."""
        if eps is None or (eps == self.options.get("eps") and self.options.get("eps_absolute") is None):
            return 0
        if eps not in EPSILONS:
            raise ValueError(f"CKRM: lambda was measured at eps {list(EPSILONS)} and as asked; got {eps}.")
        return 1 + EPSILONS.index(eps)

    def column(self, threshold: float | None = None) -> int:
        """Return the column of ``counts`` that belongs to a threshold; the first one by default."""
        if threshold is None:
            return 0
        if threshold not in self.thresholds:
            raise ValueError(f"CKRM: lambda was measured at thresholds {list(self.thresholds)}; got {threshold}.")
        return self.thresholds.index(threshold)

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values; ``null`` stands for what does not exist."""
        return {
            "format": self.FORMAT,
            "version": self.VERSION,
            "thresholds": list(self.thresholds),
            "epsilons": list(EPSILONS),
            "options": json.loads(json.dumps(dict(self.options))),
            "notes": list(self.notes),
            "left_out": {network: dict(layers) for network, layers in self.left_out.items()},
            "networks": {
                network: {name: _redundancy_to_json(layer) for name, layer in layers.items()}
                for network, layers in self.networks.items()
            },
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON; :meth:`load` reads it back bit for bit."""
        files.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CKRM:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ValueError
            If the file is missing, truncated, of another kind, inconsistent or from a newer pyprune.
        """
        return cls.from_json(files.read_json("CKRM.load", path, cls.FORMAT, cls.VERSION), str(path))

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str = "the content") -> CKRM:
        """Return what :meth:`to_json` gave; ``ValueError`` naming ``where`` if it cannot be that."""
        try:
            if content["epsilons"] != list(EPSILONS):
                raise KeyError("epsilons")
            return cls(
                networks={
                    str(network): {str(name): _redundancy(layer) for name, layer in layers.items()}
                    for network, layers in content["networks"].items()
                },
                thresholds=tuple(float(t) for t in content["thresholds"]),
                options=dict(content["options"]),
                left_out={
                    network: {name: str(why) for name, why in layers.items()}
                    for network, layers in content["left_out"].items()
                },
                notes=tuple(str(note) for note in content["notes"]),
            )
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(f"CKRM.load: {where} lacks or garbles {error}.") from None
        except ValueError as error:
            raise ValueError(f"CKRM.load: {where} is damaged ({error})") from None

    def __str__(self) -> str:
        parts = [_redundancy_table(self, network) for network in self.networks]
        return "\n\n".join([*parts, "\n".join(self.notes)] if self.notes else parts)


def _freeze(value: RandomKernels | LayerRedundancy) -> None:
    """Give the dataclass its own, read-only copies of its arrays: several layers share one null."""
    for one in fields(value):
        array = getattr(value, one.name)
        if isinstance(array, np.ndarray):
            own = array.copy()
            own.flags.writeable = False
            object.__setattr__(value, one.name, own)


def _nearest(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _unsound(layer: LayerRedundancy, thresholds: int) -> str:
    """Return what is wrong with the numbers of a layer, or nothing."""
    rows, filters, bins = 1 + len(EPSILONS), layer.shape[0], (BINS,)
    if layer.counts.shape != (rows, thresholds) or layer.intervals.shape != (rows, thresholds, 2):
        return f"counts of shape {list(layer.counts.shape)} for {thresholds} thresholds"
    if not 0 <= layer.pairs <= layer.all_pairs or ((layer.counts < 0) | (layer.counts > layer.pairs)).any():
        return f"counts that {layer.pairs} of {layer.all_pairs} pairs cannot give"
    if layer.histogram.shape != bins or (layer.histogram < 0).any() or layer.histogram.sum() != layer.pairs:
        return f"a histogram that does not hold its {layer.pairs} pairs"
    if layer.twins.shape != (filters,) or layer.twin_psi.shape != (filters,):
        return f"twins for other than its {filters} filters"
    if (layer.twins < -1).any() or (layer.twins >= filters).any():
        return f"twins beyond its {filters} filters"
    if not all(0 <= i < filters and 0 <= j < filters for i, j, _ in layer.top):
        return f"similar pairs beyond its {filters} filters"
    null = layer.random
    if null is not None and (null.lambdas.shape != (rows, thresholds) or null.histogram.shape != bins):
        return "a null of another shape"
    return ""


def _plain(value: Any) -> Any:
    """Return arrays as nested lists and NaN as ``None``, for JSON."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _redundancy_to_json(layer: LayerRedundancy) -> dict[str, Any]:
    content = {one.name: _plain(getattr(layer, one.name)) for one in fields(layer)}
    content["lambdas"] = _plain(layer.lambdas)  # for readers of the file; loading computes them again
    content["z"] = _plain(layer.z)
    if layer.random is not None:
        content["random"] = {one.name: _plain(getattr(layer.random, one.name)) for one in fields(layer.random)}
    return content


def _redundancy(content: Mapping[str, Any]) -> LayerRedundancy:
    null = content["random"]
    F2, F1, K1, K2 = (int(size) for size in content["shape"])
    return LayerRedundancy(
        shape=(F2, F1, K1, K2),
        groups=int(content["groups"]),
        pairs=int(content["pairs"]),
        all_pairs=int(content["all_pairs"]),
        mean_square=float(content["mean_square"]),
        eps=float(content["eps"]),
        counts=np.array(content["counts"], np.int64),
        intervals=np.array(content["intervals"], np.float64),
        mean=float(np.float64(content["mean"])),
        histogram=np.array(content["histogram"], np.int64),
        top=tuple((int(i), int(j), float(psi)) for i, j, psi in content["top"]),
        twins=np.array(content["twins"], np.int64),
        twin_psi=np.array(content["twin_psi"], np.float64),
        random=None if null is None else _random_kernels(null),
        above_random=None if content["above_random"] is None else int(content["above_random"]),
        faint=int(content["faint"]),
        variant=str(content["variant"]),
        note=str(content["note"]),
    )


def _random_kernels(content: Mapping[str, Any]) -> RandomKernels:
    return RandomKernels(
        pairs=int(content["pairs"]),
        lambdas=np.array(content["lambdas"], np.float64),
        mean=float(content["mean"]),
        std=float(content["std"]),
        point99=float(content["point99"]),
        histogram=np.array(content["histogram"], np.int64),
    )


def _redundancy_table(result: CKRM, network: str) -> str:
    """Return one network as text: a line for each layer."""
    layers = result.networks[network]
    asked = [f"lambda>{t:g}" for t in result.thresholds]
    head = [
        "layer", "kernels", "pairs", *asked, *(f"eps {eps:g}" for eps in EPSILONS), "random", "mean", "z",
        "above 99%", "faint",
    ]  # fmt: skip
    rows = [_redundancy_row(name, layer) for name, layer in layers.items()]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.ljust(wide) if i < 2 else cell.rjust(wide)
            for i, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    notes = _grouped({name: layer.note for name, layer in layers.items() if layer.note})
    left_out = _grouped({name: f"left out, {why}" for name, why in result.left_out.get(network, {}).items()})
    for note, names in (*notes.items(), *left_out.items()):
        shown = ", ".join(_printable(name) for name in names[:4])
        lines.append(f"{note}: {shown}{f' and {len(names) - 4} more' if len(names) > 4 else ''}")
    return "\n".join([_printable(network), *lines] if len(result.networks) > 1 else lines)


def _redundancy_row(name: str, layer: LayerRedundancy) -> list[str]:
    def share(value: float) -> str:
        return "-" if np.isnan(value) else f"{value:.4f}"

    asked = [share(value) for value in layer.lambdas[0]]
    if layer.sampled:
        asked = [f"{one} ({low:.4f} to {high:.4f})" for one, (low, high) in zip(asked, layer.intervals[0], strict=True)]
    groups = f" in {layer.groups} groups" if layer.groups > 1 else ""
    return [
        _printable(name),
        "x".join(str(size) for size in layer.shape) + groups,
        f"{layer.pairs:,} of {layer.all_pairs:,}" if layer.sampled else f"{layer.pairs:,}",
        *asked,
        *(share(value) for value in layer.lambdas[1:, 0]),
        "-" if layer.random is None else share(float(layer.random.lambdas[0, 0])),
        share(layer.mean),
        "-" if np.isnan(layer.z) else f"{layer.z:+.2f}",
        "-" if layer.above_random is None else f"{layer.above_random_share:.1%}",
        str(layer.faint),
    ]


def _printable(name: str) -> str:
    """Return a name as a terminal may show it: one from a file could hold control sequences."""
    return name if name.isprintable() else ascii(name)
