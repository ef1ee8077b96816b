"""The zoo: whole architectures under random plans. Never a wrong answer, never a crash, and most of the plan leaves."""

import numpy as np
import pytest
import torch
from torch import nn

import pyprune as pp
from pyprune.types import Plan
from zoo import ENTRIES, checking, table

MODES = ("scatter", "intersect", "union")


def made(name, whole=False):
    """Return a network of the zoo, its norms randomised, and images for it, in float64."""
    entry = ENTRIES[name]
    torch.manual_seed(0)
    model = checking.randomised((entry.whole if whole else entry.build)())
    shape = entry.whole_shape if whole else entry.shape
    return entry, model, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", ENTRIES)
def test_slim_equals_masked_and_the_plan_leaves(name, tmp_path):
    entry, model, x = made(name)
    total = checking.Count()
    for seed, rate in enumerate(table.RATES):
        plan = checking.random_plan(model, seed, rate, run=entry.run, heads=entry.heads)
        slim = checking.check(model, plan, x, folder=tmp_path / "slim")
        total.add(checking.count(model, plan, x, slim))
        checking.assert_masks_are_honest(model, plan, x)
    assert total.planned > 0
    assert total.share >= entry.floor, dict(total.refusals)


@pytest.mark.parametrize("name", ENTRIES)
def test_other_modes_on_partial_plans(name):
    """Plans that name some layers only, differ in every layer, and take other numbers from every group."""
    _, model, x = made(name)
    options = ({"residual": "intersect"}, {"residual": "union"}, {"round_to": 4})[list(ENTRIES).index(name) % 3]
    checking.check(model, checking.random_plan(model, 5, 0.5, only=0.7), x, **options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.sweep) for seed in range(2, 6))])
@pytest.mark.parametrize("residual", MODES)
@pytest.mark.parametrize("name", ENTRIES)
def test_many_plans(name, residual, seed, tmp_path):
    _, model, x = made(name)
    rng = np.random.default_rng(seed)
    plan = checking.random_plan(model, seed + 10, rng.uniform(0.1, 0.95), only=rng.uniform(0.2, 1.5))
    checking.check(model, plan, x, folder=tmp_path, residual=residual, round_to=int(rng.choice([1, 1, 2, 8])))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.whole])
def test_whole_networks(name):
    entry, model, x = made(name, whole=True)
    plan = checking.random_plan(model, 0, 0.5, run=entry.run, heads=entry.heads)
    slim = checking.check(model, plan, x)
    assert not entry.mainstream or checking.count(model, plan, x, slim).share >= 80


SENSITIVE = ("VGG-16, norms", "ResNet B, bottleneck", "Detector's pyramid")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SENSITIVE else pytest.mark.slow) for name in ENTRIES]
)
def test_a_wrong_weight_would_be_noticed(name):
    """Whichever layer is wrong, the output shows it; but for a third, since squeezes of a few units may be silent."""
    _, model, x = made(name)
    slim = pp.compact(model, checking.random_plan(model, 0, 0.3), x, latency=False, verify=False).model.eval()
    unnoticed = []
    with torch.no_grad():
        expected = slim(x)
        layers = [one for one in slim.modules() if isinstance(one, checking.MIXERS)]
        for layer in layers:
            own = layer.weight.clone()
            layer.weight *= 1 + 1e-3
            if checking.difference(slim(x), expected) <= checking.COMPACTED_FLOAT64:
                unnoticed.append(layer)
            layer.weight.copy_(own)
    assert len(unnoticed) <= (0 if name in SENSITIVE else len(layers) // 3)


def test_masks_that_silence_the_living_would_be_noticed(monkeypatch):
    _, model, x = made("ResNet B, basic")
    plan = checking.random_plan(model, 0, 0.5)
    checking.assert_masks_are_honest(model, plan, x)
    honest = checking.graph.dead_slices(model, plan)
    alive = int(np.setdiff1d(np.arange(8), honest["layers.0.bn1.weight"])[0])
    monkeypatch.setattr(checking.graph, "dead_slices", lambda *_: {**honest, "layers.0.bn1.weight": np.array([alive])})
    with pytest.raises(AssertionError, match=r"layers\.0\.bn1\.weight is masked where it is alive"):
        checking.assert_masks_are_honest(model, plan, x)


def test_what_is_planned_by_hand():
    """Of a chain: removed filters with their biases, and what the next layer reads of them."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.Flatten()]
    model = checking.randomised(nn.Sequential(*layers, nn.Linear(5 * 4, 2)))
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    plan = Plan({"0": [0], "3": [1, 2]})
    assert checking.planned_weights(model, plan, x) == {
        "0": 3 * (3 * 9 + 1),
        "3": (5 * 4 - 2) * 9,  # all but the crossing of two outputs and one input that stay
        "5": 3 * 4 * 2,
    }
    slim = pp.compact(model, plan, x, latency=False)
    found = checking.count(model, plan, x, slim)
    assert (found.planned, found.removed, found.refusals) == (84 + 162 + 24, 84 + 162 + 24, {})


def test_what_stays_is_not_counted_as_removed():
    torch.manual_seed(0)
    model = checking.randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    plan = Plan({"2": [0]})  # the last one makes the output
    found = checking.count(model, plan, x, pp.compact(model, plan, x, latency=False))
    assert (found.planned, found.removed) == (3 * (4 * 9 + 1), 0)
    assert found.refusals == {"is an output of the model": 3}
