"""A cable that loses, delays and duplicates: `python -m wincey.lab.chaos.cable PORT TAP DELAY_MS LOSS DUPLICATE`.

It runs where the switch is, between PORT, the switch's end of a host's cable, and TAP, which it makes to take its place in the
bridge; the kernel needs no netem for it. Frames pass with the header by which the kernel tells what it has put off (checksums,
segmentation), packet(7) PACKET_VNET_HDR and tun's IFF_VNET_HDR, so that they stay as they are. LOSS and DUPLICATE are shares of
frames, 0 to 1, in each direction. It says `ready` when the TAP is there.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import socket
import struct
import sys
import time
from typing import NamedTuple

_TUNSETIFF, _IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x400454CA, 0x0002, 0x1000, 0x4000
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING, _ETH_P_ALL = 263, 15, 23, 0x0003
_FRAME = 70_000
_AT_ONCE = 64


class Weather(NamedTuple):
    """What a cable does to frames. delay: seconds; loss, duplicate: shares."""

    delay: float
    loss: float
    duplicate: float


def _tap(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    return descriptor


def _port(name: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
    port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    port.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    port.bind((name, _ETH_P_ALL))
    return port


def carry(ends: tuple[int, int], weather: Weather) -> None:
    """Carry frames between two descriptors, for ever."""
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    chance = random.Random().random  # noqa: S311  # weather is no secret
    while True:
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, end, frame = heapq.heappop(waiting)
            _write(end, frame)
        for end in select.select(ends, (), (), max(0.0, waiting[0][0] - now) if waiting else None)[0]:
            for frame in _frames(end):
                for _ in range(2 if chance() < weather.duplicate else 1):
                    if chance() >= weather.loss:
                        number += 1
                        heapq.heappush(waiting, (time.monotonic() + weather.delay, number, other[end], frame))


def _frames(end: int) -> list[bytes]:
    found: list[bytes] = []
    while len(found) < _AT_ONCE:
        try:
            found.append(os.read(end, _FRAME))
        except OSError:  # nothing more for now; or the device is down, which loses frames and ends nothing
            break
    return found


def _write(end: int, frame: bytes) -> None:
    try:
        os.write(end, frame)
    except OSError:  # full, or down: a lost frame
        return


def main() -> None:
    """Make the TAP and carry."""
    port, tap, delay, loss, duplicate = sys.argv[1:]
    ends = _port(port), _tap(tap)
    print("ready", flush=True)
    carry((ends[0].fileno(), ends[1]), Weather(float(delay) / 1000, float(loss), float(duplicate)))


if __name__ == "__main__":
    main()
