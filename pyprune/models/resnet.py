"""Residual networks: the CIFAR family with parameter-free shortcuts, and ResNet-50 with widths of one's own."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from pyprune.models.building import check_counts, initialise, scaled

HEADS = ("linear", "fc")
STEMS = ("imagenet", "cifar")

STAGES = {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}
"""Blocks of each stage of ResNet-50; its bottlenecks are 64, 128, 256 and 512 wide, its streams four times that."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A).

    Where the block halves the map, the shortcut takes every second row and column. Where it widens, zero channels are
    added on both sides: (outputs - inputs) // 2 before and the rest after, so any widths fit. That is outputs // 4
    on each side where the width doubles to a multiple of four.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
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
        The public name, for messages.
    blocks
        Blocks in each stage.
    num_classes, in_channels, width, head
        As in :func:`resnet20`.
    """

    def __init__(self, who: str, blocks: int, num_classes: int, in_channels: int, width: float, head: str) -> None:
        super().__init__()
        check_counts(who, num_classes=num_classes, in_channels=in_channels)
        _check_choice(who, "head", head, HEADS)
        widths = [scaled(who, size, width) for size in (16, 32, 64)]
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], blocks, stride=1)
        self.layer2 = _stage(widths[0], widths[1], blocks, stride=2)
        self.layer3 = _stage(widths[1], widths[2], blocks, stride=2)
        self.head = head
        self.add_module(head, nn.Linear(widths[2], num_classes))
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores [N, classes] of images ``x`` [N, C, H, W]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        y = torch.flatten(F.adaptive_avg_pool2d(y, 1), 1)
        scores: torch.Tensor = getattr(self, self.head)(y)
        return scores


def resnet20(*, num_classes: int = 10, in_channels: int = 3, width: float = 1.0, head: str = "linear") -> CifarResNet:
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

    Returns
    -------
    CifarResNet
        With fresh weights: He-normal convolutions.

    Raises
    ------
    ValueError
        If a count is below 1, ``width`` is not positive, or ``head`` is unknown.

    References
    ----------
    K. He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.

    Examples
    --------
    >>> sum(p.numel() for p in resnet20().parameters())
    269722
    """
    return CifarResNet("resnet20", 3, num_classes, in_channels, width, head)


def resnet32(*, num_classes: int = 10, in_channels: int = 3, width: float = 1.0, head: str = "linear") -> CifarResNet:
    """ResNet-32 for 32x32 images: 0.46 million parameters; everything else as in :func:`resnet20`."""
    return CifarResNet("resnet32", 5, num_classes, in_channels, width, head)


def resnet44(*, num_classes: int = 10, in_channels: int = 3, width: float = 1.0, head: str = "linear") -> CifarResNet:
    """ResNet-44 for 32x32 images: 0.66 million parameters; everything else as in :func:`resnet20`."""
    return CifarResNet("resnet44", 7, num_classes, in_channels, width, head)


def resnet56(*, num_classes: int = 10, in_channels: int = 3, width: float = 1.0, head: str = "linear") -> CifarResNet:
    """ResNet-56 for 32x32 images: 0.85 million parameters; everything else as in :func:`resnet20`."""
    return CifarResNet("resnet56", 9, num_classes, in_channels, width, head)


def resnet110(*, num_classes: int = 10, in_channels: int = 3, width: float = 1.0, head: str = "linear") -> CifarResNet:
    """ResNet-110 for 32x32 images: 1.7 million parameters; everything else as in :func:`resnet20`."""
    return CifarResNet("resnet110", 18, num_classes, in_channels, width, head)


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
        Filters of single convolutions, by name: ``{"conv1": 16, "layer1.0.conv2": 8, "layer1.0.conv3": 32}``; the
        others keep their standard width. The last convolutions of a stage's blocks (``layer1.0.conv3``,
        ``layer1.1.conv3``, ... and ``layer1.0.downsample.0``) are added to one stream, so they share one width:
        naming one of them sets them all, and naming two with different widths is an error.
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
        If a count is below 1, ``stem`` is unknown, or ``widths`` names an unknown convolution or gives one stream
        two widths.

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
    return ResNet50(num_classes, in_channels, _all_widths(widths or {}), stem, conv_bias)


def _all_widths(given: Mapping[str, int]) -> dict[str, int]:
    """Return the width of every convolution of ResNet-50 after checking those given."""
    widths = {"conv1": 64}
    streams = {}  # the convolutions that are added to one another, by stage
    for i, (stage, blocks) in enumerate(STAGES.items()):
        for k in range(blocks):
            widths |= {f"{stage}.{k}.conv{j}": (256 if j == 3 else 64) << i for j in (1, 2, 3)}
        widths[f"{stage}.0.downsample.0"] = 256 << i
        streams[stage] = [f"{stage}.{k}.conv3" for k in range(blocks)] + [f"{stage}.0.downsample.0"]
    for name in given:
        if name not in widths:
            near = difflib.get_close_matches(str(name), widths, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"resnet50: widths names no convolution {name!r}.{hint}")
    check_counts("resnet50", **{f"widths[{name!r}]": width for name, width in given.items()})
    widths |= given
    for stream in streams.values():
        named = [name for name in stream if name in given]
        if len({given[name] for name in named}) > 1:
            other = next(name for name in named if given[name] != given[named[0]])
            raise ValueError(
                f"resnet50: {named[0]!r} and {other!r} are added to one another and need one width; got "
                f"{given[named[0]]} and {given[other]}."
            )
        widths |= dict.fromkeys(stream, given[named[0]]) if named else {}
    return widths


def _check_choice(who: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{who}: {name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def _stage(inputs: int, outputs: int, blocks: int, *, stride: int) -> nn.Sequential:
    """Build a stage; its first block changes width and size."""
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))
