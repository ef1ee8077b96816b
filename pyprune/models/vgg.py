"""VGG networks with batch norm, under the parameter names that HRank's checkpoints use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pyprune.models.building import Widths, check_counts, initialise

MAX = "max"
AVERAGE = "average"

VGG16: tuple[int | str, ...] = (
    64, 64, MAX, 128, 128, MAX, 256, 256, 256, MAX, 512, 512, 512, MAX, 512, 512, 512, AVERAGE,
)  # fmt: skip
DIGITS: tuple[int | str, ...] = (32, 32, MAX, 64, 64, MAX, 128, 128, MAX)


def _widths(layout: Sequence[int | str], like: Mapping[str, str]) -> Widths:
    """Say that the convolutions between two pools are a block, and that all can have widths of their own."""
    stages: dict[str, int] = {}
    layers: dict[str, tuple[str, int]] = {}
    for i, entry in enumerate(layout):
        if isinstance(entry, int):
            block = f"block{1 + sum(isinstance(before, str) for before in layout[:i])}"
            stages[block], layers[f"features.conv{i}"] = entry, (block, 1)
    return Widths(stages, layers, like=dict(like))


WIDTHS = {
    "vgg16_bn": _widths(VGG16, {"classifier.linear1": "features.conv16"}),
    "vgg_digits": _widths(DIGITS, {}),
}
"""What is free in each network."""


class VGG(nn.Module):
    """A chain of convolution, norm and activation with pools in between, then a classifier.

    Parameters
    ----------
    layout
        One entry per position i: a width makes ``features.conv{i}`` (3x3, padding 1, bias), ``features.norm{i}``
        and ``features.relu{i}``; ``"max"`` and ``"average"`` make the 2x2 pool ``features.pool{i}``.
    classifier
        What follows the flattened maps.
    in_channels
        Channels of the images.
    """

    def __init__(self, layout: Sequence[int | str], classifier: nn.Module, *, in_channels: int) -> None:
        super().__init__()
        self.features = _features(layout, in_channels)
        self.classifier = classifier
        initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores [N, classes] of images ``x`` [N, C, H, W]."""
        y: torch.Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return y


def vgg16_bn(
    *, num_classes: int = 10, in_channels: int = 3, width: float = 1.0, widths: Mapping[str, int] | None = None
) -> VGG:
    """VGG-16 with batch norm for 32x32 images, the network of the published CIFAR comparisons.

    Thirteen convolutions with bias, four max pools, a 2x2 average pool, and two linear layers with a norm and an
    activation between them. Convolutions stand at the positions 0, 1, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15 and 16, so
    a state dict has HRank's keys: ``features.conv0.weight`` ... ``classifier.norm1.weight``,
    ``classifier.linear2.weight``.

    Parameters
    ----------
    num_classes
        Outputs of the last layer.
    in_channels
        Channels of the images [N, in_channels, 32, 32].
    width
        Factor on every width; each is rounded and at least 1.
    widths
        Instead of ``width``: filters by name, the others being standard. ``"block1"`` ... ``"block5"`` are the
        convolutions between two pools; a convolution's own name, ``"features.conv3"``, goes before its block's.
        ``"classifier.linear1"`` is as wide as the last convolution unless it is named.
        :func:`pyprune.models.standard_widths` lists what can be chosen.

    Returns
    -------
    VGG
        With fresh weights: He-normal convolutions, so that signals keep their variance through the ReLUs.

    Raises
    ------
    ValueError
        If a count is below 1, ``width`` is not positive, ``widths`` names what there is not, or both are given.
    TypeError
        If ``widths`` is no mapping.

    Examples
    --------
    >>> vgg16_bn(width=0.125)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    check_counts("vgg16_bn", num_classes=num_classes, in_channels=in_channels)
    sizes = WIDTHS["vgg16_bn"].chosen("vgg16_bn", widths, width)
    hidden = sizes["classifier.linear1"]
    classifier = nn.Sequential(
        OrderedDict[str, nn.Module](
            linear1=nn.Linear(sizes["features.conv16"], hidden),
            norm1=nn.BatchNorm1d(hidden),
            relu1=nn.ReLU(inplace=True),
            linear2=nn.Linear(hidden, num_classes),
        )
    )
    return VGG(_resized(VGG16, sizes), classifier, in_channels=in_channels)


def vgg_digits(
    *, num_classes: int = 10, in_channels: int = 1, widths: Sequence[int] | Mapping[str, int] | None = None
) -> VGG:
    """Build a small VGG for 16x16 images, made to be trained and pruned within a minute or two on a CPU.

    Two convolutions, then a max pool, and so on; the last maps (2x2 for three pairs) are flattened into one linear
    layer, ``classifier.linear``.

    Parameters
    ----------
    num_classes
        Outputs of the linear layer.
    in_channels
        Channels of the images [N, in_channels, 16, 16].
    widths
        Filters of each convolution, an even number of entries, two to eight: (32, 32, 64, 64, 128, 128) by default.
        Or filters by name, the others as by default: ``"block1"`` ... ``"block3"`` for a pair, or a convolution's own
        name, as in :func:`vgg16_bn`.

    Raises
    ------
    ValueError
        If a count is below 1, or ``widths`` does not consist of one to four pairs or names what there is not.
    """
    check_counts("vgg_digits", num_classes=num_classes, in_channels=in_channels)
    if widths is None or isinstance(widths, Mapping):
        layout = _resized(DIGITS, WIDTHS["vgg_digits"].chosen("vgg_digits", widths))
    else:
        layout = _pairs(widths)
    side = 16 >> layout.count(MAX)
    classifier = nn.Sequential(OrderedDict(linear=nn.Linear(int(layout[-2]) * side * side, num_classes)))
    return VGG(layout, classifier, in_channels=in_channels)


def _pairs(widths: Sequence[int]) -> list[int | str]:
    """Return the layout of ``vgg_digits`` with these widths."""
    check_counts("vgg_digits", widths=min(widths, default=0))
    pairs, odd = divmod(len(widths), 2)
    if odd or not 1 <= pairs <= 4:
        raise ValueError(f"vgg_digits: widths must be one to four pairs; got {len(widths)} of them.")
    layout: list[int | str] = []
    for pair in range(pairs):
        layout += [*widths[2 * pair : 2 * pair + 2], MAX]
    return layout


def _resized(layout: Sequence[int | str], sizes: Mapping[str, int]) -> list[int | str]:
    """Return ``layout`` with the widths of ``sizes``."""
    return [sizes.get(f"features.conv{i}", entry) for i, entry in enumerate(layout)]


def _features(layout: Sequence[int | str], channels: int) -> nn.Sequential:
    """Build the modules of ``layout``, numbered by position."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for i, entry in enumerate(layout):
        if isinstance(entry, str):
            modules[f"pool{i}"] = nn.MaxPool2d(2) if entry == MAX else nn.AvgPool2d(2)
            continue
        modules[f"conv{i}"] = nn.Conv2d(channels, entry, kernel_size=3, padding=1)
        modules[f"norm{i}"] = nn.BatchNorm2d(entry)
        modules[f"relu{i}"] = nn.ReLU(inplace=True)
        channels = entry
    return nn.Sequential(modules)
