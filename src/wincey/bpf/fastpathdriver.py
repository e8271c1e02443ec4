"""Keeps the fast path of containers: programs at devices, what they are told, the rule that lets flows in, one sysctl.

Where programs can't be had the kernel's own flowtable takes their place (kernel.flowtable), in a table of the same name.

One object stands for all of it; which containers it is attached to follows from the host's devices (kernel.ports), whose changes are
taken in within milliseconds and are nobody's repair. A kernel that can't have it is no failure either: packets then take the
ordinary path, and `told` has why.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from wincey.bpf import fastpath, probe, syscall
from wincey.bpf.attach import Attachment, device_index
from wincey.bpf.bpffs import alone, owner_directory, sweep
from wincey.bpf.fastpath import COUNTERS, LIBERAL, Places
from wincey.bpf.maps import Map
from wincey.bpf.objects import Objects
from wincey.bpf.program import read_baked
from wincey.bpf.syscall import BpfError
from wincey.kernel import flowtable, nft, sysctl
from wincey.kernel.conntrack import be_liberal
from wincey.kernel.driver import Desired
from wincey.kernel.flowtable import Flowtable
from wincey.kernel.interfaces import read_interfaces
from wincey.kernel.nfmonitor import GenerationCounter, NftMonitor
from wincey.kernel.ports import PortWatch, container_ports, is_ethernet
from wincey.kernel.program import ProgramFailed, find
from wincey.model.address import Subnet
from wincey.model.fastpath import FastPath
from wincey.model.state import Changes, Failure, Key, Object, Scope, Sysctl

log = logging.getLogger(__name__)

_NEEDS = (5, 10)
"""The release with every helper of the programs, redirect_peer being the latest. Wrapping for vxlan is tried: it is of 5.13."""

_OTHERWISE = FastPath(Subnet(bytes(4), 0), Subnet(bytes(4), 0), "", bytes(4))
"""What is reported of a fast path that is not as desired: equal to none that anybody desires."""


class _Remembered(msgspec.Struct):
    """What is put back in the end. liberal: the sysctl's former value, "" where it was what we need."""

    liberal: str = ""


class FastPathDriver:
    """Keeps the FastPath of one network (a kernel.driver.Driver). directory: the network's run-time directory. tcx: see Objects."""

    handles: tuple[type[Object], ...] = (FastPath,)

    def __init__(self, directory: Path, *, tcx: bool = True) -> None:
        self.told = ""
        """How packets go, and why not better, in a line; "" before the first is made."""
        self._file = directory / "fast-path.json"
        self._table = fastpath.table_name(directory.name)
        self._baked = read_baked("fastpath")
        self._directory = owner_directory("fastpath", directory)
        self._objects = Objects(self._directory, self._baked, tcx=tcx)
        self._path: FastPath | None = None  # as it was put in place by this process
        self._wraps, self._limit = False, ""  # whether the programs encapsulate, and why not
        self._attached: dict[Attachment, int] = {}  # to devices of this index
        self._listing: str | None = None
        self._generation = GenerationCounter()
        self._verified: int | None = None  # the generation at which the table was as listed
        self._flowtable: Flowtable | None = None  # in the place of programs
        self._refused: tuple[FastPath, str] | None = None
        self._watch: PortWatch | None = None
        self._monitor: NftMonitor | None = None
        self._changed: Callable[[str], None] = lambda why: None

    async def observe(self, desired: Desired, scope: Scope) -> dict[Key, Object]:
        """See Driver."""
        wanted = next((item for item in desired.values() if isinstance(item, FastPath)), None)
        if wanted and self._refused and self._refused[0] == wanted:
            return {wanted.key: wanted}
        if wanted is None or wanted != self._path:
            there = self._objects.exists or self._file.exists() or await self._listed() is not None
            return {_OTHERWISE.key: _OTHERWISE} if there else {}
        return {wanted.key: wanted if await self._as_put() else _OTHERWISE}

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """See Driver."""
        failures: list[Failure] = []
        for item in changes.delete:
            try:
                await self._remove()
            except (BpfError, ProgramFailed, OSError) as error:
                failures.append(Failure(item, str(error)))
        for item in changes.put:
            assert isinstance(item, FastPath)
            try:
                await self._put(item)
            except (BpfError, ProgramFailed, OSError) as error:
                failures.append(Failure(item, str(error)))
        return failures

    def watch(self, changed: Callable[[str], None]) -> None:
        """See Driver."""
        self._changed = changed

    async def close(self) -> None:
        """See Driver."""
        self._unwatch()
        await self._forget_flowtable()
        self._generation.close()
        self._objects.close()

    def counters(self) -> dict[str, int]:
        """Packets by what became of them (fastpath.COUNTERS); none where there is no fast path."""
        counters = self._objects.maps.get("counters")
        return {name: counters.total(number) for number, name in enumerate(COUNTERS)} if counters else {}

    async def _put(self, path: FastPath) -> None:
        if path.lacking:
            await self._do_without(path, path.lacking)
            return
        reasons = []
        if path.engine != "flowtable":
            reasons.append(_reason_against(path) or self._attach(path))
            if not reasons[0]:
                await self._put_programs(path)
                return
        if path.engine != "bpf":
            reason = flowtable.unserved(path) or await flowtable.complaint()
            if not reason:
                await self._put_flowtable(path, *reasons)
                return
            reasons.append(f"and no flowtable: {reason}" if reasons else reason)
        await self._do_without(path, "; ".join(reasons))

    async def _do_without(self, path: FastPath, reason: str) -> None:
        if self._refused is None or self._refused != (path, reason):
            log.warning("no fast path for containers, their packets take the ordinary path: %s", reason)
        if self._objects.exists or self._flowtable or await self._listed() is not None:
            await self._remove()
        self.told, self._refused = f"none: {reason}", (path, reason)

    async def _put_flowtable(self, path: FastPath, why: str = "") -> None:
        if self._objects.exists or self._file.exists():
            await self._remove()
        self._refused = None
        if self._flowtable is None:
            self._flowtable = Flowtable(self._table, self._look_again)
        await self._flowtable.put(path)
        self._path = path
        told = f"between containers and {path.tunnel or path.underlay}, by nftables' flowtable"
        self._say(f"{told}, as programs can't be had: {why}" if why else told)

    def _look_again(self, why: str) -> None:
        self._changed(why)

    async def _forget_flowtable(self) -> None:
        kept, self._flowtable = self._flowtable, None
        if kept:
            await kept.close()

    async def _put_programs(self, path: FastPath) -> None:
        await self._forget_flowtable()
        self._refused = None
        # Last what lets flows in. Only with it conntrack is sure to be there, and has the setting.
        await nft.commit(fastpath.table(path, self._table))
        self._become_liberal()
        self._verified, self._listing = self._generation.read(), await self._listed()
        self._begin_watching()
        self._tell()

    def _tell(self) -> None:
        assert self._path
        told = f"between containers and {self._path.underlay}"
        if self._path.form != "plain":
            told += f", {self._path.form} headers by the programs"
        if self._limit:
            told = f"between containers and {self._path.tunnel}, which encapsulates: {self._limit}"
        self._say(told)

    def _say(self, told: str) -> None:
        if told != self.told:
            log.info("fast path for established flows without NAT: %s", told)
        self.told = told

    async def _remove(self) -> None:
        self._unwatch()
        await self._forget_flowtable()
        await nft.delete_tables(("ip", self._table))
        self._spare_connections()
        devices = tuple(interface.name for interface in read_interfaces())
        self._objects.detach(Places(devices, devices).attachments())
        self._objects.remove()
        self._put_back()
        self._path, self._listing, self._verified, self.told, self._attached = None, None, None, "", {}

    async def _as_put(self) -> bool:
        """Whether all is there as it was put, apart from containers that came or went meanwhile."""
        assert self._path
        if self._flowtable:
            return await self._flowtable.as_put()
        expected = [each for each, index in self._attached.items() if device_index(each.device) == index]
        if len(self._objects.attached(expected)) != len(expected):
            return False
        self._follow_ports()
        if self._objects.maps["conf"].get(bytes(4)) != fastpath.conf(self._path, wraps=self._wraps):
            return False
        if sysctl.read(LIBERAL) != "1":
            return False
        generation = self._generation.read()
        if generation is None or generation != self._verified:
            if await self._listed() != self._listing:
                return False
            self._verified = generation
        return True

    def _follow_ports(self) -> None:
        """Attach to containers and devices that have come, and forget those that are gone. Raises BpfError, OSError."""
        assert self._path
        wire, ports = fastpath.wire(self._path, wraps=self._wraps), container_ports(self._path.subnet)
        places = Places(wire, tuple(ports), first=self._path.form == "udp")
        wanted: dict[Attachment, int] = {}
        for attachment in places.attachments():
            index = device_index(attachment.device)
            if not index:
                continue
            try:
                self._objects.attach([attachment])
            except BpfError:
                if device_index(attachment.device) == index:
                    raise
            else:
                wanted[attachment] = index
        self._objects.detach([each for each in self._attached if each not in wanted and device_index(each.device)])
        self._objects.detach_others(list(wanted))
        self._attached = wanted

    def _links_changed(self) -> None:
        if self._path is None:
            return
        try:
            self._follow_ports()
        except (BpfError, OSError) as error:
            log.warning("fast path: %s; looking again", error)
            self._changed("devices changed")

    def _begin_watching(self) -> None:
        if self._watch is None:
            self._watch = PortWatch(self._links_changed)
        if self._monitor is None:
            name = self._table
            self._monitor = NftMonitor({name}, lambda family, table, chain: table == name, self._noticed)

    def _noticed(self, why: str) -> None:
        if self._generation.read() != self._verified:
            self._changed(why)

    def _unwatch(self) -> None:
        watch, self._watch = self._watch, None
        monitor, self._monitor = self._monitor, None
        if watch:
            watch.close()
        if monitor:
            monitor.close()

    async def _listed(self) -> str | None:
        return await nft.listing("table", "ip", self._table) if find("nft") else None

    def _attach(self, path: FastPath) -> str:
        """Get maps and programs into the kernel and to their devices; why the kernel can't have them, "" if it was done.

        Raises BpfError and OSError where they can't be attached.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(alone(self._directory))
                sweep()
                self._objects.open()
            except BpfError as error:
                return str(error)
            self._limit = path.limit or self._reason_against_wrapping() if path.form == "vxlan" else ""
            self._path, self._wraps = path, path.form != "plain" and not self._limit
            self._objects.maps["conf"].put(bytes(4), fastpath.conf(path, wraps=self._wraps))
            self._follow_ports()
            self._objects.retire()
        return ""

    def _reason_against_wrapping(self) -> str:
        """Why the programs can't encapsulate here, "" if they can: tried on a packet that goes nowhere."""
        frame = bytes(12) + b"\x08\x00" + b"\x45\x00\x00\x32" + bytes(46)
        verdict = syscall.prog_test_run(self._objects.programs["fast_probe"], frame)[0]
        return f"this kernel does not put Ethernet headers inside others (error {-verdict})" if verdict else ""

    def _spare_connections(self) -> None:
        """Once the sysctl is as before, connections of the fast path would be strays to conntrack, which saw a part of them."""
        for pin in self._directory.glob("*/map_flows"):
            flows = Map.opened(str(pin))
            if flows is None:
                continue
            try:
                be_liberal(fastpath.connections(flows.items()))
            finally:
                flows.close()

    def _become_liberal(self) -> None:
        value = sysctl.read(LIBERAL)
        if value == "1":
            return
        if value is not None:
            self._file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._file.write_bytes(msgspec.json.encode(_Remembered(value)))
        self._write_sysctl("1")

    def _put_back(self) -> None:
        try:
            remembered = msgspec.json.decode(self._file.read_bytes(), type=_Remembered)
        except (OSError, msgspec.MsgspecError):
            return
        if remembered.liberal and sysctl.read(LIBERAL) == "1":
            self._write_sysctl(remembered.liberal)
        self._file.unlink(missing_ok=True)

    @staticmethod
    def _write_sysctl(value: str) -> None:
        if reason := sysctl.write(Sysctl(LIBERAL, value)):
            raise OSError(reason)


def _reason_against(path: FastPath) -> str:
    """Why this host can't have it, as far as can be told without trying; "" for nothing. Raises OSError."""
    release = os.uname().release.split(".")
    kernel = int(release[0]), int(release[1].split("-")[0])
    if reason := syscall.unsupported():
        return reason
    if kernel < _NEEDS:
        return f"Linux {kernel[0]}.{kernel[1]} is too old: it needs {_NEEDS[0]}.{_NEEDS[1]}"
    if reason := probe.missing_capabilities(kernel):
        return reason
    if find("nft") is None:
        return "nft is not installed"
    return "" if is_ethernet(path.underlay) else f"{path.underlay} is no Ethernet device"
