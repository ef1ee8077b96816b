"""What must be true of any slim folder: it is refused in words, or it is a network like any other."""

from __future__ import annotations

import json
import resource
import struct
import time
from pathlib import Path

import torch

import pyprune as pp
from hostile import corpus, mutating
from hostile.mutating import Choose
from pyprune import slimfile, slimreading

BASES = ("chain", "residual", "decoder")
MOST_BYTES = 1 << 30
SECONDS = 5.0


class Folders:
    """Valid folders to start from, and a place to write changed ones to."""

    def __init__(self, place: Path) -> None:
        bases, _ = corpus.read()
        self.place = place
        self.trees = [json.loads(corpus.unpacked(bases[name]["architecture.json"])) for name in BASES]
        self.weights = [corpus.unpacked(bases[name]["model.safetensors"]) for name in BASES]

    def write(self, choose: Choose) -> Path:
        """Write a folder with changes in its architecture, its weights or both; return where it lies."""
        which, kind = choose(len(BASES)), choose(6)
        architecture, weights = self.trees[which], self.weights[which]
        if kind != 2:
            architecture = mutating.tree(choose, architecture)
            if kind >= 3:
                weights = fitting(architecture, weights)
        if kind in (1, 2):
            weights = mutating.weights(choose, weights)
        (self.place / "architecture.json").write_text(json.dumps(architecture))
        (self.place / "model.safetensors").write_bytes(weights)
        return self.place


def fitting(architecture: dict[str, object], weights: bytes) -> bytes:
    """Return weights that a changed architecture implies, so that what comes behind the header is reached too."""
    try:
        model = slimfile.build("fitting", slimfile.check("fitting", architecture))
    except (ValueError, AttributeError, TypeError):
        return weights
    length = struct.unpack("<Q", weights[:8])[0]
    head = json.loads(weights[8 : 8 + length])
    made, end = {"__metadata__": head["__metadata__"]}, 0
    for name, one in model.state_dict().items():
        size = one.numel() * one.element_size()
        dtype = slimfile.CODES[str(one.dtype).removeprefix("torch.")]
        made[name] = {"dtype": dtype, "shape": list(one.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(made).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end) if end < 1 << 20 else weights


def check(folder: Path) -> bool:
    """Say whether the folder loads; raise unless it is refused by a ValueError or runs, or fails as torch does."""
    start = time.process_time()
    try:
        model = pp.load_slim(folder)
    except ValueError as error:
        if not str(error).startswith("load_slim: "):
            raise AssertionError(f"not in our words: {error}") from error
        assert time.process_time() - start < SECONDS
        return False
    header = json.loads(_header(folder / "model.safetensors"))
    recorded = slimreading.recorded(header.get("__metadata__", {}).get("inputs", ""))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    with torch.no_grad():
        try:
            model(*(torch.ones(shape, dtype=dtype) for shape, dtype in recorded))
        except (RuntimeError, IndexError, TypeError, ValueError, ZeroDivisionError, NotImplementedError) as error:
            if "allocate" in str(error):
                raise AssertionError("the memory was full") from error
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < MOST_BYTES
    assert time.process_time() - start < SECONDS
    return True


def _header(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 : 8 + struct.unpack("<Q", data[:8])[0]]
