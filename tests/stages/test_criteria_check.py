"""The suite for criteria passes every one that is built in, and finds what is wrong with others."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pyprune as pp
from pyprune import criteria
from pyprune.testing import check_criterion

OPTIONS = {"cup": {"threshold": 0.5}, "crank": {"n_init": 1, "jobs": 1}}


@pytest.mark.parametrize("name", criteria.NAMES)
def test_what_is_built_in_passes(name):
    check_criterion(criteria.find("test", name, OPTIONS.get(name, {})))


class Plain:
    name = "plain"
    needs = ()

    def scores(self, model, context):
        return {name: np.arange(layer.out_channels) for name, layer in context.layers.items()}


def test_a_plain_one_passes():
    check_criterion(Plain())
    check_criterion(Plain(), nn.Sequential(nn.Conv1d(3, 9, 5)))


class Restless(Plain):
    def __init__(self):
        self.calls = itertools.count()

    def scores(self, model, context):
        return {name: (one + next(self.calls)) % len(one) for name, one in super().scores(model, context).items()}


class Meddling(Plain):
    def scores(self, model, context):
        with torch.no_grad():
            next(iter(model.parameters())).flatten()[0] += 1e-7
        return super().scores(model, context)


class Leaving(Plain):
    def scores(self, model, context):
        next(iter(context.layers.values())).register_forward_hook(lambda *_: None)
        return super().scores(model, context)


class Switching(Plain):
    def scores(self, model, context):
        model.eval()
        return super().scores(model, context)


class Dreaming(Plain):
    def scores(self, model, context):
        torch.rand(1)
        return super().scores(model, context)


class Rude(Plain):
    def scores(self, model, context):
        return {name: np.zeros(layer.out_channels) for name, layer in pp.criteria.graph.convolutions(model).items()}


class Blind(Plain):
    def scores(self, model, context):
        return {name: one * np.nan for name, one in super().scores(model, context).items()}


class Mute(Plain):
    def scores(self, model, context):
        return {}


class Odd(Plain):
    def plan(self, model, context):
        return {}


@pytest.mark.parametrize(
    ("criterion", "kind", "message"),
    [
        (
            Restless(),
            AssertionError,
            "expected the same scores of '0' when asked again; got others: seed what is random",
        ),
        (Meddling(), AssertionError, "expected the model's state as it was"),
        (Leaving(), AssertionError, "expected every hook as it was"),
        (Switching(), AssertionError, "expected the training flag as it was"),
        (Dreaming(), AssertionError, "expected torch's random state as it was"),
        (Mute(), AssertionError, "expected scores of at least one layer; got none"),
        (Odd(), AssertionError, r"expected plan to return a pyprune.Plan; got dict"),
        (Rude(), ValueError, "'plain' scores '0', which is no convolution that was asked for"),
        (Blind(), ValueError, "scores of 'plain' for '0' must be finite"),
        (object(), TypeError, "a criterion needs a name, needs, and a method"),
    ],
)
def test_what_is_wrong_is_found(criterion, kind, message):
    with pytest.raises(kind, match=message):
        check_criterion(criterion)


def test_the_criterion_in_the_docs_works():
    page = (Path(__file__).parents[2] / "docs" / "selection.md").read_text()
    code = page.partition("## Add a criterion")[2].partition("```python\n")[2].partition("```")[0]
    assert len([line for line in code.partition("class ")[2].partition("\n\n\n")[0].splitlines() if line.strip()]) <= 10
    torch.manual_seed(0)
    names = {"model": nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3)), "images": torch.randn(2, 1, 8, 8)}
    exec(code, names)  # noqa: S102  # our own page
    plan = names["plan"]
    assert plan.method == "spread"
    spread = names["model"][0].weight.detach().flatten(1).std(1, correction=0)
    assert set(plan.keep["0"]) == set(spread.topk(len(plan.keep["0"])).indices.tolist())
    assert plan.options["budget"]["macs"]["reached"] <= plan.options["budget"]["macs"]["allowed"]
