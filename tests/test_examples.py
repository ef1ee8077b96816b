"""The README's example and the scripts in examples/ run as they stand."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_example_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "readme.py"
    script.write_text(blocks[0])
    assert 8 <= len([line for line in blocks[0].splitlines() if line.strip()]) <= 14
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(script))
    assert names["slim"].certificate.verified
    assert (tmp_path / "slim" / "slim_model.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(script: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-W", "error", script], cwd=tmp_path, check=True, capture_output=True)
