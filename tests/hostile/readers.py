"""Everything in pyprune that opens files from outside, by name: each takes the folder of a case."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import pyprune as pp
from pyprune import checkpoints, data, files, hrank


def _small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)
    )


def _load_checkpoint(folder: Path) -> object:
    return pp.load_checkpoint(_small(), folder / "checkpoint")


def _finetune(folder: Path) -> object:
    images = torch.zeros(4, 1, 8, 8)
    batches = [(images, torch.zeros(4, dtype=torch.int64))]
    return pp.finetune(_small(), batches, batches, epochs=1, checkpoint=folder / "finetune.safetensors", progress=False)


def _rank_filters(folder: Path) -> object:
    batches = [(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))]
    return pp.rank_filters(
        _small(), batches, num_classes=1, images_per_class=4, checkpoint=folder / "ranking.safetensors", progress=False
    )


READERS: dict[str, tuple[Callable[[Path], object], ...]] = {
    "slim": (
        pp.load_slim,
        lambda folder: pp.load_into(nn.Sequential(nn.Conv2d(1, 3, 3)), folder, example_inputs=torch.zeros(1, 1, 8, 8)),
        lambda folder: pp.ckrm(str(folder)),
    ),
    "plan": (lambda folder: pp.Plan.load(folder / "plan.json"),),
    "history": (lambda folder: pp.History.load(folder / "history.json"),),
    "evaluation": (lambda folder: pp.Evaluation.load(folder / "evaluation.json"),),
    "profile": (lambda folder: pp.Profile.load(folder / "profile.json"),),
    "ckrm": (lambda folder: pp.CKRM.load(folder / "ckrm.json"),),
    "fairness": (lambda folder: pp.Fairness.load(folder / "fairness.json"),),
    "trial": (lambda folder: pp.Trial.load(folder / "trial.json"),),
    "width search": (lambda folder: pp.WidthSearch.load(folder / "width_search.json"),),
    "ranks": (lambda folder: pp.ClassRanks.load(folder / "ranks.safetensors"),),
    "kernels": (lambda folder: pp.ckrm(str(folder / "checkpoint")),),
    "checkpoint": (
        _load_checkpoint,
        lambda folder: checkpoints.convert_checkpoint(folder / "checkpoint", folder / "converted"),
    ),
    "finetune": (_finetune,),
    "ranking": (_rank_filters,),
    "rank file": (lambda folder: hrank.read_rank_file(folder / "rank.npy"),),
    "npz": (lambda folder: data.open_data(f"npz:{folder / 'data.npz'}"),),
    "cifar10": (lambda folder: data.open_data(f"cifar10:{folder}"),),
    "header": (lambda folder: files.tensor_header("header", folder / "checkpoint"),),
}
"""The first reader of a kind must load what is called harmless; the others may load it or refuse it."""
