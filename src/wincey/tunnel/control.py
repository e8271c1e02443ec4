"""The control socket's frames, and the names that keeper and daemon find each other by.

A frame is two lengths (4 bytes each, network byte order), a JSON object and a body of peer records. A connection carries
requests, and one reply for each in order, with `error` in it if it failed:

    {"do": "show", "peers": BOOL}    -> build, device, mtu, local, port, counters; body: the peer table, if asked for
    {"do": "configure", "mtu", "local", "port"}   device MTU; another local address or port is a new UDP socket
    {"do": "peers"} + body           records in order (see table.PeerTable)
    {"do": "handover"}               -> descriptors of TUN and UDP socket beside the reply; both keepers may then forward
    {"do": "taken"}                  the one that asked for them has them: end, leave the control path to it -> counters
    {"do": "stop"}                   end; the device is gone when the reply comes

The keeper's docstring has what was added: engines, the check of sources. A later version may add more. `show`, `handover`, `taken`, `stop` and the peer record stay as they are, so that any
version can take over from any other. The end of the connection tells the daemon that the keeper has ended.
"""

from __future__ import annotations

import json
import os
import socket
import struct

from wincey import __version__

BUILD = f"1/{__version__}"
"""What a keeper runs: protocol and release. The daemon replaces a keeper of another build through `handover`."""

BUSY = 3
"""Exit code of a keeper's start that found the device held by another process."""

PEER = struct.Struct("!4sB4s")
_LENGTHS = struct.Struct("!II")
_LIMIT = 64 << 20  # bytes of a frame: seven million peers; more is not ours

Header = dict[str, object]


def encode(header: Header, body: bytes = b"") -> bytes:
    """One frame."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return _LENGTHS.pack(len(text), len(body)) + text + body


def decode(buffer: bytearray) -> tuple[Header, bytes] | None:
    """Take the first frame out of `buffer`; None while it is not whole. Raises ValueError for what is no frame."""
    if len(buffer) < _LENGTHS.size:
        return None
    text, body = _LENGTHS.unpack_from(buffer)
    end = _LENGTHS.size + text + body
    if end > _LIMIT:
        raise ValueError(f"a control frame of {end} bytes")
    if len(buffer) < end:
        return None
    header = json.loads(buffer[_LENGTHS.size : _LENGTHS.size + text])
    if not isinstance(header, dict):
        raise ValueError("a control frame without an object")
    content = bytes(buffer[_LENGTHS.size + text : end])
    del buffer[:end]
    return header, content


def control_name(device: str) -> str:
    """The file name of the control socket of a device in this network namespace.

    Hosts in network namespaces may share a file system, and each of them may have a `flannel0`.
    """
    return f"udp-{device}-{os.stat('/proc/self/ns/net').st_ino}.sock"


class DirectoryAddress:
    """Lets a unix socket have a path of any length: the directory is opened, and named by its descriptor.

    The kernel takes 107 bytes of path, and state directories may lie deeper.
    """

    def __init__(self, path: str) -> None:
        self._directory, self._name = os.path.split(path)
        self._descriptor = -1

    def __enter__(self) -> str:
        self._descriptor = os.open(self._directory or ".", os.O_PATH | os.O_DIRECTORY)
        return f"/proc/self/fd/{self._descriptor}/{self._name}"

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def connect(path: str, *, blocking: bool) -> socket.socket:
    """Connect to a keeper; raises FileNotFoundError or ConnectionRefusedError when there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(blocking)
        with DirectoryAddress(path) as address:
            sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock
