"""The same indices for Torch-Pruning and for pyprune, and what each made of them.

Torch-Pruning removes filters together with all that is coupled to them, in other layers too, so it is not held
against the network that the plan masks but against one in which everything that *it* removed is zero, by the list that
its own groups give. There are two such networks, and it may match either:

- the *masked* one: removed outputs of convolutions and linear layers, their biases, and removed channels of norms are
  zero. It is what masking trains and what pyprune promises.
- the *cut* one: in it what read removed channels, and parameters of the model itself, have their removed entries zeroed
  as well. The two differ where something makes a constant of zero, as a sigmoid does, or a norm without parameters.
  Torch-Pruning does not promise the masked one, so "cut" is a verdict of its own.

It is used as its README shows, layer by layer. What a user has to do around that is done for it: indices are given in
the numbering of what is left of a layer, filters that went with others are not asked for again, a group that its own
check rejects or that reaches a head is left out, layers that share a weight are taken for two, warnings are ignored.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from importlib import metadata

import numpy as np
import torch
from torch import nn

import pyprune as pp
from pyprune import baking, graph
from pyprune.types import Plan
from zoo import ENTRIES, checking
from zoo.traps import TRAPS

EXACT, CUT, DIFFERS = "exact", "cut", "differs"  # computes the masked network, the cut one, neither
CRASHED, UNTOUCHED, REFUSED = "crashed", "untouched", "refused"


@dataclass
class Result:
    """What one tool made of one plan."""

    verdict: str
    seconds: float = 0.0
    parameters: int = 0
    note: str = ""
    model: nn.Module | None = None
    gone: dict = field(default_factory=dict)  # {(module or parameter, side or dimension): channels removed}


def version():
    """Return the version of Torch-Pruning that is installed."""
    return metadata.version("torch-pruning")


def cases(names=None):
    """Yield (name, plan's name, model, plan, images, heads) of every trap, and of the zoo under three plans each."""
    for name, trap in TRAPS.items():
        if names is None or name in names:
            yield name, "by hand", *trap_case(trap)
    for name, entry in ENTRIES.items():
        if names is None or name in names:
            torch.manual_seed(0)
            model = checking.randomised(entry.build())
            x = torch.randn(entry.shape, dtype=torch.float64)
            for kind, plan in zoo_plans(model, entry).items():
                yield name, kind, model, plan, x, entry.heads


def trap_case(trap):
    """Return (model, plan, images, heads) of a trap."""
    model = checking.randomised(trap.build())
    x = torch.randn(trap.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return model, Plan({name: np.array(kept) for name, kept in trap.keep.items()}), x, ("end",)


def zoo_plans(model, entry):
    """Return a plan that names one layer, one in which layers of one width lose the same filters, and a random one."""
    rng = np.random.default_rng(0)
    layers = {name: layer for name, layer in graph.convolutions(model).items() if name not in entry.heads}
    orders = {width: rng.permutation(width) for width in sorted({one.out_channels for one in layers.values()})}
    agreeing = {
        name: np.sort(orders[layer.out_channels][: max(1, layer.out_channels // 2)]) for name, layer in layers.items()
    }
    middle = list(layers)[len(layers) // 2]
    return {
        "one layer": Plan({middle: agreeing[middle]}),
        "agreeing": Plan(agreeing),
        "random": checking.random_plan(model, 0, 0.5, run=entry.run, heads=entry.heads),
    }


def parameters(model):
    return sum(one.numel() for one in model.parameters())


def torch_pruning(model, plan, x, heads):
    """Let Torch-Pruning remove what ``plan`` does not keep, from a copy, and judge the result."""
    import torch_pruning as tp

    twin = copy.deepcopy(model)
    gone: dict[tuple[str, str], set[int]] = defaultdict(set)
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dependencies = tp.DependencyGraph().build_dependency(twin, example_inputs=x)
            declined = sum(not prune_layer(tp, dependencies, twin, name, kept, gone, heads)
                           for name, kept in plan.keep.items())  # fmt: skip
            seconds = time.perf_counter() - began
            verdict, note = judged(model, twin, gone, x)
    except Exception as error:  # whatever it is, it goes into the table
        line = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        return Result(CRASHED, note=line[:90], gone=dict(gone))
    if declined:
        note = f"{note}; {declined} layers declined".lstrip("; ")
    return Result(verdict, seconds, parameters(twin), note, twin, dict(gone))


def prune_layer(tp, dependencies, twin, name, kept, gone, heads):
    """Prune one layer and all that is coupled to it, note what went in ``gone``; return False if nothing may go."""
    layer = twin.get_submodule(name)
    names = {module: name for name, module in twin.named_modules()}
    there = np.setdiff1d(np.arange(layer.out_channels + len(gone[name, "out"])), sorted(gone[name, "out"]))
    idxs = np.flatnonzero(np.isin(there, kept, invert=True)).tolist()
    if not idxs:
        return True
    group = dependencies.get_pruning_group(layer, tp.prune_conv_out_channels, idxs)
    makes_head = any(
        names.get(dep.target.module) in heads and dependencies.is_out_channel_pruning_fn(dep.handler)
        for dep, _ in group
    )
    if makes_head or not dependencies.check_pruning_group(group):
        return False
    for dep, idxs in group:
        module = dep.target.module
        if isinstance(module, nn.Parameter):
            where, side = dependencies._param_to_name[module], dep.target.pruning_dim
            size = module.shape[side]
        elif module in names:
            where = names[module]
            side = "out" if dep.handler.__name__ == "prune_out_channels" else "in"
            size = width(module, side)
        else:
            continue
        left = np.setdiff1d(np.arange(size + len(gone[where, side])), sorted(gone[where, side]))
        gone[where, side] |= set(left[[one for one in idxs if one < len(left)]].tolist())
    group.prune()
    return True


def width(module, side):
    """Return how many channels a layer makes or reads."""
    for attribute in (f"{side}_channels", f"{side}_features", "num_features", "num_channels", "num_parameters"):
        if hasattr(module, attribute):
            return getattr(module, attribute)
    return module.normalized_shape[-1]


@torch.no_grad()
def judged(model, twin, gone, x):
    """Return the verdict on ``twin`` and a note."""
    if not any(gone.values()):
        return UNTOUCHED, ""
    fresh = torch.randn((len(x) + 1, *x.shape[1:]), generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    worst = {}
    for reference in (EXACT, CUT):
        expected = without(model, gone, readers=reference == CUT)
        try:
            worst[reference] = max(checking.difference(twin(one.clone()), expected(one.clone())) for one in (x, fresh))
        except AssertionError:
            return DIFFERS, "its output has another shape"
        if worst[reference] <= checking.COMPACTED_FLOAT64:
            return reference, ""
    return DIFFERS, f"by {min(worst.values()):.1g}"


def plain(model):
    """Return a copy with computed weights computed, and no parameter shared."""
    twin = copy.deepcopy(baking.baked(model))
    for module in twin.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(parameter.detach().clone())
    return twin.eval()


def without(model, gone, *, readers):
    """Return ``model`` with the channels in ``gone`` zeroed where they are made and, with ``readers``, where read."""
    twin = plain(model)
    for (name, side), channels in gone.items():
        index = torch.tensor(sorted(channels), dtype=torch.long)
        if not isinstance(side, str):
            if readers:
                twin.get_parameter(name).data.index_fill_(side, index, 0)
            continue
        module = twin.get_submodule(name)
        if side == "in":
            if readers:
                blind(module, index)
        elif isinstance(module, checking.MIXERS):
            graph.zero_filters(twin, f"{name}.weight", index.numpy())
            if module.bias is not None:
                module.bias.data[index] = 0
        elif getattr(module, "weight", None) is not None and not isinstance(module, nn.PReLU):
            module.weight.data[index] = 0
            if module.bias is not None:
                module.bias.data[index] = 0
    return twin


def blind(module, index):
    """Zero the weights that read the input channels ``index``."""
    weight, groups = module.weight.data, getattr(module, "groups", 1)
    if isinstance(module, checking.TRANSPOSED):
        weight[index] = 0
        return
    inputs, outputs = weight.shape[1], weight.shape[0] // groups
    for channel in index.tolist():
        group, place = divmod(channel, inputs)
        weight[group * outputs : (group + 1) * outputs, place] = 0


@torch.no_grad()
def pyprune(model, plan, x, *, count=False):
    """Let pyprune compact under ``plan``, without its own proof, and judge the result."""
    began = time.perf_counter()
    try:
        slim = pp.compact(model, plan, x, latency=False, verify=False)
    except ValueError as error:
        return Result(REFUSED, note=str(error).splitlines()[0][:90])
    seconds = time.perf_counter() - began
    if slim.own_forward:  # no trace to follow masks in: such cases here have no norms
        expected = checking.zeroed(model, {
            f"{name}.{leaf}": np.flatnonzero(where)
            for name, where in checking.removed_filters(model, plan).items() for leaf in ("weight", "bias")
        }).eval()  # fmt: skip
    else:
        expected = checking.masked(baking.baked(model), plan, slim)
    small = copy.deepcopy(slim.model).eval()
    fresh = torch.randn((len(x) + 1, *x.shape[1:]), generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    worst = max(checking.difference(small(one.clone()), expected(one.clone())) for one in (x, fresh))
    if worst > checking.COMPACTED_FLOAT64:
        return Result(DIFFERS, seconds, parameters(small), f"by {worst:.1g}", small)
    note = f"{checking.count(model, plan, x, slim).share:.0f} %" if count and not slim.own_forward else ""
    return Result(EXACT, seconds, parameters(small), note, small)


def plan_of(model, gone):
    """Return the plan that removes the filters of convolutions in ``gone``."""
    return Plan({
        name: np.setdiff1d(np.arange(layer.out_channels), sorted(gone[name, "out"]))
        for name, layer in graph.prunable(model).items() if gone.get((name, "out"))
    })  # fmt: skip


def beyond(model, plan, gone):
    """Return how many filters of convolutions are in ``gone`` that ``plan`` keeps."""
    asked = checking.removed_filters(model, plan)
    return sum(
        len(channels - set(np.flatnonzero(asked[name])) if name in asked else channels)
        for (name, side), channels in gone.items()
        if side == "out" and name in graph.prunable(model)
    )


def as_planned(model, plan, gone):
    """Say whether the filters of convolutions in ``gone`` are just those that ``plan`` removes."""
    asked = {name: set(np.flatnonzero(where)) for name, where in checking.removed_filters(model, plan).items()}
    found = {name: channels for (name, side), channels in gone.items() if side == "out"}
    return all(asked.get(name, set()) == found.get(name, set()) for name in graph.prunable(model))
