"""The commands that measure: redundancy from weights, and the kernels' own speed."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import pyprune as pp
from pyprune import benching, files, machine

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, Path]:
    """Two little networks; in the first, half of the first layer's filters are copies of the other half."""
    paths = tmp_path / "copied.safetensors", tmp_path / "plain.safetensors"
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        model = pp.models.vgg_digits(widths=(8, 8, 8, 8, 8, 8))
        if seed == 0:
            model.features.conv0.weight.data[4:] = model.features.conv0.weight.data[:4]
        files.write_tensors(path, model.state_dict(), {})
    return paths


def test_ckrm_reads_weights_and_draws(run: Run, weights: tuple[Path, Path], tmp_path: Path) -> None:
    status, out, _ = run("ckrm", *weights, "--threshold", 0.99, "--out", "ckrm.json", "--plots", "figures")
    assert status == 0
    assert "features.conv0" in out
    result = pp.CKRM.load(tmp_path / "ckrm.json")
    assert list(result.networks) == ["copied", "plain"]
    assert result["copied", "features.conv0"].lambdas[0, 0] == 4 / 28
    assert result["plain", "features.conv0"].lambdas[0, 0] < 4 / 28
    drawn = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert drawn == ["ckrm.html", "depth.svg", "kernels_0.svg", "kernels_1.svg", "omega.svg"]
    for line in (line for line in out.splitlines() if line.startswith("written: ")):
        assert (tmp_path / line.removeprefix("written: ")).is_file()


def test_ckrm_of_an_architecture_prints_json(run: Run, weights: tuple[Path, Path], tmp_path: Path) -> None:
    full = tmp_path / "full.safetensors"
    files.write_tensors(full, pp.models.vgg_digits().state_dict(), {})
    status, out, _ = run("ckrm", full, "--arch", "vgg_digits", "--layer", "features.conv1", "--pairs", 50, "--json")
    assert status == 0
    layers = json.loads(out)["networks"]["full"]
    assert list(layers) == ["features.conv1"]
    assert layers["features.conv1"]["pairs"] == 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--threshold", 1.5), "thresholds must be different numbers in [0, 1]"),
        (("--eps", 0), "eps must be a positive, finite number"),
        (("--pairs", 1000), "pairs=1000 is more than the 28 pairs of"),
        (("--layer", "features.conv9"), "there is no layer 'features.conv9' to measure"),
        (("--arch", "vgg_digit"), "Did you mean vgg_digits?"),
        (("--out", "."), "--out: needs the name of a file"),
    ],
)
def test_ckrm_refuses(run: Run, weights: tuple[Path, Path], words: tuple[object, ...], message: str) -> None:
    status, out, err = run("ckrm", weights[0], *words)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_ckrm_refuses_the_same_file_twice(run: Run, weights: tuple[Path, Path]) -> None:
    status, _, err = run("ckrm", weights[0], weights[0])
    assert status == 2
    assert "named twice" in err


def test_bench_measures_ranks_and_checks_them(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benching._BYTES, "cpu", 1 << 18)
    monkeypatch.setitem(benching._SECONDS, "cpu", 1e-4)
    monkeypatch.setattr(benching, "VGG16", ((2, 4), (3, 2)))
    status, out, _ = run("bench", "--op", "rank", "--side", 4, "--rounds", 1, "--out", "bench.json")
    assert status == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    variants = list(machine.this_machine().cpu_variants)
    assert [row["rival"] for row in found["rows"]] == ["torch_batched", *variants] * 2
    for row in found["rows"]:
        assert f"| {row['case']} | {row['rival']} |" in out
        assert row["rate"] == pytest.approx(row["items"] / row["seconds"])
        if row["case"] == "4 x 4":
            assert row["checked"] > 0
            assert row["d0"] == row["d1"] == 0
    assert found["rows"][0]["ratio"] == 1
    assert found["floor"]["bandwidth"] > 0


def test_bench_measures_kernel_ssim(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "RESNET50", (((6, 3, 7), 1), ((9, 4, 3), 2)))
    monkeypatch.setitem(benching._BYTES, "cpu", 1 << 18)
    monkeypatch.setitem(benching._SECONDS, "cpu", 1e-4)
    monkeypatch.setattr(benching, "_compiled", lambda function: None)  # compiling takes half a minute
    status, out, _ = run("bench", "--op", "ssim", "--rounds", 1, "--json")
    assert status == 0
    rows = json.loads(out)["rows"]
    assert {row["case"] for row in rows} == {"6 x 3 x 7 x 7", "9 x 4 x 3 x 3", "ResNet-50"}
    for row in rows:
        assert row["d1"] is None
        if not row["rival"].startswith("torch") and row["case"] != "ResNet-50":
            assert row["checked"] > 0
            assert row["d0"] == 0
    whole = next(row for row in rows if row["case"] == "ResNet-50")
    assert whole["items"] == 15 * 3 + 2 * 36 * 4


def test_the_peers_of_kernel_ssim_compute_the_same() -> None:
    w = benching.random_kernels((11, 5, 3, 3), torch.device("cpu"))
    upper = np.triu_indices(11, 1)
    psi = np.asarray(pp.kernel_ssim(w.numpy()))
    for block in (benching.broadcast_ssim_block, benching.einsum_ssim_block):
        assert np.abs(benching.broadcast_ssim(w, block).numpy() - psi)[upper].max() < 1e-5
    assert benching._unlike(torch.from_numpy(psi) + 2e-6, torch.from_numpy(psi).double())[1] == 121


def test_bench_counts_wrong_ranks() -> None:
    maps = benching.relu_maps(30, 6, torch.device("cpu"))
    right = benching._RightRanks(maps)
    ranks = torch.from_numpy(np.asarray(pp.matrix_rank(maps.numpy())))
    assert right.check(ranks) == (30, 0, 0)
    ranks[3] += 1
    assert right.check(ranks) == (30, 1, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--op", "rnk"), "operations are rank and ssim; got rnk"),
        (("--device", "cud"), "device: torch cannot use 'cud' here"),
        (("--device", "meta"), "device must be cpu or cuda; got 'meta'"),
        (("--side", 0), "must be 1 or more"),
        (("--variant", "cpu_fast", "--op", "rank"), "variant 'cpu_fast' is unknown"),
    ],
)
def test_bench_refuses(run: Run, words: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benching._BYTES, "cpu", 1 << 18)
    status, out, err = run("bench", *words)
    assert (status, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
