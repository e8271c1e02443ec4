"""Which tables this host has written to, remembered over restarts, so that `--cleanup` and a later config find the routes.

`cloud.json` in the network's directory. It holds no secrets: where credentials stood in a config, the library's own ways to
find some must do for cleaning up.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from wincey.model.address import Subnet, format_address, parse_address
from wincey.model.cloud import CloudTable, HostRef
from wincey.model.errors import UNREADABLE, BadAddress

log = logging.getLogger(__name__)


class _File(msgspec.Struct):
    provider: str
    network: str
    tables: list[str]
    settings: dict[str, str]
    instance: str
    address: str


class Memory:
    """Remembers one CloudTable with a host of its own. directory: None to remember nothing."""

    def __init__(self, directory: Path | None) -> None:
        self._path = directory / "cloud.json" if directory else None
        self._written: bytes | None = None

    def save(self, table: CloudTable) -> None:
        """Remember. A failure is told and costs no more than the memory of it."""
        if self._path is None or table.own is None:
            return
        address = format_address(table.own.address) if table.own.address else ""
        file = _File(
            table.provider, str(table.network), list(table.tables), dict(table.settings), table.own.instance, address
        )
        content = msgspec.json.encode(file)
        if content == self._written:
            return
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            new = self._path.with_suffix(".new")
            new.write_bytes(content)
            new.replace(self._path)
            self._written = content
        except OSError as error:
            log.warning("%s can't be written: %s; cleaning up will not find our cloud routes", self._path, error)

    def load(self) -> CloudTable | None:
        """What was remembered."""
        if self._path is None:
            return None
        try:
            file = msgspec.json.decode(self._path.read_bytes(), type=_File)
            address = parse_address(file.address) if file.address else None
            return CloudTable(
                provider=file.provider,
                network=Subnet.parse(file.network),
                tables=tuple(file.tables),
                settings=tuple(file.settings.items()),
                own=HostRef(file.instance, address),
            )
        except FileNotFoundError:
            return None
        except (OSError, *UNREADABLE, BadAddress) as error:
            log.warning("%s can't be read: %s; cloud routes of an earlier run may be left", self._path, error)
            return None

    def forget(self) -> None:
        """Nothing is left to be found."""
        self._written = None
        if self._path:
            self._path.unlink(missing_ok=True)
