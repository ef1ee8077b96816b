from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, TensorDataset

from pyprune import data


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
    with pytest.raises(ValueError, match="open_data: the data must be one of digits, cifar10:DIR, .*; got 'mnist'"):
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
