"""The convolution kernels of whatever the caller has: a network, a file, a slim folder, a state dict, one array."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyprune import files, slimreading
from pyprune.checkpoints import PREFIXES
from pyprune.types import FloatArray

OTHER_DIMENSIONS = {nn.Conv1d: 1, nn.Conv3d: 3, nn.ConvTranspose1d: 1, nn.ConvTranspose3d: 3}


@dataclass(frozen=True, eq=False)
class Kernels:
    """The weights of one 2-d convolution: [F2, F1, K1, K2], filters first, F1 input channels *of a group*."""

    weight: Any
    groups: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(F2, F1, K1, K2)."""
        F2, F1, K1, K2 = self.weight.shape
        return int(F2), int(F1), int(K1), int(K2)

    @property
    def pairs(self) -> int:
        """How many pairs of filters read the same channels."""
        filters = self.shape[0] // self.groups
        return self.groups * filters * (filters - 1) // 2

    def on_host(self) -> FloatArray:
        """Return the weights as a float64 array in host memory."""
        weight = self.weight
        if not isinstance(weight, np.ndarray):
            tensor = weight if isinstance(weight, torch.Tensor) else torch.utils.dlpack.from_dlpack(weight)
            weight = tensor.detach().double().cpu().numpy()
        array: FloatArray = weight.astype(np.float64, copy=False)
        return array


@dataclass(frozen=True, eq=False)
class Network:
    """The kernels of one network in the order of its layers, and why others were left out."""

    layers: Mapping[str, Kernels]
    left_out: Mapping[str, str]
    weights_only: bool = False


def read_networks(who: str, given: Any, *, include_1x1: bool = False) -> dict[str, Network]:
    """Return the kernels of one network or of several.

    Parameters
    ----------
    who
        Whom messages name.
    given
        A module; a path to a safetensors file or a slim folder; a mapping from names to arrays, such as a state
        dict; one array [F2, F1, K1, K2]; or a list or mapping of these, one for each network.
    include_1x1
        Whether kernels of one number count.

    Returns
    -------
    dict
        By name: ``"network"`` for one, ``"run 0"``, ``"run 1"``, ... for a list.

    Raises
    ------
    ValueError
        If a file cannot be read, one array is not 4-D, or a network has no kernel that counts.
    TypeError
        If something is none of these.
    """
    if isinstance(given, (list, tuple)):
        named = {f"run {i}": one for i, one in enumerate(given)}
    elif isinstance(given, Mapping) and not all(is_array(one) for one in given.values()):
        named = {str(name): one for name, one in given.items()}
    else:
        named = {"network": given}
    if not named:
        raise ValueError(f"{who}: needs at least one network; got an empty {type(given).__name__}.")
    return {name: _read(f"{who}: {name}" if len(named) > 1 else who, one, include_1x1) for name, one in named.items()}


def is_array(value: object) -> bool:
    """Whether ``value`` is a tensor, a numpy array or another array with DLPack."""
    return isinstance(value, (np.ndarray, torch.Tensor)) or hasattr(value, "__dlpack__")


def _read(who: str, given: Any, include_1x1: bool) -> Network:
    weights_only = False
    if isinstance(given, nn.Module):
        found, left_out = _of_module(who, given)
    elif is_array(given):
        found, left_out = {"weights": Kernels(_one_array(who, given))}, {}
    elif isinstance(given, Mapping) and all(is_array(one) for one in given.values()):
        found, left_out = _of_arrays(given)
        weights_only = True
    elif isinstance(given, (str, os.PathLike)):
        weights_only = not Path(given).is_dir()
        found, left_out = _of_file(who, given) if weights_only else _of_slim_folder(who, given)
    else:
        raise TypeError(
            f"{who}: needs a torch.nn.Module, weights, or the path of a safetensors file or slim folder; "
            f"got {type(given).__name__}."
        )
    layers = {}
    for name, kernels in found.items():
        if why := _unfit(kernels, include_1x1):
            left_out[name] = why
        else:
            layers[name] = kernels
    if not layers:
        raise ValueError(f"{who}: needs a 2-d convolution with kernels larger than 1x1; {_instead(left_out)}.")
    return Network(layers, left_out, weights_only)


def _unfit(kernels: Kernels, include_1x1: bool) -> str:
    """Return why a layer cannot be measured, or nothing."""
    _, _, K1, K2 = kernels.shape
    if 0 in kernels.shape:
        return "has no weights"
    if K1 * K2 == 1 and not include_1x1:
        return "1x1 kernels have no structure"
    return ""


def _instead(left_out: Mapping[str, str]) -> str:
    """Say what there is, for a network in which nothing can be measured."""
    if not left_out:
        return "there is no convolution"
    name, why = next(iter(left_out.items()))
    hint = ". Pass include_1x1=True to measure these all the same" if "1x1" in why else ""
    more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
    return f"{name!r} {why}{more}{hint}"


def _one_array(who: str, weight: Any) -> Any:
    shape = list(weight.shape)
    if len(shape) != 4 or 0 in shape:
        raise ValueError(f"{who}: weights must be [F2, F1, K1, K2]; got {shape}. Pass them before flattening.")
    if not _is_floating(weight):
        raise TypeError(f"{who}: weights must be of a floating type; got {weight.dtype}. Convert them to float32.")
    return weight


def _is_floating(weight: Any) -> bool:
    return "float" in str(weight.dtype)


def _of_module(who: str, model: nn.Module) -> tuple[dict[str, Kernels], dict[str, str]]:
    found: dict[str, Kernels] = {}
    left_out: dict[str, str] = {}
    for name, module in model.named_modules():
        title = _own_name(name) or "weights"
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            weight = module.weight
            if nn.parameter.is_lazy(weight) or weight.is_meta:
                raise ValueError(f"{who}: {title!r} has no numbers yet. Run or load the network first.")
            transposed = isinstance(module, nn.ConvTranspose2d)
            found[title] = _kernels(weight.detach(), module.groups, transposed)
        elif dims := next((dims for kind, dims in OTHER_DIMENSIONS.items() if isinstance(module, kind)), 0):
            left_out[title] = f"is a {dims}-d convolution; kernels must be K1 x K2"
    return found, left_out


def _kernels(weight: Any, groups: int, transposed: bool) -> Kernels:
    """Return the kernels with filters first; a transposed convolution holds [inputs, F2 / groups, K1, K2]."""
    if transposed:
        inputs, outputs, K1, K2 = weight.shape
        weight = weight.reshape(groups, inputs // groups, outputs, K1, K2).transpose(1, 2)
        weight = weight.reshape(groups * outputs, inputs // groups, K1, K2)
    return Kernels(weight, groups)


def _of_arrays(arrays: Mapping[str, Any]) -> tuple[dict[str, Kernels], dict[str, str]]:
    """Return the kernels in a state dict: all 4-D arrays of a floating type, under the names of their layers."""
    found: dict[str, Kernels] = {}
    left_out: dict[str, str] = {}
    for key, array in arrays.items():
        name = str(key).removesuffix(".weight")
        if name in arrays or not name:
            name = str(key)
        dims = len(array.shape) - 2
        if dims < 1:  # norms, biases, linear layers, counters
            continue
        if dims != 2:
            left_out[name] = f"has shape {list(array.shape)}; kernels must be [F2, F1, K1, K2]"
        elif not _is_floating(array):
            left_out[name] = f"holds {array.dtype}, no floating type"
        else:
            found[name] = Kernels(array.detach() if isinstance(array, torch.Tensor) else array)
    return found, left_out


def _of_file(who: str, path: str | os.PathLike[str]) -> tuple[dict[str, Kernels], dict[str, str]]:
    tensors, _ = files.read_tensors(who, path)
    # A safetensors file keeps no order of layers; numbers in names nearly always tell it.
    return _of_arrays({_own_name(name): tensors[name] for name in sorted(tensors, key=_by_number)})


def _own_name(name: str) -> str:
    """Drop what DataParallel and torch.compile put in front of names."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """Sort key under which ``features.10`` comes after ``features.9``."""
    parts = re.split(r"([0-9]{1,9})", name)
    return [(part.isascii() and part.isdigit(), int(part) if i % 2 else 0, part) for i, part in enumerate(parts)]


def _of_slim_folder(who: str, folder: str | os.PathLike[str]) -> tuple[dict[str, Kernels], dict[str, str]]:
    return _of_module(who, slimreading.read_slim(who, folder)[0])
