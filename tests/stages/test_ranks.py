"""Ranks: sums per class from one pass, balanced samples, restart."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler, TensorDataset

import pyprune as pp
from pyprune import files, ranks, sampling
from pyprune.ops._reference import matrix_rank
from pyprune.ranks import RankAccumulator, rank_filters


class Residual(nn.Module):
    """Two convolutions that share a tap after an addition, and one with a tap of its own."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.project = nn.Conv2d(1, 5, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)) + self.project(x), inplace=True)
        return self.drop(y).mean((2, 3)) * scale


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = Residual()
    for norm in (net.bn1, net.bn2):
        nn.init.uniform_(norm.bias, -1, 1)
        nn.init.uniform_(norm.running_mean, -1, 1)
    return net


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(60, 1, 6, 6, generator=generator)
    for i in range(60):
        images[i, :, 1 + (i // 3 + i * i) % 6 :] = 0
    return TensorDataset(images, torch.arange(60) % 3)


def by_hand(model, images, labels, C):
    """Rank every map of every image for itself, with the float64 reference."""
    model = model.eval()
    totals = {name: np.zeros((F_, C)) for name, F_ in (("conv1", 4), ("conv2", 5), ("project", 5))}
    with torch.no_grad():
        for image, label in zip(images, labels.tolist(), strict=True):
            x = image[None]
            first = F.relu(model.bn1(model.conv1(x)))
            last = F.relu(model.bn2(model.conv2(first)) + model.project(x))
            for name, maps in (("conv1", first), ("conv2", last), ("project", last)):
                for f in range(maps.shape[1]):
                    totals[name][f, label] += matrix_rank(maps[0, f].numpy())
    return {name: total / np.bincount(labels, minlength=C) for name, total in totals.items()}


def same(a, b):
    return a.layers.keys() == b.layers.keys() and all(np.array_equal(a.layers[n], b.layers[n]) for n in a.layers)


def test_ranks_equal_a_loop_over_images_and_filters(model, data):
    images, labels = data.tensors
    found = rank_filters(model, DataLoader(data, batch_size=7), images_per_class=20)
    expected = by_hand(model, images, labels, 3)
    assert list(found.layers) == ["conv1", "conv2", "project"]
    for name, R in expected.items():
        np.testing.assert_array_equal(found.layers[name], R)
        assert len(np.unique(R)) > 3, "a constant R would prove little"
    assert found.taps == {"conv1": "relu", "conv2": "relu_1", "project": "relu_1"}
    assert found.shapes["conv2"] == (6, 6)
    assert found.counts.tolist() == [20, 20, 20]


def test_the_comparison_above_can_fail(model, data):
    images, labels = data.tensors
    found = rank_filters(model, DataLoader(data, batch_size=7), images_per_class=20)
    with torch.no_grad():
        model.conv2.weight[3] = 0
        model.bn2.bias[3] = -100
    assert not np.array_equal(found.layers["conv2"], by_hand(model, images, labels, 3)["conv2"])


def test_inside_the_with_block_the_model_computes_what_it_did(model, data):
    x = data.tensors[0][:5]
    expected = model.eval()(x, scale=2.0)
    model.train()
    model.bn1.eval()
    flags = [module.training for module in model.modules()]
    accumulator = RankAccumulator(model, num_classes=3)
    with accumulator:
        torch.testing.assert_close(model(x, scale=2.0), expected, rtol=0, atol=0)
        accumulator.update([0, 1, 2, 0, 1])
        assert not model(x).requires_grad
        accumulator.update(np.array([0, 1, 2, 0, 1]))
        assert not model.training
        with pytest.raises(TypeError, match="no such input, or not twice: size"):
            model(x, size=3)
    assert [module.training for module in model.modules()] == flags
    assert "forward" not in vars(model)
    assert not model.conv1._forward_hooks
    assert accumulator.ranks().counts.tolist() == [4, 4, 2]


def test_inputs_by_position_by_name_by_default_and_by_star(data):
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x, shift=0.0, *more, **named):
            return self.conv(x) + shift + more[0] * named["by"]

    model, x = Many(), data.tensors[0][:2]
    with torch.no_grad():
        expected = model(x, 1.0, 2.0, by=3.0)
    accumulator = RankAccumulator(model)
    with accumulator:
        assert torch.equal(model(x, 1.0, 2.0, by=3.0), expected)
        accumulator.update([0, 0])
    plain = RankAccumulator(nn.Sequential(nn.Conv2d(1, 2, 3)))
    with plain, pytest.raises(TypeError, match="needs 'input'; pass it"):
        plain._model()
    with plain, pytest.raises(TypeError, match="no such input, or not twice: 1 more by position"):
        plain._model(x, x)


def test_taps_of_another_number_of_images_are_refused(data):
    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            y = F.relu(self.a(x))
            return self.b(y.reshape(-1, 2, 4, 2))

    model = Folds()
    message = r"'b'.*must be of 3 images, as at the taps before; got 6"
    with pytest.raises(ValueError, match=message), RankAccumulator(model):
        model(data.tensors[0][:3])


def test_everything_is_put_back_after_an_error(model, data):
    own = model.forward
    model.forward = own
    model.train()
    with pytest.raises(RuntimeError, match=r"size|shape|channels"), RankAccumulator(model):
        model(torch.zeros(2, 3, 6, 6))
    assert model.training
    assert vars(model)["forward"] is own


class Watched(nn.Module):
    """Two taps that are modules, and a convolution whose output nothing consumes."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(1, 4, 3), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(4, 5, 3), nn.ReLU()
        self.aside = nn.Conv2d(1, 3, 1)

    def forward(self, x):
        self.aside(x)
        return self.relu2(self.conv2(self.relu1(self.conv1(x)))).mean((2, 3))


@pytest.mark.parametrize("layers", [None, {"conv1": "relu1", "conv2": "relu2", "aside": "aside"}])
def test_no_map_outlives_its_batch(data, layers):
    model = Watched()
    maps = []
    for module in (model.relu1, model.relu2, model.aside, model.conv1):
        module.register_forward_hook(lambda module, inputs, output: maps.append(weakref.ref(output)))
    accumulator = RankAccumulator(model, layers, num_classes=3)
    assert len(accumulator.taps) == 3
    with accumulator:
        model(data.tensors[0][:6])
        gc.collect()
        assert len(maps) == 4
        assert not any(ref() is not None for ref in maps)
        assert (accumulator._ranks.shape, accumulator._ranks.dtype) == ((6, 3 + 4 + 5), np.int32)
        accumulator.update(data.tensors[1][:6])
        assert not accumulator._pending


def test_order_and_cuts_do_not_change_the_sums(model, data):
    images, labels = data.tensors
    whole = RankAccumulator(model, num_classes=3)
    with whole:
        model(images)
        whole.update(labels)
    pieces = RankAccumulator(model)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    with pieces:
        for part in order.split(11):
            model(images[part])
            pieces.update(labels[part].tolist())
    assert same(whole.ranks(), pieces.ranks())


def test_accumulators_merge_and_resume(model, data):
    images, labels = data.tensors
    parts = []
    for rows in (slice(0, 20), slice(20, 60)):
        accumulator = RankAccumulator(model)
        with accumulator:
            model(images[rows])
            accumulator.update(labels[rows])
        parts.append(accumulator)
    whole = RankAccumulator(model)
    whole.merge(parts[1])
    whole.merge(parts[0])
    restored = RankAccumulator(model, num_classes=3)
    restored.load_state_dict(whole.state_dict())
    assert same(whole.ranks(), rank_filters(model, DataLoader(data, batch_size=60), images_per_class=20))
    assert same(whole.ranks(), restored.ranks())
    assert restored.ranks().shapes == whole.ranks().shapes
    with pytest.raises(ValueError, match="other taps, filters or classes"):
        RankAccumulator(model, taps="norm").merge(whole)
    with pytest.raises(ValueError, match="other taps, filters or classes"):
        RankAccumulator(model, num_classes=2).merge(whole)


def test_norm_taps_read_the_norm(model, data):
    found = rank_filters(model, DataLoader(data, batch_size=30), images_per_class=5, taps="norm")
    assert found.taps == {"conv1": "bn1", "conv2": "bn2", "project": "project"}
    assert found.info["notes"] == {"project": "read at its own output: it has no norm of its own"}


def test_hrank_taps_read_behind_pools_and_copy_the_last_layer(data):
    torch.manual_seed(0)
    model = pp.models.vgg_digits(widths=(4, 4, 6, 6)).eval()
    images = TensorDataset(torch.randn(60, 1, 16, 16), data.tensors[1])
    found = rank_filters(model, DataLoader(images, batch_size=30), images_per_class=20, taps="hrank")
    R, shapes = found.layers, found.shapes
    assert list(shapes.values()) == [(16, 16), (8, 8), (8, 8), (8, 8)]
    assert np.array_equal(R["features.conv4"], R["features.conv3"])
    assert list(found.info["notes"]) == ["features.conv4"]
    with torch.no_grad():
        pooled = model.features[:7](images.tensors[0])
    ranks = matrix_rank(pooled.numpy())
    expected = np.stack([ranks[data.tensors[1] == c].mean(0) for c in range(3)], 1)
    np.testing.assert_array_equal(R["features.conv1"], expected)
    own = rank_filters(model, DataLoader(images, batch_size=30), images_per_class=20)
    assert not np.array_equal(own.layers["features.conv4"], R["features.conv4"])


def test_a_model_that_cannot_be_traced_is_read_through_hooks(model, data):
    class Untraceable(Residual):
        def forward(self, x):
            return super().forward(x) if len(x) else x

    other = Untraceable()
    other.load_state_dict(model.state_dict())
    loader = DataLoader(data, batch_size=13)
    with pytest.raises(ValueError, match="name the taps by hand"):
        rank_filters(other, loader)
    found = rank_filters(other, loader, layers={"conv1": "bn1", "project": "project"}, images_per_class=20)
    assert found.taps == {"conv1": "bn1", "project": "project"}
    for name, R in found.layers.items():
        assert np.array_equal(R, rank_filters(model, loader, images_per_class=20, taps="norm").layers[name])
    assert not other.bn1._forward_hooks


def test_what_hooks_cannot_read(model, data):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.flat, self.idle = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.ReLU()

        def forward(self, x):
            return self.flat(self.relu(self.relu(self.conv(x))))

    x = data.tensors[0][:2]
    for module, message in (
        ("relu", "'relu' runs more than once in a forward pass"),
        ("flat", r"'conv' \(read at 'flat'\) must be \[N, F, H, W\]; got \[2, 32\]"),
    ):
        net = Shared()
        with pytest.raises(ValueError, match=message), RankAccumulator(net, {"conv": module}):
            net(x)
    net = Shared()
    accumulator = RankAccumulator(net, {"conv": "idle"})
    with accumulator:
        net(x)
        with pytest.raises(ValueError, match="update needs a batch"):
            accumulator.update([0, 0])
    with pytest.raises(ValueError, match="one per filter, 4; got 5"), RankAccumulator(model, {"conv1": "bn2"}):
        model(x)


def test_update_refuses_what_it_cannot_count(model, data):
    x = data.tensors[0][:4]
    accumulator = RankAccumulator(model, num_classes=3)
    with accumulator:
        with pytest.raises(ValueError, match=r"update needs a batch; call model\(x\)"):
            accumulator.update([0])
        model(x)
        with pytest.raises(ValueError, match="ran twice; call update"):
            model(x)
        with pytest.raises(ValueError, match="one label per image; got 3 labels for 4 images"):
            accumulator.update([0, 1, 2])
        with pytest.raises(ValueError, match=r"labels must be in \[0, 3\); got 3. Correct"):
            accumulator.update([0, 1, 2, 3])
        with pytest.raises(ValueError, match=r"in \[0, 3\); got -1"):
            accumulator.update([0, 1, 2, -1])
        with pytest.raises(TypeError, match="whole numbers; got float32"):
            accumulator.update(torch.zeros(4))
        with pytest.raises(ValueError, match=r"\[N\], one class index per image; got shape \[4, 1\]"):
            accumulator.update(torch.zeros(4, 1, dtype=torch.long))
        with pytest.raises(ValueError, match="leave the first `with`"):
            accumulator.__enter__()
        accumulator.update([0, 1, 0, 1])
    with pytest.raises(ValueError, match="image of every class; class 2 has none"):
        accumulator.ranks()
    with pytest.raises(ValueError, match="nothing was counted"):
        RankAccumulator(model).ranks()
    with pytest.raises(ValueError, match="last batch was run and not counted"), RankAccumulator(model):
        model(x)
    growing = RankAccumulator(model)
    with growing:
        model(x)
        with pytest.raises(ValueError, match=r"in \[0, 65536\); got 4294967295. Pass num_classes"):
            growing.update([0, 0, 0, 4294967295])
        growing.update([0, 0, 0, 0])


def test_maps_must_be_finite_and_of_one_size(model, data):
    x = data.tensors[0][:4].clone()
    accumulator = RankAccumulator(model)
    with accumulator:
        x[2, 0, 1, 1] = float("nan")
        with pytest.raises(ValueError, match=r"maps of 'conv1' \(read at 'relu'\) cannot be ranked.*of 16"):
            model(x)
        model(x[:2])  # the failed batch is forgotten
        accumulator.update([0, 0])
        with pytest.raises(ValueError, match="at 'relu' were 6x6 and are now 8x8"):
            model(torch.zeros(1, 1, 8, 8))


def test_convolutions_called_twice_are_left_out_and_named(data):
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.twice, self.idle = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return self.twice(self.twice(F.relu(self.once(x))).relu())

    found = rank_filters(Reused(), DataLoader(data, batch_size=30), images_per_class=2)
    assert list(found.layers) == ["once"]
    assert found.info["left_out"] == {
        "twice": "is called 2 times in one forward pass",
        "idle": "is never called by the model's forward",
    }


class Listed(Dataset):
    """Counts what is read."""

    def __init__(self, data, **attributes):
        self.data, self.read = data, []
        vars(self).update(attributes)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        self.read.append(i)
        return self.data[i][0], int(self.data[i][1])


def test_the_sample_is_balanced_seeded_and_recorded(model, data):
    loader = DataLoader(Listed(data, targets=data.tensors[1].tolist()), batch_size=7, shuffle=True)
    state = torch.get_rng_state()
    first = rank_filters(model, loader, images_per_class=4, seed=5)
    assert torch.equal(torch.get_rng_state(), state), "ranking must not draw from the caller's random stream"
    read = loader.dataset.read
    assert len(read) == 12
    assert np.bincount(data.tensors[1][read]).tolist() == [4, 4, 4]
    again = rank_filters(model, loader, images_per_class=4, seed=5)
    other = rank_filters(model, loader, images_per_class=4, seed=6)
    assert first.info["sample"] == again.info["sample"] != other.info["sample"]
    assert same(first, again)
    assert not same(first, other)
    assert {k: first.info[k] for k in ("seed", "images_per_class", "micro_batch", "num_classes", "taps")} == {
        "seed": 5, "images_per_class": 4, "micro_batch": 7, "num_classes": 3, "taps": "activation",
    }  # fmt: skip
    assert first.info["variants"]
    assert first.info["threads"] == torch.get_num_threads()
    assert first.info["torch"] == torch.__version__


@pytest.mark.parametrize("kind", ["targets", "labels", "tensors", "subset", "items", "transformed"])
def test_labels_come_from_the_cheapest_source(model, data, kind):
    labels = data.tensors[1]
    sources = {
        "targets": Listed(data, targets=labels.tolist()),
        "labels": Listed(data, labels=labels.numpy()),
        "tensors": data,
        "subset": Subset(Listed(data, targets=labels), list(range(60))),
        "items": Listed(data),
        "transformed": Listed(data, targets=[9] * 60, target_transform=abs),
    }
    found = rank_filters(model, DataLoader(sources[kind], batch_size=9), images_per_class=4)
    assert same(found, rank_filters(model, DataLoader(data, batch_size=9), images_per_class=4))
    if kind in ("targets", "labels"):
        assert len(sources[kind].read) == 12
    if kind in ("items", "transformed"):
        assert len(sources[kind].read) == 72


def test_a_subset_sampler_bounds_the_sample(model, data):
    mine = [i for i in range(60) if i % 4 == 1]
    source = Listed(data, targets=data.tensors[1].tolist())
    loader = DataLoader(source, batch_size=4, sampler=SubsetRandomSampler(mine))
    rank_filters(model, loader, images_per_class=3)
    assert set(source.read) <= set(mine)


def test_collate_and_batch_size_of_the_loader_are_respected(model, data):
    sizes = []

    def collate(items):
        sizes.append(len(items))
        images, labels = zip(*items, strict=True)
        return torch.stack(images) * 0, torch.stack(labels)

    found = rank_filters(model, DataLoader(data, batch_size=8, collate_fn=collate), images_per_class=7)
    assert sizes == [8, 8, 5]
    assert len(np.unique(found.layers["conv1"][0])) == 1, "all images are zero"


def test_samples_that_cannot_be_drawn(model, data):
    loader = DataLoader(data, batch_size=8)
    with pytest.raises(
        ValueError, match=r"21 images of every class; class 0 has 20 .and 2 more.*Lower images_per_class"
    ):
        rank_filters(model, loader, images_per_class=21)
    with pytest.raises(ValueError, match="class 3 has 0"):
        rank_filters(model, loader, images_per_class=2, num_classes=4)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\); got 2"):
        rank_filters(model, loader, images_per_class=2, num_classes=2)
    with pytest.raises(ValueError, match="images_per_class must be a whole number of at least 1; got 0"):
        rank_filters(model, loader, images_per_class=0)
    with pytest.raises(TypeError, match="needs a DataLoader or an iterable"):
        rank_filters(model, 3)
    with pytest.raises(TypeError, match=r"every batch must be \(images, labels\); got Tensor"):
        rank_filters(model, [data.tensors[0]])
    with pytest.raises(TypeError, match=r"every item of the data set must be \(image, label\)"):
        rank_filters(model, DataLoader(data.tensors[0], batch_size=2))
    lying = Listed(data, targets=[0, 1] * 30)
    with pytest.raises(ValueError, match="listed labels and its items disagree"):
        rank_filters(model, DataLoader(lying, batch_size=8), images_per_class=2)


def stream(data, size):
    images, labels = data.tensors
    return list(zip(images.split(size), labels.split(size), strict=True))


def test_a_stream_gives_the_first_images_of_each_class(model, data):
    images, labels = data.tensors
    found = rank_filters(model, stream(data, 11), images_per_class=4)
    expected = by_hand(model, images[:12], labels[:12], 3)
    for name, R in expected.items():
        np.testing.assert_array_equal(found.layers[name], R)
    assert found.info["micro_batch"] == 11

    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield from data

    loader = DataLoader(Endless(), batch_size=11)
    assert same(found, rank_filters(model, loader, images_per_class=4, num_classes=3))


def test_streams_that_fall_short(model, data):
    batches = stream(data, 16)
    with pytest.raises(ValueError, match="21 images of every class; class 0 has 20"):
        rank_filters(model, batches, images_per_class=21)
    with pytest.raises(ValueError, match="class 3 has 0"):
        rank_filters(model, batches, images_per_class=2, num_classes=4)
    with pytest.raises(ValueError, match=r"in \[0, 2\); got 2"):
        rank_filters(model, batches, images_per_class=2, num_classes=2)
    with pytest.raises(ValueError, match="there is none at all"):
        rank_filters(model, [])


class Interrupted(Dataset):
    """Fails at the n-th read."""

    def __init__(self, data, reads):
        self.data, self.left, self.targets = data, reads, data.tensors[1]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk went away")
        return self.data[i]


@pytest.mark.parametrize("kind", ["drawn", "streamed"])
def test_a_killed_run_continues_with_the_same_bits(model, data, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(ranks, "CHECKPOINT_SECONDS", 0.0)
    path = tmp_path / "ranking.safetensors"
    given = {"images_per_class": 10, "checkpoint": path}

    def loader(reads):
        if kind == "drawn":
            return DataLoader(Interrupted(data, reads), batch_size=4)
        return DataLoader(Interrupted(data, reads), batch_sampler=[list(range(i, i + 4)) for i in range(0, 60, 4)])

    with pytest.raises(OSError, match="the disk went away"):
        rank_filters(model, loader(18), **given)
    assert path.exists()
    calls = []
    handle = model.conv1.register_forward_hook(lambda *_: calls.append(1))
    found = rank_filters(model, loader(1000), **given)
    handle.remove()
    assert len(calls) == 4, "30 images are 8 micro-batches of 4, of which 4 were done"
    assert not path.exists()
    expected = rank_filters(model, loader(1000), images_per_class=10)
    assert same(found, expected)
    assert found.info == expected.info
    assert found.counts.tolist() == [10, 10, 10]


@pytest.mark.parametrize("kind", ["drawn", "streamed"])
def test_a_run_killed_after_its_last_micro_batch_only_reads_the_file(model, data, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(ranks, "CHECKPOINT_SECONDS", 0.0)
    given = {"images_per_class": 10, "checkpoint": tmp_path / "ranking.safetensors"}
    loader = DataLoader(data, batch_size=4) if kind == "drawn" else stream(data, 4)

    def killed(self, info):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RankAccumulator, "ranks", killed)
        with pytest.raises(KeyboardInterrupt):
            rank_filters(model, loader, **given)
    handle = model.conv1.register_forward_pre_hook(lambda *_: pytest.fail("nothing is left to compute"))
    found = rank_filters(model, loader, **given)
    handle.remove()
    assert same(found, rank_filters(model, loader, images_per_class=10))


def interrupt(model, data, path, monkeypatch, **options):
    monkeypatch.setattr(ranks, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(OSError, match="the disk"):
        rank_filters(
            model, DataLoader(Interrupted(data, 18), batch_size=4), images_per_class=10, checkpoint=path, **options
        )


@pytest.mark.parametrize("what", ["seed", "images_per_class", "taps", "weights", "micro_batch", "threads", "device"])
def test_a_checkpoint_of_another_run_is_refused(model, data, tmp_path, monkeypatch, what):
    path = tmp_path / "ranking.safetensors"
    interrupt(model, data, path, monkeypatch)
    options = {
        "images_per_class": 10,
        **{"seed": {"seed": 1}, "images_per_class": {"images_per_class": 9}}.get(what, {}),
    }
    if what == "weights":
        with torch.no_grad():
            model.conv2.bias[1] += 1e-6
    if what == "taps":
        options["taps"] = "norm"
    if what in ("threads", "device"):
        metadata = files.read_tensors("test", path)[1]
        about = json.loads(metadata["about"])
        about["run"][what] = "other"
        files.write_tensors(path, files.read_tensors("test", path)[0], {**metadata, "about": json.dumps(about)})
    loader = DataLoader(data, batch_size=5 if what == "micro_batch" else 4)
    with pytest.raises(ValueError, match=f"of another run: .*{what}.* differ.*delete it"):
        rank_filters(model, loader, checkpoint=path, **options)


def test_a_checkpoint_of_other_images_is_refused(model, data, tmp_path, monkeypatch):
    path = tmp_path / "ranking.safetensors"
    interrupt(model, data, path, monkeypatch)
    images, labels = data.tensors
    other = TensorDataset(images, labels.roll(1))
    with pytest.raises(ValueError, match="of other images"):
        rank_filters(model, DataLoader(other, batch_size=4), images_per_class=10, checkpoint=path)


def test_broken_and_unwritable_checkpoints(model, data, tmp_path):
    loader = DataLoader(data, batch_size=4)
    path = tmp_path / "ranking.safetensors"
    rank_filters(model, loader, images_per_class=2).save(path)
    with pytest.raises(ValueError, match=r"must be a 'pyprune.ranking' file; its format is 'pyprune.ranks'"):
        rank_filters(model, loader, images_per_class=2, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        rank_filters(model, loader, images_per_class=2, checkpoint=path)
    with pytest.raises(ValueError, match="output folder must be writable"):
        rank_filters(model, loader, images_per_class=2, checkpoint=path / "below")


def test_ranks_survive_a_round_trip(model, data, tmp_path):
    found = rank_filters(model, DataLoader(data, batch_size=4), images_per_class=3)
    found.save(tmp_path / "ranks.safetensors")
    loaded = pp.ClassRanks.load(tmp_path / "ranks.safetensors")
    assert same(found, loaded)
    assert (loaded.info, loaded.taps, loaded.shapes) == (found.info, found.taps, found.shapes)


def test_layers_at_full_rank_are_flagged(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3), nn.ReLU())
    images, labels = data.tensors
    whole = TensorDataset(torch.randn(images.shape), labels)
    with torch.no_grad():
        model[1].bias.fill_(-100)
    found = rank_filters(model, DataLoader(whole, batch_size=30), images_per_class=5)
    assert found.uninformative == ("0",)


def test_workers_of_the_loader_are_used(model, data):
    loader = DataLoader(data, batch_size=8, num_workers=1)
    found = rank_filters(model, loader, images_per_class=4)
    assert same(found, rank_filters(model, DataLoader(data, batch_size=8), images_per_class=4))


def test_the_draw_of_a_class_does_not_depend_on_the_others():
    labels = np.array([0, 1] * 20)
    alone = sampling._balanced(labels, np.flatnonzero(labels == 0), 5, 1, seed=3)
    both = sampling._balanced(labels, np.arange(40), 5, 2, seed=3)
    assert np.array_equal(alone, both[labels[both] == 0])
