"""Slim folders changed at random: refused in words, or networks like any other."""

import importlib.util
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile import property as properties


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return properties.Folders(tmp_path_factory.mktemp("fuzz"))


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_folder_is_refused_or_runs(data, folders):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about networks that are odd and harmless
        properties.check(folders.write(lambda below: data.draw(st.integers(0, below - 1))))


def test_changes_get_past_the_parser(folders):
    """Otherwise the tests above would say nothing about what lies behind it."""
    rng = random.Random(0)  # noqa: S311
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = sum(properties.check(folders.write(rng.randrange)) for _ in range(200))
    assert 5 <= loaded <= 195


@pytest.mark.slow
def test_a_fuzzer_finds_nothing_in_seconds(tmp_path):
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (pip install pyprune[fuzz])")
    script = Path(properties.__file__).with_name("fuzz_slim.py")
    run = subprocess.run(
        [sys.executable, str(script), "-max_total_time=15", f"-artifact_prefix={tmp_path}/"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert "Done" in run.stderr
