"""What a Watch costs of an epoch: every pair, and the ranks of eight images, for three networks.

Run with ``python -m pytest benchmarks/test_bench_watch.py``, or as a program for a table. An epoch is so many times a
step of training, of which a few are timed, each beside a whole measurement (the cheaper levels that a Watch falls back
to are not allowed here), so that both see the same machine. Shares are of processor time, of all threads of the
process, which other programs disturb least; the table has elapsed time too.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyprune import models
from pyprune.watching import Watch

ALLOWED = 0.02
IMAGES = 8


class Case(NamedTuple):
    """A network, the shape of its images, images an epoch and a batch, classes."""

    name: str
    shape: tuple[int, int, int]
    epoch: int
    batch: int
    classes: int

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        channels = self.shape[0]
        return {
            "resnet50": lambda: models.resnet50(num_classes=self.classes, in_channels=channels),
            "resnet20": lambda: models.resnet20(num_classes=self.classes),
            "vgg_digits": lambda: models.vgg_digits(num_classes=self.classes),
        }[self.name]()


CASES = (
    Case("resnet50", (1, 64, 64), 840, 30, 3),
    Case("resnet20", (3, 32, 32), 5000, 100, 10),
    Case("vgg_digits", (1, 16, 16), 1201, 64, 10),  # the embedded digits
)


class Cost(NamedTuple):
    """Of a step of training and of a measurement: seconds of the processor and of the clock."""

    step: tuple[float, float]
    watch: tuple[float, float]


def clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def timed(call) -> tuple[float, float]:
    before = clocks()
    call()
    return tuple(after - start for after, start in zip(clocks(), before, strict=True))


def measure(case: Case, folder: Path, rounds: int) -> tuple[float, float, dict]:
    """Return the shares of an epoch, by processor time and by the clock, as medians; and the last row."""
    model = case.network().train()
    images, labels = torch.randn(case.batch, *case.shape), torch.arange(case.batch) % case.classes
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    some = torch.randn(IMAGES, *case.shape), torch.arange(IMAGES) % case.classes
    watch = Watch(model, some, log=folder / f"{case.name}.jsonl", budget=1.0)
    rows = []

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def look() -> None:
        watch._ended -= 1e6  # time enough for every pair and image
        rows.append(watch(len(rows)))

    step(), look()  # the first of each prepares
    found = [Cost(timed(step), timed(look)) for _ in range(rounds)]
    steps = -(-case.epoch // case.batch)
    shares = [
        statistics.median(one.watch[i] for one in found) / (steps * statistics.median(one.step[i] for one in found))
        for i in range(2)
    ]
    return shares[0], shares[1], rows[-1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_whole_measurement_is_under_two_percent_of_an_epoch(case: Case, tmp_path: Path) -> None:
    processor, _, row = measure(case, tmp_path, 5)
    assert row["watch/pairs"] == 1
    assert row["watch/images"] == IMAGES
    assert processor < ALLOWED


def main() -> int:
    """Print the table."""
    print(f"{torch.get_num_threads()} threads\n{'network':12} {'of processor time':>18} {'of elapsed time':>16}")
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            processor, elapsed, _ = measure(case, Path(folder), 11)
            print(f"{case.name:12} {processor:>18.2%} {elapsed:>16.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
