"""bpf(2) through ctypes (linux/bpf.h, union bpf_attr): every command that we use, and one class of error.

The kernel takes a shorter attribute than its own and fills it up with zeros, and refuses a longer one only where the rest is not
zero: so each command packs what it needs and no more, and one text serves all releases.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
import sys
from typing import Final, TypeAlias

from wincey.model.errors import WinceyError

_NUMBERS: Final = {
    "x86_64": 321,
    "aarch64": 280,
    "riscv64": 280,
    "loongarch64": 280,
    "ppc64le": 361,
    "armv7l": 386,
    "armv8l": 386,
    "i686": 357,
}
"""The number of bpf(2) by machine; of little-endian ones, as the baked programs are."""

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT_KEY = 0, 1, 2, 3, 4
_PROG_LOAD, _OBJ_PIN, _OBJ_GET, _PROG_TEST_RUN, _OBJ_INFO = 5, 6, 7, 10, 15
_LOOKUP_BATCH, _UPDATE_BATCH, _DELETE_BATCH = 24, 26, 27
_LINK_CREATE, _LINK_UPDATE, _LINK_DETACH = 28, 29, 34

HASH, ARRAY, PERCPU_ARRAY, LRU_HASH, LPM_TRIE, DEVMAP = 1, 2, 6, 9, 11, 14
SCHED_CLS, XDP = 3, 6
TCX_INGRESS, TCX_EGRESS = 46, 47
_BPF_F_BEFORE = 1 << 3

_LOG_SIZE = 1 << 20
_OUT_SIZE = 1 << 17  # of a test run: larger than any packet

_Buffer: TypeAlias = "ctypes.Array[ctypes.c_char]"


class BpfError(WinceyError):
    """The kernel refused something; `errno` is its reason, the text says what, why and what to do."""

    def __init__(self, what: str, number: int, detail: str = "") -> None:
        self.errno = number
        hint = _HINTS.get(number, "")
        super().__init__(f"{what}: {os.strerror(number)}{hint}" + (f": {detail}" if detail else ""))


_HINTS = {
    errno.EPERM: " (needs the capabilities CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN; before Linux 5.8 CAP_SYS_ADMIN)",
    errno.ENOSYS: " (this kernel has no bpf(2))",
    errno.ENOMEM: " (out of memory, or of RLIMIT_MEMLOCK before Linux 5.11)",
}


def unsupported() -> str:
    """Why bpf(2) can't be called from here; "" if it can."""
    if sys.byteorder != "little":
        return f"the programs are built for little-endian machines, and this one ({platform.machine()}) is big-endian"
    if platform.machine() not in _NUMBERS:
        return f"the number of bpf(2) on {platform.machine()} is not known to us"
    return ""


def map_create(name: str, *, kind: int, key: int, value: int, entries: int, flags: int) -> int:
    """A new map's descriptor. key, value: sizes in bytes."""
    attr = struct.pack("=IIIIIII16s", kind, key, value, entries, flags, 0, 0, name.encode()[:15])
    return _call(_MAP_CREATE, attr, f"BPF map {name}")


def map_lookup(fd: int, key: bytes, size: int) -> bytes | None:
    """The value of `size` bytes, None when the key is not there."""
    keys, value = _buffer(key), _room(size)
    try:
        _call(_MAP_LOOKUP, struct.pack("=IIQQQ", fd, 0, _at(keys), _at(value), 0), "BPF map lookup")
    except BpfError as error:
        if error.errno != errno.ENOENT:
            raise
        return None
    return value.raw


def map_update(fd: int, key: bytes, value: bytes) -> None:
    """Put one entry, over what is there."""
    keys, values = _buffer(key), _buffer(value)
    _call(_MAP_UPDATE, struct.pack("=IIQQQ", fd, 0, _at(keys), _at(values), 0), "BPF map update")


def map_delete(fd: int, key: bytes) -> None:
    """Delete one entry; none of that key is no error."""
    keys = _buffer(key)
    try:
        _call(_MAP_DELETE, struct.pack("=IIQQQ", fd, 0, _at(keys), 0, 0), "BPF map delete")
    except BpfError as error:
        if error.errno != errno.ENOENT:
            raise


def map_next_key(fd: int, key: bytes | None, size: int) -> bytes | None:
    """The key after `key`, the first for None; None at the end."""
    keys, following = _buffer(key or b""), _room(size)
    at = _at(keys) if key is not None else 0
    try:
        _call(_MAP_NEXT_KEY, struct.pack("=IIQQQ", fd, 0, at, _at(following), 0), "BPF map walk")
    except BpfError as error:
        if error.errno != errno.ENOENT:
            raise
        return None
    return following.raw


def map_update_batch(fd: int, keys: bytes, values: bytes, count: int) -> int:
    """Put `count` entries and return how many were put; raises BpfError, after which all may be put again."""
    key_buffer, value_buffer = _buffer(keys), _buffer(values)
    attr = _mutable(struct.pack("=QQQQIIQQ", 0, 0, _at(key_buffer), _at(value_buffer), count, fd, 0, 0))
    _call_in_place(_UPDATE_BATCH, attr, "BPF map update")
    return int(struct.unpack_from("=I", attr, 32)[0])


def map_delete_batch(fd: int, keys: bytes, count: int) -> None:
    """Delete `count` entries; raises BpfError, ENOENT when one of them was not there."""
    key_buffer = _buffer(keys)
    attr = _mutable(struct.pack("=QQQQIIQQ", 0, 0, _at(key_buffer), 0, count, fd, 0, 0))
    _call_in_place(_DELETE_BATCH, attr, "BPF map delete")


def map_lookup_batch(
    fd: int, token: bytes | None, key: int, value: int, count: int
) -> tuple[bytes, bytes, bytes | None]:
    """Up to `count` keys and values from `token` on (None: from the start), and the next token, None at the end."""
    position, following = _buffer(token or bytes(64)), _room(max(64, key))
    keys, values = _room(key * count), _room(value * count)
    at = 0 if token is None else _at(position)
    attr = _mutable(struct.pack("=QQQQIIQQ", at, _at(following), _at(keys), _at(values), count, fd, 0, 0))
    last = False
    try:
        _call_in_place(_LOOKUP_BATCH, attr, "BPF map dump")
    except BpfError as error:
        if error.errno != errno.ENOENT:
            raise
        last = True
    found = struct.unpack_from("=I", attr, 32)[0]
    return keys.raw[: found * key], values.raw[: found * value], None if last else following.raw


def prog_load(kind: int, instructions: bytes, name: str, license_text: str) -> int:
    """Have the verifier check a program and the JIT translate it; raises BpfError with the verifier's last words."""
    code, text = _buffer(instructions), _buffer(license_text.encode() + b"\0")

    def load(level: int, log: _Buffer | None) -> int:
        room = (len(log), _at(log)) if log else (0, 0)
        head = (kind, len(instructions) // 8, _at(code), _at(text), level, *room)
        attr = struct.pack("=IIQQIIQII16sI", *head, 0, 0, name.encode()[:15], 0)
        return _call(_PROG_LOAD, attr, f"BPF program {name}")

    try:
        return load(0, None)
    except BpfError as error:
        if error.errno in (errno.EPERM, errno.ENOSYS):
            raise
        log = _room(_LOG_SIZE)
        try:
            return load(1, log)
        except BpfError as refused:
            lines = [line for line in log.value.decode(errors="replace").splitlines() if line.strip()]
            words = [line for line in lines if not line.startswith(("processed ", "verification time"))]
            raise BpfError(f"BPF program {name}", refused.errno, "; ".join(words[-2:])[-300:]) from None


def obj_pin(fd: int, path: str) -> None:
    """Give a map, program or link a name in bpffs: it lives as long as that."""
    text = _buffer(path.encode() + b"\0")
    _call(_OBJ_PIN, struct.pack("=QII", _at(text), fd, 0), f"pin {path}")


def obj_get(path: str) -> int | None:
    """The descriptor of what is pinned there, None when nothing is."""
    text = _buffer(path.encode() + b"\0")
    try:
        return _call(_OBJ_GET, struct.pack("=QII", _at(text), 0, 0), f"open {path}")
    except BpfError as error:
        if error.errno != errno.ENOENT:
            raise
        return None


def map_info(fd: int) -> tuple[int, int, int, int, int]:
    """Kind, key size, value size, entries and flags of a map."""
    kind, _, key, value, entries, flags = struct.unpack_from("=IIIIII", _info(fd))
    return kind, key, value, entries, flags


def prog_id(fd: int) -> int:
    """The program's number in this kernel: no other has it as long as it lives."""
    return int(struct.unpack_from("=II", _info(fd))[1])


def link_info(fd: int) -> tuple[int, int]:
    """The number of the program and the index of the device of a tcx link; index 0 when the device or the attachment is gone."""
    found = _info(fd)
    return int(struct.unpack_from("=III", found)[2]), int(struct.unpack_from("=I", found, 16)[0])


def link_create_tcx(prog: int, ifindex: int, *, ingress: bool, first: bool) -> int:
    """Attach by a tcx link (Linux 6.6), as the first or the last there; raises BpfError, EINVAL on an older kernel."""
    place = TCX_INGRESS if ingress else TCX_EGRESS
    attr = struct.pack("=IIIIIIQ", prog, ifindex, place, _BPF_F_BEFORE if first else 0, 0, 0, 0)
    return _call(_LINK_CREATE, attr, "tcx link")


def link_update(link: int, prog: int) -> None:
    """Put another program in the place of a link's, from one packet to the next."""
    _call(_LINK_UPDATE, struct.pack("=IIII", link, prog, 0, 0), "tcx link update")


def link_detach(link: int) -> None:
    """Detach now, whoever still holds the link; one that is detached already is no error."""
    try:
        _call(_LINK_DETACH, struct.pack("=I", link), "tcx link detach")
    except BpfError as error:
        if error.errno not in (errno.ENOLINK, errno.ENODEV, errno.EINVAL):
            raise


def prog_test_run(prog: int, data: bytes, *, context: bytes = b"", repeat: int = 1) -> tuple[int, bytes, int]:
    """Run a program on a packet that goes nowhere: its verdict, the packet as it left it, nanoseconds for one run.

    data: the frame with its Ethernet header, of which the kernel reads protocol and packet type. context: struct __sk_buff.
    """
    packet, out, fields = _buffer(data), _room(_OUT_SIZE), _buffer(context)
    at = _at(fields) if context else 0
    numbers = (prog, 0, len(data), _OUT_SIZE, _at(packet), _at(out), repeat, 0, len(context), 0, at, 0)
    attr = _mutable(struct.pack("=IIIIQQIIIIQQ", *numbers))
    _call_in_place(_PROG_TEST_RUN, attr, "BPF test run")
    _, verdict, _, size, _, _, _, duration = struct.unpack_from("=IIIIQQII", attr)
    return verdict, out.raw[:size], duration


def _info(fd: int) -> bytes:
    room = _room(256)
    _call(_OBJ_INFO, struct.pack("=IIQ", fd, len(room), _at(room)), "BPF object info")
    return room.raw


def _call(command: int, attr: bytes, what: str) -> int:
    return _call_in_place(command, _mutable(attr), what)


def _call_in_place(command: int, attr: _Buffer, what: str) -> int:
    """The system call; its attribute comes back changed. Raises BpfError."""
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise BpfError(what, errno.ENOSYS)
    result = int(_libc().syscall(ctypes.c_long(number), ctypes.c_int(command), attr, ctypes.c_uint(len(attr))))
    if result < 0:
        raise BpfError(what, ctypes.get_errno())
    return result


_loaded: list[ctypes.CDLL] = []


def _libc() -> ctypes.CDLL:
    if not _loaded:
        _loaded.append(ctypes.CDLL(None, use_errno=True))
        _loaded[0].syscall.restype = ctypes.c_long
        _lift_memlock()
    return _loaded[0]


def _lift_memlock() -> None:
    # Before Linux 5.11 maps and programs are charged to RLIMIT_MEMLOCK, of which there is next to nothing by default.
    import resource  # noqa: PLC0415  # here alone

    with contextlib.suppress(ValueError, OSError):  # not permitted: a kernel that minds says so where it matters
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _buffer(data: bytes) -> _Buffer:
    return ctypes.create_string_buffer(data, max(1, len(data)))


def _room(size: int) -> _Buffer:
    return ctypes.create_string_buffer(max(1, size))


def _mutable(attr: bytes) -> _Buffer:
    return ctypes.create_string_buffer(attr, len(attr))


def _at(buffer: _Buffer) -> int:
    return ctypes.addressof(buffer)
