import json
import logging
import math
import os
import pickle
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyprune import data, files, finetuning, models
from pyprune.compaction import compact
from pyprune.finetuning import Diverged, finetune
from pyprune.masks import mask_
from pyprune.measure import evaluate
from pyprune.types import History, Plan
from tolerances import TRAINED_FLOAT64

PLAN = Plan({"0": [0, 2, 5]})


class Blobs(TensorDataset):
    """Three classes of 1x6x6 images, separable but for noise."""

    def __init__(self, count=48, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % 3
        images = torch.randn(count, 1, 6, 6, generator=generator, dtype=dtype)
        images[torch.arange(count), 0, labels] += 1
        super().__init__(images, labels)


def net(seed=0, widths=6, dropout=0.2):
    """A chain of convolution, affine norm and activation, then a second convolution and a linear layer."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(1, widths, 3), nn.BatchNorm2d(widths), nn.ReLU(inplace=True), nn.Dropout(dropout),
            nn.Conv2d(widths, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
        )  # fmt: skip
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].bias)
    return model


def loaders(batch=8, **kwargs):
    return data.loader(Blobs(**kwargs), batch, shuffle=True), data.loader(Blobs(24, seed=1, **kwargs), 24)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def quiet(**options):
    return {"epochs": 3, "lr": 0.05, "progress": False, **options}


# training


def test_training_learns_and_reports_it():
    model = net()
    rows = []
    history = finetune(model, *loaders(), **quiet(epochs=8), log=rows.append)
    assert [epoch.epoch for epoch in history.epochs] == list(range(1, 9)) == [row["epoch"] for row in rows]
    assert history.epochs[-1].train_loss < 0.6 * history.epochs[0].train_loss
    assert max(epoch.val_top1 for epoch in history.epochs) > 0.8
    assert set(rows[0]) == {"epoch", "lr", "train_loss", "val_loss", "val_top1", "val_auc", "seconds"}
    assert rows[0]["val_auc"] is None  # it chooses nothing here
    assert history.options["lr"] == 0.05


def test_one_step_is_torchs_sgd():
    model, twin = net(dropout=0), net(dropout=0)
    images, labels = Blobs().tensors
    finetune(model, [(images, labels)], **quiet(epochs=1, lr=0.3, weight_decay=0.01))
    optimizer = torch.optim.SGD(twin.parameters(), 0.3, momentum=0.9, weight_decay=0.01)
    F.cross_entropy(twin(images), labels).backward()
    optimizer.step()
    assert same(weights(model), weights(twin))


def test_train_loss_is_the_mean_over_images_not_batches():
    model = net(dropout=0).requires_grad_(False)
    model[7].requires_grad_(True)
    images, labels = Blobs(9).tensors
    seen = []

    def loss(outputs, wanted):
        seen.append(F.cross_entropy(outputs, wanted, reduction="none").detach())
        return F.cross_entropy(outputs, wanted)

    history = finetune(model, DataLoader(TensorDataset(images, labels), 7), loss=loss, **quiet(epochs=1))
    assert [len(one) for one in seen] == [7, 2]
    assert history.epochs[0].train_loss == pytest.approx(float(torch.cat(seen).double().mean()), rel=1e-6)
    assert history.epochs[0].train_loss != pytest.approx(float(torch.stack([one.mean() for one in seen]).mean()))
    assert history.options["loss"] == "loss"


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.05] * 4),
        ("step", [0.05, 0.05, 0.005, 0.0005]),
        ("cosine", [0.05 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]),
    ],
)
def test_schedules(schedule, rates):
    history = finetune(net(), loaders()[0], **quiet(epochs=4, schedule=schedule))
    assert [epoch.lr for epoch in history.epochs] == pytest.approx(rates, rel=1e-12)


def test_cosine_anneals_batch_by_batch_and_by_epoch_without_a_length(monkeypatch):
    seen = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, *a, **k: (seen.append(self.param_groups[0]["lr"]), step(self, *a, **k))
    )
    loader = DataLoader(Blobs(), 24)
    finetune(net(), loader, **quiet(epochs=2, lr=1e-4))
    assert seen == pytest.approx([1e-4 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)], rel=1e-12)
    seen.clear()
    without_length = type("Stream", (), {"__iter__": lambda self: iter(loader)})()
    finetune(net(), without_length, **quiet(epochs=2, lr=1e-4))
    assert seen == pytest.approx([1e-4, 1e-4, 5e-5, 5e-5], rel=1e-12)


# which epoch


def test_steps_end_the_last_pass_early_and_anneal_to_their_end(monkeypatch):
    rates, before = [], torch.optim.SGD.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return before(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    history = finetune(net(), *loaders(batch=8), **quiet(steps=8, lr=1.0))  # 48 images: 6 steps, then 2 of 6
    assert rates == pytest.approx([(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)])
    assert [epoch.epoch for epoch in history.epochs] == [1, 2]
    assert history.options["steps"] == 8


def test_steps_need_a_number_and_a_length():
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1; got 0"):
        finetune(net(), *loaders(), steps=0, progress=False)

    class Endless:
        def __iter__(self):
            return iter(())

    with pytest.raises(TypeError, match="steps needs a training loader with a length"):
        finetune(net(), Endless(), steps=5, progress=False)


def test_best_epoch_is_chosen_on_validation_and_its_weights_come_back(monkeypatch):
    scripted = [(0.9, 0.5), (0.7, 0.75), (0.5, 0.75), (0.6, 0.75), (0.1, 0.6)]  # loss, top-1: the third is best
    kept = []
    model = net()

    def validate(who, trained, loader):
        kept.append(weights(trained))
        return scripted[len(kept) - 1]

    monkeypatch.setattr(finetuning.measure, "loss_and_top1", validate)
    history = finetune(model, *loaders(), **quiet(epochs=5))
    assert history.best == 3
    assert same(weights(model), kept[2])
    assert not same(weights(model), kept[4])
    assert history.options["chosen_by"] == "validation top-1, then loss"


def test_the_earliest_of_equal_epochs_wins(monkeypatch):
    monkeypatch.setattr(finetuning.measure, "loss_and_top1", lambda *args: (0.5, 0.0))
    assert finetune(net(), *loaders(), **quiet()).best == 1


def test_without_validation_the_last_epoch_stays_and_the_history_says_so():
    model = net()
    history = finetune(model, loaders()[0], **quiet())
    assert history.best == 3
    assert history.epochs[0].val_loss is None
    assert "last epoch" in history.options["chosen_by"]
    longer = net()
    finetune(longer, loaders()[0], **quiet(schedule="constant"))
    assert not same(weights(model), weights(longer))


@pytest.mark.parametrize("choose", ["top1", "auc"])
def test_the_epoch_may_be_chosen_by_auc(choose):
    """The chosen epoch is the best by the measure that was asked for, and its weights are those that stay."""
    images, labels = Blobs(180, seed=3).tensors
    few = torch.where((labels == 1) & (torch.arange(180) % 9 == 1), 1, 0)
    loader = DataLoader(TensorDataset(images, few), 60)
    model = net()
    model[7] = nn.Linear(16, 2)
    history = finetune(model, loader, loader, choose=choose, **quiet(epochs=6))
    wanted = [epoch.val_top1 if choose == "top1" else epoch.val_auc for epoch in history.epochs]
    assert wanted[history.best - 1] == max(wanted)
    if choose == "auc":
        found = evaluate(model, loader, progress=False)
        assert history.epochs[history.best - 1].val_auc == pytest.approx(found.auc, abs=1e-12)
        assert history.epochs[history.best - 1].val_auc > history.epochs[0].val_auc
        assert history.options["chosen_by"] == "validation AUC, then loss"


def test_auc_chooses_another_epoch_than_top1_does(monkeypatch):
    aucs = iter([0.7, 0.9, 0.8])
    found = SimpleNamespace(loss=0.5, top1=0.6)
    monkeypatch.setattr(finetuning.measure, "evaluate", lambda *a, **k: SimpleNamespace(**vars(found), auc=next(aucs)))
    assert finetune(net(), *loaders(), choose="auc", **quiet()).best == 2
    scripted(monkeypatch, [0.6, 0.6, 0.6])
    assert finetune(net(), *loaders(), **quiet()).best == 1


def test_auc_needs_every_class_on_val():
    images, labels = Blobs().tensors
    with pytest.raises(ValueError, match="finetune: choose='auc' needs an image of every class in val; one has none"):
        finetune(net(), loaders()[0], DataLoader(TensorDataset(images, labels.clamp(max=1)), 48), choose="auc")


# patience


def scripted(monkeypatch, top1):
    """Let validation say ``top1``, epoch by epoch."""
    said = iter(top1)
    monkeypatch.setattr(finetuning.measure, "loss_and_top1", lambda *args: (0.5, next(said)))


@pytest.mark.parametrize(
    ("top1", "patience", "epochs", "best"),
    [
        ([0.5, 0.6, 0.6, 0.5, 0.9], 2, 4, 2),  # an equal epoch is no better one
        ([0.5, 0.4, 0.9], 1, 2, 1),
        ([0.5, 0.4, 0.6, 0.5, 0.7], 2, 5, 5),
        ([0.5, 0.4, 0.4, 0.4, 0.4], 4, 5, 1),  # the last epoch: nothing was left to be stopped
        ([0.5, 0.4, 0.4, 0.4, 0.4], None, 5, 1),
    ],
)
def test_patience_stops_after_epochs_without_a_better_one(monkeypatch, top1, patience, epochs, best):
    scripted(monkeypatch, top1)
    history = finetune(net(), *loaders(), **quiet(epochs=5), patience=patience)
    assert (len(history.epochs), history.best) == (epochs, best)
    expected = f"after epoch {epochs} of 5: none was better than {best} on val" if epochs < 5 else ""
    assert history.stopped == expected


def test_the_schedule_is_that_of_all_epochs_even_if_some_are_not_run(monkeypatch):
    scripted(monkeypatch, [0.5, 0.4, 0.4])
    history = finetune(net(), *loaders(), **quiet(epochs=20), patience=2)
    assert [epoch.lr for epoch in history.epochs] == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(3)], rel=1e-12
    )


@pytest.mark.parametrize("killed", [2, 3, 4])
def test_a_continued_run_stops_at_the_same_epoch_with_the_same_bits(tmp_path, monkeypatch, killed):
    told = [0.5, 0.6, 0.6, 0.5, 0.9]
    whole, continued = net(), net()
    scripted(monkeypatch, told)
    expected = finetune(whole, *loaders(), **quiet(epochs=5), patience=2)
    scripted(monkeypatch, told)
    train, val = loaders()
    with pytest.raises(Stop):
        finetune(net(), killed_in(train, killed, 2), val, **quiet(epochs=5), patience=2, checkpoint=tmp_path / "run")
    for again in ("continued", "finished already"):
        scripted(monkeypatch, told[killed - 1 :])
        history = finetune(continued, *loaders(), **quiet(epochs=5), patience=2, checkpoint=tmp_path / "run")
        assert (len(history.epochs), history.best, history.stopped) == (4, 2, expected.stopped), again
        assert same(weights(continued), weights(whole))


# an objective of one's own


class Weighted(Blobs):
    """Images, labels and a weight for each image: the third item that a loss may need."""

    def __getitem__(self, i):
        return *super().__getitem__(i), torch.tensor(float(i % 2))


def even_images_do_not_count(model, batch):
    images, labels, weight = batch
    return (F.cross_entropy(model(images), labels, reduction="none") * weight).mean()


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_an_objective_gets_all_that_the_loader_yields(amp):
    """With masks and mixed precision; what it leaves out has no influence, and plain cross-entropy gives the rest."""
    model, twin, plain = net(dropout=0), net(dropout=0), net(dropout=0)
    for one in (model, twin, plain):
        one[1].eval()  # batch statistics would let images that do not count have a say
        one[1].forward = partial(F.batch_norm, running_mean=torch.zeros(6), running_var=torch.ones(6))
    noisy = Weighted()
    noisy.tensors[0][::2] = 9 * torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    val = data.loader(Weighted(24, seed=1), 24)
    options = quiet(objective=even_images_do_not_count, amp=amp, epochs=2)
    for one, images in ((model, Weighted()), (twin, noisy)):
        history = finetune(one, DataLoader(images, 8), val, masks=mask_(one, PLAN), **options)
        assert history.options["loss"] == "even_images_do_not_count"
        assert not one[0].weight[1].any()
    assert same(weights(model), weights(twin))
    finetune(plain, DataLoader(Blobs(), 8), masks=mask_(plain, PLAN), **quiet(epochs=2, amp=amp))
    assert not same(weights(model), weights(plain))


def test_the_objective_of_cross_entropy_is_the_default():
    model, plain = net(), net()
    expected = finetune(plain, *loaders(), **quiet())
    found = finetune(model, *loaders(), objective=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), **quiet())
    assert same(weights(model), weights(plain))
    assert [epoch.train_loss for epoch in found.epochs] == [epoch.train_loss for epoch in expected.epochs]


def test_an_objective_is_continued_with_the_same_bits_and_only_by_itself(tmp_path):
    whole, continued = net(), net()
    options = quiet(objective=even_images_do_not_count)

    def triples():
        return data.loader(Weighted(), 8, shuffle=True), data.loader(Weighted(24, seed=1), 24)

    finetune(whole, *triples(), **options)
    train, val = triples()
    with pytest.raises(Stop):
        finetune(net(), killed_in(train, 3, 1), val, **options, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match=r"it differs in loss\."):
        finetune(net(), *loaders(), **quiet(), checkpoint=tmp_path / "run")
    finetune(continued, *triples(), **options, checkpoint=tmp_path / "run")
    assert same(weights(continued), weights(whole))


@pytest.mark.parametrize(
    ("value", "came"),
    [
        (lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"), r"shape \[8\]"),
        (lambda model, batch: torch.tensor(1.0), "one that no parameter leads to"),
        (lambda model, batch: 1.5, "float"),
    ],
)
def test_an_objective_must_return_a_loss(value, came):
    with pytest.raises(TypeError, match=f"finetune: the loss must be a scalar tensor with a gradient; got {came}"):
        finetune(net(), *loaders(), objective=value, **quiet())


# masks


def test_masks_hold_while_training_and_the_hook_goes_with_the_run():
    model = net()
    masks = mask_(model, PLAN)
    finetune(model, *loaders(), masks=masks, **quiet())
    dead = [1, 3, 4]
    assert not any(tensor[dead].any() for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias))
    assert model[0].weight[0].any()
    loose = net()
    with torch.no_grad():
        loose[0].weight[dead] = 0
    finetune(loose, *loaders(), **quiet())
    assert loose[0].weight[dead].any()  # what is only zeroed once comes back


def test_masks_of_another_model_are_refused():
    model = net()
    masks = mask_(net(), PLAN)
    with pytest.raises(ValueError, match=r"finetune: masks must be of the model that is trained"):
        finetune(model, *loaders(), masks=masks, **quiet())


def slim(masked, kept):
    """Cut the removed filters of the first convolution out by hand."""
    model = net(widths=len(kept)).double()
    state = masked.state_dict()
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        state[name] = state[name][kept]
    state["4.weight"] = state["4.weight"][:, kept]
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("hold", [True, False])
def test_training_the_slim_chain_is_training_the_masked_one(hold):
    """Momentum, weight decay and batch statistics included; without masks the two drift apart."""
    masked = net(dropout=0).double()
    kept = PLAN.keep["0"].tolist()
    masks = mask_(masked, PLAN)
    small = slim(masked, kept)
    small[3] = masked[3]
    if not hold:
        with torch.no_grad():
            masked[1].bias[1] = 0.5
    options = quiet(epochs=3, weight_decay=0.01)
    one = finetune(masked, *loaders(dtype=torch.float64), masks=masks if hold else None, **options)
    two = finetune(small, *loaders(dtype=torch.float64), **options)
    cut = weights(slim(masked, kept))
    off = max(float((cut[name] - tensor).abs().max()) for name, tensor in weights(small).items())
    assert (off <= TRAINED_FLOAT64) == hold
    if hold:
        assert [e.train_loss for e in one.epochs] == pytest.approx([e.train_loss for e in two.epochs], rel=1e-10)


def digits_like(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    images = torch.randn(count, 1, 16, 16, generator=generator, dtype=torch.float64)
    images[torch.arange(count), 0, labels] += 1
    return data.loader(TensorDataset(images, labels), 20, shuffle=True)


@pytest.mark.parametrize("hold", [True, False])
def test_training_the_compacted_vgg_is_training_the_masked_one(hold):
    """The same through compact: masked and slim compute the same before and after, in float64."""
    torch.manual_seed(0)
    masked = models.vgg_digits(widths=(6, 6, 8, 8)).double()
    finetune(masked, digits_like(40, 0), **quiet(epochs=1))
    plan = Plan({"features.conv0": [0, 3], "features.conv1": [1, 2, 5], "features.conv4": range(1, 7)})
    masks = mask_(masked, plan)
    slim_model = compact(masked, plan, torch.zeros(1, 1, 16, 16).double(), latency=False).model
    assert sum(p.numel() for p in slim_model.parameters()) < sum(p.numel() for p in masked.parameters())
    finetune(masked, digits_like(60, 1), masks=masks if hold else None, **quiet(weight_decay=0.01))
    finetune(slim_model, digits_like(60, 1), **quiet(weight_decay=0.01))
    if not hold:
        masked.features.norm0.bias.data[1] += 0.5  # a relu passes no gradient to a zero, so nothing revives by itself
    images = next(iter(digits_like(20, 2)))[0]
    with torch.no_grad():
        first, second = masked.eval()(images), slim_model.eval()(images)
    off = float((first - second).abs().max() / first.abs().max())
    assert (off <= TRAINED_FLOAT64) == hold


# repeating, resuming


def test_the_same_call_gives_the_same_bits_and_another_seed_others():
    models = [net(), net(), net()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(random.randrange(1, 9))  # the caller's random state must not matter  # noqa: S311
        finetune(model, *loaders(), **quiet(seed=seed))
    assert same(weights(models[0]), weights(models[1]))
    assert not same(weights(models[0]), weights(models[2]))


def test_epochs_have_different_orders():
    orders = []

    class Noting(Blobs):
        def __getitem__(self, i):
            orders.append(i)
            return super().__getitem__(i)

    finetune(net(), data.loader(Noting(), 8, shuffle=True), **quiet(epochs=2))
    assert sorted(orders[:48]) == sorted(orders[48:]) == list(range(48))
    assert orders[:48] != orders[48:]


def test_random_states_of_the_caller_stay():
    train, val = loaders()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    order = train.generator.get_state()
    finetune(net(), train, val, **quiet())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert before[2] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(order, train.generator.get_state())


class Stop(Exception):  # noqa: N818
    """What kills a run in these tests."""


def killed_in(loader, epoch, batch):
    """Return a loader like ``loader`` that dies in a batch of an epoch, counted from 1 and 0."""

    class Dying:
        generator = loader.generator
        sampler = loader.sampler
        passes = 0

        def __len__(self):
            return len(loader)

        def __iter__(self):
            self.passes += 1
            for i, item in enumerate(loader):
                if (self.passes, i) == (epoch, batch):
                    raise Stop
                yield item

    return Dying()


@pytest.mark.parametrize(("epoch", "batch"), [(1, 3), (2, 0), (3, 5)])
@pytest.mark.parametrize("with_masks", [False, True])
def test_a_killed_run_ends_with_the_bits_of_an_unbroken_one(tmp_path, epoch, batch, with_masks):
    def begin():
        model = net()
        return model, {"masks": mask_(model, PLAN)} if with_masks else {}

    whole, masks = begin()
    expected = finetune(whole, *loaders(), **masks, **quiet())
    broken, masks = begin()
    path = tmp_path / "run.safetensors"
    train, val = loaders()
    with pytest.raises(Stop):
        finetune(broken, killed_in(train, epoch, batch), val, **masks, **quiet(), checkpoint=path)
    assert path.exists() == (epoch > 1)
    fresh, masks = begin()
    rows = []
    history = finetune(fresh, *loaders(), **masks, **quiet(), checkpoint=path, log=rows.append)
    assert [row["epoch"] for row in rows] == list(range(epoch, 4))  # it did continue
    assert same(weights(fresh), weights(whole))
    assert history.best == expected.best
    for one, other in zip(history.epochs, expected.epochs, strict=True):
        assert (one.lr, one.train_loss, one.val_loss, one.val_top1) == (
            other.lr, other.train_loss, other.val_loss, other.val_top1,
        )  # fmt: skip


def test_an_interrupted_model_can_be_continued_in_place(tmp_path):
    whole, model = net(), net()
    finetune(whole, *loaders(), **quiet())
    train, val = loaders()
    with pytest.raises(Stop):
        finetune(model, killed_in(train, 3, 1), val, **quiet(), checkpoint=tmp_path / "run")
    finetune(model, *loaders(), **quiet(), checkpoint=tmp_path / "run")
    assert same(weights(model), weights(whole))


def test_a_finished_run_is_not_run_again(tmp_path):
    model = net()
    first = finetune(model, *loaders(), **quiet(), checkpoint=tmp_path / "run")
    rows = []
    assert finetune(net(), *loaders(), **quiet(), checkpoint=tmp_path / "run", log=rows.append) == first
    assert rows == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.06}, r"must come from the same run; it differs in lr\. Delete it"),
        ({"epochs": 9, "seed": 2}, r"differs in epochs, seed"),
        ({"batch": 12}, r"differs in batches"),
        ({"start": 5}, r"differs in starting weights"),
        ({"masks": True}, r"differs in masks"),
        ({"widths": 7}, r"differs in model"),
        ({"val": False}, r"differs in chosen_by"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_changed(tmp_path, change, message):
    path = tmp_path / "run"
    train, val = loaders()
    with pytest.raises(Stop):
        finetune(net(), killed_in(train, 3, 1), val, **quiet(), checkpoint=path)
    content = path.read_bytes()
    model = net(change.pop("start", 0), change.pop("widths", 6))
    train, val = loaders(change.pop("batch", 8))
    if not change.pop("val", True):
        val = None
    if change.pop("masks", False):
        change["masks"] = mask_(model, PLAN)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        finetune(model, train, val, **quiet(**change), checkpoint=path)
    assert path.read_bytes() == content
    assert same(weights(model), before)


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    path = tmp_path / "run"
    finetune(net(), *loaders(), **quiet(), checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"finetune: .*run is not a valid safetensors file.*truncated|declares"):
        finetune(net(), *loaders(), **quiet(), checkpoint=path)
    files.write_tensors(path, {"a": torch.zeros(1)}, {"format": "pyprune.ranks", "version": "1"})
    with pytest.raises(ValueError, match=r"must be a 'pyprune.training' file; its format is 'pyprune.ranks'"):
        finetune(net(), *loaders(), **quiet(), checkpoint=path)


@pytest.mark.parametrize("part", ["now/0.weight", "momentum/0.weight", "best/0.weight"])
def test_a_garbled_checkpoint_is_refused_and_the_model_keeps_its_weights(tmp_path, part):
    path = tmp_path / "run"
    train, val = loaders()
    with pytest.raises(Stop):
        finetune(net(), killed_in(train, 3, 1), val, **quiet(), checkpoint=path)
    tensors, metadata = files.read_tensors("test", path)
    tensors[part] = tensors[part][:1]
    files.write_tensors(path, tensors, metadata)
    model = net()
    before = weights(model)
    with pytest.raises(ValueError, match=r"lacks or garbles .*0.weight.* of shape \[6, 1, 3, 3\].*Delete it"):
        finetune(model, *loaders(), **quiet(), checkpoint=path)
    assert same(weights(model), before)


# what goes wrong


def test_a_broken_off_run_leaves_the_best_weights_so_far():
    model, twin = net(), net()
    train, val = loaders()
    with pytest.raises(Stop):
        finetune(model, killed_in(train, 1, 2), val, **quiet())
    assert same(weights(model), weights(twin))
    with pytest.raises(Stop):
        finetune(model, killed_in(train, 2, 2), val, **quiet())
    with pytest.raises(Stop):
        finetune(twin, *loaders(), **quiet(), log=_stop_after(1))
    assert same(weights(model), weights(twin))
    assert model.training


def _stop_after(epoch):
    def log(row):
        if row["epoch"] == epoch:
            raise Stop

    return log


def test_a_loss_that_is_nan_is_named_and_undone():
    model = net()
    before = weights(model)
    images, labels = Blobs().tensors
    images = images.clone()
    images[17] = float("nan")
    with pytest.raises(
        ValueError, match=r"finetune: the loss must stay finite; it was nan in epoch 1, batch 2 .*Lower lr \(0.05\)"
    ):
        finetune(model, DataLoader(TensorDataset(images, labels), 8), **quiet())
    assert same(weights(model), before)


def test_divergence_has_a_class_of_its_own_and_names_the_epoch():
    epochs = []

    def loss(outputs, labels):
        return F.cross_entropy(outputs, labels) * (math.inf if len(epochs) == 2 else 1)

    model = net()
    train, val = loaders()
    with pytest.raises(Diverged, match=r"in epoch 3, batch 0 .*has its weights of epoch \d again") as raised:
        finetune(model, train, val, loss=loss, log=epochs.append, **quiet(epochs=4))
    assert raised.value.epoch == 3
    assert pickle.loads(pickle.dumps(raised.value)).epoch == 3  # noqa: S301  it may come from another process
    assert all(tensor.isfinite().all() for tensor in weights(model).values())


def test_scores_on_val_that_are_not_finite_are_divergence_too():
    """The loss of the last batch is finite and the step after it is not: only validation sees that."""
    model = net(dropout=0)
    before = weights(model)
    images, labels = Blobs().tensors
    with pytest.raises(Diverged, match=r"outputs must be finite; 24 of 24 .*on val after epoch 1\. Lower lr") as raised:
        finetune(model, [(images, labels)], loaders()[1], **quiet(lr=1e38, epochs=1))
    assert raised.value.epoch == 1
    assert same(weights(model), before)


def test_a_nan_in_a_long_epoch_is_noticed_early():
    seen = []

    def batches():
        for i in range(500):
            seen.append(i)
            image = torch.full((4, 1, 6, 6), float("nan") if i >= 40 else 1.0)
            yield image, torch.arange(4) % 3

    loader = type("Stream", (), {"__iter__": lambda self: batches()})()
    with pytest.raises(ValueError, match=r"in epoch 1, batch 40 "):
        finetune(net(), loader, **quiet())
    assert len(seen) == 64


@pytest.mark.parametrize("flags", [True, False])
def test_training_flags_come_back(flags):
    model = net().train(flags)
    model[1].train(not flags)
    seen = []
    model[3].register_forward_hook(lambda module, args, output: seen.append(module.training))
    finetune(model, *loaders(), **quiet(epochs=1))
    assert [module.training for module in model] == [flags, not flags, *[flags] * 6]
    assert set(seen) == {True, False}  # training, then validation


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be a whole number of at least 1; got 0"),
        ({"epochs": 2.5}, ValueError, "epochs must be a whole number of at least 1; got 2.5"),
        ({"lr": 0}, ValueError, "lr must be positive; got 0"),
        ({"lr": float("nan")}, ValueError, "lr must be positive; got nan"),
        ({"momentum": 1}, ValueError, r"momentum must be in \[0, 1\); got 1"),
        ({"weight_decay": -1}, ValueError, "weight_decay must not be negative; got -1"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of cosine, step, constant; got 'linear'"),
        ({"choose": "loss"}, ValueError, "choose must be one of top1, auc; got 'loss'"),
        ({"choose": "auc", "val": None}, ValueError, r"choose='auc' needs val, .*; got none\. Pass val"),
        ({"patience": 0}, ValueError, "patience must be a whole number of at least 1, or None; got 0"),
        ({"patience": True}, ValueError, "patience must be a whole number of at least 1, or None; got True"),
        ({"patience": 2, "val": None}, ValueError, r"patience=2 needs val, .*; got none\. Pass val"),
        (
            {"loss": F.cross_entropy, "objective": even_images_do_not_count},
            ValueError,
            "needs loss or objective; got bo",
        ),
        ({"train": [(torch.zeros(2, 1, 6, 6),) * 3]}, TypeError, r"must yield \(images, labels\)"),
        ({"amp": "fp8"}, ValueError, "amp must be one of auto, off, bf16, fp16; got 'fp8'"),
        ({"seed": "a"}, TypeError, "seed must be a whole number; got 'a'"),
        ({"log": 3}, TypeError, r"log must be a path, a callable or have \.log, .* or \.log_metrics; got int"),
        ({"train": []}, ValueError, "needs at least one image; the train loader is empty"),
        ({"val": []}, ValueError, "needs at least one image; the val loader is empty"),
        ({"train": iter([])}, TypeError, "train must be iterable once per epoch; got a list_iterator"),
        ({"train": [(torch.zeros(2, 1, 6, 6), [0, 3])]}, ValueError, r"labels must be in \[0, 3\)"),
        ({"train": [torch.zeros(2, 1, 6, 6)]}, TypeError, r"must yield \(images, labels\)"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    model = net()
    before = weights(model)
    train, val = loaders()
    arguments = {"train": train, "val": val, **quiet(), **options}
    with pytest.raises(error, match=f"finetune: .*{message}"):
        finetune(model, **arguments)
    assert same(weights(model), before)


def test_an_endlessly_empty_stream_and_a_frozen_model_are_refused():
    stream = type("Stream", (), {"__iter__": lambda self: iter(())})()
    with pytest.raises(ValueError, match="finetune: needs at least one image to train on; the training loader is emp"):
        finetune(net(), stream, **quiet())
    with pytest.raises(ValueError, match="finetune: the model must have parameters that ask for gradients"):
        finetune(net().requires_grad_(False), *loaders(), **quiet())


# precision, loggers


def test_precision_is_chosen_by_the_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert finetuning._precision("auto", cpu) is None
    assert finetuning._precision("bf16", cpu) is torch.bfloat16
    assert finetuning._precision("off", cuda) is None
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert finetuning._precision("auto", cuda) is expected


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_float32_weights(amp):
    model = net()
    masks = mask_(model, PLAN)
    seen = []
    model[7].register_forward_hook(lambda module, args, output: seen.append((module.training, output.dtype)))
    history = finetune(model, *loaders(), masks=masks, **quiet(amp=amp, epochs=6))
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    assert set(seen) == {(True, low), (False, torch.float32)}
    assert history.epochs[-1].train_loss < history.epochs[0].train_loss
    assert model[0].weight.dtype == torch.float32
    assert not model[0].weight[1].any()


def test_any_logger_will_do(caplog):
    rows, scalars, metrics = [], [], []
    kinds = [
        rows.append,
        SimpleNamespace(log=rows.append),
        SimpleNamespace(add_scalar=lambda name, value, step: scalars.append((name, step))),
        SimpleNamespace(log_metrics=lambda row, step: metrics.append((row, step))),
        logging.getLogger("pyprune-test"),
    ]
    with caplog.at_level(logging.INFO):
        for log in kinds:
            finetune(net(), loaders()[0], **quiet(epochs=2), log=log)
    assert [row["epoch"] for row in rows] == [1, 2, 1, 2]
    assert ("train_loss", 2) in scalars
    assert "val_loss" not in dict(scalars)  # there is none
    assert [step for _, step in metrics] == [1, 2]
    assert "train_loss" in caplog.text


def test_history_survives_a_round_trip(tmp_path):
    history = replace(finetune(net(), *loaders(), **quiet()), stopped="after epoch 3 of 9")
    path = tmp_path / "history.json"
    history.save(path)
    assert History.load(path) == history
    content = json.loads(path.read_text())
    del content["stopped"]  # as before there was patience
    path.write_text(json.dumps(content))
    assert History.load(path) == replace(history, stopped="")


# really killed

SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_finetuning as t
from pyprune.finetuning import finetune
def log(row):
    if row["epoch"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
finetune(t.net(), *t.loaders(), **t.quiet(), checkpoint=sys.argv[2], log=log)
"""


@pytest.mark.slow
def test_a_run_killed_by_the_system_continues_in_another_process(tmp_path):
    here = os.path.dirname(__file__)  # noqa: PTH120
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, os.path.dirname(here)])}  # noqa: PTH120
    path = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", SCRIPT, here, str(path)], env=environment, check=False)
    assert done.returncode == -9
    _, metadata = files.read_tensors("test", path)
    assert len(json.loads(metadata["about"])["history"]) == 2
    whole, continued = net(), net()
    finetune(whole, *loaders(), **quiet())
    finetune(continued, *loaders(), **quiet(), checkpoint=path)
    assert same(weights(continued), weights(whole))
