"""Networks and plans drawn by chance: the slim one equals the masked one, always, or filters stay for a reason."""

import ast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo import ENTRIES, checking, random_graphs
from zoo.random_graphs import case

QUICK = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def cases(draw, most=14):
    return random_graphs.draw_case(lambda options: draw(st.sampled_from(list(options))), most)


@settings(QUICK, max_examples=50)
@given(found=cases(most=7))
def test_small_networks(found):
    if found is not None:
        random_graphs.check(found)


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_networks_by_seed(start):
    for seed in range(start, start + 20):
        if (found := random_graphs.seeded_case(seed)) is not None:
            random_graphs.check(found)


@pytest.mark.slow
@settings(QUICK, max_examples=200)
@given(found=cases())
def test_many_networks(found):
    if found is not None:
        random_graphs.check(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "start", [10_000, *(pytest.param(start, marks=pytest.mark.sweep) for start in range(10_200, 14_000, 200))]
)
def test_many_networks_by_seed(start):
    for seed in range(start, start + 200):
        if (found := random_graphs.seeded_case(seed, most=10 + seed % 12)) is not None:
            random_graphs.check(found)


@pytest.mark.parametrize(
    "start", [0, *(pytest.param(start, marks=[pytest.mark.slow, pytest.mark.sweep]) for start in range(100, 600, 100))]
)
def test_most_of_a_random_plan_leaves(start):
    """Half of the drawn steps are traps, so that less leaves than of whole architectures: 65 % over 500 networks."""
    total = random_graphs.strength(range(start, start + (50 if start == 0 else 100)))
    assert total.share >= 50, total.refusals.most_common(8)


ROUNDED = ("MobileNet v2", "ShuffleNet v2", "DenseNet")


@pytest.mark.parametrize("round_to", [2, 4, 8])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ROUNDED else pytest.mark.slow) for name in ENTRIES]
)
def test_rounding_on_the_zoo(name, round_to):
    """Whatever leaves that the plan does not name, every planned layer has a multiple, or all that it had."""
    entry = ENTRIES[name]
    torch.manual_seed(0)
    model, x = checking.randomised(entry.build()), torch.randn(entry.shape, dtype=torch.float64)
    plan = checking.random_plan(model, round_to, 0.6, only=0.8)
    slim = checking.check(model, plan, x, round_to=round_to)
    random_graphs.assert_accounted_for(model, plan, slim, round_to)


def test_a_printed_case_is_the_case():
    found = random_graphs.seeded_case(7)
    call = ast.parse(repr(found), mode="eval").body
    (options,) = call.keywords  # **{...}
    again = case(*map(ast.literal_eval, call.args), **ast.literal_eval(options.value))
    assert repr(again) == repr(found)
    assert checking.same_state(again.model, found.model.state_dict())


def test_a_wrong_weight_in_a_slim_network_is_noticed(monkeypatch):
    """The comparison can fail: one weight of the delivered network is off by a thousandth."""
    honest = checking.pp.compact

    def dishonest(*args, **options):
        slim = honest(*args, **options)
        with torch.no_grad():
            next(one for name, one in slim.model.named_parameters() if "weight" in name)[0] *= 1.001
        return slim

    found = case([("Conv2d", (3, 4, 3), {}, (0,)), ("ReLU", (), {}, (1,)), ("Head", (4, 3, "mean"), {}, (2,))], (3,),
                 {"parts.0": [0, 2]}, (2, 3, 6, 6))  # fmt: skip
    assert random_graphs.check(found).model.get_submodule("parts.0").out_channels == 2
    monkeypatch.setattr(checking.pp, "compact", dishonest)
    with pytest.raises(AssertionError):
        random_graphs.check(found)


# What random networks found: shrunk, and fixed.

WRITTEN = {
    "a sum in place, its first side read again": case([
        ("Conv2d", (3, 1, 2), {"bias": False}, (0,)),
        ("Add", ("+=",), {}, (1, 1)),
        ("Conv2d", (1, 1, 3), {"padding": 1, "bias": False}, (1,)),
    ], (3,), {"parts.2": [0]}, (2, 3, 8, 8), residual="scatter"),
    "a padding that leaves, of a tensor that is overwritten later": case([
        ("Conv2d", (3, 2, 3), {"dilation": 2, "bias": False}, (0,)),
        ("PadChannels", (0, 1, 0.0), {}, (1,)),
        ("Add", ("+=",), {}, (1, 1)),
        ("Conv2d", (3, 9, 1), {"groups": 3, "bias": False, "stride": 2}, (2,)),
        ("Conv2d", (2, 8, 3), {"stride": 2}, (3,)),
        ("Conv2d", (9, 5, 1), {"padding": 1, "stride": 2}, (4,)),
    ], (6, 5), {"parts.4": [2]}, (2, 3, 8, 8)),
    "a sum in place that revives what a depthwise convolution reads": case([
        ("Conv2d", (3, 3, 2), {"padding": 1, "dilation": 2}, (0,)),
        ("Add", ("+=",), {}, (1, 0)),
        ("Conv2d", (3, 9, 3), {"groups": 3, "bias": False}, (1,)),
    ], (2, 3), {"parts.0": [1, 2]}, (2, 3, 6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("found", WRITTEN.values(), ids=WRITTEN)
def test_what_is_overwritten(found):
    random_graphs.check(found)


def test_a_parameter_that_revives_a_channel_is_named():
    slim = random_graphs.check(case([
        ("Conv2d", (3, 5, 1), {"bias": False}, (0,)),
        ("Scale", ((1, 1, 6, 6), "-"), {}, (1,)),
        ("Head", (5, 3, "pool"), {}, (2,)),
    ], (3,), {"parts.0": [2, 3]}, (2, 3, 6, 6)))  # fmt: skip
    assert slim.kept["parts.0"] == dict.fromkeys((0, 1, 4), "reaches sub, which keeps its channel")


INDICES = {"backwards": [3, 2, 1, 0], "one channel twice": [1, 1], "backwards in steps": [7, 4, 1, 5]}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_an_index_that_no_slice_can_express(index):
    slim = random_graphs.check(case([
        ("Conv2d", (3, 8, 1), {}, (0,)),
        ("Taken", (index,), {}, (1,)),
        ("Conv2d", (len(index), 2, 1), {}, (2,)),
    ], (3,), {"parts.0": [1, 4, 7, 2]}, (2, 3, 6, 6)))  # fmt: skip
    assert slim.model.get_submodule("parts.0").out_channels < 4


def test_a_shuffle_in_as_many_groups_as_channels():
    slim = random_graphs.check(case([
        ("Conv2d", (3, 9, 2), {}, (0,)),
        ("ChannelShuffle", (9,), {}, (1,)),
        ("Conv2d", (9, 2, 1), {}, (2,)),
    ], (3,), {"parts.0": [1, 2, 5, 6]}, (2, 3, 8, 8)))  # fmt: skip
    assert slim.model.get_submodule("parts.0").out_channels == 4


def test_a_union_masks_nothing_that_stays():
    """What rounding and equal groups bring back is not zero either, in any branch."""
    slim = random_graphs.check(case([
        ("Conv2d", (3, 8, 2), {"padding": 1, "bias": False, "padding_mode": "reflect"}, (0,)),
        ("Conv2d", (8, 16, 1), {"groups": 8, "bias": False}, (1,)),
        ("Conv2d", (16, 16, 3), {"padding": 1}, (2,)),
        ("Times", ("max",), {}, (3, 2)),
        ("tied", (2,), {}, (2,)),
        ("Head", (784, 3, "flatten"), {}, (5,)),
    ], (6,), {"parts.1": [2, 3, 5, 6, 11, 12, 13, 14], "parts.4": [7, 10, 14]}, (2, 3, 6, 6),
       residual="union", round_to=4))  # fmt: skip
    assert not slim.lossy
    assert dict(slim.beyond) == {}


def test_an_unread_padding_does_not_take_its_layer_away():
    slim = random_graphs.check(case([
        ("Conv2d", (3, 8, 1), {}, (0,)),
        ("PadChannels", (1, 2, 0.0), {}, (1,)),
        ("ConvTranspose2d", (3, 1, 3), {"bias": False}, (0,)),
    ], (3,), {"parts.2": [0]}, (2, 3, 6, 6)))  # fmt: skip
    assert slim.model.get_submodule("parts.0").out_channels == 1
