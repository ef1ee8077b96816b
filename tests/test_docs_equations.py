"""The equations of the CKRM paper: the lines that the documentation quotes exist, and those not computed hold too."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import pyprune as pp
from tolerances import SSIM_FLOAT64

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "ckrm.md"
ROW = re.compile(
    r"^\| (?P<paper>[^|]+) \| [^|]+ \| \[[^]]+\]\((?P<file>[^)]+)\), `(?P<name>[^`]+)` \| `(?P<line>.+)` \|$"
)


def rows() -> list[dict[str, str]]:
    """Return the rows of the table of equations."""
    section = PAGE.read_text().partition("## The equations, and where they are computed")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")][2:]
    found = [ROW.match(line) for line in table]
    assert all(found), [line for line, one in zip(table, found, strict=True) if one is None]
    return [one.groupdict() for one in found if one is not None]


def inside(path: Path, name: str) -> list[str]:
    """Return the lines of a function: of a method ``Type.method`` in Python, of ``name(...) {`` to its end in C++."""
    text = path.read_text()
    if path.suffix != ".py":
        start = re.search(rf"\b{re.escape(name)}\([^;{{]*\)\s*{{", text)
        assert start is not None, f"{path.name} has no {name}"
        depth, at = 1, start.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        return text[start.start() : at].splitlines()
    body = ast.parse(text).body
    *owners, last = name.split(".")
    for owner in owners:
        body = next(one.body for one in body if isinstance(one, ast.ClassDef) and one.name == owner)
    found = next((one for one in body if isinstance(one, ast.FunctionDef) and one.name == last), None)
    assert found is not None, f"{path.name} has no {name}"
    return text.splitlines()[found.lineno - 1 : found.end_lineno]


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['paper']}: {row['name']}")
def test_a_quoted_line_is_where_the_page_says(row: dict[str, str]) -> None:
    path = (PAGE.parent / row["file"]).resolve()
    assert path.is_relative_to(ROOT)
    lines = inside(path, row["name"])
    assert any(row["line"] in line for line in lines), f"{path.name}, {row['name']} has no line `{row['line']}`"


def test_the_check_would_notice(tmp_path: Path) -> None:
    (row,) = [one for one in rows() if one["paper"] == "(2) L"]
    lines = inside((PAGE.parent / row["file"]).resolve(), "ssim_slices")
    assert not any(row["line"] in line for line in lines), "in that file, but in another function"
    (tmp_path / "a.py").write_text("class A:\n    def f(self):\n        return 1\n\ndef g():\n    return 2\n")
    assert inside(tmp_path / "a.py", "A.f") == ["    def f(self):", "        return 1"]
    assert inside(tmp_path / "a.py", "g") == ["def g():", "    return 2"]
    with pytest.raises(AssertionError, match=r"a.py has no f"):
        inside(tmp_path / "a.py", "f")
    (tmp_path / "a.h").write_text("int f(int a);\nint f(int a) {\n  if (a) { return 1; }\n  return 2;\n}\nint g() {}\n")
    assert inside(tmp_path / "a.h", "f")[-2:] == ["  return 2;", "}"]


def test_every_equation_that_is_computed_has_its_lines() -> None:
    told = " ".join(row["paper"] for row in rows())
    for wanted in (
        "(1)",
        "(2)",
        "(5)",
        "(7)",
        "(8)",
        "(9)",
        "section 3.2",
        "section 3.3",
        "section 4.1",
        "section 4.2",
    ):
        assert wanted in told


def phi(x: np.ndarray, y: np.ndarray, e: float) -> float:
    """Return equation 4 as it is printed, from equation 2 as it is printed."""
    mx, my, sx, sy = x.mean(), y.mean(), x.std(), y.std()
    sxy = ((x - mx) * (y - my)).mean()
    luminance = (2 * mx * my + e) / (mx**2 + my**2 + e)
    contrast = (2 * sx * sy + e) / (sx**2 + sy**2 + e)
    return float(luminance * contrast * (sxy + e) / (sx * sy + e))


def psi(x: np.ndarray, y: np.ndarray, alpha: float, e: float = 1e-30) -> float:
    weights = np.stack([x, y])[:, None]
    return float(pp.kernel_ssim(weights, alpha=alpha, eps_absolute=e)[0, 1])


@pytest.mark.parametrize("seed", range(8))
def test_equation_6_psi_is_the_size_of_phi(seed: int) -> None:
    x, y = np.random.default_rng(seed).standard_normal((2, 7, 7))
    assert psi(x, y, 1) == pytest.approx(abs(phi(x, y, 1e-30)), abs=SSIM_FLOAT64)
    assert psi(x, -y, 1) == psi(x, y, 1)
    assert phi(x, -y, 0) == pytest.approx(phi(x, y, 0), abs=SSIM_FLOAT64), "the signs of luminance and structure"
    assert abs(psi(x, y, 0.1) - abs(phi(x, y, 1e-30))) > 1e-6, "the other exponents are no phi"


def test_equation_6_for_any_constant_where_nothing_is_negative() -> None:
    x = np.random.default_rng(0).random((7, 7))
    y = x + 0.3 * np.random.default_rng(1).random((7, 7))
    for e in (1e-12, 1e-2, 1.0):
        assert psi(x, y, 1, e) == pytest.approx(phi(x, y, e), abs=SSIM_FLOAT64)
    # One slice upside down: the paper's sign of e stands against that of the covariance, and the two part.
    assert abs(psi(x, 1 - y, 1, 1e-2) - abs(phi(x, 1 - y, 1e-2))) > 1e-3


@pytest.mark.parametrize("level", range(1, 6))
def test_table_1_a_constant_lowers_psi_less_with_a_small_alpha(level: int) -> None:
    rows, columns = np.mgrid[-1:1:7j, -1:1:7j]
    x = 0.5 + 0.4 * np.sin(3 * rows + 2 * columns) * np.exp(-(rows**2))
    x += 0.5 - x.mean()
    noise = np.random.default_rng(level).normal(0, level / 10 - 0.05, (7, 7))
    y = x + noise - noise.mean()
    before, after = ({alpha: psi(x, other, alpha) for alpha in (1, 0.1)} for other in (y, y + 0.5))
    assert before[1] == pytest.approx(before[0.1], abs=SSIM_FLOAT64), "noise changes contrast and structure alone"
    # L falls from 1 to 2 * 0.5 * 1 / (0.5^2 + 1^2) = 0.8.
    assert after[1] == pytest.approx(0.8 * before[1], abs=SSIM_FLOAT64)
    assert after[0.1] == pytest.approx(0.8**0.1 * before[0.1], abs=SSIM_FLOAT64)
    assert before[0.1] - after[0.1] < 0.12 * (before[1] - after[1])


def test_equation_1_counts_the_parameters_of_the_convolutions() -> None:
    model = pp.models.resnet50(num_classes=3, in_channels=1, conv_bias=True)
    shapes = [one.weight.shape for one in model.modules() if isinstance(one, torch.nn.Conv2d)]
    by_equation = sum(F2 * F1 * K1 * K2 + F2 for F2, F1, K1, K2 in shapes)
    profile = pp.profile(model, torch.zeros(1, 1, 32, 32), latency=False)
    assert by_equation == sum(one.parameters for one in profile.layers if one.kind == "Conv2d")
    norms = sum(2 * one.num_features for one in model.modules() if isinstance(one, torch.nn.BatchNorm2d))
    rest = norms + sum(one.numel() for one in model.fc.parameters())
    assert by_equation + rest == profile.parameters == 23_534_467
    assert f"{by_equation:,} parameters" in PAGE.read_text()
    assert f"{rest:,} of the" in PAGE.read_text()
