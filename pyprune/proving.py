"""The proof of a compaction: the slim network beside the masked one, in float64 with randomised norms and as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from pyprune import measure, recording
from pyprune import operations as ops
from pyprune.channels import Channels
from pyprune.cutting import SIZED, adopted, cut, sliced, zero
from pyprune.types import Certificate

if TYPE_CHECKING:
    from pyprune.deciding import Decision


TOLERANCE = 1e-10
"""Largest |slim - masked| / max(1, max |masked|) in float64: the order of summation is all that may differ."""

NATIVE_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The same in the model's own type."""


_MOST_IMAGES = 8  # of the example inputs in float64, where a large batch would cost minutes and prove no more
_MOST_SPACE = 64  # rows and columns of theirs, for the same reason


def prove(masked: nn.Module, slim: nn.Module, decision: Decision, inputs: tuple[torch.Tensor, ...]) -> Certificate:
    """Compare slim and masked as they are in their own type, then in float64 with randomised norms.

    ``masked`` is used up: it gets random norms. Only the layer that is running is held in float64.
    """
    device = measure.model_device(masked)
    dtype, generator = model_dtype(masked), torch.Generator().manual_seed(0)
    limit = NATIVE_TOLERANCES.get(dtype, 5e-2)
    masked.eval()
    with measure.running(slim):
        native = difference(_outputs(slim, inputs), _outputs(masked, inputs))
    if device.type == "mps":  # has no float64
        masked.cpu()
    _randomise(masked, generator)
    zero(masked, decision.dead)
    words, worst = [], 0.0
    with _in_float64(masked, decision):
        run = _slimmed(slim, masked, decision)
        for word, batch, expected in _compared(inputs, generator, masked, decision):
            words.append(word)
            worst = max(worst, difference(recording.tensors(run(*copies(batch))), expected))
    _check("in float64", worst, TOLERANCE)
    _check(f"in {_plain(dtype)}", native, limit)
    return Certificate(True, tuple(words), worst, TOLERANCE, _plain(dtype), native, limit)


@contextmanager
def _in_float64(model: nn.Module, decision: Decision) -> Iterator[None]:
    """Let every layer compute in float64, its tensors converted when it is called and put back when it has run.

    A model that reads parameters outside their layers, or that could not be traced, is converted as a whole instead.
    """
    graph = decision.graph
    if decision.own_forward or any(node.op == "get_attr" for node in graph.nodes):
        model.double()
        yield
        return
    layers = {model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    own: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def widen(layer: nn.Module, _: Any) -> None:
        own[layer] = [(one, one.data) for one in (*layer.parameters(), *layer.buffers()) if one.is_floating_point()]
        for one, data in own[layer]:
            one.data = data.double()

    def restore(layer: nn.Module, *_: Any) -> None:
        for one, data in own.pop(layer):
            one.data = data

    handles = [layer.register_forward_pre_hook(widen, prepend=True) for layer in layers]
    handles += [layer.register_forward_hook(restore, always_call=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _slimmed(slim: nn.Module, masked: nn.Module, decision: Decision) -> Callable[..., Any]:
    """Return what runs the slim network in float64, with the numbers of the masked one."""
    if not isinstance(slim, fx.GraphModule):
        return adopted(masked, decision.channels).double().eval()
    return _Slimmed(slim, masked, decision.channels).run


class _Slimmed(fx.Interpreter):
    """The slim network in float64: each layer is cut from the masked one when it runs, and dropped."""

    def __init__(self, slim: fx.GraphModule, masked: nn.Module, channels: Channels) -> None:
        super().__init__(slim)
        self.masked, self.channels = dict(masked.named_modules()), channels
        self.device = measure.model_device(masked)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run one layer."""
        layer = self.masked.get(target)
        if layer is None:  # a functional dropout that follows the training flag, and this is eval mode
            return args[0]
        if type(layer) not in SIZED and not [*layer.parameters(), *layer.buffers()]:
            return layer(*args, **kwargs)
        return cut(target, copy.deepcopy(layer).double(), self.channels, {})(*args, **kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a tensor that the network reads directly: the masked network's own, or an index."""
        owner, _, leaf = target.rpartition(".")
        if hasattr(self.masked.get(owner), leaf):
            return sliced(target, getattr(self.masked[owner], leaf), self.channels)
        return super().get_attr(target, args, kwargs).to(self.device)


def _check(where: str, difference: float, limit: float) -> None:
    if not difference <= limit:  # also when it is NaN
        raise RuntimeError(
            f"compact: the slim network differs from the masked one by {difference:.3g} {where}, more than {limit:g}; "
            "nothing is returned. Exclude the layers in question from the plan, and please report the network."
        )


def unverified(model: nn.Module) -> Certificate:
    """Return the certificate that certifies nothing."""
    dtype = model_dtype(model)
    return Certificate(False, (), None, TOLERANCE, _plain(dtype), None, NATIVE_TOLERANCES.get(dtype, 5e-2))


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of the first parameter that is a floating-point one; float32 without any."""
    return next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Give every norm statistics and affine parameters that hide nothing."""

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return (torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low).to(like.device)

    ranges = {"running_mean": (-1, 1), "running_var": (0.5, 2), "weight": (0.5, 1.5), "bias": (-0.5, 0.5)}
    for module in model.modules():
        if type(module) in ops.NORMS | ops.GROUP_NORMS | ops.MIXING_NORMS:
            for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if leaf in ranges:
                    tensor.copy_(uniform(tensor, *ranges[leaf]))


def _compared(
    inputs: tuple[torch.Tensor, ...], generator: torch.Generator, model: nn.Module, decision: Decision
) -> Iterator[tuple[str, tuple[torch.Tensor, ...], list[torch.Tensor]]]:
    """Yield what is compared in float64, in words and numbers, and what ``model`` makes of it.

    These are the example inputs and two random batches of different sizes, few and small images where it takes them.
    Where only the way is known that forward took on the example inputs, others must take the same.
    """
    images, space = len(inputs[0]), max([0, *(max(one.shape[2:]) for one in inputs if one.ndim == 4)])
    sizes = [_MOST_SPACE, space] if space > _MOST_SPACE else [space]
    batches = [(count, size) for size in sizes for count in sorted({min(images, _MOST_IMAGES), images})]
    for count, size in batches:
        batch = _resized(inputs, count, size, model)
        last = (count, size) == batches[-1]
        expected = _outputs(model, batch) if last else _accepted(model, batch, decision)
        if expected is not None:
            break
    first = "" if count == images else f"first {count} of "
    crop = "" if size == space else f", cropped to {size} x {size}"
    yield f"example inputs ({first}{images} images{crop})", batch, expected or []
    few = min(images, 2)
    for count in (few, few + 1):
        batch = _resized(inputs, count, size, model, generator)
        expected = _accepted(model, batch, decision)
        if expected is not None:
            yield f"normal random inputs ({count} images)", batch, expected


def _accepted(model: nn.Module, batch: tuple[torch.Tensor, ...], decision: Decision) -> list[torch.Tensor] | None:
    """Return what ``model`` makes of ``batch``; ``None`` if it does not take it: some expect one size of batch.

    Nor does a model take what makes its own forward go another way.
    """
    try:
        if decision.own_forward:
            found = recording.record("compact", model, copies(batch))
            return found.outputs if found.takes(decision.graph) else None
        return _outputs(model, batch)
    except Exception:
        return None


def _resized(
    inputs: tuple[torch.Tensor, ...], count: int, size: int, model: nn.Module, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, ...]:
    """Return ``count`` images in float64, cropped to ``size``, random ones if there is a generator.

    Tensors of whole numbers are repeated instead.
    """
    device, images = measure.model_device(model), len(inputs[0])

    def resized(one: torch.Tensor) -> torch.Tensor:
        rows = count if len(one) == images else len(one)
        if one.ndim == 4:
            one = one[:, :, :size, :size]
        if generator is not None and one.is_floating_point():
            return torch.randn((rows, *one.shape[1:]), generator=generator, dtype=torch.float64).to(device)
        rest = one[torch.arange(rows, device=one.device) % len(one)].to(device)
        return rest.double() if one.is_floating_point() else rest

    return tuple(resized(one) for one in inputs)


def _outputs(model: nn.Module, batch: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return recording.tensors(model(*copies(batch)))


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest |found - expected| / max(1, max |expected|); infinite where the shapes differ."""
    if [one.shape for one in found] != [one.shape for one in expected]:
        return float("inf")
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.numel() == 0 or torch.equal(one, other):
            continue
        a, b = one.double(), other.double()
        same = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(same, 0.0, (a - b).abs())
        scale = max(1.0, float(torch.where(b.isfinite(), b.abs(), 0.0).max()))
        worst = max(worst, float("inf") if not gap.isfinite().all() else float(gap.max()) / scale)
    return worst


def copies(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return inputs of one's own: a network that begins with an in-place activation overwrites what it is given."""
    return tuple(one.detach().clone() for one in inputs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Hold the random state still, keep reduced precision out of the comparison, and leave no traces in ``model``."""
    device = measure.model_device(model)
    with ExitStack() as stack:
        stack.callback(_restore, _state(model))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False))
        yield


_State = list[tuple[dict[str, Any], dict[str, Any]]]


def _state(model: nn.Module) -> tuple[_State, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return what every module holds, and copies of what a forward of somebody's own may overwrite."""
    tables = [(table, dict(table)) for one in model.modules() for table in (one._parameters, one._buffers, vars(one))]
    foreign = [one for one in model.modules() if not type(one).__module__.startswith("torch.nn")]
    tensors = {one for module in foreign for one in vars(module).values() if isinstance(one, torch.Tensor)}
    tensors |= {one for module in foreign for one in module.buffers(recurse=False)}
    return tables, [(one, one.detach().clone()) for one in tensors]


def _restore(state: tuple[_State, list[tuple[torch.Tensor, torch.Tensor]]]) -> None:
    """Take back what tracing and running left behind: tensors that are computed from buffers alone, counters."""
    for table, held in state[0]:
        table.clear()
        table.update(held)
    for tensor, numbers in state[1]:
        if not torch.equal(tensor, numbers):
            tensor.copy_(numbers)
