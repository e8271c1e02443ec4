"""What several networks on a host have to agree on, the names they get, and which networks there are."""

from __future__ import annotations

import re
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wincey.agent.company import Company, NetworkConflict
from wincey.agent.life import network_suffix
from wincey.kernel.rules import check_suffix
from wincey.model.address import Subnet
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, UsageError
from wincey.model.networkname import check_network_name


def config(network: str, backend: str = '{"Type": "alloc"}', more: str = "") -> NetworkConfig:
    return NetworkConfig.parse(f'{{"Network": "{network}", "Backend": {backend}{more}}}')


V6 = ', "EnableIPv6": true, "IPv6Network": "fd00:1::/48"'


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (config("10.1.0.0/16"), config("10.1.64.0/18"), "10.1.64.0/18"),
        (config("10.1.64.0/18"), config("10.0.0.0/8"), "10.1.64.0/18"),
        (config("10.1.0.0/16", more=V6), config("10.2.0.0/16", more=V6), "fd00:1::/48"),
        (config("10.1.0.0/16", '{"Type": "vxlan"}'), config("10.2.0.0/16", '{"Type": "VXLAN", "VNI": 1}'), "VNI 1"),
        (config("10.1.0.0/16", '{"Type": "udp"}'), config("10.2.0.0/16", '{"Type": "udp", "Port": 8285}'), "port 8285"),
        (config("10.1.0.0/16", '{"Type": "vxlan"}'), config("10.2.0.0/16", '{"Type": "udp", "Port": 8472}'), "8472"),
    ],
)
def test_what_two_networks_can_not_both_have(first: NetworkConfig, second: NetworkConfig, why: str) -> None:
    company = Company()
    company.take("blue", first)
    with pytest.raises(NetworkConflict) as refused:
        company.take("green", second)
    assert all(word in str(refused.value) for word in ("blue", "green", why, "give one of them another"))
    assert company.others("blue").ranges == (), "what was refused takes nothing"
    company.take("blue", second)  # its own old claim is no obstacle
    company.release("blue")
    company.take("green", second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ('{"Type": "vxlan"}', '{"Type": "vxlan", "VNI": 2}'),
        ('{"Type": "udp"}', '{"Type": "udp", "Port": 8286}'),
        ('{"Type": "vxlan"}', '{"Type": "udp"}'),
        ('{"Type": "host-gw"}', '{"Type": "host-gw"}'),
    ],
)
def test_what_two_networks_can_have(first: str, second: str) -> None:
    company = Company()
    company.take("blue", config("10.1.0.0/16", first))
    company.take("green", config("10.2.0.0/16", second))
    assert company.others("blue").ranges == (Subnet.parse("10.2.0.0/16"),)


def test_devices_of_others() -> None:
    company = Company()
    company.take("blue", config("10.1.0.0/16", '{"Type": "vxlan", "VNI": 7}'))
    company.take("green", config("10.2.0.0/16", '{"Type": "udp"}'))
    assert company.others("green").devices == {"flannel.7", "flannel-v6.7"}
    assert company.others("blue").devices == frozenset()


def test_a_refused_change_leaves_what_was_taken() -> None:
    company = Company()
    company.take("blue", config("10.1.0.0/16"))
    company.take("green", config("10.2.0.0/16"))
    with pytest.raises(NetworkConflict):
        company.take("green", config("10.1.0.0/16"))
    with pytest.raises(BadConfig):
        company.take("green", config("10.4.0.0/16", '{"Type": "vxlan", "VNI": -1}'))
    assert company.others("blue").ranges == (Subnet.parse("10.2.0.0/16"),)


def test_the_others_hear_of_changes_and_only_of_changes() -> None:
    company, heard = Company(), []
    for name in ("blue", "green"):
        company.seat(name).listen(lambda name=name: heard.append(name))
    company.seat("blue").take(config("10.1.0.0/16", more=V6))
    company.seat("blue").take(config("10.1.0.0/16", more=V6))
    assert heard == ["green"]
    assert [each.family for each in company.others("green").ranges] == [socket.AF_INET, socket.AF_INET6]
    company.release("blue")
    company.release("blue")
    assert heard == ["green", "green"]
    company.seat("green").listen(None)
    company.take("blue", config("10.1.0.0/16"))
    assert heard == ["green", "green"]


def test_each_network_has_a_tun_name_of_its_own_and_keeps_it() -> None:
    company = Company()
    assert company.tun("blue", {"flannel.1", "cni0"}) == "flannel0"
    assert company.tun("green", {"flannel2"}) == "flannel2"
    assert company.tun("red", {"flannel0", "flannel2"}) == "flannel1"
    assert company.tun("green", ()) != company.tun("blue", ())
    company.release("red")
    assert company.tun("grey", ()) == "flannel1"


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True))
def test_every_network_has_a_suffix_that_fits(name: str) -> None:
    suffix = network_suffix(name)
    assert suffix
    assert check_suffix(suffix) == suffix
    assert (suffix == name) is (re.fullmatch("[a-z0-9][a-z0-9_]{0,10}", name) is not None)


def test_suffixes_of_similar_names_differ() -> None:
    names = ["production-east", "production-west", "Blue", "blue", "b-lue", "b.lue", "production"]
    assert len({network_suffix(name) for name in names}) == len(names)
    assert network_suffix("blue") == "blue"


@pytest.mark.parametrize(
    "name", ["", "_", "a/b", "..", "-a", "config", "subnets", "wincey", "x" * 64, "blue ", "bl\nue"]
)
def test_names_that_no_network_can_have(name: str) -> None:
    with pytest.raises(UsageError, match="can't be a network's name"):
        check_network_name(name)
