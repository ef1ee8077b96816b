"""Recalibration: statistics as torch would have counted them, everything else as it was, and accuracy regained."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyprune as pp
from pyprune import data
from tolerances import STATISTICS


class Net(nn.Module):
    """Norms of every kind, one of them used twice, with dropout between them, and one that is never reached."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.again = nn.Conv2d(5, 5, 3, padding=1)
        self.instance = nn.InstanceNorm2d(5, affine=True, track_running_stats=True)
        self.plain, self.group = nn.BatchNorm2d(5, track_running_stats=False), nn.GroupNorm(1, 5)
        self.unused = nn.BatchNorm2d(5)
        self.linear, self.last = nn.Linear(5, 7), nn.BatchNorm1d(7, momentum=None)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        x = F.dropout(self.norm(self.again(x)), 0.5, self.training)
        x = F.relu(self.group(self.plain(self.instance(x)))).mean((2, 3))
        return self.last(self.linear(x))


NORMS = ("norm", "instance", "last")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Net().double().train()
    for _ in range(3):
        model(torch.randn(4, 2, 6, 6).double())
    return model


def images(batches=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3 + i, 2, 6, 6, generator=generator, dtype=torch.float64) * 2 + 1 for i in range(batches)]


def inputs_of(model, batches):
    """Return what each norm reads, batch by batch, while the norms before it use the batch, as they do here."""
    twin, seen = copy.deepcopy(model).eval().requires_grad_(False), {name: [] for name in NORMS}
    for name in (*NORMS, "plain"):
        twin.get_submodule(name).train()
    for name in NORMS:
        twin.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    for batch in batches:
        twin(batch)
    return seen


def by_hand(name, inputs):
    """Return mean and unbiased variance, averaged over the calls."""
    if name == "last":
        dims = (0,)
    elif name == "norm":
        dims = (0, 2, 3)
    else:
        dims = (2, 3)
    means = [x.mean(dims) for x in inputs]
    variances = [x.var(dims, correction=1) for x in inputs]
    if name == "instance":
        means, variances = [m.mean(0) for m in means], [v.mean(0) for v in variances]
    return torch.stack(means).mean(0), torch.stack(variances).mean(0)


def statistics(model):
    return {name: value.clone() for name, value in model.named_buffers()}


def test_statistics_are_the_mean_over_the_batches(model):
    seen = inputs_of(model, images())
    assert pp.recalibrate(model, images(), progress=False) == NORMS
    for name in NORMS:
        norm = model.get_submodule(name)
        mean, variance = by_hand(name, seen[name])
        assert (norm.running_mean - mean).abs().max() <= STATISTICS
        assert (norm.running_var - variance).abs().max() <= STATISTICS
        _, other = by_hand(name, seen[name][:-1])
        assert (norm.running_var - other).abs().max() > STATISTICS


def test_batch_norms_get_the_bits_that_momentum_none_gives():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 1), nn.BatchNorm2d(3))
    twin = copy.deepcopy(model).train()
    for norm in (twin[1], twin[4]):
        norm.momentum = None
        norm.reset_running_stats()
    for batch in images():
        twin(batch.float())
    pp.recalibrate(model, [batch.float() for batch in images()])
    for place in (1, 4):
        assert torch.equal(model[place].running_mean, twin[place].running_mean)
        assert torch.equal(model[place].running_var, twin[place].running_var)
        assert not torch.equal(model[place].running_var, torch.ones_like(model[place].running_var))


def test_going_on_weighs_what_was_counted(model):
    norm = model.last
    before, counted = norm.running_mean.clone(), int(norm.num_batches_tracked)
    seen = [x.mean(0) for x in inputs_of(model, images())["last"]]
    pp.recalibrate(model, images(), reset=False)
    expected = (before * counted + sum(seen)) / (counted + len(seen))
    assert counted == 3
    assert (norm.running_mean - expected).abs().max() <= STATISTICS
    assert (norm.running_mean - sum(seen) / len(seen)).abs().max() > STATISTICS


def test_momentum_weighs_later_batches(model):
    seen = [x.mean(0) for x in inputs_of(model, images())["last"]]
    pp.recalibrate(model, images(), momentum=0.25)
    expected = torch.zeros(7, dtype=torch.float64)
    for mean in seen:
        expected = 0.75 * expected + 0.25 * mean
    assert (model.last.running_mean - expected).abs().max() <= STATISTICS


def test_nothing_else_changes(model):
    model.instance.eval()
    model.linear.weight.grad = torch.ones_like(model.linear.weight)
    flags = [module.training for module in model.modules()]
    parameters = {name: one.detach().clone() for name, one in model.named_parameters()}
    before, momenta = statistics(model), [model.get_submodule(name).momentum for name in NORMS]
    rng = torch.get_rng_state()
    pp.recalibrate(model, images(), progress=False)
    assert [module.training for module in model.modules()] == flags
    assert [model.get_submodule(name).momentum for name in NORMS] == momenta == [0.1, 0.1, None]
    assert all(torch.equal(one, parameters[name]) for name, one in model.named_parameters())
    assert model.conv.weight.grad is None
    assert torch.equal(model.linear.weight.grad, torch.ones_like(model.linear.weight))
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(module._forward_pre_hooks for module in model.modules())
    after = statistics(model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {f"{name}.{leaf}" for name in NORMS for leaf in ("running_mean", "running_var")}


def test_it_repeats_bit_for_bit(model):
    twin = copy.deepcopy(model)
    twin.norm.running_mean += 7
    pp.recalibrate(model, images())
    pp.recalibrate(twin, [(batch, None) for batch in images()])
    assert all(torch.equal(one, statistics(twin)[name]) for name, one in statistics(model).items())
    pp.recalibrate(twin, images(seed=2))
    assert not torch.equal(model.norm.running_mean, twin.norm.running_mean)


def test_batches_limit_the_pass(model):
    twin = copy.deepcopy(model)
    pp.recalibrate(model, images()[:2])
    pp.recalibrate(twin, iter(images()), batches=2)
    assert torch.equal(model.last.running_var, twin.last.running_var)


def test_wrapped_models_are_taken_out(model):
    twin = copy.deepcopy(model)
    assert pp.recalibrate(nn.DataParallel(twin), images()) == pp.recalibrate(model, images())
    assert torch.equal(model.last.running_mean, twin.last.running_mean)


def test_a_network_without_statistics_is_left_alone_and_says_so():
    with pytest.warns(UserWarning, match="recalibrate: Sequential has no norm with running statistics"):
        assert pp.recalibrate(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)), images()) == ()


def broken():
    yield from images()[:2]
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("loader", "error", "words"),
    [
        (broken(), OSError, "the disk is gone"),
        ([], ValueError, "needs at least one image; the loader is empty"),
        ([*images(), torch.full((3, 2, 6, 6), float("nan")).double()], ValueError, r"norm\.running_mean came out with"),
        ([*images(), "text"], TypeError, "batch 4 is of type str"),
        ([images()[0], torch.zeros(1, 5, 2).double()], RuntimeError, "channels"),
    ],
)
def test_whatever_fails_leaves_the_old_statistics(model, loader, error, words):
    before, momentum = statistics(model), model.norm.momentum
    with pytest.raises(error, match=words):
        pp.recalibrate(model, loader, progress=False)
    assert all(torch.equal(one, before[name]) for name, one in statistics(model).items())
    assert model.norm.momentum == momentum
    assert model.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 0}, "momentum must be above 0 and at most 1, or None; got 0"),
        ({"momentum": "x"}, "momentum must be above 0"),
        ({"batches": 0}, "batches must be a whole number of at least 1, or None; got 0"),
        ({"device": "nowhere"}, "torch cannot use 'nowhere' here"),
    ],
)
def test_settings_are_checked(model, options, words):
    with pytest.raises(ValueError, match=words):
        pp.recalibrate(model, images(), **options)


def test_a_shifted_network_regains_its_accuracy():
    digits = data.digits()
    model = pp.models.vgg_digits(widths=(8, 8, 12, 12, 16, 16))
    torch.manual_seed(0)
    pp.finetune(model, data.loader(digits.train, shuffle=True), epochs=2, lr=0.05, progress=False)
    test = data.loader(digits.test)
    before = pp.evaluate(model, test).top1
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean += 2 * norm.running_var.sqrt()
    shifted = pp.evaluate(model, test).top1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = pp.recalibrate(model, data.loader(digits.train), progress=False)
    after = pp.evaluate(model, test).top1
    assert len(names) == 6
    assert before > 0.85
    assert shifted < before - 0.3
    assert after > before - 0.03


@pytest.mark.gpu
def test_on_a_gpu(model):
    home = copy.deepcopy(model)
    pp.recalibrate(home, images())
    pp.recalibrate(model, images(), device="cuda")
    assert model.norm.running_mean.device.type == "cpu"
    for name, value in statistics(home).items():
        assert (model.get_buffer(name) - value).abs().max() <= STATISTICS
