"""Durable writing and suspicious reading."""

import contextlib
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import files


def safetensors(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    files.write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", {"loss": float("nan")})


def test_tensors_come_back_bit_for_bit_even_from_views(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.arange(5), "c": torch.randn(2).bfloat16(), "d": torch.tensor(1.5)}
    files.write_tensors(tmp_path / "t", tensors, {"k": "v"})
    back, metadata = files.read_tensors("test", tmp_path / "t")
    assert metadata == {"k": "v"}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "claims 0 bytes of 0"),
        (b"short", "claims"),
        (struct.pack("<Q", 1 << 60) + b"{}", "It may be truncated"),
        (struct.pack("<Q", 2) + b"[]", "must hold a JSON object"),
        (safetensors(b"not json"), "not readable JSON"),
        (safetensors(b"[" * 100_000), "not readable JSON"),
        (safetensors(b'{"a": 1, "a": 2}'), "a key stands twice"),
        (safetensors({"a": 1}), "entry of 'a' is malformed"),
        (safetensors({"a": entry([1], 0, 4, "F99")}, bytes(4)), "entry of 'a' is malformed"),
        (safetensors({"a": entry([1 << 40, 0], 0, 0)}), "impossible size"),
        (safetensors({"a": entry([1 << 50], 0, 1 << 52)}), "impossible size"),
        (safetensors({"a": entry([-1], 0, 4)}, bytes(4)), "impossible size"),
        (safetensors({"a": entry([True], 0, 4)}, bytes(4)), "impossible size"),
        (safetensors({"a": entry([2], 0, 4)}, bytes(4)), "needs 8 bytes and has 4"),
        (safetensors({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "overlap or leave gaps"),
        (safetensors({"a": entry([1], 4, 8)}, bytes(8)), "overlap or leave gaps"),
        (safetensors({"a": entry([1], 0, 4)}, bytes(8)), "declares 4 bytes of tensors and holds 8"),
        (safetensors({"__metadata__": {"a": 1}}), "metadata must map strings"),
        (safetensors({"a": {**entry([1], 0, 4), "x": 1}}, bytes(4)), "entry of 'a' is malformed"),
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        files.read_tensors("test", path)


@settings(deadline=None, max_examples=60)
@given(cut=st.integers(0, 400), flip=st.integers(0, 400), bit=st.integers(0, 7))
def test_damaged_files_never_crash(tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, bit: int) -> None:
    path = tmp_path_factory.mktemp("damage") / "t"
    files.write_tensors(path, {"a": torch.arange(20.0), "b": torch.arange(3)}, {"format": "x"})
    data = bytearray(path.read_bytes())
    data[flip % len(data)] ^= 1 << bit
    path.write_bytes(data[: len(data) - cut % 50])
    with contextlib.suppress(ValueError):  # any other exception is a failure
        files.read_tensors("test", path)


def test_missing_and_oversized_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is none at"):
        files.read_bytes("test", tmp_path / "absent", 10)
    (tmp_path / "big").write_bytes(bytes(11))
    with pytest.raises(ValueError, match=r"1 to 10 bytes; .* has 11"):
        files.read_bytes("test", tmp_path / "big", 10)


def test_an_output_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="output folder must be writable"):
        files.make_folder("test", tmp_path / "file")
    assert files.make_folder("test", tmp_path / "a" / "b").is_dir()
