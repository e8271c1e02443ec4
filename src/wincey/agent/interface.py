"""Which interface joins this host to the others, with which addresses, and why (compatibility reference, section 9).

Pure: what the host has is passed in, and the kernel is asked through the two functions passed in. The options are tried in
the order of the reference: each `--iface`, each `--iface-regex`, `--iface-can-reach`; without any of them a local
`--public-ip` or `--public-ipv6`, then the default route. A public address that no interface has (NAT, a cloud's elastic
address) is fine: it is published, and the default route tells the interface.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence

import msgspec

from wincey.kernel.interfaces import Interface, RouteLookup
from wincey.model.address import Address, family_of, format_address, parse_address
from wincey.model.errors import BadAddress, NotJoinable

_FAMILY_NAMES: dict[int, str] = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}


class Choice(msgspec.Struct, frozen=True):
    """The interface and what to use of it; addresses of a family that is not in use are None.

    local, local_v6: the interface's own. public, public_v6: what peers are told. reason: one sentence for the log.
    """

    interface: str
    mtu: int
    local: Address | None
    local_v6: Address | None
    public: Address | None
    public_v6: Address | None
    reason: str


class _Found(msgspec.Struct):
    """What one way of looking found; `addresses` are those it insists on, by family."""

    interface: Interface
    why: str
    addresses: dict[int, Address] = {}


class _NotFound(Exception):
    """One way of looking found nothing; the text says what was looked for."""


def choose(
    interfaces: Sequence[Interface],
    *,
    ipv4: bool,
    ipv6: bool,
    default_route: Callable[[int], int | None],
    route_to: Callable[[Address], RouteLookup],
    iface: Sequence[str] = (),
    iface_regex: Sequence[str] = (),
    iface_can_reach: Address | None = None,
    public_ip: Address | None = None,
    public_ipv6: Address | None = None,
) -> Choice:
    """Choose, or raise NotJoinable, which names what was looked for and what there is.

    ipv4, ipv6: the families of the network. default_route(family): see interfaces.default_route_interface.
    route_to(address): see interfaces.route_to; may raise OSError.
    """
    families: list[int] = [family for family, used in ((socket.AF_INET, ipv4), (socket.AF_INET6, ipv6)) if used]
    public: dict[int, Address] = {
        family: address
        for family, address in ((socket.AF_INET, public_ip), (socket.AF_INET6, public_ipv6))
        if address and family in families
    }
    look = _Look(interfaces, families, public, default_route, route_to)
    ways: list[Callable[[], _Found]] = [
        *(lambda text=text: look.by_text(text) for text in iface),
        *(lambda text=text: look.by_regex(text) for text in iface_regex),
    ]
    if iface_can_reach:
        ways.append(lambda: look.by_reach(iface_can_reach))
    if not ways:
        ways.append(look.by_host)
    failures = []
    for way in ways:
        try:
            return look.complete(way())
        except _NotFound as failure:
            failures.append(str(failure))
    raise NotJoinable(f"no interface to join the network by: {'; '.join(failures)}. This host has {look.inventory()}")


class _Look:
    """The ways of looking."""

    def __init__(
        self,
        interfaces: Sequence[Interface],
        families: Sequence[int],
        public: dict[int, Address],
        default_route: Callable[[int], int | None],
        route_to: Callable[[Address], RouteLookup],
    ) -> None:
        self._interfaces = sorted(interfaces, key=lambda interface: interface.index)
        self._families, self._public = families, public
        self._default_route, self._route_to = default_route, route_to

    def inventory(self) -> str:
        """All interfaces with their addresses."""
        return ", ".join(map(str, self._interfaces)) or "no interfaces"

    def by_text(self, text: str) -> _Found:
        """--iface: an address or a name."""
        try:
            address = parse_address(text)
        except BadAddress:
            for interface in self._interfaces:
                if interface.name == text:
                    return _Found(interface, f"--iface={text} names it")
            raise _NotFound(f"--iface={text} is the name of none") from None
        return self._by_address(address, f"--iface={text}")

    def by_regex(self, text: str) -> _Found:
        """--iface-regex: an address of every family in use matches, else a name does. Unanchored."""
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise _NotFound(f"--iface-regex={text} is no regular expression ({error})") from None
        for interface in self._interfaces:
            matching = {
                family: address
                for family in self._families
                for address in reversed(interface.preferred(family))
                if pattern.search(format_address(address))
            }
            if len(matching) == len(self._families):
                shown = " and ".join(map(format_address, matching.values()))
                return _Found(interface, f"--iface-regex={text} matches its address {shown}", matching)
        for interface in self._interfaces:
            if pattern.search(interface.name):
                return _Found(interface, f"--iface-regex={text} matches its name")
        raise _NotFound(f"--iface-regex={text} matches neither an address nor a name")

    def by_reach(self, address: Address) -> _Found:
        """--iface-can-reach: the way the kernel would take."""
        text = format_address(address)
        try:
            lookup = self._route_to(address)
        except OSError as error:
            raise _NotFound(f"there is no route to {text} of --iface-can-reach ({error.strerror})") from None
        found = _Found(self._by_index(lookup.index), f"the route to {text} of --iface-can-reach leads through it")
        if lookup.source:
            found.addresses = {family_of(lookup.source): lookup.source}
        return found

    def by_host(self) -> _Found:
        """No option: a public address that is local tells the interface, else the default route does."""
        for family, address in self._public.items():
            option = "--public-ip" if family == socket.AF_INET else "--public-ipv6"
            try:
                return self._by_address(address, f"{option}={format_address(address)}")
            except _NotFound:
                continue
        indices = {family: self._default_route(family) for family in self._families}
        first = self._families[0]
        # An IPv6 network is often joined without a default route for it; another interface's would be a contradiction.
        index = indices[first]
        if index is None:
            raise _NotFound(f"there is no {_FAMILY_NAMES[first]} default route to tell it by; name it with --iface")
        interface = self._by_index(index)
        for family in self._families[1:]:
            other = indices[family]
            if other not in (None, index):
                raise _NotFound(
                    f"the default routes lead through different ones, IPv4 through {interface.name} and IPv6 through "
                    f"{self._by_index(other).name}; name the right one with --iface"
                )
        return _Found(interface, f"the {_FAMILY_NAMES[first]} default route leads through it")

    def complete(self, found: _Found) -> Choice:
        """Fill in addresses; raises _NotFound when the interface lacks what is needed."""
        interface = found.interface
        if not interface.mtu:
            raise _NotFound(f"{interface.name} has no MTU")
        local: dict[int, Address] = {}
        for family in self._families:
            preferred = interface.preferred(family)
            public = self._public.get(family)
            if family in found.addresses:
                local[family] = found.addresses[family]
            elif public in preferred:
                local[family] = public
            elif preferred:
                local[family] = preferred[0]
            else:
                raise _NotFound(f"{interface.name} ({found.why}) has no usable {_FAMILY_NAMES[family]} address")
        reached = {family: self._public.get(family, local[family]) for family in self._families}
        shown = " and ".join(map(format_address, local.values()))
        reason = f"using interface {interface.name} with address {shown} because {found.why}"
        if reached != local:
            elsewhere = [
                format_address(reached[family]) for family in self._families if reached[family] != local[family]
            ]
            reason += f"; peers are told {' and '.join(elsewhere)}"
        return Choice(
            interface.name,
            interface.mtu,
            local.get(socket.AF_INET),
            local.get(socket.AF_INET6),
            reached.get(socket.AF_INET),
            reached.get(socket.AF_INET6),
            reason,
        )

    def _by_address(self, address: Address, option: str) -> _Found:
        for interface in self._interfaces:
            if any(entry.address == address for entry in interface.addresses):
                used = {family_of(address): address} if family_of(address) in self._families else {}
                return _Found(interface, f"it has the address of {option}", used)
        raise _NotFound(f"no interface has the address of {option}")

    def _by_index(self, index: int | None) -> Interface:
        for interface in self._interfaces:
            if interface.index == index:
                return interface
        raise _NotFound(f"the interface with index {index} went away meanwhile")
