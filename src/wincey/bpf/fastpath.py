"""What the fast path's programs (c/fastpath.c) are told, where they are attached, and the nft rule that lets flows in. Pure."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterable

import msgspec

from wincey.bpf.attach import Attachment
from wincey.bpf.udp import pairs_of
from wincey.kernel import nft
from wincey.kernel.conntrack import Connection
from wincey.kernel.flowtable import PRIORITY, STEM, flows
from wincey.model.fastpath import FastPath

COUNTERS = ("out", "in", "learned-out", "learned-in", "too-large", "wrong-source")
"""Packets by what became of them, in the order of the programs: taken out of a container and into one, those that taught this, and those
that were left to the ordinary path for being larger than what it had let pass, or for coming from elsewhere."""

LIBERAL = "net/netfilter/nf_conntrack_tcp_be_liberal"
"""conntrack sees a packet a second of a flow: without this it would take those for strays (INVALID), which rules often drop."""

_FORMS = {"plain": 14, "udp": 42, "vxlan": 64}
_CONF = struct.Struct("=I4s4s4sI2sH")  # struct conf

_KEY = struct.Struct(">4s4sHHI")  # struct key, read in network byte order


class Places(msgspec.Struct, frozen=True):
    """Where the programs are attached. wire: devices that packets leave and come by. ports: the host's ends of containers' cables.

    merging: where what the udp backend has merged comes out; there, and then at the wire's ingress too, ours come before those of that
    backend. Elsewhere others' programs come first.
    """

    wire: tuple[str, ...]
    ports: tuple[str, ...]
    merging: tuple[str, ...] = ()

    def attachments(self) -> list[Attachment]:
        """Those that learn before those that act on it."""
        return [
            *(Attachment("fast_learn_out", device, "egress") for device in self.wire),
            *(Attachment("fast_learn_in", port, "egress") for port in self.ports),
            *(Attachment("fast_merged", device, "ingress", first=True) for device in self.merging),
            *(Attachment("fast_in", device, "ingress", first=bool(self.merging)) for device in self.wire),
            *(Attachment("fast_out", port, "ingress") for port in self.ports),
        ]


def wire(path: FastPath, *, wraps: bool) -> tuple[str, ...]:
    """The devices that packets leave and come by. wraps: what encapsulation there is the programs do themselves."""
    return (path.underlay,) if wraps else (path.tunnel, path.underlay)


def merging(path: FastPath) -> tuple[str, ...]:
    """The device that merged packets of the udp backend come out of."""
    return (pairs_of(path.tunnel)[1].out,) if path.form == "udp" else ()


def conf(path: FastPath) -> bytes:
    """The value of the map `conf`. Whether the programs wrap is not said: they learn from what leaves by which device."""
    return _CONF.pack(
        path.mark,
        path.local,
        path.subnet.address,
        _mask(path.subnet.length),
        socket.htonl(path.vni << 8),
        path.port.to_bytes(2, "big"),
        _FORMS[path.form],
    )


def connections(keys: Iterable[bytes]) -> list[Connection]:
    """The TCP connections among the keys of the map `flows`, as their containers' packets have them."""
    read = (_KEY.unpack(key) for key in keys)
    return [
        Connection(here, there, here_port, there_port)
        for here, there, here_port, there_port, protocol in read
        if protocol == socket.htonl(socket.IPPROTO_TCP)
    ]


def table_name(stem: str) -> str:
    """The nftables table (family ip) of the network whose subnet file has this stem."""
    return STEM if stem == "subnet" else f"{STEM}-" + re.sub(r"[^A-Za-z0-9_.-]", "_", stem)


def table(path: FastPath, name: str) -> str:
    """The script that replaces the table by one for this path, in one transaction."""
    return nft.deletion(("ip", name)) + "".join(
        f"{line}\n"
        for line in (
            f"table ip {name} {{",
            "    chain forward {",
            f"        type filter hook forward priority {PRIORITY}; policy accept;",
            *(f"        {flow} meta mark set meta mark | {path.mark:#x}" for flow in flows(path)),
            "    }",
            "}",
        )
    )


def _mask(length: int) -> bytes:
    return ((0xFFFFFFFF << (32 - length)) & 0xFFFFFFFF).to_bytes(4, "big")
