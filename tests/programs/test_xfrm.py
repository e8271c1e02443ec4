"""Policies in the real kernel: what `ip xfrm` shows is the judge. No ESP is needed for policies."""

import asyncio

import pytest

from support.netns import netns
from wincey.model.address import Subnet, parse_address
from wincey.model.ipsec import XfrmPolicy
from wincey.programs.strongswan.xfrm import PolicyWatch, Xfrm, kernel_has_esp

pytestmark = pytest.mark.root

US, IT = parse_address("10.99.0.1"), parse_address("10.99.0.2")
NETWORK = Subnet.parse("10.3.0.0/16")
MINE, ITS = Subnet.parse("10.3.1.0/24"), Subnet.parse("10.3.2.0/24")
OUT = XfrmPolicy("out", MINE, ITS, (US, IT))
BLOCK = XfrmPolicy("out", Subnet.parse("0.0.0.0/0"), ITS, None)
ALL = [OUT, XfrmPolicy("in", ITS, MINE, (IT, US)), XfrmPolicy("fwd", ITS, MINE, (IT, US)), BLOCK]


@pytest.fixture
def host():
    with netns() as made:
        yield made


def with_xfrm(host, function):
    def inside():
        xfrm = Xfrm()
        try:
            return function(xfrm)
        finally:
            xfrm.close()

    return host.call(inside)


def test_policies_are_made_read_changed_and_deleted(host):
    assert with_xfrm(host, lambda xfrm: list(xfrm.change(ALL, []))) == []
    shown = " ".join(host.run("ip xfrm policy").split())
    for text in (
        "src 10.3.1.0/24 dst 10.3.2.0/24 dir out priority 0 ptype main"
        " tmpl src 10.99.0.1 dst 10.99.0.2 proto esp reqid 11 mode tunnel",
        "src 10.3.2.0/24 dst 10.3.1.0/24 dir in priority 0 ptype main"
        " tmpl src 10.99.0.2 dst 10.99.0.1 proto esp reqid 11 mode tunnel",
        "src 10.3.2.0/24 dst 10.3.1.0/24 dir fwd priority 0",
        "src 0.0.0.0/0 dst 10.3.2.0/24 dir out action block priority 11011",
    ):
        assert text in shown, shown
    assert set(with_xfrm(host, lambda xfrm: xfrm.policies([NETWORK]))) == set(ALL)

    moved = XfrmPolicy("out", MINE, ITS, (US, parse_address("10.99.0.3")))
    assert with_xfrm(host, lambda xfrm: list(xfrm.change([moved], []))) == []
    assert with_xfrm(host, lambda xfrm: list(xfrm.change([moved], []))) == [], "again is as good"
    assert set(with_xfrm(host, lambda xfrm: xfrm.policies([NETWORK]))) == {moved, *ALL[1:]}

    assert with_xfrm(host, lambda xfrm: list(xfrm.change([], [*ALL, OUT]))) == []
    assert host.run("ip xfrm policy") == ""


def test_those_of_flannel_are_ours_and_foreign_ones_are_not(host):
    template = "tmpl src 10.99.0.1 dst 10.99.0.9 proto esp mode tunnel"
    host.ip(f"xfrm policy add src 10.3.1.0/24 dst 10.3.9.0/24 dir out {template} reqid 11")
    host.ip(f"xfrm policy add src 10.3.1.0/24 dst 10.3.8.0/24 dir out {template} reqid 1")
    host.ip(f"xfrm policy add src 10.3.1.0/24 dst 10.3.7.0/24 proto udp dir out {template} reqid 11")
    host.ip(f"xfrm policy add src 10.8.1.0/24 dst 10.8.7.0/24 dir out {template} reqid 11")
    host.ip("xfrm policy add src 10.3.1.0/24 dst 10.3.6.0/24 dir out action block priority 5")
    host.ip("xfrm policy add src 10.3.1.0/24 dst 10.3.5.0/24 dir fwd priority 5")
    host.ip(
        "xfrm policy add src fd00::/64 dst fd01::/64 dir out tmpl src fd02::1 dst fd02::2 proto esp reqid 11 mode tunnel"
    )
    found = with_xfrm(host, lambda xfrm: xfrm.policies([NETWORK]))
    assert [str(policy) for policy in found] == [
        "xfrm policy out 10.3.1.0/24 to 10.3.9.0/24: esp 10.99.0.1 to 10.99.0.9"
    ]


def test_ten_thousand_at_once(host):
    many = [XfrmPolicy("out", MINE, Subnet(bytes([10, 3, n >> 8, n & 255]), 32), (US, IT)) for n in range(10_000)]
    assert with_xfrm(host, lambda xfrm: list(xfrm.change(many, []))) == []
    assert len(with_xfrm(host, lambda xfrm: xfrm.policies([NETWORK]))) == 10_000
    assert with_xfrm(host, lambda xfrm: list(xfrm.change([], many))) == []
    assert host.run("ip xfrm policy") == ""


def test_what_others_change_is_noticed_and_what_we_change_is_not(host):
    async def inside():
        xfrm, told = Xfrm(), asyncio.Queue()
        watch = PolicyWatch(xfrm.port, told.put_nowait)
        try:
            assert list(xfrm.change(ALL, [])) == []
            assert list(xfrm.change([], [BLOCK])) == []
            await asyncio.to_thread(host.run, "ip xfrm policy delete dir in src 10.3.2.0/24 dst 10.3.1.0/24")
            await asyncio.to_thread(host.run, "ip xfrm policy flush")
            async with asyncio.timeout(20):
                assert ["changed" in await told.get() for _ in range(2)] == [True, True]
            assert told.empty()
        finally:
            watch.close()
            xfrm.close()

    host.run_async(inside)


def test_whether_the_kernel_has_esp_is_found_out_without_a_trace(host):
    has = host.call(kernel_has_esp)
    template = (
        "src 127.0.0.1 dst 127.0.0.1 proto esp spi 0x1234 mode tunnel aead rfc4106(gcm(aes)) 0x" + "00" * 20 + " 128"
    )
    try:
        host.ip(f"xfrm state add {template}")
    except AssertionError:
        assert not has
    else:
        assert has
        host.ip("xfrm state flush")
    assert host.run("ip xfrm state") == ""
