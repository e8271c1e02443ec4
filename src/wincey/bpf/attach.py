"""Programs at devices: a tcx link pinned in bpffs (Linux 6.6), else a filter of the device's clsact qdisc (any kernel).

Both let a program be replaced from one packet to the next. A link knows its program; when its device goes, it stays pinned with the
device index 0. A filter goes with its device, and lives in the kernel without a pin. Programs of others at the same place run
too: ours say "next" for what is not theirs. Filters have a priority of our own, and the owner in their names; the pin of the program
beside them records where they are.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import zlib
from pathlib import Path
from typing import Literal

import msgspec

from wincey.bpf import syscall
from wincey.bpf.bpffs import decoded, encoded
from wincey.bpf.syscall import BpfError
from wincey.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Netlink,
    NetlinkError,
    attribute,
    attributes,
    message,
    messages,
)

_RTM_NEWQDISC, _RTM_NEWTFILTER, _RTM_DELTFILTER, _RTM_GETTFILTER = 36, 44, 45, 46
_TCMSG = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info
_CLSACT, _CLSACT_HANDLE = 0xFFFFFFF1, 0xFFFF0000
_PARENT = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
_PRIORITY = 0x57C1  # ours
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS, _TCA_BPF_ID = 6, 7, 8, 11
_DIRECT_ACTION = 1
_ETH_P_ALL = socket.htons(3)


class Attachment(msgspec.Struct, frozen=True):
    """One program at one device. `first`: before programs that are there already (tcx alone)."""

    program: str
    device: str
    direction: Literal["ingress", "egress"]
    first: bool = False

    @property
    def place(self) -> str:
        """As a part of a file name."""
        return f"{encoded(self.device)}_{self.direction}_{encoded(self.program)}"


class Attacher:
    """Attaches programs; pins lie in `directory`. tcx: False where filters are to be used whatever the kernel can."""

    def __init__(self, directory: Path, *, tcx: bool = True) -> None:
        self._directory, self._tcx = directory, tcx

    def attach(self, attachment: Attachment, prog: int) -> None:
        """Have this program (a descriptor) be the one that runs there. Raises BpfError."""
        index = device_index(attachment.device)
        if not index:
            raise BpfError(f"attach {attachment.program} to {attachment.device}", errno.ENODEV)
        if self._tcx:
            try:
                self._attach_link(attachment, index, prog)
            except BpfError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._tcx = False  # before Linux 6.6
            else:
                self._drop_filter(attachment)
                return
        _put_filter(attachment, self._name(attachment), index, prog)
        record = self._filter(attachment)
        record.unlink(missing_ok=True)
        syscall.obj_pin(prog, str(record))

    def attached(self, attachment: Attachment) -> int:
        """The number of the program that runs there by us, 0 for none. Raises BpfError."""
        index = device_index(attachment.device)
        if not index:
            return 0
        link = syscall.obj_get(str(self._link(attachment)))
        if link is not None:
            try:
                prog, device = syscall.link_info(link)
            finally:
                os.close(link)
            if device == index:
                return prog
        if not self._filter(attachment).exists():
            return 0
        return _filters(index, attachment.direction).get(self._name(attachment), 0)

    def recorded(self) -> list[Attachment]:
        """All attachments of this owner, whether they work or not."""
        found = []
        for pin in sorted([*self._directory.glob("link_*"), *self._directory.glob("filter_*")]):
            _, device, direction, program = pin.name.split("_")
            found.append(
                Attachment(decoded(program), decoded(device), "ingress" if direction == "ingress" else "egress")
            )
        return found

    def detach(self, attachment: Attachment) -> None:
        """Take ours away from there; none is no error. Raises BpfError."""
        self._drop_link(attachment)
        self._drop_filter(attachment)

    def _drop_link(self, attachment: Attachment) -> None:
        pin = self._link(attachment)
        link = syscall.obj_get(str(pin))
        if link is None:
            return
        try:
            syscall.link_detach(link)
        finally:
            os.close(link)
        pin.unlink(missing_ok=True)

    def _attach_link(self, attachment: Attachment, index: int, prog: int) -> None:
        pin = self._link(attachment)
        link = syscall.obj_get(str(pin))
        if link is not None:
            try:
                if syscall.link_info(link)[1] == index:
                    syscall.link_update(link, prog)
                    return
            finally:
                os.close(link)
            pin.unlink()  # the device was made anew, or somebody detached it by hand
        link = syscall.link_create_tcx(prog, index, ingress=attachment.direction == "ingress", first=attachment.first)
        try:
            syscall.obj_pin(link, str(pin))
        finally:
            os.close(link)

    def _drop_filter(self, attachment: Attachment) -> None:
        record = self._filter(attachment)
        if not record.exists():
            return
        index = device_index(attachment.device)
        if index and self._name(attachment) in _filters(index, attachment.direction):
            _delete_filter(attachment, self._name(attachment), index)
        record.unlink(missing_ok=True)

    def _link(self, attachment: Attachment) -> Path:
        return self._directory / f"link_{attachment.place}"

    def _filter(self, attachment: Attachment) -> Path:
        return self._directory / f"filter_{attachment.place}"

    def _name(self, attachment: Attachment) -> str:
        """A filter's name: two networks may have one program at one device."""
        return f"{attachment.program}@{self._directory.name}"


def device_index(device: str) -> int:
    """The device's index now, 0 when it is not there."""
    try:
        return socket.if_nametoindex(device)
    except OSError:
        return 0


def _handle(name: str) -> int:
    """The filter's handle: a number of its own for each program at one place."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF or 1


def _put_filter(attachment: Attachment, name: str, index: int, prog: int) -> None:
    what = f"attach {attachment.program} to {attachment.device}"
    options = (
        attribute(_TCA_BPF_FD, struct.pack("=I", prog))
        + attribute(_TCA_BPF_NAME, name.encode() + b"\0")
        + attribute(_TCA_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION))
    )
    qdisc = _TCMSG.pack(0, index, _CLSACT_HANDLE, _CLSACT, 0) + attribute(_TCA_KIND, b"clsact\0")
    body = (
        _TCMSG.pack(0, index, _handle(name), _PARENT[attachment.direction], _PRIORITY << 16 | _ETH_P_ALL)
        + attribute(_TCA_KIND, b"bpf\0")
        + attribute(_TCA_OPTIONS | 0x8000, options)
    )
    netlink = Netlink()
    try:
        refusal = netlink.transact([message(_RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, qdisc)]).get(0)
        if refusal and refusal.errno != errno.EEXIST:
            raise BpfError(what, refusal.errno, f"clsact qdisc: {refusal.words}")
        refusal = netlink.transact([message(_RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_REPLACE, body)]).get(0)
        if refusal:
            raise BpfError(what, refusal.errno, f"tc filter: {refusal.words}")
    finally:
        netlink.close()


def _delete_filter(attachment: Attachment, name: str, index: int) -> None:
    body = _TCMSG.pack(
        0, index, _handle(name), _PARENT[attachment.direction], _PRIORITY << 16 | _ETH_P_ALL
    ) + attribute(_TCA_KIND, b"bpf\0")
    netlink = Netlink()
    try:
        refusal = netlink.transact([message(_RTM_DELTFILTER, 0, body)]).get(0)
    finally:
        netlink.close()
    if refusal and refusal.errno not in (errno.ENOENT, errno.ENODEV, errno.EINVAL):
        raise BpfError(f"detach {attachment.program} from {attachment.device}", refusal.errno, refusal.words)


def _filters(index: int, direction: str) -> dict[str, int]:
    """Our filters at one place: the number of the program by its name."""
    netlink = Netlink(strict=False)
    found: dict[str, int] = {}
    try:
        for kind, data, start, end in messages(
            netlink.dump(_RTM_GETTFILTER, _TCMSG.pack(0, index, 0, _PARENT[direction], 0))
        ):
            if kind != _RTM_NEWTFILTER or _TCMSG.unpack_from(data, start)[4] >> 16 != _PRIORITY:
                continue
            options = attributes(data, start + _TCMSG.size, end).get(_TCA_OPTIONS, b"")
            fields = attributes(options, 0, len(options))
            if _TCA_BPF_ID in fields:
                name = fields.get(_TCA_BPF_NAME, b"").rstrip(b"\0").decode(errors="replace")
                found[name] = struct.unpack("=I", fields[_TCA_BPF_ID])[0]
    except NetlinkError as error:
        if error.errno not in (errno.EINVAL, errno.ENODEV, errno.ENOENT, errno.EOPNOTSUPP):
            raise BpfError("tc filters", error.errno or 0) from None
    finally:
        netlink.close()
    return found
