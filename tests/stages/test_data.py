from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

import pyprune as pp
from pyprune import data
from pyprune.datasets.images import PADDING, ImageArrays, crop_and_flip


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
