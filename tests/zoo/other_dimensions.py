"""Networks for series and for volumes."""

from torch import nn

from zoo.entries import Entry


class Series(nn.Module):
    """Dilated 1-d convolutions with residual connections, as for sound or sensors."""

    def __init__(self, width, depth, classes=5):
        super().__init__()
        self.first = nn.Conv1d(2, width, 7, padding=3)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(depth))
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, padding=2**i, dilation=2**i) for i in range(depth))
        self.mixes = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(depth))
        self.act, self.pool, self.head = nn.ELU(), nn.AdaptiveMaxPool1d(2), nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.act(self.first(x))
        for conv, norm, mix in zip(self.convs, self.norms, self.mixes, strict=True):
            x = x + mix(self.act(norm(conv(x))))
        return self.head(self.pool(x).flatten(1))


def volume(width, classes=5):
    """3-d convolutions, some of them in space only or in time only, as for video."""

    def unit(inputs, outputs, kernel, stride=1):
        padding = tuple(k // 2 for k in kernel)
        return [nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False), nn.BatchNorm3d(outputs), nn.ReLU()]

    layers = [*unit(1, width, (3, 3, 3)), nn.MaxPool3d(2), *unit(width, 2 * width, (1, 3, 3), (1, 2, 2))]
    layers += [*unit(2 * width, 2 * width, (3, 1, 1)), nn.AvgPool3d((1, 2, 2)), *unit(2 * width, 4 * width, (3, 3, 3))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4 * width, classes))


ENTRIES = [
    Entry("Series, 1-d", lambda: Series(8, 3), (2, 2, 40), 99, lambda: Series(64, 8), (2, 2, 600), mainstream=False),
    Entry(
        "Volume, 3-d",
        lambda: volume(6),
        (2, 1, 8, 16, 16),
        99,
        lambda: volume(64),
        (1, 1, 16, 32, 32),
        mainstream=False,
    ),
]
