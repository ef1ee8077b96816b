"""The demo's own part: train a small network on real handwritten digits, so that there is something to prune."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pyprune import files
from pyprune.data import Splits, digits, loader
from pyprune.finetuning import finetune
from pyprune.models import vgg_digits


def train_digits(path: Path, *, epochs: int = 12, seed: int = 0, progress: bool = True) -> tuple[nn.Module, Splits]:
    """Train ``vgg_digits`` from scratch, save its weights to ``path``, and return it with the data."""
    splits = digits(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = vgg_digits()
    finetune(
        model, loader(splits.train, shuffle=True, seed=seed), loader(splits.val),
        epochs=epochs, lr=0.05, seed=seed, progress=progress,
    )  # fmt: skip
    files.write_tensors(path, model.state_dict(), {"arch": "vgg_digits", "data": "digits", "seed": str(seed)})
    return model, splits
