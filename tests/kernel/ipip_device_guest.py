"""ipip devices by the rtnetlink driver, on a kernel that has them; `ip` is the judge. Run by tests/e2e/test_stock_kernel.py."""

from __future__ import annotations

import pytest

from support.netns import joined
from wincey.kernel.diff import diff
from wincey.kernel.rtnetlink import RtnetlinkDriver
from wincey.model.address import Subnet, parse_address
from wincey.model.state import InterfaceAddress, Ipip, Link, Route, Scope

LINK = Link("flannel.ipip", "ipip", 1480, ipip=Ipip(parse_address("10.99.0.1")))
SCOPE = Scope(("flannel.ipip",), (Subnet.parse("10.3.0.0/16"),))
WHOLE = [
    LINK,
    InterfaceAddress("flannel.ipip", Subnet.parse("10.3.1.0/32")),
    Route(Subnet.parse("10.3.2.0/24"), "flannel.ipip", parse_address("10.99.0.2"), onlink=True),
]


@pytest.fixture(scope="module")
def shared():
    with joined() as (left, _):
        yield left


@pytest.fixture
def host(shared):
    """The one host, without devices that the test before has left: in a guest, making a namespace takes seconds."""
    yield shared
    for link in shared.json("ip -j link"):
        if link["ifname"] in ("flannel.ipip", "mine"):
            shared.ip(f"link del {link['ifname']}")


def settle(host, objects, *, stable=True):
    """Make the host so; returns what was put, and why something could not be."""
    desired = {item.key: item for item in objects}

    async def main():
        driver = RtnetlinkDriver()
        try:
            changes = diff(desired, await driver.observe(desired, SCOPE))
            failures = await driver.apply(changes)
            assert not stable or not diff(desired, await driver.observe(desired, SCOPE))
        finally:
            await driver.close()
        return changes.put, [failure.reason for failure in failures]

    return host.run_async(main)


def show(host):
    return host.run("ip -d link show flannel.ipip")


def ifindex(host):
    return host.json("ip -j link show flannel.ipip")[0]["ifindex"]


def test_made_found_and_removed(host):
    assert settle(host, WHOLE) == (WHOLE, [])
    [link] = host.json("ip -j -d link show flannel.ipip")
    data = link["linkinfo"]["info_data"]
    assert (link["mtu"], link["linkinfo"]["info_kind"], "UP" in link["flags"]) == (1480, "ipip", True)
    assert (data["local"], data["remote"], data["pmtudisc"]) == ("10.99.0.1", "any", False)
    assert settle(host, WHOLE) == ([], [])
    settle(host, [])
    left = [link["ifname"] for link in host.json("ip -j link show type ipip")]
    assert left == ["tunl0"]  # the kernel's own, which comes with the module


@pytest.mark.parametrize("rest", ["nopmtudisc", "ttl 64", "pmtudisc"])  # flannel's first
def test_a_device_that_reaches_peers_is_kept_as_it_is(host, rest):
    host.ip(f"link add flannel.ipip mtu 1480 type ipip local 10.99.0.1 {rest}")
    host.ip("link set flannel.ipip up")
    before = show(host)
    put, failures = settle(host, WHOLE)
    assert (LINK in put, failures) == (False, [])
    assert show(host) == before


@pytest.mark.parametrize("made", ["local 10.99.0.77", "local 10.99.0.1 dev eth0"])
def test_another_local_address_or_device_is_put_right_in_place(host, made):
    host.ip(f"link add flannel.ipip type ipip {made}")
    before = ifindex(host)
    assert settle(host, WHOLE)[1] == []
    assert ifindex(host) == before


@pytest.mark.parametrize("made", ["remote 10.99.0.2", "external", "encap fou encap-sport 5555 encap-dport 5555"])
def test_one_that_leads_elsewhere_is_made_anew(host, made):
    """The kernel refuses to change the first in place, and passes over the wish to change the others."""
    host.run("modprobe fou")
    host.ip(f"link add flannel.ipip type ipip local 10.99.0.1 {made}")
    before = ifindex(host)
    assert settle(host, [LINK]) == ([LINK], [])
    assert ifindex(host) != before


def test_a_device_of_another_kind_is_refused_and_left(host):
    host.ip("link add flannel.ipip type bridge")
    _, failures = settle(host, [LINK], stable=False)
    assert failures == ["device flannel.ipip is already there and of kind bridge, not ipip: rename or remove it"]
    assert "bridge" in show(host)


def test_the_only_place_taken_by_another_device_is_told(host):
    host.ip("link add mine type ipip local 10.99.0.1")
    _, failures = settle(host, [LINK], stable=False)
    assert failures == [
        "device mine is an ipip tunnel from 10.99.0.1 to any address already, and the kernel allows one:"
        " remove it (`ip link delete mine`)"
    ]
