"""What a refusal of the kernel is told as: one line with what to do."""

from __future__ import annotations

import errno

import pytest

from wincey.kernel.netlink import Refusal
from wincey.kernel.reasons import explain
from wincey.model.address import Subnet, parse_address
from wincey.model.state import InterfaceAddress, Link, Object, Route

LINK = Link("flannel.1", "vxlan", 1450)
ROUTE = Route(Subnet.parse("10.3.2.0/24"), "eth0", parse_address("192.0.2.9"))
ROUTE_V6 = Route(Subnet.parse("fd03::/64"), "eth0", parse_address("fd99::9"))
ADDRESS = InterfaceAddress("flannel.1", Subnet.parse("10.3.1.0/32"))


@pytest.mark.parametrize(
    ("item", "refusal", "words"),
    [
        (LINK, Refusal(errno.EPERM), "CAP_NET_ADMIN"),
        (
            LINK,
            Refusal(errno.EOPNOTSUPP, "Unknown device type."),
            "Unknown device type; the kernel has no vxlan support",
        ),
        (LINK, Refusal(errno.EOPNOTSUPP), "`modprobe vxlan`"),
        (ROUTE, Refusal(errno.ENETUNREACH, "Nexthop has invalid gateway"), "gateway 192.0.2.9 is not on a network"),
        (
            ROUTE_V6,
            Refusal(errno.EHOSTUNREACH),
            "gateway fd99::9 is not on a network that is directly connected on eth0",
        ),
        (ROUTE_V6, Refusal(errno.EAFNOSUPPORT), "IPv6 seems to be disabled"),
        (ADDRESS, Refusal(errno.ENOMEM), "short of memory"),
    ],
    ids=str,
)
def test_known_refusals_say_what_to_do(item: Object, refusal: Refusal, words: str) -> None:
    text = explain(item, refusal)
    assert words in text
    assert "\n" not in text


def test_an_unknown_refusal_is_told_in_the_kernel_s_words() -> None:
    assert explain(ADDRESS, Refusal(errno.EINVAL, "ipv4: Invalid prefix.")) == "Invalid argument: ipv4: Invalid prefix"
    assert explain(ADDRESS, Refusal(errno.EEXIST)) == "File exists"
