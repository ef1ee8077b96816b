"""Searching widths on the command line: seconds on the embedded digits, going on after a stop, bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import pyprune as pp

Run = Callable[..., tuple[int, str, str]]

SMALL = "--images 120 --epochs 1 --runs 1 --budget 2"


def test_a_network_of_pyprune(run: Run) -> None:
    status, out, err = run(*f"widths --arch vgg_digits --width block1=8 --width block2=8 {SMALL} --out found".split())
    assert (status, err) == (0, "")
    assert "block1 8 >" in out
    assert "ANOVA undefined" in out
    assert "written: found/search.json, found/report.html" in out
    found = pp.WidthSearch.load("found/search.json")
    assert [step.widths["block3"] for step in found.steps] == [128, 64]
    assert found.options["images"] == 120
    assert set(found.standard.runs[0].test) == {"auc", "top1"}
    assert "data:image/svg+xml;base64," in Path("found/report.html").read_text()
    history = pp.History.load("found/step_0/run_0_0.history.json")
    assert len(history.epochs) == 1

    assert run("report", "found", "--out", "again.html")[:2] == (0, "written: again.html\n")
    assert Path("again.html").read_bytes() == Path("found/report.html").read_bytes()
    own = ["--arch", "found/search.json", "--weights", "found/narrow.safetensors", "--images", "120"]
    status, out, err = run("finetune", *own, "--steps", 1, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["accuracy"][0] == found.narrow.runs[0].test["top1"]  # the network as the search left it

    before = Path("found/step_0/run_0.json").stat().st_mtime_ns
    words = f"widths --arch vgg_digits --width block1=8 --width block2=8 {SMALL} --budget 3 --out found --json".split()
    status, out, err = run(*words)
    assert (status, err) == (0, "")
    assert len(json.loads(out)["steps"]) == 3
    assert Path("found/step_0/run_0.json").stat().st_mtime_ns == before
    status, out, err = run(*words, "--epochs", "2")
    assert (status, out) == (2, "")
    assert err == (
        "pyprune: optimize_widths: found holds a run with other epochs. Choose another folder, or start over with "
        "fresh=True (--fresh).\n"
    )
    assert run(*words, "--epochs", "2", "--fresh")[0] == 0


def test_a_network_of_ones_own(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "own_networks.py").write_text(
        "import torch\n"
        "def build(widths):\n"
        "    a, b = widths['a'], widths['b']\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(1, a, 3), torch.nn.ReLU(), torch.nn.Conv2d(a, b, 3),\n"
        "        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(b, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = f"widths --model own_networks:build --width a=8 --width b=8 --coupled a,b {SMALL} --json".split()
    status, out, err = run(*words)
    assert (status, err) == (0, "")
    status, _, err = run("finetune", "--arch", "width-results/search.json", "--weights", "w")
    assert (status, err) == (
        2, "pyprune: --arch: width-results/search.json is not of a network of pyprune.models. Pass --model "
        "package.module:factory.\n",
    )  # fmt: skip
    assert [tuple(step["widths"].values()) for step in json.loads(out)["steps"]] in ([(8, 8), (4, 4)], [(8, 8), (7, 7)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Give either --arch NAME or --model package.module:factory, and not both."),
        ("--arch vgg_digit", "--arch: there is no 'vgg_digit'. Did you mean vgg_digits?"),
        ("--model a:b", "widths: --model needs the widths to start from, as --width a=64 --width b=128."),
        ("--arch vgg_digits --per block", "standard_widths: per must be 'stage' or 'layer'; got 'block'."),
        ("--arch vgg_digits --width block9=8", "optimize_widths: build failed for widths"),
        ("--arch vgg_digits --width block1=many", "optimize_widths: widths must be whole numbers of at least 1"),
        ("--arch vgg_digits --budget 0", "optimize_widths: budget must be a whole number of at least 1; got 0."),
        ("--arch vgg_digits --budget 2", "optimize_widths: budget must allow the 3 runs of the standard network"),
        ("--arch vgg_digits --coupled block1,block2", "optimize_widths: coupled widths must be equal"),
        ("--arch vgg_digits --metric top2", "--metric: must be auc or top1; got 'top2'."),
        ("--arch vgg_digits --set depth=4", "optimize_widths: build failed for widths"),
        ("--arch vgg_digits --data nowhere", "open_data: the data must be one of digits"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(run: Run, words: str, message: str) -> None:
    status, out, err = run("widths", *words.split())
    assert (status, out) == (2, "")
    assert err.startswith(f"pyprune: {message}")
    assert err.count("\n") == 1


def test_pages_of_saved_results(run: Run, tmp_path: Path) -> None:
    pp.ckrm(pp.models.vgg_digits(widths=(4, 4)), null=False, progress=False).save(tmp_path / "ckrm.json")
    status, out, err = run("report", "ckrm.json", "--out", "page.html", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == {"out": "page.html", "format": "pyprune.ckrm"}
    assert "data:image/svg+xml;base64," in Path("page.html").read_text()
    pp.Plan({"a": [0]}).save(tmp_path / "plan.json")
    (tmp_path / "odd.json").write_text("[1")
    for words, message in (
        ("plan.json", "report: plan.json must be a result of ckrm, trial or widths; its format is 'pyprune.plan'."),
        ("nowhere.json", "report: "),
        ("odd.json", "report: odd.json"),
        (".", "written: "),
    ):
        status, out, err = run("report", words, "--out", "other.html")
        assert (out if words == "." else err.removeprefix("pyprune: ")).startswith(message)
        assert status == (0 if words == "." else 2)
        assert (out + err).count("\n") == 1
