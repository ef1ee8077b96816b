"""Residual networks: the CIFAR family with parameter-free shortcuts, and ResNet-50 with widths of one's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from pyprune.models.building import Widths, check_counts, initialise

HEADS = ("linear", "fc")
STEMS = ("imagenet", "cifar")

DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9, "resnet110": 18}
"""Blocks in each stage of the CIFAR networks."""

CIFAR_STAGES = {"layer1": 16, "layer2": 32, "layer3": 64}
"""Their widths."""

STAGES = {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}
"""Blocks of each stage of ResNet-50; its bottlenecks are 64, 128, 256 and 512 wide, its streams four times that."""


def _cifar_widths(blocks: int) -> Widths:
    """Say that a stage has one width, and that what it adds up has one; the stem belongs to the first stage."""
    layers = {"conv1": ("layer1", 1)}
    for stage in CIFAR_STAGES:
        layers |= {f"{stage}.{k}.conv{i}": (stage, 1) for k in range(blocks) for i in (1, 2)}
    stems = {"layer1": ("conv1",)}
    streams = [(*stems.get(stage, ()), *(f"{stage}.{k}.conv2" for k in range(blocks))) for stage in CIFAR_STAGES]
    return Widths(CIFAR_STAGES, layers, tuple(streams))


def _resnet50_widths() -> Widths:
    """Say that bottlenecks have the width of their stage, and what their stage adds up four times that."""
    layers, streams = {"conv1": ("conv1", 1)}, []
    for stage, blocks in STAGES.items():
        for k in range(blocks):
            layers |= {f"{stage}.{k}.conv{i}": (stage, 4 if i == 3 else 1) for i in (1, 2, 3)}
            layers |= {f"{stage}.0.downsample.0": (stage, 4)} if k == 0 else {}
        streams.append(tuple(name for name, own in layers.items() if own == (stage, 4)))
    return Widths({"conv1": 64} | {stage: 64 << i for i, stage in enumerate(STAGES)}, layers, tuple(streams))


WIDTHS = {name: _cifar_widths(blocks) for name, blocks in DEPTHS.items()} | {"resnet50": _resnet50_widths()}
"""What is free in each network."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A).

    Where the block halves the map, the shortcut takes every second row and column. Where it widens, zero channels are
    added on both sides: (outputs - inputs) // 2 before and the rest after, so any widths fit. That is outputs // 4
    on each side where the width doubles to a multiple of four. Where it narrows, channels are left out on both sides.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        before = (outputs - inputs) // 2
        self.pad = (before, outputs - inputs - before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return maps [N, outputs, H / stride, W / stride] of ``x`` [N, inputs, H, W]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride == 2:
            x = x[:, :, ::2, ::2]
        if any(self.pad):
            x = F.pad(x, (0, 0, 0, 0, *self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """A 3x3 stem, three stages of basic blocks on 32x32, 16x16 and 8x8 maps, a global average, one linear layer.

    Parameters
    ----------
    who
        The public name, for messages and the number of blocks.
    num_classes, in_channels, width, head, widths
        As in :func:`resnet20`.
    """

    def __init__(
        self, who: str, num_classes: int, in_channels: int, width: float, head: str, widths: Mapping[str, int] | None
    ) -> None:
        super().__init__()
        check_counts(who, num_classes=num_classes, in_channels=in_channels)
        _check_choice(who, "head", head, HEADS)
        sizes = WIDTHS[who].chosen(who, widths, width)
        self.conv1 = nn.Conv2d(in_channels, sizes["conv1"], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(sizes["conv1"])
        inputs = sizes["conv1"]
        for stage in CIFAR_STAGES:
            blocks = []
            for k in range(DEPTHS[who]):
                inner, outputs = (sizes[f"{stage}.{k}.conv{i}"] for i in (1, 2))
                blocks.append(BasicBlock(inputs, inner, outputs, 2 if k == 0 and stage != "layer1" else 1))
                inputs = outputs
            self.add_module(stage, nn.Sequential(*blocks))
        self.head = head
        self.add_module(head, nn.Linear(inputs, num_classes))
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores [N, classes] of images ``x`` [N, C, H, W]."""
        y = F.relu(self.bn1(self.conv1(x)))
        for stage in CIFAR_STAGES:
            y = getattr(self, stage)(y)
        y = torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)
        scores: torch.Tensor = getattr(self, self.head)(y)
        return scores


def resnet20(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    head: str = "linear",
    widths: Mapping[str, int] | None = None,
) -> CifarResNet:
    """ResNet-20 for 32x32 images: 0.27 million parameters.

    The CIFAR networks of He et al. with option-A shortcuts: a 3x3 convolution, then three stages of (depth - 2) / 6
    basic blocks with 16, 32 and 64 channels. A state dict has the usual keys: ``conv1``, ``bn1``,
    ``layer{1,2,3}.{k}.conv{1,2}``, ``layer{1,2,3}.{k}.bn{1,2}``, and the last layer.

    Parameters
    ----------
    num_classes
        Outputs of the last layer.
    in_channels
        Channels of the images [N, in_channels, 32, 32]; other sizes work too, the last maps are averaged.
    width
        Factor on the three widths; each is rounded and at least 1.
    head
        Name of the last layer: ``"linear"``, or ``"fc"`` as in HRank's ResNet-56.
        :func:`pyprune.load_checkpoint` reads either into either.
    widths
        Instead of ``width``: filters by name, of a stage or of single convolutions, the others being standard:
        ``{"layer1": 8, "layer2": 24}`` or ``{"layer1.0.conv1": 4}``. A convolution's own name goes before its stage's.
        What a stage adds up (``layer1.0.conv2``, ``layer1.1.conv2``, ..., and the stem ``conv1`` in the first) has one
        width: naming one sets them all. :func:`pyprune.models.standard_widths` lists what can be chosen.

    Returns
    -------
    CifarResNet
        With fresh weights: He-normal convolutions.

    Raises
    ------
    ValueError
        If a count is below 1, ``width`` is not positive, ``head`` is unknown, ``widths`` names what there is not or
        gives convolutions that are added two widths, or ``width`` is given as well.
    TypeError
        If ``widths`` is no mapping.

    References
    ----------
    K. He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.

    Examples
    --------
    >>> sum(p.numel() for p in resnet20().parameters())
    269722
    """
    return CifarResNet("resnet20", num_classes, in_channels, width, head, widths)


def resnet32(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    head: str = "linear",
    widths: Mapping[str, int] | None = None,
) -> CifarResNet:
    """ResNet-32 for 32x32 images: 0.46 million parameters; everything else as in :func:`resnet20`."""
    return CifarResNet("resnet32", num_classes, in_channels, width, head, widths)


def resnet44(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    head: str = "linear",
    widths: Mapping[str, int] | None = None,
) -> CifarResNet:
    """ResNet-44 for 32x32 images: 0.66 million parameters; everything else as in :func:`resnet20`."""
    return CifarResNet("resnet44", num_classes, in_channels, width, head, widths)


def resnet56(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    head: str = "linear",
    widths: Mapping[str, int] | None = None,
) -> CifarResNet:
    """ResNet-56 for 32x32 images: 0.85 million parameters; everything else as in :func:`resnet20`."""
    return CifarResNet("resnet56", num_classes, in_channels, width, head, widths)


def resnet110(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    head: str = "linear",
    widths: Mapping[str, int] | None = None,
) -> CifarResNet:
    """ResNet-110 for 32x32 images: 1.7 million parameters; everything else as in :func:`resnet20`."""
    return CifarResNet("resnet110", num_classes, in_channels, width, head, widths)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; the stride sits in the 3x3 convolution."""

    def __init__(self, inputs: int, widths: tuple[int, int, int], stride: int, projects: bool, bias: bool) -> None:
        super().__init__()
        first, second, outputs = widths
        self.conv1 = nn.Conv2d(inputs, first, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, stride, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, outputs, 1, bias=bias)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if projects:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=bias), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return maps [N, outputs, H / stride, W / stride] of ``x`` [N, inputs, H, W]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(y + shortcut)


class ResNet50(nn.Module):
    """A stem, four stages of bottlenecks, a global average and one linear layer; :func:`resnet50` explains it."""

    def __init__(
        self, num_classes: int, in_channels: int, widths: Mapping[str, int], stem: str, conv_bias: bool
    ) -> None:
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, widths["conv1"], 7, 2, padding=3, bias=conv_bias)
        else:
            self.conv1 = nn.Conv2d(in_channels, widths["conv1"], 3, padding=1, bias=conv_bias)
        self.bn1 = nn.BatchNorm2d(widths["conv1"])
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        inputs = widths["conv1"]
        for stage, blocks in STAGES.items():
            modules = []
            for k in range(blocks):
                sizes = tuple(widths[f"{stage}.{k}.conv{i}"] for i in (1, 2, 3))
                stride = 2 if k == 0 and stage != "layer1" else 1
                modules.append(Bottleneck(inputs, (sizes[0], sizes[1], sizes[2]), stride, k == 0, conv_bias))
                inputs = sizes[2]
            self.add_module(stage, nn.Sequential(*modules))
        self.fc = nn.Linear(inputs, num_classes)
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores [N, classes] of images ``x`` [N, C, H, W]."""
        y = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for stage in STAGES:
            y = getattr(self, stage)(y)
        y = torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)
        scores: torch.Tensor = self.fc(y)
        return scores


def resnet50(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    widths: Mapping[str, int] | None = None,
    stem: str = "imagenet",
    conv_bias: bool = False,
) -> ResNet50:
    """ResNet-50 under torchvision's key names: 25,557,032 parameters as it stands.

    Parameters
    ----------
    num_classes
        Outputs of the last layer, ``fc``.
    in_channels
        Channels of the images.
    widths
        Filters by name, of a stage or of single convolutions, the others being standard. ``{"conv1": 16, "layer1": 8}``
        makes the first two convolutions of the first stage's bottlenecks 8 wide and their last ones 32, four times
        that. ``{"layer1.0.conv2": 8, "layer1.0.conv3": 40}`` names convolutions, which goes before their stage's name.
        The last convolutions of a stage's blocks (``layer1.0.conv3``, ``layer1.1.conv3``, ... and
        ``layer1.0.downsample.0``) are added to one stream, so they have one width: naming one of them sets them all,
        and two names with different widths are an error. :func:`pyprune.models.standard_widths` lists what can be
        chosen.
    stem
        ``"imagenet"``: a 7x7 convolution with stride 2 and a max pool, for 224x224. ``"cifar"``: a 3x3 convolution
        with stride 1 and no pool, for 32x32.
    conv_bias
        Whether convolutions have biases. With them, one channel and three classes it has the 23,534,467 parameters
        of the CKRM paper's standard network.

    Returns
    -------
    ResNet50
        With fresh weights: He-normal convolutions.

    Raises
    ------
    ValueError
        If a count is below 1, ``stem`` is unknown, or ``widths`` names what there is not or gives one stream two
        widths.
    TypeError
        If ``widths`` is no mapping.

    References
    ----------
    K. He et al., Deep Residual Learning for Image Recognition, CVPR 2016, table 1, with the stride in the 3x3
    convolution as torchvision has it.

    Examples
    --------
    >>> sum(p.numel() for p in resnet50(num_classes=3, in_channels=1, conv_bias=True).parameters())
    23534467
    """
    check_counts("resnet50", num_classes=num_classes, in_channels=in_channels)
    _check_choice("resnet50", "stem", stem, STEMS)
    return ResNet50(num_classes, in_channels, WIDTHS["resnet50"].chosen("resnet50", widths), stem, conv_bias)


def _check_choice(who: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{who}: {name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")
