"""The fast path of containers by nftables' flowtable: established flows go from device to device by the kernel itself.

A rule at the end of the FORWARD hook puts accepted flows without NAT into the flowtable. Their next packets are taken at the ingress
of the container's cable, or of the device that they come by, and leave by the other one: past bridge, routing, conntrack and rules.
The kernel looks after TTL, MTU, the end of TCP connections, routes and devices that go. It does not look after rules that change: a
flow stays as long as it has packets. So the table is made anew, by which every flow begins again at the ordinary path: soon after
rules have changed whose change the kernel tells of, and every few seconds for all that it does not tell (sets of ipset).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence

from wincey.kernel import nft, program
from wincey.kernel.interfaces import read_interfaces
from wincey.kernel.nfmonitor import LegacyPoll, NftMonitor, legacy_tables
from wincey.kernel.nfttable import OwnTable
from wincey.kernel.ports import PortWatch, container_ports
from wincey.kernel.program import ProgramFailed, find
from wincey.kernel.release import kernel_release
from wincey.model.fastpath import FastPath

PRIORITY = 300
"""After every other chain of the FORWARD hook (filter 0, security 50): what gets there was accepted."""

# Source and destination NAT, sequence numbers that are adjusted, and a helper that reads along (IPS_* in the kernel's
# nf_conntrack_common.h): such a connection's packets are changed or looked at on their way.
_TOUCHED = 0x10 | 0x20 | 0x40 | 0x2000

_NEEDS = (5, 13)
"""The release from which on a flowtable sees through a bridge to the container's cable."""

RENEWAL = 10.0
"""Seconds after which flows begin again at the ordinary path, whatever happens."""

STEM = "flannel-fast"
"""How the names of all networks' tables begin."""

_REST = 0.5
"""Seconds between two renewals at least, however often rules change."""

_PROBE = """\
table ip flannel-probe {
    flowtable f {
        hook ingress priority 0; devices = { lo };
    }
    chain forward {
        type filter hook forward priority 0; policy accept;
        ct state established flow add @f
    }
}
"""

_FORTH = "meta l4proto . ip saddr . ip daddr . th sport . th dport"
_BACK = "meta l4proto . ip daddr . ip saddr . th dport . th sport"

Devices = tuple[tuple[str, int], ...]
"""Names, with the numbers (indexes) that tell a device from a later one of its name."""


def flows(path: FastPath) -> tuple[str, str]:
    """What nft rules match: packets out of containers here, and those to them, that may skip most of the stack. Pure."""
    here, network = path.subnet, path.network
    accepted = f"meta l4proto {{ tcp, udp }} ct state established ct status & {_TOUCHED:#x} == 0"
    return (
        f"ip saddr {here} ip daddr {network} ip daddr != {here} {accepted}",
        f"ip daddr {here} ip saddr {network} ip saddr != {here} {accepted}",
    )


def script(path: FastPath, name: str, devices: Sequence[str]) -> str:
    """What replaces the table by one with a flowtable at these devices, in one transaction; without devices an empty one. Pure."""
    lines = [f"table ip {name} {{"]
    if devices:
        quoted = ", ".join(f'"{device}"' for device in devices)
        lines += [
            "    flowtable flows {",
            f"        hook ingress priority 0; devices = {{ {quoted} }};",
            "    }",
            "    set answered {",
            "        typeof meta l4proto . ip saddr . ip daddr . th sport . th dport; flags dynamic; timeout 20s; size 65535;",
            "    }",
            "    chain forward {",
            f"        type filter hook forward priority {PRIORITY}; policy accept;",
            # A flow goes both ways at once, and a rule may drop one way alone: so a packet each way has to have passed.
            *(f"        {flow} ct direction reply add @answered {{ {_BACK} }}" for flow in flows(path)),
            *(f"        {flow} ct direction original {_FORTH} @answered flow add @flows" for flow in flows(path)),
            "    }",
        ]
    return nft.deletion(("ip", name)) + "".join(f"{line}\n" for line in (*lines, "}"))


def unserved(path: FastPath) -> str:
    """Why a flowtable would not do for this network, "" if it would. Pure."""
    if path.form == "udp":
        return "a flowtable serves vxlan and host-gw"
    return f"{path.limit}, which a flowtable would lose" if path.limit else ""


async def complaint() -> str:
    """Why this host has no flowtables, in a line, "" if it has: tried, and nothing made. Raises ProgramFailed where that takes too long."""
    kernel = kernel_release()
    if kernel < _NEEDS:
        return f"Linux {kernel[0]}.{kernel[1]} is too old for flowtables at bridges: they need {_NEEDS[0]}.{_NEEDS[1]}"
    if find("nft") is None:
        return "nft is not installed"
    result = await program.run("nft", "--check", "-f", "-", text=_PROBE)
    return explained(program.complaint(result)) if result.code else ""


def explained(said: str) -> str:
    """What nft's complaint about the probe means. Pure."""
    if "syntax error" in said:
        return f"this nft does not know flowtables ({said})"
    if "No such file" in said or "not supported" in said:
        return "this kernel has no flowtables (the modules nf_flow_table and nft_flow_offload)"
    return said


class Flowtable:
    """The flowtable of one network. table: its name (family ip). changed: called with the reason when someone should look."""

    def __init__(self, table: str, changed: Callable[[str], None]) -> None:
        self.told = ""
        """Between which devices packets go by it, in words."""
        self._table, self._changed = OwnTable(table, changed), changed
        self._path: FastPath | None = None
        self._devices: Devices = ()
        self._lock = asyncio.Lock()
        self._stale = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._watches: list[NftMonitor | PortWatch | LegacyPoll] = []

    @property
    def exists(self) -> bool:
        """Whether it is looked after."""
        return self._keeper is not None

    async def put(self, path: FastPath) -> str:
        """Make it, in place of whatever table of the name there is; why this host can't have it, "" when it was made.

        Needs a running event loop. Raises ProgramFailed, OSError.
        """
        if reason := unserved(path) or await complaint():
            return reason
        async with self._lock:
            self._path = path
            await self._commit()
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(self._watch()))
        self.told = f"between containers and {path.tunnel or path.underlay}, by nftables' flowtable"
        return ""

    async def as_put(self) -> bool:
        """Whether it is there as it was put, apart from devices that came or went. Raises ProgramFailed, OSError."""
        async with self._lock:
            if self._found_devices() != self._devices:
                await self._commit()
            return await self._table.as_committed()

    async def remove(self) -> None:
        """Take it away, there or not. Raises ProgramFailed."""
        await self.close()
        await self._table.delete()

    async def close(self) -> None:
        """Look after it no longer; it stays."""
        keeper, self._keeper = self._keeper, None
        if keeper:
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
        for watch in self._watches:
            watch.close()
        self._watches.clear()
        self._table.close()

    async def _commit(self) -> None:
        assert self._path
        devices = self._found_devices()
        await self._table.commit(script(self._path, self._table.name, [name for name, _ in devices]))
        self._devices = devices

    def _found_devices(self) -> Devices:
        assert self._path
        numbers = {interface.name: interface.index for interface in read_interfaces()}
        wanted = (self._path.tunnel or self._path.underlay, *container_ports(self._path.subnet))
        return tuple((name, numbers[name]) for name in wanted if name in numbers)

    def _watch(self) -> LegacyPoll:
        # Not what other networks' flowtables do: each of them would have the others renewed, without end.
        self._watches.append(
            NftMonitor(None, lambda family, table, chain: not table.startswith(STEM), self._begin_anew)
        )
        self._watches.append(PortWatch(self._links_changed))
        self._watches.append(legacy := LegacyPoll(self._begin_anew))
        return legacy

    async def _keep(self, legacy: LegacyPoll) -> None:
        """Make it anew when rules or devices change, and every RENEWAL seconds."""
        while True:
            legacy.watch([(socket.AF_INET, table) for table in sorted(legacy_tables(socket.AF_INET))])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEWAL):
                    await self._stale.wait()
            self._stale.clear()
            await self._renew()
            await asyncio.sleep(_REST)

    async def _renew(self) -> None:
        try:
            async with self._lock:
                # What someone has done to the table is to be seen, and repaired, rather than covered up. Devices that go
                # change it without anybody's doing.
                if self._found_devices() != self._devices or await self._table.as_committed():
                    await self._commit()
                else:
                    self._changed(f"nftables: table {self._table.name} changed")
        except (ProgramFailed, OSError) as error:
            self._changed(f"flowtable: {error}")

    def _begin_anew(self, why: str) -> None:
        self._stale.set()

    def _links_changed(self) -> None:
        try:
            if self._found_devices() != self._devices:
                self._stale.set()
        except OSError as error:
            self._changed(f"devices: {error.strerror}")
