"""Tells when one of some devices is made anew, changed or deleted, by the kernel's own notifications."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from wincey.kernel import rtnl
from wincey.kernel.netlink import Netlink, messages

_RTNLGRP_LINK = 1


class LinkWatch:
    """`devices`: the names to watch; none at first. What is told once is not told again as long as it stays."""

    def __init__(self) -> None:
        self.devices: frozenset[str] = frozenset()
        self._netlink: Netlink | None = None
        self._changed: Callable[[str], None] = lambda why: None
        self._known: dict[str, tuple[object, ...]] = {}

    def start(self, changed: Callable[[str], None]) -> None:
        """Call `changed(why)` from the running event loop."""
        self._changed = changed
        if self._netlink is None:
            self._netlink = Netlink([_RTNLGRP_LINK])
            asyncio.get_running_loop().add_reader(self._netlink.fileno(), self._read)

    def stop(self) -> None:
        """No more."""
        if self._netlink:
            asyncio.get_running_loop().remove_reader(self._netlink.fileno())
            self._netlink.close()
            self._netlink = None

    def _read(self) -> None:
        assert self._netlink
        try:
            while (data := self._netlink.receive()) is not None:
                for kind, part, start, end in messages([data]):
                    self._take(kind, part, start, end)
        except OSError:  # some were lost
            self._changed("notifications of devices were lost")

    def _take(self, kind: int, data: bytes, start: int, end: int) -> None:
        if kind not in (rtnl.RTM_NEWLINK, rtnl.RTM_DELLINK) or data[start] != 0:  # of another family: a bridge's port
            return
        link = rtnl.decode_link(data, start, end)
        if link.name not in self.devices:
            return
        state = (kind, link.index, link.up, link.mtu, link.mac)
        if self._known.get(link.name, state) != state or kind == rtnl.RTM_DELLINK:
            self._changed(f"device {link.name} was changed")
        self._known[link.name] = state
