"""The one reader of slim folders: nothing in them is run or believed, and no tensor is read before all else fits."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx, nn

from pyprune import files, slimfile, slimrun
from pyprune.slimcalls import MAX_COUNT

WEIGHTS = "model.safetensors"
ARCHITECTURE = "architecture.json"
_MOST_TEXT = 4096


def read_slim(who: str, folder: str | os.PathLike[str]) -> tuple[fx.GraphModule, dict[str, str]]:
    """Return the network of a slim folder, in eval mode on the CPU, and what the file of its weights says besides.

    Raises
    ------
    ValueError
        If a file is missing, truncated, foreign, from a newer pyprune, or holds anything that the format does not
        allow; if the files do not belong together; or if a forward pass would fail or hold impossibly much.
    """
    place = Path(folder)
    content = files.read_json(who, place / ARCHITECTURE, slimfile.FORMAT, slimfile.VERSION, slimfile.MAX_BYTES)
    architecture = slimfile.check(who, content)
    header = files.tensor_header(who, place / WEIGHTS)
    metadata: dict[str, str] = header.pop("__metadata__", {})
    model = slimfile.build(who, architecture)
    _check_header(who, place / WEIGHTS, header, model)
    model.eval()
    found = slimrun.follow(who, model, recorded(metadata.get("inputs", "")))
    tensors, _ = files.read_tensors(who, place / WEIGHTS)
    implied = {name: one.shape for name, one in model.state_dict().items()}
    if {name: one.shape for name, one in tensors.items()} != implied:
        raise ValueError(f"{who}: {place / WEIGHTS} changed while it was read. Try again.")
    slimfile.check_indices(who, model, tensors, found)
    # Cloned, because in the file's own memory tensors lie where they lie, and alignment changes speed and rounding.
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    return model, metadata


def check_writable(
    who: str, architecture: slimfile.Architecture, weights: dict[str, torch.Tensor], inputs: Sequence[torch.Tensor]
) -> None:
    """Raise unless what is to be written would be read back: these tensors, and a forward pass on such inputs.

    Raises
    ------
    ValueError
        Naming what does not fit.
    """
    built = slimfile.build(who, architecture).eval()
    implied = {name: (one.shape, one.dtype) for name, one in built.state_dict().items()}
    held = {name: (one.shape, one.dtype) for name, one in weights.items()}
    if implied != held:
        odd = sorted(name for name in implied.keys() | held.keys() if implied.get(name) != held.get(name))
        raise ValueError(f"{who}: {odd[0]!r} is not what its layer's settings imply; the slim format cannot hold it.")
    found = slimrun.follow(who, built, recorded(record(inputs)))
    slimfile.check_indices(who, built, weights, found)


def record(inputs: Sequence[torch.Tensor]) -> str:
    """Return shapes and types of at most two images, as JSON."""
    images = len(inputs[0])
    rows = [min(2, images) if len(one) == images else len(one) for one in inputs]
    return json.dumps(
        [
            [[count, *one.shape[1:]], str(one.dtype).removeprefix("torch.")]
            for count, one in zip(rows, inputs, strict=True)
        ]
    )


def recorded(text: str) -> list[tuple[list[int], torch.dtype]]:
    """Return what :func:`record` wrote; nothing if it is anything else."""
    dtypes = {**slimfile.DTYPES, "int64": torch.int64, "int32": torch.int32}
    try:
        content = json.loads(text) if len(text) <= _MOST_TEXT else []
        found = [([*shape], dtypes[word]) for shape, word in content]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    whole = all(type(size) is int and 0 < size <= MAX_COUNT for shape, _ in found for size in shape)
    return found if whole and all(1 <= len(shape) <= 8 for shape, _ in found) else []


def _check_header(who: str, path: Path, header: dict[str, dict[str, object]], model: nn.Module) -> None:
    """Raise unless the file holds exactly the tensors that the architecture implies."""
    needed = {
        name: (slimfile.CODES[str(one.dtype).removeprefix("torch.")], list(one.shape))
        for name, one in model.state_dict().items()
    }
    odd = sorted(header.keys() ^ needed.keys())
    if odd:
        where = "lacks" if odd[0] in needed else "has, and the architecture does not,"
        raise ValueError(f"{who}: {path} {where} the tensor {odd[0]!r}; the files do not belong together.")
    for name, (dtype, shape) in needed.items():
        came = header[name]
        if (came["dtype"], came["shape"]) != (dtype, shape):
            raise ValueError(
                f"{who}: {name!r} must be {dtype} {shape} by the architecture; {path} has {came['dtype']} "
                f"{came['shape']}. The files do not belong together."
            )
