"""The slim folder: weights, architecture, plain source and a page for people, written and read back."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import pyprune
from pyprune import files, measure, resizing, slimfile, slimsource
from pyprune.types import Certificate, Compacted, Profile
from pyprune.wrappers import unwrapped

WEIGHTS = "model.safetensors"
ARCHITECTURE = "architecture.json"
SOURCE = "slim_model.py"
PAGE = "README.md"
_MOST_TEXT = 4096


def save_slim(slim: Compacted, folder: str | os.PathLike[str]) -> Path:
    """Write the slim folder: four files, each written beside its place and renamed.

    ``model.safetensors`` holds the weights, ``architecture.json`` what :func:`load_slim` builds the network from,
    ``slim_model.py`` the same network as source for people without pyprune, ``README.md`` what it is and costs.

    Parameters
    ----------
    slim
        What :func:`pyprune.compact` returned; its model may have been trained since.
    folder
        Created if needed; old files of those names are replaced.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If the folder cannot be written, or the network uses an operation that the format does not hold (named).
        Nothing is written then.
    TypeError
        If ``slim`` does not come from :func:`pyprune.compact`.
    """
    if not isinstance(slim, Compacted) or not isinstance(slim.model, fx.GraphModule):
        raise TypeError(f"save_slim: needs what compact returned; got {type(slim).__name__}.")
    architecture = slimfile.describe("save_slim", slim.model)
    weights = {name: one.detach().clone() for name, one in slim.model.state_dict().items()}  # no two share memory
    _check_shapes("save_slim", weights, architecture)
    source = slimsource.write_source("save_slim", architecture)
    page = _page(slim)
    place = files.make_folder("save_slim", folder)
    files.write_tensors(place / WEIGHTS, weights, _metadata(slim))
    files.write_json(place / ARCHITECTURE, architecture.content)
    files.write_bytes(place / SOURCE, source.encode())
    files.write_bytes(place / PAGE, page.encode())
    return place


def load_slim(folder: str | os.PathLike[str]) -> nn.Module:
    """Read a slim folder back, in eval mode on the CPU, without running anything that it holds.

    Parameters
    ----------
    folder
        What :func:`save_slim` wrote. ``slim_model.py`` and ``README.md`` are not read.

    Returns
    -------
    torch.nn.Module
        A ``torch.fx.GraphModule`` with the names and bits of the saved network.

    Raises
    ------
    ValueError
        If a file is missing, truncated, foreign, from a newer pyprune, or holds anything that the format does not
        allow. Names, shapes and types of all tensors are compared before any of them is read.
    """
    return _read("load_slim", folder)[0]


def load_into(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    example_inputs: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> nn.Module:
    """Load a slim folder into a network of one's own class, of full width or narrow, in place.

    For people who keep their own code: convolutions, linear layers and norms of the same names get the slim widths
    and numbers, and the network must then compute what the slim one does. Folded constants may add biases. Anything
    else that compaction wrote anew, such as indexed additions, is not in one's own ``forward``: such folders are
    refused (``residual="intersect"`` makes none).

    Parameters
    ----------
    model
        Has the layers of the slim network, by name; it keeps its device, training flags and ``requires_grad``.
    folder
        What :func:`save_slim` wrote; it is checked as :func:`load_slim` checks it, and nothing in it is run.
    example_inputs
        What both networks are compared on, as for :func:`pyprune.compact`; random numbers of the shape that the
        folder records, by default.

    Returns
    -------
    torch.nn.Module
        ``model``.

    Raises
    ------
    ValueError
        If the folder is not what it must be, the layers do not agree (named), the network fails with the slim widths,
        or computes something else. The model is untouched then.

    Examples
    --------
    >>> import tempfile
    >>> from pyprune import Plan, compact
    >>> def build():
    ...     return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    >>> slim = compact(build(), Plan(keep={"0": [1, 2]}), torch.randn(2, 1, 8, 8), latency=False)
    >>> load_into(build(), save_slim(slim, tempfile.mkdtemp()))[2].in_channels
    2
    """
    slim, metadata = _read("load_into", folder)
    network = unwrapped(model)[0]
    resizing.check_operations("load_into", slim, network)
    inputs = _examples(slim, metadata.get("inputs", ""), example_inputs)
    twin = copy.deepcopy(network).cpu()
    resizing.resize_("load_into", twin, slim)
    resizing.check_outputs("load_into", twin, slim, inputs)
    del twin
    resizing.resize_("load_into", network, slim)
    return model


def _read(who: str, folder: str | os.PathLike[str]) -> tuple[fx.GraphModule, dict[str, str]]:
    """Return the network of a slim folder, and what the file of its weights says besides."""
    place = Path(folder)
    content = files.read_json(who, place / ARCHITECTURE, slimfile.FORMAT, slimfile.VERSION)
    model = slimfile.build(who, slimfile.check(who, content))
    _check_header(who, place / WEIGHTS, model)
    tensors, metadata = files.read_tensors(who, place / WEIGHTS)
    slimfile.check_indices(who, model, tensors)
    # Cloned, because in the file's own memory tensors lie where they lie, and alignment changes speed and rounding.
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    model.eval()
    return model, metadata


def _metadata(slim: Compacted) -> dict[str, str]:
    return {"format": "pyprune.slim", "version": "1", "inputs": _record(slim.example_inputs)}


def _examples(slim: fx.GraphModule, recorded: str, given: Any) -> tuple[torch.Tensor, ...]:
    """Return what two networks are compared on: what is given, or numbers of the recorded shapes."""
    if given is not None:
        return tuple(one.detach().cpu() for one in measure.as_inputs("load_into", given))
    shapes = _recorded(recorded)
    if not shapes or not resizing.fits_in_memory(slim, shapes):
        raise ValueError(
            "load_into: the folder records no inputs to compare the networks on, or impossible ones. "
            "Pass example_inputs, one batch."
        )
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if dtype.is_floating_point
        else torch.zeros(shape, dtype=dtype)
        for shape, dtype in shapes
    )


def _record(inputs: Sequence[torch.Tensor]) -> str:
    """Return shapes and types of at most two images, as JSON."""
    images = len(inputs[0])
    rows = [min(2, images) if len(one) == images else len(one) for one in inputs]
    return json.dumps(
        [
            [[count, *one.shape[1:]], str(one.dtype).removeprefix("torch.")]
            for count, one in zip(rows, inputs, strict=True)
        ]
    )


def _recorded(text: str) -> list[tuple[list[int], torch.dtype]]:
    """Return what :func:`_record` wrote; nothing if it is anything else."""
    dtypes = {**slimfile.DTYPES, "int64": torch.int64, "int32": torch.int32}
    try:
        content = json.loads(text) if len(text) <= _MOST_TEXT else []
        found = [([*shape], dtypes[word]) for shape, word in content]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
    whole = all(type(size) is int and 0 < size <= slimfile.MAX_COUNT for shape, _ in found for size in shape)
    return found if whole and all(1 <= len(shape) <= 8 for shape, _ in found) else []


def _check_shapes(who: str, weights: dict[str, torch.Tensor], architecture: slimfile.Architecture) -> None:
    """Raise unless the architecture implies exactly these tensors: a changed layer would not load again."""
    built = slimfile.build(who, architecture)
    implied = {name: (one.shape, one.dtype) for name, one in built.state_dict().items()}
    held = {name: (one.shape, one.dtype) for name, one in weights.items()}
    if implied != held:
        odd = sorted(name for name in implied.keys() | held.keys() if implied.get(name) != held.get(name))
        raise ValueError(f"{who}: {odd[0]!r} is not what its layer's settings imply; the slim format cannot hold it.")
    slimfile.check_indices(who, built, weights)


def _check_header(who: str, path: Path, model: nn.Module) -> None:
    """Raise unless the file holds exactly the tensors that the architecture implies."""
    header = {name: entry for name, entry in files.tensor_header(who, path).items() if name != "__metadata__"}
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


def _page(slim: Compacted) -> str:
    """Return the README of the folder."""
    shapes = ", ".join(str(list(one.shape)) for one in slim.example_inputs)
    return f"""# A slim network

Made by pyprune from a larger network, whose outputs it reproduced when the removed filters were zero.{_lossy(slim)}

{_costs(slim.before, slim.after)}

`compact` counts the network as it really is; `hrank_v1` counts as HRank's tables do: removed filters at full input
width, no norms. MACs are multiply-accumulates for one image. Latency is the median of one forward pass of example
inputs of shape {shapes} on {slim.after.device}, both networks measured in turns.

## Load it

With pyprune:

```python
import pyprune as pp

model = pp.load_slim("{{folder}}")
```

Without pyprune, with torch and safetensors, from inside this folder:

```python
from slim_model import load

model = load()
```

## Proof

{_proof(slim.certificate)}

## Provenance

pyprune {pyprune.__version__}, torch {torch.__version__}; plan by `{slim.plan.method}`;
{_kept(slim)}
""".replace("{folder}", "path/to/this/folder")


def _lossy(slim: Compacted) -> str:
    if not slim.lossy:
        return ""
    count = sum(len(filters) for filters in slim.beyond.values())
    return f"""
Where branches are added, a channel left as soon as one of them lost it: {count} of those filters are not in the plan
(`residual="union"`, lossy)."""


def _costs(before: Profile, after: Profile) -> str:
    rows = [
        ("parameters (compact)", f"{before.parameters:,}", f"{after.parameters:,}"),
        ("MACs (compact)", f"{before.macs:,}", f"{after.macs:,}"),
        ("parameters (hrank_v1)", f"{before.hrank_v1_parameters:,}", f"{after.hrank_v1_parameters:,}"),
        ("MACs (hrank_v1)", f"{before.hrank_v1_macs:,}", f"{after.hrank_v1_macs:,}"),
        ("latency", _milliseconds(before), _milliseconds(after)),
    ]
    return "\n".join(["| | before | after |", "|---|---:|---:|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)])


def _milliseconds(profile: Profile) -> str:
    return "not measured" if profile.latency_ms is None else f"{profile.latency_ms:.3g} ms"


def _proof(certificate: Certificate) -> str:
    if not certificate.verified:
        return "The slim network was not compared with the masked one: verification was switched off."
    return (
        "When it was compacted, the slim network was compared with the masked one, as the largest difference over\n"
        f"max(1, largest output): {certificate.max_difference:.3g} in float64 with randomised norms "
        f"(allowed {certificate.tolerance:g}) on\n{'; '.join(certificate.inputs)};\n"
        f"{certificate.native_difference:.3g} in {certificate.dtype} (allowed {certificate.native_tolerance:g}) on "
        "the example inputs.\nThe proof holds for the moment of compaction; later training is not part of it."
    )


def _kept(slim: Compacted) -> str:
    count = sum(len(filters) for filters in slim.kept.values())
    if not count:
        return "every filter that the plan removes has left."
    return f"{count} filters that the plan removes have stayed, because something needs their place."
