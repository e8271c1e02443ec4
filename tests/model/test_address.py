"""Addresses and subnets, with the standard library's `ipaddress` as the oracle."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wincey.model.address import (
    Subnet,
    family_of,
    format_address,
    format_mac,
    parse_address,
    parse_mac,
    single,
)
from wincey.model.errors import BadAddress

addresses = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))


@st.composite
def subnets(draw: st.DrawFn, near: bool = False) -> Subnet:
    """Any subnet; `near`: of few addresses, so that two of them often touch."""
    size = draw(st.sampled_from([4, 16]))
    if near:
        return Subnet(
            bytes(size - 1) + draw(st.binary(min_size=1, max_size=1)), draw(st.integers(size * 8 - 8, size * 8))
        )
    return Subnet(draw(st.binary(min_size=size, max_size=size)), draw(st.integers(0, size * 8)))


def oracle(subnet: Subnet) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network((subnet.address, subnet.length), strict=False)


@given(addresses)
def test_addresses_survive_being_written_and_read(address: bytes) -> None:
    text = format_address(address)
    assert parse_address(text) == address
    assert ipaddress.ip_address(text).packed == address


@given(addresses)
def test_addresses_are_written_as_the_oracle_does(address: bytes) -> None:
    if len(address) == 16 and not any(address[:10]):
        return  # ::1.2.3.4 and ::ffff:1.2.3.4, which are written with dots
    assert format_address(address) == str(ipaddress.ip_address(address))


@given(st.text(alphabet="0123456789abcdefg.:%x ", max_size=20) | st.text(max_size=10))
def test_whatever_text_is_read_as_the_oracle_reads_it(text: str) -> None:
    try:
        expected = ipaddress.ip_address(text).packed if "%" not in text else None  # no scopes
    except ValueError:
        expected = None
    if expected is None:
        with pytest.raises(BadAddress, match="write it like"):
            parse_address(text)
    else:
        assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text", ["", "10", "10.1", "10.1.2.300", "010.1.2.3", "10.1.2.3 ", "10.1.2.3\0", "\ud800", "1::2::3", "fe80::1%lo"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadAddress):
        parse_address(text)


@given(st.binary(min_size=6, max_size=6))
def test_mac_addresses_survive_being_written_and_read(mac: bytes) -> None:
    text = format_mac(mac)
    assert text == ":".join(f"{byte:02x}" for byte in mac)
    assert parse_mac(text) == parse_mac(text.upper()) == parse_mac(text.replace(":", "-")) == mac


@pytest.mark.parametrize(
    "text",
    ["", "0e:2a:0a:63:00", "0e:2a:0a:63:00:02:03", "0e:2a:0a:63:0:02", "+1:2a:0a:63:00:02", " 1:2a:0a:63:00:02",
     " 1:2 :0a:63:00:02", "0g:2a:0a:63:00:02", "\uff10e:2a:0a:63:00:02", "0e2a0a630002"],
)  # fmt: skip
def test_what_is_no_mac_address_is_refused(text: str) -> None:
    with pytest.raises(BadAddress, match="MAC"):
        parse_mac(text)


@given(subnets())
def test_subnets_survive_being_written_and_read(subnet: Subnet) -> None:
    assert Subnet.parse(str(subnet)) == subnet


@pytest.mark.parametrize(
    "text",
    ["", "10.3.0.0", "10.3.0.0/", "10.3.0.0/33", "10.3.0.0/-1", "10.3.0.0/+8", "10.3.0.0/ 8", "10.3.0.0/٨", "10.3/16",
     "fd00::/129", "fd00::/64/64", "/16", "10.3.0.0/255.255.0.0", "10.3.0.0/99999"],
)  # fmt: skip
def test_what_is_no_subnet_is_refused(text: str) -> None:
    with pytest.raises(BadAddress, match="write it like"):
        Subnet.parse(text)


@given(subnets())
def test_subnet_arithmetic(subnet: Subnet) -> None:
    network = oracle(subnet)
    assert subnet.family == (socket.AF_INET if network.version == 4 else socket.AF_INET6)
    assert subnet.bits == network.max_prefixlen
    assert subnet.size == network.num_addresses
    assert subnet.first == int(network.network_address)
    assert subnet.last == int(network.broadcast_address)
    assert subnet.masked() == Subnet(network.network_address.packed, network.prefixlen)
    assert subnet.host(0) == network[0].packed
    assert subnet.host(subnet.size - 1) == network[-1].packed


@given(subnets(near=True) | subnets(), subnets(near=True) | subnets())
def test_containing_and_overlapping(one: Subnet, other: Subnet) -> None:
    same_family = one.family == other.family
    assert one.contains(other) == (same_family and oracle(other).subnet_of(oracle(one)))  # type: ignore[arg-type]  # the families are equal
    assert one.overlaps(other) == other.overlaps(one) == oracle(one).overlaps(oracle(other))
    assert one.contains(other.address) == (ipaddress.ip_address(other.address) in oracle(one))


@given(addresses)
def test_a_single_address_as_a_subnet(address: bytes) -> None:
    subnet = single(address)
    assert (subnet.size, subnet.family) == (1, family_of(address))
    assert subnet.contains(address)
    assert str(subnet) == f"{format_address(address)}/{len(address) * 8}"
