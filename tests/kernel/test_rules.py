"""The abstract rules, and the choice of the program that carries them out."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.rules_ns import on_a_host, run
from wincey.kernel.iptables_text import rendered
from wincey.kernel.nft import Features
from wincey.kernel.nftables import rendered_table
from wincey.kernel.rules import Rule, choose_flavour, forward_rules, masquerade_rules, merged, unknown
from wincey.model.address import Address, Subnet, parse_address
from wincey.model.errors import NotJoinable
from wincey.model.state import RuleSet

V4 = RuleSet(
    Subnet.parse("10.3.0.0/16"),
    Subnet.parse("10.3.1.0/24"),
    masquerade=True,
    forward=True,
    exclude=(Subnet.parse("192.168.0.0/16"), Subnet.parse("192.168.7.0/24"), Subnet.parse("fd00::/8")),
)

LOCAL, REMOTE, OUTSIDE, ELSEWHERE = "10.3.1.2", "10.3.2.2", "172.31.0.2", "192.168.7.7"


def verdict(rules: tuple[Rule, ...], source: Address, destination: Address, mark: int = 0) -> str:
    """What a chain with these rules does to a packet."""

    def matches(rule: Rule) -> bool:
        return all(
            match is None or any(subnet.contains(address) for subnet in match.subnets) is match.inside
            for match, address in ((rule.source, source), (rule.destination, destination))
        ) and (not rule.marked or bool(mark & 0x4000))

    return next((rule.verdict for rule in rules if matches(rule)), "return")


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        (LOCAL, REMOTE, "return"),
        (REMOTE, LOCAL, "return"),
        (LOCAL, LOCAL, "return"),
        (OUTSIDE, LOCAL, "return"),
        (OUTSIDE, REMOTE, "masquerade"),
        (LOCAL, OUTSIDE, "masquerade"),
        (LOCAL, "224.0.0.5", "return"),
        (LOCAL, ELSEWHERE, "return"),
        (ELSEWHERE, REMOTE, "masquerade"),
        (OUTSIDE, ELSEWHERE, "return"),
    ],
)
def test_who_is_masqueraded(source: str, destination: str, expected: str) -> None:
    rules = masquerade_rules(V4)
    assert verdict(rules, parse_address(source), parse_address(destination)) == expected
    assert verdict(rules, parse_address(source), parse_address(destination), mark=0xF000) == "return"
    assert verdict(rules, parse_address(source), parse_address(destination), mark=0xB000) == expected


def test_what_is_forwarded_is_accepted_in_both_directions() -> None:
    rules = forward_rules(V4)
    assert verdict(rules, parse_address(LOCAL), parse_address(OUTSIDE)) == "accept"
    assert verdict(rules, parse_address(OUTSIDE), parse_address(REMOTE)) == "accept"
    assert verdict(rules, parse_address(OUTSIDE), parse_address(ELSEWHERE)) == "return"


def test_nothing_wanted_is_no_rule() -> None:
    nothing = RuleSet(V4.network, V4.subnet, masquerade=False, forward=False)
    assert masquerade_rules(nothing) + forward_rules(nothing) == ()


def test_host_bits_are_no_part_of_a_rule() -> None:
    loose = RuleSet(Subnet.parse("10.3.0.9/16"), Subnet.parse("10.3.1.1/24"), masquerade=True, forward=True)
    assert "10.3.1.1" not in rendered_table(loose, Features()) + str(rendered(loose, random_fully=True))


subnets = st.builds(
    lambda number, length: Subnet(number.to_bytes(4, "big"), length), st.integers(0, 2**32 - 1), st.integers(0, 32)
)


@given(st.lists(subnets, max_size=12))
def test_merged_subnets_do_not_overlap_and_hold_the_same_addresses(given_subnets: list[Subnet]) -> None:
    kept = merged(given_subnets)
    for one in kept:
        assert one.masked() in {subnet.masked() for subnet in given_subnets}
        assert not any(one.overlaps(other) for other in kept if other is not one)
    assert all(any(one.contains(subnet) for one in kept) for subnet in given_subnets)
    oracle = ipaddress.collapse_addresses(ipaddress.ip_network(str(subnet.masked())) for subnet in given_subnets)
    assert sum(one.size for one in kept) == sum(network.num_addresses for network in oracle)


def test_unknown_rules_are_equal_to_no_wanted_ones_and_have_their_familys_key() -> None:
    assert unknown(socket.AF_INET).key == V4.key
    assert unknown(socket.AF_INET) != V4
    assert unknown(socket.AF_INET6).key == ("rules", socket.AF_INET6)


# ---- the flavour


def programs(directory: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Let only these programs exist."""
    for name, script in scripts.items():
        path = directory / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setattr("wincey.kernel.program.SBIN", "")
    monkeypatch.setenv("PATH", os.fspath(directory))


WORKS = "exit 0"
DENIED = "echo 'Operation not permitted (you must be root)' >&2; exit 1"


async def test_nftables_where_it_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs(tmp_path, monkeypatch, nft=WORKS, iptables=WORKS)
    assert (await choose_flavour(None)).name == "nftables"
    assert (await choose_flavour(True)).name == "nftables"
    assert (await choose_flavour(False)).name == "iptables"


async def test_iptables_where_nftables_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs(tmp_path, monkeypatch, nft=DENIED, iptables=WORKS)
    flavour = await choose_flavour(None)
    assert flavour.name == "iptables"
    assert flavour.reason == "nftables does not work here: nft: Operation not permitted (needs root or CAP_NET_ADMIN)"
    with pytest.raises(NotJoinable, match="EnableNFTables is true and nftables does not work here: nft: Operation"):
        await choose_flavour(True)


async def test_no_program_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs(tmp_path, monkeypatch)
    with pytest.raises(NotJoinable, match="nft is not installed; iptables is not installed"):
        await choose_flavour(None)
    with pytest.raises(NotJoinable, match="EnableNFTables is false and iptables does not work here"):
        await choose_flavour(False)


async def test_a_program_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs(tmp_path, monkeypatch, nft="exec /bin/sleep 60", iptables=WORKS)
    monkeypatch.setattr("wincey.kernel.program.DEADLINE", 0.2)
    assert (await choose_flavour(None)).reason == "nftables does not work here: nft did not end within 0.2 s"


@pytest.mark.root
async def test_on_this_host_both_work() -> None:
    with on_a_host():
        assert (await choose_flavour(None)).name == "nftables"
        assert (await choose_flavour(False)).name == "iptables"
        assert run("nft", "list", "ruleset") == ""  # trying it changes nothing
