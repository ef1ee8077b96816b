"""Taps: which node of the graph is read for each convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyprune import models
from pyprune.features import Tap, find_taps


class Block(nn.Module):
    """A basic residual block with functional activations and a projection."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y)


class Odd(nn.Module):
    """One convolution for every way in which a path can end."""

    def __init__(self):
        super().__init__()
        self.forks, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.pools = nn.Conv2d(3, 3, 1)
        self.twice = nn.Conv2d(3, 3, 1)
        self.never = nn.Conv2d(3, 3, 1)
        self.shifted = nn.Conv2d(3, 3, 1)
        self.ends = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.norm(self.forks(x))
        y = F.relu(y) + torch.sigmoid(y)
        y = F.max_pool2d(self.pools(y), 2)
        y = self.twice(self.twice(y))
        y = self.shifted(y) + 1
        return self.ends(y)


def chain(*modules):
    return nn.Sequential(nn.Conv2d(1, 2, 3), *modules)


def test_a_basic_block_is_read_after_the_addition():
    assert find_taps(Block()) == {
        "conv1": Tap("conv1", "relu"),
        "conv2": Tap("conv2", "relu_1"),
        "shortcut.0": Tap("shortcut.0", "relu_1"),
    }


def test_norm_taps_stop_before_the_addition():
    taps = find_taps(Block(), taps="norm")
    assert [tap.node for tap in taps.values()] == ["bn1", "bn2", "shortcut_1"]
    assert not any(tap.note for tap in taps.values())


def test_what_cannot_be_followed_is_read_before_it_and_says_so():
    taps = find_taps(Odd())
    assert taps == {
        "forks": Tap("forks", "norm", "read at its norm's output: the path forks after norm before an activation"),
        "pools": Tap("pools", "pools", "read at its own output: the path meets max_pool2d before an activation"),
        "shifted": Tap("shifted", "shifted", "read at its own output: the path meets add_1 before an activation"),
        "ends": Tap("ends", "ends", "read at its own output: the path meets output before an activation"),
    }


def test_a_norm_after_the_addition_is_passed_but_never_read_in_its_place():
    class Late(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.conv, self.norm, self.activation = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), activation

        def forward(self, x):
            return self.activation(self.norm(torch.add(x, self.conv(x))))

    assert find_taps(Late(nn.ReLU()))["conv"].node == "activation"
    assert find_taps(Late(nn.MaxPool2d(2)))["conv"].node == "conv"


@pytest.mark.parametrize(
    "module", [nn.ReLU(), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Sigmoid(), nn.Tanh(), nn.PReLU(), nn.ELU()]
)
def test_activation_modules_behind_norm_and_dropout(module):
    taps = find_taps(chain(nn.GroupNorm(1, 2), nn.Dropout2d(), nn.Identity(), module))
    assert taps["0"] == Tap("0", "_4")
    assert find_taps(chain(nn.GroupNorm(1, 2), nn.Dropout2d(), module), taps="norm")["0"].node == "_1"


@pytest.mark.parametrize(
    ("function", "node"),
    [
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (lambda x: x.relu(), "relu"),
        (lambda x: x.relu_(), "relu_"),
        (lambda x: F.relu(input=x, inplace=True), "relu"),
        (lambda x: x.clamp(min=0), "clamp"),
        (lambda x: torch.clamp_min(x, 0), "clamp_min"),
        (F.silu, "silu"),
        (F.gelu, "gelu"),
        (F.hardswish, "hardswish"),
        (torch.sigmoid, "sigmoid"),
        (lambda x: F.leaky_relu(F.dropout(x, training=False)), "leaky_relu"),
        (lambda x: torch.tanh(F.instance_norm(x)), "tanh"),
    ],
)
def test_activation_functions_and_methods(function, node):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            return function(self.conv(x))

    assert find_taps(Net()) == {"conv": Tap("conv", node)}


def test_layers_by_name_are_a_checked_subset():
    assert list(find_taps(Block(), ["conv2", "conv1"])) == ["conv2", "conv1"]
    with pytest.raises(ValueError, match=r"no convolution named 'conv3'. Did you mean 'conv2'"):
        find_taps(Block(), ["conv3"])
    with pytest.raises(ValueError, match="twice"):
        find_taps(Block(), ["conv1", "conv1"])
    with pytest.raises(TypeError, match=r"Pass \['conv1'\]"):
        find_taps(Block(), "conv1")
    with pytest.raises(ValueError, match=r"'twice' is called 2 times in one forward pass.*Leave it out"):
        find_taps(Odd(), ["twice"])
    with pytest.raises(ValueError, match="'never' is never called"):
        find_taps(Odd(), ["never"])
    with pytest.raises(ValueError, match="2-d convolutions; '0' is a Conv1d"):
        find_taps(nn.Sequential(nn.Conv1d(1, 2, 3)), ["0"])
    with pytest.raises(ValueError, match="no 2-d convolution"):
        find_taps(nn.Sequential(nn.Conv1d(1, 2, 3)))


def test_unknown_taps_list_what_there_is():
    with pytest.raises(ValueError, match="one of 'activation', 'norm', 'hrank'; got 'hrnak'"):
        find_taps(Block(), taps="hrnak")


HRANK_VGG = [2, 6, 9, 13, 16, 19, 23, 26, 29, 33, 36, 39]
"""Where HRank's published code hooks VGG-16: positions among all modules of ``features``."""


def test_hrank_taps_of_vgg_are_the_published_positions():
    model = models.vgg16_bn(width=0.125)
    taps = find_taps(model, taps="hrank")
    positions = {f"features_{name}": i for i, name in enumerate(dict(model.features.named_children()))}
    assert [positions[tap.node] for tap in taps.values()] == [*HRANK_VGG, 39]
    *own, last = taps.values()
    assert not any(tap.note for tap in own)
    assert last.note == "HRank does not read a chain's last convolution: it gets the ranks of features.conv15"
    plain = [positions[tap.node] for tap in find_taps(model).values()]
    assert plain != [*HRANK_VGG, 39], "the comparison must tell the two kinds of taps apart"
    alone = find_taps(model, ["features.conv16"], taps="hrank")
    assert alone == {"features.conv16": last}


def test_hrank_taps_of_residual_networks_are_their_activations_and_the_pooled_stem():
    small = models.resnet20(width=0.25)
    assert find_taps(small, taps="hrank") == find_taps(small)
    assert find_taps(Block(), taps="hrank") == find_taps(Block())
    large = models.resnet50()
    plain, hrank = find_taps(large), find_taps(large, taps="hrank")
    assert {name: tap.node for name, tap in hrank.items() if tap != plain[name]} == {"conv1": "maxpool"}


def test_hrank_copies_only_between_layers_with_as_many_filters():
    def taps(last):
        return find_taps(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, last, 3), nn.ReLU()), taps="hrank")

    assert taps(4)["2"].node == taps(5)["0"].node == "_1"
    assert taps(5)["2"] == Tap("2", "_3", "HRank would copy the ranks of 0, which has 4 filters; read for itself")
    assert find_taps(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), taps="hrank")["0"] == Tap("0", "_1")


def test_hrank_taps_stop_at_pools_that_end_the_features_and_at_forks():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x):
            y = F.avg_pool2d(F.dropout(F.relu(self.a(x)), training=False), 2)
            y = F.relu(self.b(y))
            y = F.max_pool2d(y, 2) + y.mean((2, 3), keepdim=True)  # two consumers
            y = F.adaptive_avg_pool2d(F.relu(self.c(y)), 4)
            return F.max_pool2d(F.relu(self.d(y)), 4)

    taps = find_taps(Net(), taps="hrank")
    assert [tap.node for tap in taps.values()] == ["avg_pool2d", "relu_1", "relu_2", "relu_3"]
    assert not any(tap.note for tap in taps.values())


def test_hrank_taps_of_unknown_structures_are_activations_and_say_so():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(6, 3, 1)

        def forward(self, x):
            y = F.max_pool2d(F.relu(self.a(x)), 2)
            return self.b(torch.cat([y, y], 1))

    taps = find_taps(Dense(), taps="hrank")
    assert taps["a"].node == "relu"
    assert taps["a"].note == "read at its activation: HRank's places are known for chains and residual networks only"
    assert taps["b"] == find_taps(Dense())["b"]
    assert taps["b"].note


def test_taps_by_hand_need_no_graph():
    class Untraceable(Block):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"cannot be traced.*name the taps by hand"):
        find_taps(Untraceable())
    assert find_taps(Untraceable(), {"conv1": "bn1"}) == {"conv1": Tap("conv1", "bn1", "named by hand")}
    with pytest.raises(ValueError, match=r"module of the model; got 'bn3'. Did you mean 'bn2'"):
        find_taps(Untraceable(), {"conv1": "bn3"})
    with pytest.raises(ValueError, match="no convolution named 'conv9'"):
        find_taps(Untraceable(), {"conv9": "bn1"})
    with pytest.raises(ValueError, match="names no convolution"):
        find_taps(Untraceable(), {})
