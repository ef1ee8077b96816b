"""Prune a network of one's own, stage by stage, inside a training script.

Run it with ``python examples/prune_small_cnn.py``; it takes about a minute on two cores.
"""

from __future__ import annotations

import torch
from torch import nn

import pyprune as pp
from pyprune.data import digits, loader


class SmallCNN(nn.Module):
    """Three convolutions and a linear head; activations are functions, so there is no module to hook."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 48, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(48)
        self.conv3 = nn.Conv2d(48, 64, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(64)
        self.head = nn.Linear(64 * 4 * 4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [N, 10] of images [N, 1, 16, 16]."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = nn.functional.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        x = nn.functional.max_pool2d(torch.relu(self.bn3(self.conv3(x))), 2)
        return self.head(torch.flatten(x, 1))


def main() -> None:
    """Train, rank, select, mask, compact, fine-tune, save."""
    torch.manual_seed(0)
    data = digits()
    train, val, test = loader(data.train, shuffle=True), loader(data.val), loader(data.test)

    model = SmallCNN()
    pp.finetune(model, train, val, epochs=6, lr=0.05)
    print(f"trained:    {pp.evaluate(model, test).top1:.3f}")

    ranks = pp.rank_filters(model, loader(data.train))
    plan = pp.select(model, "crank", ranks=ranks)
    for name, keep in plan.keep.items():
        print(f"{name:>10}  {len(keep):3d} of {plan.filters[name]:3d} filters stay")

    slim = pp.compact(model, plan, data.test[0][0][None])
    print(slim.certificate)
    print(f"pruned:     {pp.evaluate(slim.model, test).top1:.3f}")

    pp.finetune(slim.model, train, val, epochs=8)
    print(f"fine-tuned: {pp.evaluate(slim.model, test).top1:.3f}")
    print(f"parameters: {slim.before.parameters:,} -> {slim.after.parameters:,}")
    print(f"MACs:       {slim.before.macs:,} -> {slim.after.macs:,}")

    pp.save_slim(slim, "runs/small_cnn")
    print("pp.load_slim('runs/small_cnn') brings it back.")


if __name__ == "__main__":
    main()
