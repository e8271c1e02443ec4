"""The meaning of a RuleSet, apart from the program that carries it out, and which program that is.

Both flavours are rendered from the same abstract rules, so they can't differ in meaning (compatibility reference,
sections 7.1 and 7.5). The nat chain sees the first packet of each connection only, the forward chain every packet:
that one has two rules, and the commonest case (from a container of ours) is the first.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from typing import Literal, TypeAlias

import msgspec

from wincey.kernel import nft
from wincey.kernel.program import ProgramFailed, must
from wincey.model.address import Subnet
from wincey.model.errors import NotJoinable, UsageError
from wincey.model.state import Key, RuleSet

MARK = 0x4000
"""kube-proxy's bit in the packet mark: "masquerade this one", which kube-proxy's own rules then do."""

MULTICAST: dict[int, Subnet] = {socket.AF_INET: Subnet.parse("224.0.0.0/4"), socket.AF_INET6: Subnet.parse("ff00::/8")}

FAMILIES = (socket.AF_INET, socket.AF_INET6)

FlavourName: TypeAlias = Literal["nftables", "iptables"]


class Match(msgspec.Struct, frozen=True, gc=False):
    """Packets from, or to, addresses inside one of some subnets; `inside` False: outside of it (then it is one)."""

    subnets: tuple[Subnet, ...]
    inside: bool = True


class Rule(msgspec.Struct, frozen=True, gc=False):
    """Packets that match all of what is given meet the verdict.

    marked: with kube-proxy's bit in their mark. device: that came in by it. strayed: that came in by another device than
    the way back to their source (a strict reverse path check). udp_port: to it. local: to an address of this host.
    """

    verdict: Literal["return", "accept", "masquerade", "drop"]
    source: Match | None = None
    destination: Match | None = None
    marked: bool = False
    device: str = ""
    strayed: bool = False
    udp_port: int = 0
    local: bool = False


class Flavour(msgspec.Struct, frozen=True):
    """The program that carries out the rules, and why that one, in a line for the log."""

    name: FlavourName
    reason: str


def masquerade_rules(rules: RuleSet) -> tuple[Rule, ...]:
    """What happens after routing: containers keep their addresses among each other and take the host's elsewhere.

    From outside, a container on this host is met at its own address; one on another host is reached through this host
    only, so that its answers come back this way.
    """
    if not rules.masquerade:
        return ()
    inside, here = Match((rules.network,)), Match((rules.subnet,))
    outside = Match((rules.network,), inside=False)
    unicast = Match((MULTICAST[rules.network.family],), inside=False)
    exclude = merged(subnet for subnet in rules.exclude if subnet.family == rules.network.family)
    return (
        Rule("return", marked=True),
        Rule("return", here, inside),
        Rule("return", inside, here),
        Rule("return", outside, here),
        *((Rule("return", inside, Match(exclude)),) if exclude else ()),
        Rule("masquerade", inside, unicast),
        Rule("masquerade", outside, inside),
    )


def forward_rules(rules: RuleSet) -> tuple[Rule, ...]:
    """What is forwarded from and to the network is accepted."""
    if not rules.forward:
        return ()
    inside = Match((rules.network,))
    return Rule("accept", source=inside), Rule("accept", destination=inside)


def ingress_rules(rules: RuleSet) -> tuple[Rule, ...]:
    """What a packet has to pass as it comes in, where a host has several networks.

    Who sent it is known by the device that it comes by, never by the address in it: what has to do with the network must
    come by the device that leads back to its source. What other hosts send was looked at there. A container could also put
    a packet into an envelope of the network's own kind and send it to a host, which would open it: so nothing but hosts
    may send to the network's port. Containers among each other may, as they can have an overlay of their own.
    """
    isolation = rules.isolation
    if isolation is None:
        return ()
    inside = Match((rules.network,))
    others = _of_family(isolation.others, rules)
    found = [
        *(Rule("return", device=device) for device in ("lo", *isolation.devices)),
        *((Rule("drop", Match(others), inside),) if others else ()),
        Rule("drop", destination=inside, strayed=True),
        Rule("drop", inside, strayed=True),
    ]
    if isolation.port:
        networks = merged((rules.network, *others))
        found += [
            Rule("drop", strayed=True, udp_port=isolation.port),
            Rule("drop", Match(networks), udp_port=isolation.port, local=True),
            *(Rule("return", Match((network,)), Match((network,))) for network in networks),
            Rule("drop", Match(networks), udp_port=isolation.port),
        ]
    return tuple(found)


def separation_rules(rules: RuleSet) -> tuple[Rule, ...]:
    """What is not forwarded, whatever else accepts it: anything between two networks of a host, also after DNAT."""
    others = _of_family(rules.isolation.others, rules) if rules.isolation else ()
    if not others:
        return ()
    inside, outside = Match((rules.network,)), Match(others)
    return Rule("drop", inside, outside), Rule("drop", outside, inside)


def _of_family(subnets: Iterable[Subnet], rules: RuleSet) -> tuple[Subnet, ...]:
    return merged(subnet for subnet in subnets if subnet.family == rules.network.family)


def merged(subnets: Iterable[Subnet]) -> tuple[Subnet, ...]:
    """The subnets in order without those inside another one: an nftables set takes no overlaps."""
    kept: list[Subnet] = []
    for subnet in sorted({subnet.masked() for subnet in subnets}, key=lambda one: (one.first, one.length)):
        if not kept or not kept[-1].contains(subnet):
            kept.append(subnet)
    return tuple(kept)


def nft_tables(suffix: str = "") -> dict[int, tuple[str, str]]:
    """The nftables table of each address family: nft's word for the family, and the name."""
    middle = f"flannel-{suffix}" if suffix else "flannel"
    return {socket.AF_INET: ("ip", f"{middle}-ipv4"), socket.AF_INET6: ("ip6", f"{middle}-ipv6")}


def rules_key(family: int) -> Key:
    """The key of a family's RuleSet."""
    return (RuleSet.tag, family)


def unknown(family: int) -> RuleSet:
    """What an observer reports for rules of ours that are there and are not what anybody wants: equal to none."""
    everything = Subnet(bytes(4 if family == socket.AF_INET else 16), 0)
    return RuleSet(network=everything, subnet=everything, masquerade=False, forward=False)


def check_suffix(suffix: str) -> str:
    """A suffix keeps several daemons on a host apart; raises UsageError unless it fits in an iptables chain's name."""
    if suffix and not re.fullmatch(r"[a-z0-9][a-z0-9_]{0,10}", suffix):
        raise UsageError(
            f"the suffix {suffix!r} can't be part of a chain's name; use at most 11 small letters, digits or _"
        )
    return suffix


async def choose_flavour(enable_nftables: bool | None, iptables: str = "iptables") -> Flavour:
    """Decide by what works here. None: nftables where it works, else iptables. True, False: that one or an error.

    Raises NotJoinable when what is asked for, or anything at all, does not work.
    """
    if enable_nftables is False:
        if reason := await _no_iptables(iptables):
            raise NotJoinable(
                f"EnableNFTables is false and iptables does not work here: {reason}; install iptables, or remove the key"
            )
        return Flavour("iptables", "EnableNFTables is false")
    no_nftables = await nft.complaint()
    if not no_nftables:
        return Flavour("nftables", "EnableNFTables is true" if enable_nftables else "it works here")
    if enable_nftables:
        raise NotJoinable(
            f"EnableNFTables is true and nftables does not work here: {no_nftables}; install nft, or remove the key"
        )
    if no_iptables := await _no_iptables(iptables):
        raise NotJoinable(
            f"neither nftables nor iptables works here ({no_nftables}; {no_iptables}); install nft,"
            " or run with --ip-masq=false --iptables-forward-rules=false"
        )
    return Flavour("iptables", f"nftables does not work here: {no_nftables}")


async def _no_iptables(program: str) -> str:
    """Why iptables is of no use here, "" if it is."""
    try:
        await must(program, "-w", "5", "-t", "nat", "-S", "POSTROUTING")
    except ProgramFailed as error:
        return str(error)
    return ""
