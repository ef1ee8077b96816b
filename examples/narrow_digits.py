"""Find out how narrow a network of your own may be, then prune the narrow one further by CRank.

Everything that the search needs is three functions: one that builds a network for given widths, one that trains it, one
that scores it. Runs in about half a minute on a CPU: python examples/narrow_digits.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import pyprune as pp
from pyprune.data import digits, loader

splits = digits(seed=0)
validation, testing = loader(splits.val), loader(splits.test)


def build(widths: dict[str, int]) -> nn.Module:
    """Return an untrained network: three convolutions, of which the widths are free."""
    a, b, c = widths["first"], widths["second"], widths["third"]
    return nn.Sequential(
        nn.Conv2d(1, a, 3, padding=1), nn.BatchNorm2d(a), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(b, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(c, 10),
    )  # fmt: skip


def train(model: nn.Module, seed: int) -> None:
    """Train in place by a loop of one's own; the search gives every run its seed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    batches = loader(splits.train, batch_size=64, shuffle=True, seed=seed)
    for _ in range(5):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


search = pp.optimize_widths(
    build, train, lambda model: pp.evaluate(model, validation), test=lambda model: pp.evaluate(model, testing),
    widths={"first": 32, "second": 64, "third": 96}, runs=2, budget=8, tolerance=0.005, metric="auc",
)  # fmt: skip
print(search)

# CRank on the narrow network: lambda has seen weights only, ranks see what they do with images.
torch.manual_seed(0)
narrow = build(search.widths)
train(narrow, seed=0)
before = pp.evaluate(narrow, testing)
ranks = pp.rank_filters(narrow, loader(splits.train), images_per_class=20)
plan = pp.select(narrow, "crank", ranks=ranks, ease=0.5)
slim = pp.compact(narrow, plan, splits.train[0][0][None])
pp.finetune(slim.model, loader(splits.train, shuffle=True), validation, epochs=5)
after = pp.evaluate(slim.model, testing)
standard = search.standard.runs[0]
print(
    f"\n{'network':28} {'parameters':>10} {'top-1':>7}"
    f"\n{'standard':28} {standard.parameters:10,} {standard.test['top1']:7.2%}"
    f"\n{'narrow, by CKRM':28} {slim.before.parameters:10,} {before.top1:7.2%}"
    f"\n{'narrow, pruned by CRank':28} {slim.after.parameters:10,} {after.top1:7.2%}"
)
