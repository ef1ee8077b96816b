"""The network as a graph: tracing, and which channels must leave together."""

from __future__ import annotations

import difflib
import keyword
import re
from collections.abc import Iterable

from torch import fx, nn

from pyprune.types import Plan

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+")


def check_name(who: str, name: str) -> None:
    """Refuse a module, parameter or node name that could be more than a name.

    torch.fx writes names raw into the code that it generates, so a name is accepted only if it is an ASCII
    identifier or a number, at most 128 characters, and no keyword.

    Raises
    ------
    ValueError
        If it is anything else.
    """
    if len(name) > 128 or not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ValueError(
            f"{who}: names must be ASCII identifiers or numbers of at most 128 characters; got {name[:140]!r}. "
            "Rename it."
        )


def trace(model: nn.Module, who: str = "trace") -> fx.Graph:
    """Trace ``model`` in eval mode with torch.fx and return its graph; training flags are put back.

    torch's own modules are leaves. No code is generated or executed.

    Raises
    ------
    ValueError
        If a name is hostile (see :func:`check_name`), or torch.fx cannot follow ``forward``.
    """
    for path, _ in [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]:
        for part in path.split(".") if path else ():
            check_name(who, part)
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return fx.Tracer().trace(model)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{who}: {type(model).__name__} cannot be traced by torch.fx ({reason[0]}). "
            "Remove data-dependent control flow from forward, or name the taps by hand where ranks are read."
        ) from None
    finally:
        for module, training in flags.items():
            module.training = training


def convolutions(model: nn.Module) -> dict[str, Convolution]:
    """Return the convolutions of ``model`` by qualified name, in order of definition."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Convolution)}


def check_plan(who: str, model: nn.Module, plan: Plan) -> None:
    """Raise ``ValueError`` unless every layer of ``plan`` is a convolution of ``model`` with those filters."""
    layers = convolutions(model)
    for name, kept in plan.keep.items():
        check_layer(who, name, layers)
        count = layers[name].out_channels
        if plan.filters.get(name, count) != count:
            raise ValueError(
                f"{who}: the plan is for another model: {name!r} has {count} filters here and "
                f"{plan.filters[name]} in the plan."
            )
        if kept[-1] >= count:
            raise ValueError(f"{who}: {name!r} has filters 0 to {count - 1}; the plan keeps {kept[-1]}.")


def check_layer(who: str, name: str, layers: Iterable[str]) -> None:
    """Raise ``ValueError`` unless ``name`` is one of ``layers``, suggesting the nearest that is."""
    layers = list(layers)
    if name not in layers:
        near = difflib.get_close_matches(name, layers, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" It has {', '.join(layers[:8])}."
        raise ValueError(f"{who}: the model has no convolution named {name!r}.{hint}")
