"""Progress bars: silent without a terminal, one inside another with it."""

import io
import sys

import pytest

from pyprune import progress


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    return found


def test_nothing_is_shown_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("outer", 3) as advance:
        advance(1, "a note")
    assert list(progress.track([1, 2], "items")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_nothing_is_shown_that_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    with progress.bar("outer", 3, show=False) as advance:
        advance()
    assert terminal.getvalue() == ""


def test_a_bar_inside_another_is_a_line_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    with progress.bar("outer", 2) as advance:
        for note in ("first", "second"):
            with progress.bar(f"inner {note}", 4) as step:
                step(4, "deep")
            advance(1, note)
        assert len(progress._shown) == 1
        (line,) = progress._shown[0].tasks  # the inner lines are gone
        assert (line.description, line.completed, line.fields["note"]) == ("outer", 2, "second")
    assert progress._shown == []
    shown = terminal.getvalue()
    assert "outer" in shown
    assert "2/2" in shown


def test_an_error_inside_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    with progress.bar("outer", 2) as advance:
        with pytest.raises(ValueError, match="diverged"), progress.bar("inner", 4):
            raise ValueError("diverged")
        assert [line.description for line in progress._shown[0].tasks] == ["outer"]
        advance()
    with pytest.raises(KeyError), progress.bar("outer", 2):
        raise KeyError("other")
    assert progress._shown == []
    assert terminal.getvalue()
