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
