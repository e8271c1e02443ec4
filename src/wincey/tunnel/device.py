"""The kernel's side of a tunnel: the TUN device, the UDP socket, and the raw socket that ICMP errors leave by.

The TUN is not persistent: it lives as long as a keeper holds its descriptor, handing over included, so a device never
stands without anyone who forwards for it, and nothing of ours is left behind by a crash. The end of the device is what the
reconciler sees, and its repair makes everything anew. (A persistent device would keep address and routes, and swallow
packets in silence; at clean-up nobody would know whose it is.)

It is made persistent where programs in the kernel forward for it (see the control request `configure`, `lasts`): then the keeper
is the one that may go.

Making a device that exists and is held by a process fails with EBUSY. That is also the lock between two daemons that start
a keeper at the same time: of one name in one network namespace there is one holder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import time

from wincey.tunnel.packet import may_be_answered, net_unreachable

_TUNSETIFF, _TUNSETPERSIST, _TUNGETIFF, _TUNSETOFFLOAD = (
    0x400454CA,
    0x400454CB,
    0x800454D2,
    0x400454D0,
)  # linux/if_tun.h
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_PERSIST = 0x0001, 0x1000, 0x4000, 0x0800
_CSUM, _TSO4, _TSO6, _TSO_ECN, _USO = 0x01, 0x02, 0x04, 0x08, 0x60
_UDP_GRO = 104  # linux/udp.h
_SIOCGIFADDR, _SIOCGIFMTU, _SIOCSIFMTU = 0x8915, 0x8921, 0x8922  # linux/sockios.h
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h
_IP_MTU_DISCOVER, _IP_PMTUDISC_DONT = 10, 0  # linux/in.h
_PATIENCE = 1.0  # seconds until another process has let go of a device
_BUFFER = 4 << 20  # bytes a socket may queue: 2,500 full packets ride out a pause of the keeper
_ERRORS_A_SECOND, _ERRORS_AT_ONCE = 1000.0, 50.0  # as the kernel's icmp_msgs_per_sec and icmp_msgs_burst


NO_OFFLOADS = 0
TCP_OFFLOADS = _CSUM | _TSO4 | _TSO6 | _TSO_ECN
ALL_OFFLOADS = TCP_OFFLOADS | _USO
"""What a device may leave to whoever reads it: checksums, and to cut large packets of TCP, and of UDP (Linux 6.2)."""


def open_tun(name: str, *, header: bool = True) -> int:
    """Make the TUN device and return its non-blocking descriptor; raises OSError (EBUSY: another process holds it).

    header: packets have the virtio header, whichever engine reads them: so engines change on the device as it is.
    """
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(
            error.errno, f"/dev/net/tun: {os.strerror(error.errno or 0)} (needs module tun and root)"
        ) from None
    try:
        kind = _IFF_TUN | _IFF_NO_PI | (_IFF_VNET_HDR if header else 0)
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), kind))
        flags = struct.unpack_from("H", fcntl.ioctl(descriptor, _TUNGETIFF, bytes(40)), 16)[0]
        if flags & _IFF_PERSIST:  # someone made it by hand beforehand: from here on its life is ours
            fcntl.ioctl(descriptor, _TUNSETPERSIST, 0)
    except OSError as error:
        os.close(descriptor)
        hint = " (a device of another kind has that name)" if error.errno == errno.EINVAL else ""
        raise OSError(error.errno, f"TUN device {name}: {os.strerror(error.errno or 0)}{hint}") from None
    return descriptor


def has_header(tun: int) -> bool:
    """Whether packets on a TUN have the virtio header; raises OSError when the device is gone."""
    return bool(struct.unpack_from("H", fcntl.ioctl(tun, _TUNGETIFF, bytes(40)), 16)[0] & _IFF_VNET_HDR)


def reopen_tun(tun: int, *, header: bool) -> int:
    """Give up a descriptor for one of the same device with, or without, the virtio header; raises OSError.

    The kernel changes this only on a device that nobody holds, so the device stands alone for a tenth of a millisecond, and
    what is sent in that time is lost. Raises OSError (EBUSY) when another process holds it, and goes on holding it.
    """
    name = tun_name(tun)
    fcntl.ioctl(tun, _TUNSETPERSIST, 1)
    os.close(tun)
    patience = time.monotonic() + _PATIENCE
    while True:
        try:
            return open_tun(name, header=header)  # which ends its persistence
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > patience:
                raise
        time.sleep(0.001)


def set_offloads(tun: int, choices: list[int]) -> int:
    """Have the kernel leave work on packets to us; returns the first of `choices` that it takes. Raises OSError."""
    for offloads in choices:
        try:
            fcntl.ioctl(tun, _TUNSETOFFLOAD, offloads)
        except OSError as error:
            if offloads == choices[-1]:
                raise OSError(error.errno, f"TUN offloads: {os.strerror(error.errno or 0)}") from None
        else:
            return offloads
    raise ValueError("no choice of offloads")


def set_merging(udp: socket.socket, *, on: bool) -> bool:
    """Have the kernel merge datagrams of one size (UDP_GRO, Linux 5.0), or not; returns whether it does."""
    try:
        udp.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, int(on))
    except OSError:
        return False
    return on


def remove_leftover(name: str) -> None:
    """Remove a TUN device that outlived its keeper; one that somebody holds, and what is no TUN, is left alone."""
    try:
        socket.if_nametoindex(name)
        os.close(open_tun(name))  # which ends its persistence
    except OSError:
        pass  # not there, held, or of another kind


def set_lasting(descriptor: int, on: bool) -> None:
    """Whether the device outlives its descriptors; raises OSError."""
    fcntl.ioctl(descriptor, _TUNSETPERSIST, int(on))


def is_lasting(descriptor: int) -> bool:
    """See set_lasting; raises OSError when the device is gone."""
    flags = struct.unpack_from("H", fcntl.ioctl(descriptor, _TUNGETIFF, bytes(40)), 16)[0]
    return bool(flags & _IFF_PERSIST)


def tun_name(descriptor: int) -> str:
    """The present name of the device (people rename devices); raises OSError when it is gone."""
    request = fcntl.ioctl(descriptor, _TUNGETIFF, bytes(40))
    return request[:16].rstrip(b"\0").decode()


def open_udp(local: str, port: int) -> socket.socket:
    """The UDP socket at the local address and port, non-blocking; raises OSError.

    The outer packets have DF clear, as flannel's: the inner sender has been told the TUN's MTU and can't be told about a
    narrower place in the underlay, so there the underlay may fragment, which is slow, but arrives.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT)
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        sock.bind((local, port))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"UDP {local}:{port}: {os.strerror(error.errno or 0)}") from None
    return sock


class Interface:
    """What the tunnel needs from the host beside its two descriptors, through one raw socket (IPPROTO_RAW: send only).

    An ICMP error written into the TUN would come from a local address, and current kernels drop that as a martian, so it
    leaves from the host itself. It reaches containers and local processes alike.
    """

    def __init__(self, tun: int) -> None:
        self.tun = tun
        self._raw = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW)
        self._tokens = _ERRORS_AT_ONCE
        self._filled = 0.0

    @property
    def name(self) -> str:
        """The device's present name; "" when this network namespace has it no more."""
        try:
            self._request(_SIOCGIFMTU)
            return tun_name(self.tun)
        except OSError:
            return ""

    @property
    def mtu(self) -> int:
        """The device's MTU in bytes; raises OSError."""
        return int(struct.unpack_from("i", self._request(_SIOCGIFMTU), 16)[0])

    @mtu.setter
    def mtu(self, value: int) -> None:
        try:
            self._request(_SIOCSIFMTU, struct.pack("i", value))
        except OSError as error:
            raise OSError(error.errno, f"MTU {value}: {os.strerror(error.errno or 0)}") from None

    def refuse(self, packet: bytes, now: float) -> bool:
        """Tell the packet's sender that its network is unreachable. False when that may not be said, or not so often.

        packet: a whole IPv4 packet. now: seconds of a monotonic clock. Never raises.
        """
        if not may_be_answered(packet):
            return False
        self._tokens = min(_ERRORS_AT_ONCE, self._tokens + (now - self._filled) * _ERRORS_A_SECOND)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        try:
            self._raw.sendto(net_unreachable(packet, self.address()), (socket.inet_ntoa(packet[12:16]), 0))
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Release the raw socket; the TUN's descriptor is its owner's to close."""
        self._raw.close()

    def address(self) -> bytes:
        """The device's IPv4 address, 0.0.0.0 while it has none; raises OSError."""
        try:
            return self._request(_SIOCGIFADDR)[20:24]
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return bytes(4)  # no address yet: the kernel chooses the source

    def _request(self, number: int, value: bytes = b"") -> bytes:
        return fcntl.ioctl(self._raw, number, struct.pack("16s24s", tun_name(self.tun).encode(), value))
