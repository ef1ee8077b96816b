import copy
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyprune as pp
from pyprune import redundancy, watching
from pyprune.finetuning import finetune
from pyprune.watching import LEVELS, Watch


def net(width=24, dropout=0.3):
    """Two plain convolutions, a grouped one, a depthwise one and a 1x1 one, with norms and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(dropout),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, groups=2), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, groups=2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
        )  # fmt: skip


def images(count=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 9, 9, generator=generator), torch.arange(count) % 3


def watch(model=None, given=None, **options):
    return Watch(model or net(), given, **{"log": [], "budget": 1.0, **options})


def waited(one, seconds=1e6):
    """Let the budget be ample, or ``seconds`` since the last measurement."""
    one._ended = watching.perf_counter() - seconds
    return one


# what is measured


def test_a_row_has_what_ckrm_says():
    model = net()
    row = waited(watch(model, thresholds=(0.3, 0.6)))(4)
    whole = pp.ckrm(model, thresholds=(0.3, 0.6), progress=False)
    names = ["0", "4", "7"]  # the depthwise one has no pairs and the 1x1 one no structure
    for name in names:
        layer = whole[name]
        assert row[f"redundancy/lambda/{name}"] == layer.lambdas[0, 0]
        assert row[f"redundancy/lambda_0.6/{name}"] == layer.lambdas[0, 1]
        assert row[f"redundancy/above_random/{name}"] == layer.above_random_share
    assert row["redundancy/lambda_mean"] == pytest.approx(np.mean([whole[name].lambdas[0, 0] for name in names]))
    assert row["redundancy/lambda/0"] > row["redundancy/lambda_0.6/0"]
    assert row["epoch"] == 4
    assert row["watch/pairs"] == 1
    assert row["watch/done"] == "all pairs, 0 images"
    assert {key.rpartition("/")[2] for key in row if "lambda/" in key} == set(names)
    assert not any(key.startswith("ranks") for key in row)


def test_what_training_makes_alike_is_seen():
    model = net()
    one = watch(model)
    before = waited(one)(1)
    with torch.no_grad():
        model[0].weight[5:] = -model[0].weight[:1]
    after = waited(one)(2)
    assert before["redundancy/lambda/0"] < 0.3
    assert after["redundancy/lambda/0"] > 0.6
    assert after["redundancy/lambda/4"] == before["redundancy/lambda/4"]


def test_ranks_are_those_of_the_class_conditional_ranks():
    model, batch = net(), images()
    row = waited(watch(model, batch))(1)
    expected = pp.rank_filters(model, DataLoader(TensorDataset(*batch), 12), images_per_class=4, progress=False)
    for name, R in expected.layers.items():
        assert row[f"ranks/mean/{name}"] == pytest.approx(R.mean())
        assert row[f"ranks/full/{name}"] == expected.full_rank_share(name)
        assert row[f"ranks/spread/{name}"] == pytest.approx(R.std(axis=1).mean())
    assert row["ranks/spread/0"] > 0
    assert row["watch/images"] == 12
    alone = waited(watch(model, batch[0]))(1)
    assert alone["ranks/mean/4"] == pytest.approx(row["ranks/mean/4"])
    assert not any(key.startswith("ranks/spread") for key in alone)


def test_labels_may_be_any_classes():
    row = waited(watch(net(), (images()[0], [7, 3, 90] * 4)))(1)
    assert row["ranks/spread/0"] == waited(watch(net(), images()))(1)["ranks/spread/0"]


def test_the_null_is_drawn_once(monkeypatch):
    drawn = []
    monkeypatch.setattr(watching, "random_kernels", lambda *a: drawn.append(a) or redundancy.random_kernels(*a))
    one = watch()
    assert len(drawn) == 3
    for epoch in range(3):
        waited(one)(epoch)
    assert len(drawn) == 3


# what is not touched


def state(model):
    """Everything that a watch must leave alone, in a form that compares by bits."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    asks = {name: p.requires_grad for name, p in model.named_parameters()}
    flags = {name: module.training for name, module in model.named_modules()}
    hooks = {
        (name, kind): list(getattr(module, kind))
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    }
    own = {name: sorted(vars(module)) for name, module in model.named_modules()}
    return {"tensors": tensors, "gradients": gradients, "asks": asks, "flags": flags, "hooks": hooks, "own": own}


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def same(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    return first == second


class Drawing(nn.Module):
    """Draws from every generator whatever mode it is in."""

    def forward(self, x):
        return x + torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002, S311


def trained():
    """A network in the middle of training: gradients, mixed flags, a frozen parameter, hooks."""
    model = net()
    nn.functional.cross_entropy(model(images()[0]), images()[1]).backward()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[2].register_forward_hook(lambda *args: None)
    model[4].register_forward_pre_hook(lambda *args: None)
    return model


def test_nothing_of_the_model_changes_and_no_random_state():
    model = trained()
    expected = copy.deepcopy(state(model))
    numbers = random_states()
    one = watch(model, images())
    for epoch in range(3):
        waited(one)(epoch)
    assert same(state(model), expected)
    assert random_states() == numbers


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[0].weight.data[0, 0, 0, 0].add_(1e-6),
        lambda model: model[1].running_mean.add_(1e-6),
        lambda model: model[4].weight.grad[0, 0, 0, 0].add_(1e-3),
        lambda model: model[3].train(not model[3].training),
        lambda model: model[0].bias.requires_grad_(True),
        lambda model: model[5].register_forward_hook(print),
        lambda model: setattr(model, "forward", print),
    ],
)
def test_the_comparison_would_notice(change):
    model = trained()
    expected = copy.deepcopy(state(model))
    change(model)
    assert not same(state(model), expected)


def test_a_model_that_draws_in_eval_mode_leaves_no_trace():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.draw, self.rest = nn.RReLU(), net()  # a leaf to torch.fx
            self.draw.forward = Drawing().forward

        def forward(self, x):
            return self.rest(self.draw(x))

    numbers = random_states()
    one = watch(Noisy(), images())
    waited(one)(1)
    assert random_states() == numbers
    one._probes[1.0].ranks(one.model)  # without what keeps them
    assert random_states() != numbers


@pytest.mark.parametrize("through", ["log", "own loop"])
def test_training_ends_with_the_same_bits(through):
    def run(watched):
        model = net()
        loader = DataLoader(TensorDataset(*images(30)), 10, shuffle=True, generator=torch.Generator().manual_seed(3))
        one = watch(model, images()) if watched else lambda epoch: None
        if through == "log":
            finetune(model, loader, epochs=3, lr=0.05, progress=False, log=one)
            return model
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for epoch in range(3):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
            one(epoch)
        return model

    assert same(state(run(True)), state(run(False)))


# the budget


class Clock:
    """Time that passes only where a test says so: a measurement of level s takes ``cost * s``."""

    def __init__(self, monkeypatch, cost=1.0):
        self.now, self.cost = 0.0, cost
        monkeypatch.setattr(watching, "perf_counter", lambda: self.now)
        measure = Watch._measure

        def slow(one, share):
            self.now += self.cost * share
            return measure(one, share)

        monkeypatch.setattr(Watch, "_measure", slow)

    def after(self, one, epoch, seconds):
        self.now += seconds
        return one(epoch)


def test_a_measurement_takes_its_share_of_an_epoch_at_most(monkeypatch):
    clock = Clock(monkeypatch)
    one = watch(net(), images(), budget=0.02)
    done = [clock.after(one, epoch, seconds) for epoch, seconds in enumerate((100, 50, 49, 12.5, 12, 3.2, 3, 3))]
    assert [round(row["watch/pairs"], 2) for row in done[:2]] == [1, 1]
    assert [row.get("watch/images") for row in done] == [12, 12, 3, 3, 1, 1, None, 1]
    assert all(row.get("watch/share", 0) <= 0.02 for row in done)
    assert done[2]["watch/done"].endswith("of the pairs, 3 images")
    assert done[6]["watch/done"] == "skipped: 0.062 s is more than 2.00% of 3 s"
    assert not any(key.startswith("redundancy") for key in done[6])
    assert done[7]["watch/seconds"] == 1 / 16  # after two epochs there is time for it
    assert done[7]["watch/share"] == pytest.approx(1 / 16 / 6)


def test_one_hiccup_changes_nothing_and_a_slow_machine_lowers_the_level_until_it_is_fast_again(monkeypatch):
    clock = Clock(monkeypatch)
    one = watch(budget=0.02)
    pairs = []
    for epoch, cost in enumerate((9, 1, 9, 9, 9, 1, 1, 1, 1)):
        clock.cost = cost
        pairs.append(clock.after(one, epoch, 60)["watch/pairs"])
    assert [share == 1 for share in pairs] == [True, True, True, False, False, False, False, True, True]


def test_the_time_of_the_log_counts(monkeypatch):
    clock = Clock(monkeypatch)

    def slow(row):
        clock.now += 0.5

    one = watch(budget=0.02, log=slow)
    pairs = [clock.after(one, epoch, 60)["watch/pairs"] for epoch in range(4)]
    assert [share == 1 for share in pairs] == [True, True, False, False]  # 1 s of 1.2 s is left, then 0.7 s
    clock.cost = 1.0
    assert clock.after(one, 5, 80)["watch/pairs"] == 1


@pytest.mark.parametrize("share", LEVELS)
def test_fewer_pairs_are_those_among_some_filters(share):
    """Equal to ckrm of a network that has those filters alone, each group by itself."""
    model = net(32)
    one = watch(model)
    found = one._redundancy(share)
    kernels = one._kernels()
    compared = 0
    for name in ("0", "4", "7"):
        chosen = one._filters(name, kernels[name], share)
        assert chosen.shape == (kernels[name].groups, max(8, round(chosen.shape[1])))
        filters = kernels[name].shape[0] // kernels[name].groups
        assert chosen.shape[1] == max(8, round(filters * share**0.5))
        weight = kernels[name].weight
        psi = [
            pp.kernel_ssim(weight[rows], eps_absolute=1e-2 * float(_scale(weight, rows, kernels[name].groups)))
            for rows in chosen
        ]
        upper = np.concatenate([np.asarray(one)[np.triu_indices(len(one), 1)] for one in psi])
        assert found[f"redundancy/lambda/{name}"] == pytest.approx((upper > 0.6).mean(), abs=1e-12)
        compared += len(upper)
    assert found["watch/pairs"] == pytest.approx(compared / one._all_pairs)


def _scale(weight, rows, groups):
    """The mean square to which eps is relative: of the whole layer where groups are, of the filters taken elsewhere."""
    return (weight if groups > 1 else weight[rows]).double().square().mean()


def test_the_filters_of_a_level_are_the_same_every_time_and_among_those_of_the_next():
    one, other = watch(net(32)), watch(net(32), seed=1)
    kernels = one._kernels()["4"]
    nested = [set(one._filters("4", kernels, share)[0].tolist()) for share in LEVELS]
    assert nested[0] > nested[1] > nested[2]
    assert nested == [set(one._filters("4", kernels, share)[0].tolist()) for share in LEVELS]
    assert nested[2] != set(other._filters("4", kernels, LEVELS[2])[0].tolist())


def test_fewer_images_come_from_every_class():
    labels = torch.arange(48) // 16
    one = watch(net(), (images(48)[0], labels))
    assert [len(probe.images) for probe in one._probes.values()] == [48, 12, 3]
    assert [np.bincount(probe.labels).tolist() for probe in one._probes.values()] == [[16] * 3, [4] * 3, [1] * 3]


def test_every_so_many_epochs():
    rows = []
    one = watch(log=rows.append, every=3)
    for epoch in range(1, 8):
        waited(one)(epoch)
    assert [row["epoch"] for row in rows] == [3, 6]
    waited(one)({"epoch": 7, "loss": 0.5})
    assert rows[-1] == {"epoch": 7, "loss": 0.5}  # a row of one's own is never lost


# where the rows go


def test_rows_of_finetune_go_through_it_into_a_file(tmp_path):
    path = tmp_path / "redundancy.jsonl"
    model = net()
    loader = DataLoader(TensorDataset(*images(30)), 10)
    history = finetune(model, loader, epochs=2, progress=False, log=watch(model, images(), log=path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["train_loss"] for row in rows] == [epoch.train_loss for epoch in history.epochs]
    assert all("redundancy/lambda/4" in row and "ranks/mean/4" in row for row in rows)


def test_a_continued_run_repeats_no_row(tmp_path):
    path = tmp_path / "redundancy.jsonl"
    for start in (1, 3):  # killed after epoch 4, continued from the checkpoint of epoch 2
        one = watch(log=path)
        for epoch in range(start, 5):
            waited(one)(epoch)
    assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_tensorboard_gets_a_scalar_a_layer_and_no_words():
    scalars = []
    writer = SimpleNamespace(add_scalar=lambda name, value, step: scalars.append((name, value, step)))
    row = waited(watch(net(), images(), log=writer))(5)
    assert ("redundancy/lambda/4", row["redundancy/lambda/4"], 5) in scalars
    assert all(isinstance(value, (int, float)) and step == 5 for _, value, step in scalars)
    assert "watch/done" not in [name for name, _, _ in scalars]


# what goes wrong


def test_weights_that_are_not_finite_do_not_end_training():
    model = net()
    one = watch(model)
    with torch.no_grad():
        model[4].weight[0] = float("nan")
    row = waited(one)(1)
    assert row["watch/done"].startswith("nothing: kernel_ssim: ")
    assert "finite" in row["watch/done"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"budget must be a share of an epoch in \(0, 1\]; got 0"),
        ({"budget": 2}, r"budget must be a share of an epoch in \(0, 1\]; got 2"),
        ({"every": 0}, "every must be a whole number of epochs, at least 1; got 0"),
        ({"eps": 0}, "eps must be a positive, finite number; got 0"),
        ({"thresholds": ()}, r"thresholds must be different numbers in \[0, 1\], at least one; got \[\]"),
        ({"thresholds": (0.5, 1.5)}, r"thresholds must be different numbers in \[0, 1\]"),
        ({"given": torch.zeros(3, 4)}, r"images must be a tensor \[N, C, H, W\], .*got \[3, 4\]"),
        ({"given": torch.zeros(0, 1, 9, 9)}, r"got \[0, 1, 9, 9\]"),
        ({"given": (torch.zeros(3, 1, 9, 9), [0, 1])}, "needs one label per image; got 2 labels for 3 images"),
        ({"model": nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))}, "needs a convolution with two K x K filters"),
        ({"model": nn.Linear(2, 2)}, "needs a 2-d convolution with kernels larger than 1x1"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=f"Watch: .*{message}"):
        watch(**options)


@pytest.mark.parametrize("epoch", [-1, True, None, 1.5, {"loss": 2.0}])
def test_an_epoch_is_a_number(epoch):
    with pytest.raises(ValueError, match="Watch: needs the number of an epoch, or a row that has one; got"):
        watch()(epoch)


def test_a_log_must_be_one():
    with pytest.raises(TypeError, match="Watch: log must be a path, a callable or have"):
        watch(log=5)
