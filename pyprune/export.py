"""The slim folder: weights, architecture, plain source and a page for people, written and read back."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import pyprune
from pyprune import files, measure, resizing, slimfile, slimreading, slimsource
from pyprune.slimreading import ARCHITECTURE, WEIGHTS
from pyprune.types import Certificate, Compacted, Profile
from pyprune.wrappers import unwrapped

SOURCE = "slim_model.py"
PAGE = "README.md"


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
        If the folder cannot be written, the network keeps its own forward, or it uses an operation that the format
        does not hold (named). Nothing is written then.
    TypeError
        If ``slim`` does not come from :func:`pyprune.compact`.
    """
    if isinstance(slim, Compacted) and slim.own_forward:
        raise ValueError(
            f"save_slim: a slim folder holds a graph, and the slim {type(slim.model).__name__} keeps its own forward, "
            f"which torch.fx cannot trace ({slim.own_forward}). Keep slim.plan and slim.model.state_dict(): compact "
            "makes the same network of the original again. Or write it with export_onnx or export_pt2."
        )
    if not isinstance(slim, Compacted) or not isinstance(slim.model, fx.GraphModule):
        raise TypeError(f"save_slim: needs what compact returned; got {type(slim).__name__}.")
    architecture = slimfile.describe("save_slim", slim.model)
    weights = {name: one.detach().clone() for name, one in slim.model.state_dict().items()}  # no two share memory
    slimreading.check_writable("save_slim", architecture, weights, slim.example_inputs)
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
    return slimreading.read_slim("load_slim", folder)[0]


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
    slim, metadata = slimreading.read_slim("load_into", folder)
    network = unwrapped(model)[0]
    resizing.check_operations("load_into", slim, network)
    inputs = _examples(slim, metadata.get("inputs", ""), example_inputs)
    twin = copy.deepcopy(network).cpu()
    resizing.resize_("load_into", twin, slim)
    resizing.check_outputs("load_into", twin, slim, inputs)
    del twin
    resizing.resize_("load_into", network, slim)
    return model


def _metadata(slim: Compacted) -> dict[str, str]:
    return {"format": "pyprune.slim", "version": "1", "inputs": slimreading.record(slim.example_inputs)}


def _examples(slim: fx.GraphModule, recorded: str, given: Any) -> tuple[torch.Tensor, ...]:
    """Return what two networks are compared on: what is given, or numbers of the recorded shapes."""
    if given is not None:
        return tuple(one.detach().cpu() for one in measure.as_inputs("load_into", given))
    shapes = slimreading.recorded(recorded)
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
