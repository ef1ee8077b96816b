"""The whole road on small data: what `prune` returns, writes and leaves alone."""

import copy
from pathlib import Path

import pytest
import torch

import pyprune as pp
from pyprune.data import digits, loader


@pytest.fixture(scope="module")
def trained() -> tuple[torch.nn.Module, object]:
    """A small network that has learnt something, and its data."""
    splits = digits(seed=0)
    torch.manual_seed(0)
    model = pp.models.vgg_digits(widths=(16, 16, 32, 32, 32, 32))
    pp.finetune(model, loader(splits.train, shuffle=True, seed=0), epochs=2, lr=0.05, progress=False)
    return model, splits


@pytest.mark.parametrize("finetune_on", ["slim", "masked"])
def test_prune_from_end_to_end(trained: tuple[torch.nn.Module, object], tmp_path: Path, finetune_on: str) -> None:
    model, splits = trained
    before = copy.deepcopy(model.state_dict())
    result = pp.prune(
        model, loader(splits.train, shuffle=True, seed=0), loader(splits.val), test=loader(splits.test),
        images_per_class=10, exclude=("features.conv0", "features.conv1"), epochs=2, lr=0.05,
        finetune_on=finetune_on, folder=tmp_path, progress=False,
    )  # fmt: skip
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    stages = ["original", "masked", "finetuned", "slim"] if finetune_on == "masked" else ["original", "masked", "slim"]
    assert list(result.evaluations) == stages
    assert result.evaluations["original"].top1 > 0.8
    assert result.evaluations["slim"].top1 > result.evaluations["masked"].top1
    assert result.slim.certificate.verified
    assert result.slim.after.parameters < result.slim.before.parameters
    assert result.slim.after.parameters == sum(p.numel() for p in result.slim.model.parameters())

    widths = {
        name: module.out_channels for name, module in result.slim.model.named_modules() if hasattr(module, "groups")
    }
    assert widths == {name: len(keep) for name, keep in result.plan.keep.items()}
    if finetune_on == "masked":  # the slim network is the fine-tuned one, so not one prediction may differ
        assert (result.evaluations["slim"].confusion == result.evaluations["finetuned"].confusion).all()

    images = splits.test[:8][0]
    again = pp.load_slim(tmp_path / "slim")
    assert torch.equal(again.eval()(images), result.slim.model.eval()(images))
    assert pp.Plan.load(tmp_path / "plan.json") == result.plan
    page = (tmp_path / "report.html").read_text()
    assert "The slim network computes what the masked one computes" in page
    searched = sum(why.k is not None for why in result.plan.why.values())  # the others have no regions to draw
    assert page.count("data:image/svg+xml;base64,") == 2 + len(result.plan.keep) + searched
    assert 'http-equiv="Content-Security-Policy"' in page
    assert "<script" not in page


def test_the_same_seed_gives_the_same_network(trained: tuple[torch.nn.Module, object]) -> None:
    model, splits = trained

    def once() -> dict[str, torch.Tensor]:
        train = loader(splits.train, shuffle=True, seed=0)
        exclude = ("features.conv4", "features.conv6", "features.conv7")
        return pp.prune(
            model, train, images_per_class=5, epochs=1, exclude=exclude, progress=False
        ).slim.model.state_dict()

    first, second = once(), once()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("broken", ["rank_filters", "select", "evaluate", "finetune", "save_slim"])
def test_a_stopped_run_goes_on_and_ends_the_same(
    trained: tuple[torch.nn.Module, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    model, splits = trained
    order = ["rank_filters", "select", "evaluate", "finetune", "save_slim"]

    def run(folder: Path) -> pp.PruneResult:
        return pp.prune(
            model, loader(splits.train, shuffle=True, seed=0), loader(splits.val), images_per_class=5,
            exclude=("features.conv4", "features.conv6", "features.conv7"), epochs=1, folder=folder, progress=False,
        )  # fmt: skip

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def called(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage ran again")

    with monkeypatch.context() as patch:
        patch.setattr(f"pyprune.pipeline.{broken}", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        for finished in order[: order.index(broken)]:
            if finished in ("rank_filters", "select"):
                patch.setattr(f"pyprune.pipeline.{finished}", called)
        resumed = run(tmp_path / "stopped")
    whole = run(tmp_path / "whole")
    state = whole.slim.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.slim.model.state_dict().items())
    assert resumed.plan == whole.plan
    for name in whole.evaluations:
        assert (resumed.evaluations[name].confusion == whole.evaluations[name].confusion).all()


def test_a_folder_with_another_run_is_refused_unless_fresh(
    trained: tuple[torch.nn.Module, object], tmp_path: Path
) -> None:
    model, splits = trained
    options = {"exclude": [f"features.conv{i}" for i in (1, 3, 4, 6, 7)], "epochs": 1, "folder": tmp_path}

    def run(**more: object) -> pp.PruneResult:
        train = loader(splits.train, shuffle=True, seed=0)
        return pp.prune(model, train, progress=False, **{**options, "images_per_class": 5, **more})

    run()
    (tmp_path / "notes.json").write_text("mine")
    with pytest.raises(ValueError, match=r"holds a run with other images_per_class. Choose another folder"):
        run(images_per_class=6)
    assert run(images_per_class=6, fresh=True).ranks.info["images_per_class"] == 6
    assert (tmp_path / "notes.json").read_text() == "mine"
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters())[0] += 1
    model = other
    with pytest.raises(ValueError, match="other weights"):
        run(images_per_class=6)


def test_bad_input_is_named_before_any_work(trained: tuple[torch.nn.Module, object], tmp_path: Path) -> None:
    model, _ = trained
    with pytest.raises(ValueError, match='finetune_on must be "slim" or "masked"'):
        pp.prune(model, [], finetune_on="thin")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="prune: the output folder must be writable"):
        pp.prune(model, [], folder=tmp_path / "file")


def test_report_wants_a_result(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"needs what pyprune.prune, ckrm, trial or optimize_widths returned; got str"):
        pp.report("result", tmp_path / "page.html")


def test_report_escapes_names(trained: tuple[torch.nn.Module, object], tmp_path: Path) -> None:
    from dataclasses import replace

    model, splits = trained
    train = loader(splits.train, shuffle=True, seed=0)
    result = pp.prune(model, train, images_per_class=5, epochs=1, progress=False)
    taps = dict.fromkeys(result.ranks.taps, "<script>alert(1)</script>")
    pp.report(replace(result, ranks=replace(result.ranks, taps=taps)), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
