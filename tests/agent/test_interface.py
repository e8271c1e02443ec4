"""The choice of the interface: cases of the compatibility reference, sections 9 and 13.4."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import pytest

from wincey.agent.interface import Choice, choose
from wincey.kernel.interfaces import Interface, LocalAddress, RouteLookup
from wincey.model.address import Address, parse_address
from wincey.model.errors import NotJoinable

LINK = 253


def local(text: str, **flags: object) -> LocalAddress:
    address, _, length = text.partition("/")
    return LocalAddress(parse_address(address), int(length), **flags)  # type: ignore[arg-type]  # the flags are its fields


HOST = (
    Interface("lo", 1, 65536, addresses=(local("127.0.0.1/8", scope=254), local("::1/128", scope=254))),
    Interface(
        "eth0",
        2,
        1500,
        addresses=(
            local("10.0.0.5/24"),
            local("10.0.0.6/24", secondary=True),
            local("fe80::5/64", scope=LINK),
            local("2001:db8::dead/64", temporary=True, permanent=False),
            local("2001:db8::5/64"),
        ),
    ),
    Interface("eth1", 3, 9000, addresses=(local("192.168.7.5/24"), local("fd77::5/64"))),
    Interface("eth2", 4, 1500, addresses=(local("172.16.0.5/24"),)),
    Interface("bare", 5, 1500),
    Interface("broken", 6, 0, addresses=(local("172.17.0.5/24"),)),
)


def pick(
    *,
    iface: tuple[str, ...] = (),
    regex: tuple[str, ...] = (),
    reach: str = "",
    public: str = "",
    public_v6: str = "",
    ipv4: bool = True,
    ipv6: bool = False,
    default: Mapping[int, int | None] | None = None,
    routes: Mapping[str, RouteLookup] | None = None,
) -> Choice:
    ways = {parse_address(text): lookup for text, lookup in (routes or {}).items()}

    def route_to(address: Address) -> RouteLookup:
        if address not in ways:
            raise OSError(101, "Network is unreachable")
        return ways[address]

    return choose(
        HOST,
        ipv4=ipv4,
        ipv6=ipv6,
        default_route=({socket.AF_INET: 2, socket.AF_INET6: 2} if default is None else default).get,
        route_to=route_to,
        iface=iface,
        iface_regex=regex,
        iface_can_reach=parse_address(reach) if reach else None,
        public_ip=parse_address(public) if public else None,
        public_ipv6=parse_address(public_v6) if public_v6 else None,
    )


def parsed(*texts: str | None) -> tuple[Address | None, ...]:
    return tuple(parse_address(text) if text else None for text in texts)


def shown(choice: Choice) -> tuple[object, ...]:
    return choice.interface, choice.local, choice.local_v6, choice.public, choice.public_v6


@pytest.mark.parametrize(
    ("given", "interface", "addresses"),
    [
        ({}, "eth0", ("10.0.0.5", None)),
        ({"default": {socket.AF_INET: 3}}, "eth1", ("192.168.7.5", None)),
        ({"iface": ("eth1",)}, "eth1", ("192.168.7.5", None)),
        ({"iface": ("192.168.7.5",)}, "eth1", ("192.168.7.5", None)),
        ({"iface": ("10.0.0.6",)}, "eth0", ("10.0.0.6", None)),
        ({"iface": ("eth9", "10.9.9.9", "eth2", "eth1")}, "eth2", ("172.16.0.5", None)),
        ({"iface": ("bare", "eth1")}, "eth1", ("192.168.7.5", None)),
        ({"iface": ("eth9",), "regex": ("^eth1$",)}, "eth1", ("192.168.7.5", None)),
        ({"regex": (r"192\.168\.",)}, "eth1", ("192.168.7.5", None)),
        ({"regex": (r"0\.6$",)}, "eth0", ("10.0.0.6", None)),
        ({"regex": (r"th[12]",)}, "eth1", ("192.168.7.5", None)),
        ({"regex": (r"172\.16|eth1",)}, "eth2", ("172.16.0.5", None)),
        ({"regex": ("nothing", "eth2")}, "eth2", ("172.16.0.5", None)),
        ({"iface": ("2001:db8::5",)}, "eth0", ("10.0.0.5", None)),
        ({"ipv6": True}, "eth0", ("10.0.0.5", "2001:db8::5")),
        ({"ipv6": True, "iface": ("192.168.7.5",)}, "eth1", ("192.168.7.5", "fd77::5")),
        ({"ipv6": True, "iface": ("fd77::5",)}, "eth1", ("192.168.7.5", "fd77::5")),
        ({"ipv6": True, "iface": ("eth2", "eth1")}, "eth1", ("192.168.7.5", "fd77::5")),
        ({"ipv6": True, "regex": (r"192\.168|fd77",)}, "eth1", ("192.168.7.5", "fd77::5")),
        ({"ipv6": True, "regex": (r"192\.168", "eth0")}, "eth0", ("10.0.0.5", "2001:db8::5")),
        ({"ipv6": True, "default": {socket.AF_INET: 3}}, "eth1", ("192.168.7.5", "fd77::5")),
        ({"ipv4": False, "ipv6": True}, "eth0", (None, "2001:db8::5")),
        ({"ipv4": False, "ipv6": True, "default": {socket.AF_INET: 2, socket.AF_INET6: 3}}, "eth1", (None, "fd77::5")),
        ({"ipv4": False, "ipv6": True, "iface": ("fe80::5",)}, "eth0", (None, "fe80::5")),
    ],
    ids=str,
)
def test_the_interface_and_its_own_addresses(
    given: dict[str, object], interface: str, addresses: tuple[str | None, str | None]
) -> None:
    choice = pick(**given)  # type: ignore[arg-type]  # the dictionaries hold its parameters
    assert shown(choice) == (interface, *parsed(*addresses), *parsed(*addresses))
    assert choice.mtu == next(i.mtu for i in HOST if i.name == interface)


def test_what_can_be_reached_tells_interface_and_source() -> None:
    lookup = RouteLookup(2, parse_address("10.0.0.6"), parse_address("10.0.0.1"))
    choice = pick(reach="8.8.8.8", routes={"8.8.8.8": lookup})
    assert shown(choice) == ("eth0", *parsed("10.0.0.6", None, "10.0.0.6", None))
    v6 = RouteLookup(3, parse_address("fd77::5"), None)
    assert shown(pick(ipv6=True, reach="2001:db8::8", routes={"2001:db8::8": v6}))[:3] == (
        "eth1",
        *parsed("192.168.7.5", "fd77::5"),
    )


def test_can_reach_comes_after_names() -> None:
    lookup = RouteLookup(3, parse_address("192.168.7.5"), None)
    assert pick(iface=("eth0",), reach="8.8.8.8", routes={"8.8.8.8": lookup}).interface == "eth0"
    assert pick(iface=("eth9",), reach="8.8.8.8", routes={"8.8.8.8": lookup}).interface == "eth1"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # A local public address tells the interface when no option does.
        ({"public": "192.168.7.5"}, ("eth1", "192.168.7.5", None, "192.168.7.5", None)),
        ({"public": "10.0.0.6"}, ("eth0", "10.0.0.6", None, "10.0.0.6", None)),
        ({"public_v6": "fd77::5", "ipv4": False, "ipv6": True}, ("eth1", None, "fd77::5", None, "fd77::5")),
        ({"public_v6": "fd77::5", "ipv6": True}, ("eth1", "192.168.7.5", "fd77::5", "192.168.7.5", "fd77::5")),
        # One that isn't local is NAT's.
        ({"public": "203.0.113.9"}, ("eth0", "10.0.0.5", None, "203.0.113.9", None)),
        ({"public": "203.0.113.9", "iface": ("eth1",)}, ("eth1", "192.168.7.5", None, "203.0.113.9", None)),
        # One on the interface that an option names is what packets leave with, too.
        ({"public": "10.0.0.6", "iface": ("eth0",)}, ("eth0", "10.0.0.6", None, "10.0.0.6", None)),
        (
            {"public": "203.0.113.9", "public_v6": "2001:db8:9::9", "ipv6": True},
            ("eth0", "10.0.0.5", "2001:db8::5", "203.0.113.9", "2001:db8:9::9"),
        ),
        # Of a family that is not in use it means nothing.
        ({"public_v6": "fd77::5"}, ("eth0", "10.0.0.5", None, "10.0.0.5", None)),
    ],
    ids=str,
)
def test_public_addresses(given: dict[str, object], expected: tuple[str | None, ...]) -> None:
    choice = pick(**given)  # type: ignore[arg-type]  # the dictionaries hold its parameters
    assert shown(choice) == (expected[0], *parsed(*expected[1:]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"iface": ("eth9",)}, "--iface=eth9 is the name of none"),
        ({"iface": ("10.9.9.9",)}, "no interface has the address of --iface=10.9.9.9"),
        ({"iface": ("bare",)}, "bare (--iface=bare names it) has no usable IPv4 address"),
        ({"iface": ("eth2",), "ipv6": True}, "no usable IPv6 address"),
        ({"iface": ("broken",)}, "broken has no MTU"),
        ({"regex": ("nothing",)}, "--iface-regex=nothing matches neither an address nor a name"),
        ({"regex": ("(",)}, "--iface-regex=( is no regular expression"),
        ({"reach": "8.8.8.8"}, "there is no route to 8.8.8.8 of --iface-can-reach (Network is unreachable)"),
        ({"default": {}}, "there is no IPv4 default route to tell it by; name it with --iface"),
        ({"default": {}, "ipv4": False, "ipv6": True}, "no IPv6 default route"),
        (
            {"default": {socket.AF_INET: 2, socket.AF_INET6: 3}, "ipv6": True},
            "IPv4 through eth0 and IPv6 through eth1",
        ),
        ({"default": {socket.AF_INET: 77}}, "went away"),
    ],
    ids=str,
)
def test_errors_say_what_was_looked_for_and_what_there_is(given: dict[str, object], words: str) -> None:
    with pytest.raises(NotJoinable) as raised:
        pick(**given)  # type: ignore[arg-type]  # the dictionaries hold its parameters
    text = str(raised.value)
    assert words in text
    assert "This host has lo (127.0.0.1, ::1), eth0 (10.0.0.5, " in text
    assert "\n" not in text


def test_each_option_tried_is_named() -> None:
    with pytest.raises(NotJoinable) as raised:
        pick(iface=("eth8", "eth9"), regex=("nothing",))
    assert all(word in str(raised.value) for word in ("eth8", "eth9", "nothing"))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "using interface eth0 with address 10.0.0.5 because the IPv4 default route leads through it"),
        ({"iface": ("eth1",)}, "using interface eth1 with address 192.168.7.5 because --iface=eth1 names it"),
        (
            {"public": "203.0.113.9"},
            "using interface eth0 with address 10.0.0.5 because the IPv4 default route leads through it;"
            " peers are told 203.0.113.9",
        ),
        (
            {"regex": (r"192\.",)},
            r"using interface eth1 with address 192.168.7.5 because --iface-regex=192\. matches its address 192.168.7.5",
        ),
    ],
    ids=str,
)
def test_the_reason_is_one_sentence(given: dict[str, object], reason: str) -> None:
    assert pick(**given).reason == reason  # type: ignore[arg-type]  # the dictionaries hold its parameters


def test_preference_among_addresses() -> None:
    interface = Interface(
        "eth0",
        2,
        1500,
        addresses=(
            local("fe80::1/64", scope=LINK),
            local("2001:db8::1/64", temporary=True, permanent=False),
            local("2001:db8::2/64", permanent=False),
            local("2001:db8::3/64", usable=False),
            local("2001:db8::4/64"),
        ),
    )
    assert interface.preferred(socket.AF_INET6) == [
        *parsed("2001:db8::4", "2001:db8::2", "2001:db8::1", "fe80::1"),
    ]
