"""What an error says behind a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], otherwise: str = "", *, cutoff: float = 0.6) -> str:
    """Return a sentence with the nearest of ``known``, or ``otherwise``, with a space in front; nothing for nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    sentence = f"Did you mean {near[0]!r}?" if near else otherwise
    return f" {sentence}" if sentence else ""
