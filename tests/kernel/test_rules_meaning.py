"""What the rules do to packets, whichever program carries them out: the same answers from each."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from support.rules_ns import ADDRESSES, Hosts, Reconciled, on_a_host, reconciled, run
from wincey.kernel.iptables import IptablesDriver
from wincey.kernel.nftables import NftablesDriver
from wincey.model.address import Subnet, single
from wincey.model.state import RuleSet

pytestmark = pytest.mark.root

NETWORKS: dict[int, tuple[Subnet, Subnet]] = {
    socket.AF_INET: (Subnet.parse("10.3.0.0/16"), Subnet.parse("10.3.1.0/24")),
    socket.AF_INET6: (Subnet.parse("fd00:3::/48"), Subnet.parse("fd00:3:0:1::/64")),
}


def rules(family: int, *, masquerade: bool = True, forward: bool = True, exclude: tuple[Subnet, ...] = ()) -> RuleSet:
    network, subnet = NETWORKS[family]
    return RuleSet(network, subnet, masquerade=masquerade, forward=forward, exclude=exclude)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with on_a_host(peers=True) as hosts:
        yield hosts


@pytest.fixture(params=["nftables", "iptables-nft", "iptables-legacy"])
async def kept(request: pytest.FixtureRequest, hosts: Hosts) -> AsyncIterator[Reconciled]:
    async with reconciled(NftablesDriver() if request.param == "nftables" else IptablesDriver(request.param)) as kept:
        yield kept


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])
def family(request: pytest.FixtureRequest) -> int:
    return int(request.param)


async def test_who_is_masqueraded(kept: Reconciled, hosts: Hosts, family: int) -> None:
    at = ADDRESSES[family]
    assert hosts.source("container", "outside", family) == at["container"]  # else what follows would show nothing
    kept.want(rules(family))
    await kept.once()
    assert not kept.failures
    assert hosts.source("container", "outside", family) == at["host-outside"]
    assert hosts.source("container", "remote", family) == at["container"]
    assert hosts.source("remote", "container", family) == at["remote"]
    assert hosts.source("outside", "container", family) == at["outside"]
    assert hosts.source("outside", "remote", family) == at["host-remote"]


async def test_the_host_itself_is_masqueraded_towards_a_remote_container(
    kept: Reconciled, hosts: Hosts, family: int
) -> None:
    at = ADDRESSES[family]
    elsewhere = at["host-outside"]  # an address of the host that is not that of the way out
    assert hosts.source("host", "remote", family, bind=elsewhere) == elsewhere
    kept.want(rules(family))
    await kept.once()
    assert hosts.source("host", "remote", family, bind=elsewhere) == at["host-remote"]


async def test_an_excluded_destination_sees_the_containers_address(kept: Reconciled, hosts: Hosts, family: int) -> None:
    at = ADDRESSES[family]
    outside = single(socket.inet_pton(family, at["outside"]))
    unrelated = single(socket.inet_pton(family, at["host-remote"]))
    kept.want(rules(family, exclude=(unrelated, outside)))
    await kept.once()
    assert hosts.source("container", "outside", family) == at["container"]
    assert hosts.source("outside", "remote", family) == at["host-remote"]  # towards the network nothing changes


@pytest.mark.parametrize("mark", [0x4000, 0xC001])
async def test_packets_that_kube_proxy_marked_are_left_to_it(
    kept: Reconciled, hosts: Hosts, family: int, mark: int
) -> None:
    elsewhere = ADDRESSES[family]["host-outside"]
    kept.want(rules(family))
    await kept.once()
    assert hosts.source("host", "remote", family, bind=elsewhere, mark=mark) == elsewhere
    assert hosts.source("host", "remote", family, bind=elsewhere, mark=mark ^ 0x4000) != elsewhere


async def test_without_masquerading_addresses_stay(kept: Reconciled, hosts: Hosts, family: int) -> None:
    kept.want(rules(family, masquerade=False))
    await kept.once()
    assert hosts.source("container", "outside", family) == ADDRESSES[family]["container"]


@pytest.mark.parametrize("program", ["iptables-nft", "iptables-legacy"])
async def test_nftables_gets_packets_through_a_closed_forward_chain(hosts: Hosts, family: int, program: str) -> None:
    program = program if family == socket.AF_INET else program.replace("iptables", "ip6tables")
    run(program, "-P", "FORWARD", "DROP")
    assert not hosts.passes("container", "remote", family)
    async with reconciled(NftablesDriver()) as kept:
        kept.want(rules(family))
        await kept.once()
        assert hosts.passes("container", "remote", family)
        assert hosts.passes("outside", "container", family)
        kept.want(rules(family, forward=False))
        await kept.once()
        assert not hosts.passes("container", "remote", family)


@pytest.mark.parametrize("program", ["iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize("closed_by", [["-P", "FORWARD", "DROP"], ["-A", "FORWARD", "-j", "REJECT"]], ids=" ".join)
async def test_iptables_gets_packets_through_a_closed_forward_chain(
    hosts: Hosts, program: str, closed_by: list[str]
) -> None:
    run(program, *closed_by)
    assert not hosts.passes("container", "remote", socket.AF_INET)
    async with reconciled(IptablesDriver(program)) as kept:
        kept.want(rules(socket.AF_INET))
        await kept.once()
        assert hosts.passes("container", "remote", socket.AF_INET)


# ---- beside the rules of others, which come after ours


SERVICE: dict[int, str] = {socket.AF_INET: "10.96.0.1", socket.AF_INET6: "fd96::1"}
PORT = 4096


def filtered(family: int, *rule: str) -> None:
    run("iptables-nft" if family == socket.AF_INET else "ip6tables-nft", *rule)


def forwarded_to(family: int, destination: str, to: str) -> None:
    """A rule as kube-proxy and Docker have them: what is sent to a port somewhere goes to a container instead."""
    target = f"{to}:{PORT}" if family == socket.AF_INET else f"[{to}]:{PORT}"
    match = ["-d", destination, "-p", "udp", "--dport", str(PORT)]
    filtered(family, "-t", "nat", "-A", "PREROUTING", *match, "-j", "DNAT", "--to-destination", target)


def call(hosts: Hosts, client: str, server: str, family: int, to: str) -> tuple[str, str]:
    """Ask at a port that leads to a container: whom the container sees, and who answers."""
    with hosts.udp(client, family) as asking, hosts.udp(server, family, port=PORT) as answering:
        asking.sendto(b"?", (to, PORT))
        _, seen = answering.recvfrom(16)
        answering.sendto(b"!", seen)
        return seen[0], asking.recvfrom(16)[1][0]


@pytest.mark.parametrize(("client", "server"), [("container", "remote"), ("remote", "container")])
async def test_a_service_answers_by_its_own_address(
    kept: Reconciled, hosts: Hosts, family: int, client: str, server: str
) -> None:
    """Its answer is a packet between two containers like any other, and must be translated back all the same."""
    kept.want(rules(family))
    await kept.once()
    forwarded_to(family, SERVICE[family], ADDRESSES[family][server])
    assert call(hosts, client, server, family, SERVICE[family]) == (ADDRESSES[family][client], SERVICE[family])
    assert not kept.failures


async def test_a_published_port_leads_to_a_container_here_which_sees_who_asks(
    kept: Reconciled, hosts: Hosts, family: int
) -> None:
    at = ADDRESSES[family]
    kept.want(rules(family))
    await kept.once()
    forwarded_to(family, at["host-outside"], at["container"])
    assert call(hosts, "outside", "container", family, at["host-outside"]) == (at["outside"], at["host-outside"])


async def test_a_node_port_leads_to_a_container_elsewhere_by_the_rules_of_who_marked_it(
    kept: Reconciled, hosts: Hosts, family: int
) -> None:
    at = ADDRESSES[family]
    kept.want(rules(family))
    await kept.once()
    match = ["-d", at["host-outside"], "-p", "udp", "--dport", str(PORT)]
    filtered(family, "-t", "mangle", "-A", "PREROUTING", *match, "-j", "MARK", "--set-xmark", "0x4000/0x4000")
    forwarded_to(family, at["host-outside"], at["remote"])
    marked = ["-m", "mark", "--mark", "0x4000/0x4000"]
    filtered(family, "-t", "nat", "-A", "POSTROUTING", *marked, "-j", "MASQUERADE")
    assert call(hosts, "outside", "remote", family, at["host-outside"]) == (at["host-remote"], at["host-outside"])


async def test_a_policy_that_knows_connections_still_does(kept: Reconciled, hosts: Hosts, family: int) -> None:
    """A container may ask another one, and be answered; the other one may not ask."""
    at = ADDRESSES[family]
    kept.want(rules(family))
    await kept.once()
    word = "ip" if family == socket.AF_INET else "ip6"
    there, here = at["remote"], at["container"]
    run(
        "nft",
        "add table inet limits;"
        "add chain inet limits forward { type filter hook forward priority 10; policy accept; };"
        "add rule inet limits forward ct state established accept;"
        f"add rule inet limits forward {word} saddr {there} {word} daddr {here} drop",
    )
    assert call(hosts, "container", "remote", family, there) == (here, there)
    assert not hosts.passes("remote", "container", family)


async def test_no_packet_meets_a_gap_while_rules_are_replaced(kept: Reconciled, hosts: Hosts) -> None:
    """New connections leave the container all the time; one that met no rules would keep its own address."""
    at = ADDRESSES[socket.AF_INET]
    kept.want(rules(socket.AF_INET))
    await kept.once()
    sources: list[str] = []
    with hosts.udp("outside", socket.AF_INET) as into:
        to = (at["outside"], into.getsockname()[1])

        async def connections() -> None:
            while True:
                for _ in range(5):
                    with hosts.udp("container", socket.AF_INET) as one:
                        one.sendto(b"?", to)
                    sources.append(into.recvfrom(16)[1][0])
                await asyncio.sleep(0)

        sending = asyncio.create_task(connections())
        for number in range(2, 22):
            kept.want(
                RuleSet(NETWORKS[socket.AF_INET][0], Subnet.parse(f"10.3.{number}.0/24"), masquerade=True, forward=True)
            )
            assert await kept.once()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    assert len(sources) > 100
    assert set(sources) == {at["host-outside"]}
