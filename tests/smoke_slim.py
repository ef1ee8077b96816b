"""Open slim folders where pyprune is not installed, as their owners do; run by `make smoke` after smoke.py."""

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

assert importlib.util.find_spec("pyprune") is None
for name in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("slim_model", Path(name) / "slim" / "slim_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check = load_file(Path(name) / "check.safetensors")
    assert torch.equal(module.load()(check["images"]), check["outputs"])
print("smoke: slim folders open without pyprune")
