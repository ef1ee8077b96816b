"""Deployment: the slim network as an ONNX or .pt2 file, compared with itself before it is written."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pyprune import files, measure
from pyprune.types import Compacted, Exported
from pyprune.wrappers import unwrapped

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest |exported - slim| / max(1, max |slim|): runtimes fold norms into weights and add in another order."""

OPSET = 18
"""Of ONNX: what torch's exporter writes without converting, and every runtime since 2023 reads."""

_MOST_IMAGES = 8
_LARGEST = 1 << 31  # a protobuf file holds less

Inputs = torch.Tensor | Sequence[torch.Tensor]
_Run = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


def export_onnx(
    slim: Compacted | nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Inputs | None = None,
    opset: int = OPSET,
    dynamic_batch: bool = True,
    verify: bool = True,
) -> Exported:
    """Write a network as one ONNX file, after onnxruntime has computed the same with it.

    The export is torch's own (``torch.onnx.export(dynamo=True)``), in eval mode and for any number of images.
    Indexed additions become ``ScatterND``, which every runtime of ONNX has; where one is slow at that, compact with
    ``residual="intersect"``.

    Parameters
    ----------
    slim
        What :func:`pyprune.compact` returned, or any network; wrappers are taken off. It is not changed.
    path
        The file to write, beside its place and then renamed.
    example_inputs
        What the network takes, as for :func:`pyprune.compact`; those it was compacted with, by default.
    opset
        The version of ONNX's operators.
    dynamic_batch
        Leave the number of images open. Networks that compute with that number may need ``False``.
    verify
        Compare the file's outputs in onnxruntime, on the CPU, with the network's, on the example inputs and on random
        ones of other batch sizes. The difference may be 1e-5 in float32 and 2e-2 in float16, over
        max(1, max |output|).

    Returns
    -------
    Exported
        Path, operator version, what was compared and the largest difference.

    Raises
    ------
    ValueError
        If a package is missing, the network or an argument does not fit, or onnxruntime cannot run the result.
    RuntimeError
        If the outputs differ by more than the tolerance. Nothing is written then.

    Examples
    --------
    >>> from pyprune import Plan, compact
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> slim = compact(model, Plan(keep={"0": [1, 2]}), torch.randn(2, 1, 8, 8), latency=False)
    >>> export_onnx(slim, "slim.onnx").opset  # doctest: +SKIP
    18
    """
    who = "export_onnx"
    _need(who, "onnx", "onnxscript", *(["onnxruntime"] if verify else []))
    if isinstance(opset, bool) or not isinstance(opset, int) or not OPSET <= opset <= 25:
        raise ValueError(f"{who}: opset must be a whole number from {OPSET} to 25; got {opset!r}.")
    model, inputs = _taken(who, slim, example_inputs)
    size = sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))
    if size >= _LARGEST:
        raise ValueError(f"{who}: an ONNX file holds less than 2 GB; the network has {size / 1e9:.1f} GB of tensors.")
    with _quiet():
        program = _followed(
            who,
            lambda example, dynamic: torch.onnx.export(
                model, example, dynamo=True, dynamic_shapes=dynamic, opset_version=opset, verbose=False,
                external_data=False, input_names=_input_names(len(example)),
            ),
            inputs,
            dynamic_batch,
        )  # fmt: skip
        data: bytes = program.model_proto.SerializeToString()
    written = next(one.version for one in program.model_proto.opset_import if one.domain == "")
    if written != opset:
        raise ValueError(f"{who}: torch's exporter cannot write opset {opset} here, only {written}. Pass opset=18.")
    run = _runtime(who, data) if verify else None
    compared, worst = _compared(who, model, run, inputs, dynamic_batch)
    return _write(who, path, data, "onnx", opset, compared, worst, model)


def export_pt2(
    slim: Compacted | nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Inputs | None = None,
    dynamic_batch: bool = True,
    verify: bool = True,
) -> Exported:
    """Write a network as a ``.pt2`` file, what ``torch.export.load`` and torch's ahead-of-time compiler read.

    .. warning:: Reading a ``.pt2`` file can execute what is in it. Load none that you did not make; a slim folder
       is what to pass on to others, and pyprune itself reads no ``.pt2`` file.

    Parameters
    ----------
    slim, path, example_inputs, dynamic_batch
        As for :func:`export_onnx`.
    verify
        Compare the exported program's outputs with the network's.

    Returns
    -------
    Exported
        As for :func:`export_onnx`; it has no operator version.

    Raises
    ------
    ValueError, RuntimeError
        As for :func:`export_onnx`.
    """
    who = "export_pt2"
    model, inputs = _taken(who, slim, example_inputs)
    with _quiet():
        program = _followed(
            who, lambda example, dynamic: torch.export.export(model, example, dynamic_shapes=dynamic), inputs,
            dynamic_batch,
        )  # fmt: skip
        buffer = BytesIO()
        torch.export.save(program, buffer)
        runs = program.module()
    run = (lambda batch: _tensors(runs(*batch))) if verify else None
    compared, worst = _compared(who, model, run, inputs, dynamic_batch)
    return _write(who, path, buffer.getvalue(), "pt2", None, compared, worst, model)


def _need(who: str, *packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{who}: needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
            "Run `pip install 'pyprune[onnx]'`."
        )


def _taken(who: str, slim: Any, example_inputs: Any) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return a copy of the network in eval mode on the CPU, and the inputs there."""
    model = slim.model if isinstance(slim, Compacted) else slim
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: needs what compact returned, or a network; got {type(slim).__name__}.")
    if example_inputs is None and not isinstance(slim, Compacted):
        raise ValueError(f"{who}: a bare network needs example_inputs. Pass one batch, as its forward takes it.")
    inputs = measure.as_inputs(who, slim.example_inputs if example_inputs is None else example_inputs)
    model = copy.deepcopy(unwrapped(model)[0]).cpu().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inputs = tuple(one.detach().cpu() for one in inputs)
    try:
        with torch.no_grad():
            _tensors(model(*(one.clone() for one in inputs)))
    except Exception as error:
        shapes = ", ".join(str(list(one.shape)) for one in inputs)
        raise ValueError(f"{who}: the network cannot take inputs of {shapes} ({_first_line(error)}).") from None
    return model, inputs


def _followed(who: str, export: Callable[..., Any], inputs: tuple[torch.Tensor, ...], dynamic_batch: bool) -> Any:
    """Return what ``export`` makes of at least two images: torch takes a single one for a constant."""
    example = _batch(inputs, max(2, min(len(inputs[0]), _MOST_IMAGES))) if dynamic_batch else inputs
    batch = torch.export.Dim("batch")
    images = len(inputs[0])
    dynamic = tuple({0: batch} if len(one) == images else None for one in inputs) if dynamic_batch else None
    try:
        return export(example, dynamic)
    except Exception as error:
        hint = "Pass dynamic_batch=False if it computes with the number of images." if dynamic_batch else ""
        raise ValueError(f"{who}: torch cannot export the network ({_first_line(error)}). {hint}".rstrip()) from None


def _runtime(who: str, data: bytes) -> _Run:
    """Return what onnxruntime computes with the file, on the CPU."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ValueError(
            f"{who}: onnxruntime cannot run the file on a CPU ({_first_line(error)}). "
            "Convert the network to float32, or pass verify=False for another runtime."
        ) from None

    def run(batch: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        named = {given.name: one.numpy() for given, one in zip(session.get_inputs(), batch, strict=True)}
        return [torch.from_numpy(one) for one in session.run(None, named)]

    return run


def _compared(
    who: str, model: nn.Module, run: _Run | None, inputs: tuple[torch.Tensor, ...], dynamic_batch: bool
) -> tuple[tuple[str, ...], float | None]:
    """Return what was compared, in words, and the largest difference; nothing without ``run``."""
    if run is None:
        return (), None
    images = len(inputs[0])
    few, generator = min(images, _MOST_IMAGES), torch.Generator().manual_seed(0)
    batches = [(f"example inputs ({few} images)", _batch(inputs, few) if dynamic_batch else inputs)]
    for count in (1, few + 1) if dynamic_batch else (images,):
        batches.append((f"normal random inputs ({count} images)", _batch(inputs, count, generator)))
    worst = 0.0
    for words, batch in batches:
        try:
            with torch.no_grad():
                expected = _tensors(model(*(one.clone() for one in batch)))
        except Exception as error:
            raise ValueError(
                f"{who}: the network itself fails on {words} ({_first_line(error)}). Pass dynamic_batch=False if it "
                "takes one number of images only."
            ) from None
        try:
            found = run(batch)
        except Exception as error:
            raise ValueError(
                f"{who}: the exported network fails on {words} ({_first_line(error)}). Convert the network to float32, "
                "or pass verify=False for another runtime."
            ) from None
        worst = max(worst, _difference(found, expected))
    limit = _tolerance(model)
    if not worst <= limit:
        raise RuntimeError(
            f"{who}: the exported network differs from the slim one by {worst:.3g}, more than {limit:g}; nothing is "
            "written. Please report the network."
        )
    return tuple(words for words, _ in batches), worst


def _batch(
    inputs: tuple[torch.Tensor, ...], count: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, ...]:
    """Return ``count`` images, the given ones over again or normal random ones; whole numbers are never random."""
    images = len(inputs[0])

    def sized(one: torch.Tensor) -> torch.Tensor:
        rows = count if len(one) == images else len(one)
        if generator is not None and one.is_floating_point():
            return torch.randn((rows, *one.shape[1:]), generator=generator, dtype=torch.float64).to(one.dtype)
        return one[torch.arange(rows) % len(one)]

    return tuple(sized(one) for one in inputs)


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [one for one in pytree.tree_leaves(outputs) if isinstance(one, torch.Tensor)]


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    if [one.shape for one in found] != [one.shape for one in expected]:
        return float("inf")
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if other.numel():
            gap = float((one.double() - other.double()).abs().max())
            worst = max(worst, gap / max(1.0, float(other.double().abs().max())) if gap == gap else float("inf"))
    return worst


def _tolerance(model: nn.Module) -> float:
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    return TOLERANCES.get(dtype, 1e-1)


def _write(
    who: str, path: str | os.PathLike[str], data: bytes, kind: str, opset: int | None, compared: tuple[str, ...],
    worst: float | None, model: nn.Module,
) -> Exported:  # fmt: skip
    files.make_folder(who, Path(path).parent)
    files.write_bytes(path, data)
    return Exported(str(path), kind, opset, len(data), worst is not None, compared, worst, _tolerance(model))


def _input_names(count: int) -> list[str]:
    return ["input"] if count == 1 else [f"input_{i}" for i in range(count)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's exporters from talking about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
