"""Compaction: a masked network becomes a smaller one that computes the same, and is shown to.

:mod:`pyprune.channels` follows channels through the traced network, :mod:`pyprune.deciding` settles which leave,
:mod:`pyprune.cutting` cuts the layers, and :mod:`pyprune.proving` compares the result with the masked network.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from pyprune import graph as graphs
from pyprune import kinds, measure
from pyprune.baking import baked, check_model
from pyprune.channels import Channels, Residual
from pyprune.cutting import cut_whole, masked_copy, rebuild
from pyprune.deciding import Decision, Network, decide
from pyprune.origins import origins
from pyprune.proving import copies, prove, undisturbed, unverified
from pyprune.types import Analysis, Compacted, LayerAnalysis, Plan, Profile
from pyprune.wrappers import unwrapped, unwrapped_plan


def analyse(
    model: nn.Module,
    plan: Plan,
    example_inputs: torch.Tensor | Sequence[torch.Tensor],
    *,
    residual: Residual = "scatter",
) -> Analysis:
    """Say what :func:`compact` would remove, what would stay against the plan, and why.

    Parameters
    ----------
    model
        Not changed.
    plan
        Layers that are not in it keep every filter.
    example_inputs
        What ``model(*example_inputs)`` takes: one tensor, or a tuple of them; the first dimension counts images.
    residual
        As for :func:`compact`.

    Returns
    -------
    Analysis
        One row per convolution and linear layer that the network calls, in order; and what coupling costs: how many
        planned filters, and parameters in all, ``"intersect"`` keeps that ``"scatter"`` removes.

    Raises
    ------
    ValueError
        As for :func:`compact`.
    """
    _check_residual("analyse", residual)
    model, _ = unwrapped(model)
    plan = unwrapped_plan(plan, graphs.prunable(model))
    model = _prepared("analyse", model)
    with undisturbed(model):
        network = Network("analyse", model, plan, _inputs("analyse", example_inputs), residual)
        return _analysis(network, plan, decide(network, plan, 1))


def compact(
    model: nn.Module,
    plan: Plan,
    example_inputs: torch.Tensor | Sequence[torch.Tensor],
    *,
    residual: Residual = "scatter",
    round_to: int = 1,
    verify: bool = True,
    latency: bool = True,
) -> Compacted:
    """Remove the channels that ``plan`` leaves unused and return a network that computes what the masked one does.

    In eval mode the slim network equals the masked one, or the channel is kept and ``Compacted.kept`` says why.
    Operations that pyprune does not know keep the channels that they read; nothing is guessed. Where torch.fx cannot
    trace the model, its own forward is kept, and so are the channels that it could not do without. Constants that dead
    channels carry (a sigmoid makes 0.5 of 0) are folded into the bias of the layer that reads them.

    Parameters
    ----------
    model
        Masked or not; it is never changed. A wrapper of data parallelism or torch.compile is taken off, and
        ``Compacted.unwrapped`` names it.
    plan
        Layers that are not in it keep every filter.
    example_inputs
        What ``model(*example_inputs)`` takes: one tensor, or a tuple of them; the first dimension counts images.
    residual
        What happens where branches are added. ``"scatter"``: each branch computes only its own surviving filters and
        is added into the stream by index; the stream loses the channels that every branch removes. ``"intersect"``:
        branches, too, lose only what every branch removes; no indexed additions. A model that keeps its own forward
        gets that for ``"scatter"``, and ``Compacted.residual`` says so. ``"union"``, which is lossy: a channel leaves
        if any branch removes it; the plan is extended accordingly, ``Compacted.beyond`` says by what, and the proof is
        against the network masked by the extended plan.
    round_to
        Bring filters back, lowest index first and with the model's own weights, until each layer's number of
        filters is a multiple of this.
    verify
        Compare with the masked network in float64, with randomised norms, and in the model's own type.
    latency
        Measure both networks' time per forward pass, about 0.4 s.

    Returns
    -------
    Compacted
        Its ``model`` is a ``torch.fx.GraphModule`` with the names, dtype, device, memory format, ``requires_grad``
        and training flags of ``model``, and shares no memory with it. Where torch.fx cannot trace the model it is a
        network of the model's own class; ``Compacted.own_forward`` says why.

    Raises
    ------
    ValueError
        If an argument is out of range, the plan does not fit the model, it does not accept the inputs, or what it
        computes depends on values of tensors (the line is named).
    RuntimeError
        If the verification fails: then nothing is returned.
    """
    _check_residual("compact", residual)
    if not isinstance(round_to, int) or isinstance(round_to, bool) or round_to < 1:
        raise ValueError(f"compact: round_to must be a positive whole number; got {round_to!r}.")
    inputs = _inputs("compact", example_inputs)
    model, wrappers = unwrapped(model)
    plan = unwrapped_plan(plan, graphs.prunable(model))
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    model = _prepared("compact", model)
    with undisturbed(model):
        network = Network("compact", model, plan, inputs, residual)
        decision = decide(network, plan, round_to)
        masked = masked_copy(model, decision.dead)
        slim = rebuild(masked, decision)
        sources = origins(slim, masked, own, lambda name, module: cut_whole(name, module, decision.channels))
        certificate = prove(masked, slim, decision, inputs) if verify else unverified(model)
        del masked
        before, after = _profiles(network, slim, decision, copies(inputs), latency)
    return Compacted(
        slim, certificate, plan, decision.kept, before, after, inputs, network.residual, decision.beyond, sources,
        wrappers, decision.lossy, network.own_forward,
    )  # fmt: skip


def _prepared(who: str, model: nn.Module) -> nn.Module:
    """Return ``model`` with plain weights, after refusing what cannot be cut."""
    check_model(who, model)
    return baked(model)


def _check_residual(who: str, residual: str) -> None:
    modes = get_args(Residual)
    if residual not in modes:
        listed = ", ".join(f'"{mode}"' for mode in modes)
        raise ValueError(f"{who}: residual must be one of {listed}; got {residual!r}.")


def _inputs(who: str, example_inputs: Any) -> tuple[torch.Tensor, ...]:
    if not isinstance(example_inputs, (torch.Tensor, list, tuple)):
        raise TypeError(f"{who}: example_inputs must be a tensor or a tuple of tensors; got {type(example_inputs)}.")
    return copies(measure.as_inputs(who, example_inputs))


def _profiles(
    network: Network, slim: nn.Module, decision: Decision, inputs: tuple[torch.Tensor, ...], latency: bool
) -> tuple[Profile, Profile]:
    """Return what both networks cost; HRank's convention counts the slim one from the filters that are left."""
    model, channels = network.model, decision.channels
    positions, images = _positions(network), network.images  # those of the slim network are the same
    left = {name: int((~channels.leaving(name)).sum()) for name in decision.plan.keep if name in channels.filters}
    before, after = measure.counted(model, positions, images), measure.counted(slim, positions, images)
    counted = measure.counted(model, positions, images, left)
    after = replace(after, hrank_v1_parameters=counted.hrank_v1_parameters, hrank_v1_macs=counted.hrank_v1_macs)
    if latency:
        own = copy.deepcopy(model) if decision.own_forward else model  # it may store things when it runs
        times = measure.latencies([own, slim], inputs)
        before, after = replace(before, latency_ms=times[0]), replace(after, latency_ms=times[1])
    return before, after


def _analysis(network: Network, plan: Plan, decision: Decision) -> Analysis:
    """Return the counts of every layer, from the walks alone: nothing is built."""
    dead = graphs.follow_masks(network.model, plan, network.graph)[0]
    apart, together = network.follow(dead, "scatter"), network.follow(dead, "intersect")
    layers = tuple(
        _layer(name, module, decision, int((apart.leaving(name) & ~together.leaving(name)).sum()))
        for name, module in network.model.named_modules()
        if name in decision.channels.filters
    )
    saved = {channels: _saved(network.model, channels) for channels in (apart, together, decision.channels)}
    total = sum(one.numel() for one in network.model.parameters())
    coupled = saved[apart] - saved[together]
    return Analysis(layers, total, total - saved[decision.channels], network.residual, coupled, decision.lossy)


def _saved(model: nn.Module, channels: Channels) -> int:
    """Return how many parameters leave with the channels; those that layers share leave once."""
    shared = graphs.shared_layers(model)
    saved = 0
    for name in channels.filters.keys() | channels.inputs.keys():
        module: Any = model.get_submodule(name)
        first: Any = model.get_submodule(shared[name][0]) if name in shared else module
        if name not in channels.filters:
            saved += int(channels.leaving_inputs(name).sum()) * len(list(module.parameters()))
        elif first is module:
            saved += _weights(module) - _weights_left(name, module, channels)
        elif module.bias is None or module.bias is not first.bias:
            saved += _biases(module) - _biases_left(name, module, channels)
    return saved + channels.leaving_parameters(model)


def _biases(module: Any) -> int:
    return 0 if module.bias is None else int(module.bias.numel())


def _weights(module: Any) -> int:
    return int(module.weight.numel()) + _biases(module)


def _biases_left(name: str, module: Any, channels: Channels) -> int:
    """Return how many biases the layer is left with; folded constants make one."""
    read = channels.inputs.get(name)
    folds = read is not None and bool(read.constants[channels.leaving_inputs(name)].any())
    return int((~channels.leaving(name)).sum()) * int(module.bias is not None or folds)


def _weights_left(name: str, module: Any, channels: Channels) -> int:
    """Return how many weights and biases the layer is left with."""
    gone = int(channels.leaving_inputs(name).sum()) if name in channels.inputs else 0
    inputs, outputs = _inputs_of(module) - gone, int((~channels.leaving(name)).sum())
    kernel, groups = int(module.weight[0, 0].numel()), channels.groups_left(name)
    return outputs * (inputs // groups * kernel) + _biases_left(name, module, channels)


def _inputs_of(module: Any) -> int:
    return int(module.in_features if isinstance(module, nn.Linear) else module.in_channels)


def _layer(name: str, module: Any, decision: Decision, coupled: int) -> LayerAnalysis:
    channels = decision.channels
    outputs, inputs = kinds.outputs(module), _inputs_of(module)
    gone = int(channels.leaving_inputs(name).sum()) if name in channels.inputs else 0
    planned = outputs - len(decision.given.keep[name]) if name in decision.given.keep else 0
    return LayerAnalysis(
        name, type(module).__name__, outputs, planned, int(channels.leaving(name).sum()), inputs, inputs - gone,
        _weights(module), _weights_left(name, module, channels), decision.kept.get(name, {}), coupled,
        tuple(decision.beyond.get(name, np.zeros(0, np.int64)).tolist()),
    )  # fmt: skip


def _positions(network: Network) -> dict[str, int]:
    """Return the positions of an image's map at which each layer's weights were applied, over all its calls."""
    found: Counter[str] = Counter()
    for node in network.graph.nodes:
        module = network.model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, measure.Counted):
            seen = node.all_input_nodes[0] if isinstance(module, measure.Transposed) else node
            shape = network.shapes[seen]
            values = shape[-1] if isinstance(module, nn.Linear) else shape[1]
            found[str(node.target)] += shape.numel() // (network.images * values)
    return found
