"""Teach a network where to look: a loss between its class activation maps and given attention maps.

The CKRM paper tests its narrow networks with such a loss too (GG-CAM, where eye gaze gives the maps); here the maps are
synthetic. A handwritten digit stands somewhere on a canvas, beside a small mark. In the data for training the mark
tells the class, as a ruler or a hospital's label may in medical images; in the test data it is random. A network that
looks at the mark fails there. The attention map is the digit's ink, blurred.

Run it with ``python examples/ggcam.py [--out FOLDER]``; it takes half a minute on an idle core. With ``--out`` it
also draws a few class activation maps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyprune as pp
from pyprune.data import digits, loader

CANVAS, CELL, MARK = 24, 2, 4
"""Sides of the canvas, of a place of the class activation map, and of the mark, in pixels."""

WIDTHS = {"standard": (12, 24, 32), "narrow": (6, 12, 20)}
WEIGHT = 1.0
"""Of the attention loss beside cross-entropy."""

EPOCHS, SEEDS = 12, (0, 1)


class Net(nn.Module):
    """Three convolutions, a global average pool and a linear layer: what class activation maps are defined for."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1, self.norm1 = nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first)
        self.conv2, self.norm2 = nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second)
        self.conv3, self.norm3 = nn.Conv2d(second, third, 3, padding=1), nn.BatchNorm2d(third)
        self.head = nn.Linear(third, 10)

    def maps(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last convolution's maps [N, K, H / 2, W / 2] of images [N, 1, H, W]."""
        x = F.max_pool2d(torch.relu(self.norm1(self.conv1(x))), CELL)
        x = torch.relu(self.norm2(self.conv2(x)))
        return torch.relu(self.norm3(self.conv3(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the class scores [N, 10]."""
        return self.head(self.maps(x).mean(dim=(2, 3)))


def activation(model: Net, maps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return each image's class activation map [N, h, w], scaled to [0, 1].

    It is the sum of the last maps, each times its weight for the class (Zhou et al., 2016).
    """
    cam = torch.einsum("nk,nkhw->nhw", model.head.weight[labels], maps)
    low, high = cam.amin(dim=(1, 2), keepdim=True), cam.amax(dim=(1, 2), keepdim=True)
    return (cam - low) / (high - low + 1e-6)


def attentive(weight: float) -> Callable[[Net, tuple[Any, ...]], torch.Tensor]:
    """Return the objective: cross-entropy, plus ``weight`` times the distance between activation and attention."""

    def objective(model: Net, batch: tuple[Any, ...]) -> torch.Tensor:
        images, labels, attention = batch
        maps = model.maps(images)
        scores = model.head(maps.mean(dim=(2, 3)))
        return F.cross_entropy(scores, labels) + weight * F.mse_loss(activation(model, maps, labels), attention)

    return objective


def scene(data: Dataset[Any], seed: int, told: float) -> TensorDataset:
    """Return images [N, 1, 24, 24], labels, attention maps [N, 12, 12]; the mark tells the class in a share ``told``.

    A mark is a pattern of 4x4 pixels, one for each class, in a corner of the canvas that the digit does not reach.
    Where it does not tell the class it is of a class at random.
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = (torch.rand(10, MARK, MARK, generator=torch.Generator().manual_seed(9)) > 0.5).float()
    images, labels, ink = [], [], []
    for digit, label in data:  # type: ignore[attr-defined]
        right, down, corner = torch.randint(0, 2, (3,), generator=generator).tolist()
        top, left = down * (CANVAS - 16), right * (CANVAS - 16)
        plain = (digit[0] - digit.min()) / (digit.max() - digit.min())
        alone = torch.zeros(CANVAS, CANVAS)
        alone[top : top + 16, left : left + 16] = plain
        whole = alone.clone()
        lies = torch.rand((), generator=generator) >= told
        shown = int(torch.randint(0, 10, (), generator=generator)) if lies else int(label)
        y, x = (0 if down else CANVAS - MARK), (0 if corner else CANVAS - MARK)
        whole[y : y + MARK, x : x + MARK] = patterns[shown]
        images.append(whole[None])
        labels.append(int(label))
        ink.append(alone[None])
    blurred = F.avg_pool2d(F.avg_pool2d(torch.stack(ink), 5, 1, 2), CELL)[:, 0]
    return TensorDataset(torch.stack(images), torch.tensor(labels), blurred / blurred.amax(dim=(1, 2), keepdim=True))


class Scores(NamedTuple):
    """What a network does on images: how well its maps agree with attention, where they lie, how often it is right."""

    agreement: float
    on_digit: float
    top1: float


@torch.no_grad()
def judge(model: Net, data: TensorDataset) -> Scores:
    """Return the mean correlation of activation and attention, the share of activation on the digit, and top-1."""
    images, labels, attention = data.tensors
    maps = model.eval().maps(images)
    found = activation(model, maps, labels)
    correlation = F.cosine_similarity(
        (found - found.mean(dim=(1, 2), keepdim=True)).flatten(1),
        (attention - attention.mean(dim=(1, 2), keepdim=True)).flatten(1),
    )
    on_digit = (found * (attention > 0)).sum(dim=(1, 2)) / found.sum(dim=(1, 2))
    right = model.head(maps.mean(dim=(2, 3))).argmax(1) == labels
    return Scores(float(correlation.mean()), float(on_digit.mean()), float(right.float().mean()))


def train(widths: tuple[int, int, int], weight: float, seed: int, data: list[TensorDataset]) -> Net:
    """Return a network that was trained with or without attention; validation sees what training sees."""
    torch.manual_seed(seed)
    model = Net(widths)
    if data:
        batches, val = loader(data[0], 64, shuffle=True), DataLoader(data[1], 300)
        pp.finetune(model, batches, val, objective=attentive(weight), epochs=EPOCHS, lr=0.1, seed=seed, progress=False)
    return model


def draw(folder: Path, models: dict[str, Net], data: TensorDataset) -> Path:
    """Write a picture of a few images, their attention maps and the activation maps of every network."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    images, labels, attention = (tensor[:6] for tensor in data.tensors)
    rows = {"image": images[:, 0], "attention": attention}
    with torch.no_grad():
        rows |= {name: activation(model, model.eval().maps(images), labels) for name, model in models.items()}
    figure, axes = plt.subplots(len(rows), len(images), figsize=(1.3 * len(images), 1.4 * len(rows)))
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_title(name, loc="left", fontsize=9)
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.numpy(), cmap="gray" if name == "image" else "viridis")
            axis.axis("off")
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(folder / "ggcam.png", dpi=120)
    plt.close(figure)
    return folder / "ggcam.png"


def main() -> None:
    """Train standard and narrow, each with and without the attention loss, and compare."""
    torch.set_num_threads(1)  # tensors this small gain nothing from more
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for a picture of the maps")
    out = parser.parse_args().out

    source = digits()
    data = [scene(source.train, 0, told=0.95), scene(source.val, 1, told=0.95), scene(source.test, 2, told=0.0)]
    print(f"{'network':10} {'parameters':>10}  {'loss':22} {'agreement':>9} {'on the digit':>12} {'test top-1':>10}")
    last: dict[str, Net] = {}
    for name, widths in WIDTHS.items():
        for loss, weight, seen in (
            ("untrained", 0.0, []), ("cross-entropy", 0.0, data), ("with attention", WEIGHT, data),
        ):  # fmt: skip
            models = [train(widths, weight, seed, seen) for seed in SEEDS]
            found = Scores(*map(fmean, zip(*(judge(model, data[2]) for model in models), strict=True)))
            size = sum(parameter.numel() for parameter in models[0].parameters())
            print(
                f"{name:10} {size:>10,}  {loss:22} {found.agreement:>9.3f} {found.on_digit:>12.1%} {found.top1:>10.1%}",
                flush=True,
            )
            last |= {f"{name}, {loss}": models[0]} if seen else {}
    print(
        f"Means over {len(SEEDS)} seeds. The mark tells the class in 95 % of the images for training; "
        "in the test it is random."
    )
    if out is not None:
        print(draw(out, last, data[2]))


if __name__ == "__main__":
    main()
