"""Masks: filters that are zero and stay zero while the network is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from pyprune import graph, measure, operations, recording
from pyprune.types import IntArray, Plan


class Masks:
    """The zeros of a masked model, and the means to keep them; :func:`pyprune.mask_` makes one.

    Parameters
    ----------
    model
        The masked model. Its parameters are looked up by name each time, so they may be moved, converted or
        replaced in between.
    dead
        For each parameter, by qualified name, the int64 indices along its first dimension that are zero; for the weight
        of a transposed convolution, its output channels.
    kept
        Filters that the plan removes and that no mask can silence: ``{layer: {filter: reason}}``. They stay.

    Attributes
    ----------
    dead, kept
        As given.
    """

    def __init__(
        self, model: nn.Module, dead: Mapping[str, IntArray], kept: Mapping[str, Mapping[int, str]] | None = None
    ) -> None:
        self.model = model
        self.dead = dict(dead)
        self.kept = {name: dict(filters) for name, filters in (kept or {}).items()}
        self._indices: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def zeros(self) -> int:
        """How many numbers the masks hold at zero."""
        return sum(len(rows) * self._parameter(name).numel() // self._filters(name) for name, rows in self.dead.items())

    def reapply(self) -> None:
        """Set every masked number to zero again, in place and outside of autograd.

        Raises
        ------
        ValueError
            If a masked parameter has gone from the model, or has become too short.
        """
        with torch.no_grad():
            for name in self.dead:
                parameter = self._parameter(name)
                if self._is_transposed(name):
                    graph.zero_filters(self.model, name, self.dead[name])
                else:
                    parameter.index_fill_(0, self._rows(name, parameter.device), 0)

    def attach(self, optimizer: Optimizer) -> Masks:
        """Reapply the masks after every step of ``optimizer``, since momentum and weight decay revive filters.

        Steps that mixed precision skips change nothing and so need nothing.

        Parameters
        ----------
        optimizer
            Any torch optimizer over parameters of the masked model.

        Returns
        -------
        Masks
            This object, so that masking and attaching fit on one line. The optimizer keeps it alive.

        Raises
        ------
        TypeError, ValueError
            If ``optimizer`` is none, or trains none of the masked parameters although they ask for gradients: it
            was made for another model.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Masks.attach: needs a torch optimizer; got {type(optimizer).__name__}.")
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        masked = [self._parameter(name) for name in self.dead]
        wanted = [parameter for parameter in masked if parameter.requires_grad]
        if wanted and not any(id(parameter) in trained for parameter in wanted):
            raise ValueError(
                "Masks.attach: the optimizer must train the masked model; it holds none of its masked parameters. "
                "Mask the model that it was made for."
            )
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        return self

    def remove(self) -> None:
        """Let go of every optimizer. The zeros stay until something changes them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.reapply()

    def _parameter(self, name: str) -> torch.Tensor:
        try:
            parameter = self.model.get_parameter(name)
        except AttributeError:
            raise ValueError(
                f"Masks: the model has no parameter {name!r} any more. Mask the model again after changing it."
            ) from None
        last = int(self.dead[name][-1])
        if parameter.ndim == 0 or self._filters(name) <= last:
            raise ValueError(
                f"Masks: {name!r} must have more than {last} rows; it has shape {list(parameter.shape)}. "
                "Mask the model again after changing it."
            )
        return parameter

    def _is_transposed(self, name: str) -> bool:
        owner = self.model.get_submodule(name.rpartition(".")[0])
        return type(owner) in operations.TRANSPOSED and name.endswith(".weight")

    def _filters(self, name: str) -> int:
        """Return how many filters, or entries of a norm, the parameter belongs to."""
        if self._is_transposed(name):
            owner: Any = self.model.get_submodule(name.rpartition(".")[0])
            return int(owner.out_channels)
        return len(self.model.get_parameter(name))

    def _rows(self, name: str, device: torch.device) -> torch.Tensor:
        if (name, device) not in self._indices:
            self._indices[name, device] = torch.tensor(self.dead[name], device=device)
        return self._indices[name, device]


def mask_(model: nn.Module, plan: Plan, example_inputs: torch.Tensor | Sequence[torch.Tensor] | None = None) -> Masks:
    """Zero the filters that ``plan`` removes, in place, with all that would bring their channels back to life.

    A removed filter's weights and bias become zero, and so does the affine slice of every per-channel norm that
    its channel reaches before the next operation that mixes channels (thesis section 4.3 masks filters; without
    the norm, its shift would still pass). At a join the walk goes on only where every producer of the channel is
    removed. Filters that cannot be silenced so, for example behind a norm without affine parameters, are left as
    they are and named in ``Masks.kept``.

    Parameters
    ----------
    model
        Changed in place.
    plan
        Which filters stay. Layers that it does not name keep all.
    example_inputs
        What ``model(*example_inputs)`` takes; needed only if torch.fx cannot trace the model, which then runs on them.

    Returns
    -------
    Masks
        ``masks.attach(optimizer)`` makes the zeros hold through training.

    Raises
    ------
    ValueError
        If the plan is for another model, or the model can neither be traced nor recorded. Nothing has been changed
        then.

    Examples
    --------
    >>> from pyprune import Plan
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> masks = mask_(model, Plan(keep={"0": [0, 2]}))
    >>> model[0].weight[1].abs().sum().item(), model[1].weight.tolist(), masks.zeros
    (0.0, [1.0, 0.0, 1.0, 0.0], 24)
    """
    graph.check_plan("mask_", model, plan)
    dead, kept = graph.follow_masks(model, plan, _traced(model, example_inputs))
    masks = Masks(model, dead, kept)
    masks.reapply()
    return masks


def _traced(model: nn.Module, example_inputs: Any) -> fx.Graph:
    """Return the graph of ``model``, recorded on its inputs if torch.fx cannot trace it."""
    try:
        return graph.trace(model, "mask_")
    except graph.TraceError as error:
        if example_inputs is None:
            raise ValueError(f"{error} Or pass example_inputs.") from None
        inputs = measure.as_inputs("mask_", example_inputs)
        twin = copy.deepcopy(model).eval()  # forward may store things in it
        found = recording.record("mask_", twin, [one.detach().clone() for one in inputs])
        if found.failure is not None:
            raise ValueError(
                f"mask_: {type(model).__name__} does not accept example_inputs ({found.failure})."
            ) from None
        return found.graph
