"""Starts a keeper: `python -P -m wincey.tunnel CONTROL DEVICE MTU LOCAL PORT [ENGINE]`, or CONTROL alone to take over.

It makes the device and the socket, or takes over those of the keeper that runs, and only then detaches: exit code 0 says
that the tunnel is there and its control socket listens. 1 is a failure, told on stderr in one line. BUSY says that another
process holds the device, which is how one of two daemons that start a tunnel at once learns that the other one was first.
"""

from __future__ import annotations

import errno
import os
import sys

from wincey.tunnel.control import BUSY
from wincey.tunnel.engines import OFFLOAD
from wincey.tunnel.keeper import Keeper

_TITLE = "flannel-udp"  # what ps and top call it. `pkill flanneld` must not match it: the data path outlives the daemon


def main(arguments: list[str]) -> int:
    """Start, detach and run; returns the exit code of either process."""
    control, *rest = arguments
    try:
        if rest:
            device, mtu, local, port, *engine = rest
            keeper = Keeper.create(control, device, int(mtu), local, int(port), engine=engine[0] if engine else OFFLOAD)
        else:
            keeper = Keeper.take_over(control)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.EBUSY:
            return BUSY
        print((error.strerror or str(error)) if isinstance(error, OSError) else error, file=sys.stderr)  # noqa: T201  # to the daemon
        return 1
    if os.fork():
        os._exit(0)
    _detach()
    try:
        keeper.run()
    except Exception:
        _log_to(control.removesuffix(".sock") + ".log")
        raise
    return 0


def _detach() -> None:
    """Let go of all that is the daemon's: its pipes, its directory, its name."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    with open("/proc/self/comm", "w") as title:
        title.write(_TITLE)


def _log_to(path: str) -> None:
    """Have the traceback of a fault of ours written where someone finds it."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
