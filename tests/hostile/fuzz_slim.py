"""Fuzz the reader of slim folders: ``python tests/hostile/fuzz_slim.py -max_total_time=60`` (libFuzzer's options).

The fuzzer's bytes choose changes to the JSON tree and to the weights of small valid folders, so most inputs get past
the parser; coverage of pyprune's readers leads it on. What it finds is frozen in ``make_corpus.py``.
"""

from __future__ import annotations

import sys
import tempfile
import types
import warnings
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hostile import property as properties
from pyprune import files, graph, slimcalls, slimfile, slimreading, slimrun


def instrument() -> None:
    """Count which branches of the readers are taken; the import hook of an editable install hides them from atheris."""
    for module in (files, graph, slimcalls, slimfile, slimreading, slimrun):
        for function in vars(module).values():
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                atheris.instrument_func(function)


def main() -> None:
    warnings.simplefilter("ignore")
    instrument()
    with tempfile.TemporaryDirectory() as place:
        folders = properties.Folders(Path(place))
        loaded = [0, 0]

        def one(data: bytes) -> None:
            provider = atheris.FuzzedDataProvider(data)
            loaded[properties.check(folders.write(lambda below: provider.ConsumeIntInRange(0, below - 1)))] += 1
            if sum(loaded) % 1000 == 0:
                print(f"{loaded[0]} refused, {loaded[1]} loaded", file=sys.stderr)

        atheris.Setup([*sys.argv, "-max_len=512", "-len_control=0", "-timeout=10", "-rss_limit_mb=4096"], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
