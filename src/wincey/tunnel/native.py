"""The offload engine's compiled core (core/, in C), through ctypes: the loop, the system calls and the packets are its.

The library stands beside this module when the package was built where there is a C compiler. It knows nothing of Python,
and Python's lock is free while it runs. This side keeps the table, answers packets that nobody has, and counts them.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import socket
from collections.abc import Callable
from pathlib import Path

from wincey.tunnel.offload import Offload
from wincey.tunnel.sources import MODES, SourceCheck

LIBRARY = Path(__file__).with_name("core.so")
_ABI = 1  # as in core/core.h
_REFUSED = 1024  # bytes
_BATCH = 64
_FAILURES = ("out.drop.", "in.drop.", "in.error.")
_ERRNOS = 256


class NoCore(Exception):
    """There is no compiled core, or it can't be loaded; the text says why."""


@functools.cache
def load(path: Path = LIBRARY) -> ctypes.CDLL:
    """The library; raises NoCore."""
    if not path.exists():
        raise NoCore("this package was built without a C compiler")
    try:
        library = ctypes.CDLL(str(path))
        if library.wincey_abi() != _ABI:
            raise NoCore(f"{path} is of another release")
    except (OSError, AttributeError) as error:  # of another processor or C library; no library of ours
        raise NoCore(f"{path} can't be loaded: {error}") from None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    for name, result, arguments in (
        ("new", pointer, []),
        ("free", None, [pointer]),
        ("peers", number, [pointer, ctypes.c_char_p, ctypes.c_size_t]),
        ("set", None, [pointer, number, number, number, number, number, ctypes.c_char_p, number]),
        ("outbound", number, [pointer, number, number]),
        ("inbound", number, [pointer, number, number]),
        ("forward", number, [pointer, number, number, number]),
        ("refused", number, [pointer, ctypes.c_char_p, number]),
        ("counter", ctypes.c_char_p, [pointer, number, ctypes.POINTER(ctypes.c_uint64)]),
        ("failure", ctypes.c_uint64, [pointer, number, number]),
    ):
        function = getattr(library, f"wincey_{name}")  # which keeps it, as an index would not
        function.restype, function.argtypes = result, arguments
    return library


class Native(Offload):
    """The same engine, compiled. path: of the library. Raises NoCore."""

    core = "compiled"

    def __init__(
        self,
        tun: int,
        udp: socket.socket,
        refuse: Callable[[bytes, float], bool],
        *,
        header: bool = False,
        path: Path = LIBRARY,
    ) -> None:
        super().__init__(tun, udp, refuse, header=header)
        self._library = load(path)
        self._core = self._library.wincey_new()
        if not self._core:
            raise NoCore("no memory for its buffers")
        self._packet = ctypes.create_string_buffer(_REFUSED)
        self._set()

    @property
    def counters(self) -> dict[str, int]:
        counters = dict(self._counters)
        value = ctypes.c_uint64()
        index = 0
        while name := self._library.wincey_counter(self._core, index, ctypes.byref(value)):
            if value.value:
                counters[name.decode()] = counters.get(name.decode(), 0) + value.value
            index += 1
        for what, prefix in enumerate(_FAILURES):
            for number in range(_ERRNOS):
                if count := self._library.wincey_failure(self._core, what, number):
                    name = prefix + errno.errorcode.get(number, "error")
                    counters[name] = counters.get(name, 0) + count
        return counters

    def prepare(self) -> None:
        super().prepare()
        self._set()

    def restrict(self, check: SourceCheck) -> None:
        super().restrict(check)
        self._set()

    def rebind(self, udp: socket.socket) -> None:
        super().rebind(udp)
        self._set()

    def update(self, records: bytes) -> None:
        super().update(records)
        whole = self.table.records()
        if self._library.wincey_peers(self._core, whole, len(self.table)):
            raise MemoryError(f"no memory for {len(self.table)} peers")

    def outbound(self) -> None:
        for _ in range(_BATCH):  # once, but for packets to refuse: the core leaves those to us one by one
            if not self._done(self._library.wincey_outbound(self._core, self.tun, self.udp.fileno())):
                return

    def inbound(self) -> None:
        self._done(self._library.wincey_inbound(self._core, self.tun, self.udp.fileno()))

    def forward(self, control: int) -> None:
        for _ in range(_BATCH):  # it comes back for a signal, a word on `control`, and each packet to refuse
            epoll = self._epoll(control).fileno()
            if not self._done(self._library.wincey_forward(self._core, epoll, self.tun, self.udp.fileno())):
                return

    def close(self) -> None:
        super().close()
        if self._core:
            self._counters = self.counters
            self._library.wincey_free(self._core)
            self._core = None

    def _done(self, result: int) -> bool:
        """What follows a call: whether there was a packet to refuse. Raises OSError when the device is gone."""
        length = self._library.wincey_refused(self._core, self._packet, _REFUSED)
        if length:
            self._answer(self._packet.raw[:length])
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return bool(length)

    def _set(self) -> None:
        check = self.check
        self._library.wincey_set(
            self._core,
            self._port,
            self._trains,
            self._merge_tcp,
            self._merge_udp,
            MODES.index(check.mode),
            check.network,
            check.length,
        )
