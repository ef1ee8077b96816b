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
def test_an_attention_loss_moves_where_standard_and_narrow_networks_look(tmp_path: Path) -> None:
    script = ROOT / "examples" / "ggcam.py"
    command = [sys.executable, "-W", "error", script, "--out", tmp_path]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for network in ("standard", "narrow"):
        rows = dict(re.findall(rf"^{network} +[\d,]+  (\w.*?)  +(.*)$", table, re.MULTILINE))
        assert list(rows) == ["untrained", "cross-entropy", "with attention"]
        found = {loss: [float(number.rstrip("%")) for number in row.split()] for loss, row in rows.items()}
        before, plain, attentive = found.values()
        assert before[0] < plain[0] < attentive[0] - 0.05  # agreement of activation and attention
        assert plain[1] < attentive[1] - 3  # percent of the activation on the digit
        assert plain[2] < attentive[2]  # right where the mark misleads
    assert (tmp_path / "ggcam.png").stat().st_size > 10_000


OTHERS = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "ggcam")


@pytest.mark.slow
@pytest.mark.parametrize("script", OTHERS, ids=lambda path: path.stem)
def test_examples_run(script: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-W", "error", script], cwd=tmp_path, check=True, capture_output=True)
