"""The Triton kernel: interpreted, compiled for GPUs that are not here, and run on one that is."""

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
CHECKS = Path(__file__).with_name("rank_triton_checks.py")


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
    assert _checks("not slow", "1", 300) > 30


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the checks themselves")
def test_under_the_interpreter_up_to_the_largest():
    assert _checks("slow", "1", 1800) == 14


@needs_triton
@pytest.mark.gpu
def test_on_a_gpu():
    assert _checks("slow or not slow", "0", 1200) > 40


COMPILE = """
    import json, sys, triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from pyprune.ops._triton import rank

    for architecture, dtype, side in json.loads(sys.argv[1]):
        B, M, warps = rank.blocking(side)
        kinds = dict.fromkeys(rank._rank_kernel.arg_names, "i32")
        kinds |= {"maps": f"*{dtype}", "ranks": "*i32", "counter": "*i64", "rtol2": "fp64"}
        kinds |= dict.fromkeys([name for name in kinds if name.startswith("stride")], "i64")
        fixed = {"B": B, "M": M, "COUNTS": True}
        kinds |= dict.fromkeys(fixed, "constexpr")
        made = triton.compile(
            ASTSource(fn=rank._rank_kernel, signature=kinds, constexprs=fixed),
            target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps, "enable_fp_fusion": True},
        )
        assert len(made.asm["cubin"]) > 0
        print(architecture, dtype, side, ".sys." in made.asm["ptx"], made.metadata.shared < 48 << 10)
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
    assert _compile([(90, "fp32", 8)], tmp_path) == ["90 fp32 8 True True"]


@needs_triton
@pytest.mark.slow
def test_compiles_for_every_size_and_dtype(tmp_path):
    targets = [(80, "fp32", 64), *[(90, "fp32", side) for side in (4, 16, 32, 64)]]
    targets += [(80, dtype, 32) for dtype in ("fp16", "bf16", "fp64")]
    assert _compile(targets, tmp_path) == [f"{target[0]} {target[1]} {target[2]} True True" for target in targets]
