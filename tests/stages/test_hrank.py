"""HRank's rate strings, rank files and masked checkpoints."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyprune as pp
from pyprune import files, graph, hrank, models
from pyprune.hrank import (
    parse_rates,
    rates_for,
    read_rank_file,
    read_rank_files,
    write_rank_files,
    zero_filters,
)
from pyprune.measure import profile
from tolerances import COMPACTED_FLOAT64

RESNET56 = "[0.1]+[0.60]*35+[0.0]*2+[0.6]*6+[0.4]*3+[0.1]+[0.4]+[0.1]+[0.4]+[0.1]+[0.4]+[0.1]+[0.4]"


@pytest.fixture(scope="module")
def vgg():
    return models.vgg16_bn()


@pytest.fixture(scope="module")
def resnet():
    return models.resnet56()


# Rate strings.


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("[0.95]+[0.5]*6+[0.9]*4", [0.95] + [0.5] * 6 + [0.9] * 4),
        (RESNET56, [0.1] + [0.6] * 35 + [0.0] * 2 + [0.6] * 6 + [0.4] * 3 + [0.1, 0.4] * 4),
        ("[0.]+[0.18]*29", [0.0] + [0.18] * 29),
        (" [ 0.1 , .25 ]\t* 2 ", [0.1, 0.25, 0.1, 0.25]),
        ("2*[0.5]", [0.5, 0.5]),
        ("([0.1]+[0.2]*2)*2+[0]", [0.1, 0.2, 0.2, 0.1, 0.2, 0.2, 0.0]),
        ("3*([1e-1]+(2*[0.2]))", [0.1, 0.2, 0.2] * 3),
        ("[0.5]*0+[0.3]*2*2", [0.3] * 4),
    ],
)
def test_rate_strings_mean_what_they_mean_in_hrank(text, rates):
    assert parse_rates(text) == rates


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"needs a list such as \[0.5\] at character 1 of ''; got the end"),
        ("0.5", r"needs a list such as \[0.5\] at character 1 of '0.5'; got '0.5'"),
        ("[0.95]+", "needs a list .* at character 8 of .*; got the end"),
        ("[0.95]+0.5]", "at character 8 of .*; got '0.5'"),
        ("[0.95]+3]", r"needs '\*' after a count at character 9 of .*; got '\]'"),
        ("[0.95", r"needs '\]' or ',' at character 6 of '\[0.95'; got the end"),
        ("[]", r"needs a rate at character 2 of '\[\]'; got '\]'"),
        ("[0.5,]", r"needs a rate at character 6 .*; got '\]'"),
        ("[0.5] [0.5]", r"needs the end, '\+' or '\*' at character 7 .*; got '\['"),
        ("[0.5]*1.5", "needs a whole number of repetitions at character 7 .*; got '1.5'"),
        ("[0.5]**2", r"needs a whole number of repetitions at character 7 .*; got '\*'"),
        ("[0.5]*-1", r"needs a number or one of .* at character 7 .*; got '-'"),
        ("[-0.1]", "at character 2 .*; got '-'"),
        ("[0.5]+[1.0]*2", r"needs a rate in \[0, 1\) at character 8 .*; got '1.0'"),
        ("[1e999]", r"needs a rate in \[0, 1\) at character 2"),
        ("([0.5]", r"needs '\)', '\+' or '\*' at character 7"),
        ("[0.5]*999999999", "needs a whole number of repetitions"),
        ("[0.5]*10001", "needs at most 10000 rates at character 12"),
        ("([0.5]*9999)*999999", "needs at most 10000 rates"),
        ("(" * 50 + "[0.5]" + ")" * 50, r"needs a list such as \[0.5\] at character 21 "),
        ("[0.5]*__import__('os')", "at character 7 .*; got '_'"),
        ("[x]", "at character 2 .*; got 'x'"),
    ],
)
def test_errors_say_where(text, message):
    with pytest.raises(ValueError, match=f"parse_rates: {message}" if message[:5] == "needs" else message) as caught:
        parse_rates(text)
    assert "\n" not in str(caught.value)


def test_only_strings_are_parsed():
    with pytest.raises(TypeError, match=r"parse_rates: needs a string such as .*; got list"):
        parse_rates([0.5])


@settings(deadline=None)
@given(st.lists(st.tuples(st.lists(st.floats(0, 0.999), min_size=1, max_size=3), st.integers(0, 4)), min_size=1))
def test_what_is_written_is_read(parts):
    text = "+".join(f"{rates}*{times}" for rates, times in parts)
    assert parse_rates(text) == [rate for rates, times in parts for rate in rates * times]


@settings(deadline=None)
@given(st.text("[]()+*,.0123456789e -", max_size=30))
def test_any_other_text_ends_in_one_line(text):
    try:
        assert all(0 <= rate < 1 for rate in parse_rates(text))
    except ValueError as error:
        assert "at character" in str(error)  # noqa: PT017


# Rates and layers.


def counts(model, rates):
    layers = graph.convolutions(model)
    return {name: round(layers[name].out_channels * (1 - rate)) for name, rate in rates_for(model, rates).items()}


def test_a_list_of_one_rate_a_convolution_goes_in_order_with_the_rounding_of_hranks_masks(vgg):
    kept = counts(vgg, "[0.95]+[0.5]*6+[0.9]*4+[0.8]*2")
    assert list(kept) == list(graph.convolutions(vgg))
    # of 64 filters int(0.95 * 64) = 60 go; rounding 64 * 0.05 = 3.2 to the nearest would keep 3
    assert list(kept.values()) == [4, 32, 64, 64, 128, 128, 128, 52, 52, 52, 52, 103, 103]


def test_twelve_rates_of_vgg_leave_the_thirteenth_alone_and_round_as_hranks_narrow_networks(vgg):
    kept = counts(vgg, "[0.45]*7+[0.78]*5")
    assert list(kept.values()) == [35, 35, 70, 70, 140, 140, 140, 112, 112, 112, 112, 112, 512]


def test_the_published_count_of_resnet_56_comes_out(resnet):
    layers = graph.convolutions(resnet)
    plan = pp.Plan({name: range(kept) for name, kept in counts(resnet, RESNET56).items()})
    found = profile(resnet, torch.zeros(1, 3, 32, 32), plan=plan, latency=False)
    assert len(layers) == len(plan.keep) == 55
    # HRank's table: 0.49 M parameters, 62.72 M multiply-accumulates
    assert (found.hrank_v1_parameters, found.hrank_v1_macs) == (489_359, 62_715_530)


def test_streams_and_blocks_of_a_cifar_resnet(resnet):
    blocks = [round(0.2 + 0.01 * i, 2) for i in range(27)]
    rates = rates_for(resnet, [0.0, 0.25, 0.5, *blocks])
    kept = counts(resnet, [0.0, 0.25, 0.5, *blocks])
    assert rates["conv1"] == 0
    assert {rates[f"layer1.{k}.conv2"] for k in range(9)} == {0.25}
    assert {rates[f"layer2.{k}.conv2"] for k in range(9)} == {0.5}
    assert {rates[f"layer3.{k}.conv2"] for k in range(9)} == {0.0}
    inner = [(name, rate) for name, rate in rates.items() if name.endswith("conv1") and name != "conv1"]
    assert [name for name, _ in inner] == [f"layer{i}.{k}.conv1" for i in (1, 2, 3) for k in range(9)]
    widths = [16] * 9 + [32] * 9 + [64] * 9
    expected = [int(width * (1 - rate)) for width, rate in zip(widths, blocks, strict=True)]
    assert [kept[name] for name, _ in inner] == expected


def test_streams_and_blocks_of_resnet_50():
    model = models.resnet50()
    kept = counts(model, "[0.1]+[0.2]*3+[0.5]*16")
    assert len(kept) == 53
    assert kept["conv1"] == int(64 * 0.9)
    assert kept["layer1.0.conv1"] == kept["layer1.2.conv2"] == 32
    assert kept["layer1.0.conv3"] == kept["layer1.0.downsample.0"] == kept["layer1.2.conv3"] == int(256 * 0.8)
    assert kept["layer3.5.conv3"] == int(1024 * 0.8)
    assert kept["layer4.0.conv3"] == kept["layer4.0.downsample.0"] == 2048
    assert list(rates_for(model, "[0.2]+[0.8]*10+[0.8]*13+[0.55]*19+[0.45]*10")) == list(graph.convolutions(model))


def test_no_layer_ends_empty():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1))
    assert rates_for(model, [0.99, 0.99]) == {"0": 0.5, "1": 0.0}


@pytest.mark.parametrize(
    ("build", "rates", "message"),
    [
        (models.vgg16_bn, "[0.5]*11", "rates_for: VGG has 13 convolutions and needs 13 or 12 rates; got 11"),
        (models.resnet56, [0.5] * 54, "CifarResNet has 55 convolutions and needs 55 or 30 rates; got 54"),
        (models.resnet50, [0.5], "ResNet50 has 53 convolutions and needs 53 or 20 rates; got 1"),
        (models.vgg_digits, [0.5], "VGG has 6 convolutions and needs 6 rates; got 1"),
        (models.vgg_digits, [0.5] * 5 + [1], r"rates_for: rates must be in \[0, 1\); got 1"),
        (models.vgg_digits, [float("nan")] * 6, r"rates_for: rates must be in \[0, 1\); got nan"),
    ],
)
def test_other_numbers_of_rates_are_refused(build, rates, message):
    with pytest.raises(ValueError, match=message):
        rates_for(build(), rates)


def test_rates_must_be_numbers():
    with pytest.raises(TypeError, match=r"rates must be numbers in \[0, 1\); got bool"):
        rates_for(models.vgg_digits(), [True] * 6)


def random_ranks(model, classes=3, seed=0, leave_out=()):
    rng = np.random.default_rng(seed)
    layers = {name: layer.out_channels for name, layer in graph.convolutions(model).items() if name not in leave_out}
    return pp.ClassRanks(
        {name: rng.integers(0, 900, (filters, classes)) / 50 for name, filters in layers.items()},
        counts=np.arange(1, classes + 1),
    )


def test_select_takes_rate_strings_and_lists(vgg):
    ranks = random_ranks(vgg)
    text = "[0.95]+[0.5]*6+[0.9]*4+[0.8]*2"
    plan = pp.select(vgg, "hrank", ranks=ranks, rates=text)
    assert {name: len(kept) for name, kept in plan.keep.items()} == counts(vgg, text)
    assert plan.options["rates"] == text
    listed = pp.select(vgg, "hrank", ranks=ranks, rates=tuple(parse_rates(text)))
    assert listed.options["rates"] == parse_rates(text)
    assert all(np.array_equal(plan.keep[name], listed.keep[name]) for name in plan.keep)
    nearest = pp.select(vgg, "hrank", ranks=ranks, rates=dict(zip(plan.keep, parse_rates(text), strict=True)))
    assert len(nearest.keep["features.conv0"]) == 3


def test_select_asks_for_ranks_only_where_a_rate_removes_something(vgg, tmp_path):
    ranks = random_ranks(vgg, leave_out=["features.conv16"])
    plan = pp.select(vgg, "hrank", ranks=ranks, rates="[0.45]*7+[0.78]*5")
    assert len(plan.keep) == 12
    plan.save(tmp_path / "plan.json")
    assert pp.Plan.load(tmp_path / "plan.json") == plan
    text = "[0.95]+[0.5]*6+[0.9]*4+[0.8]*2"
    with pytest.raises(ValueError, match=r"rates gives 'features.conv16' 0.799, and there are no scores of it"):
        pp.select(vgg, "hrank", ranks=ranks, rates=text)
    plan = pp.select(vgg, "hrank", ranks=ranks, rates=text, exclude=["features.conv16"])
    left = {name: len(kept) for name, kept in plan.keep.items()}
    assert left == {**counts(vgg, text), "features.conv16": 512}
    assert plan.why["features.conv16"].note == "excluded"


# Rank files.


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3))


def test_rank_files_are_those_of_hrank_and_come_back(tmp_path):
    model = small_net()
    ranks = random_ranks(model)
    paths = write_rank_files(ranks, tmp_path / "r", model)
    assert [path.name for path in paths] == ["rank_conv1.npy", "rank_conv2.npy"]
    mean = (ranks.layers["3"] * [1, 2, 3]).sum(axis=1) / 6
    np.testing.assert_allclose(np.load(paths[1], allow_pickle=False), mean, rtol=1e-15)
    back = read_rank_files(tmp_path / "r", model)
    assert {name: R.shape for name, R in back.layers.items()} == {"0": (4, 1), "3": (3, 1)}
    first, second = (pp.select(model, "hrank", ranks=one, rates=0.5) for one in (ranks, back))
    assert all(np.array_equal(first.keep[name], second.keep[name]) for name in first.keep)


def test_class_files_keep_every_bit(tmp_path):
    model = small_net()
    ranks = random_ranks(model, classes=11)
    paths = write_rank_files(ranks, tmp_path, model, by_class=True)
    assert paths[10].name == "rank_conv1_Class_10.npy"
    write_rank_files(ranks, tmp_path, model)  # means beside them do not get in the way
    back = read_rank_files(tmp_path, model)
    assert all(np.array_equal(back.layers[name], R) for name, R in ranks.layers.items())


def test_files_that_numpy_saved_are_read(tmp_path):
    for i, dtype in enumerate(("float32", "float64", ">f4", "int64", "uint8", "float16")):
        np.save(tmp_path / f"{i}.npy", np.array([3, 0, 7], dtype))
        assert read_rank_file(tmp_path / f"{i}.npy").tolist() == [3, 0, 7]
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.array([1.5]), version=(2, 0))
    files.write_bytes(tmp_path / "v2.npy", stream.getvalue())
    assert read_rank_file(tmp_path / "v2.npy").tolist() == [1.5]


def test_twelve_files_are_enough_for_vgg(tmp_path, vgg):
    write_rank_files(random_ranks(vgg, leave_out=["features.conv16"]), tmp_path, vgg)
    assert list(read_rank_files(tmp_path, vgg).layers) == list(graph.convolutions(vgg))[:12]


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "needs a file of 1 to"),
        (b"PK\x03\x04 no", r"is no .npy file of numbers \("),
        (b"\x93NUMPY\x01\x00", r"is no .npy file of numbers \("),
        (b"\x93NUMPY\x09\x00" + bytes(20), r"is no .npy file of numbers \("),
        (npy("__import__('os').system('touch mark')"), "is no .npy file of numbers"),
        (
            npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"cos\nsystem\n."),
            "it holds object of shape",
        ),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", bytes(8)), "needs 12 bytes .* and has 8"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"), "needs 4398046511104 bytes"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0,), }"), "it holds float32 of shape"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", bytes(4)), "needs -4 bytes"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1), }", bytes(4)), r"of shape \[1, 1\]"),
        (npy("{'descr': '<U1', 'fortran_order': False, 'shape': (1,), }", bytes(4)), "it holds <U1"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", b"\x00\x00\xc0\x7f"), "NaN or infinite"),
        (npy("{'descr': '<i4', 'fortran_order': False, 'shape': (1,), }", b"\xff\xff\xff\xff"), "negative"),
    ],
)
def test_foreign_and_hostile_rank_files_are_refused(tmp_path, data, message):
    (tmp_path / "rank_conv1.npy").write_bytes(data)
    with pytest.raises(ValueError, match=f"read_rank_file: .*{message}") as caught:
        read_rank_file(tmp_path / "rank_conv1.npy")
    assert "\n" not in str(caught.value)


def test_pickled_arrays_are_not_unpickled(tmp_path):
    np.save(tmp_path / "r.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"must hold ranks \[F\]; it holds object"):
        read_rank_file(tmp_path / "r.npy")


def test_incomplete_and_foreign_folders_are_named(tmp_path, vgg):
    model = small_net()
    ranks = random_ranks(model)
    with pytest.raises(ValueError, match="needs a folder of rank files; cannot list"):
        read_rank_files(tmp_path / "absent", model)
    with pytest.raises(ValueError, match=r"must hold rank_conv1.npy to rank_conv2.npy for Sequential; it holds none"):
        read_rank_files(tmp_path, model)
    paths = write_rank_files(ranks, tmp_path, model)
    with pytest.raises(ValueError, match=r"rank_conv1.npy to rank_conv13.npy for VGG; they end at 2\."):
        read_rank_files(tmp_path, vgg)
    paths[0].rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"lacks rank_conv1.npy, the ranks of '0'"):
        read_rank_files(tmp_path, model)
    np.save(paths[0], np.ones(5))
    with pytest.raises(
        ValueError, match=r"files are of another network: .*rank_conv1.npy has 5 ranks, and '0' 4 filters"
    ):
        read_rank_files(tmp_path, model)
    write_rank_files(ranks, tmp_path, model, by_class=True)[1].unlink()
    with pytest.raises(ValueError, match=r"lacks rank_conv1_Class_1.npy"):
        read_rank_files(tmp_path, model)
    with pytest.raises(ValueError, match=r"write_rank_files: the model has no convolution named 'features\.conv0'"):
        write_rank_files(random_ranks(vgg), tmp_path, model)


# Zeroed filters.


def randomise(model, seed=0):
    """Give norms statistics and affine parameters that hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            for one, low, high in [
                (module.running_mean, -1, 1), (module.running_var, 0.5, 2), (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
            ]:  # fmt: skip
                one.copy_(torch.rand(one.shape, generator=generator) * (high - low) + low)
    return model.eval()


def random_plan(model, seed=0, share=0.5):
    rng = np.random.default_rng(seed)
    keep = {}
    for name, layer in graph.convolutions(model).items():
        keep[name] = np.flatnonzero(rng.random(layer.out_channels) >= share)
        keep[name] = keep[name] if len(keep[name]) else [0]
    return pp.Plan(keep)


@pytest.mark.parametrize(
    ("build", "x"),
    [
        (lambda: models.vgg16_bn(width=0.1), torch.rand(2, 3, 32, 32)),
        (lambda: models.resnet20(width=0.5), torch.rand(2, 3, 32, 32)),
    ],
)
def test_a_masked_checkpoint_gives_its_plan_back_and_is_compacted(build, x):
    model = randomise(build())
    wanted = random_plan(model)
    pp.mask_(model, wanted)
    with torch.no_grad():
        expected = model.double()(x.double())
    plan = zero_filters(model)
    assert plan.method == "zeros"
    assert {name: kept.tolist() for name, kept in plan.keep.items()} == {
        name: kept.tolist() for name, kept in wanted.keep.items()
    }
    assert {why.reason for why in plan.why[next(iter(plan.why))]} == {"zero", "not zero"}
    slim = pp.compact(model, plan, x.double())
    assert sum(p.numel() for p in slim.model.parameters()) < sum(p.numel() for p in model.parameters())

    def difference():
        with torch.no_grad():
            return float((slim.model(x.double()) - expected).abs().max()) / max(1.0, float(expected.abs().max()))

    assert difference() <= COMPACTED_FLOAT64
    with torch.no_grad():
        next(slim.model.parameters()).mul_(1.001)
    assert difference() > COMPACTED_FLOAT64


def test_a_zero_filter_that_a_norm_revives_stays_and_the_plan_says_so():
    model = randomise(small_net())
    pp.mask_(model, pp.Plan({"0": [0, 3], "3": [0, 1, 2]}))
    assert zero_filters(model).keep["0"].tolist() == [0, 3]
    model[1].bias.data[2] = 0.25
    plan = zero_filters(model)
    assert plan.keep["0"].tolist() == [0, 2, 3]
    assert plan.why["0"][2].reason == "zero, but reaches 1, whose slice is not zero"
    assert [why.reason for why in plan.why["0"]][::3] == ["not zero", "not zero"]
    x = torch.rand(2, 1, 8, 8)
    slim = pp.compact(model, plan, x)
    assert [layer.out_channels for layer in graph.convolutions(slim.model).values()] == [3, 3]
    assert torch.allclose(slim.model(x), model(x))
    wrong = pp.compact(model, pp.Plan({"0": [0, 3]}), x)  # takes the revived filter as well
    assert not torch.allclose(wrong.model(x), model(x))


def test_one_number_keeps_a_filter():
    for leaf in ("weight", "bias"):
        model = small_net()
        pp.mask_(model, pp.Plan({"3": [0]}))
        assert zero_filters(model).keep["3"].tolist() == [0]
        getattr(model[3], leaf).data[1].view(-1)[-1] = 1e-30
        assert zero_filters(model).keep["3"].tolist() == [0, 1]


def test_a_layer_of_nothing_but_zeros_keeps_one():
    model = small_net()
    model[0].weight.data.zero_()
    model[0].bias.data.zero_()
    model[1].weight.data.zero_()
    model[1].bias.data.zero_()
    plan = zero_filters(model)
    assert plan.keep["0"].tolist() == [0]
    assert plan.why["0"][0].reason == "zero, but all filters are zero, and one has to stay"


class Joined(nn.Module):
    """Two convolutions added, then a norm: its slice counts only where both are zero."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 3, 1)
        self.norm, self.last = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.last(F.relu(self.norm(self.a(x) + self.b(x))))


def test_through_a_join_only_common_zeros_need_the_norm():
    model = randomise(Joined())
    for layer, gone in ((model.a, [0, 1]), (model.b, [1])):
        layer.weight.data[gone] = 0
        layer.bias.data[gone] = 0
    plan = zero_filters(model)  # channel 1 comes back to life in the norm; a's filter 0 has b beside it
    assert (plan.keep["a"].tolist(), plan.keep["b"].tolist()) == ([1, 2], [0, 1, 2])
    model.norm.weight.data[1] = model.norm.bias.data[1] = 0
    plan = zero_filters(model)
    assert (plan.keep["a"].tolist(), plan.keep["b"].tolist()) == ([2], [0, 2])


def test_norms_that_nothing_can_mask_keep_their_filters():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 2, 1))
    model[0].weight.data[1] = 0
    model[0].bias.data[1] = 0
    plan = zero_filters(model)
    assert plan.keep["0"].tolist() == [0, 1, 2]
    assert "a norm without affine parameters" in plan.why["0"][1].reason


def test_a_network_without_zeros_keeps_everything():
    plan = zero_filters(models.resnet20(width=0.25))
    assert set(plan.rates.values()) == {0.0}
    assert len(plan.keep) == len(hrank.rates_for(models.resnet20(width=0.25), [0.5] * 19)) == 19
