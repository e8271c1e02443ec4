"""Becomes charon: `python -m wincey.programs.strongswan.launcher CHARON CONFIGURATION DIRECTORY`.

charon's pid file has a fixed place, of which a machine has one. So charon gets a mount namespace with a /run of its own, in
which only our directory is still what it was; what is mounted and unmounted outside goes on being seen, so that charon keeps
nothing busy. Where that is not permitted it takes the machine's /run, and is the only charon there.

The process that was started ends at once, and charon lives on as nobody's child. Small on purpose: it is run at each start.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

_CLONE_NEWNS = 0x20000
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000
PID_DIRECTORY = "/var/run"


def main() -> None:
    """Returns in no process: the first one exits, the second one is charon."""
    charon, configuration, directory = sys.argv[1:]
    with suppress(OSError):
        _own_run(os.path.realpath(PID_DIRECTORY), os.path.realpath(directory))
    if os.fork():
        os._exit(0)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    os.chdir("/")
    os.umask(0o077)
    environment = {"STRONGSWAN_CONF": configuration, "PATH": os.environ.get("PATH", os.defpath)}
    os.execve(charon, [charon], environment)  # noqa: S606  # no shell is wanted


def _own_run(run: str, directory: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def must(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    must(libc.unshare(_CLONE_NEWNS))
    must(libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None))
    kept = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    must(libc.mount(b"tmpfs", run.encode(), b"tmpfs", 0, b"mode=755"))
    if os.path.commonpath((run, directory)) == run:
        os.makedirs(directory)
        must(libc.mount(f"/proc/self/fd/{kept}".encode(), os.fsencode(directory), None, _MS_BIND, None))
    os.close(kept)


if __name__ == "__main__":
    main()
