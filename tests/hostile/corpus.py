"""The corpus of hostile files: named cases for every reader, each as it would come from a stranger.

``corpus.json.xz`` holds files in full, and long repetitions as such. A case lies over a base, a set of valid files.
"""

from __future__ import annotations

import base64
import json
import lzma
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

ARCHIVE = Path(__file__).parent / "corpus.json.xz"


@dataclass
class Case:
    """Files for one reader.

    ``files`` maps names to texts, ``{"base64": text}``, or ``{"repeat": [head, unit, count, tail]}``; ``holes`` says
    how long a file is made with zeros that take no room; ``links`` maps names to what they point at; ``absent`` and
    ``pipes`` name files that are taken away, or are pipes. ``verdict`` is ``"refused"`` or ``"harmless"``.
    """

    name: str
    reader: str
    base: str = ""
    verdict: str = "refused"
    files: dict[str, object] = field(default_factory=dict)
    holes: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    pipes: list[str] = field(default_factory=list)


def write(bases: dict[str, dict[str, object]], cases: list[Case]) -> None:
    """Write the archive; the same cases give the same bytes."""
    slim = [{key: value for key, value in asdict(case).items() if value} for case in cases]
    text = json.dumps({"bases": bases, "cases": slim}, indent=0)
    ARCHIVE.write_bytes(lzma.compress(text.encode("ascii"), format=lzma.FORMAT_XZ, preset=9))


def read() -> tuple[dict[str, dict[str, object]], list[Case]]:
    """Return the bases and the cases."""
    content = json.loads(lzma.decompress(ARCHIVE.read_bytes()))
    return content["bases"], [Case(**case) for case in content["cases"]]


def packed(data: bytes) -> object:
    """Return the bytes of a file as the archive holds them."""
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


def unpacked(content: object) -> bytes:
    """Return the bytes of a file of the archive."""
    if isinstance(content, str):
        return content.encode("ascii")
    assert isinstance(content, dict)
    if "base64" in content:
        return base64.b64decode(content["base64"])
    head, unit, count, tail = content["repeat"]
    return unpacked(head) + unpacked(unit) * count + unpacked(tail)


def lay_out(case: Case, bases: dict[str, dict[str, object]], place: Path) -> None:
    """Write the files of a case into a new folder."""
    place.mkdir(parents=True)
    for name, content in {**bases.get(case.base, {}), **case.files}.items():
        if name not in case.absent:
            (place / name).write_bytes(unpacked(content))
    for name, size in case.holes.items():
        os.truncate(place / name, size)
    for name, target in case.links.items():
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(target)
    for name in case.pipes:
        (place / name).unlink(missing_ok=True)
        os.mkfifo(place / name)
