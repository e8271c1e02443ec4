"""An engine of the udp tunnel without a kernel device: a socket pair stands for the TUN, loopback for the underlay."""

import os
import select
import socket
from pathlib import Path

from wincey.tunnel.control import PEER
from wincey.tunnel.large import HEADER
from wincey.tunnel.native import LIBRARY, Native
from wincey.tunnel.offload import Offload
from wincey.tunnel.relay import Relay

CORE = Path(os.environ.get("TEST_CORE") or LIBRARY)  # another build of the core, one with sanitizers
LARGE = ("python", "compiled")
ENGINES = ("bare", "plain", *LARGE)


class Bench:
    """One engine between a device (`host` is its other end) and a peer at 127.0.0.2 that has 10.3.2.0/24."""

    def __init__(self, engine="bare"):
        self.engine = engine
        self.prefix = b"" if engine == "bare" else bytes(HEADER)  # `bare` is the device of an earlier release
        self.host, self.tun = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.udp = bound("127.0.0.1")
        port = self.udp.getsockname()[1]
        self.peer, self.stranger = bound("127.0.0.2", port), bound("127.0.0.3", port)
        self.refused = []
        self.relay = self.made()
        self.relay.update(PEER.pack(bytes((10, 3, 2, 0)), 24, bytes((127, 0, 0, 2))))

    def made(self):
        kinds = {"bare": Relay, "plain": Relay, "python": Offload, "compiled": Native}
        more = {"path": CORE} if self.engine == "compiled" else {}
        header = bool(self.prefix)
        return kinds[self.engine](self.tun.fileno(), self.udp, self.refuse, header=header, **more)

    def bound(self, host, port=0):
        return bound(host, port)

    def refuse(self, packet, now):
        self.refused.append(packet)
        return True

    def from_tun(self, *packets):
        """What arrives at the peer of packets that the device hands over, finished."""
        return self.frames_from_tun(*(self.prefix + packet for packet in packets))

    def frames_from_tun(self, *frames):
        """The same of frames with a header of any content."""
        for frame in frames:
            self.host.send(frame)
        while readable(self.tun):
            self.relay.outbound()
        return drain(self.peer)

    def from_underlay(self, *packets, by=None):
        """What the device is given of datagrams, without the header, which says nothing."""
        frames = self.frames_from_underlay(*packets, by=by)
        assert all(frame.startswith(self.prefix) for frame in frames)
        return [frame[len(self.prefix) :] for frame in frames]

    def frames_from_underlay(self, *packets, by=None):
        for packet in packets:
            (by or self.peer).sendto(packet, self.udp.getsockname())
        while readable(self.udp):
            self.relay.inbound()
        return drain(self.host)

    def counted(self):
        """The counters but for those of system calls."""
        return {name: count for name, count in self.relay.counters.items() if name not in ("out.sends", "in.writes")}

    def close(self):
        self.relay.close()
        for sock in (self.host, self.tun, self.udp, self.peer, self.stranger):
            sock.close()


def bound(host, port=0):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.bind((host, port))
    return sock


def readable(sock):
    return bool(select.select([sock], [], [], 0)[0])


def drain(sock):
    found = []
    while True:
        try:
            found.append(sock.recv(1 << 17))
        except BlockingIOError:
            return found
