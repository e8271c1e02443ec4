"""Notices when ovs-vswitchd ends or starts anew: its flows are gone then, and nothing in the database tells.

An OpenFlow connection to one bridge is held and never used. It ends with the process, or with the bridge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from wincey.programs.openvswitch.host import management_socket

_HELLO = bytes([1, 0, 0, 8, 0, 0, 0, 1])  # OpenFlow 1.0: version, type, length, transaction
_ECHO_REQUEST, _ECHO_REPLY = 2, 3
_HEADER = 8
_AGAIN = 0.25  # seconds


class Liveness:
    """Watches one bridge's ovs-vswitchd; calls `changed(why)`."""

    def __init__(self, bridge: str, changed: Callable[[str], None]) -> None:
        self.bridge = bridge
        self._changed = changed
        self._task = asyncio.create_task(self._watch(), name=f"ovs-vswitchd of {bridge}")

    async def close(self) -> None:
        """Stop watching."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _watch(self) -> None:
        before = False
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(management_socket(self.bridge))
            except OSError:
                await asyncio.sleep(_AGAIN)
                continue
            try:
                if before:
                    self._changed("ovs-vswitchd has started anew")
                before = True
                writer.write(_HELLO)
                while True:
                    header = await reader.readexactly(_HEADER)
                    body = await reader.readexactly(int.from_bytes(header[2:4], "big") - _HEADER)
                    if header[1] == _ECHO_REQUEST:
                        writer.write(bytes([header[0], _ECHO_REPLY]) + header[2:] + body)
            except (OSError, asyncio.IncompleteReadError):
                await asyncio.sleep(_AGAIN)
            finally:
                writer.close()
