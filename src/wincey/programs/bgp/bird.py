"""BIRD 2: the configuration of a speaker and its neighbours, and what `show protocols` tells. Pure.

Every name of ours begins with `wincey_`, so that the same text, without what a host's own configuration has already, can be
included by that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from wincey.model.address import Address, Subnet, format_address
from wincey.model.bgp import BgpPeer, BgpSpeaker
from wincey.programs.bgp.session import Session

RESTART_TIME = 120
"""Seconds for which neighbours keep our routes while the routing daemon is started anew."""

_LOG_SIZE = 4 << 20  # bytes, after which the log begins anew

_HEAD = "# Written by flanneld, which writes it anew at every change.\n"


def config(speaker: BgpSpeaker, peers: Iterable[BgpPeer], log: str) -> str:
    """The whole configuration of an instance of our own, or the part to include in the host's. log: its log file."""
    ordered = sorted(peers, key=lambda peer: (len(peer.address), peer.address))
    lines = [*_own(speaker, log)] if speaker.instance == "own" else []
    for version, local in ((4, speaker.local), (6, speaker.local_v6)):
        if local:
            lines += _family(speaker, version, local)
    lines += [line for peer in ordered for line in _peer(speaker, peer)]
    return _HEAD + "\n".join(lines) + "\n"


def name(address: Address) -> str:
    """The name of the protocol that is a neighbour's."""
    return "wincey_" + format_address(address).replace(".", "_").replace(":", "_")


def sessions(lines: Iterable[str], peers: Iterable[BgpPeer]) -> dict[Address, Session]:
    """The sessions by neighbour, from the lines of `show protocols`; a neighbour that BIRD does not know is left out."""
    addresses = {name(peer.address): peer.address for peer in peers}
    found = {}
    for line in lines:
        # Name, Proto, Table, State, Since (a time, or a date and a time), Info: state of the session and last error.
        words = line.split()
        if len(words) >= 4 and words[1] == "BGP" and words[0] in addresses:
            rest = [word for word in words[4:] if not word[0].isdigit()]
            found[addresses[words[0]]] = Session(rest[0] if rest else words[3], " ".join(rest[1:]))
    return found


def _own(speaker: BgpSpeaker, log: str) -> Iterator[str]:
    yield f'log "{log}" {_LOG_SIZE} "{log}.1" {{ info, remote, warning, error, auth, fatal, bug }};'
    yield f"router id {format_address(speaker.router_id)};"
    # A neighbour that never comes back must not keep our own subnet from being announced for long.
    yield "graceful restart wait 10;"
    yield "protocol device wincey_device { scan time 10; }"
    if speaker.bfd:
        yield "protocol bfd wincey_bfd { }"


def _family(speaker: BgpSpeaker, version: int, local: Address) -> Iterator[str]:
    own = [subnet for subnet in speaker.subnets if len(subnet.address) == len(local)]
    accepted = [rule for rule in speaker.accepted if len(rule.network.address) == len(local)]
    if speaker.instance == "own":
        yield f"protocol kernel wincey_kernel{version} {{"
        # Routes that an earlier run left stay until its neighbours have told theirs again.
        yield "  graceful restart; scan time 20;"
        yield f"  ipv{version} {{ import none; export where source = RTS_BGP && dest = RTD_UNICAST; }};"
        yield "}"
    # From the lease, and not from the interfaces: it is announced before there is a container.
    yield f"protocol static wincey_own{version} {{"
    yield f"  ipv{version};"
    yield from (f"  route {subnet} blackhole;" for subnet in own)
    yield "}"
    yield f"filter wincey_import{version} {{"
    yield from (f"  if net = {subnet} then reject;" for subnet in own)
    yield from (f"  if net ~ [ {r.network}{{{r.length},{r.length}}} ] then accept;" for r in accepted)
    yield "  reject;"
    yield "}"
    # Next hops are looked for in networks that this host is connected to, and nowhere else.
    yield f"ipv{version} table wincey_connected{version};"
    yield f"protocol direct wincey_direct{version} {{ ipv{version} {{ table wincey_connected{version}; }}; }}"
    yield f"template bgp wincey_session{version} {{"
    yield f"  local {format_address(local)} port {speaker.port} as {speaker.asn}; strict bind yes;"
    yield f"  hold time {speaker.hold}; keepalive time {max(1, speaker.hold // 3)};"
    yield "  connect delay time 1; connect retry time 5; error wait time 2, 10; startup hold time 30;"
    yield f"  graceful restart yes; graceful restart time {RESTART_TIME};"
    if speaker.password.value:
        yield f'  password "{speaker.password.value}";'
    if speaker.bfd:
        yield "  bfd yes;"
    yield "}"


def _peer(speaker: BgpSpeaker, peer: BgpPeer) -> Iterator[str]:
    version = 4 if len(peer.address) == 4 else 6
    internal = peer.asn == speaker.asn
    yield f"protocol bgp {name(peer.address)} from wincey_session{version} {{"
    yield f"  neighbor {format_address(peer.address)} port {peer.port} as {peer.asn};"
    if not internal:
        # All hosts have one AS, and so their subnets come back from a router with it in their path.
        yield "  direct; allow local as 1;"
    else:
        yield "  direct;" if peer.subnets else "  multihop;"  # a route reflector may stand elsewhere
    yield f"  ipv{version} {{"
    if internal and not peer.subnets:
        yield f"    igp table wincey_connected{version};"
    yield f"    import {_import(peer.subnets, version)};"
    yield f'    export where proto = "wincey_own{version}";'
    yield "    next hop self;"
    yield "  };"
    yield "}"


def _import(subnets: Sequence[Subnet], version: int) -> str:
    """A host may announce its own subnets and nothing else."""
    if not subnets:
        return f"filter wincey_import{version}"
    return f"where net ~ [ {', '.join(map(str, subnets))} ]"
