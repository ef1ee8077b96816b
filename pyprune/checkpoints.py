"""Other people's weights: safetensors and torch files, read without ever running what they hold."""

from __future__ import annotations

import io
import os
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pyprune import files

MAX_BYTES = 8 << 30
"""Largest checkpoint that is read: it is held in memory once as a file and once as tensors."""

SAFE_TORCH = (2, 10)
"""First torch whose weights-only loading is not open to CVE-2026-24747."""

WRAPPERS = ("state_dict", "model", "net")
"""Keys under which training scripts keep the state dict."""

PREFIXES = ("module.", "_orig_mod.")
"""Left in names by DataParallel and by torch.compile."""

COUNTERS = ("total_ops", "total_params")
"""Buffers that a profiler leaves in every module."""

_MAX_PICKLE_BYTES = 64 << 20
_PLAIN_GLOBALS = frozenset({
    "collections OrderedDict", "collections Counter", "_codecs encode", "builtins set", "__builtin__ set",
    "torch Size", "torch device", "torch.nn.parameter Parameter", "torch.storage UntypedStorage",
    "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
})  # fmt: skip
_PLAIN_GLOBAL = re.compile(r"torch(\.cuda)? [A-Z][A-Za-z0-9]*Storage|torch (bool|bfloat16|u?int\d+|float\d+)")
_OTHER_IMPORTS = frozenset({"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"})


@dataclass(frozen=True)
class CheckpointReport:
    """What :func:`pyprune.load_checkpoint` did, in the model's names but for ``unexpected`` and ``ignored``.

    ``loaded`` entries were copied; ``missing`` ones are in the model only and were left as they were; ``unexpected``
    ones are in the file only; ``renamed`` says which name of the file went to which name of the model; ``ignored``
    are a profiler's counters.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    renamed: Mapping[str, str]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.loaded)} entries loaded, {_count(self.missing)} missing, {_count(self.unexpected)} unexpected, "
            f"{len(self.renamed)} renamed, {len(self.ignored)} ignored"
        )


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> CheckpointReport:
    """Copy the weights of a checkpoint into ``model``; everything is checked before anything is copied.

    The state dict may be bare or stand under ``state_dict``, ``model`` or ``net``. ``module.`` in front of names is
    dropped, and so are the entries ``*.total_ops`` and ``*.total_params``. A last layer ``fc`` is read into
    ``linear`` and the other way round. ``num_batches_tracked`` may be missing.

    Parameters
    ----------
    model
        Changed in place, on the device and in the type of numbers that it has.
    path
        A safetensors file, or one that ``torch.save`` wrote since torch 1.6. Which it is, is read from its content.
        A torch file is read by ``torch.load(weights_only=True)``, after a look at what its pickle asks for, and only
        with torch 2.10 or later. Nothing in the file is ever executed, and there is no fallback.
    strict
        Whether missing and unexpected entries are an error. Shapes must fit in any case.

    Returns
    -------
    CheckpointReport
        What was loaded, missing, unexpected, renamed and ignored.

    Raises
    ------
    ValueError
        If the file is missing, truncated, hostile or of another kind, or does not fit; the model has not been changed
        then.
    TypeError
        If ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load_checkpoint: needs a torch.nn.Module; got {type(model).__name__}.")
    own = {name: one for name, one in model.state_dict().items() if isinstance(one, torch.Tensor)}
    given, renamed, ignored = _fit_names("load_checkpoint", path, _read_state("load_checkpoint", path), own)
    back = {new: old for old, new in renamed.items()}
    report = CheckpointReport(
        loaded=tuple(name for name in own if name in given),
        missing=tuple(name for name in own if name not in given),
        unexpected=tuple(back.get(name, name) for name in given if name not in own),
        renamed={old: new for old, new in renamed.items() if new in own},
        ignored=tuple(ignored),
    )
    _check_fit(model, path, own, given, report, strict)
    with torch.no_grad():
        for name in report.loaded:
            own[name].copy_(given[name])
    return report


def convert_checkpoint(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> tuple[str, ...]:
    """Write the state dict of a torch file as safetensors, which every torch can read safely, and return its names.

    ``module.`` and a profiler's counters are dropped, as in :func:`pyprune.load_checkpoint`.

    Parameters
    ----------
    source
        A torch file (or a safetensors file).
    target
        The safetensors file to write.

    Raises
    ------
    ValueError
        If ``source`` cannot be read safely.
    OSError
        If ``target`` cannot be written.
    """
    state, _, _ = _fit_names("convert_checkpoint", source, _read_state("convert_checkpoint", source), {})
    copies = {name: one.detach().clone(memory_format=torch.contiguous_format) for name, one in state.items()}
    files.write_tensors(target, copies, {"format": "pt"})
    return tuple(copies)


def _read_state(who: str, path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Return the state dict in a checkpoint of either kind, names as they stand."""
    data = files.read_bytes(who, path, MAX_BYTES)
    if data[:4] == b"PK\x03\x04":
        return _state_dict(who, path, _read_torch(who, path, data), len(data))
    if data[8:9] == b"{":
        return files.read_tensors(who, path)[0]
    if data[:1] == b"\x80" or data[257:262] == b"ustar":
        raise ValueError(
            f"{who}: {path} is a pickle or tar file of the kind that torch wrote before 1.6, which cannot be read "
            "safely. If you trust it, open it once where it can do no harm and save its state dict again."
        )
    raise ValueError(
        f"{who}: needs a safetensors file or one that torch.save wrote; {path} begins with {data[:8]!r}. "
        "It may be truncated or another kind of file."
    )


def _read_torch(who: str, path: str | os.PathLike[str], data: bytes) -> object:
    """Return the content of a zip file by ``torch.save``, after checking what it asks for."""
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < SAFE_TORCH:
        raise ValueError(
            f"{who}: {path} is a torch file, which needs torch 2.10 or later to be read safely (CVE-2026-24747); this "
            f"is torch {torch.__version__}. Convert it to safetensors with a newer torch: "
            "pyprune.checkpoints.convert_checkpoint does that."
        )
    try:
        pickled = _check_archive(data)
        _check_pickle(pickled)
        content: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _RefusedError as reason:
        raise ValueError(f"{who}: {path} {reason}") from None
    except Exception as error:  # whatever damaged bytes make zipfile, pickletools or torch raise
        kind = type(error).__name__
        raise ValueError(
            f"{who}: {path} cannot be read as a torch file of plain tensors ({kind}). It may be truncated, or hold "
            "more than weights: save model.state_dict() alone."
        ) from None
    return content


class _RefusedError(Exception):
    """Why a file is refused, as the end of a sentence that begins with its path."""


def _check_archive(data: bytes) -> bytes:
    """Return the pickle in a zip file by torch.save, which holds one, compresses nothing and is as long as it says."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if any(name.split("/")[1:2] == ["code"] or name.endswith("/constants.pkl") for name in names):
            raise _RefusedError("is a TorchScript archive, which holds code. Save its state_dict() instead.")
        pickles = [member for member in members if member.filename.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise _RefusedError("is a zip file, but not one by torch.save. Save model.state_dict() with torch.save.")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise _RefusedError("holds compressed parts, which torch.save never writes. Get the file again.")
        size = sum(member.file_size for member in members)
        if size > len(data) or pickles[0].file_size > _MAX_PICKLE_BYTES:
            raise _RefusedError(f"claims parts of {size} bytes in all and has {len(data)}. Get the file again.")
        return archive.read(pickles[0])


def _check_pickle(data: bytes) -> None:
    """Refuse a pickle that asks for anything but tensors and plain containers; it is read, not executed."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _OTHER_IMPORTS or (opcode.name == "PROTO" and argument != 2):
            raise _RefusedError(
                "was not pickled by protocol 2, torch.save's own. Save it again without pickle_protocol."
            )
        wanted = str(argument)
        if opcode.name == "GLOBAL" and wanted not in _PLAIN_GLOBALS and not _PLAIN_GLOBAL.fullmatch(wanted):
            raise _RefusedError(
                f"asks for {wanted.replace(' ', '.')[:80]!r}, which no plain weights need; nothing was executed. "
                "Save model.state_dict() alone."
            )


def _state_dict(who: str, path: str | os.PathLike[str], content: object, size: int) -> dict[str, torch.Tensor]:
    """Return the state dict in what a torch file holds, checked to consist of plain tensors of credible size."""
    state = content
    if isinstance(content, dict):
        state = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    if not isinstance(state, dict) or not any(isinstance(one, torch.Tensor) for one in state.values()):
        found = f"a dict of {_named(content)}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(
            f"{who}: {path} must hold a state dict, bare or under {', '.join(map(repr, WRAPPERS))}; it holds {found}. "
            "Save model.state_dict()."
        )
    odd = [name for name, one in state.items() if not _is_plain(name, one)]
    if odd:
        raise ValueError(
            f"{who}: {path} must map names to dense tensors; {_named(odd)} {_are(odd)} something else. "
            "Save model.state_dict() alone."
        )
    needed = sum(one.numel() * one.element_size() for one in state.values())
    if needed > 2 * size:  # views of one storage may claim any shape; twice allows for tied weights
        raise ValueError(f"{who}: {path} claims {needed} bytes of tensors in a file of {size}. Get the file again.")
    return state


def _is_plain(name: object, one: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(one, torch.Tensor)
        and one.layout is torch.strided
        and one.device.type == "cpu"
        and not one.is_quantized
    )


def _fit_names(
    who: str, path: str | os.PathLike[str], state: Mapping[str, torch.Tensor], own: Iterable[str]
) -> tuple[dict[str, torch.Tensor], dict[str, str], list[str]]:
    """Return the entries by the model's names, which names changed, and the counters left out."""
    known = set(own)
    fitted: dict[str, torch.Tensor] = {}
    renamed: dict[str, str] = {}
    ignored: list[str] = []
    for name, tensor in state.items():
        if name not in known and name.rpartition(".")[2] in COUNTERS:
            ignored.append(name)
            continue
        new = _model_name(name, known)
        if new in fitted:
            raise ValueError(f"{who}: {path} has two entries for {new!r}, one of them {name!r}. Remove one.")
        fitted[new] = tensor
        if new != name:
            renamed[name] = new
    return fitted, renamed, ignored


def _model_name(name: str, own: set[str]) -> str:
    """Return what the model calls the entry ``name`` of a file."""
    while name not in own and name.startswith(PREFIXES):
        name = name[name.index(".") + 1 :]
    if name not in own:
        for here, there in (("fc", "linear"), ("linear", "fc")):
            if name.startswith(f"{here}.") and there + name[len(here) :] in own:
                return there + name[len(here) :]
    return name


def _check_fit(
    model: nn.Module, path: str | os.PathLike[str], own: Mapping[str, torch.Tensor],
    given: Mapping[str, torch.Tensor], report: CheckpointReport, strict: bool,
) -> None:  # fmt: skip
    """Raise ``ValueError``, in one line, unless the entries fit the model."""
    missing = [name for name in report.missing if not name.endswith("num_batches_tracked")]
    misfits = [
        name for name in report.loaded
        if own[name].shape != given[name].shape or _number(own[name]) != _number(given[name])
    ]  # fmt: skip
    if not report.loaded or (strict and (missing or report.unexpected)) or misfits:
        if not missing and not report.unexpected:
            _check_classes(model, path, own, given, misfits)
        first = f", such as {_difference(misfits[0], own, given)}" if misfits else ""
        raise ValueError(
            f"load_checkpoint: {path} does not fit {type(model).__name__}: it lacks {_count(missing)}, has "
            f"{_count(report.unexpected)} more, and {len(misfits)} of other shapes{first}. "
            "Build the model that the checkpoint is of."
        )


def _check_classes(
    model: nn.Module, path: str | os.PathLike[str], own: Mapping[str, torch.Tensor],
    given: Mapping[str, torch.Tensor], misfits: list[str],
) -> None:  # fmt: skip
    """Say so where nothing but the number of classes differs."""
    heads = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not heads or not misfits or any(name.rpartition(".")[0] != heads[-1] for name in misfits):
        return
    shapes = [(own[name].shape, given[name].shape) for name in misfits]
    if all(here[1:] == there[1:] and len(there) == len(here) for here, there in shapes):
        here, there = shapes[0][0][0], shapes[0][1][0]
        raise ValueError(
            f"load_checkpoint: the checkpoint {path} has {there} classes and the model {here}. "
            f"Build the model with num_classes={there}."
        )


def _difference(name: str, own: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> str:
    def shown(one: torch.Tensor) -> str:
        return f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}"

    return f"{name!r}, {shown(own[name])} in the model and {shown(given[name])} in the file"


def _number(tensor: torch.Tensor) -> str:
    """Return the kind of number that a tensor holds: they are converted within a kind only."""
    return "complex" if tensor.is_complex() else "real" if tensor.is_floating_point() else "whole"


def _count(names: Iterable[object]) -> str:
    """Return how many names there are, with the first three of them."""
    names = list(names)
    return f"{len(names)} ({_named(names)})" if names else "none"


def _named(names: Iterable[object]) -> str:
    shown = [f"{str(name)[:80]!r}" for name in names]
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")


def _are(names: list[object]) -> str:
    return "is" if len(names) == 1 else "are"
