"""Checkpoints: what loads under which names, what does not fit, and files that want to do harm."""

from __future__ import annotations

import collections
import functools
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pyprune as pp
from pyprune import checkpoints, files, models


def small(**options):
    torch.manual_seed(len(options))
    return models.resnet20(width=0.25, **options)


def randomised(model):
    """Give every entry, counters of batches too, a value that no fresh model has."""
    for i, one in enumerate(model.state_dict().values()):
        one.copy_(torch.rand(one.shape) + i if one.is_floating_point() else torch.tensor(i + 7))
    return model


def same(a, b):
    first, second = list(a.state_dict().values()), list(b.state_dict().values())
    return len(first) == len(second) and all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def write(path: Path, content: object) -> Path:
    """Write a state dict as safetensors or anything by torch.save, as the name of ``path`` says."""
    if path.suffix == ".safetensors":
        files.write_tensors(path, content, {})
    else:
        torch.save(content, path)
    return path


WRAPPED = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "best_prec1": torch.tensor(91.7), "epoch": 3},
    "model": lambda state: {"epoch": 3, "model": state},
    "net": lambda state: {"net": state, "acc": 91.7},
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_torch_files_load_bare_and_wrapped(tmp_path, wrapping):
    source, target = randomised(small()), small()
    report = pp.load_checkpoint(target, write(tmp_path / "c.pth", WRAPPED[wrapping](source.state_dict())))
    assert same(source, target)
    assert not same(source, small())
    assert report.loaded == tuple(source.state_dict())
    assert report.missing == report.unexpected == report.ignored == ()
    assert report.renamed == {}


def test_training_state_beside_the_weights_does_not_matter(tmp_path):
    source, target = randomised(small()), small()
    optimizer = torch.optim.SGD(source.parameters(), 0.1, momentum=0.9)
    source(torch.rand(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 10])
    content = {"state_dict": source.state_dict(), "optimizer": optimizer.state_dict(),
               "scheduler": scheduler.state_dict(), "best": torch.tensor(1.0)}  # fmt: skip
    pp.load_checkpoint(target, write(tmp_path / "c.pt", content))
    assert same(source, target)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", ["module.", "module.module.", "_orig_mod.module."])
def test_prefixes_and_a_profilers_counters_are_dropped(tmp_path, suffix, prefix):
    source, target = randomised(small()), small()
    state = {prefix + name: one for name, one in source.state_dict().items()}
    state |= {f"{prefix}conv1.total_ops": torch.tensor([1.0]), "total_params": torch.tensor([2.0])}
    report = pp.load_checkpoint(target, write(tmp_path / f"c{suffix}", state))
    assert same(source, target)
    assert set(report.ignored) == {f"{prefix}conv1.total_ops", "total_params"}
    assert report.renamed[f"{prefix}conv1.weight"] == "conv1.weight"
    assert "0 ignored" not in str(report)


def test_a_model_with_a_module_of_that_name_keeps_it(tmp_path):
    source, target = nn.Module(), nn.Module()
    source.module, target.module = nn.Linear(2, 2), nn.Linear(2, 2)
    report = pp.load_checkpoint(target, write(tmp_path / "c.safetensors", source.state_dict()))
    assert same(source, target)
    assert report.renamed == {}


@pytest.mark.parametrize(("there", "here"), [("fc", "linear"), ("linear", "fc"), ("fc", "fc")])
def test_the_last_layer_goes_by_either_name(tmp_path, there, here):
    source, target = randomised(small(head=there)), small(head=here)
    report = pp.load_checkpoint(target, write(tmp_path / "c.safetensors", source.state_dict()))
    assert same(source, target)
    expected = {} if there == here else {f"{there}.{leaf}": f"{here}.{leaf}" for leaf in ("weight", "bias")}
    assert report.renamed == expected


def test_counts_of_batches_may_be_missing_and_stay_as_they_are(tmp_path):
    source, target = randomised(small()), small()
    target.bn1.num_batches_tracked.fill_(5)
    state = {name: one for name, one in source.state_dict().items() if "num_batches" not in name}
    report = pp.load_checkpoint(target, write(tmp_path / "c.safetensors", state))
    assert torch.equal(target.conv1.weight, source.conv1.weight)
    assert int(target.bn1.num_batches_tracked) == 5
    assert len(report.missing) == 19
    assert all(name.endswith("num_batches_tracked") for name in report.missing)
    assert "19 ('bn1.num_batches_tracked', " in str(report)


def test_numbers_are_converted_to_the_models_type(tmp_path):
    source, target = randomised(small()), small().double()
    half = {name: one.half() if one.is_floating_point() else one for name, one in source.state_dict().items()}
    pp.load_checkpoint(target, write(tmp_path / "c.pth", half))
    assert target.conv1.weight.dtype is torch.float64
    assert torch.equal(target.conv1.weight, half["conv1.weight"].double())


# What does not fit: one line, and nothing has changed.


def refuse(model, path, message, **options):
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        pp.load_checkpoint(model, path, **options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("strict", [True, False])
def test_a_wrong_number_of_classes_is_recognised(tmp_path, strict):
    path = write(tmp_path / "c.pth", randomised(small(num_classes=100)).state_dict())
    refuse(small(), path, r"checkpoint .*c.pth has 100 classes and the model 10\. .* num_classes=100\.$", strict=strict)
    path = write(tmp_path / "v.pth", models.vgg_digits(widths=(2, 2)).state_dict())
    refuse(models.vgg_digits(widths=(2, 2), num_classes=3), path, "has 10 classes and the model 3")


def test_another_depth_is_named_by_its_first_layers(tmp_path):
    path = write(tmp_path / "c.pth", models.resnet20(width=0.1).state_dict())
    message = refuse(models.resnet32(width=0.1), path, "does not fit CifarResNet")
    assert (
        "lacks 60 ('layer1.3.conv1.weight', 'layer1.3.bn1.weight', 'layer1.3.bn1.bias', ...), has none more" in message
    )
    path = write(tmp_path / "d.pth", models.resnet32(width=0.1).state_dict())
    assert "lacks none, has 72 ('layer1.3.conv1.weight', " in refuse(models.resnet20(width=0.1), path, "does not fit")


def test_another_width_is_named_by_its_first_shape(tmp_path):
    path = write(tmp_path / "c.pth", models.resnet20(width=0.5).state_dict())
    message = refuse(small(), path, "does not fit")
    assert "such as 'conv1.weight', float32 [4, 3, 3, 3] in the model and float32 [8, 3, 3, 3] in the file" in message


def test_whole_numbers_are_not_taken_for_weights(tmp_path):
    state = {**small().state_dict(), "conv1.weight": torch.zeros(4, 3, 3, 3, dtype=torch.int64)}
    refuse(small(), write(tmp_path / "c.safetensors", state), "1 of other shapes, such as 'conv1.weight', float32")


def test_without_strict_parts_load_and_the_rest_is_reported(tmp_path):
    source, target = randomised(small()), small()
    state = {name: one for name, one in source.state_dict().items() if not name.startswith("linear")}
    path = write(tmp_path / "c.pth", {**state, "module.extra": torch.zeros(1)})
    refuse(target, path, r"lacks 2 \('linear.weight', 'linear.bias'\), has 1 \('module.extra'\) more")
    report = pp.load_checkpoint(target, path, strict=False)
    assert report.missing == ("linear.weight", "linear.bias")
    assert report.unexpected == ("module.extra",)
    assert torch.equal(target.conv1.weight, source.conv1.weight)
    refuse(target, write(tmp_path / "d.pth", {"a": torch.zeros(1)}), "does not fit", strict=False)


def test_two_entries_for_one_name_are_refused(tmp_path):
    state = {**small().state_dict(), "module.conv1.weight": torch.zeros(4, 3, 3, 3)}
    refuse(
        small(), write(tmp_path / "c.pth", state), "two entries for 'conv1.weight', one of them 'module.conv1.weight'"
    )


def test_only_modules_take_weights(tmp_path):
    with pytest.raises(TypeError, match=r"load_checkpoint: needs a torch.nn.Module; got dict\."):
        pp.load_checkpoint({}, tmp_path / "c")


# Files that hold something else.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "must hold a state dict, bare or under 'state_dict', 'model', 'net'; it holds a list"),
        ({"epoch": 3, "lr": 0.1}, "it holds a dict of 'epoch', 'lr'"),
        ({}, "it holds a dict of"),
        (torch.zeros(2), "it holds a Tensor"),
        ({"a": torch.zeros(1), "b": 3, "c": [1]}, "must map names to dense tensors; 'b', 'c' are something else"),
        ({"a": torch.zeros(1), 5: torch.zeros(1)}, "'5' is something else"),
        ({"a": torch.zeros(1).expand(1 << 40)}, r"claims 4398046511104 bytes of tensors in a file of \d+"),
        ({"state_dict": {"a": torch.zeros(2).to("meta")}}, "asks for 'torch._utils._rebuild_meta_tensor_no_storage'"),
    ],
)
def test_other_contents_are_named(tmp_path, content, message):
    refuse(small(), write(tmp_path / "c.pth", content), message)


def archive(path: Path, parts: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, part in parts.items():
            file.writestr(name, part)
    return path


def test_other_kinds_of_files_are_named(tmp_path):
    refuse(small(), tmp_path / "absent.pth", "load_checkpoint: needs a file; there is none at")
    for data, message in [
        (b"", "needs a file of 1 to"),
        (b"<html><body>404</body></html>", "begins with b'<html><b'"),
        (b"version https://git-lfs", "begins with b'version '"),
        (pickle.dumps({"a": 1}, 2), "a pickle or tar file of the kind that torch wrote before 1.6"),
        (bytes(257) + b"ustar" + bytes(250), "a pickle or tar file"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{", "not a valid safetensors file"),
    ]:
        (tmp_path / "c").write_bytes(data)
        refuse(small(), tmp_path / "c", message)
    refuse(small(), archive(tmp_path / "d", {"a.npy": b"x"}), "is a zip file, but not one by torch.save")
    two = {"a/data.pkl": b"\x80\x02.", "b/data.pkl": b"\x80\x02."}
    refuse(small(), archive(tmp_path / "e", two), "is a zip file, but not one by torch.save")
    parts = {"m/data.pkl": b"\x80\x02.", "m/code/__torch__.py": b"", "m/constants.pkl": b""}
    refuse(small(), archive(tmp_path / "f", parts), "is a TorchScript archive, which holds code")


def test_a_file_of_the_old_kind_is_refused_however_harmless(tmp_path):
    torch.save(small().state_dict(), tmp_path / "c.pth", _use_new_zipfile_serialization=False)
    refuse(small(), tmp_path / "c.pth", "cannot be read safely. If you trust it, open it once where it can do no harm")


@pytest.mark.parametrize("version", ["2.6.0", "2.9.1+cu128"])
def test_torch_before_2_10_reads_no_torch_file(tmp_path, monkeypatch, version):
    state = randomised(small()).state_dict()
    path, plain = write(tmp_path / "c.pth", state), write(tmp_path / "c.safetensors", state)
    monkeypatch.setattr(torch, "__version__", version)
    refuse(small(), path, rf"needs torch 2.10 or later .*\(CVE-2026-24747\); this is torch {version[:5]}.*convert")
    assert len(pp.load_checkpoint(small(), plain).loaded) == len(state)
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert len(pp.load_checkpoint(small(), path).loaded) == len(state)


# Files that want to do harm. Each would leave a mark if anything in it were executed.


class Command:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(mark: Path) -> dict[str, object]:
    return {
        "os.system": Command(os.system, f"touch {mark}"),
        "open": Command(open, str(mark), "w"),
        "exec": Command(exec, f"import pathlib; pathlib.Path({str(mark)!r}).touch()"),
        "partial": functools.partial(open, str(mark), "w"),
        "bytearray": Command(bytearray, 1 << 40),
        "getattr": Command(getattr, "text", "upper"),
        "module": nn.Linear(2, 2),
        "tensor": Command(torch.FloatTensor, 1 << 40),
    }


@pytest.mark.parametrize("name", hostile(Path()))
@pytest.mark.parametrize("place", ["whole", "beside", "inside", "key"])
def test_hostile_pickles_are_refused_and_nothing_is_executed(tmp_path, name, place):
    mark = tmp_path / "mark"
    bomb = hostile(mark)[name]
    state: dict[object, object] = dict(small().state_dict())
    content = {"whole": bomb, "beside": {"state_dict": state, "extra": bomb}, "inside": {**state, "conv1.weight": bomb},
               "key": {**state, (bomb,): 1}}[place]  # fmt: skip
    message = refuse(small(), write(tmp_path / "c.pth", content), "c.pth asks for '.*', which no plain weights need")
    assert "nothing was executed" in message
    assert not mark.exists()
    if name in ("os.system", "exec"):
        torch.load(tmp_path / "c.pth", weights_only=False)  # so the bomb is a live one
        assert mark.exists()


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_hostile_legacy_pickles_of_every_protocol_are_refused(tmp_path, protocol):
    mark = tmp_path / "mark"
    data = pickle.dumps(hostile(mark)["os.system"], protocol)
    (tmp_path / "bare.pth").write_bytes(data)
    refuse(small(), tmp_path / "bare.pth", "pickle or tar file|begins with")
    path = archive(tmp_path / "zip.pth", {"archive/data.pkl": data, "archive/version": b"3\n"})
    refuse(small(), path, "asks for 'posix.system'|not pickled by protocol 2|cannot be read")
    assert not mark.exists()


def test_opcodes_that_import_in_other_ways_are_refused(tmp_path):
    for body in (
        b"\x80\x02(S'touch'\niposix\nsystem\n.",
        b"\x80\x02\x8c\x05posix\x8c\x06system\x93.",
        b"\x80\x02\x82\x01.",
    ):
        path = archive(tmp_path / "c.pth", {"a/data.pkl": body, "a/version": b"3\n"})
        refuse(small(), path, "was not pickled by protocol 2")


def test_archives_that_unpack_to_more_than_they_are_are_refused(tmp_path):
    (tmp_path / "c.pth").write_bytes(b"")
    parts = {"a/data.pkl": b"\x80\x02}.", "a/data/0": bytes(1 << 24)}
    path = archive(tmp_path / "c.pth", parts, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 16
    refuse(small(), path, "holds compressed parts, which torch.save never writes")
    data = bytearray(write(tmp_path / "d.pth", small().state_dict()).read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = (1 << 30).to_bytes(4, "little") * 2  # both sizes of the first part
    (tmp_path / "d.pth").write_bytes(data)
    refuse(small(), tmp_path / "d.pth", "claims parts of|cannot be read")


def test_a_pickle_that_names_missing_storage_is_refused(tmp_path):
    path = write(tmp_path / "c.pth", {"a": torch.zeros(4)})
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    storage = next(name for name in parts if name.endswith("/data/0"))
    refuse(small(), archive(path, {n: p for n, p in parts.items() if n != storage}), "cannot be read as a torch file")
    refuse(small(), archive(path, {**parts, storage: b"1234"}), "cannot be read as a torch file|does not fit")


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_truncated_and_damaged_files_end_in_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    source = randomised(nn.Sequential(nn.Linear(3, 2)))
    whole = write(folder / "c.pth", collections.OrderedDict(source.state_dict())).read_bytes()
    cut = data.draw(st.integers(1, len(whole)))
    damaged = bytearray(whole[:cut])
    for _ in range(data.draw(st.integers(int(cut == len(whole)), 3))):
        damaged[data.draw(st.integers(0, cut - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "c.pth").write_bytes(damaged)
    target = nn.Sequential(nn.Linear(3, 2))
    before = {name: one.clone() for name, one in target.state_dict().items()}
    try:
        pp.load_checkpoint(target, folder / "c.pth")
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert all(torch.equal(one, before[name]) for name, one in target.state_dict().items())


# Conversion.


def test_a_torch_file_becomes_safetensors(tmp_path):
    source, target = randomised(small()), small()
    state = {f"module.{name}": one for name, one in source.state_dict().items()}
    state["module.twin"] = state["module.conv1.weight"]  # safetensors itself refuses shared memory
    names = checkpoints.convert_checkpoint(
        write(tmp_path / "c.pth", {"state_dict": state, "epoch": 1}), tmp_path / "c.safetensors"
    )
    assert names == (*source.state_dict(), "twin")
    tensors, metadata = files.read_tensors("test", tmp_path / "c.safetensors")
    assert metadata == {"format": "pt"}
    assert torch.equal(tensors.pop("twin"), source.conv1.weight)
    files.write_tensors(tmp_path / "d.safetensors", tensors, {})
    pp.load_checkpoint(target, tmp_path / "d.safetensors")
    assert same(source, target)


def test_conversion_refuses_what_loading_refuses(tmp_path):
    mark = tmp_path / "mark"
    path = write(tmp_path / "c.pth", {"state_dict": small().state_dict(), "x": hostile(mark)["os.system"]})
    with pytest.raises(ValueError, match=r"convert_checkpoint: .* asks for 'posix\.system'"):
        checkpoints.convert_checkpoint(path, tmp_path / "c.safetensors")
    assert not mark.exists()
    assert not (tmp_path / "c.safetensors").exists()


DATA = os.environ.get("PYPRUNE_DATA", "")


@pytest.mark.skipif(not DATA, reason="PYPRUNE_DATA does not name the folder with the pretrained networks")
@pytest.mark.parametrize(
    ("build", "file"),
    [
        (models.resnet20, "cifar10_resnet20-12fca82f.safetensors"),
        (models.resnet56, "cifar10_resnet56-4bfd9763.safetensors"),
        (models.resnet56, "cifar10_resnet56_jpegadapted_200steps.safetensors"),
    ],
)
def test_published_networks_load(build, file):
    report = pp.load_checkpoint(build(head="fc"), Path(DATA) / file)
    assert report.unexpected == ()
    assert len(report.loaded) + len(report.missing) == len(build().state_dict())
    assert all(name.endswith("num_batches_tracked") for name in report.missing)
