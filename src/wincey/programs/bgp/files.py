"""What lies in the directory of our own instance, and how it outlives the daemon.

bgp/state.json     speaker and neighbours as last configured; it has the password and is root's (0600)
bgp/bird.conf      or bgpd.conf, zebra.conf: the configuration, readable by the routing daemon's group (0640)
bgp/run/           sockets, pid files and logs: the routing daemon's own, which runs as a user without rights
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import tempfile
from pathlib import Path

import msgspec

from wincey.model.bgp import BgpPeer, BgpSpeaker
from wincey.model.errors import UNREADABLE


class Applied(msgspec.Struct):
    """What the routing daemon was last told."""

    speaker: BgpSpeaker
    peers: list[BgpPeer] = []


class Room:
    """The files of one network's routing daemon."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "bgp"
        self.run = self.path / "run"

    def applied(self) -> Applied | None:
        """What was last configured; None when that is not known."""
        try:
            return msgspec.json.decode((self.path / "state.json").read_bytes(), type=Applied)
        except (OSError, *UNREADABLE):
            return None

    def remember(self, applied: Applied) -> None:
        """Write what is configured now; raises OSError."""
        self.path.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._write("state.json", msgspec.json.encode(applied), 0o600)

    def make(self, user: str) -> None:
        """Make the inner directory, for this user where there is one; raises OSError."""
        self.run.mkdir(mode=0o750, exist_ok=True)
        uid, gid = ids(user)
        os.chown(self.run, uid, gid)

    def write(self, name: str, text: str, user: str) -> Path:
        """Write a configuration that this user's group may read; raises OSError."""
        return self._write(name, text.encode(), 0o640, ids(user)[1])

    def impassable(self) -> Path | None:
        """The first directory above that others than root may not pass through."""
        for parent in reversed(self.path.parents):
            with contextlib.suppress(OSError):
                if not parent.stat().st_mode & 0o001:
                    return parent
        return None

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, name: str, content: bytes, mode: int, gid: int = 0) -> Path:
        path = self.path / name
        replace_file(path, content, mode, gid)
        return path


def replace_file(path: Path, content: bytes, mode: int, gid: int = 0) -> None:
    """Write a file at once as a whole, root's and a group's; nobody else sees it in between. Raises OSError."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchown(descriptor, os.geteuid(), gid)
            os.fchmod(descriptor, mode)
            file.write(content)
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def ids(user: str) -> tuple[int, int]:
    """User and group id of a user; root's where there is no such user."""
    try:
        return pwd.getpwnam(user).pw_uid, grp.getgrnam(user).gr_gid
    except KeyError:
        return 0, 0
