"""Views: whatever moves the channels about, they are followed by where they end up, or kept."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyprune as pp
from pyprune import graph, views
from pyprune.types import Plan
from zoo import checking


class Between(nn.Module):
    """A convolution and its norm, what is tested, and a convolution that reads it."""

    def __init__(self, between, filters=6, reads=6, **parts):
        super().__init__()
        self.a, self.norm = nn.Conv2d(2, filters, 3, padding=1), nn.BatchNorm2d(filters)
        self.b = nn.Conv2d(reads, 4, 3, padding=1) if reads else None
        self.between = between
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        y = self.between(self, F.relu(self.norm(self.a(x))))
        return y if self.b is None else self.b(y)


def shuffled(x, groups):
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def by_shape(x, groups):
    n, c = x.shape[0], x.shape[1]
    return x.reshape(n, groups, c // groups, *(x.shape[2], x.shape[3])).permute(0, 2, 1, 3, 4).flatten(1, 2)


def squeezed(x):
    return x.unsqueeze(1).movedim(1, -1).squeeze(-1).squeeze()


X = torch.randn(2, 2, 6, 8, dtype=torch.float64)
EXACT = {
    "shuffle": (lambda s, x: shuffled(x, 2), {}),
    "literal shuffle": (lambda s, x: x.view(-1, 3, 2, 6, 8).transpose(1, 2).reshape(-1, 6, 6, 8), {}),
    "shuffle of three": (lambda s, x: shuffled(x, 3), {}),
    "twice": (lambda s, x: shuffled(shuffled(x, 2), 3), {}),
    "and back": (lambda s, x: shuffled(shuffled(x, 2).tanh(), 3), {}),
    "by shape": (lambda s, x: by_shape(x, 2), {}),
    "module": (lambda s, x: s.m(x), {"m": nn.ChannelShuffle(3)}),
    "function": (lambda s, x: F.channel_shuffle(x, 2), {}),
    "unflatten": (lambda s, x: torch.unflatten(x, 1, (2, 3)).swapaxes(1, 2).flatten(1, 2), {}),
    "unflatten module": (lambda s, x: s.m(x).transpose(1, 2).flatten(1, 2), {"m": nn.Unflatten(1, (3, 2))}),
    "both ways": (lambda s, x: x.flatten(2).view(x.size(0), x.size(1), 6, 8), {}),
    "literal both ways": (lambda s, x: x.view(-1, 6, 48).view(-1, 6, 6, 8), {}),
    "unflattened space": (lambda s, x: s.m(x.flatten(2)), {"m": nn.Unflatten(2, (6, 8))}),
    "permuted": (lambda s, x: x.permute(0, 2, 3, 1).tanh().permute(0, 3, 1, 2), {}),
    "by pixels": (
        lambda s, x: F.gelu(s.m(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2).contiguous(), {"m": nn.Linear(6, 6)},
    ),
    "rows of pixels": (
        lambda s, x: s.m(x.movedim(1, 3).reshape(-1, 6)).view(-1, 6, 8, 6).movedim(3, 1), {"m": nn.Linear(6, 6)},
    ),
    "squeezes": (lambda s, x: squeezed(x), {}),
    "gate": (lambda s, x: x * s.m(x.mean((2, 3))).sigmoid().view(x.size(0), x.size(1), 1, 1), {"m": nn.Linear(6, 6)}),
    "literal gate": (lambda s, x: x * s.m(x.mean((2, 3))).sigmoid().view(-1, 6, 1, 1), {"m": nn.Linear(6, 6)}),
    "unsqueezed gate": (lambda s, x: x * s.m(x.mean((2, 3))).sigmoid()[:, :, None, None], {"m": nn.Linear(6, 6)}),
    "expanded gate": (
        lambda s, x: x * s.m(x.mean((2, 3), keepdim=True)).sigmoid().expand_as(x), {"m": nn.Conv2d(6, 6, 1)},
    ),
    "expanded by size": (lambda s, x: x * F.adaptive_avg_pool2d(x, 1).expand(-1, x.size(1), 6, 8), {}),
    "pixel shuffle": (lambda s, x: s.m(x), {"m": nn.PixelShuffle(2), "filters": 24}),
    "pixel shuffle function": (lambda s, x: F.pixel_shuffle(x, 2), {"filters": 24}),
    "pixel unshuffle": (lambda s, x: s.m(x), {"m": nn.PixelUnshuffle(2), "reads": 24}),
    "both pixel shuffles": (lambda s, x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2), {}),
    "norm behind": (lambda s, x: s.m(shuffled(x, 2)), {"m": nn.BatchNorm2d(6)}),
    "norm behind pixels": (lambda s, x: s.m(F.pixel_unshuffle(x, 2)), {"m": nn.BatchNorm2d(24), "reads": 24}),
    "norm behind joined pixels": (
        lambda s, x: s.m(F.pixel_shuffle(x, 2)), {"m": nn.BatchNorm2d(6), "filters": 24},
    ),
    "groups": (lambda s, x: s.m(shuffled(x, 3)), {"m": nn.Conv2d(6, 6, 1, groups=2)}),
    "depthwise": (lambda s, x: s.m(shuffled(x, 3)), {"m": nn.Conv2d(6, 6, 3, padding=1, groups=6)}),
    "flattened": (lambda s, x: shuffled(x, 2).flatten(1)[:, :, None, None], {"reads": 288}),
    "unsqueezed": (lambda s, x: x.unsqueeze(2).squeeze(2), {}),
}  # fmt: skip


def built(case):
    between, parts = EXACT[case]
    torch.manual_seed(0)
    return checking.randomised(Between(between, **{key: copy.deepcopy(part) for key, part in parts.items()}))


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("left", [1, 3])
def test_views_are_followed(case, left, tmp_path):
    model = built(case)
    filters = model.a.out_channels
    run = 4 if filters == 24 else 1
    kept = np.sort(np.random.default_rng(left).permutation(filters // run)[:left])
    plan = Plan({"a": (kept[:, None] * run + np.arange(run)).ravel()})
    slim = checking.check(model, plan, X, folder=tmp_path / "slim")
    for reasons in slim.kept.values():
        for why in reasons.values():
            assert re.search("keeps the groups of|is the last channel", why), why
    if case != "groups":
        assert slim.model.a.out_channels == left * run


@pytest.mark.parametrize("case", EXACT)
def test_what_is_left_alone_is_not_written_anew(case):
    slim = checking.check(built(case), Plan({"b": [0, 1]} if built(case).b else {}), X)
    assert "index_select" not in slim.model.code


STAYS = {
    "rows": (lambda s, x: x.transpose(1, 2).reshape(-1, 6, 6, 8), "not along dimension 1"),
    "pairs of rows": (lambda s, x: x.view(-1, 3, 2, 6, 8).transpose(2, 3).reshape(-1, 6, 6, 8), "not along dimension"),
    "over the batch": (lambda s, x: x.transpose(0, 1).reshape(x.size(0), 6, 6, 8), "not along dimension 1"),
    "in between": (lambda s, x: shuffled(x, 2) + x.view(-1, 2, 3, 6, 8).sum((1, 2))[:, None], "not know"),
    "another's count": (
        lambda s, x: s.c(x)[:, :2].view(-1, 2, 6, 8).repeat(1, 3, 1, 1) * x.size(1), "number of channels read by",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STAYS)
def test_what_is_not_followed_stays(case):
    between, reason = STAYS[case]
    parts = {"c": nn.Conv2d(6, 6, 1)} if case == "another's count" else {}
    model = checking.randomised(Between(between, **parts))
    slim = checking.check(model, Plan({"a": [1, 4]}), X)
    assert set(slim.kept["a"]) == {0, 2, 3, 5}
    assert all(re.search(reason, why) for why in slim.kept["a"].values()), slim.kept["a"]


def test_a_shuffle_becomes_one_selection():
    slim = checking.check(built("shuffle"), Plan({"a": [0, 2, 3]}), X)  # in the order 0, 3, 2
    assert slim.model.view_1_order.tolist() == [0, 2, 1]
    assert "index_select" in slim.model.code
    assert ".view(" not in slim.model.code
    assert "size" not in slim.model.code  # nothing that nobody reads any more


def test_a_mask_passes_a_shuffle_without_example_inputs():
    model = built("norm behind")
    dead = graph.dead_slices(model, Plan({"a": [0, 2, 4]}))  # 1, 3, 5 lie at 2, 3 and 5 behind a shuffle of two
    order = torch.arange(6).view(2, 3).T.flatten().tolist()
    assert dead["m.weight"].tolist() == sorted(order.index(one) for one in (1, 3, 5))


def test_places_follow_the_entries():
    places = views.start((2, 6, 3))
    assert places.permuted().tolist() == list(range(6))
    turned = views.Places(places.entries.transpose(1, 2), places.shape)
    assert turned.permuted() is None
    assert views.along_one_dimension(turned.channels())[0] == 2
    assert views.along_one_dimension(torch.zeros(2, 0)) is None


def test_torch_agrees_that_a_shuffle_is_the_module():
    assert torch.equal(shuffled(X.repeat(1, 3, 1, 1), 3), nn.ChannelShuffle(3)(X.repeat(1, 3, 1, 1)))
    assert pp.compact(built("module"), Plan({"a": [0]}), X).model.b.in_channels == 1
