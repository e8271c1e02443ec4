"""Which kernel this host runs."""

from __future__ import annotations

import platform
import re


def kernel_release() -> tuple[int, int]:
    """The first two numbers of the running kernel's release, as in (6, 18); (0, 0) where it has none."""
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(found[1]), int(found[2])) if found else (0, 0)
