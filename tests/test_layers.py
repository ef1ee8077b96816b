"""A stage imports base modules and never another stage; only the pipeline, demo and command line know the order."""

import ast
from pathlib import Path

import pytest

import pyprune

PACKAGE = Path(pyprune.__file__).parent
BASE = {
    "types", "files", "hints", "progress", "machine", "ops", "_core",  # for everyone
    "models", "data", "datasets", "measure",
    "graph", "operations", "channels", "joins", "kinds", "views", "rewiring", "baking", "wrappers", "origins",
    "recording", "deciding", "cutting", "proving",  # the traced network
    "checkpoints", "convolutions", "hrank",  # what people bring along
    "drawing",  # figures and pages
    "features", "sampling", "aliases", "overlap",  # parts of ranking
    "slimfile", "slimcalls", "slimrun", "slimreading", "slimsource",  # the slim folder
    "clustering", "redundancy_plots", "trial_plots", "width_plots", "resizing",  # parts of one stage each
    "criteria", "budgets", "coupling", "selection_plots",  # parts of selection
    "optimizers",  # part of what compaction returns
    "randomness", "resuming", "comparing", "searching", "loggers",  # of trainings and long runs
    "benching",  # measures the kernels
}  # fmt: skip
KNOWS_THE_ORDER = {"__init__", "__main__", "pipeline", "trials", "widths", "demo", "cli", "testing", "watching"}
STAGES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in BASE | KNOWS_THE_ORDER)


def imported(source: str) -> set[str]:
    """Return the modules of pyprune that ``source`` imports, without their package's name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "pyprune":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyprune."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pyprune.")}
    return found


@pytest.mark.parametrize("stage", [*STAGES, *sorted(BASE - {"models", "ops", "_core"})])
def test_a_stage_imports_no_other_stage(stage: str) -> None:
    paths = sorted((PACKAGE / stage).glob("*.py")) or [PACKAGE / f"{stage}.py"]  # a package or a module
    assert imported("\n".join(path.read_text() for path in paths)) <= BASE


def test_the_check_would_notice() -> None:
    assert imported("from pyprune.masks import mask_") == {"masks"}
    assert imported("import pyprune.masks as m\nfrom pyprune import export") == {"masks", "export"}
    assert not imported("from pyprune import masks") <= BASE


def test_the_stages_are_the_documented_ones() -> None:
    assert STAGES == [
        "combining", "compaction", "deployment", "equity", "export", "finetuning", "masks", "ranks", "recalibration",
        "redundancy", "reporting", "selection",
    ]  # fmt: skip


def test_the_pipeline_fits_on_a_screen() -> None:
    body = ast.parse((PACKAGE / "pipeline.py").read_text()).body
    prune = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == "prune")
    after_docstring = prune.body[1].lineno
    assert prune.end_lineno - after_docstring < 70
