"""Plain chains: VGG, with and without norms."""

from torch import nn

from zoo.entries import Entry

DEPTHS = {11: (1, 1, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def vgg(blocks, width=64, norms=True, classes=10, hidden=4096, pool=7):
    layers, channels = [], 3
    for i, count in enumerate(blocks):
        out = width * min(2**i, 8)
        for _ in range(count):
            layers += [nn.Conv2d(channels, out, 3, padding=1)]
            layers += [nn.BatchNorm2d(out)] if norms else []
            layers += [nn.ReLU(inplace=True)]
            channels = out
        layers += [nn.MaxPool2d(2)]
    head = [nn.Linear(channels * pool**2, hidden), nn.ReLU(True), nn.Dropout(), nn.Linear(hidden, classes)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(pool), nn.Flatten(), *head)


ENTRIES = [
    Entry("VGG-16, norms", lambda: vgg(DEPTHS[16], 4, hidden=12, pool=2), (2, 3, 32, 32), 99, lambda: vgg(DEPTHS[16])),
    Entry(
        "VGG-11, no norms",
        lambda: vgg(DEPTHS[11], 4, False, hidden=12, pool=2),
        (2, 3, 32, 32),
        99,
        lambda: vgg(DEPTHS[11], norms=False),
    ),
]
