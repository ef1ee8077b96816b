"""Joining plans on the command line: the plan, the overlap of what two remove, and the one line for bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import pyprune as pp
from pyprune import comparing
from pyprune.types import Plan

Run = Callable[..., tuple[int, str, str]]
FILTERS = {"conv1": 6, "conv2": 4}


@pytest.fixture
def plans(tmp_path: Path) -> list[str]:
    """Three plans in files; the third knows one layer only."""
    keep = [{"conv1": [0, 1, 2], "conv2": [0, 1]}, {"conv1": [0, 1, 5], "conv2": [2, 3]}, {"conv1": [0, 3]}]
    for method, one in zip(("crank", "ckrm", "l1"), keep, strict=True):
        Plan(one, filters={name: FILTERS[name] for name in one}, method=method).save(tmp_path / f"{method}.json")
    return ["crank.json", "ckrm.json", "l1.json"]


def test_two_plans(run: Run, plans: list[str]) -> None:
    status, out, err = run("combine", *plans[:2], "--out", "joined.json", "--json")
    assert (status, err) == (0, "")
    shown, joined = json.loads(out), Plan.load("joined.json")
    assert joined == pp.combine([Plan.load(path) for path in plans[:2]])
    assert {name: one.tolist() for name, one in joined.keep.items()} == {"conv1": [0, 1], "conv2": [0]}
    assert (shown["method"], shown["refilled"], shown["out"]) == ("union(crank, ckrm)", {"conv2": [0]}, "joined.json")
    [row, other, whole] = shown["overlaps"]["crank, ckrm"]
    # conv1: {3, 4, 5} and {2, 3, 4} of 6: 2 in common, 1.5 by chance; 10 of the 20 ways have at least 2, 19 at most 2.
    assert row == {
        "layer": "conv1", "filters": 6, "first": 3, "second": 3, "common": 2, "chance": 1.5,
        "p": pytest.approx(0.5), "p_fewer": pytest.approx(0.95),
    }  # fmt: skip
    assert (other["common"], other["p_fewer"]) == (0, pytest.approx(1 / 6))
    assert (whole["layer"], whole["filters"], whole["common"], whole["chance"]) == ("all layers", 10, 2, 2.5)


def test_three_plans_and_what_the_terminal_says(run: Run, plans: list[str]) -> None:
    status, out, err = run("combine", *plans, "--how", "intersection", "--out", "joined.json")
    assert (status, err) == (0, "")
    for words in ("Plan by intersection(crank, ckrm, l1)", "Removed by crank, ckrm", "Removed by ckrm, l1",
                  "by chance", "p of fewer", "written: joined.json"):  # fmt: skip
        assert words in out
    assert Plan.load("joined.json").keep["conv2"].tolist() == [0, 1, 2, 3]
    status, out, _ = run("combine", *plans, "--min-keep", 3, "--json")
    assert status == 0
    assert [row["after"] for row in json.loads(out)["layers"]] == [3, 3]
    assert list(json.loads(out)["overlaps"]) == ["crank, ckrm", "crank, l1", "ckrm, l1"]


def test_the_table_is_that_of_the_function(run: Run, plans: list[str]) -> None:
    _, out, _ = run("combine", *plans, "--json")
    found = comparing.removed_by_both(Plan.load("crank.json"), Plan.load("l1.json"))
    assert [row["common"] for row in json.loads(out)["overlaps"]["crank, l1"]] == [found["conv1"].common]


def test_compaction_takes_what_was_joined(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyprune import files

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tiny.py").write_text("import pyprune as pp\nbuild = lambda: pp.models.vgg_digits(widths=(4, 4))\n")
    files.write_tensors(tmp_path / "w", pp.models.vgg_digits(widths=(4, 4)).state_dict(), {})
    for method in ("l1", "fpgm"):
        which = ("--method", method, "--rates", 0.5, "--out", f"{method}.json")
        assert run("select", "--model", "tiny:build", "--weights", "w", *which)[0] == 0
    assert run("combine", "l1.json", "fpgm.json", "--out", "joined.json")[0] == 0
    network = ("--model", "tiny:build", "--weights", "w", "--plan", "joined.json")
    status, out, err = run("compact", *network, "--out", "slim", "--json")
    assert (status, err) == (0, "")
    assert [row["after"] for row in json.loads(out)["layers"]] == [
        len(one) for one in Plan.load("joined.json").keep.values()
    ]
    assert run("finetune", *network, "--steps", 1, "--out", "tuned", "--json")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("crank.json", "combine: needs two or more plans; got 1"),
        ("crank.json ckrm.json --how unoin", "got 'unoin'. Did you mean 'union'?"),
        ("crank.json other.json", "'conv1' has 6 filters in the plan by 'crank' and 7 in that by 'other'"),
        ("crank.json elsewhere.json", "the plans know no layer in common"),
        ("crank.json missing.json", "missing.json"),
        ("crank.json ckrm.json --out .", "--out: needs the name of a file"),
        ("crank.json ckrm.json --min-keep 0", "min-keep"),
    ],
)
def test_bad_input_gets_one_line(run: Run, plans: list[str], words: str, message: str) -> None:
    Plan({"conv1": [0]}, filters={"conv1": 7}, method="other").save("other.json")
    Plan({"conv9": [0]}, filters={"conv9": 7}).save("elsewhere.json")
    status, out, err = run("combine", *words.split())
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not Path("plan.json").exists()
