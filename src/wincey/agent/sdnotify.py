"""Tell systemd how we are, by sd_notify(3)'s protocol: one datagram to the socket that NOTIFY_SOCKET names."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)


def notify(*assignments: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Send assignments such as `READY=1`, `STOPPING=1` or `STATUS=one line for people` in one message.

    Whether it was sent. Without NOTIFY_SOCKET nothing happens; a socket that is gone is only logged, as no data path
    depends on it.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address[0] not in "/@":
        log.warning("NOTIFY_SOCKET=%s is neither a path nor an abstract socket: systemd is not told", address)
        return False
    message = "\n".join(assignment.replace("\n", " ") for assignment in assignments)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            # A manager that does not read must not hold us up.
            sender.setblocking(False)
            sender.connect("\0" + address[1:] if address[0] == "@" else address)
            sender.send(message.encode())
    except OSError as error:
        log.warning("systemd could not be told %r through %s: %s", message, address, error)
        return False
    return True
