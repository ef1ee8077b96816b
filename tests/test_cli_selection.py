"""Selecting on the command line: every criterion, budgets, options, pictures, and the one line for bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import pyprune as pp
from pyprune import files

Run = Callable[..., tuple[int, str, str]]
WIDTHS = (8, 8, 8, 8, 12, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network, ranks of it, its factory in a module, and a few images."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("selection")
    files.write_tensors(place / "w", pp.models.vgg_digits(widths=WIDTHS).state_dict(), {})
    rng = np.random.default_rng(0)
    layers = {f"features.conv{i}": rng.random((F, 10)) * 8 for i, F in zip((0, 1, 3, 4, 6, 7), WIDTHS, strict=True)}
    pp.ClassRanks(layers).save(place / "ranks")
    (place / "small.py").write_text(f"import pyprune as pp\nbuild = lambda: pp.models.vgg_digits(widths={WIDTHS})\n")
    return place


@pytest.fixture
def select(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.syspath_prepend(folder)

    def call(words: str) -> tuple[int, str, str]:
        text = words.format(w=folder / "w", ranks=folder / "ranks")
        return run("select", "--model", "small:build", *text.split())

    return call


@pytest.mark.parametrize("method", ["l1", "fpgm", "cup", "ckrm", "bn_scale", "random", "taylor", "tvs"])
def test_criteria_at_a_budget(select: Callable[..., tuple[int, str, str]], method: str) -> None:
    more = "--set batches=1" if method in ("taylor", "tvs") else ""
    status, out, err = select(f"--weights {{w}} --method {method} --budget macs=0.5 {more} --json")
    assert (status, err) == (0, "")
    shown = json.loads(out)
    assert shown["budget"]["macs"]["reached"] <= 0.5 * shown["budget"]["macs"]["of"]
    assert sum(row["after"] for row in shown["layers"]) < sum(WIDTHS)
    assert pp.Plan.load("plan.json").method == method


def test_ranks_alone_are_enough_for_crank(select: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, out, _ = select("--ranks {ranks} --set n_init=1 --set k_max=5 --json")
    assert status == 0
    own = [row["after"] for row in json.loads(out)["layers"]]
    status, out, _ = select(
        "--ranks {ranks} --set n_init=1 --set k_max=5 --ease 0.5 --preset thesis_text --min-keep 2 --json"
    )
    assert status == 0
    options = pp.Plan.load("plan.json").options
    assert (options["ease"], options["preset"], options["min_keep"], options["n_init"]) == (0.5, "thesis_text", 2, 1)
    status, out, _ = select("--ranks {ranks} --set n_init=1 --set k_max=5 --ease 1 --pictures drawn --json")
    shown = json.loads(out)
    assert [row["after"] for row in shown["layers"]] == list(WIDTHS) != own
    assert len(shown["pictures"]) == 6
    assert (tmp_path / "drawn" / "features.conv0.svg").read_text().startswith("<?xml")


def test_what_the_terminal_says(select: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = select("--weights {w} --method l1 --budget macs=0.5 --budget parameters=0.9 --coupled joint")
    assert status == 0
    assert "budget of macs:" in out
    assert "budget of parameters:" in out
    assert "MACs an image:" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method l1 --rates 0.5", "'l1' looks at trained weights. Pass --weights"),
        ("", "needs --ranks, which `pyprune rank` writes"),
        ("--weights {w}", "'crank' needs ranks"),
        ("--ranks {ranks} --budget macs=0.5", "budget needs example_inputs"),
        ("--weights {w} --method l1 --budget 0.5", "--budget: needs name=value; got '0.5'"),
        ("--weights {w} --method l1 --budget mac=0.5", "got 'mac'. Did you mean 'macs'?"),
        ("--weights {w} --method l1 --budget macs=0.0001", "macs cannot fall to"),
        ("--weights {w} --method l1 --rates 0.5 --ease 0.1", "'l1' has no option 'ease'"),
        ("--ranks {ranks} --ease 2", "ease must be a number from 0 to 1; got 2.0"),
        ("--ranks {ranks} --set sead=1", "'crank' has no option 'sead'"),
        ("--ranks {ranks} --coupled together", "coupled must be one of 'apart', 'joint'"),
        ("--weights {w} --method cup", "'cup' needs threshold="),
        ("--weights {w} --method taylor --rates 0.5 --set batches=0", "batches must be a whole number of at least 1"),
    ],
)
def test_bad_input_gets_one_line(select: Callable[..., tuple[int, str, str]], words: str, message: str) -> None:
    status, out, err = select(words)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_prune_at_a_budget(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    prune = ("prune", "--model", "small:build", "--weights", folder / "w", "--images-per-class", 2, "--steps", 1,
             "--out", "run", "--json", "--method", "l2")  # fmt: skip
    status, out, err = run(*prune, "--budget", "macs=0.4")
    assert (status, err) == (0, "")
    assert json.loads(out)["macs"][1] <= 0.4 * json.loads(out)["macs"][0]
    judge = ("fairness", "run/evaluation_original.json", "run/evaluation_slim.json")
    status, out, _ = run(*judge, "--out", "fairness.json")
    assert status == 0
    assert out.splitlines()[1].startswith("EOpp0")
    status, out, _ = run(*judge, "--json")
    assert json.loads(out)["classes"] == pp.Fairness.load("fairness.json").to_json()["classes"] == list(range(10))
    status, _, err = run(*prune, "--budget", "macs=0.5")
    assert status == 2
    assert "run with other selection" in err
    status, _, err = run(*prune, "--fresh", "--set", "seed=1")
    assert (status, err) == (2, "pyprune: prune: 'l2' has no option 'seed'; it has none.\n")
