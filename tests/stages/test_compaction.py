"""Compaction: what leaves, what stays and why, and that the slim network equals the masked one."""

import copy
import operator
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyprune as pp
from pyprune import compaction, cutting, graph, proving
from pyprune.types import Plan
from tolerances import COMPACTED_FLOAT64


def compact(model, plan, inputs, **options):
    return pp.compact(model, plan, inputs, latency=False, **options)


def masked(model, plan):
    """Zero what the masks zero, without pyprune's own code for it."""
    twin = copy.deepcopy(model)
    for name, indices in graph.dead_slices(twin, plan).items():
        twin.get_parameter(name).data[torch.from_numpy(indices)] = 0
    return twin


def randomised(model, seed=0):
    """Give every norm statistics and affine parameters of its own."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, leaf, None)
            if "Norm" in type(module).__name__ and tensor is not None:
                tensor.data = torch.rand(tensor.shape, generator=generator).to(tensor) + 0.5
    return model


def assert_equal_to_masked(model, plan, x, **options):
    """Compact in float64 and compare on fresh inputs; return what compact returned."""
    model, x = randomised(model).double(), x.double()
    slim = compact(model, plan, x, **options)
    other = torch.randn((len(x) + 1, *x.shape[1:]), dtype=torch.float64)
    expected = masked(model, plan).eval()
    found = copy.deepcopy(slim.model).eval()
    for batch in (x, other):
        want = expected(batch)
        assert (found(batch) - want).abs().max() <= COMPACTED_FLOAT64 * max(1, want.abs().max())
    return slim


def half(model, seed=0):
    """Keep a random half of the filters of every convolution."""
    rng = np.random.default_rng(seed)
    layers = graph.convolutions(model)
    return Plan({
        name: np.sort(rng.choice(layer.out_channels, max(1, layer.out_channels // 2), replace=False))
        for name, layer in layers.items()
    })  # fmt: skip


def chain(*layers):
    return nn.Sequential(*layers)


def test_a_chain_by_hand():
    model = chain(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(8, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0, 3.0]).view(2, 1, 1, 1))
        model[0].bias.copy_(torch.tensor([1.0, -1.0]))
        model[2].weight.copy_(torch.tensor([[1.0, 10.0], [5.0, 7.0]]).view(2, 2, 1, 1))
        model[2].bias.copy_(torch.tensor([0.5, 0.25]))
        model[4].weight.copy_(torch.arange(8.0).view(1, 8))
        model[4].bias.zero_()
    slim = compact(model, Plan({"0": [0], "2": [1]}), torch.ones(1, 1, 2, 2)).model
    assert slim.get_submodule("0").weight.flatten().tolist() == [2.0]
    assert slim.get_submodule("0").bias.tolist() == [1.0]
    assert slim.get_submodule("2").weight.flatten().tolist() == [5.0]
    assert slim.get_submodule("2").bias.tolist() == [0.25]
    assert slim.get_submodule("4").weight.tolist() == [[4.0, 5.0, 6.0, 7.0]]
    assert slim(torch.ones(1, 1, 2, 2)).tolist() == [[(5 * 3 + 0.25) * (4 + 5 + 6 + 7)]]
    assert (slim.get_submodule("2").in_channels, slim.get_submodule("2").out_channels) == (1, 1)
    assert (slim.get_submodule("4").in_features, slim.get_submodule("4").out_features) == (4, 1)


def test_vgg16_equals_its_masked_twin():
    torch.manual_seed(0)
    model = pp.models.vgg16_bn(num_classes=10, width=0.125)
    slim = assert_equal_to_masked(model, half(model), torch.randn(2, 3, 32, 32))
    assert slim.kept == {}
    assert slim.certificate.verified
    assert slim.certificate.dtype == "float64"
    assert len(slim.certificate.inputs) == 3
    assert slim.certificate.max_difference <= slim.certificate.tolerance == COMPACTED_FLOAT64
    for name, layer in graph.convolutions(model).items():
        assert slim.model.get_submodule(name).out_channels == layer.out_channels // 2


@pytest.mark.slow
def test_full_vgg16_equals_its_masked_twin():
    torch.manual_seed(0)
    model = pp.models.vgg16_bn(num_classes=10)
    assert assert_equal_to_masked(model, half(model), torch.randn(2, 3, 32, 32)).kept == {}


def test_one_and_three_dimensions():
    for dims in (1, 3):
        conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
        pool, mean = getattr(nn, f"MaxPool{dims}d"), getattr(nn, f"AdaptiveAvgPool{dims}d")
        model = chain(
            conv(2, 6, 3),
            norm(6),
            nn.PReLU(6),
            pool(2),
            conv(6, 4, 1),
            mean(2),
            nn.Flatten(),
            nn.Linear(4 * 2**dims, 3),
        )
        slim = assert_equal_to_masked(model, half(model), torch.randn(2, 2, *[8] * dims))
        assert slim.kept == {}
        assert slim.model.get_submodule("2").num_parameters == 3


class Functional(nn.Module):
    """A chain written with functions, methods and sizes read from tensors."""

    def __init__(self, flatten):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 3)
        self.norm, self.linear, self.flatten = nn.InstanceNorm2d(6, affine=True), nn.Linear(4 * 9, 3), flatten

    def forward(self, x):
        x = F.dropout(F.max_pool2d(F.relu(self.norm(self.conv1(x))), 2), 0.5, self.training)
        x = F.interpolate(x, size=(10, 10), mode="bilinear").contiguous()
        x = F.avg_pool2d(F.leaky_relu(self.conv2(x)), 2).clamp(min=0)
        return self.linear(self.flatten(F.adaptive_max_pool2d(x, 3)))


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: torch.flatten(x, 1),
        lambda x: x.flatten(1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.reshape((x.size()[0], -1)),
        lambda x: x.view(-1, 36),
        lambda x: x.view(x.size(0), 36),
    ],
)
def test_functions_and_every_flatten(flatten):
    model = Functional(flatten)
    slim = assert_equal_to_masked(model, half(model), torch.randn(2, 2, 12, 12))
    assert slim.kept == {}
    assert slim.model.linear.in_features == 2 * 9


def test_means_over_space_and_sizes_of_space():
    class Means(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.linear = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 1), nn.Linear(6, 2)

        def forward(self, x):
            x = self.conv1(x)
            x = F.interpolate(x, size=x.shape[2:], mode="nearest")
            x = F.interpolate(x, size=(x.size(-2) * 2, x.size(3)))
            return self.linear(torch.mean(self.conv2(x).mean(3, keepdim=True), (-1, -2)))

    model = Means()
    assert assert_equal_to_masked(model, half(model), torch.randn(2, 1, 8, 8)).kept == {}


class Residual(nn.Module):
    def __init__(self, add):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(i, 6, 3, padding=1) for i in (2, 6, 6))
        self.norm, self.linear, self.add = nn.BatchNorm2d(6), nn.Linear(6, 3), add

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = self.add(self.b(F.relu(self.a(x))), x)
        return self.linear(F.relu(self.norm(x)).mean((2, 3)))


@pytest.mark.parametrize("add", [lambda a, b: a + b, torch.add, operator.iadd, lambda a, b: a.add_(b)])
def test_a_sum_loses_what_both_sides_lose(add):
    model = Residual(add)
    plan = Plan({"stem": [0, 1, 2], "a": [3], "b": [0, 3]})
    slim = assert_equal_to_masked(model, plan, torch.randn(2, 2, 5, 5), residual="intersect")
    assert slim.model.norm.num_features == slim.model.linear.in_features == 4
    assert (slim.model.stem.out_channels, slim.model.a.out_channels, slim.model.b.out_channels) == (4, 1, 4)
    assert list(slim.kept["stem"]) == [3]
    assert "where b keeps its channel" in slim.kept["stem"][3]
    assert {index: why.split(", ")[1] for index, why in slim.kept["b"].items()} == {
        1: "where stem keeps its channel", 2: "where stem keeps its channel",
    }  # fmt: skip


@pytest.mark.parametrize("activation", [nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid(), nn.Threshold(0.1, 2.0)])
def test_constants_are_folded_into_biases(activation):
    for bias in (True, False):
        model = chain(
            nn.Conv2d(2, 4, 3), activation, nn.MaxPool2d(2, padding=1), nn.Conv2d(4, 4, 3, bias=bias), activation,
            nn.Flatten(), nn.Linear(16, 3, bias=bias),
        )  # fmt: skip
        slim = assert_equal_to_masked(model, half(model), torch.randn(2, 2, 8, 8))
        assert slim.kept == {}
        assert slim.model.get_submodule("3").bias is not None
        assert slim.model.get_submodule("6").bias is not None
        analysis = pp.analyse(model, half(model), torch.randn(2, 2, 8, 8).double())
        assert analysis.parameters_left == sum(p.numel() for p in slim.model.parameters())


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_constants_pass_through_paddings_that_repeat(mode):
    model = chain(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 2, 3, padding=1, padding_mode=mode))
    plan = Plan({"0": [1, 2]})
    assert assert_equal_to_masked(model, plan, torch.randn(2, 1, 8, 8)).model.get_submodule("2").in_channels == 2


class Between(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between, **parts):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3)
        self.between = between
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.last(self.between(self, self.first(x)))


class Subclass(nn.Conv2d):
    """A subclass may compute anything."""


def hooked():
    module = nn.ReLU()
    module.register_forward_hook(lambda *_: None)
    return module


def replaced():
    module = nn.ReLU()
    module.forward = lambda x: torch.relu(x)
    return module


def parametrized():
    module = nn.Conv2d(4, 4, 1)
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Tanh())
    return module


REASONS = {
    "bilinear": (lambda s, x: s.m(x, x), nn.Bilinear(6, 6, 6), r"feeds m \(Bilinear\), which pyprune"),
    "softmax": (lambda s, x: torch.softmax(x, 1), None, r"feeds torch\.softmax, which pyprune does not know"),
    "unbind": (lambda s, x: torch.stack(x.unbind(1), 1), None, r"feeds \.unbind\(\), which pyprune does not know"),
    "method": (lambda s, x: x.flip(2), None, r"feeds \.flip\(\), which pyprune does not know"),
    "attribute": (lambda s, x: x.mT, None, r"feeds \.mT, which pyprune does not know"),
    "subclass": (lambda s, x: s.m(x), Subclass(4, 4, 1), r"feeds torch\.conv2d, which pyprune does not know"),
    "hook": (lambda s, x: s.m(x), hooked(), "feeds m, which has a forward hook"),
    "forward": (lambda s, x: s.m(x), replaced(), "feeds m, which has its forward replaced"),
    "parametrized": (lambda s, x: s.m(x), parametrized(), "feeds m, which has a parametrized weight"),
    "reused": (lambda s, x: s.m(s.m(x)), nn.Conv2d(4, 4, 1), "is read by m too, where m keeps its channel"),
    "read": (lambda s, x: s.m(x) * s.m.weight.sum(), nn.Conv2d(4, 4, 1), "feeds m, which has its weight read directly"),
    "size": (lambda s, x: x / x.size(1), None, "has its number of channels read by size"),
    "shape": (lambda s, x: x / (2 * x.shape[1]), None, "has its number of channels read by mul"),
    "product": (lambda s, x: torch.mul(x, other=x.relu()), None, r"feeds torch\.mul together with another"),
    "average": (lambda s, x: x + x.mean(1, keepdim=True), None, "is averaged with other channels by mean"),
    "reshape": (lambda s, x: x.transpose(1, 2).reshape(-1, 4, 6, 6), None, "channels not along dimension 1"),
    "group norm": (lambda s, x: s.m(x), nn.GroupNorm(1, 4), "reaches m, a GroupNorm, which mixes it"),
    "no affine": (lambda s, x: s.m(x), nn.BatchNorm2d(4, affine=False), "reaches m, a norm without affine parameters"),
    "padded average": (
        lambda s, x: F.avg_pool2d(torch.sigmoid(x), 3, 1, padding=1), None,
        r"carries the constant 0\.5 into avg_pool2d, which averages it with padding",
    ),
    "indices": (
        lambda s, x: F.max_pool2d(x, 2, return_indices=True)[0], None,
        r"feeds torch\.nn\.functional\.max_pool2d_with_indices",
    ),
    "linear": (lambda s, x: s.m(x), nn.Linear(6, 6), "feeds m with its channels not along the last dimension"),
    "unfollowed": (lambda s, x: x + torch.ones_like(x), None, r"feeds torch\.ones_like, which pyprune"),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_what_stays_and_why(case):
    between, part, reason = REASONS[case]
    model = Between(between, **({"m": copy.deepcopy(part)} if part else {}))
    x = torch.randn(2, 2, 6, 6)
    slim = compact(randomised(model).double(), Plan({"first": [1, 3]}), x.double())
    assert set(slim.kept["first"]) == {0, 2}
    for why in slim.kept["first"].values():
        assert re.search(reason, why), why
    assert slim.model.first.out_channels == 4


def test_constants_into_zero_padding_stay():
    model = chain(nn.Conv2d(1, 3, 3), nn.Sigmoid(), nn.Conv2d(3, 2, 3, padding=1))
    slim = assert_equal_to_masked(model, Plan({"0": [0]}), torch.randn(2, 1, 8, 8))
    reason = "carries the constant 0.5 into 2, which pads with zeros"
    assert slim.kept == {"0": {1: reason, 2: reason}}


def test_the_output_keeps_its_channels_and_shared_weights_keep_theirs():
    model = chain(nn.Conv2d(1, 3, 3))
    slim = assert_equal_to_masked(model, Plan({"0": [0]}), torch.randn(2, 1, 8, 8))
    assert slim.kept == {"0": {1: "is an output of the model", 2: "is an output of the model"}}
    model = chain(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1))
    model[2].weight = model[0].weight
    slim = assert_equal_to_masked(model, Plan({"0": [0]}), torch.randn(2, 2, 4, 4))
    assert slim.kept == {"0": {1: "shares its parameters with 2.weight"}}
    assert slim.model.get_submodule("0").weight is slim.model.get_submodule("2").weight


def test_a_layer_that_is_never_called_is_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return self.a(x)

    slim = compact(Unused(), Plan({"b": [0]}), torch.randn(1, 1, 2, 2))
    assert "does not call" in slim.kept["b"][1]


def test_a_sum_with_an_input_keeps_the_channels_of_the_input():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.b(self.a(x) + x)

    slim = assert_equal_to_masked(Skips(), Plan({"a": [1, 2]}), torch.randn(2, 3, 4, 4))
    assert slim.kept == {}
    assert slim.model.b.in_channels == 3
    slim = assert_equal_to_masked(Skips(), Plan({"a": [1, 2]}), torch.randn(2, 3, 4, 4), residual="intersect")
    assert slim.kept == {"a": {0: "reaches add, where x keeps its channel"}}


def test_an_overwritten_tensor_keeps_what_would_change():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            x = self.a(x)
            return self.b(x.sigmoid_()) + self.c(x)

    slim = assert_equal_to_masked(Overwrites(), Plan({"a": [1]}), torch.randn(2, 1, 4, 4))
    assert slim.kept["a"][0] == "is overwritten at sigmoid_ while others read it"


LAYERS = st.lists(
    st.sampled_from(["conv", "conv1", "norm", "relu", "sigmoid", "gelu", "instance", "prelu", "max", "avg", "dropout"]),
    min_size=1, max_size=7,
)  # fmt: skip


def drawn(names, widths, flat):
    layers, channels, size, i = [nn.Conv2d(2, widths[0], 3, padding=1)], widths[0], 12, 1
    for name in names:
        if name in ("conv", "conv1"):
            layers.append(
                nn.Conv2d(channels, widths[i % 4], 3, padding=1)
                if name == "conv"
                else nn.Conv2d(channels, widths[i % 4], 1)
            )
            channels, i = widths[i % 4], i + 1
        elif name in ("max", "avg") and size >= 6:
            layers.append(nn.MaxPool2d(2) if name == "max" else nn.AvgPool2d(2))
            size //= 2
        else:
            layers += {
                "norm": [nn.BatchNorm2d(channels)], "relu": [nn.ReLU()], "sigmoid": [nn.Sigmoid()], "gelu": [nn.GELU()],
                "instance": [nn.InstanceNorm2d(channels, affine=True)], "prelu": [nn.PReLU(channels)],
                "dropout": [nn.Dropout2d()],
            }.get(name, [])  # fmt: skip
    layers += [] if flat else [nn.AdaptiveAvgPool2d(1)]
    columns = channels * (size * size if flat else 1)
    return chain(*layers, nn.Flatten(), nn.BatchNorm1d(columns), nn.Linear(columns, 3))


@settings(max_examples=25, deadline=None)
@given(names=LAYERS, widths=st.lists(st.integers(1, 6), min_size=4, max_size=4), flat=st.booleans(), data=st.data())
def test_any_chain_equals_its_masked_twin(names, widths, flat, data):
    model = drawn(names, widths, flat)
    keep = {}
    for name, layer in graph.convolutions(model).items():
        keep[name] = sorted(data.draw(st.sets(st.integers(0, layer.out_channels - 1), min_size=1), label=name))
    slim = assert_equal_to_masked(model, Plan(keep), torch.randn(2, 2, 12, 12))
    for name, kept in keep.items():
        stays = len(kept) + len(slim.kept.get(name, {}))
        assert slim.model.get_submodule(name).out_channels == stays
    assert all("carries the constant" in why for filters in slim.kept.values() for why in filters.values())


def test_the_model_is_not_touched_and_shares_nothing():
    torch.manual_seed(0)
    model = chain(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[1].eval()
    model[3].weight.requires_grad_(False)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    slim = pp.compact(model, Plan({"0": [1], "3": [0, 1, 2, 3]}), torch.randn(1, 1, 8, 8, generator=torch.Generator()))
    assert torch.equal(state, torch.get_rng_state())
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    own = {one.untyped_storage().data_ptr() for one in model.state_dict().values()}
    assert not own & {one.untyped_storage().data_ptr() for one in slim.model.state_dict().values()}
    assert [slim.model.get_submodule(str(i)).training for i in range(5)] == flags[1:]
    assert not slim.model.get_submodule("3").weight.requires_grad
    assert slim.model.get_submodule("0").weight.requires_grad
    assert list(slim.model.state_dict()) == list(model.state_dict())
    assert slim.before.latency_ms > 0
    assert slim.after.latency_ms > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_type_survives(dtype):
    model = chain(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Conv2d(4, 2, 3)).to(dtype)
    slim = compact(model, Plan({"0": [1]}), torch.randn(1, 1, 8, 8, dtype=dtype))
    assert {one.dtype for one in slim.model.parameters()} == {dtype}
    assert slim.certificate.dtype == str(dtype).removeprefix("torch.")
    assert slim.certificate.native_difference <= slim.certificate.native_tolerance


def test_the_memory_format_survives():
    model = chain(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)).to(memory_format=torch.channels_last)
    slim = compact(model, Plan({"0": [0, 1], "1": [0, 1]}), torch.randn(1, 3, 8, 8)).model
    for i in range(3):
        assert slim.get_submodule(str(i)).weight.is_contiguous(memory_format=torch.channels_last)
    assert slim.get_submodule("2").weight.stride() == (2, 1, 2, 2)


def test_the_slim_network_trains_copies_and_compiles():
    model = Residual(operator.add)
    slim = compact(model, half(model), torch.randn(2, 2, 5, 5)).model
    assert type(slim).__name__ == "SlimResidual"
    x = torch.randn(4, 2, 5, 5)
    slim.train()
    assert slim.norm.training
    before = slim.norm.running_mean.clone()
    slim(x).sum().backward()
    assert slim.stem.weight.grad is not None
    assert not torch.equal(before, slim.norm.running_mean)
    slim.eval()
    assert not slim.norm.training
    assert torch.equal(copy.deepcopy(slim)(x), slim(x))


def test_functional_dropout_follows_the_training_flag():
    model = Functional(lambda x: x.flatten(1)).train()
    slim = compact(model, half(model), torch.randn(2, 2, 12, 12)).model
    assert isinstance(slim.dropout, nn.Dropout)
    assert slim.dropout.training
    x = torch.randn(2, 2, 12, 12)
    assert not torch.equal(slim(x), slim(x))
    slim.eval()
    assert torch.equal(slim(x), slim(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_slim_network_compiles_in_one_graph():
    model = Residual(operator.add)
    slim = compact(model, half(model), torch.randn(2, 2, 5, 5)).model.eval()
    x = torch.randn(4, 2, 5, 5)
    assert torch.allclose(torch.compile(slim, backend="eager", fullgraph=True)(x), slim(x))


def test_round_to_brings_back_the_lowest_with_their_weights():
    model = chain(nn.Conv2d(1, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 2, 3))
    plan = Plan({"0": [2, 7, 9]})
    slim = compact(model, plan, torch.randn(1, 1, 8, 8), round_to=4)
    assert slim.kept == {"0": {0: "makes the number of filters a multiple of 4"}}
    assert torch.equal(slim.model.get_submodule("0").weight, model[0].weight[[0, 2, 7, 9]])
    assert torch.equal(slim.model.get_submodule("1").weight, model[1].weight[[0, 2, 7, 9]])
    assert compact(model, plan, torch.randn(1, 1, 8, 8), round_to=16).model.get_submodule("0").out_channels == 10
    assert slim.plan is plan


def test_round_to_brings_back_both_sides_of_a_sum():
    model = Residual(operator.add)
    plan = Plan({"stem": [0], "b": [0], "a": [0, 1]})
    slim = compact(model, plan, torch.randn(2, 2, 5, 5), round_to=2)
    assert slim.model.stem.out_channels == slim.model.b.out_channels == 2
    assert set(slim.kept["stem"]) == set(slim.kept["b"]) == {1}


def test_the_analysis_equals_a_recount():
    model = pp.models.vgg16_bn(num_classes=10, width=0.125)
    plan, x = half(model), torch.randn(1, 3, 32, 32)
    analysis, slim = pp.analyse(model, plan, x), compact(model, plan, x)
    assert analysis.parameters == sum(p.numel() for p in model.parameters()) == slim.before.parameters
    assert analysis.parameters_left == sum(p.numel() for p in slim.model.parameters()) == slim.after.parameters
    for layer in analysis.layers:
        module = slim.model.get_submodule(layer.name)
        assert layer.parameters_left == sum(p.numel() for p in module.parameters())
        assert layer.outputs - layer.removed == len(module.weight)
        assert layer.inputs_left == module.weight.shape[1]
    first = analysis.layers[0]
    assert (first.name, first.kind, first.planned, first.removed) == ("features.conv0", "Conv2d", 4, 4)
    assert "features.conv0" in str(analysis)
    assert analysis.to_json()["layers"][0]["inputs"] == 3


def test_the_analysis_prints_reasons_and_saves(tmp_path):
    model = chain(nn.Conv2d(1, 12, 3))
    analysis = pp.analyse(model, Plan({"0": [0]}), torch.randn(1, 1, 4, 4))
    assert "kept 11 (1, 2, 3, 4, 5, 6, 7, 8, ...): is an output of the model" in str(analysis)
    analysis.save(tmp_path / "analysis.json")
    assert '"1": "is an output of the model"' in (tmp_path / "analysis.json").read_text()


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "2.bias", "1.weight"])
def test_a_disturbed_weight_is_noticed(monkeypatch, name):
    cut = proving.cut

    def disturbed(target, *args):
        layer = cut(target, *args)
        if name.startswith(target):
            layer.get_parameter(name.partition(".")[2]).data.flatten()[0] += 1e-6
        return layer

    model = chain(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    for module in (cutting, proving):
        monkeypatch.setattr(module, "cut", disturbed)
    with pytest.raises(RuntimeError, match=r"differs from the masked one by \S+ in float64, more than 1e-10"):
        compact(model, Plan({"0": [0, 1]}), torch.randn(1, 1, 8, 8))
    assert not compact(model, Plan({"0": [0, 1]}), torch.randn(1, 1, 8, 8), verify=False).certificate.verified


def test_a_disturbed_delivery_is_noticed(monkeypatch):
    rebuild = compaction.rebuild

    def disturbed(*args):
        slim = rebuild(*args)
        slim.get_parameter("2.bias").data[0] = float("nan")
        return slim

    model = chain(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    monkeypatch.setattr(compaction, "rebuild", disturbed)
    with pytest.raises(RuntimeError, match="in float32, more than 1e-05"):
        compact(model, Plan({"0": [0, 1]}), torch.randn(1, 1, 8, 8))


def test_large_and_fixed_batches():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            return self.b(self.a(x)).view(12, 2, 3, 3)

    slim = compact(Fixed(), Plan({"a": [0, 1]}), torch.randn(12, 1, 7, 7))
    assert slim.certificate.inputs == ("example inputs (12 images)",)
    model = chain(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3))
    slim = compact(model, Plan({"0": [0, 1]}), torch.randn(12, 1, 7, 7))
    assert slim.certificate.inputs == (
        "example inputs (first 8 of 12 images)", "normal random inputs (2 images)", "normal random inputs (3 images)",
    )  # fmt: skip


def test_a_network_that_overwrites_its_input_is_compared_on_the_same_images():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x):
            return self.b(self.a(x.sigmoid_()))

    x = torch.randn(2, 1, 7, 7)
    before = x.clone()
    assert compact(Overwrites(), Plan({"a": [0, 1]}), x).certificate.verified
    assert torch.equal(x, before)


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 4, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x, y, scale: float = 2.0):
            z = self.a(x) + self.b(y)
            return {"c": self.c(z) * scale, "more": (self.c(z), x)}

    model = Two()
    plan = Plan({"a": [0, 1], "b": [1, 2]})
    slim = compact(model, plan, (torch.randn(2, 1, 3, 3), torch.randn(2, 2, 3, 3)))
    assert slim.kept == {}
    assert slim.model.a.out_channels == slim.model.b.out_channels == 2
    slim = compact(model, plan, (torch.randn(2, 1, 3, 3), torch.randn(2, 2, 3, 3)), residual="intersect")
    assert slim.kept == {
        "a": {2: "reaches add, where b keeps its channel"},
        "b": {0: "reaches add, where a keeps its channel"},
    }
    assert set(slim.model(torch.randn(1, 1, 3, 3), torch.randn(1, 2, 3, 3))) == {"c", "more"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"example_inputs": torch.randn(1, 2, 8, 8)}, ValueError, r"inputs of \[1, 2, 8, 8\] float32 \(.*Pass"),
        ({"example_inputs": torch.randn(1, 1, 8, 8).double()}, ValueError, "does not accept example_inputs"),
        ({"example_inputs": "x"}, TypeError, "example_inputs must be a tensor or a tuple of tensors"),
        ({"plan": Plan({"conv": [0]})}, ValueError, "compact: the model has no convolution named 'conv'"),
        ({"plan": Plan({"0": [4]})}, ValueError, "compact: '0' has filters 0 to 3; the plan keeps 4"),
        ({"residual": "both"}, ValueError, 'must be one of "scatter", "intersect", "union"; got \'both\''),
        ({"round_to": 0}, ValueError, "round_to must be a positive whole number; got 0"),
        ({"round_to": 2.0}, ValueError, "round_to must be a positive whole number; got 2.0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changes, error, message):
    model = chain(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3))
    arguments = {"model": model, "plan": Plan({"0": [0]}), "example_inputs": torch.randn(1, 1, 8, 8), **changes}
    with pytest.raises(error, match=message):
        pp.compact(**arguments)
