"""Read every case of the corpus in this process and print what happened as JSON; run by the tests, in one process.

The address space is limited to what the process has and 256 MB before every read, so an allocation beyond that is a
MemoryError, and what is not a ValueError is reported.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hostile import corpus
from hostile.corpus import Case
from hostile.readers import READERS

SECONDS = 1.0
BYTES = 256 << 20


def address_space() -> int:
    """Return how many bytes of address space this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def read(reader: Callable[[Path], object], place: Path) -> tuple[str, float]:
    """Return ``"refused"``, ``"harmless"`` or what went wrong, and the seconds of this process that it took."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    start = time.process_time()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + BYTES, hard))
        reader(place)
        found = "harmless"
    except ValueError as error:
        found = "refused" if str(error).strip() else "a ValueError without words"
    except BaseException as error:
        found = f"{type(error).__name__}: {error}"[:300]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return found, time.process_time() - start


def check(
    cases: list[Case], bases: dict[str, dict[str, object]], readers: dict[str, tuple[Callable[[Path], object], ...]]
) -> dict[str, str]:
    """Return what is wrong, by the names of the cases that are."""
    wrong = {}
    with tempfile.TemporaryDirectory() as name:
        for i, case in enumerate(cases):
            place = Path(name) / str(i)
            corpus.lay_out(case, bases, place)
            for j, reader in enumerate(readers[case.reader]):
                found, seconds = read(reader, place)
                fits = found == case.verdict or (j > 0 and case.verdict == "harmless" and found == "refused")
                if not fits or seconds > SECONDS:
                    said = f"reader {j}: {found} in {seconds:.2f} s, not {case.verdict}"
                    wrong[f"{case.reader}/{case.name}"] = said
            shutil.rmtree(place)
    return wrong


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--all", action="store_true", help="every reader on every case, not on every seventh")
    asked.add_argument("--only", nargs="*", help="only the cases of these names")
    options = asked.parse_args()
    bases, cases = corpus.read()
    if options.only is not None:
        cases = [case for case in cases if f"{case.reader}/{case.name}" in options.only]
    with tempfile.TemporaryDirectory() as name:  # what is imported once is no case's time or memory
        for base in ("chain", "residual", "decoder"):
            corpus.lay_out(Case("warm", "slim", base), bases, Path(name) / base)
            for reader in READERS["slim"]:
                read(reader, Path(name) / base)
    wrong: dict[str, str] = {}
    first = {kind: readers[:1] for kind, readers in READERS.items()}
    for i in range(7):
        wrong |= check(cases[i::7], bases, READERS if options.all or not i or options.only is not None else first)
    print(json.dumps({"cases": len(cases), "wrong": wrong}))


if __name__ == "__main__":
    main()
