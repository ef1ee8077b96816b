import json

import pytest

from pyprune.loggers import JsonLines, as_log


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_has_a_line_an_epoch_and_is_continued(tmp_path):
    path = tmp_path / "folder" / "log.jsonl"
    log = as_log("x", path)
    log({"epoch": 1, "a": 0.5})
    assert rows(path) == [{"epoch": 1, "a": 0.5}]  # whole after every row
    log({"epoch": 2, "a": float("nan"), "b": "words"})
    as_log("x", str(path))({"epoch": 3, "a": float("inf")})
    assert rows(path) == [{"epoch": 1, "a": 0.5}, {"epoch": 2, "a": None, "b": "words"}, {"epoch": 3, "a": None}]


def test_a_row_takes_the_place_of_its_epoch_and_of_a_future_that_was_lost(tmp_path):
    path = tmp_path / "log"
    log = as_log("x", path)
    for epoch in range(1, 6):
        log({"epoch": epoch, "run": 1})
    again = as_log("x", path)
    again({"epoch": 4, "run": 2})
    assert [(row["epoch"], row["run"]) for row in rows(path)] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    again({"epoch": 5, "run": 2})
    assert [(row["epoch"], row["run"]) for row in rows(path)][3:] == [(4, 2), (5, 2)]
    as_log("x", path)({"epoch": 0, "run": 3})
    assert rows(path) == [{"epoch": 0, "run": 3}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"epoch": 1}\n{"epo', "log is not readable JSON"),
        (b'{"lines": 1}\n', "must hold a row an epoch; it does not. Choose another path"),
        (b"", "needs a file of 1 to .* bytes"),
    ],
)
def test_other_files_are_refused_and_left_alone(tmp_path, content, message):
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?i)x: .*({message})"):
        JsonLines("x", path)
    assert path.read_bytes() == content


def test_several_loggers_get_the_same_row(tmp_path):
    first, second = [], []
    log = as_log("x", [first.append, tmp_path / "log", second.append])
    log({"epoch": 1})
    assert first == second == rows(tmp_path / "log") == [{"epoch": 1}]
    with pytest.raises(TypeError, match=r"x: log must be a path, a callable or have .*; got int"):
        as_log("x", [first.append, 3])
