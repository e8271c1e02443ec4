"""static: direct routes over a list of hosts, without store, lease or daemon: `wincey routes`. Pure.

The list is a text, one line for each subnet: the host's address, the subnet behind it, and a name where wanted; `#` begins a
comment. Each host gets a route to every other host's subnets through that host's address, as host-gw has from leases. A fault
of the list is one line with its place.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from wincey.model.address import Address, Subnet, family_of, format_address, parse_address
from wincey.model.errors import BadAddress, WinceyError
from wincey.model.state import Route

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*\Z", re.ASCII)
_FORM = "write each line as ADDRESS SUBNET [NAME], such as 192.168.0.2 10.3.2.0/24 web2"
_FAMILY: dict[int, str] = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}


class BadHosts(WinceyError):
    """The list of hosts can't be used; says file, line, why and what to do."""


class Behind(msgspec.Struct, frozen=True):
    """A subnet and the address that leads to it. place: where the list says so, as `hosts:3`."""

    subnet: Subnet
    address: Address
    place: str

    @property
    def gateway(self) -> str:
        """The address as text."""
        return format_address(self.address)


class StaticHost(msgspec.Struct, frozen=True):
    """One host of the list. name: its address where the list gives none."""

    name: str
    behind: tuple[Behind, ...]

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Its addresses, at most one of each family, each once."""
        return tuple(dict.fromkeys(each.address for each in self.behind))


def read_hosts(text: str, source: str) -> list[StaticHost]:
    """Read a list; source: its name in messages. Raises BadHosts for the first fault."""
    named: list[tuple[str, Behind]] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            named.append(_read_line(words, f"{source}:{number}"))
    if not named:
        raise BadHosts(f"{source}: there is no host in it; {_FORM}")
    names = {each.address: name for name, each in named if name}
    found: dict[str, list[Behind]] = {}
    for name, each in named:
        called = name or names.get(each.address) or each.gateway
        if names.get(each.address, called) != called:
            raise BadHosts(f"{each.place}: {each.gateway} is {names[each.address]!r} elsewhere and {called!r} here")
        found.setdefault(called, []).append(each)
    for called, entries in found.items():
        _one_address(called, entries)
    _no_overlaps([each for _, each in named])
    return [StaticHost(name, tuple(entries)) for name, entries in found.items()]


def find(hosts: Sequence[StaticHost], name: str, source: str) -> StaticHost:
    """The host of a name or address; raises BadHosts."""
    for host in hosts:
        if name == host.name or name in map(format_address, host.addresses):
            return host
    raise BadHosts(f"{source}: there is no host {name!r} in it; there are {_some(host.name for host in hosts)}")


def find_self(hosts: Sequence[StaticHost], own: Iterable[Address], source: str) -> StaticHost:
    """The host that has one of our addresses; raises BadHosts."""
    mine = set(own)
    found = [host for host in hosts if mine.intersection(host.addresses)]
    if len(found) == 1:
        return found[0]
    if found:
        raise BadHosts(
            f"{source}: {_some(host.name for host in found)} all have addresses of this host; choose by --host"
        )
    raise BadHosts(f"{source}: no address in it is one of this host's; say which host this is with --host NAME")


def others(hosts: Sequence[StaticHost], me: StaticHost) -> list[Behind]:
    """What one host needs routes to: all subnets of all others."""
    return [each for host in hosts if host is not me for each in host.behind]


def plan(wanted: Iterable[Behind], connected: Sequence[tuple[Subnet, str]]) -> list[Route]:
    """The routes of a host, given the subnets that it reaches without a gateway; raises BadHosts."""
    routes = []
    for each in wanted:
        for subnet, device in connected:
            if each.subnet.contains(subnet):
                raise BadHosts(
                    f"{each.place}: {each.subnet} covers {subnet}, which this host has on {device}; is this another host"
                    " than --host says, or is the subnet wrong?"
                )
        near = [(subnet.length, device) for subnet, device in connected if subnet.contains(each.address)]
        if not near:
            raise BadHosts(
                f"{each.place}: {each.gateway} is on no network of this host, and direct routes need all hosts on one;"
                " between networks use a backend such as vxlan"
            )
        routes.append(Route(each.subnet, max(near)[1], gateway=each.address))
    return routes


def as_ip(hosts: Sequence[StaticHost], shown: Sequence[StaticHost]) -> str:
    """Commands for each host, to be run there by hand or from a script."""
    parts = []
    for host in shown:
        parts.append(f"# on {_called(host)}")
        for each in others(hosts, host):
            six = " -6" if family_of(each.address) == socket.AF_INET6 else ""
            parts.append(f"ip{six} route replace {each.subnet} via {each.gateway}")
    return "\n".join(parts)


def as_networkd(hosts: Sequence[StaticHost], shown: Sequence[StaticHost]) -> str:
    """Sections for the systemd-networkd file of each host's interface."""
    parts = []
    for host in shown:
        parts.append(f"# on {_called(host)}: a drop-in of the interface's .network file")
        parts += [f"[Route]\nDestination={each.subnet}\nGateway={each.gateway}\n" for each in others(hosts, host)]
    return "\n".join(parts)


def as_json(hosts: Sequence[StaticHost], shown: Sequence[StaticHost]) -> str:
    """One JSON object, for programs."""
    listed = [
        {
            "name": host.name,
            "addresses": [format_address(address) for address in host.addresses],
            "subnets": [str(each.subnet) for each in host.behind],
            "routes": [{"destination": str(each.subnet), "gateway": each.gateway} for each in others(hosts, host)],
        }
        for host in shown
    ]
    return msgspec.json.encode({"hosts": listed}).decode()


FORMATS = {"ip": as_ip, "networkd": as_networkd, "json": as_json}


def _read_line(words: list[str], place: str) -> tuple[str, Behind]:
    if len(words) not in {2, 3}:
        raise BadHosts(f"{place}: {' '.join(words)!r} has {len(words)} words; {_FORM}")
    name = words[2] if len(words) == 3 else ""
    try:
        address, subnet = parse_address(words[0]), Subnet.parse(words[1])
    except BadAddress as error:
        raise BadHosts(f"{place}: {error}") from None
    if name and not _NAME.match(name):
        raise BadHosts(f"{place}: a host can't have the name {name!r}; use letters, digits, dots and hyphens")
    if family_of(address) != subnet.family:
        raise BadHosts(
            f"{place}: {words[0]} is {_FAMILY[family_of(address)]} and {words[1]} is {_FAMILY[subnet.family]}; give the"
            " two families of a host a line each, with the same name"
        )
    if subnet.masked() != subnet or not subnet.length:
        raise BadHosts(
            f"{place}: {subnet} is no subnet of a host; is it {subnet.masked() if subnet.length else 'a typo'}?"
        )
    as_known = ipaddress.ip_address(address)
    if as_known.is_multicast or as_known.is_loopback or as_known.is_unspecified or as_known.is_link_local:
        raise BadHosts(f"{place}: {words[0]} is no address that other hosts can route through")
    return name, Behind(subnet, address, place)


def _one_address(name: str, entries: Sequence[Behind]) -> None:
    """Of each family: routes through a second one would be the routes of a second host."""
    first: dict[int, Behind] = {}
    for each in entries:
        before = first.setdefault(each.subnet.family, each)
        if before.address != each.address:
            raise BadHosts(
                f"{each.place}: {name!r} has the address {each.gateway} here and {before.gateway} at {before.place}; give"
                " two hosts two names"
            )


def _no_overlaps(entries: Sequence[Behind]) -> None:
    """Neither among the subnets, nor of an address with a subnet: the way to the host would lead through itself."""
    ordered = sorted(entries, key=lambda each: (each.subnet.bits, each.subnet.first, each.subnet.length))
    for one, next_one in pairwise(ordered):
        if one.subnet.overlaps(next_one.subnet):
            early, late = sorted((one, next_one), key=entries.index)
            same = "is there already" if early.subnet == late.subnet else f"overlaps {early.subnet}"
            raise BadHosts(f"{late.place}: {late.subnet} {same}, at {early.place}; each subnet belongs to one host")
    starts = [(each.subnet.bits, each.subnet.first) for each in ordered]
    for each in entries:
        before = bisect_right(starts, (each.subnet.bits, int.from_bytes(each.address, "big")))
        if before and (other := ordered[before - 1]).subnet.contains(each.address):
            raise BadHosts(
                f"{each.place}: the address {each.gateway} lies in {other.subnet}, a subnet of the list ({other.place});"
                " hosts need addresses outside of what is routed to them"
            )


def _called(host: StaticHost) -> str:
    addresses = ", ".join(map(format_address, host.addresses))
    return host.name if host.name == addresses else f"{host.name} ({addresses})"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed if len(listed) <= 8 else [*listed[:5], "...", listed[-1]])
