"""Criteria: each against numbers worked out by hand or an independent float64 computation."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn

import pyprune as pp
from pyprune import criteria
from pyprune.criteria import Context, clusters
from pyprune.criteria.clusters import absorbed
from pyprune.criteria.data import ClassMoments, squared_hellinger
from tolerances import CRITERION_FLOAT64, QUADRATURE


def context_of(model, **more):
    return Context(model, dict(criteria.graph.convolutions(model)), **more)


def scores_of(model, method, **more):
    options = {key: more.pop(key) for key in ("threshold", "seed", "pool", "batches", "eps") if key in more}
    criterion = criteria.find("test", method, options)
    return criterion.scores(model, context_of(model, progress=False, **more))


def hand_layer():
    """Three filters of one channel and two numbers: (3, 4), (0, 0), (3, -4)."""
    layer = nn.Conv2d(1, 3, (1, 2), bias=False)
    layer.weight.data = torch.tensor([[3.0, 4], [0, 0], [3, -4]]).reshape(3, 1, 1, 2)
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("l1", [7, 0, 7]),
        ("l2", [5, 0, 5]),
        ("fpgm", [5 + 8, 5 + 5, 5 + 8]),  # to (0, 0) both are 5 away, and 8 from one another
    ],
)
def test_norms_and_distances_by_hand(method, expected):
    assert scores_of(hand_layer(), method)["0"].tolist() == expected


def layers(seed=0):
    torch.manual_seed(seed)
    return {
        "grouped": nn.Conv2d(4, 6, 3, groups=2),
        "depthwise": nn.Conv2d(5, 10, 3, groups=5),
        "flat": nn.Conv1d(3, 7, 5),
        "deep": nn.Conv3d(2, 5, (1, 2, 3)),
        "single": nn.Conv2d(2, 1, 3),
    }


@pytest.mark.parametrize("kind", list(layers()))
def test_norms_and_distances_of_any_convolution(kind):
    layer = layers()[kind]
    W = [[float(value) for value in row] for row in layer.weight.flatten(1).tolist()]
    expected = {
        "l1": [sum(abs(v) for v in row) for row in W],
        "l2": [sum(v * v for v in row) ** 0.5 for row in W],
        "fpgm": [sum(sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) ** 0.5 for q in W) for p in W],
    }
    for method, values in expected.items():
        found = scores_of(nn.ModuleDict({"layer": layer}), method)["layer"]
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, values, rtol=CRITERION_FLOAT64, atol=CRITERION_FLOAT64)
        if len(values) > 1:
            assert not np.allclose(found[::-1], values, rtol=CRITERION_FLOAT64), "the comparison must see an exchange"


def test_bn_scale_reads_the_norm_behind():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.BatchNorm2d(2),
        nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4, affine=False),
    )  # fmt: skip
    model[1].weight.data = torch.tensor([0.5, -2.0, 0.0])
    assert {name: found.tolist() for name, found in scores_of(model, "bn_scale").items()} == {"0": [0.5, 2, 0]}
    why = "no affine norm reads this layer alone"
    assert criteria.find("test", "bn_scale", {}).left_alone(model, context_of(model)) == {"3": why, "6": why}
    plan = pp.select(model, "bn_scale", rates={"0": 0.5}, exclude=["3", "6"])
    assert plan.keep["0"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="rates names '3', of which there are no scores"):
        pp.select(model, "bn_scale", rates={"0": 0.5, "3": 0.5})


def test_random_depends_on_seed_and_layer_alone():
    one, two = nn.ModuleDict(layers()), nn.ModuleDict(dict(reversed(layers(1).items())))
    first, second, other = (scores_of(model, "random", seed=seed) for model, seed in ((one, 3), (two, 3), (one, 4)))
    for name in first:
        assert first[name].tolist() == second[name].tolist() != other[name].tolist()
    assert first["grouped"].tolist() != first["deep"].tolist()[:6]


def test_absorbed_by_hand():
    # On a line at 1, 2, 10 and 13. Single linkage: 1 and 2 join at height 1 (2 stays), 10 and 13 at 3 (13 stays),
    # both groups at 8 (13 stays). The last gets twice the greatest height.
    points = np.array([[1.0], [2], [10], [13]])
    assert absorbed(points, "single").tolist() == [1, 8, 3, 16]
    assert absorbed(points[:1], "ward").tolist() == [1], "a single filter is never absorbed"
    # Two equal filters: the lower index stays.
    assert absorbed(np.array([[2.0], [2], [0]]), "single").tolist() == [4, 0, 2]


def cup_network():
    """A layer of two filters with bias 1 and 0, read by two outputs."""
    model = nn.Sequential(nn.Conv2d(2, 2, (1, 2)), nn.ReLU(), nn.Conv2d(2, 2, 1))
    model[0].weight.data = torch.tensor([[[[3.0, 4]], [[0, 1]]], [[[0, 0]], [[6, 8]]]])
    model[0].bias.data = torch.tensor([1.0, 0])
    model[2].weight.data = torch.tensor([[1.0, -2], [3, 0]]).reshape(2, 2, 1, 1)
    return model


def test_cup_by_hand():
    model = cup_network()
    context = context_of(model, example_inputs=torch.randn(1, 2, 3, 3))
    features = clusters.cup_features(context)["0"]
    # norms over the two input channels, the bias, and what the two outputs read
    assert features.tolist() == [[5, 1, 1, 1, 3], [0, 10, 0, 2, 0]]
    # They join at their distance, sqrt(25 + 81 + 1 + 1 + 9) = sqrt(117) = 10.82; squared norms are 37 and 104: the
    # second stays.
    scores = scores_of(model, "cup", example_inputs=torch.randn(1, 2, 3, 3))["0"]
    assert scores == pytest.approx([117**0.5, 2 * 117**0.5])
    more = {"example_inputs": torch.randn(1, 2, 3, 3), "exclude": ["2"]}
    assert pp.select(model, "cup", threshold=10.8, **more).keep["0"].tolist() == [0, 1]
    assert pp.select(model, "cup", threshold=10.9, **more).keep["0"].tolist() == [1]
    assert pp.select(model, "cup", threshold=1e9, **more).keep["0"].tolist() == [1], "one always stays"
    with pytest.raises(ValueError, match=r"'cup' needs threshold=, where to cut its dendrograms"):
        pp.select(model, "cup", **more)


def test_cup_sees_groups_and_all_readers_of_a_stream():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 4, 1, bias=False)
            self.grouped = nn.Conv2d(4, 4, 1, groups=2, bias=False)
            self.head = nn.Linear(16, 3, bias=False)

        def forward(self, x):
            x = self.stem(x)
            return self.head((x + self.grouped(x)).flatten(1))

    model = Block()
    features = clusters.cup_features(context_of(model, example_inputs=torch.randn(1, 1, 2, 2)))
    head = model.head.weight.detach().double().reshape(3, 4, 4).norm(dim=2).T.numpy()  # [4 channels, 3 outputs]
    grouped = model.grouped.weight.detach().double().abs().reshape(4, 2).numpy()  # [4 filters, 2 of 4 channels]
    incoming = np.zeros((4, 4))
    incoming[:2, :2], incoming[2:, 2:] = grouped[:2], grouped[2:]
    # filter by filter: norms over 4 input channels, no bias, then the readers: the grouped layer's outputs and the head
    np.testing.assert_allclose(features["grouped"][:, :4], incoming, atol=CRITERION_FLOAT64)
    expected = np.concatenate([incoming.T, head], axis=1)
    np.testing.assert_allclose(features["stem"][:, 2:], expected, atol=CRITERION_FLOAT64)
    np.testing.assert_allclose(features["grouped"][:, 5:], expected, atol=CRITERION_FLOAT64)


def test_ckrm_keeps_one_of_each_group():
    torch.manual_seed(0)
    w = torch.randn(1, 2, 3, 3)
    layer = nn.Conv2d(2, 4, 3)
    layer.weight.data = torch.cat([w, -2 * w, torch.randn(1, 2, 3, 3), 2 * w])
    model = nn.Sequential(layer, nn.ReLU(), nn.Conv2d(4, 2, 1))
    psi = pp.kernel_ssim(layer.weight.detach().double().numpy())
    scores = scores_of(model, "ckrm")["0"]
    # Filters 1 and 3 differ by their sign alone, Psi = 1: the lower index stays. Filter 0 joins them with its Psi, the
    # greatest of the two; filter 2 is like nothing.
    assert psi[1, 3] == pytest.approx(1)
    assert scores[1] == 2
    assert scores[3] == pytest.approx(0)
    assert scores[0] == pytest.approx(1 - max(psi[0, 1], psi[0, 3]))
    assert scores[2] == pytest.approx(1 - psi[2, [0, 1, 3]].max())
    plan = pp.select(model, "ckrm")
    assert plan.keep["0"].tolist() == [1, 2]
    assert plan.why["0"][3].reason == "joined a larger filter at Psi above 0.6"
    assert plan.why["2"].note == "kernels of one number have no structure"
    assert plan.keep["2"].tolist() == [0, 1]
    assert pp.select(model, "ckrm", rates={"0": 0.5, "2": 0.5}).keep["2"].shape == (1,)
    assert pp.select(model, "ckrm", threshold=1.0).keep["0"].tolist() == [0, 1, 2, 3], "nothing is above 1"


def test_ckrm_never_joins_filters_of_other_groups():
    torch.manual_seed(0)
    w = torch.randn(2, 1, 3)
    layer = nn.Conv1d(2, 4, 3, groups=2)
    layer.weight.data = torch.cat([w, w])  # the second group repeats the first
    model = nn.Sequential(layer)
    psi = pp.kernel_ssim(w.double().numpy()[:, :, None])[0, 1]
    scores = scores_of(model, "ckrm")["0"]
    assert sorted(scores[:2].tolist()) == pytest.approx([1 - psi, 2])
    assert scores[:2].tolist() == pytest.approx(scores[2:].tolist())


@pytest.mark.parametrize(("mu", "first", "second"), [(0.0, 1.0, 4.0), (1.5, 1.0, 1.0), (3.0, 0.25, 2.0)])
def test_the_hellinger_distance_is_its_integral(mu, first, second):
    def integrand(x):
        return (norm.pdf(x, 0, first**0.5) ** 0.5 - norm.pdf(x, mu, second**0.5) ** 0.5) ** 2 / 2

    expected = quad(integrand, -40, 40, limit=500, points=[0, mu])[0]
    found = float(squared_hellinger(np.float64(mu**2), np.float64(first), np.float64(second), 1))
    assert found == pytest.approx(expected, abs=QUADRATURE)
    if mu:  # without the factor of 4 it is another number
        printed = 1 - (2 * (first * second) ** 0.5 / (first + second)) ** 0.5 * np.exp(-(mu**2) / (first + second))
        assert abs(printed - expected) > 100 * QUADRATURE


def test_the_hellinger_distance_of_points():
    zero = np.zeros(3)
    assert squared_hellinger(np.array([0.0, 1, 1]), zero, np.array([0.0, 0, 2]), 4).tolist() == [0, 1, 1]


def classified(model_seed=0, images=40, classes=4):
    torch.manual_seed(model_seed)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Conv2d(5, 3, 2), nn.ELU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes),
    )  # fmt: skip
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].weight.normal_()
        model[1].bias.normal_()
    x = torch.randn(images, 2, 6, 6)
    y = torch.arange(images) % classes
    return model, x + y[:, None, None, None] / 2, y


@pytest.mark.parametrize("pool", [True, False])
def test_tvs_against_plain_statistics(pool):
    model, x, y = classified()
    found = scores_of(model, "tvs", pool=pool, data=[(x[:17], y[:17]), (x[17:18], y[17:18]), (x[18:], y[18:])])
    with torch.no_grad():
        maps = model[0](x).double().flatten(2).numpy()
    maps = maps.mean(2, keepdims=True) if pool else maps
    for f in range(5):
        distances = []
        for a in range(4):
            for b in range(a):
                p, q = maps[y.numpy() == a, f], maps[y.numpy() == b, f]
                s, t = p.var(axis=0).mean(), q.var(axis=0).mean()
                gap = ((p.mean(0) - q.mean(0)) ** 2).sum()
                d = p.shape[1]
                distances.append(1 - (2 * (s * t) ** 0.5 / (s + t)) ** (d / 2) * np.exp(-gap / (4 * (s + t))))
        assert found["0"][f] == pytest.approx(min(distances), abs=1e-7)
        assert len(distances) == 6
        assert max(distances) - min(distances) > 1e-5, "least and greatest must differ, or this proves little"


def test_tvs_is_the_same_in_whatever_batches():
    model, x, y = classified()
    order = torch.randperm(len(x))
    whole = scores_of(model.double(), "tvs", data=[(x.double(), y)])
    parts = scores_of(model, "tvs", data=[(x[o].double(), y[o]) for o in order.split(7)])
    for name in whole:
        np.testing.assert_allclose(whole[name], parts[name], atol=CRITERION_FLOAT64)
    fewer = scores_of(model, "tvs", data=[(x[:20].double(), y[:20]), (x[20:].double(), y[20:])], batches=1)
    assert not np.allclose(whole["0"], fewer["0"])


def test_tvs_needs_two_images_of_two_classes():
    moments = ClassMoments()
    moments.add(torch.randn(3, 2, 1).double(), torch.tensor([0, 0, 7]))
    with pytest.raises(ValueError, match="at least two images of each of two classes; class 7 has one"):
        moments.least_distance()
    model, x, _ = classified()
    with pytest.raises(ValueError, match="there is only class 0"):
        scores_of(model, "tvs", data=[(x, torch.zeros(40, dtype=torch.int64))])


def test_taylor_against_differences():
    # The derivative of the loss as a filter's map is scaled away is what Taylor sums: compare with differences.
    model, x, y = classified()
    model = model.double().eval()
    x = x.double()
    found = scores_of(model, "taylor", data=[(x[:9], y[:9]), (x[9:], y[9:])])
    losses = nn.CrossEntropyLoss(reduction="none")

    def loss(module, f, factor):
        def scale(_module, _inputs, output):
            output = output.clone()
            output[:, f] *= factor
            return output

        handle = module.register_forward_hook(scale)
        with torch.no_grad():
            out = losses(model(x), y)
        handle.remove()
        return out

    for name, module in (("0", model[1]), ("3", model[3])):  # maps of the first are read behind its norm
        for f, score in enumerate(found[name].tolist()):
            slope = (loss(module, f, 1 + 1e-5) - loss(module, f, 1 - 1e-5)) / 2e-5
            assert score == pytest.approx(float(slope.abs().mean()), rel=1e-6)
    assert len(set(np.round(found["0"], 9))) == 5


def test_taylor_leaves_the_model_as_it_was():
    model, x, y = classified()
    model.train()
    expected = scores_of(model, "taylor", data=[(x, y)])
    before = {name: one.clone() for name, one in model.state_dict().items()}
    assert model.training
    assert all(one.grad is None for one in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = scores_of(model, "taylor", data=[(x, y)])
    for name in expected:
        np.testing.assert_allclose(frozen[name], expected[name])
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_hooks_are_gone_after_an_error():
    model, x, y = classified()
    for method in ("tvs", "taylor"):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 4\)"):
            pp.select(model, method, data=[(x, y + 1)], rates=0.5)
        with pytest.raises(ValueError, match=f"'{method}' needs data with at least one batch; the loader is empty"):
            pp.select(model, method, data=[], rates=0.5)
        with pytest.raises(ValueError, match=f"'{method}' needs data; pass data=, a loader of training or validation"):
            pp.select(model, method, rates=0.5)
    assert not any(module._forward_hooks for module in model.modules())


class Spread:
    """A criterion of one's own: filters whose weights vary most stay."""

    name = "spread"
    needs = ()

    def scores(self, model, context):
        return {
            name: context.weights(name).reshape(layer.out_channels, -1).std(1) for name, layer in context.layers.items()
        }


def test_a_criterion_of_ones_own():
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Conv2d(8, 4, 3))
    plan = pp.select(model, Spread(), rates=0.5)
    spread = model[0].weight.detach().flatten(1).std(1, correction=0)
    assert plan.keep["0"].tolist() == sorted(spread.topk(4).indices.tolist())
    assert plan.method == "spread"
    assert plan.why["0"][0].score == pytest.approx(float(spread[0]))


def test_criteria_of_other_packages(monkeypatch):
    point = EntryPoint("spread", f"{__name__}:Spread", criteria.GROUP)
    ready = EntryPoint("ready", f"{__name__}:READY", criteria.GROUP)
    monkeypatch.setattr(criteria, "entry_points", lambda group: [point, ready] if group == criteria.GROUP else [])
    model = nn.Sequential(nn.Conv2d(2, 8, 3))
    monkeypatch.setattr(EntryPoint, "load", lambda self: {"spread": Spread, "ready": READY}[self.name])
    expected = pp.select(model, Spread(), rates=0.5)
    assert pp.select(model, "spread", rates=0.5) == expected
    assert pp.select(model, "ready", rates=0.5) == expected
    with pytest.raises(ValueError, match=r"'random', 'ready', 'spread'; got 'sprad'. Did you mean 'spread'\?"):
        pp.select(model, "sprad", rates=0.5)
    with pytest.raises(TypeError, match="spread has its options already; got seed too"):
        pp.select(model, "ready", rates=0.5, seed=1)


READY = Spread()


def scoring(values, name="odd", needs=()):
    return SimpleNamespace(name=name, needs=needs, scores=lambda model, context: values)


@pytest.mark.parametrize(
    ("criterion", "kind", "message"),
    [
        (scoring({"0": np.ones(4)}), ValueError, r"for '0' must be one number a filter, \[8\]; got \[4\]"),
        (scoring({"0": [np.nan] * 8}), ValueError, "must be finite; 8 of 8 are NaN or infinite"),
        (scoring({"0": ["a"] * 8}), TypeError, "must be real numbers; got <U1"),
        (scoring({"1": np.ones(8)}), ValueError, "'odd' scores '1', which is no convolution that was asked for"),
        (scoring([1] * 8), TypeError, "scores of 'odd' must be a mapping from layers; got list"),
        (scoring({}), ValueError, "'odd' has scores for no layer"),
        (scoring({}, needs="data"), TypeError, "'odd' must have needs out of 'ranks', 'data', 'example_inputs'; got"),
        (scoring({}, needs=("luck",)), TypeError, "'odd' must have needs out of"),
        (scoring({}, name=""), TypeError, "a criterion needs a name, needs, and a method"),
        (Spread, TypeError, r"needs a criterion, not its class. Pass Spread\(\)"),
        (7, TypeError, "a criterion needs a name, needs, and a method scores.*; got int"),
    ],
)
def test_criteria_that_are_none(criterion, kind, message):
    with pytest.raises(kind, match=message):
        pp.select(nn.Sequential(nn.Conv2d(2, 8, 3)), criterion, rates=0.5)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("cup", {"threshold": -1}, "threshold must be a number of at least 0; got -1"),
        ("ckrm", {"threshold": 1.5}, "threshold must be a number from 0 to 1; got 1.5"),
        ("ckrm", {"eps": 0}, "eps must be positive"),
        ("random", {"seed": -1}, "seed must be a whole number of at least 0; got -1"),
        ("l1", {"seed": 1}, "'l1' has no option 'seed'; it has none"),
        ("tvs", {"batchs": 1}, "'tvs' has no option 'batchs'; it has pool, batches. Did you mean 'batches'"),
    ],
)
def test_options_that_cannot_be(method, options, message):
    with pytest.raises(ValueError, match=message):
        pp.select(nn.Sequential(nn.Conv2d(2, 8, 3)), method, rates=0.5, **options)
