"""What keeps two networks of a host apart, by each program: the container's network, and another one called outside."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from support.rules_ns import ADDRESSES, Hosts, Reconciled, on_a_host, reconciled, run
from wincey.kernel.iptables import IptablesDriver
from wincey.kernel.nftables import NftablesDriver
from wincey.model.address import Subnet
from wincey.model.state import Isolation, RuleSet

pytestmark = pytest.mark.root

NETWORKS = {
    socket.AF_INET: ("10.3.0.0/16", "10.3.1.0/24", "172.31.0.0/24"),
    socket.AF_INET6: ("fd00:3::/48", "fd00:3:0:1::/64", "fd31::/64"),
}
PORT = 8472
PUBLISHED = """
table ip publish {
    chain prerouting {
        type nat hook prerouting priority -100;
        ip daddr 172.31.0.1 udp dport 80 dnat to 10.3.1.2:7777
    }
}
"""


def rules(family: int, *, others: bool = True) -> RuleSet:
    network, subnet, outside = map(Subnet.parse, NETWORKS[family])
    # Ranges of the other family, too: each set of rules takes its own.
    isolation = Isolation((outside, Subnet.parse("10.77.0.0/16"), Subnet.parse("fd77::/48")), ("remote",), PORT)
    if not others:
        isolation = Isolation((), ("remote",), PORT)
    return RuleSet(network, subnet, masquerade=True, forward=True, isolation=isolation)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with on_a_host(peers=True) as hosts:
        yield hosts


@pytest.fixture(params=["nftables", "iptables-nft", "iptables-legacy"])
async def kept(request: pytest.FixtureRequest, hosts: Hosts) -> AsyncIterator[Reconciled]:
    name = request.param
    driver = NftablesDriver("blue", isolating=True) if name == "nftables" else None
    async with reconciled(driver or IptablesDriver(name, "blue", isolating=True)) as kept:
        yield kept


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])
def family(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def arrives(hosts: Hosts, sender: str, receiver: str, family: int, *, source: str = "", port: int = 0) -> bool:
    """Whether a packet does. source: what it claims to come from. port: what it is sent to, else any that is free."""
    with hosts.udp(receiver, family, port=port) as into, hosts.udp(sender, family, bind=source) as out:
        into.settimeout(0.3)
        out.sendto(b"?", (ADDRESSES[family][receiver], into.getsockname()[1]))
        try:
            into.recvfrom(16)
        except TimeoutError:
            return False
        return True


async def test_what_passes_and_what_does_not(kept: Reconciled, hosts: Hosts, family: int) -> None:
    at = ADDRESSES[family]
    stranger = "192.0.2.9" if family == socket.AF_INET else "2001:db8::9"
    strays = [
        ("outside", "container", ""),  # another network
        ("container", "outside", ""),
        ("outside", "container", at["remote"]),  # as one of ours
        ("outside", "container", stranger),
        ("outside", "remote", at["container"]),
        ("outside", "remote", stranger),
    ]
    for sender, receiver, source in strays:
        assert arrives(hosts, sender, receiver, family, source=source), "else what follows would show nothing"
    kept.want(rules(family))
    await kept.once()
    assert not kept.failures
    for sender, receiver, source in strays:
        assert not arrives(hosts, sender, receiver, family, source=source), (sender, receiver, source)
    assert arrives(hosts, "container", "remote", family)
    assert arrives(hosts, "remote", "container", family)
    # Only hosts send to the port of the envelopes: into our network it may be somebody's own overlay.
    assert arrives(hosts, "container", "remote", family, port=PORT)
    kept.want(rules(family, others=False))
    await kept.once()
    assert not kept.failures
    assert arrives(hosts, "outside", "container", family)
    assert arrives(hosts, "container", "outside", family)
    assert not arrives(hosts, "container", "outside", family, port=PORT)
    assert not arrives(hosts, "container", "host-outside", family, port=PORT)
    assert not arrives(hosts, "outside", "container", family, source=at["remote"])


async def test_they_are_kept_and_go_without_a_trace(kept: Reconciled, hosts: Hosts, family: int) -> None:
    kept.want(rules(family))
    assert await kept.once()
    assert not await kept.once()
    kept.want(rules(family, others=False))
    assert await kept.once()
    assert not await kept.once()
    kept.want()
    assert await kept.once()
    shown = [run("nft", "list", "tables")]
    shown += [run(f"{program}-save") for program in ("iptables-legacy", "ip6tables-legacy", "iptables-nft")]
    assert not any(word in text for text in shown for word in ("flannel", "FLANNEL"))


async def test_a_rule_that_another_program_deletes_comes_back(kept: Reconciled, hosts: Hosts) -> None:
    kept.want(rules(socket.AF_INET))
    await kept.once()
    if isinstance(kept.driver, NftablesDriver):
        run("nft", "flush", "chain", "ip", "flannel-blue-ipv4", "ingress")
    else:
        assert isinstance(kept.driver, IptablesDriver)
        run(
            "iptables-legacy" if run("iptables-legacy-save") else "iptables-nft",
            "-t",
            "mangle",
            "-F",
            "FLANNEL-IN-blue",
        )
    assert arrives(hosts, "outside", "container", socket.AF_INET, source="192.0.2.9")
    assert await kept.once()
    assert not arrives(hosts, "outside", "container", socket.AF_INET, source="192.0.2.9")


async def test_a_published_port_of_another_network_is_closed(kept: Reconciled, hosts: Hosts) -> None:
    run("nft", "-f", "-", text=PUBLISHED)

    def arrives_published() -> bool:
        with hosts.udp("container", socket.AF_INET, port=7777) as into, hosts.udp("outside", socket.AF_INET) as out:
            into.settimeout(0.3)
            out.sendto(b"?", ("172.31.0.1", 80))
            try:
                into.recvfrom(16)
            except TimeoutError:
                return False
            return True

    assert arrives_published()
    kept.want(rules(socket.AF_INET))
    await kept.once()
    assert not arrives_published()
