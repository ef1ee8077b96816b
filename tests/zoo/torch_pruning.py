"""Torch-Pruning beside pyprune: the same filters removed by index, and what is left compared with the masked network.

Torch-Pruning removes a filter together with everything that is coupled to it, so its plans are made from its own
groups: coupled layers lose the same filters, which is the case that it is made for.
"""

from __future__ import annotations

import copy
import importlib.util
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO

import numpy as np
import torch

import pyprune as pp
from pyprune import graph
from pyprune.types import Plan
from tolerances import COMPACTED_FLOAT64
from zoo import checking
from zoo.random_graphs import case

INSTALLED = importlib.util.find_spec("torch_pruning") is not None


@dataclass
class Outcome:
    """What became of one network: exact, silently wrong, crashed or kept; its parameters, and the difference."""

    word: str
    parameters: int = 0
    difference: float = float("nan")
    message: str = ""


def dependencies(model, x):
    """Return Torch-Pruning's graph of dependencies of ``model``."""
    import torch_pruning as tp

    return tp.DependencyGraph().build_dependency(model, example_inputs=x)


def agreeing_plan(model, x, rate, seed, heads=()):
    """Return a plan in which the layers that Torch-Pruning couples lose the same filters.

    Each group is pruned at random positions of its first layer; the layers in ``heads`` are left alone.
    """
    model, rng = copy.deepcopy(model), np.random.default_rng(seed)
    layers, found, keep = graph.prunable(model), dependencies(model, x), {}
    names = {layer: name for name, layer in layers.items()}
    for name, layer in layers.items():
        if name in keep or name in heads:
            continue
        gone = np.sort(rng.permutation(layer.out_channels)[: int(layer.out_channels * rate)]).tolist()
        group = found.get_pruning_group(layer, found.get_pruner_of_module(layer).prune_out_channels, idxs=gone)
        members = {
            names[dep.target.module]: idxs
            for dep, idxs in group
            if dep.target.module in names and found.is_out_channel_pruning_fn(dep.handler)
        }
        if any(one in heads or one in keep for one in members):
            keep |= {one: None for one in members if one not in keep}
            continue
        for one, idxs in members.items():
            left = np.setdiff1d(np.arange(layers[one].out_channels), np.asarray(idxs, np.int64))
            keep[one] = left if len(left) else None
    return Plan({name: left for name, left in keep.items() if left is not None})


def pruned(model, x, plan):
    """Return a copy of ``model`` that Torch-Pruning cut by the indices of ``plan``; each coupled group is cut once."""
    model = copy.deepcopy(model)
    found, layers = dependencies(model, x), graph.prunable(model)
    whole = {name: layer.out_channels for name, layer in layers.items()}
    for name, kept in plan.keep.items():
        layer = layers[name]
        gone = np.setdiff1d(np.arange(whole[name]), kept).tolist()
        if not gone or layer.out_channels != whole[name]:
            continue
        group = found.get_pruning_group(layer, found.get_pruner_of_module(layer).prune_out_channels, idxs=gone)
        if found.check_pruning_group(group):
            group.prune()
    return model


@torch.no_grad()
def judged(make, model, reference, x):
    """Run ``make``, which returns a smaller network, and say what became of it."""
    whole = sum(one.numel() for one in model.parameters())
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            with torch.enable_grad():  # Torch-Pruning follows gradients
                slim = make().eval()
            found, expected = slim(x.clone()), reference(x.clone())
    except Exception as error:  # whatever it is, it is the finding
        return Outcome("crashed", whole, message=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}")
    left = sum(one.numel() for one in slim.parameters())
    try:
        gap = checking.difference(found, expected)
    except AssertionError:
        return Outcome("silently wrong", left, float("inf"), "the output has another shape")
    if not gap <= COMPACTED_FLOAT64:
        return Outcome("silently wrong", left, gap)
    return Outcome("kept" if left == whole else "exact", left, gap)


def compared(model, plan, x):
    """Return the outcomes of Torch-Pruning and of pyprune on one network, both against the masked network."""
    reference = checking.zeroed(model, graph.dead_slices(model, plan)).eval()
    return (
        judged(lambda: pruned(model, x, plan), model, reference, x),
        judged(lambda: pp.compact(model, plan, x, latency=False).model, model, reference, x),
    )


def _traps():
    """Small networks with one difficulty each, and a plan for one layer."""
    conv, head = ("Conv2d", (3, 8, 3), {"padding": 1}, (0,)), (3, 8, 8)
    same, keep = ("Conv2d", (8, 8, 3), {"padding": 1}, (1,)), {"parts.0": [1, 2, 5, 6]}

    def last(read, width=8):
        return ("Conv2d", (width, 3, 3), {}, (read,))

    def chain(*between, width=8, last=True, kept=keep, outputs=None):
        steps = [conv]
        for step in between:
            part, args, *rest = step
            kwargs, reads = rest[0] if rest else {}, rest[1] if len(rest) > 1 else (len(steps),)
            steps.append((part, args, kwargs, reads))
        if last:
            steps.append(("Conv2d", (width, 3, 3), {}, (len(steps),)))
        return case(steps, outputs or (len(steps),), kept, (2, *head))

    return {
        "chain": chain(("BatchNorm2d", (8,)), ("ReLU", ())),
        "sigmoid, unpadded convolution": chain(("Sigmoid", ())),
        "sigmoid, padded convolution": chain(("Sigmoid", ()), ("Conv2d", (8, 4, 3), {"padding": 1}), width=4),
        "a number is added": chain(("Number", ("+", 0.25))),
        "PReLU, one slope a channel": chain(("PReLU", (8,))),
        "parameter, one number a channel": chain(("Scale", ((1, 8, 1, 1), "*"))),
        "parameter of rank three": chain(("Scale", ((8, 1, 1), "*"))),
        "channel shuffle by views": chain(("Shuffle", (2, "view"))),
        "nn.ChannelShuffle": chain(("ChannelShuffle", (4,))),
        "pixel shuffle": chain(("PixelShuffle", (2,)), width=2),
        "index_select": chain(("Taken", ([7, 0, 5, 5, 2, 1],)), width=6),
        "slice of channels": chain(("Sliced", (1, 7)), width=6),
        "padded channels": chain(("PadChannels", (1, 3)), width=12),
        "split in unequal parts, joined the other way round": case(
            [conv, ("Split", ("split", [3, 5], 2), {}, (1,)), ("Cat", (), {}, (3, 2)), last(4)],
            (5,), keep, (2, *head)),
        "chunks multiplied": case(
            [conv, ("Split", ("chunk", 2, 2), {}, (1,)), ("Times", ("*",), {}, (2, 3)), last(4, 4)],
            (5,), {"parts.0": [1, 2, 5, 6]}, (2, *head)),
        "squeeze and excitation": chain(("Gate", (8, 2))),
        "squeeze by linear layers and a view": chain(("Squeezed", (8, 2, "view"))),
        "grouped convolution, other positions in every group": chain(
            ("Conv2d", (8, 8, 3), {"groups": 2}), kept={"parts.0": [0, 1, 6, 7]}),
        "depthwise convolution": chain(("Conv2d", (8, 8, 3), {"groups": 8})),
        "depthwise convolution with a multiplier": chain(("Conv2d", (8, 16, 3), {"groups": 8}), width=16),
        "grouped transposed convolution": chain(("ConvTranspose2d", (8, 4, 2), {"groups": 2}), width=4),
        "group norm, whole groups": chain(("GroupNorm", (4, 8)), kept={"parts.0": [2, 3, 6, 7]}),
        "group norm, half groups": chain(("GroupNorm", (4, 8))),
        "instance norm": chain(("InstanceNorm2d", (8,), {"affine": True})),
        "average pool with padding after a sigmoid": chain(("Sigmoid", ()), ("AvgPool2d", (3,), {"padding": 1})),
        "a layer called twice": case(
            [conv, same, ("again", (1,), {}, (2,)), last(3)],
            (4,), {f"parts.{i}": [1, 2, 5, 6] for i in (0, 1)}, (2, *head)),
        "two layers share a weight": case(
            [conv, same, ("tied", (1,), {}, (2,)), last(3)],
            (4,), {f"parts.{i}": [1, 2, 5, 6] for i in (0, 1, 2)}, (2, *head)),
        "branches that lose different filters": case(
            [conv, ("Conv2d", (3, 8, 3), {"padding": 1}, (0,)), ("Add", ("+",), {}, (1, 2)), ("ReLU", (), {}, (3,)),
             last(4)],
            (5,), {"parts.0": [1, 2, 5, 6], "parts.1": [0, 1, 2, 3]}, (2, *head)),
        "written over and read again": case(
            [conv, ("Add", ("+=",), {}, (1, 1)), same, ("Add", ("+",), {}, (1, 3)),
             last(4)],
            (5,), keep, (2, *head)),
        "an output of the model": chain(last=False),
        "flatten and a linear layer": chain(("Head", (512, 3, "flatten")), last=False),
    }  # fmt: skip


TRAPS = _traps()
