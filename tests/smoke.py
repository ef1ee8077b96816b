"""Tried on the installed wheel in a clean environment, by `make smoke`: build, import, rank, prune, save, load."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import pyprune as pp

found = pp.backends()
print(found)
maps = torch.randn(64, 8, 8)
maps[:32, 4:] = 0
assert pp.matrix_rank(maps).tolist() == [4] * 32 + [8] * 32

model = pp.models.vgg_digits()
data = [(torch.rand(20, 1, 16, 16), torch.arange(20) % 10) for _ in range(3)]
with tempfile.TemporaryDirectory() as folder:
    result = pp.prune(model, data, images_per_class=5, epochs=1, folder=folder, progress=False)
    slim = pp.load_slim(Path(folder) / "slim")
    image = torch.rand(2, 1, 16, 16)
    assert torch.equal(slim.eval()(image), result.slim.model.eval()(image))
    assert (Path(folder) / "report.html").stat().st_size > 10_000

print(
    subprocess.run(
        [Path(sys.executable).with_name("pyprune"), "doctor"], check=True, capture_output=True
    ).stdout.decode()
)
print("smoke: passed")
