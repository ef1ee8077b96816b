import pytest
import torch
from torch import nn

from pyprune import graph, models

POSITIONS = (0, 1, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 16)
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


def test_vgg16_has_the_published_keys_and_widths():
    model = models.vgg16_bn()
    convolutions = {name: (c.in_channels, c.out_channels) for name, c in graph.convolutions(model).items()}
    inputs = (3, *WIDTHS[:-1])
    assert convolutions == {
        f"features.conv{i}": widths for i, widths in zip(POSITIONS, zip(inputs, WIDTHS, strict=True), strict=True)
    }
    keys = {key for i in POSITIONS for leaf in ("weight", "bias") for key in (f"features.conv{i}.{leaf}",)}
    norms = [f"features.norm{i}" for i in POSITIONS] + ["classifier.norm1"]
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys |= {f"{norm}.{leaf}" for norm in norms for leaf in leaves}
    keys |= {f"classifier.linear{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")}
    assert set(model.state_dict()) == keys
    assert all(conv.kernel_size == (3, 3) and conv.padding == (1, 1) for conv in graph.convolutions(model).values())
    pools = [name for name, module in model.features.named_children() if isinstance(module, nn.MaxPool2d)]
    assert pools == ["pool2", "pool5", "pool9", "pool13"]


def test_vgg16_halves_the_map_five_times_and_counts_right():
    model = models.vgg16_bn().eval()
    assert model.features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 1, 1)
    convolutions = sum(a * b * 9 + b for a, b in zip((3, *WIDTHS[:-1]), WIDTHS, strict=True))
    linears = 512 * 512 + 512 + 512 * 10 + 10
    norms = 2 * (sum(WIDTHS) + 512)
    assert sum(p.numel() for p in model.parameters()) == convolutions + linears + norms == 14_991_946


@pytest.mark.parametrize(("width", "first", "last"), [(0.5, 32, 256), (0.01, 1, 5), (1.25, 80, 640)])
def test_width_scales_every_width_and_never_reaches_zero(width, first, last):
    model = models.vgg16_bn(width=width, num_classes=7, in_channels=1)
    assert model.features.conv0.weight.shape == (first, 1, 3, 3)
    assert model.features.conv16.out_channels == model.classifier.linear1.in_features == last
    assert model.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_vgg_digits_flattens_a_2x2_map():
    model = models.vgg_digits().eval()
    assert model.features(torch.zeros(1, 1, 16, 16)).shape == (1, 128, 2, 2)
    assert model.classifier.linear.in_features == 128 * 2 * 2
    assert list(graph.convolutions(model)) == [f"features.conv{i}" for i in (0, 1, 3, 4, 6, 7)]
    assert models.vgg_digits(widths=(4, 6), num_classes=3).eval()(torch.zeros(2, 1, 16, 16)).shape == (2, 3)


@pytest.mark.parametrize("build", [models.vgg16_bn, models.vgg_digits])
def test_models_can_be_traced_and_keep_their_variance(build):
    torch.manual_seed(0)
    model = build()
    assert any(node.target == "features.conv0" for node in graph.trace(model).nodes)
    maps = []
    last = [module for module in model.features if isinstance(module, nn.Conv2d)][-1]
    last.register_forward_hook(lambda module, args, output: maps.append(output))
    side = 32 if build is models.vgg16_bn else 16
    model(torch.randn(4, model.features.conv0.in_channels, side, side))
    assert 0.1 < float(maps[0].detach().std()) < 10


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (models.vgg16_bn, {"width": 0}, "vgg16_bn: width must be a positive factor; got 0"),
        (models.vgg16_bn, {"width": float("nan")}, "vgg16_bn: width must be a positive factor; got nan"),
        (models.vgg16_bn, {"num_classes": 0}, "vgg16_bn: num_classes must be at least 1; got 0"),
        (models.vgg_digits, {"widths": (4, 4, 4)}, "vgg_digits: widths must be one to four pairs; got 3"),
        (models.vgg_digits, {"widths": (4, 0)}, "vgg_digits: widths must be at least 1; got 0"),
        (models.vgg_digits, {"in_channels": -1}, "vgg_digits: in_channels must be at least 1; got -1"),
    ],
)
def test_impossible_sizes_are_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)
