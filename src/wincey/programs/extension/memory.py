"""What commands have added, in `extension/added.json` of the network's directory: what a later run has to take back.

Written before commands run and after, as a whole and atomically. So whenever the daemon ends, each peer that may be there is
remembered with what its removal needs.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from pathlib import Path

import msgspec

from wincey.model.command import CommandNetwork, CommandPeer
from wincey.model.errors import UNREADABLE

log = logging.getLogger(__name__)

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_EVERY = 1.0  # seconds between writes while many commands run


class Added(msgspec.Struct):
    """A peer that is there, or may be. unclear: a command for it failed or was begun, so it is removed before it is added.

    removals: how often its removal has failed.
    """

    peer: CommandPeer
    there: bool = False
    unclear: bool = False
    removals: int = 0


class _File(msgspec.Struct):
    boot: str = ""
    network: CommandNetwork | None = None
    shutdowns: int = 0
    peers: list[Added] = []


class Memory:
    """The remembered peers by subnet, and the host's own part. shutdowns: how often shutting that down has failed."""

    def __init__(self, directory: Path) -> None:
        self.network: CommandNetwork | None = None
        self.shutdowns = 0
        self.peers: dict[str, Added] = {}
        self._directory = directory / "extension"
        self._path = self._directory / "added.json"
        self._boot = _BOOT.read_text().strip()
        self._written = 0.0
        self._load()

    def _load(self) -> None:
        try:
            read = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except FileNotFoundError:
            return
        except (OSError, *UNREADABLE) as error:
            log.warning("%s can't be read, so peers that went meanwhile are not removed: %s", self._path, error)
            return
        self.network, self.shutdowns = read.network, read.shutdowns
        self.peers = {added.peer.subnet: added for added in read.peers}
        if read.boot != self._boot:  # what was in the kernel is gone
            self.doubt()

    def doubt(self) -> None:
        """Whether anything that was added is still there is not known any more."""
        for added in self.peers.values():
            added.there = False

    def save(self, *, soon: bool = False) -> None:
        """Write it; `soon`: unless it was written within the last second. Nothing to remember leaves no file behind."""
        now = time.monotonic()
        if soon and now - self._written < _EVERY:
            return
        self._written = now
        try:
            if self.network is None and not self.peers:
                shutil.rmtree(self._directory, ignore_errors=True)
                return
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            content = msgspec.json.encode(_File(self._boot, self.network, self.shutdowns, list(self.peers.values())))
            descriptor, name = tempfile.mkstemp(dir=self._directory, prefix=".added")
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(name, self._path)
        except OSError as error:
            log.warning("%s can't be written, so a later run won't know what to remove: %s", self._path, error)
