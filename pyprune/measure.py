"""Measuring networks: how well they classify, what they cost, and how long they take."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import fx, nn
from torch.utils.data import RandomSampler

from pyprune import channels, graph
from pyprune.machine import keep_freed_memory
from pyprune.progress import track
from pyprune.types import Evaluation, FloatArray, GroupScore, IntArray, LayerCount, Plan, Profile

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Counted = graph.Convolution | Transposed | nn.Linear

Device = str | torch.device | None


def as_device(device: str | torch.device) -> torch.device:
    """Return ``device`` as torch's.

    Raises
    ------
    ValueError
        If torch does not know it, or does not find it on this machine.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # a build of torch without CUDA asserts
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device: torch cannot use {str(device)!r} here ({reason}). Use 'cpu', or see `pyprune doctor`."
        ) from None
    return found


class NotFinite(ValueError):  # noqa: N818  named for what was found
    """A model's outputs were NaN or infinite."""


@contextmanager
def running(model: nn.Module, device: Device = None, *, train: bool = False) -> Iterator[torch.device]:
    """Put ``model`` into eval (or training) mode on ``device`` and yield that; flags and place are put back.

    Without ``device`` the model stays where its first parameter is (the CPU, if it has none).
    """
    flags = {module: module.training for module in model.modules()}
    home = model_device(model)
    target = home if device is None else as_device(device)
    keep_freed_memory()
    try:
        if target != home:
            model.to(target)
        model.train(train)
        yield target
    finally:
        if target != home:
            model.to(home)
        for module, training in flags.items():
            module.training = training


def model_device(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer; the CPU if it has neither."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def as_batch(who: str, batch: Any, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels of one batch of a loader as tensors.

    Raises
    ------
    TypeError, ValueError
        If the batch is no (images, labels) pair, or has not one label per image.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[0], torch.Tensor):
        raise TypeError(
            f"{who}: the loader must yield (images, labels) with images a tensor [N, C, H, W]; "
            f"batch {position} is {_describe(batch)}."
        )
    images, labels = batch[0], torch.as_tensor(batch[1])
    if images.ndim == 0 or labels.ndim == 0 or len(labels) != len(images):
        raise ValueError(
            f"{who}: a batch must have one label per image; batch {position} has images {list(images.shape)} "
            f"and labels {list(labels.shape)}."
        )
    return images, labels


def _describe(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {', '.join(type(item).__name__ for item in batch) or 'nothing'}"
    return f"a {type(batch).__name__}"


def check_labels(who: str, labels: torch.Tensor, classes: int) -> None:
    """Raise unless ``labels`` [N] are integers in [0, classes)."""
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"{who}: labels must be integers [N]; got {labels.dtype} of shape {list(labels.shape)}. Pass class numbers."
        )
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        bad = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
        raise ValueError(f"{who}: labels must be in [0, {classes}), the model's outputs; got {bad}.")


def scores(
    who: str, model: nn.Module, loader: Iterable[Any], *, device: Device = None, progress: bool = True
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the model's outputs [N, C] float64 and the labels [N] int64, batch by batch, on the CPU.

    Raises
    ------
    TypeError, ValueError
        If the loader is empty or yields no (images, labels), a label is out of range, or an output is no finite
        [N, C].
    """
    empty = True
    with running(model, device) as place, torch.no_grad():
        for position, batch in enumerate(track(loader, who, show=progress)):
            images, labels = as_batch(who, batch, position)
            outputs = check_outputs(who, model(images.to(place)), len(images)).cpu().double()
            check_labels(who, labels, outputs.shape[1])
            wrong = len(outputs) - int(outputs.isfinite().all(dim=1).sum())
            if wrong:
                raise NotFinite(
                    f"{who}: the model's outputs must be finite; {wrong} of {len(outputs)} images of batch {position}"
                    " gave NaN or infinity."
                )
            empty = empty and not len(images)
            yield outputs, labels.long().cpu()
    if empty:
        raise ValueError(f"{who}: needs at least one image; the loader is empty.")


def check_outputs(who: str, outputs: Any, images: int) -> torch.Tensor:
    """Return ``outputs`` if they are one row of class scores per image; raise ``TypeError`` otherwise."""
    if isinstance(outputs, torch.Tensor) and outputs.ndim == 2 and len(outputs) == images:
        return outputs
    shape = list(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    raise TypeError(f"{who}: the model must return class scores [{images}, C]; got {shape}.")


def loss_and_top1(who: str, model: nn.Module, loader: Iterable[Any], *, device: Device = None) -> tuple[float, float]:
    """Return mean cross-entropy and share of right classes, and nothing that costs more."""
    loss, hits, images = 0.0, 0, 0
    for outputs, labels in scores(who, model, loader, device=device, progress=False):
        loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
        hits += int((outputs.argmax(1) == labels).sum())
        images += len(labels)
    return loss / images, hits / images


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_classes: int | None = None,
    attributes: Mapping[str, Sequence[Any]] | None = None,
    device: Device = None,
    progress: bool = True,
) -> Evaluation:
    """Classify every image of ``loader`` and say how well that went.

    The model runs in eval mode without gradients; its training flags are put back.

    Parameters
    ----------
    model
        Returns class scores (before any softmax) [N, C] for images [N, ...].
    loader
        Yields (images, labels) with labels [N] in [0, C).
    num_classes
        If given, C must be this: a guard against the wrong model or data.
    attributes
        For each attribute one value an image, in the loader's order: ``{"skin type": [3, 1, ...]}``. Losses and hits
        are then told group by group, for :func:`pyprune.fairness`. The loader must not shuffle.
    device
        Where to compute; by default where the model is. The model is moved back afterwards.
    progress
        Whether a progress bar is shown on a terminal.

    Returns
    -------
    Evaluation
        Confusion [C, C], mean cross-entropy, top-1, top-5 (from six classes on) and the one-against-rest AUCs, for
        which the scores [images, C] are kept until the end in float32; loss and AUC class by class, too.

    Raises
    ------
    TypeError, ValueError
        If the loader is empty or yields no (images, labels), a label is out of range, an output is NaN or
        infinite, the model's outputs are not ``num_classes``, or an attribute has not one value an image.
    """
    groups = _Groups(attributes or {}, loader)
    rows: list[FloatArray] = []
    truth: list[IntArray] = []
    loss, top5 = 0.0, 0
    confusion = torch.zeros(0, 0, dtype=torch.int64)
    class_loss: torch.Tensor | float = 0.0
    for outputs, labels in scores("evaluate", model, loader, device=device, progress=progress):
        classes = outputs.shape[1]
        if classes != (num_classes or classes):
            raise ValueError(f"evaluate: the model must have num_classes={num_classes} outputs; it has {classes}.")
        if not len(confusion):
            confusion = torch.zeros(classes, classes, dtype=torch.int64)
        log_shares = outputs.log_softmax(1)
        losses = F.nll_loss(log_shares, labels, reduction="none")
        loss += float(losses.sum())
        class_loss = class_loss + torch.bincount(labels, losses, minlength=classes)
        groups.add(losses.numpy(), (outputs.argmax(1) == labels).numpy())
        pairs = labels * classes + outputs.argmax(1)
        confusion += torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
        if classes > 5:
            top5 += int((outputs.topk(5).indices == labels[:, None]).sum())
        rows.append(log_shares.float().numpy())
        truth.append(labels.numpy())
    images = int(confusion.sum())
    aucs = _class_aucs(np.concatenate(truth), np.concatenate(rows))
    totals = confusion.sum(1).double()
    return Evaluation(
        confusion=confusion.numpy(),
        loss=loss / images,
        top5=top5 / images if len(confusion) > 5 else None,
        auc=None if np.isnan(aucs).any() else float(np.mean(aucs)),
        class_loss=(class_loss / totals).numpy(),  # 0 / 0 for a class without images
        class_auc=aucs,
        groups=groups.found(),
    )


def _class_aucs(labels: IntArray, log_shares: FloatArray) -> FloatArray:
    """Return [C] one-against-rest AUCs, NaN where undefined; log-probabilities do not saturate at 1 as shares do."""
    counts = np.bincount(labels, minlength=log_shares.shape[1])
    return np.array([
        roc_auc_score(labels == c, log_shares[:, c]) if 0 < count < len(labels) else np.nan
        for c, count in enumerate(counts)
    ])  # fmt: skip


class _Groups:
    """Sums of losses and hits over the groups of every attribute, batch by batch."""

    def __init__(self, attributes: Mapping[str, Sequence[Any]], loader: Any) -> None:
        if attributes and isinstance(getattr(loader, "sampler", None), RandomSampler):
            raise ValueError(
                "evaluate: attributes come in the loader's order, and this one shuffles. Use another loader."
            )
        self.position = 0
        self.codes: dict[str, tuple[list[str], IntArray]] = {}
        for name, values in attributes.items():
            groups, codes = np.unique([str(value) for value in values], return_inverse=True)
            self.codes[str(name)] = (groups.tolist(), codes.astype(np.int64))
        self.sums = {name: np.zeros((3, len(groups))) for name, (groups, _) in self.codes.items()}

    def add(self, losses: FloatArray, hits: Any) -> None:
        """Take in the losses and hits [N] of the next images."""
        for name, (groups, codes) in self.codes.items():
            mine = codes[self.position : self.position + len(losses)]
            if len(mine) < len(losses):
                raise ValueError(f"evaluate: attribute {name!r} has {len(codes)} values, and there are more images.")
            sums = [np.bincount(mine, values, minlength=len(groups)) for values in (np.ones(len(mine)), losses, hits)]
            self.sums[name] += np.stack(sums)
        self.position += len(losses)

    def found(self) -> dict[str, dict[str, GroupScore]]:
        """Return the scores of every group."""
        for name, (_, codes) in self.codes.items():
            if len(codes) != self.position:
                raise ValueError(
                    f"evaluate: attribute {name!r} has {len(codes)} values for {self.position} images. Give each one."
                )
        return {
            name: {
                group: GroupScore(int(count), float(loss / count), float(hits / count))
                for group, count, loss, hits in zip(groups, *self.sums[name], strict=True)
            }
            for name, (groups, _) in self.codes.items()
        }


class _Width(NamedTuple):
    """How many inputs, outputs and groups one layer has once the plan has been carried out, and whether a bias."""

    inputs: int
    outputs: int
    groups: int
    bias: bool


class _Count(NamedTuple):
    """One layer as it ran: the module, the positions of the map its weights were applied at, for all calls."""

    name: str
    module: Counted
    positions: int


def profile(
    model: nn.Module,
    example_inputs: torch.Tensor | Sequence[torch.Tensor],
    *,
    plan: Plan | None = None,
    latency: bool = True,
) -> Profile:
    """Count what one image costs, under both conventions of the field, and time the network.

    ``compact`` counts the network as it really is: every parameter, and one multiply-accumulate (MAC) per weight
    and position of its output map. With a plan it counts what the network will be once compacted.
    ``hrank_v1`` counts as HRank's published tables do: removed filters at the full width of their inputs, no norms,
    biases in the parameters, and the biases of linear layers in the MACs.

    Convolutions, transposed convolutions and linear layers that run as modules are counted, each as often as it
    runs; weights that are used without their module are in the parameters and not in the MACs.

    Parameters
    ----------
    model
        Any network.
    example_inputs
        What ``model(*example_inputs)`` takes: one tensor, or a sequence; the first dimension counts images.
    plan
        Which filters stay.
    latency
        Whether to measure the median time of one forward pass of the model as it is, whatever the plan.

    Returns
    -------
    Profile
        Costs per image.

    Raises
    ------
    ValueError
        If the model cannot take the inputs, or the plan is for another model.
    """
    found = Costs(model, example_inputs).profile(plan)
    inputs = as_inputs("profile", example_inputs)
    return replace(found, latency_ms=latencies([model], inputs)[0]) if latency else found


class Costs:
    """A network that was run once, so that it can be counted under any number of plans.

    Parameters
    ----------
    model, example_inputs
        As for :func:`profile`.
    who
        Whom messages name.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, who: str = "profile") -> None:
        self.model, self.who = model, who
        self.inputs = as_inputs(who, example_inputs)
        self._counts = _run_and_count(model, self.inputs, who)

    @cached_property
    def _traced(self) -> tuple[fx.Graph, dict[fx.Node, Any]]:
        trace = graph.trace(self.model, self.who)
        shapes = _Shapes(self.model, trace)
        with running(self.model) as place, torch.no_grad():
            shapes.run(*(one.to(place) for one in self.inputs))
        return trace, shapes.found

    def leaving(self, plan: Plan, residual: channels.Residual = "scatter") -> channels.Channels:
        """Return which channels leave the network once ``plan`` is carried out."""
        graph.check_plan(self.who, self.model, plan)
        trace, shapes = self._traced
        dead, _ = graph.follow_masks(self.model, plan, trace)
        return channels.follow(self.model, trace, shapes, dead, residual)

    def profile(self, plan: Plan | None = None, residual: channels.Residual = "scatter") -> Profile:
        """Return what one image costs, without a latency: now, or once ``plan`` is carried out."""
        leaving = None if plan is None else self.leaving(plan, residual)
        keep = {} if plan is None else {name: len(kept) for name, kept in plan.keep.items()}
        return _summed(self.model, self._counts, len(self.inputs[0]), keep, leaving)


def counted(
    model: nn.Module, positions: Mapping[str, int], images: int, kept: Mapping[str, int] | None = None
) -> Profile:
    """Return what :func:`profile` counts, without running ``model``.

    Parameters
    ----------
    model
        Any network.
    positions
        For each layer by name, the positions of one image's map that its weights are applied at.
    images
        The number of images of the batch, only noted.
    kept
        How many filters ``hrank_v1`` is to count, for layers that lose some.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Counted)}
    counts = [_Count(name, module, positions.get(name, 0)) for name, module in layers.items()]
    return _summed(model, counts, images, kept or {}, None)


def _summed(
    model: nn.Module, counts: list[_Count], images: int, keep: Mapping[str, int], leaving: channels.Channels | None
) -> Profile:
    """Add up what the layers cost."""
    full = [_layer(count, _full_width(count.module)) for count in counts]
    layers = tuple(_layer(count, _width(count, leaving)) for count in counts)
    others = sum(parameter.numel() for parameter in model.parameters()) - sum(layer.parameters for layer in full)
    return Profile(
        parameters=others - _leaving_elsewhere(model, leaving) + sum(layer.parameters for layer in layers),
        macs=sum(layer.macs for layer in layers),
        hrank_v1_parameters=sum(_hrank(count, keep).parameters for count in counts),
        hrank_v1_macs=sum(_hrank(count, keep).macs for count in counts),
        latency_ms=None,
        device=device_name(model_device(model)),
        layers=layers,
        batch=images,
    )


def first_image(who: str, loader: Iterable[Any]) -> torch.Tensor:
    """Return the first image of a training loader as a batch, [1, C, H, W]; raise if there is none."""
    for images, _ in loader:
        first: torch.Tensor = images[:1]
        return first
    raise ValueError(f"{who}: the training loader is empty; it must yield (images, labels).")


def as_inputs(who: str, example_inputs: Any) -> tuple[torch.Tensor, ...]:
    """Return ``example_inputs`` as a tuple of tensors, each with at least one image; raise otherwise."""
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    if not inputs or not all(isinstance(one, torch.Tensor) and one.ndim and len(one) for one in inputs):
        raise TypeError(f"{who}: example_inputs must be a tensor [N, ...] or a sequence of them, N at least 1.")
    return inputs


def _run_and_count(model: nn.Module, inputs: Sequence[torch.Tensor], who: str) -> list[_Count]:
    """Run the model once and return its counted layers in order of definition, with positions per image."""
    images = len(inputs[0])
    positions: dict[nn.Module, int] = {}

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen = args[0] if isinstance(module, Transposed) else output
        channels = seen.shape[-1] if isinstance(module, nn.Linear) else seen.shape[1]
        positions[module] = positions.get(module, 0) + seen.numel() // (images * channels)

    layers = {name: module for name, module in model.named_modules() if isinstance(module, Counted)}
    handles = [module.register_forward_hook(hook) for module in layers.values()]
    try:
        with running(model) as place, torch.no_grad():
            model(*(one.to(place) for one in inputs))
    except Exception as error:
        shapes = ", ".join(str(list(one.shape)) for one in inputs)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{who}: the model cannot take example_inputs of {shapes} ({reason[0]}).") from None
    finally:
        for handle in handles:
            handle.remove()
    return [_Count(name, module, positions.get(module, 0)) for name, module in layers.items()]


class _Shapes(fx.Interpreter):
    """Runs a traced graph and notes the shape of every tensor, and every whole number, by node."""

    def __init__(self, model: nn.Module, trace: fx.Graph) -> None:
        super().__init__(model, graph=trace)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, torch.Tensor):
            self.found[node] = result.shape
        elif type(result) is int:
            self.found[node] = result
        return result


def _width(count: _Count, leaving: channels.Channels | None) -> _Width:
    """Return the inputs and outputs that a layer is left with; constants that are folded into it make a bias."""
    inputs, outputs, groups, bias = _full_width(count.module)
    if leaving is None:
        return _Width(inputs, outputs, groups, bias)
    if count.name in leaving.inputs:
        gone = leaving.leaving_inputs(count.name)
        inputs -= int(gone.sum())
        bias = bias or bool(leaving.inputs[count.name].constants[gone].any())
    if count.name in leaving.first:
        outputs -= int(leaving.leaving(count.name).sum())
        groups = leaving.groups_left(count.name)
    return _Width(inputs, outputs, groups, bias)


def _leaving_elsewhere(model: nn.Module, leaving: channels.Channels | None) -> int:
    """Return how many parameters leave norms and other modules with one value per channel."""
    if leaving is None:
        return 0
    modules = {name: model.get_submodule(name) for name in leaving.inputs}
    return sum(
        int(leaving.leaving_inputs(name).sum()) * len(list(module.parameters(recurse=False)))
        for name, module in modules.items()
        if not isinstance(module, Counted)
    ) + leaving.leaving_parameters(model)


def _full_width(module: Counted) -> _Width:
    bias = module.bias is not None
    if isinstance(module, nn.Linear):
        return _Width(module.in_features, module.out_features, 1, bias)
    return _Width(module.in_channels, module.out_channels, module.groups, bias)


def _weights(module: Counted, width: _Width) -> int:
    """Return how many weights ``module`` has at ``width``; groups divide them."""
    if isinstance(module, nn.Linear):
        return width.inputs * width.outputs
    return width.inputs * width.outputs // width.groups * int(np.prod(module.kernel_size))


def _layer(count: _Count, width: _Width) -> LayerCount:
    name, module, positions = count
    weights = _weights(module, width)
    return LayerCount(
        name=name,
        kind=type(module).__name__,
        outputs=_full_width(module).outputs,
        kept=width.outputs,
        parameters=weights + width.outputs * width.bias,
        macs=weights * positions,
    )


def _hrank(count: _Count, keep: Mapping[str, int]) -> LayerCount:
    """Count one layer by ``hrank_v1``: kept filters at full input width, biases of linear layers in the MACs."""
    full = _full_width(count.module)
    layer = _layer(count, full._replace(outputs=keep.get(count.name, full.outputs)))
    if not isinstance(count.module, nn.Linear) or count.module.bias is None:
        return layer
    biases = count.positions * full.outputs
    return LayerCount(layer.name, layer.kind, layer.outputs, layer.kept, layer.parameters, layer.macs + biases)


def latencies(
    models: Sequence[nn.Module], inputs: torch.Tensor | Sequence[torch.Tensor], budget_s: float = 0.4
) -> list[float]:
    """Return each model's median time in milliseconds for one forward pass of ``inputs``.

    The models take turns, and the order turns round every time, so that a machine that slows down or warms up
    does so for all of them. Each is run in eval mode without gradients, first untimed, then timed until
    ``budget_s`` seconds have gone, and at least three times; a GPU is waited for before and after each run.
    """
    tensors = as_inputs("latencies", inputs)
    if not models:
        return []
    taken: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for model in models:
            _timed(model, tensors)
        order = list(range(len(models)))
        end = time.perf_counter() + budget_s
        while len(taken[0]) < 3 or time.perf_counter() < end:
            for i in order:
                taken[i].append(_timed(models[i], tensors))
            order.reverse()
    return [statistics.median(times) for times in taken]


def _timed(model: nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    with running(model) as place:
        moved = [one.to(place) for one in inputs]
        _synchronise(place)
        start = time.perf_counter()
        model(*moved)
        _synchronise(place)
        return (time.perf_counter() - start) * 1e3


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device: torch.device) -> str:
    """Return what a person calls ``device``: the GPU's name, or the CPU's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
