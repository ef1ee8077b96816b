"""The only place where pyprune writes a file, and where it opens one that came from outside.

A file is written beside its destination, flushed to the disk and renamed over it, so a reader sees
the old content or the new one and never half of either. Nothing here can run code: files are
JSON or safetensors, and both are checked before anything is built from them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 8 << 20
"""Largest safetensors header that is read: the format's own limit of 100 MB invites abuse."""

MAX_JSON_BYTES = 64 << 20
MAX_CONTAINERS = 1 << 20
MAX_ITEMS = 4 << 20
"""Of one JSON file: a file of 64 MB could name 20 million empty lists, which take over a gigabyte."""

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F32": 4, "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` durably: beside it, flushed, then renamed over it.

    Raises
    ------
    OSError
        If the folder is missing, full or not writable. The old file, if any, is untouched.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)  # mkstemp makes files private
        Path(temporary).replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        if isinstance(error, OSError):  # name the file that is meant, not the temporary one
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself durable
    finally:
        os.close(folder)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented JSON, durably. NaN and infinities are refused, as JSON has none."""
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write ``tensors`` with string ``metadata`` as one safetensors file, durably."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, metadata=dict(metadata)))


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the names, types, shapes and bits of ``tensors``, whatever their order."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_folder(who: str, path: str | os.PathLike[str]) -> Path:
    """Create ``path`` if needed and return it; say plainly when nothing can be written there.

    Raises
    ------
    ValueError
        If ``path`` is a file, or cannot be created or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{who}: the output folder must be writable; {folder} is not ({error.strerror}). Choose another folder."
        ) from None
    return folder


def read_bytes(who: str, path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the bytes of ``path``, at most ``limit`` of them.

    Raises
    ------
    ValueError
        If the file is missing, unreadable, empty or larger than ``limit``.
    """
    file = Path(path)
    try:
        if not file.is_file():
            raise ValueError(f"{who}: needs a file; there is none at {file}.")
        size = file.stat().st_size
        if size == 0 or size > limit:
            raise ValueError(f"{who}: needs a file of 1 to {limit} bytes; {file} has {size}.")
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{who}: cannot read {file} ({error.strerror}).") from None


def parse_json(who: str, data: bytes, source: str) -> dict[str, Any]:
    """Parse one JSON object, refusing doubled keys, NaN, infinities and nesting too deep for the parser.

    Raises
    ------
    ValueError
        If ``data`` is not such an object; ``source`` names where it came from.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise ValueError("a key stands twice")
        return keys

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    def finite(text: str) -> float:
        number = float(text)
        return number if abs(number) < float("inf") else refuse(text)

    if data.count(b"[") + data.count(b"{") > MAX_CONTAINERS or data.count(b",") > MAX_ITEMS:
        raise ValueError(
            f"{who}: {source} must hold at most {MAX_CONTAINERS} lists and objects and {MAX_ITEMS} values; it has more."
        )
    try:
        content = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{who}: {source} is not readable JSON ({error}). It may be truncated or another kind of file."
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{who}: {source} must hold a JSON object; got {type(content).__name__}.")
    return content


def read_json(
    who: str, path: str | os.PathLike[str], kind: str, version: int, limit: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Read a JSON file of at most ``limit`` bytes that says ``"format": kind`` and a version of at most ``version``.

    Raises
    ------
    ValueError
        If it is missing, truncated, of another kind, or from a newer pyprune.
    """
    content = parse_json(who, read_bytes(who, path, limit), str(path))
    check_format(who, path, content.get("format"), content.get("version"), kind, version)
    return content


def check_format(
    who: str, path: str | os.PathLike[str], kind: object, version: object, wanted: str, newest: int
) -> None:
    """Raise ``ValueError`` unless the file calls itself ``wanted`` in a version that we know."""
    if kind != wanted:
        raise ValueError(f"{who}: {path} must be a {wanted!r} file; its format is {kind!r}.")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= newest:
        raise ValueError(
            f"{who}: {path} has format version {version!r}; this pyprune reads 1 to {newest}. Update pyprune."
        )


def tensor_header(who: str, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the checked header of a safetensors file: ``{name: {"dtype", "shape", "data_offsets"}}``.

    Checked before any tensor is built: the header's size, unique names, known dtypes, shapes that
    equal the byte ranges, and ranges that tile the file exactly. ``"__metadata__"`` stays in it.

    Raises
    ------
    ValueError
        If any of that fails.
    """
    file = Path(path)
    wrong = f"{who}: {file} is not a valid safetensors file"
    try:
        if not file.is_file():  # opening a pipe would wait for ever
            raise ValueError(f"{who}: needs a file; there is none at {file}.")
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"{wrong}: its header claims {length} bytes of {size}. It may be truncated.")
            header = parse_json(who, stream.read(length), f"the header of {file}")
    except OSError as error:
        raise ValueError(f"{who}: cannot read {file} ({error.strerror}).") from None
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                raise ValueError(f"{wrong}: its metadata must map strings to strings.")
            continue
        spans.append(_check_entry(wrong, name, entry))
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise ValueError(f"{wrong}: its tensors overlap or leave gaps.")
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"{wrong}: it declares {end} bytes of tensors and holds {size - 8 - length}.")
    return header


def _check_entry(wrong: str, name: str, entry: object) -> tuple[int, int]:
    """Return the byte range of one header entry after checking it against its shape and dtype."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{wrong}: the entry of {name!r} is malformed.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    listed = isinstance(shape, list) and isinstance(offsets, list) and len(shape) <= 8 and len(offsets) == 2
    if not listed or not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"{wrong}: the entry of {name!r} is malformed.")
    counts = [*shape, *offsets]
    if not all(type(count) is int and 0 <= count < 1 << 48 for count in counts) or max(shape, default=0) >= 1 << 31:
        raise ValueError(f"{wrong}: the entry of {name!r} has an impossible size.")
    needed = _ITEM_BYTES[dtype]
    for count in shape:
        needed *= count
    begin, stop = offsets
    if stop - begin != needed:
        raise ValueError(f"{wrong}: {name!r} of shape {shape} needs {needed} bytes and has {stop - begin}.")
    return begin, stop


def read_tensors(who: str, path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors (on the CPU) and the metadata of a safetensors file, after checking its header.

    Raises
    ------
    ValueError
        If the file is missing, truncated or malformed.
    """
    header = tensor_header(who, path)
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except Exception as error:
        raise ValueError(f"{who}: {path} is not a valid safetensors file ({error}).") from None
    return tensors, header.get("__metadata__", {})


def write_described(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    kind: str,
    version: int,
    about: Mapping[str, Any],
) -> None:
    """Write ``tensors`` with what is to be known about them: the counterpart of :func:`read_described`."""
    description = json.dumps(about, default=dict)
    write_tensors(path, tensors, {"format": kind, "version": str(version), "about": description})


def read_described(
    who: str, path: str | os.PathLike[str], kind: str, version: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the description in a safetensors file of ``kind``, of a version up to ``version``.

    Raises
    ------
    ValueError
        If it is missing, truncated, malformed, of another kind, or from a newer pyprune.
    """
    tensors, metadata = read_tensors(who, path)
    found = metadata.get("version", "")
    number = int(found) if re.fullmatch(r"[0-9]{1,9}", found) else found  # safetensors keeps strings only
    check_format(who, path, metadata.get("format"), number, kind, version)
    return tensors, parse_json(who, metadata.get("about", "").encode(), f"{path} (about)")
