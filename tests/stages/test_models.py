import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyprune import compaction, graph, models, selection

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
        (models.resnet20, {"width": -1}, "resnet20: width must be a positive factor; got -1"),
        (models.resnet56, {"num_classes": 2.5}, "resnet56: num_classes must be at least 1; got 2.5"),
        (models.resnet110, {"head": "classifier"}, "resnet110: head must be one of 'linear', 'fc'; got 'classifier'"),
        (models.resnet50, {"stem": "small"}, "resnet50: stem must be one of 'imagenet', 'cifar'; got 'small'"),
        (models.resnet50, {"in_channels": True}, "resnet50: in_channels must be at least 1; got True"),
        (
            models.resnet50,
            {"widths": {"layer1.0.conv4": 8}},
            "widths names no stage or layer 'layer1.0.conv4'. Did you mean 'layer1.0.conv",
        ),
        (models.resnet50, {"widths": {"conv1": 0}}, r"widths\['conv1'\] must be at least 1; got 0"),
        (
            models.resnet50,
            {"widths": {"layer2.1.conv3": 8, "layer2.0.downsample.0": 9}},
            "'layer2.0.downsample.0' and 'layer2.1.conv3' set convolutions that are added to one another and need one "
            "width; got 9 and 8",
        ),
        (
            models.resnet50,
            {"widths": {"layer2": 8, "layer2.1.conv3": 9}},
            "resnet50: 'layer2.1.conv3' and 'layer2' set convolutions that are added .* one width; got 9 and 32",
        ),
        (
            models.resnet20,
            {"widths": {"conv1": 8, "layer1": 9}},
            "resnet20: 'conv1' and 'layer1' set .* got 8 and 9",
        ),
        (models.resnet20, {"widths": {"layer4": 9}}, "widths names no stage or layer 'layer4'. Did you mean 'layer3'"),
        (models.resnet20, {"widths": {"layer1": 9}, "width": 2}, "resnet20: give either the factor width or widths"),
        (models.vgg16_bn, {"widths": {"block1": 9}, "width": 2}, "vgg16_bn: give either .*; got width=2 and both"),
        (models.vgg16_bn, {"widths": {"features.conv2": 9}}, "no stage or layer 'features.conv2'. Did you mean 'feat"),
        (models.vgg16_bn, {"widths": {"block5": 2.0}}, r"vgg16_bn: widths\['block5'\] must be at least 1; got 2.0"),
        (models.vgg_digits, {"widths": {"block4": 9}}, "vgg_digits: widths names no stage or layer 'block4'"),
        (models.standard_widths, {"arch": "resnet57"}, "there is no network 'resnet57'. Did you mean 'resnet56'"),
        (models.standard_widths, {"arch": "x"}, "there is no network 'x'. There are resnet20, .*vgg_digits"),
        (models.standard_widths, {"arch": "resnet50", "per": "block"}, "per must be 'stage' or 'layer'; got 'block'"),
        (models.standard_widths, {"arch": "resnet50", "width": 0}, "standard_widths: width must be a positive factor"),
    ],
)
def test_impossible_sizes_are_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@pytest.mark.parametrize("build", [models.vgg16_bn, models.resnet20, models.resnet50])
def test_widths_by_name_are_a_mapping(build):
    with pytest.raises(TypeError, match="widths must map names to filters; got list"):
        build(widths=[16, 32])


BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def entries(conv, bn):
    return {f"{conv}.weight", *(f"{bn}.{leaf}" for leaf in BN)}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "blocks", "count"),
    [
        (models.resnet20, 3, 269_722),
        (models.resnet32, 5, 464_154),
        (models.resnet44, 7, 658_586),
        (models.resnet56, 9, 853_018),
        (models.resnet110, 18, 1_727_962),
    ],
)
def test_cifar_resnets_have_the_usual_keys_and_counts(build, blocks, count):
    model = build()
    keys = entries("conv1", "bn1") | {"linear.weight", "linear.bias"}
    for block in (f"layer{i}.{k}" for i in (1, 2, 3) for k in range(blocks)):
        keys |= entries(f"{block}.conv1", f"{block}.bn1") | entries(f"{block}.conv2", f"{block}.bn2")
    assert set(model.state_dict()) == keys
    # 3x3 convolutions between 16, 32 and 64 channels, two numbers a norm channel, and the linear layer
    inner = [(16, 16)] * 2 * blocks + [(16, 32), (32, 32)] + [(32, 32)] * 2 * (blocks - 1)
    inner += [(32, 64), (64, 64)] + [(64, 64)] * 2 * (blocks - 1)
    assert sum(9 * i * o + 2 * o for i, o in [(3, 16), *inner]) + 650 == parameters(model) == count


def test_cifar_resnets_halve_the_map_twice_and_take_other_sizes():
    model = models.resnet20(num_classes=7, in_channels=1, head="fc").eval()
    x = torch.zeros(2, 1, 32, 32)
    assert model.layer3(model.layer2(model.layer1(model.conv1(x)))).shape == (2, 64, 8, 8)
    assert model(x).shape == model(torch.zeros(2, 1, 28, 30)).shape == (2, 7)
    assert "fc.weight" in model.state_dict()
    assert "linear.weight" not in model.state_dict()


@pytest.mark.parametrize(("width", "before", "after"), [(1.0, 8, 8), (0.3125, 2, 3), (0.05, 0, 1)])
def test_option_a_takes_every_second_pixel_and_pads_channels_on_both_sides(width, before, after):
    block = models.resnet20(width=width).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(2, block.conv1.in_channels, 6, 6)
    expected = torch.zeros(2, block.conv1.out_channels, 3, 3)
    expected[:, before : before + x.shape[1]] = x[:, :, 0::2, 0::2]
    assert block.conv1.out_channels == before + x.shape[1] + after
    assert torch.equal(block(x), expected)
    assert not torch.equal(block(x), expected.roll(1, 1))
    if width == 1.0:  # as it is usually written
        assert torch.equal(block(x), F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 32 // 4, 32 // 4)))


@pytest.mark.parametrize("width", [0.5, 0.07, 1.3])
def test_cifar_resnets_take_any_width(width):
    model = models.resnet20(width=width).eval()
    assert model.linear.in_features == max(1, round(64 * width))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("build", [models.resnet20, models.resnet56, models.resnet50])
def test_resnets_can_be_traced_and_keep_their_variance(build):
    torch.manual_seed(0)
    model = build()
    calls = graph.call_counts(graph.trace(model))
    assert {calls[name] for name in graph.convolutions(model)} == {1}
    assert 0.1 < float(model(torch.randn(4, 3, 32, 32)).detach().std()) < 10


def test_resnet50_has_torchvisions_keys_and_count():
    model = models.resnet50()
    keys = entries("conv1", "bn1") | {"fc.weight", "fc.bias"}
    for i, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)):
        keys |= entries(f"layer{i}.0.downsample.0", f"layer{i}.0.downsample.1")
        for block in (f"layer{i}.{k}" for k in range(blocks)):
            keys |= {key for j in (1, 2, 3) for key in entries(f"{block}.conv{j}", f"{block}.bn{j}")}
    assert set(model.state_dict()) == keys
    assert parameters(model) == 25_557_032
    strides = {name for name, conv in graph.convolutions(model).items() if conv.stride == (2, 2)}
    twos = {f"layer{i}.0.{leaf}" for i in (2, 3, 4) for leaf in ("conv2", "downsample.0")}
    assert strides == {"conv1"} | twos
    maps = model.eval().layer1(model.maxpool(model.conv1(torch.zeros(1, 3, 64, 64))))
    assert maps.shape == (1, 256, 16, 16)


def test_resnet50_of_the_ckrm_paper_has_its_number_of_parameters():
    assert parameters(models.resnet50(in_channels=1, num_classes=3, conv_bias=True)) == 23_534_467


def test_resnet50_for_small_images_keeps_the_map():
    model = models.resnet50(stem="cifar", num_classes=10).eval()
    assert model.layer1(model.maxpool(model.conv1(torch.zeros(1, 3, 8, 8)))).shape == (1, 256, 8, 8)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_resnet50_takes_widths_by_name_and_one_for_each_stream():
    model = models.resnet50(
        num_classes=3,
        in_channels=1,
        widths={
            "conv1": 5,
            "layer1.0.conv1": 3,
            "layer1.2.conv3": 12,
            "layer4.0.downsample.0": 20,
            "layer4.1.conv3": 20,
        },
    ).eval()
    layers = graph.convolutions(model)
    assert [layers[name].out_channels for name in ("conv1", "layer1.0.conv1", "layer1.0.conv2")] == [5, 3, 64]
    assert {layers[f"layer1.{k}.conv3"].out_channels for k in range(3)} == {12}
    assert layers["layer1.0.downsample.0"].out_channels == layers["layer2.0.conv1"].in_channels == 12
    assert layers["layer2.0.conv3"].out_channels == 512
    assert model.fc.in_features == 20
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 3)


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("per", ["stage", "layer"])
@pytest.mark.parametrize("arch", models.__all__)
def test_the_standard_widths_build_the_standard_network(arch, per):
    build, widths = getattr(models, arch), models.standard_widths(arch, per)
    assert shapes(build(widths=widths)) == shapes(build())
    name, size = next(iter(widths.items()))
    assert shapes(build(widths={**widths, name: size + 1})) != shapes(build())


@pytest.mark.parametrize("per", ["stage", "layer"])
@pytest.mark.parametrize("arch", ["vgg16_bn", "resnet20", "resnet56"])
def test_scaled_standard_widths_are_those_of_the_factor(arch, per):
    build = getattr(models, arch)
    assert shapes(build(widths=models.standard_widths(arch, per, 0.3))) == shapes(build(width=0.3))


@pytest.mark.parametrize("arch", ["vgg16_bn", "vgg_digits", "resnet20", "resnet50"])
def test_every_convolution_is_free_once(arch):
    """One name changes one width, or those of one stream, and together the names reach every convolution."""
    build, widths = getattr(models, arch), models.standard_widths(arch, "layer")
    with torch.device("meta"):
        plain = {name: conv.out_channels for name, conv in graph.convolutions(build()).items()}
        reached = []
        for name, size in widths.items():
            convolutions = graph.convolutions(build(widths={name: size + 1}))
            changed = [other for other, conv in convolutions.items() if conv.out_channels != plain[other]]
            assert changed[0] == name
            assert {convolutions[other].out_channels for other in changed} == {size + 1}
            reached += changed
    assert sorted(reached) == sorted(plain)


@given(st.data())
@settings(deadline=None, max_examples=15)
@pytest.mark.parametrize("arch", ["vgg_digits", "vgg16_bn", "resnet20"])
def test_any_widths_run(arch, data):
    names = models.standard_widths(arch, data.draw(st.sampled_from(["stage", "layer"])))
    widths = data.draw(st.dictionaries(st.sampled_from(sorted(names)), st.integers(1, 9)))
    model = getattr(models, arch)(in_channels=1, widths=names | dict.fromkeys(names, 3) | widths).eval()
    assert model(torch.zeros(1, 1, *(16, 16) if arch == "vgg_digits" else (32, 32))).shape == (1, 10)


def test_a_convolutions_name_goes_before_its_stages():
    layers = graph.convolutions(models.vgg16_bn(widths={"block1": 8, "features.conv1": 3, "features.conv16": 5}))
    assert [layers[f"features.conv{i}"].out_channels for i in (0, 1, 3, 16)] == [8, 3, 128, 5]
    layers = graph.convolutions(models.vgg_digits(widths={"features.conv7": 3, "block3": 4}))
    assert [layers[f"features.conv{i}"].out_channels for i in (4, 6, 7)] == [64, 4, 3]
    layers = graph.convolutions(models.resnet20(widths={"layer1": 6, "layer1.1.conv1": 2}))
    assert [layers[f"layer1.{k}.conv1"].out_channels for k in range(3)] == [6, 2, 6]
    assert layers["conv1"].out_channels == layers["layer2.0.conv1"].in_channels == 6
    same = models.resnet50(widths={"layer1": 4, "layer1.1.conv3": 16, "layer1.2.conv1": 5})  # 16 is what layer1 says
    assert same.layer1[2].conv1.out_channels == 5
    assert same.layer1[0].downsample[0].out_channels == 16


def test_the_first_linear_layer_of_vgg16_follows_the_last_convolution_unless_it_is_named():
    assert models.vgg16_bn(widths={"block5": 20}).classifier.linear1.weight.shape == (20, 20)
    named = models.vgg16_bn(widths={"features.conv16": 20, "classifier.linear1": 7}).classifier
    assert (named.linear1.weight.shape, named.norm1.num_features, named.linear2.in_features) == ((7, 20), 7, 7)


def test_resnet50_with_the_widths_of_the_ckrm_papers_table():
    widths = {"conv1": 16, "layer1": 16, "layer2": 32, "layer3": 24, "layer4": 18}
    assert parameters(models.resnet50(in_channels=1, num_classes=3, conv_bias=True, widths=widths)) == 193_627


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 5), (5, 4), (9, 1)])
def test_option_a_leaves_channels_out_where_a_stage_is_narrower(inputs, outputs):
    block = models.resnet20(widths={"layer1": inputs, "layer2": outputs}).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    x = torch.rand(2, inputs, 6, 6)
    first = -((outputs - inputs) // 2)
    assert torch.equal(block(x), x[:, first : first + outputs, ::2, ::2])
    assert not torch.equal(block(x), x[:, first - 1 : first - 1 + outputs, ::2, ::2])


def test_a_network_with_widths_of_its_own_is_compacted_exactly():
    model = models.resnet20(widths={"layer1": 8, "layer2": 5, "layer3": 13, "layer2.1.conv1": 3})
    x = torch.randn(2, 3, 32, 32)
    slim = compaction.compact(model, selection.select(model, "l1", rates=0.4), x)
    assert slim.certificate.verified
    assert parameters(slim.model) < 0.7 * parameters(model)
