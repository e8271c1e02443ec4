"""`did you mean`: names close to a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def suggestion(wrong: str, names: Sequence[str]) -> str:
    """`; did you mean h2?`, or nothing when no name is close."""
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
