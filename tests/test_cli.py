"""The command line as a user meets it: what it writes, and the one line that bad input gets."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pyprune as pp
from pyprune import files

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the demo's network, barely trained: ranks and plans are real, accuracies are not."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "digits.safetensors"
    files.write_tensors(path, pp.models.vgg_digits().state_dict(), {})
    return path


@pytest.fixture(scope="module")
def model(weights: Path) -> tuple[object, ...]:
    return ("--arch", "vgg_digits", "--weights", weights)


def test_rank_select_and_compact_follow_one_another(run: Run, model: tuple[object, ...], tmp_path: Path) -> None:
    status, out, _ = run("rank", *model, "--images-per-class", 3, "--json")
    assert status == 0
    layers = json.loads(out)["layers"]
    assert [row["filters"] for row in layers] == [32, 32, 64, 64, 128, 128]

    status, out, _ = run("select", "--arch", "vgg_digits", "--ranks", "ranks.safetensors", "--method", "hrank",
                         "--rates", 0.75, "--json")  # fmt: skip
    assert status == 0
    assert [row["after"] for row in json.loads(out)["layers"]] == [8, 8, 16, 16, 32, 32]

    hrank = ("select", "--arch", "vgg_digits", "--ranks", "ranks.safetensors", "--method", "hrank", "--json")
    status, out, _ = run(*hrank, "--rates", "[0.5]*2+[0.75]*4", "--out", "mixed.json")
    assert [row["after"] for row in json.loads(out)["layers"]] == [16, 16, 16, 16, 32, 32]
    status, out, _ = run(*hrank, "--rates", "plan.json", "--out", "same.json")
    assert [row["after"] for row in json.loads(out)["layers"]] == [8, 8, 16, 16, 32, 32]

    status, out, _ = run("compact", *model, "--plan", "plan.json", "--json")
    assert status == 0
    shown = json.loads(out)
    assert shown["parameters"][0] > 10 * shown["parameters"][1]
    assert shown["certificate"].startswith("slim = masked")
    assert sorted(path.name for path in (tmp_path / "slim").iterdir()) == [
        "README.md", "architecture.json", "model.safetensors", "slim_model.py"]  # fmt: skip
    assert sum(p.numel() for p in pp.load_slim(tmp_path / "slim").parameters()) == shown["parameters"][1]


def test_compact_writes_an_onnx_file(run: Run, model: tuple[object, ...], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    status, out, err = run("compact", *model, "--out", "slim", "--onnx", "new/slim.onnx", "--json")
    assert (status, err) == (0, "")
    shown = json.loads(out)["onnx"]
    assert (shown["path"], shown["opset"], shown["verified"]) == ("new/slim.onnx", 18, True)
    assert shown["max_difference"] <= shown["tolerance"]
    x = torch.randn(3, 1, 16, 16)
    found = runtime.InferenceSession(str(tmp_path / "new" / "slim.onnx")).run(None, {"input": x.numpy()})[0]
    assert (torch.from_numpy(found) - pp.load_slim(tmp_path / "slim")(x)).abs().max() < 1e-4


def test_prune_leaves_everything(run: Run, model: tuple[object, ...], tmp_path: Path) -> None:
    exclude = [word for i in (3, 4, 6, 7) for word in ("--exclude", f"features.conv{i}")]
    status, out, err = run("prune", *model, "--images-per-class", 3, "--epochs", 1, "--out", "run", *exclude)
    assert (status, err) == (0, "")
    assert "slim = masked" in out
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {
        "ranks.safetensors", "plan.json", "history.json", "evaluation_original.json", "evaluation_masked.json",
        "evaluation_slim.json", "slim", "report.html", "run.json", "training.safetensors"}  # fmt: skip
    plan = pp.Plan.load(tmp_path / "run" / "plan.json")
    assert len(plan.keep["features.conv7"]) == plan.filters["features.conv7"]


def test_finetune_holds_the_masks_of_a_plan(run: Run, model: tuple[object, ...], tmp_path: Path) -> None:
    pp.Plan({"features.conv0": [0, 5]}).save(tmp_path / "plan.json")
    status, out, _ = run("finetune", *model, "--plan", "plan.json", "--steps", 3, "--out", "tuned/w", "--json")
    assert status == 0
    assert json.loads(out)["best"] == 1
    tensors, _ = files.read_tensors("test", tmp_path / "tuned" / "w")
    alive = tensors["features.conv0.weight"].flatten(1).any(1)
    assert alive.nonzero().flatten().tolist() == [0, 5]
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == ["w"]  # no checkpoint is left behind

    words = ["--plan", "plan.json", "--epochs", 5, "--lr", 1e-9, "--stop-after", 1, "--out", "still", "--json"]
    status, out, _ = run("finetune", *model, *words)
    assert status == 0
    assert json.loads(out)["stopped"].startswith("after epoch ")
    assert len(json.loads(out)["epochs"]) < 5

    status, out, _ = run("compact", "--arch", "vgg_digits", "--weights", "tuned/w", "--json")  # the zeros are found
    assert status == 0
    assert json.loads(out)["layers"][0] | {"note": ""} == {
        "layer": "features.conv0", "before": 32, "after": 2, "clusters": None, "stability": None, "note": "",
    }  # fmt: skip


def test_doctor_says_what_is_there(run: Run) -> None:
    status, out, _ = run("doctor")
    assert status == 0
    assert "cpu_baseline" in out
    status, out, _ = run("doctor", "--json")
    assert json.loads(out)["pyprune"] == pp.__version__


def test_ones_own_model_by_its_factory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import pyprune as pp\nbuild = lambda: pp.models.vgg_digits(widths=(8,) * 6)\n")
    files.write_tensors(tmp_path / "w", pp.models.vgg_digits(widths=(8,) * 6).state_dict(), {})
    status, out, _ = run("rank", "--model", "mine:build", "--weights", "w", "--images-per-class", 2, "--json")
    assert status == 0
    assert [row["filters"] for row in json.loads(out)["layers"]] == [8] * 6


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> dict[str, Path]:
    """Files that are not what they should be."""
    folder = tmp_path_factory.mktemp("bad")
    names = ("truncated", "foreign", "other_plan", "good_plan", "other_ranks", "small", "a_file")
    found = {name: folder / name for name in names}
    pp.Plan({"features.conv0": [0]}).save(found["good_plan"])
    found["truncated"].write_bytes(weights.read_bytes()[:1000])
    found["foreign"].write_text("hello")
    found["a_file"].write_text("")
    pp.Plan({"features.conv0": [0]}, {"features.conv0": 99}).save(found["other_plan"])
    pp.ClassRanks({"features.conv0": torch.ones(5, 10).numpy()}).save(found["other_ranks"])
    files.write_tensors(found["small"], pp.models.vgg_digits(widths=(8,) * 6).state_dict(), {})
    return found


COMMANDS = {
    "unknown architecture": ("rank --arch vgg_digit --weights {weights}", "Did you mean vgg_digits?"),
    "neither architecture nor model": ("rank --weights {weights}", "either --arch NAME or --model"),
    "both architecture and model": ("rank --arch vgg_digits --model a:b --weights {weights}", "and not both"),
    "factory that is not there": ("rank --model os:nothing --weights {weights}", "package.module:factory"),
    "factory without a module": ("rank --model :build --weights {weights}", "package.module:factory"),
    "factory that cannot be called": ("rank --model os:sep --weights {weights}", "must be callable; it is str"),
    "factory that builds something else": ("rank --model os:getcwd --weights {weights}", "it returned str"),
    "weights missing": ("rank --arch vgg_digits --weights nowhere", "nowhere"),
    "weights truncated": ("rank --arch vgg_digits --weights {truncated}", "may be truncated"),
    "weights foreign": ("rank --arch vgg_digits --weights {foreign}", "another kind of file"),
    "weights of another model": ("rank --arch vgg_digits --weights {small}", "does not fit VGG"),
    "unknown data": ("rank --arch vgg_digits --weights {weights} --data digit", "digits"),
    "too many images": ("rank --arch vgg_digits --weights {weights} --images-per-class 1000", "1000"),
    "unknown taps": ("rank --arch vgg_digits --weights {weights} --taps relu", "activation"),
    "no such option": ("rank --arch vgg_digits --wieghts {weights}", "No such option"),
    "option missing": ("rank --arch vgg_digits", "--weights"),
    "option of the wrong kind": ("rank --arch vgg_digits --weights {weights} --images-per-class few", "valid integer"),
    "no such command": ("ranks", "ranks"),
    "ranks missing": ("select --arch vgg_digits --ranks nowhere", "nowhere"),
    "ranks foreign": ("select --arch vgg_digits --ranks {weights}", "pyprune.ranks"),
    "ranks truncated": ("select --arch vgg_digits --ranks {truncated}", "may be truncated"),
    "ranks of another model": ("select --arch vgg_digits --ranks {other_ranks}", "features.conv0"),
    "unknown method": ("select --arch vgg_digits --ranks {ranks} --method crnk", "crank"),
    "rate out of range": ("select --arch vgg_digits --ranks {ranks} --method hrank --rates 1.5", "[0, 1)"),
    "rates that are neither": ("select --arch vgg_digits --ranks {ranks} --method hrank --rates [0.5", "rates"),
    "rates of another length": ("select --arch vgg_digits --ranks {ranks} --method hrank --rates [0.5]*3", "rates"),
    "rates missing": ("select --arch vgg_digits --ranks {ranks} --method hrank", "rates"),
    "unknown layer": ("select --arch vgg_digits --ranks {ranks} --exclude features.conv2", "features.conv"),
    "plan missing": ("compact --arch vgg_digits --weights {weights} --plan nowhere", "nowhere"),
    "plan foreign": ("compact --arch vgg_digits --weights {weights} --plan {foreign}", "not readable JSON"),
    "plan of another model": ("compact --arch vgg_digits --weights {weights} --plan {other_plan}", "another model"),
    "output is a file": ("prune --arch vgg_digits --weights {weights} --out {a_file}", "must be writable"),
    "output in a file": ("rank --arch vgg_digits --weights {weights} --out {a_file}/ranks", "must be writable"),
    "output is a folder": ("rank --arch vgg_digits --weights {weights} --out .", "is a folder"),
    "plan into a file": ("select --arch vgg_digits --ranks {ranks} --out {a_file}/plan", "must be writable"),
    "slim folder is a file": (
        "compact --arch vgg_digits --weights {weights} --plan {other_plan} --out {a_file}", "must be writable"),
    "unknown joining": (
        "compact --arch vgg_digits --weights {weights} --plan {good_plan} --residual scater", "residual"),
    "unknown fine-tuning": ("prune --arch vgg_digits --weights {weights} --finetune-on fat", "finetune_on"),
}  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks") / "ranks.safetensors"
    widths = {"features.conv0": 32, "features.conv1": 32}
    generator = torch.Generator().manual_seed(0)
    pp.ClassRanks({n: torch.rand(F, 10, generator=generator).double().numpy() for n, F in widths.items()}).save(path)
    return path


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_input_gets_one_line_and_status_2(
    run: Run, weights: Path, ranks: Path, bad: dict[str, Path], case: str
) -> None:
    command, message = COMMANDS[case]
    status, out, err = run(*command.format(weights=weights, ranks=ranks, **bad).split())
    assert status == 2
    assert message in err
    assert err.startswith("pyprune")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err


def test_the_installed_program_exits_with_2_and_no_traceback() -> None:
    program = Path(sys.executable).with_name("pyprune")
    found = subprocess.run([program, "rank", "--arch", "x", "--weights", "y"], capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1


def test_a_full_disk_is_named(run: Run, ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    status, _, err = run("select", "--arch", "vgg_digits", "--ranks", ranks, "--out", "plan.json")
    assert (status, err) == (2, "pyprune: cannot read or write plan.json: No space left on device.\n")
    assert list(tmp_path.iterdir()) == []


def test_interrupting_is_said_in_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyprune.machine.backends", interrupt)
    status, _, err = run("doctor")
    assert status == 130
    assert err == "pyprune: interrupted; nothing half-written was left behind.\n"


def test_trial_compares_criteria(run: Run, model: tuple[object, ...], tmp_path: Path) -> None:
    asked = ("trial", *model, "--method", "l1", "--method", "random", "--rates", 0.75, "--runs", 2, "--steps", 1)
    status, out, _ = run(*asked)
    assert status == 0
    assert "l1, random: " in out
    status, again, _ = run(*asked, "--json")
    assert [row["runs"] for row in json.loads(again)["rows"]] == [2, 2]
    assert json.loads((tmp_path / "trial-results" / "trial.json").read_text()) == json.loads(again)
    status, _, error = run(*asked, "--lr", 1.0)
    assert status == 2
    assert "holds a run with other lr" in error
