"""One BPF map: keys and values are bytes of fixed sizes, as the layout says."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Mapping

import msgspec

from wincey.bpf import syscall
from wincey.bpf.syscall import BpfError

_BATCH = 4096
_NO_BATCH = frozenset(
    {errno.EINVAL, errno.ENOTSUP, 524}
)  # 524: ENOTSUPP, which is the kernel's own and has no name here


class MapLayout(msgspec.Struct, frozen=True):
    """What a map is: two maps of one layout can take each other's place. key, value: sizes in bytes."""

    kind: int
    key: int
    value: int
    entries: int
    flags: int = 0


class Map:
    """An open map; owns the descriptor."""

    def __init__(self, fd: int, layout: MapLayout) -> None:
        self.fd, self.layout = fd, layout

    @classmethod
    def create(cls, name: str, layout: MapLayout) -> Map:
        """A new, empty map. Raises BpfError."""
        return cls(syscall.map_create(name, **msgspec.structs.asdict(layout)), layout)

    @classmethod
    def opened(cls, path: str) -> Map | None:
        """The map that is pinned there, whatever its layout; None when none is. Raises BpfError."""
        fd = syscall.obj_get(path)
        if fd is None:
            return None
        return cls(fd, MapLayout(*syscall.map_info(fd)))

    def close(self) -> None:
        """Release the descriptor; the map lives on while it is pinned or a program uses it."""
        os.close(self.fd)

    def get(self, key: bytes) -> bytes | None:
        """The value, None when the key is not there."""
        return syscall.map_lookup(self.fd, key, self.layout.value)

    def put(self, key: bytes, value: bytes) -> None:
        """Put one entry."""
        assert (len(key), len(value)) == (self.layout.key, self.layout.value)
        syscall.map_update(self.fd, key, value)

    def delete(self, key: bytes) -> None:
        """Delete one entry, if it is there."""
        syscall.map_delete(self.fd, key)

    def update(self, entries: Mapping[bytes, bytes]) -> None:
        """Put many. In batches, one by one where the kernel has none (tries: Linux 5.13, hashes: 5.6). Raises BpfError."""
        items = list(entries.items())
        for start in range(0, len(items), _BATCH):
            part = items[start : start + _BATCH]
            keys, values = b"".join([key for key, _ in part]), b"".join([value for _, value in part])
            try:
                if len(part) > 1:
                    syscall.map_update_batch(self.fd, keys, values, len(part))
                    continue
            except BpfError as error:
                if error.errno not in _NO_BATCH:
                    raise
            for key, value in part:
                self.put(key, value)

    def remove(self, keys: Iterable[bytes]) -> None:
        """Delete many; those that are not there are no error."""
        for key in keys:
            self.delete(key)

    def items(self) -> dict[bytes, bytes]:
        """All entries, of hashes and tries; entries that are changed meanwhile may be missing or be old."""
        try:
            return self._dump()
        except BpfError as error:
            if error.errno not in _NO_BATCH and error.errno != errno.ENOSPC:
                raise
        return self._walk()

    def make_equal(self, wanted: Mapping[bytes, bytes]) -> None:
        """Change what differs, and nothing else; additions before removals."""
        found = self.items()
        self.update({key: value for key, value in wanted.items() if found.get(key) != value})
        self.remove(found.keys() - wanted.keys())

    def total(self, index: int) -> int:
        """The sum over all processors of one 64-bit counter of a per-processor array."""
        size = (self.layout.value + 7) & ~7
        value = syscall.map_lookup(self.fd, struct.pack("=I", index), size * processors())
        assert value is not None
        return sum(struct.unpack_from("=Q", value, at)[0] for at in range(0, len(value), size))

    def _dump(self) -> dict[bytes, bytes]:
        key, value = self.layout.key, self.layout.value
        found: dict[bytes, bytes] = {}
        token: bytes | None = None
        while True:
            keys, values, token = syscall.map_lookup_batch(self.fd, token, key, value, _BATCH)
            for number in range(len(keys) // key):
                found[keys[number * key : (number + 1) * key]] = values[number * value : (number + 1) * value]
            if token is None:
                return found

    def _walk(self) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        key: bytes | None = None
        while (key := syscall.map_next_key(self.fd, key, self.layout.key)) is not None:
            if key in found:  # deleted under our hands, the kernel began anew
                break
            value = self.get(key)
            if value is not None:
                found[key] = value
        return found


def processors() -> int:
    """Possible processors of this kernel: a per-processor map has a value for each."""
    with open("/sys/devices/system/cpu/possible") as file:
        return max(int(part.split("-")[-1]) for part in file.read().strip().split(",")) + 1
