"""What the whole road returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pyprune.types.plans import Plan
from pyprune.types.ranking import ClassRanks
from pyprune.types.scores import Evaluation, History
from pyprune.types.slim import Compacted


@dataclass(frozen=True, eq=False)
class PruneResult:
    """Everything that :func:`pyprune.prune` made, stage by stage.

    ``evaluations`` and ``seconds`` are keyed by stage; evaluations use test data if it was given, else validation.
    """

    ranks: ClassRanks
    plan: Plan
    history: History
    slim: Compacted
    evaluations: Mapping[str, Evaluation]
    seconds: Mapping[str, float]
