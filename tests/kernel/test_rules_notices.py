"""The kernel's notices of changed rules: parsing them, and listening on a real kernel."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.rules_ns import Hosts, on_a_host, run
from wincey.kernel.nfmonitor import GenerationCounter, LegacyPoll, NftMonitor, concerns, legacy_tables

NEWTABLE, NEWCHAIN, NEWRULE, NEWSET, NEWGEN = 0xA00, 0xA03, 0xA06, 0xA09, 0xA0F


def attribute(kind: int, text: str) -> bytes:
    value = text.encode() + b"\0"
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind: int, *attributes: bytes, family: int = 2) -> bytes:
    body = struct.pack("=BBH", family, 0, 0) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def seen(*messages: bytes) -> list[tuple[int, str, str]]:
    found: list[tuple[int, str, str]] = []
    concerns(b"".join(messages), lambda *change: bool(found.append(change)))  # type: ignore[func-returns-value]  # None: go on
    return found


def test_table_and_chain_of_each_change() -> None:
    assert seen(
        message(NEWTABLE, attribute(1, "flannel-ipv4")),
        message(NEWCHAIN, attribute(1, "filter"), struct.pack("=HH8s", 12, 2, b"\0" * 8), attribute(3, "FORWARD")),
        message(NEWRULE, attribute(1, "nat"), attribute(2, "POSTROUTING"), family=10),
        message(NEWSET, attribute(1, "flannel-ipv4"), attribute(2, "some-set")),
        message(NEWGEN, struct.pack("=HHI", 8, 1, 7), family=0),
        message(NEWTABLE, attribute(1, "firewall"), family=1),  # of family inet: of both
    ) == [
        (socket.AF_INET, "flannel-ipv4", ""),
        (socket.AF_INET, "filter", "FORWARD"),
        (socket.AF_INET6, "nat", "POSTROUTING"),
        (socket.AF_INET, "flannel-ipv4", ""),
        (socket.AF_UNSPEC, "firewall", ""),
    ]


def test_the_first_change_of_interest_is_told() -> None:
    data = message(NEWTABLE, attribute(1, "other")) + message(NEWRULE, attribute(1, "filter"), attribute(2, "FORWARD"))
    assert concerns(data, lambda family, table, chain: True) == "nftables: table other changed"
    assert concerns(data, lambda family, table, chain: chain == "FORWARD") == (
        "nftables: chain FORWARD of table filter changed"
    )
    assert concerns(data, lambda family, table, chain: False) == ""


@given(st.binary(max_size=300))
def test_any_bytes_are_survived(data: bytes) -> None:
    assert isinstance(concerns(data, lambda family, table, chain: False), str)


@given(st.binary(max_size=60), st.integers(0, 100))
def test_a_cut_message_is_survived(tail: bytes, cut: int) -> None:
    whole = message(NEWRULE, attribute(1, "filter"), attribute(2, "FORWARD"))
    assert isinstance(concerns(whole[:cut] + tail, lambda family, table, chain: False), str)


@pytest.fixture
def host() -> Iterator[Hosts]:
    with on_a_host() as hosts:
        yield hosts


class Heard:
    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.event = asyncio.Event()

    def __call__(self, why: str) -> None:
        self.reasons.append(why)
        self.event.set()

    async def something(self) -> str:
        async with asyncio.timeout(20):
            await self.event.wait()
        self.event.clear()
        return self.reasons[-1]


@pytest.mark.root
async def test_the_generation_grows_with_each_transaction(host: Hosts) -> None:
    counter = GenerationCounter()
    first = counter.read()
    assert first is not None
    assert counter.read() == first
    run("nft", "add table ip a; add table ip b")
    assert counter.read() == first + 1
    counter.close()
    assert counter.read() == first + 1
    counter.close()


@pytest.mark.root
async def test_only_what_is_of_interest_is_heard(host: Hosts) -> None:
    heard = Heard()
    monitor = NftMonitor(["mine"], lambda family, table, chain: table == "mine", heard)
    run("nft", "add table ip other; add chain ip other mine; add rule ip other mine accept; add table inet mine")
    run("nft", "add table ip mine")
    assert await heard.something() == "nftables: table mine changed"
    monitor.close()
    assert heard.reasons == ["nftables: table mine changed"]


@pytest.mark.root
async def test_more_than_the_kernel_can_keep_is_a_change(host: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wincey.kernel.nfmonitor._BUFFER", 64 * 1024)
    heard = Heard()
    monitor = NftMonitor(["nothing"], lambda family, table, chain: False, heard)
    rules = "\n".join(
        f"add rule ip other c ip saddr 10.0.{number >> 8}.{number & 255} accept" for number in range(5000)
    )
    run("nft", "-f", "-", text=f"add table ip other\nadd chain ip other c\n{rules}\n")
    assert await heard.something() == "nftables: more changed than the kernel could tell"
    run("nft", "add table ip later")
    await asyncio.sleep(1.2)
    assert len(heard.reasons) == 1
    monitor.close()


@pytest.mark.root
async def test_legacy_tables_are_seen_once_they_exist(host: Hosts) -> None:
    assert not legacy_tables(socket.AF_INET)
    run("iptables-legacy", "-t", "nat", "-S")
    assert legacy_tables(socket.AF_INET) == {"nat"}
    assert not legacy_tables(socket.AF_INET6)


@pytest.mark.root
@pytest.mark.parametrize(("program", "family"), [("iptables", socket.AF_INET), ("ip6tables", socket.AF_INET6)])
async def test_a_changed_legacy_table_is_noticed(host: Hosts, program: str, family: int) -> None:
    run(f"{program}-legacy", "-t", "nat", "-S")
    run(f"{program}-legacy", "-S")
    heard = Heard()
    poll = LegacyPoll(heard)
    poll.watch([(family, "nat"), (family, "filter")])
    await asyncio.sleep(1.2)
    assert heard.reasons == []
    run(f"{program}-legacy", "-t", "nat", "-A", "POSTROUTING", "-j", "ACCEPT")
    assert await heard.something() == "iptables-legacy: table nat changed"
    run(f"{program}-legacy", "-N", "SOME")
    assert await heard.something() == "iptables-legacy: table filter changed"
    poll.close()
