"""The Triton kernel SSIM: interpreted, compiled for GPUs that are not here, and run on one that is."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
CHECKS = Path(__file__).with_name("ssim_triton_checks.py")


def _checks(marks, interpret, timeout):
    """Run the checks in a process of their own and return how many passed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"addopts=-m '{marks}'", str(CHECKS)],
        env={**os.environ, "TRITON_INTERPRET": interpret}, cwd=CHECKS.parents[2], capture_output=True, text=True,
        check=False, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the checks themselves")
def test_under_the_interpreter():
    assert _checks("not slow", "1", 300) > 25


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the checks themselves")
def test_under_the_interpreter_at_every_size():
    assert _checks("slow", "1", 1800) == 12


@needs_triton
@pytest.mark.gpu
def test_on_a_gpu():
    assert _checks("slow or not slow", "0", 1200) > 37


COMPILE = """
    import json, sys, triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from pyprune.ops._triton import ssim

    names = ssim._ssim_kernel.arg_names
    for architecture, dtype, matrix in json.loads(sys.argv[1]):
        kinds = dict.fromkeys(names, "i32")
        kinds |= {"rows": f"*{dtype}", "e_at": "*fp64", "bad_at": "*i64", "psi": "*fp32", "counters": "*i64"}
        kinds |= {"thresholds": "*fp64", "not_finite": "*i64", "sum_scale": "fp64", "unit": "fp64"}
        kinds |= dict.fromkeys([name for name in names if name.startswith("stride")], "i64")
        fixed = {"ALPHA": 0.1, "BETA": 1.0, "GAMMA": 1.0, "B": ssim.SIDE, "SIMPLE": dtype == "fp32"}
        fixed |= {"MATRIX": matrix, "STATISTICS": not matrix, "COUNTS": True}
        kinds |= dict.fromkeys(fixed, "constexpr")
        made = triton.compile(
            ASTSource(fn=ssim._ssim_kernel, signature=kinds, constexprs=fixed),
            target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4, "enable_fp_fusion": True},
        )
        assert len(made.asm["cubin"]) > 0
        print(architecture, dtype, matrix, ".sys." in made.asm["ptx"], made.metadata.shared < 48 << 10)
"""


def _compile(targets, folder):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE), json.dumps(targets)],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)},
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@needs_triton
def test_compiles_for_a_gpu_that_is_not_here(tmp_path):
    assert _compile([(90, "fp32", True), (90, "fp32", False)], tmp_path) == [
        "90 fp32 True True True",
        "90 fp32 False True True",
    ]


@needs_triton
@pytest.mark.slow
def test_compiles_for_every_kind(tmp_path):
    targets = [(80, "fp32", True), (80, "fp64", True), (80, "fp64", False), (90, "fp64", True)]
    assert _compile(targets, tmp_path) == [f"{target[0]} {target[1]} {target[2]} True True" for target in targets]
