"""Folders of images and .npz files: what is opened, how it is cut into parts, and what is refused."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyprune import data
from pyprune.datasets import images, npz
from pyprune.datasets.images import EncodedImages, ImageArrays


def encoded(pixels, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int, height=10, width=14) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_folder(root, classes=("cat", "dog", "owl"), count=10, offset=0):
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(encoded(picture(offset + 100 * c + i)))
    return root


def restored(part, splits):
    """Undo the normalisation of a whole part: [N, C, H, W] uint8."""
    pixels, _ = part.batch(range(len(part)))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (splits.mean, splits.std))
    return ((pixels * std + mean) * 255).round().byte()


def test_a_folder_is_split_by_class_and_decoded_when_read(tmp_path):
    splits = data.open_data(f"folder:{write_folder(tmp_path / 'pets')}", size=10)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (24, 3, 3)
    assert splits.classes == ("cat", "dog", "owl")
    assert (splits.name, splits.shape, splits.normalise, splits.augment) == (
        "folder:pets", (3, 10, 10), "imagenet", True)  # fmt: skip
    assert all(np.bincount(part.labels).tolist() == [n] * 3 for part, n in ((splits.train, 8), (splits.val, 1)))
    for part in (splits.train, splits.val, splits.test):
        for row, pixels in zip(part.rows, restored(part, splits), strict=True):
            c, i = divmod(int(row), 10)
            assert np.array_equal(pixels.permute(1, 2, 0), picture(100 * c + i)[:, 2:12]), "the centre, not resized"
    assert sorted(row for part in (splits.train, splits.val, splits.test) for row in part.rows) == list(range(30))
    image, label = splits.test[0]
    assert (image.shape, image.dtype, label) == ((3, 10, 10), torch.float32, int(splits.test.labels[0]))


def test_the_short_side_is_resized_before_the_centre_is_cut_out(tmp_path):
    gradient = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None] * 6, (20, 40, 3))
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.fromarray(np.ascontiguousarray(gradient)).save(tmp_path / name / f"{i}.png")
    splits = data.open_data(f"folder:{tmp_path}", size=5)
    found = restored(splits.test, splits)[0, 0]
    centre = gradient[:, 10:30, 0].astype(float)
    assert found[2, 2] == pytest.approx(centre.mean(), abs=2)
    assert found[2, 0] == pytest.approx(centre[:, :4].mean(), abs=4)
    assert found[2, 4] == pytest.approx(centre[:, -4:].mean(), abs=4)


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        (("train", "val", "test"), (30, 9, 6)),
        (("train", "test"), (27, 3, 6)),
        (("train", "valid"), (27, 3, 9)),
        (("train",), (24, 3, 3)),
    ],
)
def test_folders_that_name_the_parts(tmp_path, parts, sizes):
    counts = {"train": 10, "val": 3, "valid": 3, "test": 2}
    for k, part in enumerate(parts):
        write_folder(tmp_path / part, count=counts[part], offset=1000 * k)
    splits = data.open_data(f"folder:{tmp_path}", size=8)
    assert (len(splits.train), len(splits.val), len(splits.test)) == sizes
    assert splits.classes == ("cat", "dog", "owl")
    seen = [
        {splits_part.sources[row] for row in splits_part.rows}
        for splits_part in (splits.train, splits.val, splits.test)
    ]
    assert len(set.union(*seen)) == sum(sizes)


def test_train_may_be_a_class(tmp_path):
    splits = data.open_data(f"folder:{write_folder(tmp_path, ('car', 'test', 'train'))}", size=8)
    assert splits.classes == ("car", "test", "train")


def test_grey_colour_palette_and_transparency_become_what_was_asked_for(tmp_path):
    root = write_folder(tmp_path, count=10)
    rng = np.random.default_rng(0)
    (root / "cat" / "grey.png").write_bytes(encoded(rng.integers(0, 256, (9, 9), np.uint8)))
    (root / "cat" / "alpha.png").write_bytes(encoded(rng.integers(0, 256, (9, 9, 4), np.uint8)))
    Image.fromarray(picture(0)).convert("P").save(root / "cat" / "palette.gif", transparency=3)
    Image.fromarray(picture(0)).save(root / "dog" / "lossy.jpg")
    for channels in (1, 3):
        splits = data.open_data(f"folder:{root}", size=8, channels=channels)
        pixels, labels = next(iter(data.loader(splits.train, 64, workers=0)))
        assert pixels.shape == (len(splits.train), channels, 8, 8)
        assert len(labels) == len(splits.train)
    assert splits.mean == (0.485, 0.456, 0.406)
    assert data.open_data(f"folder:{root}", size=8, channels=1).mean == (0.449,)


def test_hidden_files_other_files_and_loops_are_ignored(tmp_path):
    root = write_folder(tmp_path / "root", count=10)
    (root / ".git").mkdir()
    (root / "cat" / ".hidden.png").write_bytes(b"x")
    (root / "cat" / "notes.txt").write_text("x")
    (root / "cat" / ".cache").mkdir()
    (root / "cat" / ".cache" / "thumb.png").write_bytes(b"x")
    (root / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "cat" / "deeper").mkdir()
    (root / "cat" / "deeper" / "11.PNG").write_bytes(encoded(picture(5)))
    (root / "loop").symlink_to(root)
    (root / "up").symlink_to(tmp_path)
    (root / "dog" / "loop").symlink_to(root / "dog")
    splits = data.open_data(f"folder:{root}", size=8)
    assert splits.classes == ("cat", "dog", "owl")
    assert len(splits.train) + len(splits.val) + len(splits.test) == 31


def test_unusable_folders(tmp_path):
    with pytest.raises(ValueError, match=r"open_data: needs a folder of images; .*nowhere is none"):
        data.open_data(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match=r"needs one sub-folder a class, at least two.* has none"):
        data.open_data(f"folder:{tmp_path}")
    root = write_folder(tmp_path / "root", count=10)
    (root / "zebra").mkdir()
    with pytest.raises(ValueError, match=r"every class needs an image; .*zebra has none that ends in \.jpg"):
        data.open_data(f"folder:{root}")
    (root / "zebra").rmdir()
    with pytest.raises(ValueError, match="size must be at least 1 and channels 1 or 3; got 0 and 3"):
        data.open_data(f"folder:{root}", size=0)
    parts = tmp_path / "parts"
    write_folder(parts / "train", count=10)
    write_folder(parts / "test", ("cat", "emu"), count=2)
    with pytest.raises(ValueError, match=r"test has a class 'emu' that the training images have not"):
        data.open_data(f"folder:{parts}")
    few = write_folder(tmp_path / "few", count=1)
    with pytest.raises(ValueError, match="3 training images are too few to set some aside"):
        data.open_data(f"folder:{few}")


def bomb(width, height) -> bytes:
    """A PNG of a few bytes that claims to be huge."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there is none at .*bad.png"),
        (b"hello", "bad.png is not an image that can be read"),
        (encoded(picture(0))[:200], "cannot decode .*bad.png"),
        (bomb(9000, 9000), "may have 64,000,000 pixels; .*bad.png claims more"),
        (bomb(60000, 60000), "may have 64,000,000 pixels; .*bad.png claims more"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "bad.png is not an image that can be read"),
        (encoded(np.zeros((4, 4), np.uint16)), "8 bits a channel; .*bad.png is of mode 'I;16'"),
    ],
)
def test_broken_images_are_named(tmp_path, content, message):
    root = write_folder(tmp_path, count=10)
    splits = data.open_data(f"folder:{root}", size=8)
    victim = Path(splits.test.sources[splits.test.rows[1]])
    victim.write_bytes(content) if content else victim.unlink()
    message = message.replace("bad.png", victim.name)
    with pytest.raises(ValueError, match=f"^open_data: .*{message}[^\\n]*$"):
        list(data.loader(splits.test, workers=0))
    assert len(list(data.loader(splits.val, workers=0))) == 1


@pytest.mark.slow  # torch waits five seconds for a worker that failed
def test_a_worker_names_the_broken_image_in_one_line(tmp_path):
    splits = data.open_data(f"folder:{write_folder(tmp_path, count=10)}", size=8)
    victim = Path(splits.test.sources[splits.test.rows[1]])
    victim.write_bytes(b"hello")
    with pytest.raises(ValueError, match=f"^open_data: .*{victim.name} is not an image[^\\n]*$"):
        list(data.loader(splits.test, workers=1))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_workers_may_be_started_in_any_way(tmp_path, start):
    splits = data.open_data(f"folder:{write_folder(tmp_path, count=10)}", size=8)
    loader = data.loader(splits.train, 8, shuffle=True, augment=True, workers=1)
    expected = list(data.loader(splits.train, 8, shuffle=True, augment=True, workers=0))
    loader.multiprocessing_context = start
    for (x, y), (a, b) in zip(loader, expected, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


def test_augmentation_of_files_is_seeded_and_only_where_asked_for(tmp_path):
    splits = data.open_data(f"folder:{write_folder(tmp_path)}", size=8)

    def passes(**options):
        loader = data.loader(splits.train, 8, shuffle=True, seed=3, **options)
        return [torch.cat([x for x, _ in loader]) for _ in range(2)]

    one, two = passes(augment=True, workers=0)
    assert not torch.equal(one, two)
    again = passes(augment=True, workers=2)
    assert torch.equal(one, again[0])
    assert torch.equal(two, again[1])
    plain, _ = passes(workers=0)
    assert not torch.equal(plain, one)
    assert set(restored(splits.train, splits).flatten().tolist()) <= set(range(256))


def arrays(count=40, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    return {"images": rng.integers(0, 256, (count, 8, 8, 3), np.uint8), "labels": np.arange(count) % classes}


def save(path, **content):
    np.savez(path, **content)
    return path


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW", "floats", "int64", "column of labels"])
def test_arrays_in_every_layout(tmp_path, layout):
    given = arrays()
    pixels = given["images"]
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    if layout == "NCHW":
        given["images"] = pixels.transpose(0, 3, 1, 2)
    if layout == "NHW":
        given["images"], expected = pixels[..., 0], expected[:, :1]
    if layout == "floats":
        given["images"] = (pixels / 255).astype(np.float64)
    if layout == "int64":
        given["images"] = pixels.astype(np.int64)
    if layout == "column of labels":
        given["labels"] = given["labels"][:, None].astype(np.uint8)
    splits = data.open_data(f"npz:{save(tmp_path / 'a.npz', **given)}")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (32, 4, 4)
    assert (splits.classes, splits.normalise, splits.augment) == (("0", "1", "2", "3"), "data", False)
    for part in (splits.train, splits.val, splits.test):
        assert torch.equal(restored(part, splits), expected[part.rows])
        assert part.labels.tolist() == (part.rows % 4).tolist()
    x, _ = splits.train.batch(range(32))
    assert x.mean((0, 2, 3)).abs().max() < 1e-5, "statistics of the training images"
    assert (x.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-5
    assert splits.test.batch(range(4))[0].mean().abs() > 1e-4


def test_parts_by_key_by_split_and_by_file(tmp_path):
    train, test = arrays(40, seed=1), arrays(12, seed=2)
    keyed = {f"{a}_{part}": one[key] for part, one in (("train", train), ("test", test))
             for a, key in (("x", "images"), ("y", "labels"))}  # fmt: skip
    joined = {key: np.concatenate([train[key], test[key]]) for key in train}
    marked = {**joined, "split": np.repeat([0, 1], [40, 12])}
    names = {"class_names": np.array(["a", "b", "c", "d"])}
    opened = [
        data.open_data(f"npz:{save(tmp_path / 'keyed.npz', **keyed, **names)}"),
        data.open_data(f"npz:{save(tmp_path / 'marked.npz', **marked, **names)}"),
        data.open_data(f"npz:{save(tmp_path / 'a.npz', **train, **names)},{save(tmp_path / 'b.npz', **test)}"),
    ]
    for splits in opened:
        assert (len(splits.train), len(splits.val), len(splits.test)) == (36, 4, 12)
        assert splits.classes == ("a", "b", "c", "d")
        assert torch.equal(restored(splits.test, splits), torch.from_numpy(test["images"]).permute(0, 3, 1, 2))
        assert torch.equal(restored(splits.val, splits), restored(opened[0].val, opened[0]))
    marked["split"][:5] = 2
    assert len(data.open_data(f"npz:{save(tmp_path / 'three.npz', **marked)}").val) == 5


def test_images_of_a_patient_stay_together(tmp_path):
    given = arrays(60, 2)
    patients = np.array([f"p{i // 3}" for i in range(60)])
    given["labels"] = np.arange(60) // 3 % 2
    splits = data.open_data(f"npz:{save(tmp_path / 'a.npz', **given, patients=patients)}")
    parts = [set(patients[part.rows]) for part in (splits.train, splits.val, splits.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20
    assert all(len(part) % 3 == 0 for part in (splits.train, splits.val, splits.test))
    plain = data.open_data(f"npz:{save(tmp_path / 'b.npz', **given)}")
    parts = [set(patients[part.rows]) for part in (plain.train, plain.val, plain.test)]
    assert sum(map(len, parts)) > 20, "without patients they would be torn apart"


def jpeg_arrays(count=30, side=8):
    files = [encoded(picture(i, side, side), "JPEG", quality=90) for i in range(count)]
    ends = np.cumsum([0, *map(len, files)])
    content = np.frombuffer(b"".join(files), np.uint8)
    return files, {"jpeg": content, "offsets": ends, "labels": (np.arange(count) % 3).astype(np.uint8)}


@pytest.mark.parametrize("kept", [npz.IN_MEMORY_BYTES, 0])
def test_encoded_images_are_what_pillow_makes_of_them(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(npz, "IN_MEMORY_BYTES", kept)
    files, given = jpeg_arrays()
    splits = data.open_data(f"npz:{save(tmp_path / 'a.npz', **given)}")
    assert type(splits.train) is (ImageArrays if kept else EncodedImages)
    for part in (splits.train, splits.val, splits.test):
        for row, pixels in zip(part.rows, restored(part, splits), strict=True):
            expected = np.array(Image.open(io.BytesIO(files[row])).convert("RGB"))
            assert np.array_equal(pixels.permute(1, 2, 0), expected)
    grey = data.open_data(f"npz:{tmp_path / 'a.npz'}", channels=1, size=4)
    assert grey.shape == (1, 4, 4)


def written(path, name, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


def npy(shape, dtype="|u1", payload=b"") -> bytes:
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + payload


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere.npz", "needs a file; there is none"),
        (lambda p: (p / "a.npz").write_bytes(b"hello") and p / "a.npz", "is not an .npz file that can be read"),
        (lambda p: save(p / "a.npz", other=np.zeros(3)), "must hold images and labels, x_train and y_train, or jpeg"),
        (lambda p: save(p / "a.npz", images=arrays()["images"]), "has no 'labels'; it has images"),
        (lambda p: save(p / "a.npz", images=np.array([Evil()], object)), "'images' .*is of object"),
        (lambda p: save(p / "a.npz", images=np.zeros(3, "u1,u2")), "arrays must hold numbers or text"),
        (lambda p: written(p / "a.npz", "images.npy", npy((1 << 20, 1 << 20))), r"claims shape \[1048576, 1048576\]"),
        (lambda p: written(p / "a.npz", "images.npy", npy((4,), payload=b"abc")), r"claims shape \[4\] of uint8"),
        (lambda p: written(p / "a.npz", "images.npy", npy((-4,), payload=b"")), r"claims shape \[-4\]"),
        (lambda p: written(p / "a.npz", "images.npy", b"garbage" * 9), "is not an .npz file that can be read"),
        (lambda p: written(p / "a.npz", "images.npy", npy("(__import__('os'),)")), "is not an .npz file that"),
        (
            lambda p: save(p / "a.npz", images=np.zeros((4, 8, 8), "u1"), labels=[0, 1, 2]),
            "each of 4 images; got 3 lab",
        ),
        (lambda p: save(p / "a.npz", images=np.zeros((3, 8, 8), "u1"), labels=[0, 1, -2]), "got the label -2"),
        (lambda p: save(p / "a.npz", images=np.zeros((3, 8, 8), "u1"), labels=[0.5] * 3), "whole numbers; got float64"),
        (lambda p: save(p / "a.npz", images=np.zeros((3, 8, 8, 5), "u1"), labels=[0] * 3), r"got \[3, 8, 8, 5\]"),
        (lambda p: save(p / "a.npz", images=np.zeros((3, 3, 3, 3), "u1"), labels=[0] * 3), r"got \[3, 3, 3, 3\]"),
        (lambda p: save(p / "a.npz", images=np.full((3, 8, 8), 256), labels=[0] * 3), "must be in 0 ... 255"),
        (lambda p: save(p / "a.npz", images=np.full((3, 8, 8), np.nan), labels=[0] * 3), "finite; it holds NaN"),
        (lambda p: save(p / "a.npz", **arrays(), split=np.zeros(3)), r"one entry in split for each of 40 images"),
        (lambda p: save(p / "a.npz", **arrays(), split=np.full(40, 7)), r"must be 0 \(train\), 1 \(test\) or 2"),
        (lambda p: save(p / "a.npz", **arrays(), classes=np.array(["a"])), "must name 4 classes"),
        (lambda p: save(p / "a.npz", **{**arrays(), "labels": np.arange(40) * 9999}), "reach 389961; name the"),
        (lambda p: save(p / "a.npz", **{**jpeg_arrays()[1], "offsets": np.arange(31)[::-1]}), "offsets .*must ascend"),
        (
            lambda p: save(p / "a.npz", **{**jpeg_arrays()[1], "jpeg": np.zeros(99, "u1")}),
            "offsets .*within the 99 byt",
        ),
        (lambda p: save(p / "a.npz", jpeg=np.zeros(9, "u1"), offsets=[0, 9], labels=[0]), "image 0 of .*not an image"),
        (lambda p: save(p / "a.npz", **{**arrays(), "images": np.zeros((40, 8, 8), "u1")}), "needs channels that vary"),
    ],
)
def test_unusable_npz_files(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match=f"^open_data: .*{message}[^\\n]*$"):
        data.open_data(f"npz:{make(tmp_path)}")
    assert not (tmp_path / "pwned").exists()


def test_a_truncated_file_and_a_doubled_name(tmp_path):
    path = save(tmp_path / "a.npz", **arrays())
    whole = path.read_bytes()
    for end in (len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"is not an .npz file that can be read"):
            data.open_data(f"npz:{path}")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"can be read \(Bad CRC-32"):
        data.open_data(f"npz:{path}")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", npy((0,)))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("images.npy", npy((0,)))
    with pytest.raises(ValueError, match="it holds a name twice"):
        data.open_data(f"npz:{path}")


def test_what_claims_more_than_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=np.zeros((400, 64, 64), np.uint8), labels=np.arange(400) % 2)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(npz, "MAX_BYTES", 1_000_000)
    with pytest.raises(ValueError, match="claims more than 1000000 bytes of arrays"):
        data.open_data(f"npz:{path}")


@pytest.mark.parametrize(
    ("normalise", "name", "mean"),
    [
        ("imagenet", "imagenet", (0.485, 0.456, 0.406)),
        ("cifar", "cifar", (0.4914, 0.4822, 0.4465)),
        ("0.1,0.2,0.3/1,2,3", "given", (0.1, 0.2, 0.3)),
        (((0.1, 0.2, 0.3), (1, 2, 3)), "given", (0.1, 0.2, 0.3)),
    ],
)
def test_normalisations(tmp_path, normalise, name, mean):
    path = save(tmp_path / "a.npz", **arrays())
    splits = data.open_data(f"npz:{path}", normalise=normalise)
    assert (splits.normalise, splits.mean) == (name, mean)
    assert torch.equal(
        restored(splits.test, splits), torch.from_numpy(arrays()["images"]).permute(0, 3, 1, 2)[splits.test.rows]
    )
    floats = {**arrays(), "images": (arrays()["images"] / 255).astype(np.float32)}
    same = data.open_data(f"npz:{save(tmp_path / 'b.npz', **floats)}", normalise=normalise)
    torch.testing.assert_close(same.test[0][0], splits.test[0][0])


@pytest.mark.parametrize(
    ("normalise", "message"),
    [
        ("imagent", "must be one of imagenet, cifar, data, or means and deviations as .*; got 'imagent'"),
        ("1,2/3", "needs 3 means and 3 positive deviations"),
        ("1,2,3/1,2,0", "needs 3 means and 3 positive deviations"),
        ("1,2,nan/1,2,3", "needs 3 means and 3 positive deviations"),
    ],
)
def test_normalisations_that_cannot_be(tmp_path, normalise, message):
    path = save(tmp_path / "a.npz", **arrays())
    with pytest.raises(ValueError, match=message):
        data.open_data(f"npz:{path}", normalise=normalise)


def test_named_constants_need_images_between_black_and_white(tmp_path):
    path = save(tmp_path / "a.npz", **{**arrays(), "images": arrays()["images"].astype(np.float32)})
    with pytest.raises(ValueError, match=r"needs images in \[0, 1\]; pass normalise=\"data\""):
        data.open_data(f"npz:{path}", normalise="imagenet")
    assert data.open_data(f"npz:{path}").mean[0] > 100


def test_options_of_arrays(tmp_path):
    path = save(tmp_path / "a.npz", **arrays())
    assert data.open_data(f"npz:{path}", channels=1).shape == (1, 8, 8)
    grey = save(tmp_path / "b.npz", **{**arrays(), "images": arrays()["images"][..., 0]})
    assert data.open_data(f"npz:{grey}", channels=3).shape == (3, 8, 8)
    weights = np.array([0.299, 0.587, 0.114])
    splits = data.open_data(f"npz:{path}", channels=1)
    expected = np.round(arrays()["images"][splits.test.rows] @ weights)
    assert np.abs(restored(splits.test, splits)[:, 0].numpy() - expected).max() <= 1
    with pytest.raises(ValueError, match="size is for encoded images"):
        data.open_data(f"npz:{path}", size=16)
    with pytest.raises(ValueError, match="size must be at least 1 and channels 1 or 3; got None and 2"):
        data.open_data(f"npz:{path}", channels=2)
    with pytest.raises(ValueError, match="npz takes one file, or two as TRAIN,TEST; got 3"):
        data.open_data(f"npz:{path},{path},{path}")


def test_a_random_part_lies_in_the_image():
    draws = torch.rand(200, 5, generator=torch.Generator().manual_seed(0)).tolist()
    for draw in draws:
        left, top, right, bottom = images._random_part((30, 20), draw)
        assert 0 <= left < right <= 30 + 1e-9
        assert 0 <= top < bottom <= 20 + 1e-9
        assert (right - left) * (bottom - top) <= 600 + 1e-6
