"""Torch-Pruning as the comparator: where it computes the masked network, pyprune leaves no more parameters than it."""

import pytest
import torch

from zoo import ENTRIES, checking
from zoo import torch_pruning as rival

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not rival.INSTALLED, reason="needs Torch-Pruning: pip install pyprune[compare]"),
    pytest.mark.filterwarnings("ignore"),  # its own
]
RIGHT = {
    "VGG-16, norms", "VGG-11, no norms", "ResNet B, basic", "ResNet B, bottleneck", "ResNet C, basic",
    "ResNet D, bottleneck", "ResNet, pre-activation", "DenseNet", "MobileNet v1", "MobileNet v2", "MobileNet v3",
    "EfficientNet", "EfficientNet, linear squeeze", "SqueezeNet", "GoogLeNet", "Inception, factored",
    "U-Net, transposed", "U-Net, upsampled", "Detector's pyramid", "Series, 1-d", "Volume, 3-d",
}  # fmt: skip
"""The architectures on which Torch-Pruning 1.6.0 was right; losing one would make the comparison say less."""


def on_architecture(name, rate):
    entry = ENTRIES[name]
    torch.manual_seed(0)
    model, x = checking.randomised(entry.build()), torch.randn(entry.shape, dtype=torch.float64)
    plan = rival.agreeing_plan(model, x, rate, 0, entry.heads)
    return rival.compared(model, plan, x)


@pytest.mark.parametrize("rate", [0.25, 0.5])
@pytest.mark.parametrize("name", ENTRIES)
def test_architectures(name, rate):
    theirs, ours = on_architecture(name, rate)
    assert ours.word in ("exact", "kept"), ours
    if rate == 0.5:
        assert (theirs.word == "exact") >= (name in RIGHT), theirs
    if theirs.word == "exact":
        assert ours.parameters <= theirs.parameters


@pytest.mark.parametrize("name", rival.TRAPS)
def test_traps(name):
    found = rival.TRAPS[name]
    theirs, ours = rival.compared(found.model, found.plan, found.x)
    assert ours.word in ("exact", "kept"), ours
    if theirs.word == "exact":
        assert ours.word == "exact"
        assert ours.parameters <= theirs.parameters


def test_a_wrong_network_is_called_wrong():
    found = rival.TRAPS["chain"]
    wrong = rival.judged(lambda: rival.pruned(found.model, found.x, found.plan), found.model, found.model, found.x)
    assert wrong.word == "silently wrong"
    assert wrong.difference > 1e-3
