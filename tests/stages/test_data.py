import io
import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

import pyprune as pp
from pyprune import data
from pyprune.datasets import npz
from pyprune.datasets.images import PADDING, EncodedImages, ImageArrays, crop_and_flip
from pyprune.datasets.parts import drawn


class Numbers(Dataset):
    """Items (i, i % 3), with labels only in the items."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i >= self.count:
            raise IndexError
        return i, i % 3


def order(batches):
    return [int(x) for images, _ in batches for x in images]


def test_digits_are_all_there_once_in_three_stratified_parts():
    splits = data.digits()
    sizes = [len(part) for part in (splits.train, splits.val, splits.test)]
    assert sum(sizes) == 1797
    assert sizes == pytest.approx([1200, 297, 300], abs=5)  # half an image for each of ten classes
    assert splits.classes == tuple("0123456789")
    assert (splits.num_classes, splits.channels, splits.shape) == (10, 1, (1, 16, 16))
    seen = torch.cat([part.tensors[1] for part in (splits.train, splits.val, splits.test)])
    assert torch.bincount(seen).tolist() == np.bincount(load_digits().target).tolist()
    for part, share in ((splits.train, 1200 / 1797), (splits.test, 300 / 1797)):
        counts = torch.bincount(part.tensors[1]).double()
        assert counts == pytest.approx(torch.bincount(seen).double() * share, abs=1)


def test_digits_parts_share_no_image():
    images = [
        {image.numpy().tobytes() for image in part.tensors[0]} for part in vars(data.digits(size=8)).values()
        if isinstance(part, TensorDataset)
    ]  # fmt: skip
    distinct = len({image.tobytes() for image in load_digits().images})
    assert len(images) == 3
    assert len(set.union(*images)) == sum(map(len, images)) == distinct


def test_digits_are_normalised_with_training_statistics_and_can_be_undone():
    splits = data.digits(size=8)
    train = splits.train.tensors[0].double()
    assert float(train.mean()) == pytest.approx(0, abs=1e-6)
    assert float(train.std()) == pytest.approx(1, abs=1e-6)
    grey = (splits.test.tensors[0] * splits.std[0] + splits.mean[0]) * 16
    raw = {image.astype(np.float32).tobytes() for image in load_digits().images}
    assert all(image[0].round().numpy().tobytes() in raw for image in grey)
    assert float(splits.test.tensors[0].double().mean()) != pytest.approx(0, abs=1e-6)  # its own were not used


def test_digits_depend_on_the_seed_alone():
    first, again, other = data.digits(seed=1), data.digits(seed=1), data.digits(seed=2)
    assert torch.equal(first.val.tensors[0], again.val.tensors[0])
    assert not torch.equal(first.val.tensors[1], other.val.tensors[1][: len(first.val)])


def test_open_data_knows_digits_and_says_what_else():
    assert len(data.open_data("digits", seed=3).train) == len(data.digits(seed=3).train)
    with pytest.raises(ValueError, match=r"open_data: the data must be one of digits, cifar10:DIR, .*; got 'mnist'"):
        data.open_data("mnist")
    with pytest.raises(ValueError, match="digits: size must be at least 1; got 0"):
        data.digits(size=0)


def test_loader_repeats_its_orders_for_a_seed():
    def two_passes(seed):
        loader = data.loader(Numbers(50), 8, shuffle=True, seed=seed)
        return order(loader), order(loader)

    first, second = two_passes(0)
    assert (first, second) == two_passes(0)
    assert first != second
    assert sorted(first) == sorted(second)
    assert first != two_passes(1)[0]


@pytest.mark.parametrize(("count", "seen"), [(17, 16), (18, 18), (16, 16), (1, 1)])
def test_loader_leaves_out_a_lonely_last_image_only_when_training(count, seen):
    assert len(order(data.loader(Numbers(count), 8, shuffle=True))) == seen
    assert order(data.loader(Numbers(count), 8)) == list(range(count))


def test_loader_leaves_the_global_random_state_alone():
    torch.manual_seed(5)
    order(data.loader(Numbers(20), 8, shuffle=True))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_split_holds_every_item_once_and_every_class_in_proportion(labels, weights, seed):
    fractions = [weight / sum(weights) for weight in weights]
    parts = data.split(TensorDataset(torch.arange(len(labels))), fractions, seed, labels)
    indices = [list(part.indices) for part in parts]
    assert sorted(i for part in indices for i in part) == list(range(len(labels)))
    assert all(part == sorted(part) for part in indices)
    for label in set(labels):
        for part, share in zip(indices, fractions, strict=True):
            assert abs(sum(labels[i] == label for i in part) - share * labels.count(label)) <= 1


def memory(count=50, channels=3, side=8, seed=0):
    """Images in memory with their labels i % 5."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    return ImageArrays(pixels, np.arange(count) % 5).normalised(((0.4,) * channels, (0.2,) * channels))


def test_images_in_memory_are_normalised_batch_by_batch():
    dataset = memory()
    expected = (dataset.images.float() / 255 - 0.4) / 0.2
    part = dataset.part(np.arange(7, 40, 3))
    for own, rows in ((dataset, np.arange(50)), (part, np.arange(7, 40, 3))):
        x, y = own.batch(range(len(own)))
        torch.testing.assert_close(x, expected[rows])
        assert y.tolist() == (rows % 5).tolist()
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        image, label = own[-1]
        assert torch.equal(image, x[-1])
        assert (label, type(label)) == (rows[-1] % 5, int)
        assert len(list(own)) == len(rows)
    assert part.images is dataset.images, "nothing is copied"
    assert dataset.images.dtype == torch.uint8


@pytest.mark.parametrize("kind", ["images", "part", "subset", "subset of a subset", "tensors"])
def test_loaders_gather_whole_batches_of_the_same_items(kind):
    dataset = memory()
    x, y = dataset.batch(range(50))
    source = {
        "images": dataset,
        "part": dataset.part(np.arange(1, 49, 2)),
        "subset": Subset(dataset, list(range(1, 49, 2))),
        "subset of a subset": Subset(Subset(dataset, list(range(49, 0, -1))), list(range(48, 1, -2))),
        "tensors": TensorDataset(x, y),
    }[kind]
    loader = data.loader(source, 8, shuffle=True, seed=4)
    plain = [source[i] for i in range(len(source))]
    ours = [(x, int(y)) for images, labels in loader for x, y in zip(images, labels, strict=True)]
    order = [next(i for i, (a, _) in enumerate(plain) if torch.equal(a, x)) for x, _ in ours]
    assert sorted(order) == list(range(len(source)))
    assert order != sorted(order)
    assert all(y == int(plain[i][1]) for i, (_, y) in zip(order, ours, strict=True))
    assert [len(y) for _, y in loader][:-1] == [8] * (len(loader) - 1)


def test_augmentation_is_a_padded_crop_and_a_flip():
    images = memory(40, side=6).images
    crops = crop_and_flip(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (PADDING,) * 4)
    seen = set()
    for image, crop in zip(padded, crops, strict=True):
        places = [
            (top, left, mirrored)
            for top in range(2 * PADDING + 1) for left in range(2 * PADDING + 1) for mirrored in (False, True)
            if torch.equal(crop.flip(2) if mirrored else crop, image[:, top : top + 6, left : left + 6])
        ]  # fmt: skip
        assert places
        seen.add(places[0])
    assert len(seen) > 20
    assert {mirrored for *_, mirrored in seen} == {False, True}


def test_augmentation_is_for_training_only_and_follows_from_the_seed():
    dataset = memory()

    def passes(seed=0, **options):
        loader = data.loader(dataset, 8, shuffle=True, seed=seed, **options)
        return [[x.clone() for x, _ in loader] for _ in range(2)]

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    state = torch.get_rng_state()
    first, second = passes(augment=True)
    assert torch.equal(torch.get_rng_state(), state)
    again = passes(augment=True)
    assert same(first, again[0])
    assert same(second, again[1])
    assert not same(first, second)
    assert not same(first, passes(seed=1, augment=True)[0])
    plain, _ = passes()
    assert not same(first, plain)
    assert same([torch.cat(plain).sort(0)[0]], [torch.cat(list(dataset.batch(range(50))[:1])).sort(0)[0]])
    for options, message in (
        ({}, "augment is for training; pass shuffle=True"),
        (
            {"shuffle": True, "dataset": data.digits().train},
            "augment needs images that open_data opened.*TensorDataset",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            data.loader(**{"dataset": dataset, "augment": True, **options})


def test_ranking_never_sees_augmentation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    dataset = memory()
    dataset.images[:, :, 3:] = 0  # or every map would be at full rank
    options = {"images_per_class": 5, "progress": False}
    plain = pp.rank_filters(model, data.loader(dataset, 8), **options)
    trained_on = data.loader(dataset, 8, shuffle=True, augment=True)
    assert np.array_equal(pp.rank_filters(model, trained_on, **options).layers["0"], plain.layers["0"])
    moved = ImageArrays(dataset.images.roll(2, 2), dataset.labels)
    other = pp.rank_filters(model, data.loader(moved, 8), **options)
    assert not np.array_equal(other.layers["0"], plain.layers["0"]), "the comparison can fail"


def test_a_broken_off_training_with_augmentation_ends_with_the_same_bits(tmp_path):
    class StopError(Exception):
        pass

    def train(checkpoint=None, stop_after=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
        seen = []

        def log(row):
            seen.append(row["train_loss"])
            if len(seen) == stop_after:
                raise StopError

        loader = data.loader(memory(), 8, shuffle=True, augment=True)
        pp.finetune(model, loader, epochs=3, checkpoint=checkpoint, log=log, progress=False)
        return model[0].weight, seen

    expected, losses = train()
    assert len(set(losses)) == 3
    with pytest.raises(StopError):
        train(tmp_path / "run", 1)
    weight, rest = train(tmp_path / "run")
    assert rest == losses[1:]
    assert torch.equal(weight, expected)


def test_split_finds_the_labels_of_common_data_sets():
    class Listed(Numbers):
        targets = tuple(i % 3 for i in range(30))

        def __getitem__(self, i):
            raise AssertionError("read an item although the labels are listed")

    tensors = TensorDataset(torch.arange(30), torch.arange(30) % 3)
    expected = [part.indices for part in data.split(Numbers(30), (0.5, 0.5))]
    assert [part.indices for part in data.split(Listed(30), (0.5, 0.5))] == expected
    assert [part.indices for part in data.split(tensors, (0.5, 0.5))] == expected
    assert [part.indices for part in data.split(tensors, (0.5, 0.5), seed=1)] != expected


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: data.split(Numbers(9), (0.5, 0.4)), ValueError, "split: fractions must be positive and add up to 1"),
        (lambda: data.split(Numbers(9), (1.5, -0.5)), ValueError, "split: fractions must be positive"),
        (lambda: data.split(Numbers(9), labels=[1, 2]), ValueError, r"one label for each of 9 items; got shape \[2\]"),
        (lambda: data.split(Numbers(0)), ValueError, "split: needs at least one item; the data set is empty"),
        (lambda: data.loader(Numbers(0)), ValueError, "loader: needs at least one item; the data set is empty"),
        (lambda: data.loader(Numbers(4), 0), ValueError, "loader: batch_size must be at least 1; got 0"),
        (lambda: data.loader(SimpleNamespace()), TypeError, "loader: needs a data set with a length; got SimpleName"),
    ],
)
def test_unusable_data_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=60), min_size=1, max_size=3), st.data())
def test_a_draw_keeps_the_share_of_every_class_of_every_part(parts, choose):
    parts = [np.array(labels) for labels in parts]
    cells = [(i, label) for i, labels in enumerate(parts) for label in np.unique(labels)]
    total = sum(map(len, parts))
    images, seed = choose.draw(st.integers(len(cells), total)), choose.draw(st.integers(0, 3))
    rows = drawn("x", parts, images, seed)
    assert sum(map(len, rows)) == images
    assert all(np.array_equal(own, np.unique(own)) for own in rows)
    sizes = np.array([len(labels) for labels in parts]) * images / total
    if all(size >= len(np.unique(labels)) for size, labels in zip(sizes, parts, strict=True)):
        assert np.abs([len(own) for own in rows] - sizes).max() < 1
    for labels, own in zip(parts, rows, strict=True):
        exact, counts = (np.bincount(some, minlength=5)[np.unique(labels)] for some in (labels, labels[own]))
        exact = exact * len(own) / len(labels)
        assert counts.min() >= 1
        assert exact.min() < 1 or np.abs(counts - exact).max() < 1
    assert all(np.array_equal(a, b) for a, b in zip(rows, drawn("x", parts, images, seed), strict=True))
    assert images < total or all(len(own) == len(labels) for own, labels in zip(rows, parts, strict=True))


def test_rare_classes_take_their_one_image_from_the_frequent_ones():
    labels = np.array([0] * 900 + list(range(1, 101)))
    rows = drawn("x", [labels], 110, 0)[0]
    assert np.bincount(labels[rows]).tolist() == [10] + [1] * 100
    assert not np.array_equal(rows, drawn("x", [labels], 110, 1)[0])


def test_digits_drawn_are_some_of_all_digits():
    some, whole = data.open_data("digits", images=100), data.open_data("digits")
    assert [len(part) for part in (some.train, some.val, some.test)] == pytest.approx([67, 16.5, 16.7], abs=5)
    assert len(some.train) + len(some.val) + len(some.test) == 100
    assert float(some.train.tensors[0].double().mean()) == pytest.approx(0, abs=1e-6)
    for name in ("train", "val", "test"):
        grey, labels = (getattr(some, name).tensors[0] * some.std[0] + some.mean[0]), getattr(some, name).tensors[1]
        every = getattr(whole, name).tensors[0] * whole.std[0] + whole.mean[0]
        nearest = torch.cdist(grey.flatten(1), every.flatten(1)).min(1)
        assert float(nearest.values.max()) < 1e-4
        assert torch.equal(getattr(whole, name).tensors[1][nearest.indices], labels)
        assert set(labels.tolist()) == set(range(10))


def encoded_npz(path, count=120, **more):
    """Write images 8x8 whose brightness says which they are; three classes, two of three patients' images alike."""
    files = []
    for i in range(count):
        with io.BytesIO() as buffer:
            Image.fromarray(np.full((8, 8, 3), 2 * i, np.uint8)).save(buffer, "PNG")
            files.append(buffer.getvalue())
    labels = np.arange(count) // 2 % 3
    np.savez(
        path, jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=np.cumsum([0, *map(len, files)]), labels=labels,
        patients=np.arange(count) // 2, **more,
    )  # fmt: skip
    return f"npz:{path}"


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("own_test", [True, False])
def test_only_the_drawn_images_are_decoded_and_only_once(tmp_path, monkeypatch, in_memory, own_test):
    more = {"split": (np.arange(120) >= 90).astype(int)} if own_test else {}
    spec = encoded_npz(tmp_path / "a.npz", **more)
    decoded = []
    decode = EncodedImages._decode
    monkeypatch.setattr(EncodedImages, "_decode", lambda own, row, draw: decoded.append(row) or decode(own, row, draw))
    monkeypatch.setattr(npz, "IN_MEMORY_BYTES", 40 * 8 * 8 * 3 if in_memory else 40 * 8 * 8 * 3 - 1)
    splits = data.open_data(spec, images=40, normalise="0,0,0/1,1,1")
    parts = (splits.train, splits.val, splits.test)
    rows = [part.rows.tolist() for part in parts]
    assert sorted(decoded) == (sorted(itertools.chain(*rows)) if in_memory else [])
    assert isinstance(splits.train, ImageArrays if in_memory else EncodedImages)
    assert sum(map(len, rows)) == len(set(itertools.chain(*rows))) == 40
    assert [len(own) for own in rows] == ([27, 3, 10] if own_test else [32, 4, 4])
    assert not own_test or min(rows[2]) >= 90 > max(rows[0] + rows[1])
    patients = [{row // 2 for row in own} for own in rows]
    assert sum(map(len, patients)) == len(set.union(*patients)), "no patient is in two parts"
    for part, own in zip(parts, rows, strict=True):
        x, y = part.batch(range(len(part)))
        assert (255 * x[:, 0, 0, 0]).round().tolist() == [2 * row for row in own]
        assert y.tolist() == [row // 2 % 3 for row in own]
    whole = data.open_data(spec, normalise="0,0,0/1,1,1")
    assert all(set(a) <= set(b.rows.tolist()) for a, b in zip(rows, (whole.train, whole.val, whole.test), strict=True))
    assert data.open_data(spec, images=40, seed=1).train.rows.tolist() != rows[0]
    assert data.open_data(spec, images=40).train.rows.tolist() == rows[0]


def test_a_folder_is_thinned_without_reading_it(tmp_path):
    for part, count in (("train", 20), ("test", 10)):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / part / name / f"{i}.png").write_bytes(b"no image")
    splits = data.open_data(f"folder:{tmp_path}", images=30)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [18, 2, 10]
    assert np.bincount(splits.train.labels).tolist() == [9, 9]


@pytest.mark.parametrize("images", [8, 121, 0, -3])
def test_more_images_than_there_are_or_too_few_for_every_class(tmp_path, images):
    spec = encoded_npz(tmp_path / "a.npz")
    message = (
        f"^open_data: images must be at least 9, one for each class of each part, and at most the 120 .*; got {images}"
    )
    with pytest.raises(ValueError, match=message):
        data.open_data(spec, images=images)
    assert len(data.open_data(spec, images=9).val) == 3
    assert len(data.open_data(spec, images=120).val) == len(data.open_data(spec).val)


def test_whether_to_augment_can_be_said(tmp_path):
    spec = encoded_npz(tmp_path / "a.npz")
    assert [data.open_data(spec, augment=given).augment for given in (None, True, False)] == [False, True, False]
    splits = data.open_data(spec, augment=True)
    assert len(next(iter(data.loader(splits.train, shuffle=True, augment=splits.augment)))) == 2
    with pytest.raises(ValueError, match="open_data: digits are not augmented; leave augment out"):
        data.open_data("digits", augment=True)
    assert not data.open_data("digits", augment=False).augment


@pytest.mark.slow
def test_chest_x_rays_are_thinned_patient_by_patient():
    place = Path(os.environ.get("PYPRUNE_DATA", "")) / "cxr_pneumonia_224_jpegbytes.npz"
    if not os.environ.get("PYPRUNE_DATA") or not place.is_file():
        pytest.skip("PYPRUNE_DATA does not name the folder with the chest X-rays")
    splits = data.open_data(f"npz:{place}", size=64, channels=1, images=1200, seed=0)
    with np.load(place, allow_pickle=False) as raw:
        patients, given = raw["patients"], raw["split"]
    rows = [part.rows for part in (splits.train, splits.val, splits.test)]
    owners = [set(patients[own].tolist()) for own in rows]
    assert sum(map(len, owners)) == len(set.union(*owners))
    assert sum(map(len, rows)) == 1200
    assert [set(given[own]) for own in rows] == [{0}, {0}, {1}]
    assert splits.shape == (1, 64, 64)
