"""HRank: the mean rank of a filter's maps, whatever the class (thesis section 3.2.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from pyprune.criteria import Context
from pyprune.types import ClassRanks, FloatArray, IntArray


@dataclass(frozen=True)
class HRank:
    """The mean rank of a filter's maps over all images, classes weighted by their images."""

    name = "hrank"
    needs = ("ranks",)
    label = "mean rank"

    def scores(self, model: nn.Module, context: Context) -> Mapping[str, FloatArray]:
        """Return the mean ranks [F] of every layer that was ranked."""
        return {name: mean_rank(R, ranks.counts) for ranks, name, R in ranked(context)}


def ranked(context: Context) -> list[tuple[ClassRanks, str, FloatArray]]:
    """Return the ranks, the name and R [F, C] of every layer that was ranked and is to be scored."""
    ranks = context.ranks
    if ranks is None:
        return []
    return [(ranks, name, R) for name, R in ranks.layers.items() if name in context.layers]


def mean_rank(R: FloatArray, counts: IntArray | None) -> FloatArray:
    """Return each filter's mean rank over all images [F], classes weighted by their images if ``counts`` is known.

    Rounded to nine decimals, so that filters with the same sum of ranks tie whatever way it was added up.
    """
    rounded: FloatArray = np.round(np.average(R, axis=1, weights=counts), 9)
    return rounded
