"""Every hostile file is refused in words, quickly and in little memory; the sound ones among them load."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hostile import check_corpus, corpus
from hostile.corpus import Case


@pytest.fixture(scope="module")
def archive():
    return corpus.read()


def checked(*words):
    run = subprocess.run(
        [sys.executable, str(Path(check_corpus.__file__)), *words], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_hostile_files_are_refused_and_sound_ones_load(archive):
    """In a process of its own, since what counts is its memory; once more whatever was slow on a busy machine."""
    result = checked()
    again = checked("--only", *result["wrong"])["wrong"] if result["wrong"] else {}
    assert not again, again
    assert result["cases"] == len(archive[1])


@pytest.mark.slow
def test_every_reader_of_slim_folders_agrees():
    result = checked("--all")
    again = checked("--all", "--only", *result["wrong"])["wrong"] if result["wrong"] else {}
    assert not again, again


def test_the_corpus_is_large_and_small(archive):
    _, cases = archive
    refused = [case for case in cases if case.verdict == "refused"]
    assert sum(case.reader == "slim" for case in refused) >= 250
    assert sum(case.reader == "slim" for case in cases if case.verdict == "harmless") >= 40
    assert {case.reader for case in cases} == check_corpus.READERS.keys() - {"header"}
    assert len({(case.reader, case.name) for case in cases}) == len(cases)
    assert corpus.ARCHIVE.stat().st_size < 2 << 20


def allocates(_: Path) -> object:
    return bytearray(300 << 20)


def dawdles(_: Path) -> object:
    end = time.process_time() + 1.2
    while time.process_time() < end:
        pass
    raise ValueError("slow")


def stumbles(_: Path) -> object:
    raise KeyError("x")


def says_nothing(_: Path) -> object:
    raise ValueError


def believes(_: Path) -> object:
    return None


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        (allocates, "MemoryError"), (dawdles, r"refused in 1\.[2-9]"), (stumbles, "KeyError: 'x'"),
        (says_nothing, "a ValueError without words"), (believes, "harmless in .* not refused"),
    ],
)  # fmt: skip
def test_a_reader_that_is_none_would_be_noticed(reader, words):
    wrong = check_corpus.check([Case("case", "slim", files={"x": "x"})], {}, {"slim": (reader,)})
    assert len(wrong) == 1
    with pytest.raises(AssertionError, match=words):
        assert not wrong["slim/case"], wrong["slim/case"]


def test_a_refusal_of_what_is_sound_would_be_noticed():
    def refuses(_: Path) -> object:
        raise ValueError("no")

    case = Case("case", "slim", verdict="harmless", files={"x": "x"})
    assert check_corpus.check([case], {}, {"slim": (refuses,)})
    assert not check_corpus.check([case], {}, {"slim": (believes, refuses)})  # readers may ask for more than the first
