"""The public names, and what importing the package costs."""

import subprocess
import sys

import pytest

import pyprune as pp

HEAVY = ("torch", "sklearn", "matplotlib", "scipy", "jinja2")


@pytest.mark.parametrize("name", pp.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(pp, name)
    assert callable(value) or name == "models"
    assert value.__doc__


def test_a_submodule_never_takes_the_place_of_a_function() -> None:
    code = """
import pyprune.pipeline, pyprune.cli, pyprune as pp
for name in pp.__all__:
    assert name == "models" or callable(getattr(pp, name)), name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        pp.prunes  # noqa: B018


@pytest.mark.parametrize("statement", ["import pyprune", "import pyprune.cli", "import pyprune as pp; pp.backends"])
def test_importing_is_light(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"
