"""The command line on files as people have them, good and bad: CIFAR archives, folders, .npz files, checkpoints."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pyprune as pp

Run = Callable[..., tuple[int, str, str]]
NAMES = [f"class{i}" for i in range(10)]


class Hostile:
    """Unpickling this would make the folder ``touched``."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("touched",)


def write_cifar10(folder: Path, hostile: bool = False) -> Path:
    """Write a small archive of the official layout."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        content = {
            b"data": rng.integers(0, 256, (40, 3072), np.uint8), b"labels": [(i + k) % 10 for k in range(40)],
            b"batch_label": b"batch", b"filenames": [b"x.png"] * 40,
        }  # fmt: skip
        if hostile and i == 2:
            content[b"labels"] = Hostile()
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [n.encode() for n in NAMES]}, protocol=2))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good and bad files, by name."""
    folder = tmp_path_factory.mktemp("files")
    found = {"folder": folder, "cifar": write_cifar10(folder / "good" / "cifar-10-batches-py")}
    found["hostile_cifar"] = write_cifar10(folder / "hostile" / "cifar-10-batches-py", hostile=True)
    short = write_cifar10(folder / "short" / "cifar-10-batches-py")
    (short / "data_batch_4").write_bytes((short / "data_batch_4").read_bytes()[:5000])
    found["short_cifar"] = short
    torch.manual_seed(0)
    network = pp.models.resnet20(width=0.25)
    for name, content in {
        "weights": network.state_dict(),
        "wrapped": {"state_dict": {f"module.{key}": value for key, value in network.state_dict().items()}, "epoch": 3},
        "twelve": pp.models.resnet20(width=0.25, num_classes=12).state_dict(),
        "hostile_pth": {"state_dict": Hostile()},
    }.items():
        found[name] = folder / f"{name}.pth"
        torch.save(content, found[name])
    found["short_pth"] = folder / "short.pth"
    found["short_pth"].write_bytes(found["weights"].read_bytes()[:2000])
    found["empty"] = folder / "empty"
    found["empty"].write_bytes(b"")
    found["text"] = folder / "text"
    found["text"].write_text("these are no weights")
    (folder / "narrow.py").write_text("import pyprune as pp\nbuild = lambda: pp.models.resnet20(width=0.25)\n")
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (100, 32, 32, 3), np.uint8)
    found["npz"] = folder / "images.npz"
    np.savez(found["npz"], images=images, labels=np.arange(100) % 10)
    found["pickled_npz"] = folder / "pickled.npz"
    np.savez(found["pickled_npz"], images=np.array([Hostile()], object), labels=np.zeros(1, int))
    for split in ("train", "test"):
        for label in range(10):
            place = folder / "photos" / split / NAMES[label]
            place.mkdir(parents=True)
            for k in range(10):
                Image.fromarray(images[10 * label + k]).save(place / f"{k}.png")
    found["photos"] = folder / "photos"
    return found


@pytest.mark.parametrize("data", ["cifar10:{cifar}", "npz:{npz}", "folder:{photos}"])
def test_prune_from_a_checkpoint_to_a_slim_folder(
    run: Run, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: str
) -> None:
    monkeypatch.syspath_prepend(made["folder"])
    words = ["--model", "narrow:build", "--weights", made["wrapped"], "--data", data.format(**made)]
    size = ["--size", 32] if "folder" in data else []
    status, out, err = run("prune", *words, *size, "--images-per-class", 2, "--steps", 2, "--out", "run", "--json")
    assert (status, err) == (0, "")
    shown = json.loads(out)
    assert shown["certificate"].startswith("slim = masked")
    assert shown["parameters"][1] < shown["parameters"][0]
    assert sum(p.numel() for p in pp.load_slim(tmp_path / "run" / "slim").parameters()) == shown["parameters"][1]

    status, again, _ = run("prune", *words, *size, "--images-per-class", 2, "--steps", 2, "--out", "run", "--json")
    assert status == 0
    assert json.loads(again)["accuracy"] == shown["accuracy"]
    status, _, err = run("prune", *words, *size, "--images-per-class", 1, "--steps", 2, "--out", "run")
    assert status == 2
    assert "holds a run with other images_per_class" in err
    assert "--fresh" in err


def test_convert_makes_a_torch_file_safe(run: Run, made: dict[str, Path], tmp_path: Path) -> None:
    status, out, _ = run("convert", made["wrapped"], "safe.safetensors")
    assert status == 0
    assert "tensors" in out
    network = pp.models.resnet20(width=0.25)
    assert not pp.load_checkpoint(network, tmp_path / "safe.safetensors").missing


def test_the_network_takes_the_images_channels(run: Run, made: dict[str, Path], tmp_path: Path) -> None:
    torch.save(pp.models.vgg_digits(in_channels=1).state_dict(), tmp_path / "grey.pth")
    words = ["--arch", "vgg_digits", "--weights", "grey.pth", "--data", f"folder:{made['photos']}", "--size", 16]
    few = ["--images", 90, "--images-per-class", 2, "--out", "r"]
    status, out, err = run("rank", *words, *few, "--channels", 1, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["layers"][0]["filters"] == 32
    status, _, err = run("select", *words, *few[:2], "--channels", 1, "--method", "l1", "--rates", 0.5, "--json")
    assert (status, err) == (0, "")
    status, _, err = run("rank", *words, *few)  # three, as folders have them
    assert status == 2
    assert "features.conv0.weight" in err
    status, _, err = run("rank", *words, "--images", 20)
    assert status == 2
    assert "images must be at least 30, one for each class of each part, and at most the 200 that there are" in err


def test_training_is_augmented_when_asked_for(run: Run, made: dict[str, Path], tmp_path: Path) -> None:
    torch.save(pp.models.resnet20(width=0.25).state_dict(), tmp_path / "w.pth")
    (tmp_path / "quarter.py").write_text("import pyprune as pp\nbuild = lambda: pp.models.resnet20(width=0.25)\n")
    losses = {}
    for flag in ("--augment", "--no-augment", None):
        words = ["--model", "quarter:build", "--weights", "w.pth", "--data", f"npz:{made['npz']}", "--steps", 2]
        status, out, err = run("finetune", *words, *([flag] if flag else []), "--out", f"{flag}.safetensors", "--json")
        assert (status, err) == (0, "")
        losses[flag] = json.loads(out)["epochs"][0]["train_loss"]
    assert losses["--no-augment"] == losses[None]
    assert losses["--augment"] != losses[None]


RANK = "rank --model narrow:build --weights {weights} --data cifar10:{cifar} --images-per-class 2 "
COMMANDS = {
    "hostile archive": ("rank --model narrow:build --weights {weights} --data cifar10:{hostile_cifar}", "data_batch_3"),
    "truncated archive": ("rank --model narrow:build --weights {weights} --data cifar10:{short_cifar}", "data_batch_4"),
    "archive missing": ("rank --model narrow:build --weights {weights} --data cifar10:nowhere", "nowhere"),
    "cifar100 in a cifar10 folder": ("rank --model narrow:build --weights {weights} --data cifar100:{cifar}", "cifar"),
    "data without a place": ("rank --model narrow:build --weights {weights} --data cifar10", "cifar10:DIR"),
    "misspelt data": ("rank --model narrow:build --weights {weights} --data cfar10:x", "Did you mean 'cifar10:DIR'?"),
    "npz missing": ("rank --model narrow:build --weights {weights} --data npz:nowhere.npz", "nowhere.npz"),
    "npz that is none": ("rank --model narrow:build --weights {weights} --data npz:{text}", "npz"),
    "npz with objects": ("rank --model narrow:build --weights {weights} --data npz:{pickled_npz}", "pickled.npz"),
    "folder without classes": ("rank --model narrow:build --weights {weights} --data folder:{empty}", "folder"),
    "unknown normalisation": (RANK + "--normalise imgnet", "imgnet"),
    "size of a fixed size": (RANK + "--size 64", "takes no size"),
    "hostile checkpoint": ("rank --model narrow:build --weights {hostile_pth} --data npz:{npz}", "hostile_pth.pth"),
    "truncated checkpoint": ("rank --model narrow:build --weights {short_pth} --data npz:{npz}", "short.pth"),
    "empty checkpoint": ("rank --model narrow:build --weights {empty} --data npz:{npz}", "empty"),
    "foreign checkpoint": ("rank --model narrow:build --weights {text} --data npz:{npz}", "text"),
    "wrong number of classes": ("rank --model narrow:build --weights {twelve} --data npz:{npz}", "12 classes"),
    "unknown architecture": ("rank --arch resnet_20 --weights {weights} --data npz:{npz}", "Did you mean resnet20?"),
    "unknown layer": (
        "prune --model narrow:build --weights {weights} --data npz:{npz} --images-per-class 2 --exclude layer1.0.conv3",
        "Did you mean 'layer1.0.conv"),
    "hostile conversion": ("convert {hostile_pth} out.safetensors", "hostile_pth.pth"),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_input_gets_one_line_and_nothing_is_executed(
    run: Run, made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    monkeypatch.syspath_prepend(made["folder"])
    command, message = COMMANDS[case]
    status, out, err = run(*command.format(**made).split())
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert not (tmp_path / "touched").exists()


def test_the_hostile_files_would_do_harm_if_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_bytes(pickle.dumps(Hostile()))
    with (tmp_path / "x").open("rb") as file:
        pickle.Unpickler(file).load()  # noqa: S301
    assert (tmp_path / "touched").is_dir()
