"""What a network costs, what compaction leaves of it, and the proof."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pyprune import files
from pyprune.types import reading
from pyprune.types.common import IntArray, grouped
from pyprune.types.plans import Plan

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer


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
            layers = tuple(reading.record(LayerCount, layer) for layer in reading.listed(content, "layers"))
            return reading.record(cls, content, layers=layers)
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
            for why, filters in grouped(layer.kept).items():
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
