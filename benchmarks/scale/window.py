"""flanneld with a window: the product's own main, and beside it a thread that writes down what only the inside can tell.

WINDOW_FILE: where to write, once a second, the number of asyncio tasks and of Python's memory blocks. WINDOW_TTL: seconds that
leases and claims live for instead of a day, so that a short run sees them renewed.

    WINDOW_FILE=/tmp/w WINDOW_TTL=300 python benchmarks/scale/window.py FLANNELD_ARGUMENTS
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from pathlib import Path


def watch(path: Path, loops: list[asyncio.AbstractEventLoop]) -> None:
    """Write the figures for ever."""
    while True:
        tasks = sum(len(asyncio.all_tasks(loop)) for loop in loops if not loop.is_closed())
        temporary = path.with_suffix(".new")
        temporary.write_text(f"{tasks} {sys.getallocatedblocks()}")
        temporary.rename(path)
        time.sleep(1)


def main() -> None:
    """Set the time limit before anything reads it, open the window, be flanneld."""
    from wincey.model import lease  # noqa: PLC0415  # first of all, as others take TTL over when they are imported

    if ttl := os.environ.get("WINDOW_TTL"):
        lease.TTL = float(ttl)
    from wincey.cli import flanneld  # noqa: PLC0415  # see above

    if path := os.environ.get("WINDOW_FILE"):
        loops: list[asyncio.AbstractEventLoop] = []
        make = asyncio.events.new_event_loop

        def noted() -> asyncio.AbstractEventLoop:
            loops.append(make())
            return loops[-1]

        asyncio.events.new_event_loop = noted
        threading.Thread(target=watch, args=(Path(path), loops), daemon=True).start()
    flanneld.main()


if __name__ == "__main__":
    main()
