"""Foo over UDP: the kernel takes what arrives at a UDP port for IPv4 packets (net/ipv4/fou_core.c; include/uapi/linux/fou.h).

A port that receives is set by generic netlink (`ip fou` does the same); what sends is an ipip device with a UDP header around
its packets, see links. The kernel doesn't tell who added a port, so the ones that we add are written into a file first: of a
crash at any moment nothing is left behind that the next run does not know.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from wincey.kernel.netlink import Netlink, NetlinkError, Refusal, attribute, attributes, message, messages
from wincey.model.state import Changes, Failure, Key, Object, Scope
from wincey.model.udp import FouPort

_NETLINK_GENERIC, _GENL_ID_CTRL = 16, 16
_CTRL_CMD_GETFAMILY, _CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 3, 1, 2
_CMD_ADD, _CMD_DEL, _CMD_GET, _VERSION = 1, 2, 3, 1
_PORT, _AF, _IPPROTO, _TYPE, _DIRECT = 1, 2, 3, 4, 1
_IPV4 = 4  # the protocol IP in IP
_SIOCGIFFLAGS = 0x8913  # linux/sockios.h
_HEADER = struct.Struct("=BBH")  # command, version, reserved


def missing() -> str:
    """Why this kernel can't carry IPv4 in UDP, "" when it can, after loading its module if need be."""
    netlink = Netlink(strict=False, protocol=_NETLINK_GENERIC)
    try:
        try:
            _family(netlink)
        except NetlinkError:
            _load()
            _family(netlink)
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return "this kernel has no FOU: load its module with `modprobe fou`, or choose another engine"
        return f"this kernel's FOU can't be asked for: {error}"
    else:
        return ""
    finally:
        netlink.close()


class FouDriver:
    """The UDP ports of this network namespace whose datagrams are IPv4 packets. directory: for the file of our ports."""

    handles: tuple[type[Object], ...] = (FouPort,)

    def __init__(self, directory: Path) -> None:
        self._file = directory / "fou-ports"
        self._netlink = Netlink(strict=False, protocol=_NETLINK_GENERIC)

    async def observe(self, desired: Mapping[Key, Object], scope: Scope) -> dict[Key, Object]:
        """The ports that are desired, or that we added."""
        try:
            there = _read(self._netlink)
        except NetlinkError:  # no such family, and so no port; what is desired fails when it is put
            return {}
        wanted = {thing.port for thing in desired.values() if isinstance(thing, FouPort)}
        found = [FouPort(port) for port in sorted(there & (wanted | self._ours()))]
        return {thing.key: thing for thing in found}

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """Delete and add ports."""
        ports = [thing for thing in changes.put if isinstance(thing, FouPort)]
        gone = {thing.port for thing in changes.delete if isinstance(thing, FouPort)}
        failures = []
        for thing in changes.delete:
            if isinstance(thing, FouPort) and (why := self._change(_CMD_DEL, thing.port)):
                failures.append(Failure(thing, why))
                gone.discard(thing.port)
        self._keep(self._ours() - gone | {thing.port for thing in ports})
        failures += [Failure(thing, why) for thing in ports if (why := self._change(_CMD_ADD, thing.port))]
        return failures

    def watch(self, changed: Callable[[str], None]) -> None:
        """The kernel tells nobody of its ports: they are looked at with everything else, from time to time."""

    async def close(self) -> None:
        """Leave the ports as they are."""
        self._netlink.close()

    def _ours(self) -> set[int]:
        try:
            return set(map(int, self._file.read_text().split()))
        except (FileNotFoundError, ValueError):
            return set()

    def _keep(self, ports: set[int]) -> None:
        if ports == self._ours():
            return
        if not ports:
            self._file.unlink(missing_ok=True)
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("".join(f"{port}\n" for port in sorted(ports)))

    def _change(self, command: int, port: int) -> str:
        """Add or delete a port; returns why it failed."""
        try:
            family = _family(self._netlink)
        except NetlinkError as error:  # without the family there is no port to delete
            return "" if command == _CMD_DEL and error.errno == errno.ENOENT else _explain(error.refusal, port)
        body = (
            _HEADER.pack(command, _VERSION, 0)
            + attribute(_PORT, struct.pack("!H", port))
            + attribute(_AF, bytes([socket.AF_INET]))
        )
        if command == _CMD_ADD:
            body += attribute(_IPPROTO, bytes([_IPV4])) + attribute(_TYPE, bytes([_DIRECT]))
        refusal = self._netlink.transact([message(family, 0, body)]).get(0)
        return _explain(refusal, port) if refusal else ""


def _load() -> None:
    """Have the kernel load the module, which asking for the family does not: but asking for a device of a module's name does,
    for a process with CAP_SYS_MODULE (net/core/dev_ioctl.c: dev_load)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, suppress(OSError):
        fcntl.ioctl(sock, _SIOCGIFFLAGS, b"fou".ljust(40, b"\0"))


def _family(netlink: Netlink) -> int:
    """The number of the family; raises NetlinkError."""
    body = _HEADER.pack(_CTRL_CMD_GETFAMILY, 1, 0) + attribute(_CTRL_ATTR_FAMILY_NAME, b"fou\0")
    _, data, start, end = netlink.request(message(_GENL_ID_CTRL, 0, body))
    return int(struct.unpack("=H", attributes(data, start + _HEADER.size, end)[_CTRL_ATTR_FAMILY_ID])[0])


def _read(netlink: Netlink) -> set[int]:
    """The ports whose datagrams are IPv4 packets; raises NetlinkError."""
    family = _family(netlink)
    ports = set()
    for kind, data, start, end in messages(netlink.dump(family, _HEADER.pack(_CMD_GET, _VERSION, 0))):
        if kind != family:
            continue
        found = attributes(data, start + _HEADER.size, end)
        if (found.get(_AF), found.get(_IPPROTO), found.get(_TYPE)) == (
            bytes([socket.AF_INET]),
            bytes([_IPV4]),
            bytes([_DIRECT]),
        ):
            ports.add(int.from_bytes(found[_PORT], "big"))
    return ports


def _explain(refusal: Refusal, port: int) -> str:
    hint = ""
    if refusal.errno == errno.EADDRINUSE:
        hint = f"UDP port {port} is taken by another program: stop that, or choose another Port"
    elif refusal.errno == errno.ENOENT:
        hint = "this kernel has no FOU: load its module with `modprobe fou`, or choose another --udp-engine"
    elif refusal.errno in (errno.EPERM, errno.EACCES):
        hint = "changing the network needs root or CAP_NET_ADMIN in this network namespace"
    return f"{refusal}; {hint}" if hint else str(refusal)
