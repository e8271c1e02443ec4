"""Be told by the kernel when one file changes: inotify(7) through libc, on the event loop.

Only what the SQLite store needs: changes of a file's attributes (a touch, a link that goes) and its being moved or
deleted. The number of inotify instances of a user is limited (fs.inotify.max_user_instances, 128 by default), so making
one may fail, and a caller needs a slow poll to fall back on.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable

_IN_ATTRIB = 0x4
_IN_DELETE_SELF = 0x400
_IN_MOVE_SELF = 0x800

_libc = ctypes.CDLL(None, use_errno=True)


class FileWatch:
    """Calls `changed` from the event loop, at least once for any number of changes. Raises OSError when it can't watch."""

    def __init__(self, path: str, changed: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = changed
        self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1")
        try:
            mask = _IN_ATTRIB | _IN_DELETE_SELF | _IN_MOVE_SELF
            _checked(_libc.inotify_add_watch(self._fd, os.fsencode(path), mask), path)
        except OSError:
            os.close(self._fd)
            raise
        self._loop.add_reader(self._fd, self._readable)

    def close(self) -> None:
        """Stop watching."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _readable(self) -> None:
        os.read(self._fd, 65_536)  # what changed does not matter: whoever is told looks for himself
        self._changed()


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result
