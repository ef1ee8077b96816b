"""The generators that training draws from: torch's, numpy's old one and random's, seeded together and given back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def given_back(*devices: torch.device) -> Iterator[None]:
    """Put the states of all of them back afterwards, on the CPU and on those of ``devices`` that are GPUs."""
    plain, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what augmentations still draw from
    try:
        with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(legacy)  # noqa: NPY002


def seed_all(seed: int, *devices: torch.device) -> None:
    """Seed all of them, on the CPU and on those of ``devices`` that are GPUs."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
