"""The frozen dataclasses that the stages hand to one another. Nothing here computes more than a ratio."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pyprune import files

if TYPE_CHECKING:
    import torch
    from torch import nn

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
    """Why one filter stays or goes."""

    reason: str
    keep: bool
    cluster: int | None = None
    medoid: bool = False
    region: Region | None = None
    silhouette: float | None = None
    avg: float | None = None
    std: float | None = None


@dataclass(frozen=True)
class LayerWhy(Sequence[FilterWhy]):
    """What the selection saw in one layer; indexing gives the :class:`FilterWhy` of a filter.

    ``note`` says why a layer was left alone and is empty otherwise. ``k`` and ``silhouette`` are the chosen
    number of clusters and its mean silhouette; ``avg_mean`` and ``std_mean`` the dividing point.
    """

    filters: tuple[FilterWhy, ...]
    note: str = ""
    k: int | None = None
    silhouette: float | None = None
    avg_mean: float | None = None
    std_mean: float | None = None

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

    ``val_loss`` is the mean cross-entropy and ``val_top1`` lies in [0, 1].
    """

    epoch: int
    lr: float
    train_loss: float
    val_loss: float | None
    val_top1: float | None
    seconds: float


@dataclass(frozen=True)
class History:
    """What :func:`pyprune.finetune` did; ``best`` is the number of the epoch whose weights the model holds now.

    ``options["chosen_by"]`` says how that epoch was chosen.
    """

    epochs: tuple[Epoch, ...]
    best: int
    options: Mapping[str, Any] = field(default_factory=dict)

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
            return cls(epochs, int(content["best"]), dict(content["options"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"History.load: {path} lacks or garbles {error}.") from None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well a model classifies.

    ``confusion`` [C, C] int64 counts images by true class (rows) and predicted class (columns); ``top1`` and
    ``top5`` are shares in [0, 1] (``top5`` is ``None`` below six classes); ``auc`` is the mean one-against-rest
    area under the ROC curve, ``None`` where a class has no image.
    """

    confusion: IntArray
    loss: float
    top5: float | None
    auc: float | None

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
        }  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` as JSON."""
        files.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read what :meth:`save` wrote; ``ValueError`` if it cannot be that."""
        content = files.read_json("Evaluation.load", path, cls.FORMAT, cls.VERSION)
        try:
            confusion = np.array(content["confusion"], np.int64)
            return cls(confusion, content["loss"], content["top5"], content["auc"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"Evaluation.load: {path} lacks or garbles {error}.") from None


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
    keeps the channel, and ``"scatter"`` removes; ``beyond`` lists what a lossy ``"union"`` removes beyond the plan.
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
    channels.
    """

    layers: tuple[LayerAnalysis, ...]
    parameters: int
    parameters_left: int
    residual: str = "scatter"
    parameters_coupled: int = 0

    @property
    def lossy(self) -> bool:
        """Whether filters leave that the plan keeps."""
        return any(layer.beyond for layer in self.layers)

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
                lines.append(f"{'':{wide}}  removed beyond the plan {len(layer.beyond)} ({_listed(layer.beyond)})")
        lines.append(f"parameters in all: {self.parameters:,} > {self.parameters_left:,}")
        if coupled := sum(layer.coupled for layer in self.layers):
            lines.append(
                f"coupling: {coupled} planned filters have a channel that another branch keeps; "
                f"intersect would keep them, {self.parameters_coupled:,} parameters more than scatter"
            )
        if self.lossy:
            lines.append("lossy: the network will differ from the one that the plan masks")
        return "\n".join(lines)


def _grouped(kept: Mapping[int, str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, why in kept.items():
        groups.setdefault(why, []).append(index)
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
class Compacted:
    """A slim model and its proof.

    ``model`` is the slim ``nn.Module``; ``kept`` says for each layer which filters stay against the plan, and why:
    ``{layer: {filter: reason}}``. ``before`` and ``after`` are profiles of the original and the slim network on
    ``example_inputs``, their latencies measured interleaved. ``residual`` says what happened where branches are added;
    under ``"union"`` the certificate is about the network masked by the plan and ``beyond``, the filters that left
    although the plan keeps them: ``{layer: filters}``.
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

    @property
    def lossy(self) -> bool:
        """Whether filters left that the plan keeps."""
        return bool(self.beyond)


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
