"""Tried on the installed wheel in a clean environment, by `make smoke`: build, import, rank, prune, save, load.

What it leaves in ./slim is opened by smoke_slim.py in an environment that has torch and safetensors only.
"""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import pyprune as pp

print(pp.backends())
maps = torch.randn(64, 8, 8)
maps[:32, 4:] = 0
assert pp.matrix_rank(maps).tolist() == [4] * 32 + [8] * 32

torch.manual_seed(0)
for name, size in (("vgg_digits", (1, 16, 16)), ("resnet20", (3, 32, 32))):
    model = getattr(pp.models, name)()
    data = [(torch.rand(20, *size), torch.arange(20) % 10) for _ in range(3)]
    result = pp.prune(model, data, images_per_class=5, epochs=1, folder=name, fresh=True, progress=False)
    images = torch.rand(2, *size)
    outputs = result.slim.model.eval()(images)
    assert torch.equal(pp.load_slim(Path(name) / "slim")(images), outputs)
    assert (Path(name) / "report.html").stat().st_size > 10_000
    save_file({"images": images, "outputs": outputs.detach()}, Path(name) / "check.safetensors")

program = Path(sys.executable).with_name("pyprune")
print(subprocess.run([program, "doctor"], check=True, capture_output=True, text=True).stdout)
print("smoke: passed")
