"""CIFAR archives: the official layouts, and files that try to be something else."""

from __future__ import annotations

import contextlib
import gzip
import io
import pickle
import struct
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import data
from pyprune.datasets import cifar, restricted
from pyprune.datasets.restricted import read_plain

NAMES = [f"class{i}" for i in range(10)]


def text(value: str | bytes) -> bytes:
    """A str as Python 2 wrote it."""
    raw = value.encode("latin1") if isinstance(value, str) else value
    return b"U" + bytes([len(raw)]) + raw if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)) + raw


def python2(value) -> bytes:
    """What Python 2's cPickle wrote in protocol 2, without the frame around it."""
    if isinstance(value, dict):
        items = b"".join(python2(key) + python2(item) for key, item in value.items())
        return b"}q\x01(" + items + b"u"
    if isinstance(value, list):
        return b"]q\x02(" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, np.ndarray):
        shape = b"".join(map(python2, value.shape))
        made = b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05"
        dtype = b"cnumpy\ndtype\nq\x06" + text(value.dtype.str[1:]) + b"K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ"
        dtype += b"\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        return made + b"(K\x01(" + shape + b"t" + dtype + b"\x89" + text(value.tobytes()) + b"tb"
    return b"J" + struct.pack("<i", value) if isinstance(value, int) else text(value)


def as_python2(value) -> bytes:
    return b"\x80\x02" + python2(value) + b"."


def batch(count: int, seed: int, key: str = "labels", classes: int = 10) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3072), np.uint8)
    labels = [(i + seed) % classes for i in range(count)]
    return {
        "batch_label": f"batch {seed}",
        key: labels,
        "data": pixels,
        "filenames": [f"{i}.png" for i in range(count)],
    }


def write_cifar10(folder, count=40, dump=as_python2):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(dump(batch(count, i)))
    (folder / "test_batch").write_bytes(dump(batch(20, 9)))
    (folder / "batches.meta").write_bytes(dump({"label_names": NAMES, "num_vis": 3072}))
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_cifar10(tmp_path_factory.mktemp("data") / "cifar-10-batches-py")


@pytest.fixture
def copy(tmp_path):
    return write_cifar10(tmp_path / "cifar-10-batches-py", 20)


def pixels_of(part, splits):
    """Undo the normalisation."""
    images = torch.stack([part[i][0] for i in range(len(part))])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (splits.mean, splits.std))
    return ((images * std + mean) * 255).round().byte()


def test_every_image_is_there_once_with_its_label(archive):
    splits = data.open_data(f"cifar10:{archive}", seed=1)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (180, 20, 20)
    assert splits.classes == tuple(NAMES)
    assert (splits.shape, splits.name, splits.normalise, splits.augment) == ((3, 32, 32), "cifar10", "cifar", True)
    assert np.bincount(splits.val.labels).tolist() == [2] * 10
    expected = {}
    for i in range(1, 6):
        one = batch(40, i)
        expected |= {row.tobytes(): label for row, label in zip(one["data"], one["labels"], strict=True)}
    found = {}
    for part in (splits.train, splits.val):
        found |= {row.numpy().tobytes(): label for row, label in zip(pixels_of(part, splits), part.labels, strict=True)}
    assert found == expected
    test = batch(20, 9)
    assert np.array_equal(pixels_of(splits.test, splits).reshape(20, -1), test["data"])
    assert splits.test.labels.tolist() == test["labels"]
    other = data.open_data(f"cifar10:{archive}", seed=2)
    assert not np.array_equal(other.val.rows, splits.val.rows)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("keys", [str, str.encode])
def test_files_saved_again_by_python_3_are_read_too(archive, tmp_path, protocol, keys):
    def dump(value):
        return pickle.dumps({keys(key): item for key, item in value.items()}, protocol)

    again = write_cifar10(tmp_path / "a", 40, dump)
    one, two = (data.open_data(f"cifar10:{place}") for place in (archive, again))
    assert torch.equal(one.train.images, two.train.images)
    assert np.array_equal(one.train.labels, two.train.labels)


def test_numpy_2_names_its_modules_otherwise():
    plain = pickle.dumps(np.arange(6, dtype=np.int16).reshape(2, 3), 2)
    assert b"numpy._core.multiarray" in plain or b"numpy.core.multiarray" in plain
    for core in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        swapped = plain.replace(b"numpy._core.multiarray", core).replace(b"numpy.core.multiarray", core)
        assert np.array_equal(read_plain(swapped), np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("array", [
    np.arange(12, dtype=">i4").reshape(3, 4), np.asfortranarray(np.arange(12.0).reshape(3, 4)), np.zeros((0, 5), "u1"),
    np.array(3, "f2"), np.arange(4, dtype="<u8"),
])  # fmt: skip
def test_arrays_come_back(array):
    for protocol in (0, 2, 4):
        found = read_plain(pickle.dumps({"a": array}, protocol))["a"]
        assert np.array_equal(found, array)
        assert found.dtype == array.dtype


@pytest.mark.parametrize("kind", ["folder", "parent", "archive"])
def test_the_folder_its_parent_and_the_archive_are_the_same(archive, tmp_path, kind):
    place = {"folder": archive, "parent": archive.parent, "archive": tmp_path / "cifar-10-python.tar.gz"}[kind]
    if kind == "archive":
        with tarfile.open(place, "w:gz") as tar:
            tar.add(archive, archive.name)
    found = data.open_data(f"cifar10:{place}")
    assert torch.equal(found.train.images, data.open_data(f"cifar10:{archive}").train.images)
    assert not any(path.name != place.name for path in tmp_path.iterdir()), "nothing is extracted"


def test_cifar100_has_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 1000), ("test", 100)):
        content = batch(count, 0, "fine_labels", 100) | {"coarse_labels": [i % 20 for i in range(count)]}
        (folder / name).write_bytes(as_python2(content))
    (folder / "meta").write_bytes(
        as_python2({"fine_label_names": [str(i) for i in range(100)], "coarse_label_names": []})
    )
    splits = data.open_data(f"cifar100:{tmp_path}")
    assert (splits.num_classes, len(splits.train), len(splits.val), len(splits.test)) == (100, 900, 100, 100)
    assert splits.mean == (0.5071, 0.4867, 0.4408)
    with pytest.raises(ValueError, match="needs the folder cifar-10-batches-py of the official python archive"):
        data.open_data(f"cifar10:{tmp_path}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": np.zeros((3, 3072), np.uint8)}, "must have 3 whole numbers as labels; got NoneType"),
        ({"labels": [0]}, r"must have data of uint8 \[N, 3072\]; got NoneType"),
        ({"labels": [0], "data": np.zeros((1, 3071), np.uint8)}, r"got uint8 \[1, 3071\]"),
        ({"labels": [], "data": np.zeros((0, 3072), np.uint8)}, r"got uint8 \[0, 3072\]"),
        ({"labels": [0], "data": np.zeros((1, 3072), np.int16)}, r"got int16 \[1, 3072\]"),
        ({"labels": [0, 1], "data": np.zeros((3, 3072), np.uint8)}, "3 whole numbers as labels; got 2"),
        ({"labels": [0, "1"], "data": np.zeros((2, 3072), np.uint8)}, "2 whole numbers as labels"),
        ({"labels": [0, 10], "data": np.zeros((2, 3072), np.uint8)}, r"must be in \[0, 10\); got 10"),
        ({"labels": [0, -1], "data": np.zeros((2, 3072), np.uint8)}, r"must be in \[0, 10\); got -1"),
        ([1, 2], "must hold a dict; got list"),
    ],
)
def test_files_that_are_plain_and_no_cifar(copy, content, message):
    (copy / "data_batch_3").write_bytes(as_python2(content))
    with pytest.raises(ValueError, match=f"open_data: .*{message}") as caught:
        data.open_data(f"cifar10:{copy}")
    assert "data_batch_3" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_places(copy, tmp_path):
    (copy / "data_batch_4").unlink()
    with pytest.raises(ValueError, match=r"needs a file; there is none at .*data_batch_4"):
        data.open_data(f"cifar10:{copy}")
    with pytest.raises(ValueError, match=r"needs the folder cifar-10-batches-py .*nowhere is neither"):
        data.open_data(f"cifar10:{tmp_path / 'nowhere'}")
    (tmp_path / "foreign.tar.gz").write_text("hello")
    with pytest.raises(ValueError, match=r"is not a .tar.gz file that can be read"):
        data.open_data(f"cifar10:{tmp_path / 'foreign.tar.gz'}")
    (copy / "data_batch_4").write_bytes(as_python2(batch(20, 4)))
    (copy / "batches.meta").write_bytes(as_python2({"label_names": NAMES[:9]}))
    with pytest.raises(ValueError, match=r"batches.meta must name 10 classes as label_names; it names 9"):
        data.open_data(f"cifar10:{copy}")


TOUCH = "touch pwned"
HOSTILE = {
    "GLOBAL and REDUCE": b"cos\nsystem\n" + text(TOUCH) + b"\x85R.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch pwned\x85R.",
    "nested in a dict": b"}" + text("data") + b"cposix\nsystem\n" + text(TOUCH) + b"\x85Rs.",
    "eval": b"cbuiltins\neval\n" + text("open('pwned', 'w')") + b"\x85R.",
    "INST": b"(" + text(TOUCH) + b"ios\nsystem\n.",
    "OBJ": b"(cos\nsystem\n" + text(TOUCH) + b"o.",
    "NEWOBJ": b"cos\n_wrap_close\n)\x81.",
    "EXT": b"\x82\x01.",
    "PERSID": b"Ppwned\n.",
    "BINPERSID": text("pwned") + b"Q.",
    "call of text": text("system") + text(TOUCH) + b"\x85R.",
    "call of an array": python2(np.zeros(1, "u1")) + b"K\x01\x85R.",
    "another codec": b"c_codecs\nencode\n" + text("x") + text("rot13") + b"\x86R.",
    "numpy's own functions": b"cnumpy\nfromfile\n" + text("/etc/passwd") + b"\x85R.",
    "numpy's loader": b"cnumpy\nload\n" + text("/etc/passwd") + b"\x85R.",
    "reconstruct of a class": b"cnumpy.core.multiarray\n_reconstruct\ncos\n_wrap_close\nK\x00\x85U\x01b\x87R.",
    "reconstruct of text": b"cnumpy.core.multiarray\n_reconstruct\n" + text("x") + b"K\x00\x85U\x01b\x87R.",
    "object dtype": b"cnumpy\ndtype\n" + text("O8") + b"K\x00K\x01\x87R.",
    "structured dtype": b"cnumpy\ndtype\n" + text("u1,O") + b"K\x00K\x01\x87R.",
    "huge dtype": b"cnumpy\ndtype\n" + text("V999999999") + b"K\x00K\x01\x87R.",
    "BUILD of a dict": b"}}" + text("__class__") + text("x") + b"sb.",
    "BUILD of a name": b"cnumpy\ndtype\n}" + text("what") + text("x") + b"sb.",
    "a name left over": b"cnumpy\ndtype\n.",
    "an array left empty": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R.",
    "numbers as keys": b"}K\x01K\x02s.",
    "a list as key": b"}]K\x02s.",
    "append to a tuple": b")K\x01a.",
    "item of a list": b"]" + text("a") + text("b") + b"s.",
    "stack underflow": b"R.",
    "no mark": b"e.",
    "memo of nothing": b"h\x05.",
    "no STOP": b"K\x01",
    "nothing": b"",
    "no pickle": b"hello",
    "a number of many digits": b"I" + b"9" * 5000 + b"\n.",
    "deep nesting": b"]" * 100_000 + b"a" * 99_999 + b".",
    "set": b"\x8f.",
    "bytearray": b"\x96" + struct.pack("<Q", 1 << 60) + b".",
    "longer than the file": b"T" + struct.pack("<i", 1 << 30) + b"abc.",
    "negative length": b"T" + struct.pack("<i", -5) + b"abc.",
}  # fmt: skip


@pytest.mark.parametrize("kind", [name for name in HOSTILE if name != "deep nesting"])
def test_hostile_pickles_are_refused_and_nothing_runs(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_plain(HOSTILE[kind])
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_plain(b"\x80\x02" + HOSTILE[kind])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_cifar_files_end_with_one_line(copy, kind, monkeypatch):
    monkeypatch.chdir(copy)
    (copy / "test_batch").write_bytes(HOSTILE[kind] or b" ")
    with pytest.raises(ValueError, match=r"^open_data: .*test_batch[^\n]*\.$"):
        data.open_data(f"cifar10:{copy}")
    assert not (copy / "pwned").exists()


def test_the_hostile_pickle_would_have_run():
    """The falsifier: Python's own machine looks the function up and calls it, here with a list in its place."""
    called = []

    class Recording(pickle.Unpickler):
        def find_class(self, module, name):
            return lambda *arguments: called.append((module, name, *arguments))

    Recording(io.BytesIO(HOSTILE["GLOBAL and REDUCE"])).load()
    assert called == [("os", "system", TOUCH)]


def test_object_arrays_and_sizes_that_do_not_fit():
    for array in (
        np.array([{}], object),
        np.array(["a"]),
        np.zeros(1, "u1,u2"),
        np.zeros(1, "c8"),
        np.zeros(1, "M8[s]"),
    ):
        with pytest.raises(ValueError, match=r"plain data does not need|instruction|other than numbers"):
            read_plain(pickle.dumps(array, 2))
    good = python2(np.zeros((2, 3), "u1"))
    assert read_plain(good + b".").shape == (2, 3)
    for shape in (((1 << 30), 1 << 30), (2, 4), (0, 1), (-2, -3), (1,) * 9):
        written = b"".join(pickle.dumps(size, 2)[2:-1] for size in shape)
        wrong = good.replace(b"(J\x02\x00\x00\x00J\x03\x00\x00\x00t", b"(" + written + b"t")
        assert wrong != good
        with pytest.raises(ValueError, match=r"array of (impossible )?shape"):
            read_plain(wrong + b".")


def test_bombs_cost_neither_memory_nor_time():
    long = text("x" * 1_000_000) + b"q\x00"
    encode = b"c_codecs\nencode\nq\x01"
    copies = long + encode + b"]" + (b"h\x01h\x00U\x06latin1\x86Ra" * 1000) + b"."
    level = b"".join(b"](" + (b"h" + bytes([i])) * 10 + b"eq" + bytes([i + 1]) for i in range(60))
    laughs = b"]q\x00" + level + b"."
    endless = b"]" + b"N" * (restricted.MAX_STEPS + 5) + b"."
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(ValueError, match="it repeats its data"):
        read_plain(copies)
    read_plain(laughs)  # the lists share their items: little memory, whatever they would print as
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    with pytest.raises(ValueError, match="takes more than 2,000,000 steps"):
        read_plain(endless)
    assert time.perf_counter() - began < 60


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_files_are_read_or_refused_and_nothing_else(case):
    whole = as_python2({"data": np.arange(4, dtype="u1"), "labels": [1, 2], "names": ["a", "b" * 300]})
    at = case.draw(st.integers(0, len(whole) - 1))
    damaged = case.draw(
        st.one_of(
            st.just(whole[:at]),
            st.binary(min_size=1, max_size=4).map(lambda new: whole[:at] + new + whole[at + len(new) :]),
        )
    )
    with contextlib.suppress(ValueError):
        read_plain(damaged)
    assert read_plain(whole)["labels"] == [1, 2]


def write_tar(path, *members):
    with gzip.open(path, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_hostile_archives(copy, tmp_path, monkeypatch):
    contents = [(f"../../{path.name}", path.read_bytes()) for path in sorted(copy.iterdir())]
    place = write_tar(tmp_path / "a.tar.gz", *((tarfile.TarInfo(name), content) for name, content in contents))
    before = sorted(tmp_path.rglob("*"))
    assert len(data.open_data(f"cifar10:{place}").test) == 20  # read by their last names; written nowhere
    assert sorted(tmp_path.rglob("*")) == before

    link = tarfile.TarInfo("test_batch")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    others = [(tarfile.TarInfo(name), content) for name, content in contents if "test_batch" not in name]
    place = write_tar(tmp_path / "b.tar.gz", *others, (link, b""))
    with pytest.raises(ValueError, match="must be the official python archive; it has no test_batch"):
        data.open_data(f"cifar10:{place}")

    whole = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "c.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"is not a .tar.gz file that can be read"):
        data.open_data(f"cifar10:{tmp_path / 'c.tar.gz'}")

    monkeypatch.setattr(cifar, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ValueError, match="bytes as data_batch_1; that is no CIFAR file"):
        data.open_data(f"cifar10:{tmp_path / 'a.tar.gz'}")
    monkeypatch.undo()
    bomb = write_tar(tmp_path / "d.tar.gz", (tarfile.TarInfo("zeros"), bytes(3_000_000)))
    monkeypatch.setattr(cifar, "MAX_ARCHIVE_BYTES", 1_000_000)
    assert bomb.stat().st_size < 10_000
    with pytest.raises(ValueError, match="the archive holds more than 1000000 bytes"):
        data.open_data(f"cifar10:{bomb}")


def test_options_that_do_not_apply(archive):
    with pytest.raises(ValueError, match="open_data: cifar10 takes no size; leave it out"):
        data.open_data(f"cifar10:{archive}", size=64)
    with pytest.raises(ValueError, match=r"must be one of digits, .*got 'cifar10'. Did you mean 'cifar10:DIR'"):
        data.open_data("cifar10")
    assert data.open_data(f"cifar10:{archive}", channels=1).shape == (1, 32, 32)
    some = data.open_data(f"cifar10:{archive}", images=110)
    assert [len(part) for part in (some.train, some.val, some.test)] == [90, 10, 10]
    assert np.bincount(some.train.labels).tolist() == [9] * 10
