"""Optimizers carried over: training the slim network goes on as training the masked one would have."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_compaction import half, randomised
from test_residual import NETS
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyprune as pp
from pyprune import graph
from pyprune.types import Plan
from tolerances import TRAINED_FLOAT64

OPTIMIZERS = {
    "SGD": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "Adam": lambda p: Adam(p, lr=1e-3, amsgrad=True),
    "AdamW": lambda p: AdamW(p, lr=1e-3, weight_decay=0.1),
    "RMSprop": lambda p: RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "Adagrad": lambda p: Adagrad(p, lr=1e-2),
}


def chain():
    """Return a chain without biases before norms: their gradient is only rounding, which Adam would normalise."""
    return randomised(nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.GELU(), nn.Dropout(0.0), nn.Flatten(),
        nn.Linear(90, 4),
    )).double()  # fmt: skip


PLAN = Plan({"0": [0, 3, 6], "4": [1, 2, 5, 7, 9]})


def steps(model, optimizer, count, seed, after=lambda: None):
    """Train for some steps on batches that only ``seed`` decides."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(count):
        x = torch.randn(6, 2, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(4, (6,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()


def trained(make, seed=0):
    """Return a masked network in the middle of its training, its optimizer, its masks, and its slim twin."""
    torch.manual_seed(seed)
    model = chain()
    masks = pp.mask_(model, PLAN)
    optimizer = make(model.parameters())
    masks.attach(optimizer)
    steps(model, optimizer, 3, seed)
    return model, optimizer, pp.compact(model, PLAN, torch.randn(2, 2, 8, 8).double(), latency=False)


def worst(slim, model):
    """Return the largest difference between slim parameters or statistics and what they come from."""
    own = dict(model.named_parameters())
    return max(
        float((parameter - slim.origins[name].take(own[slim.origins[name].name])).detach().abs().max())
        for name, parameter in slim.model.named_parameters()
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_slim_training_goes_on_as_masked_training_would(name):
    model, optimizer, slim = trained(OPTIMIZERS[name])
    carried, fresh = slim.carry(optimizer, model), copy.deepcopy(slim)
    assert type(carried) is type(optimizer)
    assert worst(slim, model) == 0
    steps(model, optimizer, 5, 7)
    steps(slim.model, carried, 5, 7)
    assert worst(slim, model) <= TRAINED_FLOAT64
    x = torch.randn(3, 2, 8, 8).double()
    assert (slim.model.eval()(x) - model.eval()(x)).abs().max() <= TRAINED_FLOAT64 * 10
    steps(fresh.model, OPTIMIZERS[name](fresh.model.parameters()), 5, 7)  # without the state it goes elsewhere
    assert worst(fresh, model) > 1e3 * TRAINED_FLOAT64


def test_one_number_of_the_state_would_be_missed():
    model, optimizer, slim = trained(OPTIMIZERS["SGD"])
    carried = slim.carry(optimizer, model)
    carried.state[carried.param_groups[0]["params"][0]]["momentum_buffer"].view(-1)[0] += 1e-6
    steps(model, optimizer, 5, 7)
    steps(slim.model, carried, 5, 7)
    assert worst(slim, model) > 1e3 * TRAINED_FLOAT64


def test_state_by_hand_and_nothing_shared():
    model, optimizer, slim = trained(OPTIMIZERS["Adam"])
    before = copy.deepcopy(optimizer.state_dict())
    carried = slim.carry(optimizer, model)
    assert vars(carried).keys() == vars(optimizer).keys()
    state, own = carried.state[slim.model.get_submodule("4").weight], optimizer.state[model[4].weight]
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(state[key], own[key][[1, 2, 5, 7, 9]][:, [0, 3, 6]])
    assert state["step"] == own["step"] == 3
    linear = carried.state[slim.model.get_submodule("9").weight]["exp_avg"]
    columns = (np.array([1, 2, 5, 7, 9])[:, None] * 9 + np.arange(9)).reshape(-1)
    assert torch.equal(linear, optimizer.state[model[9].weight]["exp_avg"][:, columns])
    steps(slim.model, carried, 2, 1)
    after = optimizer.state_dict()
    assert all(torch.equal(one[key], before["state"][i][key]) for i, one in after["state"].items() for key in one)
    assert not carried._optimizer_step_post_hooks
    assert optimizer._optimizer_step_post_hooks


def test_groups_their_names_and_schedulers():
    torch.manual_seed(0)
    model = chain()
    named = list(model.named_parameters())
    model[1].bias.requires_grad_(False)
    optimizer = SGD([
        {"params": [pair for pair in named if pair[1].ndim > 1], "weight_decay": 0.1},
        {"params": [pair for pair in named if pair[1].ndim == 1], "lr": torch.tensor(0.5)},
    ], lr=0.1, momentum=0.9)  # fmt: skip
    scheduler = CosineAnnealingLR(optimizer, 10)
    for _ in range(3):
        steps(model, optimizer, 1, 0)
        scheduler.step()
    slim = pp.compact(model, PLAN, torch.randn(2, 2, 8, 8).double(), latency=False)
    carried = slim.carry(optimizer, model)
    twin = CosineAnnealingLR(carried, 10)
    twin.load_state_dict(scheduler.state_dict())
    names = {id(parameter): name for name, parameter in slim.model.named_parameters()}
    for group, old in zip(carried.param_groups, optimizer.param_groups, strict=True):
        assert [names[id(one)] for one in group["params"]] == group["param_names"] == old["param_names"]
        assert {key: group[key] for key in ("lr", "weight_decay", "initial_lr", "momentum")} == {
            key: old[key] for key in ("lr", "weight_decay", "initial_lr", "momentum")
        }
    assert carried.param_groups[1]["lr"] is not optimizer.param_groups[1]["lr"]
    assert slim.model.get_parameter("1.bias") not in carried.state
    carried.step()
    optimizer.step()
    twin.step()
    scheduler.step()
    assert twin.get_last_lr() == scheduler.get_last_lr()
    assert carried.state_dict()["param_groups"][0]["params"] == [0, 1, 2]


def test_biases_that_folding_makes_begin_without_state():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 4, 3, bias=False), nn.Conv2d(4, 5, 1), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(80, 4),
    ).double()  # fmt: skip
    optimizer = AdamW([
        {"params": model[2].parameters(), "lr": 0.3}, {"params": [*model[0].parameters(), *model[6].parameters()]},
    ])  # fmt: skip
    steps(model, optimizer, 2, 0)
    slim = pp.compact(model, Plan({"0": [0, 2], "3": [1, 4]}), torch.randn(2, 2, 8, 8).double(), latency=False)
    made = slim.model.get_parameter("2.bias")
    assert "2.bias" not in slim.origins
    carried = slim.carry(optimizer, model)
    assert any(one is made for one in carried.param_groups[0]["params"])
    assert made not in carried.state
    folded = slim.model.get_parameter("6.bias")  # had a bias before: its moments go on
    assert torch.equal(carried.state[folded]["exp_avg"], optimizer.state[model[6].bias]["exp_avg"])
    trained_elsewhere = [one for name in ("3.weight", "3.bias") for one in [slim.model.get_parameter(name)]]
    assert not any(one is other for one in trained_elsewhere for g in carried.param_groups for other in g["params"])
    steps(slim.model, carried, 2, 1)
    assert carried.state[made]["step"] == 2
    assert carried.state[folded]["step"] == 4


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("mode", ["scatter", "intersect", "union"])
def test_origins_say_where_every_number_comes_from(net, mode):
    torch.manual_seed(0)
    model = randomised(NETS[net]())
    own = dict(model.named_parameters())
    slim = pp.compact(model, half(model), torch.randn(2, 2, 8, 8), residual=mode, latency=False, verify=False)
    assert set(slim.origins) == {name for name, _ in slim.model.named_parameters()}
    cut = 0
    for name, parameter in slim.model.named_parameters():
        origin = slim.origins[name]
        source = own[origin.name]
        assert tuple(source.shape) == origin.shape
        same = origin.take(source) == parameter
        assert same.all() or name in graph_zeroed(model, slim)
        assert torch.equal(origin.take(source), source[tuple(map(torch.from_numpy, origin.index))])
        assert np.array_equal(source.detach().numpy()[origin.index], origin.take(source).detach().numpy())
        cut += parameter.shape != source.shape
    assert cut > 6


class Kinds(nn.Module):
    """A grouped, a depthwise and a transposed convolution, a GroupNorm, and a weight that is computed."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.grouped, self.depthwise = nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.Conv2d(12, 12, 3, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 4, 1))

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        return self.weighted(F.relu(self.up(F.relu(self.depthwise(self.grouped(x))))))


def test_origins_of_other_kinds():
    torch.manual_seed(0)
    model = Kinds().double()
    plan = Plan({"stem": [0, 1, 6, 7], "grouped": [1, 2, 4, 6, 8, 11], "up": [0, 3, 5]})
    slim = pp.compact(model, plan, torch.randn(2, 2, 8, 8).double(), latency=False)
    own, found = dict(model.named_parameters()), dict(slim.model.named_parameters())
    assert set(found) - set(slim.origins) == {"weighted.weight"}  # computed from others
    for name, origin in slim.origins.items():
        assert torch.equal(origin.take(own[name]), found[name]), name
    cut = {name for name, origin in slim.origins.items() if origin.index}
    assert {"stem.weight", "norm.weight", "grouped.weight", "depthwise.weight", "up.weight", "up.bias"} <= cut
    assert slim.origins["grouped.weight"].index[1].shape[0] in (1, len(found["grouped.weight"]))
    optimizer = AdamW(model.parameters())
    model(torch.randn(2, 2, 8, 8).double()).sum().backward()
    optimizer.step()
    carried = slim.carry(optimizer, model)
    for name, origin in slim.origins.items():
        assert torch.equal(carried.state[found[name]]["exp_avg"], origin.take(optimizer.state[own[name]]["exp_avg"]))
    assert any(one is found["weighted.weight"] for one in carried.param_groups[0]["params"])


def graph_zeroed(model, slim):
    """Return the parameters that hold zeros of filters that stayed against the plan."""
    return set(graph.dead_slices(model, slim.plan)) if slim.kept or slim.beyond else set()


def test_wrapped_models_are_taken_out():
    model, optimizer, slim = trained(OPTIMIZERS["SGD"])
    one, other = slim.carry(optimizer, model), slim.carry(optimizer, nn.DataParallel(model))
    for left, right in zip(one.state.values(), other.state.values(), strict=True):
        assert torch.equal(left["momentum_buffer"], right["momentum_buffer"])


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("none", TypeError, "Compacted.carry: needs a torch optimizer; got str"),
        ("other", ValueError, "the optimizer must train the given model; 8 of its 8 parameters are not the model's"),
        ("wider", ValueError, r"must be the one that was compacted; '0\.weight' comes from a parameter of shape"),
        ("slim", ValueError, r"'0\.weight' comes from a parameter of shape \[8, 2, 3, 3\] and the model has \[3, 2"),
        ("lbfgs", ValueError, "LBFGS keeps one state for all parameters together"),
        ("adafactor", ValueError, r"'row_var' of '0\.weight' has shape .* cannot be cut by index"),
        ("list", ValueError, r"cannot tell what belongs to which element in 'history' of '0\.weight', a list"),
    ],
)
def test_what_cannot_be_carried_is_refused(case, error, words):
    model, optimizer, slim = trained(OPTIMIZERS["SGD"])
    if case == "none":
        optimizer = "SGD"
    elif case == "other":
        model = copy.deepcopy(model)
    elif case == "wider":
        model = nn.Sequential(nn.Conv2d(2, 9, 3))
        optimizer = SGD(model.parameters(), lr=0.1)
    elif case == "slim":
        model = slim.model
        optimizer = SGD(model.parameters(), lr=0.1)
    elif case == "lbfgs":
        optimizer = LBFGS(model.parameters())
    elif case == "adafactor":
        optimizer = Adafactor(model.parameters())
        steps(model, optimizer, 1, 0)
    elif case == "list":
        optimizer.state[model[0].weight]["history"] = [1, 2]
    with pytest.raises(error, match=words):
        slim.carry(optimizer, model)


@pytest.mark.gpu
def test_on_a_gpu():
    model, optimizer, slim = trained(OPTIMIZERS["AdamW"])
    model, make = copy.deepcopy(model).cuda(), OPTIMIZERS["AdamW"]
    optimizer = make(model.parameters())
    x = torch.randn(4, 2, 8, 8, device="cuda", dtype=torch.float64)
    model(x).sum().backward()
    optimizer.step()
    slim = pp.compact(model, PLAN, x, latency=False)
    carried = slim.carry(optimizer, model)
    for parameter, state in carried.state.items():
        assert parameter.device.type == state["exp_avg"].device.type == "cuda"
    carried.step()
