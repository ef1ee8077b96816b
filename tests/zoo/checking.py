"""How the zoo checks one compaction, and what it counts, by rules of its own.

Which channels a plan silences is found by running the masked network: a channel is silent if it does not vary over
images and space. Nothing here asks pyprune which operation does what.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import pyprune as pp
from pyprune import graph
from pyprune.types import Plan
from tolerances import COMPACTED_FLOAT64, CONSTANT_CHANNEL

CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d
TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
MIXERS = CONVOLUTIONS | TRANSPOSED | nn.Linear
PER_CHANNEL = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass
class Count:
    """Parameters of a network, those that plans meant to remove, those of them that left; and why filters stayed."""

    parameters: int = 0
    planned: int = 0
    removed: int = 0
    refusals: Counter[str] = field(default_factory=Counter)

    def add(self, other: Count) -> None:
        self.parameters, self.planned = self.parameters + other.parameters, self.planned + other.planned
        self.removed, self.refusals = self.removed + other.removed, self.refusals + other.refusals

    @property
    def share(self) -> float:
        """The removed part of the planned, in per cent."""
        return 100 * self.removed / max(1, self.planned)


def randomised(model, seed=0):
    """Return ``model`` in float64 and eval mode, with parameters and statistics that hide nothing.

    Weights keep the size of a signal, as He's do, so that a mistake in the first layer still shows in the output.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like, low, high):
        return torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low

    norms = {"weight": (0.5, 1.5), "bias": (-0.5, 0.5), "running_mean": (-0.5, 0.5), "running_var": (0.5, 2)}
    model.double().eval()
    for module in model.modules():
        if isinstance(module, MIXERS):
            weight = module.weight
            fan_in = weight[0].numel() if not isinstance(module, TRANSPOSED) else weight.shape[0] // module.groups
            weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * (2 / fan_in) ** 0.5
            if module.bias is not None:
                module.bias.data = uniform(module.bias, -0.3, 0.3)
        elif "Norm" in type(module).__name__:
            for leaf, ends in norms.items():
                if (tensor := getattr(module, leaf, None)) is not None:
                    tensor.data = uniform(tensor, *ends)
    return model


def random_plan(model, seed, rate, *, only=1.0, run=1, heads=()):
    """Return a plan that removes filters at random, differing in every layer.

    ``only`` is the share of the layers that it names, ``heads`` are never named, and of every ``run`` filters equally
    many go.
    """
    rng, keep = np.random.default_rng(seed), {}
    for name, layer in graph.convolutions(model).items():
        filters = layer.out_channels
        if name in heads or rng.random() >= only:
            continue
        run_here = run if run > 1 and filters % run == 0 else filters
        stays = min(run_here, max(1, round(run_here * (1 - rate)) + (0 if run > 1 else int(rng.integers(-1, 2)))))
        keep[name] = np.sort(np.concatenate([
            start + rng.permutation(run_here)[:stays] for start in range(0, filters, run_here)
        ]))  # fmt: skip
    return Plan(keep)


RISING = {
    F.relu: F.leaky_relu, torch.relu: F.leaky_relu, torch.Tensor.relu: F.leaky_relu, torch.relu_: F.leaky_relu,
    F.relu6: F.leaky_relu, F.hardtanh: F.leaky_relu, F.hardswish: F.silu, F.hardsigmoid: torch.sigmoid,
}  # fmt: skip


class _Rising(TorchFunctionMode):
    """Let every activation with flat parts rise everywhere, so that no channel is constant by chance."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return RISING[func](args[0]) if func in RISING else func(*args, **(kwargs or {}))


@torch.no_grad()
def constant_inputs(model, x):
    """Return, for each convolution, linear layer and norm, which input channels do not vary: {name: [C]}."""
    seen: dict[str, torch.Tensor] = {}

    def note(name, channel):
        def hook(_module, args):
            rows = args[0].movedim(channel, -1).flatten(0, -2)
            scale = rows.abs().amax(0).clamp(min=1)
            constant = (rows.amax(0) - rows.amin(0)) <= CONSTANT_CHANNEL * scale
            seen[name] = seen.get(name, constant) & constant

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, MIXERS) or "Norm" in type(module).__name__:
                channel = -1 if isinstance(module, nn.Linear | nn.LayerNorm) else 1
                handle = module.register_forward_pre_hook(note(name, channel))
                stack.callback(handle.remove)
        stack.enter_context(_Rising())
        model(x)
    return {name: constant.numpy() for name, constant in seen.items()}


def zeroed(model, slices):
    """Return a copy of ``model`` with the named slices of dimension 0 (of transposed ones, outputs) zeroed."""
    twin = copy.deepcopy(model)
    for name, indices in slices.items():
        owner, _, leaf = name.rpartition(".")
        weight, index = twin.get_parameter(name).data, torch.as_tensor(np.asarray(indices))
        if isinstance(layer := twin.get_submodule(owner), TRANSPOSED) and leaf == "weight":
            weight.view(layer.groups, -1, *weight.shape[1:])[index // weight.shape[1], :, index % weight.shape[1]] = 0
        else:
            weight[index] = 0
    return twin


def removed_filters(model, plan):
    """Return {layer: [F]} which filters go."""
    layers = graph.prunable(model)
    return {name: np.isin(np.arange(layers[name].out_channels), kept, invert=True) for name, kept in plan.keep.items()}


def planned_weights(model, plan, x):
    """Return {layer: weights and biases} that ``plan`` makes useless: removed filters, and what reads silent channels.

    Norms are masked where nothing but silence reaches them: channels by channels, or groups by groups.
    """
    gone = removed_filters(model, plan)
    twin = zeroed(model, {
        f"{name}.{leaf}": np.flatnonzero(filters)
        for name, filters in gone.items()
        for leaf in ("weight", "bias")
        if getattr(model.get_submodule(name), leaf) is not None
    })  # fmt: skip
    masked = -1
    while True:
        silent, before = constant_inputs(twin, x), masked
        masked = 0
        for name, constant in silent.items():
            norm = twin.get_submodule(name)
            if isinstance(norm, nn.GroupNorm):
                constant = constant.reshape(norm.num_groups, -1).all(1).repeat(norm.num_channels // norm.num_groups)
            elif not isinstance(norm, PER_CHANNEL):
                continue
            if norm.weight is not None:
                norm.weight.data[torch.from_numpy(constant)] = 0
                norm.bias.data[torch.from_numpy(constant)] = 0
                masked += int(constant.sum())
        if masked == before:
            break
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, MIXERS) or name not in silent:
            continue
        shape = module.weight.shape
        outs = gone.get(name, np.zeros(shape[0] if not isinstance(module, TRANSPOSED) else module.out_channels, bool))
        ins, groups = silent[name], getattr(module, "groups", 1)
        per_group = np.stack([
            np.logical_or.outer(a, b) for a, b in zip(outs.reshape(groups, -1), ins.reshape(groups, -1), strict=True)
        ])  # fmt: skip
        biases = int(outs.sum()) if module.bias is not None else 0
        found[name] = int(per_group.sum()) * int(np.prod(shape[2:])) + biases
    return found


def count(model, plan, x, slim):
    """Count what was planned and what left, layer by layer: nothing else that left makes up for what stayed."""
    found = Count(sum(one.numel() for one in model.parameters()))
    modules = dict(slim.model.named_modules())
    for name, planned in planned_weights(model, plan, x).items():
        sizes = [
            sum(one.numel() for one in layer.parameters()) if layer is not None else 0
            for layer in (model.get_submodule(name), modules.get(name))
        ]
        found.planned, found.removed = (
            found.planned + planned,
            found.removed + min(planned, max(0, sizes[0] - sizes[1])),
        )
    found.refusals = refusals(model, slim.kept)
    return found


def refusals(model, kept):
    """Count the filters that stayed by reason, without the names of layers and numbers."""
    names = {name for name, _ in model.named_modules() if name}
    plain = Counter()
    for reasons in kept.values():
        for why in reasons.values():
            words = ["_" if word.strip(",()") in names else word for word in why.split()]
            plain[
                re.sub(
                    r"\b\w*[a-z_]\w*_\d+\b|(?<=reaches )\w+|(?<=of )\w+$|(?<=into )\w+|-?\d[\d.e+-]*",
                    "_",
                    " ".join(words),
                )
            ] += 1
    return plain


def difference(found, expected):
    """Return max |found - expected| / max(1, max |expected|) over all outputs."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        return max(difference(found[key], one) for key, one in expected.items())
    if isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        return max(difference(a, b) for a, b in zip(found, expected, strict=True))
    assert found.shape == expected.shape
    assert expected.isfinite().all()
    return float((found - expected).abs().max() / max(1.0, float(expected.abs().max())))


def same_state(model, before):
    """Say whether every tensor of ``model`` has the bits that it had."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(
        one.shape == now[name].shape and torch.equal(one, now[name]) for name, one in before.items()
    )


@torch.no_grad()
def check(model, plan, x, *, folder=None, **options):
    """Compact ``model``, in float64, hold the result against all that is promised, and return it.

    With ``folder``, the network must come back from a slim folder with the same bits, or be refused for a reason.
    """
    before = {name: one.clone() for name, one in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    slim = pp.compact(model, plan, x, latency=False, **options)
    analysis = pp.analyse(model, plan, x, residual=options.get("residual", "scatter"))
    assert same_state(model, before)
    assert [module.training for module in model.modules()] == flags
    expected = masked(model, plan, slim)
    small = copy.deepcopy(slim.model).eval()
    fresh = torch.randn((len(x) + 1, *x.shape[1:]), generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    for batch in (x, fresh):
        assert difference(small(batch.clone()), expected(batch.clone())) <= COMPACTED_FLOAT64
    assert slim.certificate.verified
    assert slim.certificate.max_difference <= slim.certificate.tolerance == COMPACTED_FLOAT64
    left = sum(one.numel() for one in slim.model.parameters())
    assert slim.after.parameters == left
    if options.get("round_to", 1) == 1:
        assert analysis.parameters_left == left
        for layer in analysis.layers:
            here = slim.model.get_submodule(layer.name)
            assert layer.parameters_left == sum(one.numel() for one in here.parameters())
            assert dict(layer.kept) == dict(slim.kept.get(layer.name, {}))
    if folder is not None:
        assert_comes_back(slim, small, x, folder)
    return slim


def masked(model, plan, slim):
    """Return the network that ``slim`` must equal, after checking that the masks silence nothing alive."""
    keep = dict(plan.keep)
    for name, reasons in slim.kept.items():
        back = [index for index, why in reasons.items() if why.startswith("makes the number of filters")]
        keep[name] = np.union1d(keep[name], back).astype(np.int64)
    layers = graph.prunable(model)
    for name, more in slim.beyond.items() if slim.lossy else ():
        if name not in layers:  # a linear layer whose outputs nothing needs
            continue
        filters = layers[name].out_channels
        left = np.setdiff1d(keep.get(name, np.arange(filters)), more)
        keep[name] = left if len(left) else keep[name]  # all that it keeps is without effect: masked or not
    slices = graph.dead_slices(model, Plan(keep))
    return zeroed(model, slices).eval()


def assert_masks_are_honest(model, plan, x):
    """Check that masks zero only planned filters, and norms and depthwise filters where nothing alive reaches them."""
    slices, gone = graph.dead_slices(model, plan), removed_filters(model, plan)
    silent = constant_inputs(zeroed(model, slices), x)
    for name, indices in slices.items():
        layer = name.rpartition(".")[0]
        where, module = gone.get(layer), model.get_submodule(layer)
        if where is None or 1 < getattr(module, "groups", 1) == len(silent[layer]):
            over = np.repeat(silent[layer], getattr(module, "out_channels", len(silent[layer])) // len(silent[layer]))
            where = over if where is None else where | over
        assert where[indices].all(), f"{name} is masked where it is alive"


def assert_comes_back(slim, small, x, folder):
    try:
        pp.save_slim(slim, folder)
    except ValueError as error:
        assert re.match(r"save_slim: .+", str(error)), error  # noqa: PT017
        return
    loaded = pp.load_slim(folder)
    assert same_state(loaded, small.state_dict())
    assert difference(loaded(x.clone()), small(x.clone())) <= COMPACTED_FLOAT64  # rounding depends on where weights lie
