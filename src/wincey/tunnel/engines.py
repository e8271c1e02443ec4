"""Which engine moves a tunnel's packets in this process: the one that is wanted, or the next best with the reason why."""

from __future__ import annotations

import socket
from collections.abc import Callable

from wincey.tunnel.offload import Offload
from wincey.tunnel.relay import Relay

OFFLOAD, PLAIN = "offload", "plain"
ENGINES = (OFFLOAD, PLAIN)


def engage(
    wanted: str, tun: int, udp: socket.socket, refuse: Callable[[bytes, float], bool], *, header: bool
) -> tuple[Relay, str]:
    """The engine, prepared, and why it is not a better one, "" when it is what was wanted at its best.

    wanted: of ENGINES. header: whether packets on the device have the virtio header; without it there is only the plain one.
    """
    reasons = []
    if wanted == OFFLOAD:
        engine: Relay | None
        engine, reason = _compiled(tun, udp, refuse, header=header)
        if reason:
            reasons.append(f"no compiled core: {reason}")
        engine = engine or Offload(tun, udp, refuse, header=header)
        try:
            engine.prepare()
        except OSError as error:
            engine.close()
            reasons = [f"no offloads: {error.strerror or error}"]
        else:
            return engine, "; ".join(reasons)
    engine = Relay(tun, udp, refuse, header=header)
    engine.prepare()
    return engine, "; ".join(reasons)


def _compiled(
    tun: int, udp: socket.socket, refuse: Callable[[bytes, float], bool], *, header: bool
) -> tuple[Relay | None, str]:
    try:
        from wincey.tunnel.native import Native, NoCore  # noqa: PLC0415  # 1 MB, which the plain engine does without
    except ImportError as error:  # a Python without ctypes
        return None, str(error)
    try:
        return Native(tun, udp, refuse, header=header), ""
    except NoCore as error:
        return None, str(error)
