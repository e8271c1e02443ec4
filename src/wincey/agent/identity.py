"""Who this host is: its name, and an identifier that no other live host has."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket

from wincey.leasing.claims import Host


def this_host() -> Host:
    """One boot of one machine and one network namespace: a restarted daemon is the same, a clone of the machine is not."""
    parts = [_read("/etc/machine-id"), _read("/proc/sys/kernel/random/boot_id")]
    with contextlib.suppress(OSError):
        parts.append(str(os.stat("/proc/self/ns/net").st_ino))
    name = socket.gethostname()
    return Host(name, hashlib.sha256("\n".join([name, *parts]).encode()).hexdigest()[:32])


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""
