"""Keeps the fast path of containers by programs: at devices, what they are told, the rule that lets flows in, one sysctl.

Which containers it is attached to follows from the host's devices (kernel.ports), whose changes are taken in within milliseconds and
are nobody's repair.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
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
from wincey.kernel import sysctl
from wincey.kernel.conntrack import be_liberal
from wincey.kernel.interfaces import read_interfaces
from wincey.kernel.nfttable import OwnTable
from wincey.kernel.ports import PortWatch, container_ports, is_ethernet
from wincey.kernel.program import find
from wincey.kernel.release import kernel_release
from wincey.model.fastpath import FastPath
from wincey.model.state import Sysctl

log = logging.getLogger(__name__)

_NEEDS = (5, 10)
"""The release with every helper of the programs, redirect_peer being the latest. Wrapping for vxlan is tried: it is of 5.13."""


class _Remembered(msgspec.Struct):
    """What is put back in the end. liberal: the sysctl's former value, "" where it was what we need."""

    liberal: str = ""


class Programs:
    """The programs of one network. directory: its run-time directory. table: the name (family ip) of the table with the rule.

    changed: called with the reason when someone should look. tcx: see Objects.
    """

    def __init__(self, directory: Path, table: str, changed: Callable[[str], None], *, tcx: bool = True) -> None:
        self.told = ""
        """See fastpathdriver.Way."""
        self._file = directory / "fast-path.json"
        self._baked = read_baked("fastpath")
        self._directory = owner_directory("fastpath", directory)
        self._objects = Objects(self._directory, self._baked, tcx=tcx)
        self._table, self._changed = OwnTable(table, changed), changed
        self._path: FastPath | None = None  # as it was put in place by this process
        self._limit = ""  # why the programs do not encapsulate
        self._attached: dict[Attachment, int] = {}  # to devices of this index
        self._watch: PortWatch | None = None

    @property
    def exists(self) -> bool:
        """See fastpathdriver.Way."""
        return self._objects.exists or self._file.exists()

    def counters(self) -> dict[str, int]:
        """Packets by what became of them (fastpath.COUNTERS); none where there are no programs."""
        counters = self._objects.maps.get("counters")
        return {name: counters.total(number) for number, name in enumerate(COUNTERS)} if counters else {}

    async def put(self, path: FastPath) -> str:
        """See fastpathdriver.Way."""
        if reason := _reason_against(path) or self._attach(path):
            return reason
        # Last what lets flows in. Only with it conntrack is sure to be there, and has the setting.
        await self._table.commit(fastpath.table(path, self._table.name))
        self._become_liberal()
        if self._watch is None:
            self._watch = PortWatch(self._links_changed)
        self.told = f"between containers and {path.underlay}"
        if path.form != "plain":
            self.told += f", {path.form} headers by the programs"
        if self._limit:
            self.told = f"between containers and {path.tunnel}, which encapsulates: {self._limit}"
        return ""

    async def as_put(self) -> bool:
        """See fastpathdriver.Way."""
        assert self._path
        expected = [each for each, index in self._attached.items() if device_index(each.device) == index]
        if len(self._objects.attached(expected)) != len(expected):
            return False
        self._follow_ports()
        if self._objects.maps["conf"].get(bytes(4)) != fastpath.conf(self._path):
            return False
        return sysctl.read(LIBERAL) == "1" and await self._table.as_committed()

    async def remove(self) -> None:
        """See fastpathdriver.Way."""
        self._unwatch()
        await self._table.delete()
        self._spare_connections()
        devices = tuple(interface.name for interface in read_interfaces())
        self._objects.detach(Places(devices, devices, devices).attachments())
        self._objects.remove()
        self._put_back()
        self._path, self._attached = None, {}

    async def close(self) -> None:
        """See fastpathdriver.Way."""
        self._unwatch()
        self._objects.close()

    def _follow_ports(self) -> None:
        """Attach to containers and devices that have come, and forget those that are gone. Raises BpfError, OSError."""
        assert self._path
        wire, ports = fastpath.wire(self._path, wraps=not self._limit), container_ports(self._path.subnet)
        places = Places(wire, tuple(ports), fastpath.merging(self._path))
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

    def _unwatch(self) -> None:
        watch, self._watch = self._watch, None
        if watch:
            watch.close()
        self._table.close()

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
            self._path = path
            self._objects.maps["conf"].put(bytes(4), fastpath.conf(path))
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
    kernel = kernel_release()
    if reason := syscall.unsupported():
        return reason
    if kernel < _NEEDS:
        return f"Linux {kernel[0]}.{kernel[1]} is too old: it needs {_NEEDS[0]}.{_NEEDS[1]}"
    if reason := probe.missing_capabilities(kernel):
        return reason
    if find("nft") is None:
        return "nft is not installed"
    return "" if is_ethernet(path.underlay) else f"{path.underlay} is no Ethernet device"
