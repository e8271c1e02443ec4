"""Why the kernel refused something, in one line that says what to do about it. Pure."""

from __future__ import annotations

import errno

from wincey.kernel.netlink import Refusal
from wincey.model.address import format_address
from wincey.model.state import Link, Object, Route

GONE = frozenset({errno.ESRCH, errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.EADDRNOTAVAIL})
"""What the kernel answers to the deletion of something that is not there."""

_HINTS = {
    errno.EPERM: "changing the network needs root or CAP_NET_ADMIN in this network namespace",
    errno.EACCES: "changing the network needs root or CAP_NET_ADMIN in this network namespace",
    errno.ENOBUFS: "the kernel is short of buffer memory; it is tried again",
    errno.ENOMEM: "the kernel is short of memory; it is tried again",
    errno.ENETDOWN: "its device is down",
}


def explain(item: Object, refusal: Refusal) -> str:
    """The kernel's words, and what is known to help."""
    hint = _HINTS.get(refusal.errno, "")
    if isinstance(item, Link) and refusal.errno == errno.EOPNOTSUPP:
        # Making the device has loaded the module where there is one.
        hint = (
            f"the kernel has no {item.kind} support: load its module with `modprobe {item.kind}`, or use another backend"
            " if it has none"
        )
    elif isinstance(item, Route) and item.gateway and refusal.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        where = f" on {item.device}" if item.device else ""
        hint = (
            f"gateway {format_address(item.gateway)} is not on a network that is directly connected{where}: "
            "host-gw needs all hosts on one layer-2 network"
        )
    elif refusal.errno == errno.EAFNOSUPPORT or (refusal.errno == errno.EOPNOTSUPP and _is_v6(item)):
        hint = "IPv6 seems to be disabled in this kernel"
    return f"{refusal}; {hint}" if hint else str(refusal)


def _is_v6(item: Object) -> bool:
    return isinstance(item, Route) and item.destination.bits == 128
