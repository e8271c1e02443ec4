"""Bridge netfilter is off while nobody needs it: on a real kernel, in a network namespace of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from support.rules_ns import Hosts, Reconciled, on_a_host, reconciled, run
from wincey.kernel.bridgenf import MARKER
from wincey.kernel.iptables import clear_everything
from wincey.kernel.nftables import NftablesDriver
from wincey.model.address import Subnet
from wincey.model.state import Isolation, RuleSet

pytestmark = pytest.mark.root

V4 = RuleSet(Subnet.parse("10.3.0.0/16"), Subnet.parse("10.3.1.0/24"), masquerade=True, forward=True)
V6 = RuleSet(Subnet.parse("fd00:3::/48"), Subnet.parse("fd00:3:0:1::/64"), masquerade=True, forward=True)


def setting(family: int = socket.AF_INET) -> Path:
    name = "iptables" if family == socket.AF_INET else "ip6tables"
    return Path(f"/proc/sys/net/bridge/bridge-nf-call-{name}")


def on(family: int = socket.AF_INET) -> bool:
    """As the test's thread sees it, which is in the host's namespace."""
    return setting(family).read_text() == "1\n"


@pytest.fixture
def host() -> Iterator[Hosts]:
    with on_a_host() as hosts:
        if not setting().exists():
            pytest.skip("this kernel has no bridge netfilter")
        setting().write_text("1\n")
        setting(socket.AF_INET6).write_text("1\n")
        yield hosts


@pytest.fixture
async def kept(host: Hosts) -> AsyncIterator[Reconciled]:
    async with reconciled(NftablesDriver(), watched=True) as kept:
        yield kept


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


async def test_it_is_off_where_no_rules_but_ours_are_there_and_on_again_at_the_end(kept: Reconciled) -> None:
    kept.want(V4)
    await kept.once()
    assert not on()
    assert on(socket.AF_INET6)  # no rules of ours in that family: nothing to spare
    kept.want(V4, V6)
    await kept.once()
    assert not on(socket.AF_INET6)
    await kept.driver.close()
    assert on()
    assert on(socket.AF_INET6)
    assert MARKER not in run("nft", "list", "ruleset")


@pytest.mark.parametrize(
    "rules",
    [
        ["nft", "add table ip firewall"],
        ["nft", "add table inet firewall"],
        ["iptables-nft", "-t", "nat", "-A", "PREROUTING", "-d", "10.96.0.1", "-j", "DNAT", "--to", "10.3.1.2"],
        ["iptables-legacy", "-A", "FORWARD", "-j", "DROP"],
    ],
    ids=" ".join,
)
async def test_rules_of_others_turn_it_on_at_once_and_keep_it_on(kept: Reconciled, rules: list[str]) -> None:
    kept.want(V4)
    await kept.once()
    assert not on()
    run(*rules)
    await until(on)
    kept.want(RuleSet(V4.network, Subnet.parse("10.3.7.0/24"), masquerade=True, forward=True))
    await kept.once()
    assert on()
    assert MARKER not in run("nft", "list", "ruleset")


@pytest.mark.parametrize("rules", ["add table ip firewall", "add table inet firewall"])
async def test_with_rules_of_others_it_is_never_touched(kept: Reconciled, rules: str) -> None:
    run("nft", rules)
    before = run("nft", "list", "tables")
    kept.want(V4)
    await kept.once()
    assert on()
    assert run("nft", "list", "tables") == before + "table ip flannel-ipv4\n"


@pytest.mark.parametrize("rules", ["add table ip6 firewall", "add table bridge firewall", "add table ip flannel-fast"])
async def test_rules_for_other_packets_are_no_reason(kept: Reconciled, rules: str) -> None:
    run("nft", rules)
    kept.want(V4)
    await kept.once()
    assert not on()


async def test_who_turns_it_on_while_we_run_keeps_it_on(kept: Reconciled) -> None:
    kept.want(V4)
    await kept.once()
    setting().write_text("1\n")
    for number in (7, 8):
        kept.want(RuleSet(V4.network, Subnet.parse(f"10.3.{number}.0/24"), masquerade=True, forward=True))
        await kept.once()
        assert on()


async def test_who_had_it_off_before_keeps_it_off(kept: Reconciled) -> None:
    setting().write_text("0\n")
    kept.want(V4)
    await kept.once()
    run("nft", "add table ip firewall")
    kept.want(RuleSet(V4.network, Subnet.parse("10.3.7.0/24"), masquerade=True, forward=True))
    await kept.once()
    assert not on()
    await kept.driver.close()
    assert not on()


async def test_the_word_for_the_next_one_is_kept(kept: Reconciled) -> None:
    kept.want(V4)
    await kept.once()
    run("nft", "flush", "ruleset")
    await kept.repaired(lambda: MARKER in run("nft", "list", "ruleset"))
    assert not on()


async def test_several_networks_on_a_host_leave_it_on(kept: Reconciled) -> None:
    apart = Isolation((Subnet.parse("10.4.0.0/16"),))
    kept.want(RuleSet(V4.network, V4.subnet, masquerade=True, forward=True, isolation=apart))
    await kept.once()
    assert on()


@pytest.mark.parametrize("end", ["rules", "cleanup"])
async def test_what_a_killed_daemon_turned_off_is_turned_on_by_the_next_one(host: Hosts, end: str) -> None:
    run("nft", f"add table ip flannel-ipv4; add chain ip flannel-ipv4 {MARKER}")  # all that there is of it
    setting().write_text("0\n")
    if end == "cleanup":
        await clear_everything("", [])
    else:
        run("nft", "add table ip firewall")
        async with reconciled(NftablesDriver()) as kept:
            kept.want(V4)
            await kept.once()
    assert on()
    assert MARKER not in run("nft", "list", "ruleset")


async def test_a_daemon_after_a_killed_one_takes_over(host: Hosts) -> None:
    run("nft", f"add table ip flannel-ipv4; add chain ip flannel-ipv4 {MARKER}")
    setting().write_text("0\n")
    async with reconciled(NftablesDriver()) as kept:
        kept.want(V4)
        await kept.once()
        assert not on()
        run("nft", "add table ip firewall")
        await until(on)


async def test_a_service_beside_its_client_answers_by_its_own_address(kept: Reconciled, host: Hosts) -> None:
    """What bridge netfilter is for: the answer stays on the bridge, and has to be translated back there."""
    run("ip", "link", "add", "cni0", "type", "bridge")
    run("ip", "address", "add", "10.3.1.1/24", "dev", "cni0")
    run("ip", "link", "set", "cni0", "up")
    run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    for number, name in ((2, "remote"), (3, "outside")):  # names that Hosts.udp knows
        netns = host.name(name)
        run("ip", "netns", "add", netns)
        host.made.append(netns)
        run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", netns)
        run("ip", "link", "set", name, "master", "cni0", "up")
        run("ip", "-n", netns, "address", "add", f"10.3.1.{number}/24", "dev", "eth0")
        run("ip", "-n", netns, "link", "set", "eth0", "up")
        run("ip", "-n", netns, "route", "add", "default", "via", "10.3.1.1")
    kept.want(V4)
    await kept.once()
    assert not on()
    rule = "-t nat -A PREROUTING -d 10.96.0.1 -p udp --dport 4096 -j DNAT --to-destination 10.3.1.3:4096"
    run("iptables-nft", *rule.split())
    await until(on)
    with host.udp("remote", socket.AF_INET) as asking, host.udp("outside", socket.AF_INET, port=4096) as answering:
        asking.sendto(b"?", ("10.96.0.1", 4096))
        _, seen = answering.recvfrom(16)
        assert seen[0] == "10.3.1.2"
        answering.sendto(b"!", seen)
        assert asking.recvfrom(16)[1][0] == "10.96.0.1"
