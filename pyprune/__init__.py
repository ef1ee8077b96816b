"""pyprune finds the redundant filters of a convolutional network and removes them exactly.

Names are resolved on first use, so that ``import pyprune`` and ``pyprune --help`` load neither torch nor
scikit-learn nor matplotlib. ``pyprune.pipeline`` tells the whole story on one screen.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyprune import models as models
    from pyprune.checkpoints import load_checkpoint as load_checkpoint
    from pyprune.combining import combine as combine
    from pyprune.compaction import analyse as analyse
    from pyprune.compaction import compact as compact
    from pyprune.comparing import Trial as Trial
    from pyprune.deployment import export_onnx as export_onnx
    from pyprune.deployment import export_pt2 as export_pt2
    from pyprune.equity import fairness as fairness
    from pyprune.export import load_into as load_into
    from pyprune.export import load_slim as load_slim
    from pyprune.export import save_slim as save_slim
    from pyprune.finetuning import finetune as finetune
    from pyprune.machine import backends as backends
    from pyprune.masks import mask_ as mask_
    from pyprune.measure import evaluate as evaluate
    from pyprune.measure import profile as profile
    from pyprune.ops.rank import matrix_rank as matrix_rank
    from pyprune.ops.ssim import kernel_ssim as kernel_ssim
    from pyprune.pipeline import prune as prune
    from pyprune.ranks import RankAccumulator as RankAccumulator
    from pyprune.ranks import rank_filters as rank_filters
    from pyprune.recalibration import recalibrate as recalibrate
    from pyprune.redundancy import ckrm as ckrm
    from pyprune.reporting import report as report
    from pyprune.searching import WidthSearch as WidthSearch
    from pyprune.selection import select as select
    from pyprune.trials import trial as trial
    from pyprune.types import CKRM as CKRM
    from pyprune.types import Certificate as Certificate
    from pyprune.types import ClassRanks as ClassRanks
    from pyprune.types import Compacted as Compacted
    from pyprune.types import Evaluation as Evaluation
    from pyprune.types import Exported as Exported
    from pyprune.types import Fairness as Fairness
    from pyprune.types import History as History
    from pyprune.types import Plan as Plan
    from pyprune.types import Profile as Profile
    from pyprune.types import PruneResult as PruneResult
    from pyprune.watching import Watch as Watch
    from pyprune.widths import optimize_widths as optimize_widths

__version__ = "0.1.0"

# A function never shares its module's name: importing the module would put it in the function's place.
_HOME = {
    "matrix_rank": "ops.rank",
    "kernel_ssim": "ops.ssim",
    "ckrm": "redundancy",
    "RankAccumulator": "ranks",
    "rank_filters": "ranks",
    "select": "selection",
    "combine": "combining",
    "mask_": "masks",
    "finetune": "finetuning",
    "analyse": "compaction",
    "compact": "compaction",
    "save_slim": "export",
    "load_slim": "export",
    "load_into": "export",
    "export_onnx": "deployment",
    "export_pt2": "deployment",
    "recalibrate": "recalibration",
    "evaluate": "measure",
    "profile": "measure",
    "fairness": "equity",
    "trial": "trials",
    "optimize_widths": "widths",
    "Watch": "watching",
    "prune": "pipeline",
    "report": "reporting",
    "backends": "machine",
    "models": "",
    "load_checkpoint": "checkpoints",
    "ClassRanks": "types",
    "CKRM": "types",
    "Plan": "types",
    "History": "types",
    "Certificate": "types",
    "Compacted": "types",
    "Exported": "types",
    "Evaluation": "types",
    "Profile": "types",
    "Fairness": "types",
    "PruneResult": "types",
    "Trial": "comparing",
    "WidthSearch": "searching",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pyprune' has no attribute {name!r}")
    if name == "models":
        return importlib.import_module("pyprune.models")
    value = getattr(importlib.import_module(f"pyprune.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
