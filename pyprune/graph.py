"""The network as a graph: tracing, and which channels must leave together."""

from __future__ import annotations

import ast
import keyword
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from pyprune import aliases, views
from pyprune import operations as ops
from pyprune.hints import did_you_mean
from pyprune.types import IntArray, Plan

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+")


class TraceError(ValueError):
    """torch.fx cannot follow the forward of a model; ``reason`` is what it says."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_name(who: str, name: str) -> None:
    """Refuse a module, parameter or node name that could be more than a name.

    torch.fx writes names raw into the code that it generates, so a name is accepted only if it is an ASCII
    identifier or a number, at most 128 characters, and no keyword.

    Raises
    ------
    ValueError
        If it is anything else.
    """
    if len(name) > 128 or not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ValueError(
            f"{who}: names must be ASCII identifiers or numbers of at most 128 characters; got {name[:140]!r}. "
            "Rename it."
        )


def trace(model: nn.Module, who: str = "trace", *, training: bool = False) -> fx.Graph:
    """Trace ``model`` in eval (or training) mode with torch.fx and return its graph; training flags are put back.

    torch's own modules are leaves. No code is generated or executed.

    Raises
    ------
    ValueError
        If a name is hostile (see :func:`check_name`).
    TraceError
        A ``ValueError`` too: if torch.fx cannot follow ``forward``.
    """
    for module in model.modules():
        for name in (*module._modules, *module._parameters, *module._buffers):
            check_name(who, name)
    flags = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        return _Tracer().trace(model)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise TraceError(
            f"{who}: {type(model).__name__} cannot be traced by torch.fx ({reason[0]}). "
            "Remove data-dependent control flow from forward, or name the taps by hand where ranks are read.",
            reason[0],
        ) from None
    finally:
        for module, training in flags.items():
            module.training = training


class _Proxy(fx.Proxy):
    """Traces ``a += b`` as what it is: torch.fx makes a sum of it, and whoever reads ``a`` later gets the old one."""

    def __iadd__(self, other: Any) -> Any:
        return self._written(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._written(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._written(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._written(operator.itruediv, other)

    def _written(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def convolutions(model: nn.Module) -> dict[str, Convolution]:
    """Return the convolutions of ``model`` by qualified name, in order of definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Convolution)}


def prunable(model: nn.Module) -> dict[str, Convolution | Transposed]:
    """Return the layers that a plan may name: convolutions, and transposed ones, which no criterion ranks."""
    kinds = Convolution | Transposed
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def zero_filters(model: nn.Module, name: str, filters: IntArray) -> None:
    """Set the entries of parameter ``name`` that belong to ``filters`` to zero: rows, or what a transposed one has."""
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    parameter = model.get_parameter(name).detach()
    index = torch.from_numpy(filters).to(parameter.device)
    if type(owner) in ops.TRANSPOSED and name.endswith(".weight"):
        weight = ops.grouped_weight(owner)
        weight[index // weight.shape[1], index % weight.shape[1]] = 0
    else:
        parameter.index_fill_(0, index, 0)


def check_plan(who: str, model: nn.Module, plan: Plan) -> None:
    """Raise ``ValueError`` unless every layer of ``plan`` is a convolution of ``model`` with those filters.

    Transposed convolutions are convolutions here, and their filters are their output channels.
    """
    layers = prunable(model)
    for name, kept in plan.keep.items():
        check_layer(who, name, layers)
        count = layers[name].out_channels
        if plan.filters.get(name, count) != count:
            raise ValueError(
                f"{who}: the plan is for another model: {name!r} has {count} filters here and "
                f"{plan.filters[name]} in the plan."
            )
        if kept[-1] >= count:
            raise ValueError(f"{who}: {name!r} has filters 0 to {count - 1}; the plan keeps {kept[-1]}.")


def check_layer(who: str, name: str, layers: Iterable[str]) -> None:
    """Raise ``ValueError`` unless ``name`` is one of ``layers``, suggesting the nearest that is."""
    layers = list(layers)
    if name not in layers:
        hint = did_you_mean(name, layers, f"It has {', '.join(layers[:8])}.")
        raise ValueError(f"{who}: the model has no convolution named {name!r}.{hint}")


def call_counts(graph: fx.Graph) -> Counter[str]:
    """Return how many times ``graph`` calls each module."""
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_module")


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Return the parameters and buffers that are one tensor under several names: each with one of the others."""
    named = _names(model)
    return {name: next(o for o in names if o != name) for names in named.values() if len(names) > 1 for name in names}


def _names(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of each parameter and buffer, by its id; a module that is there twice counts once."""
    named: dict[int, list[str]] = defaultdict(list)
    for owner, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                named[id(tensor)].append(f"{owner}.{leaf}" if owner else leaf)
    return named


def shared_layers(model: nn.Module) -> dict[str, list[str]]:
    """Return the layers that are several by name and one by weight: each with all of them, itself included.

    They are of one type, with one weight of as many groups, and share neither weight nor bias with anything else: so
    what leaves one of them can leave them all.
    """
    named = _names(model)
    kinds = ops.CONVOLUTIONS | ops.TRANSPOSED | {nn.Linear}
    found: dict[str, list[str]] = {}
    for names in named.values():
        if len(names) == 1 or not all(name.rpartition(".")[2] == "weight" for name in names):
            continue
        layers = [name.rpartition(".")[0] for name in names]
        modules: list[Any] = [model.get_submodule(layer) for layer in layers]
        alike = len({(type(module), getattr(module, "groups", 1)) for module in modules}) == 1
        biases = {name for one in modules if one._parameters.get("bias") is not None for name in named[id(one.bias)]}
        own = biases <= {f"{layer}.bias" for layer in layers}
        if alike and type(modules[0]) in kinds and own:
            found |= dict.fromkeys(layers, layers)
    return found


def is_changed(module: nn.Module) -> str:
    """Say what makes ``module`` compute something other than its type says: a hook, a parametrization, or nothing."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a forward hook"
    if "forward" in vars(module):
        return "has its forward replaced"
    if hasattr(module, "parametrizations"):
        return "has a parametrized weight"
    return ""


def dead_slices(model: nn.Module, plan: Plan, who: str = "dead_slices") -> dict[str, IntArray]:
    """Return what a mask zeroes: for each parameter, by qualified name, the indices along its first dimension.

    These are the removed filters of the plan's layers, their biases, and the affine slices of every per-channel
    norm that a removed channel reaches before the next operation that mixes channels. A channel is followed
    through a join only where every producer of it is removed. Filters that :func:`unmaskable` names are left out.

    Parameters
    ----------
    model
        Not changed; it must be traceable by torch.fx.
    plan
        Layers that are not in it keep every filter.

    Returns
    -------
    dict
        Sorted int64 indices; parameters with nothing to zero are left out. For the weight of a transposed convolution
        they are output channels (:func:`zero_filters` knows where those lie).

    Raises
    ------
    ValueError
        If the plan does not fit the model, or the model cannot be traced.
    """
    check_plan(who, model, plan)
    return follow_masks(model, plan, trace(model, who))[0]


def unmaskable(model: nn.Module, plan: Plan, who: str = "unmaskable") -> dict[str, dict[int, str]]:
    """Return the removed filters that no mask can silence, and why: ``{layer: {filter: reason}}``.

    A norm without affine parameters turns a zero channel into a constant that no parameter controls, and a norm
    over several channels lets it change the others. Such filters stay. Parameters and errors are those of
    :func:`dead_slices`.
    """
    check_plan(who, model, plan)
    return follow_masks(model, plan, trace(model, who))[1]


def follow_masks(
    model: nn.Module, plan: Plan, graph: fx.Graph, *, zeroed: bool = False
) -> tuple[dict[str, IntArray], dict[str, dict[int, str]]]:
    """Return what :func:`dead_slices` and :func:`unmaskable` return, for a checked plan and a graph traced before.

    The walk is repeated until no further filter turns out to be unmaskable: each may revive a norm's slice. With
    ``zeroed``, for a model that was masked before, filters that reach a norm's slice that is not zero already are
    unmaskable too.
    """
    stays: dict[str, dict[int, str]] = {}
    while True:
        walk = _MaskWalk(model, plan, stays, zeroed)
        walk.follow(graph)
        if not walk.found:
            return walk.slices(), stays
        for name, reasons in walk.found.items():
            stays[name] = {**stays.get(name, {}), **reasons}


@dataclass(frozen=True, eq=False)
class _Stream:
    """A tensor between two mixing operations: what each channel comes from, and whether nothing alive is among it."""

    dead: npt.NDArray[np.bool_]  # [C]; padded channels too, which no filter owns
    owners: tuple[tuple[str, IntArray], ...]  # a layer and, for each channel, its filter there or -1
    ndim: int  # of the tensor; 2 after flattening
    flat: bool = False  # each channel stands for a run of columns of unknown length
    places: views.Places | None = None  # while views have the channels on several dimensions

    def at(self, channels: IntArray) -> _Stream:
        owners = tuple((name, filters[channels]) for name, filters in self.owners)
        return replace(self, dead=self.dead[channels], owners=owners)

    def padded(self, before: int, after: int) -> _Stream:
        """Return the stream with channels around it that belong to no filter."""
        widths = (before, after)
        owners = tuple((name, np.pad(filters, widths, constant_values=-1)) for name, filters in self.owners)
        return replace(self, dead=np.pad(self.dead, widths, constant_values=True), owners=owners)

    def owned(self) -> npt.NDArray[np.bool_]:
        """Return [C] which channels come from any filter at all: without one there is nothing to mask."""
        owned = np.zeros(len(self.dead), np.bool_)
        for _, filters in self.owners:
            owned |= filters >= 0
        return owned


class _MaskWalk:
    """One pass over the graph, with the removed filters that are not known to be unmaskable taken as zero."""

    def __init__(self, model: nn.Module, plan: Plan, stays: dict[str, dict[int, str]], zeroed: bool) -> None:
        self.model, self.zeroed = model, zeroed
        self.modules = dict(model.named_modules())
        self.tied = tied_parameters(model)
        self.removed = {
            name: np.zeros(module.out_channels, np.bool_)  # also where a plan says nothing: padding may go around it
            for name, module in self.modules.items()
            if type(module) in ops.CONVOLUTIONS | ops.TRANSPOSED
        }
        self.removed |= {name: self._removed(name, kept, stays.get(name, {})) for name, kept in plan.keep.items()}
        self.found: dict[str, dict[int, str]] = defaultdict(dict)
        self.streams: dict[fx.Node, _Stream | None] = {}
        self.numbers: dict[fx.Node, Any] = {}
        self.norms: dict[str, list[_Stream | None]] = defaultdict(list)
        self.silent = dict(self.removed)  # with the depthwise filters over removed channels
        self.calls: Counter[str] = Counter()
        self.shared = shared_layers(model)
        for name in self.removed:
            self._check_filters(name)
        for name, names in self.shared.items():
            self._share(name, names)

    def _removed(self, name: str, kept: IntArray, stays: dict[int, str]) -> npt.NDArray[np.bool_]:
        dead = np.ones(self.modules[name].out_channels, np.bool_)
        dead[kept] = False
        dead[list(stays)] = False
        return dead

    def _share(self, name: str, names: list[str]) -> None:
        """Keep the filters that another layer with the same weights keeps."""
        if name in self.removed:
            common = np.logical_and.reduce([self.removed[one] for one in names])
            other = next(one for one in names if one != name)
            left = self.removed[name] & ~common
            self._revive(
                _Stream(left, ((name, np.arange(len(left))),), 0), f"shares its parameters with {other}.weight"
            )

    def _check_filters(self, name: str) -> None:
        """Keep the filters of a layer whose weight is not its own, or not a parameter."""
        other = self.tied.get(f"{name}.weight") or self.tied.get(f"{name}.bias")
        other = None if name in self.shared else other
        reason = f"shares its parameters with {other}" if other else ""
        if not isinstance(vars(self.modules[name])["_parameters"].get("weight"), nn.Parameter):
            reason = "has a parametrized weight"
        if reason:
            self._revive(_Stream(self.removed[name], ((name, np.arange(len(self.removed[name]))),), 0), reason)

    def _revive(self, stream: _Stream, reason: str) -> None:
        for name, filters in stream.owners:
            for index in filters[stream.dead & (filters >= 0)]:
                if self.removed[name][index]:
                    self.found[name].setdefault(int(index), reason)

    def follow(self, graph: fx.Graph) -> None:
        """Walk ``graph``, filling ``found`` and ``norms``."""
        self.calls = call_counts(graph)
        written = aliases.overwritten(self.model, graph)
        for node in graph.nodes:
            self.streams[node] = found = self._step(node)
            source = node.all_input_nodes[0] if node in written else node
            if found is not self.streams[source]:  # and whoever reads the old one from now on reads this one
                for other in written[node]:
                    self.streams[other] = found if other is source else None
        for name, streams in self.norms.items():  # a norm used twice is masked only where both uses are
            known = [stream.dead for stream in streams if stream is not None]
            common = np.logical_and.reduce(known) if len(known) == len(streams) else np.False_
            for stream in streams:
                if stream is not None and (left := stream.dead & ~common).any():
                    self._revive(replace(stream, dead=left), f"reaches {name}, which other channels share")

    def slices(self) -> dict[str, IntArray]:
        """Return what is zero, by parameter."""
        found: dict[str, IntArray] = {}
        masked = {**self.silent, **{name: s[0].dead for name, s in self.norms.items() if s[0] is not None}}
        for name, dead in masked.items():
            for leaf in ("weight", "bias"):
                if dead.any() and getattr(self.modules[name], leaf) is not None:
                    found[f"{name}.{leaf}"] = np.flatnonzero(dead)
        return found

    def _step(self, node: fx.Node) -> _Stream | None:
        self._count(node)
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, fx.Node) and len(node.all_input_nodes) == 1:  # as in 2 * x
            source = node.all_input_nodes[0]
        stream = self.streams.get(source) if isinstance(source, fx.Node) else None
        if stream is not None and views.is_view(node, self.modules) and not ops.is_flatten(node, self.modules):
            return self._view(node, stream)
        if stream is not None and stream.places is not None:
            return stream if node.op == "call_method" and node.target in ops.SAME_METHODS else None
        if node.op == "call_module":
            return self._module(str(node.target), node, stream)
        if node.op not in ("call_function", "call_method"):
            return None
        if node.target in ops.ADD_FUNCTIONS or (node.op == "call_method" and node.target in ops.ADD_METHODS):
            return stream if len(node.all_input_nodes) == 1 else self._add(node)
        if node.target in ops.CAT_FUNCTIONS:
            return self._cat(node)
        if stream is None:
            return None
        if ops.is_flatten(node, self.modules):
            return replace(stream, flat=stream.ndim > 2, ndim=2)
        dims = ops.spatial_mean(node, stream.ndim)
        if dims is not None:
            keeps = ops.argument(node, 2, "keepdim", False)
            return stream if keeps else replace(stream, ndim=stream.ndim - len(dims))
        arithmetic = {**ops.SCALAR_FUNCTIONS, **ops.PRODUCT_FUNCTIONS, **ops.SUB_FUNCTIONS}
        if node.target in (ops.PRODUCT_METHODS | ops.SUB_METHODS if node.op == "call_method" else arithmetic):
            return stream if len(node.all_input_nodes) == 1 else None
        if node.target is operator.getitem:
            index = None if stream.flat else ops.whole_batch_index(node, stream.ndim)
            return None if index is None else stream.at(np.arange(len(stream.dead))[index[1]])
        if node.target in {**ops.PIXEL_SHUFFLE_FUNCTIONS, **ops.PIXEL_UNSHUFFLE_FUNCTIONS}:
            factor = next((one for one in (*node.args[1:], *node.kwargs.values()) if isinstance(one, int)), 0)
            shuffles = node.target in ops.PIXEL_SHUFFLE_FUNCTIONS
            return _shuffled(stream, factor**2, shuffles) if factor and not stream.flat else None
        if node.target in ops.PAD_FUNCTIONS:
            padding = None if stream.flat else ops.padding(node, stream.ndim)
            return None if padding is None or min(padding.channels) < 0 else stream.padded(*padding.channels)
        same = node.target in ops.ACTIVATION_METHODS | ops.SAME_METHODS
        known = same if node.op == "call_method" else node.target in ops.CHANNELWISE_FUNCTIONS
        return stream if known else None

    def _count(self, node: fx.Node) -> None:
        """Note the numbers that the network reads off sizes: those of a small tensor, whatever the real ones are."""
        source: Any = node.args[0] if node.args else None
        stream = self.streams.get(source) if isinstance(source, fx.Node) else None
        if ops.is_shape(node) or (node.op == "call_method" and node.target == "size"):
            if stream is not None and not stream.flat and stream.places is None:
                shape = torch.Size(_small(stream))
                dim = ops.argument(node, 1, "dim") if node.op == "call_method" else None
                self.numbers[node] = shape if dim is None else shape[dim]
        elif node.target in _NUMBER_FUNCTIONS and all(one in self.numbers for one in node.all_input_nodes):
            function: Any = node.target
            self.numbers[node] = function(*fx.map_arg(node.args, self.numbers.get))

    def _view(self, node: fx.Node, stream: _Stream) -> _Stream | None:
        """Return the stream behind a view: a channel shuffle leaves whole channels in another order."""
        if stream.flat:
            return None
        places = stream.places or views.start(_small(stream))
        places_after = views.moved(node, places, self.modules, self.numbers.get)
        if places_after is None:
            return None
        line = views.along_one_dimension(places_after.channels())
        if line is None:
            return replace(stream, places=places_after)
        dim, channels = line
        if dim != 1 or len(places.shape) < 2:
            return None
        return replace(stream.at(channels), ndim=places_after.entries.ndim, places=None)

    def _module(self, name: str, node: fx.Node, stream: _Stream | None) -> _Stream | None:
        module = self.modules[name]
        kind = type(module)
        if name in self.removed and not is_changed(module):
            return self._convolution(name, module, stream)
        if kind in ops.NORMS | ops.GROUP_NORMS and (stream is None or not stream.dead.any()):
            self.norms[name].append(None)
        if stream is None or is_changed(module):
            return None
        if kind in ops.CHANNELWISE or (not stream.flat and ops.pads_space(module, stream.ndim)):
            return stream
        if ops.is_flatten(node, self.modules):
            return replace(stream, flat=stream.ndim > 2, ndim=2)
        if kind in (nn.PixelShuffle, nn.PixelUnshuffle) and not stream.flat:
            factor = module.upscale_factor if kind is nn.PixelShuffle else module.downscale_factor
            return _shuffled(stream, factor**2, kind is nn.PixelShuffle)
        if kind in ops.NORMS:
            return self._norm(name, module, stream) if stream.dead.any() else stream
        if kind in ops.GROUP_NORMS:
            return self._group_norm(name, module, stream) if stream.dead.any() else stream
        if ops.normalises_positions(module, stream.ndim) and not stream.flat:
            return stream if getattr(module, "bias", None) is None else None
        if kind in ops.MIXING_NORMS:
            self._revive(stream, f"reaches {name}, a {kind.__name__}, which mixes it with other channels")
        return None

    def _convolution(self, name: str, module: Any, stream: _Stream | None) -> _Stream:
        """Return new channels; a depthwise convolution mixes none, so its filters over removed ones are masked too."""
        dead, ndim = self.removed[name], len(module.kernel_size) + 2
        owners: tuple[tuple[str, IntArray], ...] = ((name, np.arange(len(dead))),)
        if stream is not None and stream.ndim == ndim and self._is_depthwise(name, module, len(stream.dead)):
            above = stream.at(np.repeat(np.arange(len(stream.dead)), len(dead) // len(stream.dead)))
            over = above.dead & above.owned()
            if self.zeroed and module.bias is not None:
                alive = over & ~dead & (module.bias != 0).cpu().numpy()
                self._revive(replace(above, dead=alive), f"reaches {name}, whose bias is not zero")
                over &= ~alive
            dead, owners = dead | over, owners + above.owners
        self.silent[name] = dead
        return _Stream(dead, owners, ndim)

    def _is_depthwise(self, name: str, module: Any, channels: int) -> bool:
        """Say whether each filter reads one channel, and nothing but this call reads the filters."""
        own = not any(f"{name}.{leaf}" in self.tied for leaf in ("weight", "bias")) and self.calls[name] == 1
        plain = isinstance(vars(module)["_parameters"].get("weight"), nn.Parameter)
        return own and plain and 1 < module.groups == module.in_channels == channels

    def _norm(self, name: str, module: Any, stream: _Stream) -> _Stream | None:
        """Return the stream behind a per-channel norm, after noting the slices it zeroes."""
        if keeps_zeros(module):
            return stream
        tied = self.tied.get(f"{name}.weight") or self.tied.get(f"{name}.bias")
        if not module.affine or tied:
            why = f"which shares its parameters with {tied}" if tied else "a norm without affine parameters"
            self._revive(stream, f"reaches {name}, {why}")
            return None
        if stream.flat:  # the norm's own size says how long each channel's run of columns is
            run = module.num_features // len(stream.dead)
            stream = replace(stream.at(np.repeat(np.arange(len(stream.dead)), run)), flat=False)
        return self._masked_norm(name, module, stream)

    def _group_norm(self, name: str, module: Any, stream: _Stream) -> _Stream | None:
        """Return the stream behind a GroupNorm: only a group that is removed as a whole is silent there."""
        if stream.flat or len(stream.dead) != module.num_channels:
            self._revive(stream, f"reaches {name}, a GroupNorm, which mixes it with other channels")
            return None
        whole = np.repeat(stream.dead.reshape(module.num_groups, -1).all(1), len(stream.dead) // module.num_groups)
        self._revive(
            replace(stream, dead=stream.dead & ~whole),
            f"reaches {name}, a GroupNorm, which mixes it with other channels",
        )
        stream = replace(stream, dead=whole)
        tied = self.tied.get(f"{name}.weight") or self.tied.get(f"{name}.bias")
        if tied:
            self._revive(stream, f"reaches {name}, which shares its parameters with {tied}")
            return None
        return self._masked_norm(name, module, stream) if module.affine else stream

    def _masked_norm(self, name: str, module: Any, stream: _Stream) -> _Stream | None:
        """Note the slices of an affine norm that a mask zeroes, and return the stream behind it."""
        stream = replace(stream, dead=stream.dead & stream.owned())
        if self.zeroed and len(stream.dead) == len(module.weight):
            alive = ((module.weight != 0) | (module.bias != 0)).cpu().numpy()
            self._revive(replace(stream, dead=stream.dead & alive), f"reaches {name}, whose slice is not zero")
        self.norms[name].append(stream if len(stream.dead) == len(module.weight) else None)
        return self.norms[name][-1]

    def _add(self, node: fx.Node) -> _Stream | None:
        """Return the sum of streams: a channel is zero where all its producers are."""
        sources = [*node.args, *(node.kwargs[key] for key in ("input", "other") if key in node.kwargs)]
        streams = [self.streams.get(source) for source in sources if isinstance(source, fx.Node)]
        first = streams[0] if streams else None
        if first is None or len(streams) != len(sources) or len(streams) != 2:
            return None
        second = streams[1]
        if second is None or second.dead.shape != first.dead.shape or second.flat != first.flat:
            return None
        return replace(first, dead=first.dead & second.dead, owners=first.owners + second.owners)

    def _cat(self, node: fx.Node) -> _Stream | None:
        """Return streams joined along the channels."""
        sources = ops.argument(node, 0, "tensors")
        found = [self.streams.get(source) for source in sources] if isinstance(sources, (list, tuple)) else [None]
        streams = [stream for stream in found if stream is not None]
        if ops.argument(node, 1, "dim", 0) != 1 or len(streams) != len(found) or any(s.flat for s in streams):
            return None
        sizes = [len(stream.dead) for stream in streams]
        parts = [stream.padded(sum(sizes[:i]), sum(sizes[i + 1 :])) for i, stream in enumerate(streams)]
        owners = tuple(owner for part in parts for owner in part.owners)
        return replace(streams[0], dead=np.concatenate([s.dead for s in streams]), owners=owners)


def _small(stream: _Stream) -> tuple[int, ...]:
    """Return the shape of a small tensor with the channels of ``stream``: only how its entries move counts."""
    return (2, len(stream.dead), *(3, 5, 7)[: stream.ndim - 2])


def _shuffled(stream: _Stream, run: int, joins: bool) -> _Stream | None:
    """Return the stream behind a pixel shuffle, which makes one channel of a ``run`` or, undone, a run of each."""
    if not joins:
        return stream.at(np.repeat(np.arange(len(stream.dead)), run))
    if len(stream.dead) % run:
        return None
    owners = tuple((name, filters[i::run]) for name, filters in stream.owners for i in range(run))
    dead: npt.NDArray[np.bool_] = np.asarray(stream.dead.reshape(-1, run).all(1))
    return replace(stream, dead=dead, owners=owners)


_NUMBER_FUNCTIONS = frozenset({operator.getitem, operator.floordiv, operator.mul, operator.add, operator.sub})


def keeps_zeros(module: Any) -> bool:
    """Say whether ``module`` is a norm of each channel by its own statistics that maps zero to zero."""
    return type(module) in ops.NORMS and not module.affine and module.running_mean is None


_PLAIN = (
    ast.Module, ast.FunctionDef, ast.ClassDef, ast.arguments, ast.arg, ast.Return, ast.Assign, ast.AnnAssign,
    ast.Expr, ast.Call, ast.keyword, ast.Attribute, ast.Name, ast.Load, ast.Store,
    ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Slice,
    ast.Subscript, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult,
    ast.BitOr, ast.UnaryOp, ast.USub, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
    ast.With, ast.withitem, ast.Import, ast.ImportFrom, ast.alias,
)  # fmt: skip


def check_source(who: str, source: str, names: Collection[str], imports: Collection[str] = ()) -> None:
    """Refuse generated source that could do anything but compute with tensors.

    Only the syntax of assignments and calls is accepted, only ``names`` besides what the source itself binds, no
    attribute or name with two leading underscores, and only the modules in ``imports``.

    Raises
    ------
    ValueError
        If the source holds anything else.
    """
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f"{who}: generated source is not Python ({error}).") from None
    bound = {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in nodes:
        if not isinstance(node, _PLAIN):
            raise ValueError(f"{who}: generated source may not hold {type(node).__name__} (line {_line(node)}).")
        name = _named(node)
        dunder = name.startswith("__") and name != "__init__" and name not in names
        if dunder or (isinstance(node, ast.Name) and name not in bound and name not in names):
            raise ValueError(f"{who}: generated source may not use {name!r} (line {_line(node)}).")
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not _imported(node) <= set(imports):
            raise ValueError(f"{who}: generated source may not import {sorted(_imported(node))}.")


def _named(node: ast.AST) -> str:
    """Return the name that ``node`` uses: for getattr(x, "name") the one in the text, which must be plain text."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        second = node.args[1] if len(node.args) == 2 else None
        plain = isinstance(second, ast.Constant) and isinstance(second.value, str)
        return str(second.value) if isinstance(second, ast.Constant) and plain else "__getattr__"
    names = (getattr(node, key, None) for key in ("attr", "id", "arg"))
    return next((name for name in names if isinstance(name, str)), "")


def _imported(node: ast.Import | ast.ImportFrom) -> set[str]:
    return {str(node.module)} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}


def _line(node: ast.AST) -> int:
    return int(getattr(node, "lineno", 0))
