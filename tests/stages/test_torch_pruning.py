"""Beside Torch-Pruning: where it computes the masked network, pyprune computes the same one, as small or smaller."""

import numpy as np
import pytest
import torch
from torch import nn

from pyprune.types import Plan
from tolerances import COMPACTED_FLOAT64
from zoo import ENTRIES, beside, checking
from zoo.traps import TRAPS


@pytest.fixture
def installed():
    pytest.importorskip("torch_pruning", reason="Torch-Pruning is not installed: pip install 'pyprune[compare]'")


@pytest.mark.parametrize("name", TRAPS)
def test_traps_are_exact(name):
    ours = beside.pyprune(*beside.trap_case(TRAPS[name])[:3])
    assert ours.verdict == beside.EXACT, ours.note


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", [*TRAPS, *ENTRIES])
def test_the_same_network_and_no_larger(name):
    for _, _, model, plan, x, heads in beside.cases([name]):
        ours = beside.pyprune(model, plan, x)
        assert ours.verdict == beside.EXACT, ours.note
        theirs = beside.torch_pruning(model, plan, x, heads)
        if theirs.verdict != beside.EXACT:
            continue
        assert_no_larger(beside.pyprune(model, beside.plan_of(model, theirs.gone), x), theirs, x)
        if beside.as_planned(model, plan, theirs.gone):
            assert_no_larger(ours, theirs, x)


@torch.no_grad()
def assert_no_larger(ours, theirs, x):
    assert ours.verdict == beside.EXACT, ours.note
    assert ours.parameters <= theirs.parameters
    assert checking.difference(ours.model(x), theirs.model(x)) <= COMPACTED_FLOAT64


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["chain with norms", "sum, differing filters", "depthwise", "VGG-16, norms"])
def test_the_comparison_is_not_empty_and_notices_a_wrong_weight(name):
    _, _, model, plan, x, heads = next(iter(beside.cases([name])))
    theirs = beside.torch_pruning(model, plan, x, heads)
    assert theirs.verdict == beside.EXACT, theirs.note
    assert theirs.parameters < beside.parameters(model)
    assert beside.judged(model, theirs.model, theirs.gone, x)[0] == beside.EXACT
    for layer in theirs.model.modules():
        if isinstance(layer, checking.MIXERS):
            layer.weight.data *= 1 + 1e-3
            break
    assert beside.judged(model, theirs.model, theirs.gone, x)[0] == beside.DIFFERS


def test_what_goes_beyond_the_plan_by_hand():
    model, *_ = beside.trap_case(TRAPS["sum, differing filters"])
    gone = {("a", "out"): {1, 4, 6}, ("b", "out"): {1, 2}, ("end", "in"): {1, 2, 4, 6}}
    plan = Plan({"a": [0, 2, 3, 5, 7], "b": [0, 2, 3, 4, 5, 6, 7]})
    assert beside.beyond(model, plan, gone) == 1
    assert beside.beyond(model, plan, {}) == 0
    assert not beside.as_planned(model, plan, gone)
    assert not beside.as_planned(model, plan, {("a", "out"): {1, 4, 6}})
    assert beside.as_planned(model, plan, {**gone, ("b", "out"): {1}})
    assert {name: kept.tolist() for name, kept in beside.plan_of(model, gone).keep.items()} == {
        "a": [0, 2, 3, 5, 7], "b": [0, 3, 4, 5, 6, 7],
    }  # fmt: skip


def test_the_reference_networks_by_hand():
    """Masked: what makes the channel is zero. Cut: what reads it too, so that the sigmoid's half is gone."""
    model = checking.randomised(
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Sigmoid(), nn.Conv2d(2, 2, 1, groups=2))
    )
    gone = {("0", "out"): {1}, ("1", "out"): {1}, ("3", "in"): {1}}
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    end = model[3]
    masked, cut = (beside.without(model, gone, readers=readers)(x) for readers in (False, True))
    assert torch.allclose(masked[:, 1], 0.5 * end.weight[1, 0] + end.bias[1], rtol=0, atol=COMPACTED_FLOAT64)
    assert torch.allclose(cut[:, 1], end.bias[1].expand(3, 4, 4), rtol=0, atol=COMPACTED_FLOAT64)
    assert torch.equal(masked[:, 0], model(x)[:, 0])
    assert torch.equal(cut[:, 0], model(x)[:, 0])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_blinded_layer_reads_no_more_and_no_less(kind, groups):
    layer = checking.randomised(kind(8, 12, 1, groups=groups))
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    silent = x.index_fill(1, torch.tensor([1, 6]), 0)
    expected = layer(silent).detach()
    assert np.abs((layer(x) - expected).detach().numpy()).max() > 1e-3
    beside.blind(layer, torch.tensor([1, 6]))
    assert torch.allclose(layer(x), expected, rtol=0, atol=COMPACTED_FLOAT64)
