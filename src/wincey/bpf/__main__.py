"""`python -P -m wincey.bpf DIRECTORY`: remove the programs of the udp tunnel whose run-time directory that is.

A keeper that ends by itself, for flannel which wants its place, runs this: what is left of the tunnel must not take flannel's packets.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from wincey.bpf.udp import remove


def main(arguments: list[str]) -> int:
    """Remove; 1 with the reason on standard error when that fails."""
    failures = asyncio.run(remove(Path(arguments[0])))
    for failure in failures:
        print(f"{failure.object}: {failure.reason}", file=sys.stderr)  # noqa: T201  # a program
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
