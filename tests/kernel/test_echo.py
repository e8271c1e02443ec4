"""Echo requests between namespaces: answers, silence, complaints, and the path's MTU with and without them."""

import asyncio

import pytest

from support.netns import joined, netns
from wincey.kernel.echo import Echo, path_mtu
from wincey.model.address import parse_address

pytestmark = pytest.mark.root


@pytest.fixture
def path():
    """left 10.98.1.1 - router - right 10.98.2.2, the second link with an MTU of 1400; and the same in IPv6."""
    with netns() as left, netns() as router, netns() as right:
        router.ip(f"link add left type veth peer name eth0 netns {left.name}")
        router.ip(f"link add right mtu 1400 type veth peer name eth0 netns {right.name} mtu 1400")
        for end, device, number, host in (
            (left, "eth0", 1, 1),
            (router, "left", 1, 254),
            (router, "right", 2, 254),
            (right, "eth0", 2, 2),
        ):
            end.ip(f"address add 10.98.{number}.{host}/24 dev {device}")
            end.ip(f"address add fd98:{number}::{host:x}/64 dev {device} nodad")
            end.ip(f"link set {device} up")
        for end, number in ((left, 1), (right, 2)):
            end.ip(f"route add default via 10.98.{number}.254")
            end.ip(f"route add default via fd98:{number}::fe")
        router.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
        yield left, router, right


def run(host, source, work):
    """Run `work(echo)` in a host's namespace."""

    async def main():
        with Echo(parse_address(source)) as echo:
            return await work(echo)

    return host.call(lambda: asyncio.run(main()))


@pytest.mark.parametrize(("source", "target"), [("10.99.0.1", "10.99.0.2"), ("fd99::1", "fd99::2")])
def test_an_address_that_is_there_answers(source, target):
    with joined() as (left, _):
        address = parse_address(target)

        async def ask(echo):
            return await asyncio.gather(*(echo.ask(address, timeout=5) for _ in range(50)))

        answers = run(left, source, ask)
        assert all(0 <= answer.rtt < 5 for answer in answers)
        assert {answer.by for answer in answers} == {address}


def test_silence_a_missing_route_and_a_firewall_are_told_apart():
    with joined() as (left, right):

        async def ask(echo):
            return [await echo.ask(parse_address(to), timeout=2) for to in ("10.99.0.2", "192.0.2.1")]

        assert run(left, "10.99.0.1", ask)[1].refusal == "network is unreachable"
        right.run("nft add table ip f")
        right.run("nft add chain ip f i { type filter hook input priority 0 ; }")
        right.run("nft add rule ip f i icmp type echo-request drop")
        assert run(left, "10.99.0.1", ask)[0].rtt is None
        right.run("nft flush chain ip f i")
        right.run("nft add rule ip f i icmp type echo-request reject with icmp admin-prohibited")
        answer = run(left, "10.99.0.1", ask)[0]
        assert (answer.rtt, answer.refusal, answer.by) == (None, "prohibited", parse_address("10.99.0.2"))


@pytest.mark.parametrize(("source", "target"), [("10.98.1.1", "10.98.2.2"), ("fd98:1::1", "fd98:2::2")])
def test_the_mtu_of_a_path_is_found(path, source, target):
    left, router, _ = path
    address = parse_address(target)

    async def ask(echo):
        for _ in range(20):  # IPv6 takes its time with new addresses
            if (await echo.ask(address)).rtt is not None:
                break
        return await echo.ask(address, size=1500), await path_mtu(echo, address, most=1500)

    answer, found = run(left, source, ask)
    assert (answer.refusal, answer.mtu) == ("too big", 1400)
    assert found == 1400
    # A black hole: the router says nothing any more.
    family = "ip" if "." in target else "ip6"
    router.run(f"nft add table {family} f")
    router.run(f"nft add chain {family} f o {{ type filter hook output priority 0 ; }}")
    words = "icmp type destination-unreachable" if family == "ip" else "icmpv6 type packet-too-big"
    router.run(f"nft add rule {family} f o {words} drop")
    assert run(left, source, ask)[1] == 1400

    # It need not be smaller than what is asked for, and nobody need be there.
    async def most(echo):
        return await path_mtu(echo, address, most=1200), await path_mtu(echo, parse_address(source), most=9000)

    assert run(left, source, most) == (1200, 9000)

    async def nobody(echo):
        there_is_none = parse_address("10.98.2.77" if "." in target else "fd98:2::77")
        return await path_mtu(echo, there_is_none, most=1500, timeout=0.2)

    assert run(left, source, nobody) == 0


def test_an_address_that_the_host_lacks_is_refused():
    with netns() as host, pytest.raises(OSError, match="assign requested address"):
        host.call(lambda: Echo(parse_address("10.9.9.9")))
