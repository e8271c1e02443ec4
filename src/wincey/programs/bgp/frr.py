"""FRR: the configuration of bgpd for a speaker and its neighbours, the commands that lead from one to the next, and what
`show bgp summary json` tells. Pure.

Removing and adding a neighbour is all that is ever changed in a running bgpd: the others' sessions are not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from wincey.model.address import Address, format_address, parse_address
from wincey.model.bgp import BgpPeer, BgpSpeaker
from wincey.model.errors import UNREADABLE, BadAddress
from wincey.programs.bgp.session import Session

RESTART_TIME = 120
"""Seconds for which neighbours keep our routes while bgpd is started anew."""

_HEAD = "! Written by flanneld, which writes it anew at every change.\n"


def config(speaker: BgpSpeaker, peers: Iterable[BgpPeer], log: str) -> str:
    """What bgpd is started with. log: its log file."""
    lines = [f"log file {log} warnings", *_filters(speaker), f"router bgp {speaker.asn}"]
    lines += [
        f" bgp router-id {format_address(speaker.router_id)}",
        " no bgp default ipv4-unicast",
        " no bgp ebgp-requires-policy",
        # The subnet is announced by its lease, whether or not there is a route to it yet.
        " no bgp network import-check",
        " bgp graceful-restart",
        " bgp graceful-restart preserve-fw-state",
        f" bgp graceful-restart restart-time {RESTART_TIME}",
        # We announce one subnet, whatever the neighbours tell: there is nothing to wait for.
        " bgp graceful-restart select-defer-time 2",
    ]
    for subnet in speaker.subnets:
        version = 4 if subnet.bits == 32 else 6
        lines += [f" address-family ipv{version} unicast", f"  network {subnet}", " exit-address-family"]
    for peer in sorted(peers, key=lambda peer: (len(peer.address), peer.address)):
        lines += add(speaker, peer)
    return _HEAD + "\n".join(lines) + "\n"


def zebra_config(log: str) -> str:
    """What zebra is started with."""
    # Next hop objects would stay in the kernel when zebra is killed.
    return _HEAD + f"log file {log} warnings\nno zebra nexthop kernel enable\n"


def bfdd_config(log: str) -> str:
    """What bfdd is started with."""
    return _HEAD + f"log file {log} warnings\n"


def add(speaker: BgpSpeaker, peer: BgpPeer) -> list[str]:
    """The lines that make a neighbour, for a file and for the configuration prompt alike."""
    address = format_address(peer.address)
    local = speaker.local if len(peer.address) == 4 else speaker.local_v6
    version, ip = (4, "ip") if len(peer.address) == 4 else (6, "ipv6")
    lines = [
        f"{ip} prefix-list wincey-{address} seq {number} permit {subnet}"
        for number, subnet in enumerate(peer.subnets, start=1)
    ]
    lines += [
        f"router bgp {speaker.asn}",
        f" neighbor {address} remote-as {peer.asn}",
        f" neighbor {address} port {peer.port}",
        f" neighbor {address} timers {max(1, speaker.hold // 3)} {speaker.hold}",
        f" neighbor {address} timers connect 5",
    ]
    if local:
        lines.append(f" neighbor {address} update-source {format_address(local)}")
    if speaker.password.value:
        lines.append(f" neighbor {address} password {speaker.password.value}")
    if speaker.bfd:
        lines.append(f" neighbor {address} bfd")
    accepted = f"wincey-{address}" if peer.subnets else f"wincey-accepted{version}"
    lines += [
        f" address-family ipv{version} unicast",
        f"  neighbor {address} activate",
        f"  neighbor {address} next-hop-self",
        f"  neighbor {address} prefix-list {accepted} in",
        f"  neighbor {address} prefix-list wincey-own{version} out",
    ]
    if peer.asn != speaker.asn:
        # All hosts have one AS, and so their subnets come back from a router with it in their path.
        lines.append(f"  neighbor {address} allowas-in 1")
    return [*lines, " exit-address-family", "exit"]


def remove(speaker: BgpSpeaker, peer: BgpPeer) -> list[str]:
    """The lines that remove a neighbour."""
    address = format_address(peer.address)
    lines = [f"router bgp {speaker.asn}", f" no neighbor {address}", "exit"]
    if peer.subnets:
        lines.append(f"no {'ip' if len(peer.address) == 4 else 'ipv6'} prefix-list wincey-{address}")
    return lines


def changes(speaker: BgpSpeaker, old: Mapping[Address, BgpPeer], new: Mapping[Address, BgpPeer]) -> list[str]:
    """The lines that lead from the old neighbours to the new ones; a changed one starts anew."""
    lines: list[str] = []
    for address, peer in old.items():
        if new.get(address) != peer:
            lines += remove(speaker, peer)
    for address, peer in new.items():
        if old.get(address) != peer:
            lines += add(speaker, peer)
    return lines


def sessions(text: str) -> dict[Address, Session]:
    """The sessions by neighbour, from `show bgp summary json`."""
    try:
        families = msgspec.json.decode(text)
    except UNREADABLE:
        return {}
    found = {}
    for family in families.values() if isinstance(families, dict) else ():
        peers = family.get("peers") if isinstance(family, dict) else None
        for address, peer in peers.items() if isinstance(peers, dict) else ():
            state = peer.get("state") if isinstance(peer, dict) else None
            try:
                found[parse_address(address)] = Session(str(state or "unknown"))
            except BadAddress:
                continue  # a neighbour by interface: none of ours
    return found


def _filters(speaker: BgpSpeaker) -> Iterator[str]:
    for number, subnet in enumerate(speaker.subnets, start=1):
        version, ip = (4, "ip") if subnet.bits == 32 else (6, "ipv6")
        yield f"{ip} prefix-list wincey-own{version} seq {number} permit {subnet}"
        yield f"{ip} prefix-list wincey-accepted{version} seq {number} deny {subnet}"
    for number, rule in enumerate(speaker.accepted, start=100):
        version, ip = (4, "ip") if rule.network.bits == 32 else (6, "ipv6")
        length = rule.length
        yield f"{ip} prefix-list wincey-accepted{version} seq {number} permit {rule.network} ge {length} le {length}"
