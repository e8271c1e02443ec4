"""The flowtable as the fast path: which flows, at which devices, and what is said where there is none. On a kernel: flowtable_guest.py."""

import msgspec
import pytest

from wincey.bpf import fastpath
from wincey.kernel.flowtable import explained, script, unserved
from wincey.model.address import Subnet
from wincey.model.fastpath import FastPath

PATH = FastPath(
    Subnet.parse("10.5.0.0/16"), Subnet.parse("10.5.1.0/24"), "eth0", bytes(4), form="vxlan", tunnel="flannel.1"
)


def test_the_table():
    text = script(PATH, "flannel-fast", ["flannel.1", "c1"])
    assert text.splitlines()[:2] == ["add table ip flannel-fast", "delete table ip flannel-fast"]
    assert 'devices = { "flannel.1", "c1" };' in text
    accepted = "meta l4proto { tcp, udp } ct state established ct status & 0x2070 == 0 flow add @flows"
    assert f"ip saddr 10.5.1.0/24 ip daddr 10.5.0.0/16 ip daddr != 10.5.1.0/24 {accepted}\n" in text
    assert f"ip daddr 10.5.1.0/24 ip saddr 10.5.0.0/16 ip saddr != 10.5.1.0/24 {accepted}\n" in text


def test_the_same_flows_as_by_programs():
    def lines(text, verdict):
        return [line.strip().removesuffix(verdict) for line in text.splitlines() if line.endswith(verdict)]

    by_flowtable = lines(script(PATH, "t", ["c1"]), " flow add @flows")
    assert by_flowtable == lines(fastpath.table(PATH, "t"), " meta mark set meta mark | 0x1000")
    assert len(by_flowtable) == 2


def test_before_there_is_a_device():
    assert script(PATH, "t", []) == "add table ip t\ndelete table ip t\ntable ip t {\n}\n"


def test_what_it_does_not_serve():
    assert unserved(PATH) == ""
    assert unserved(FastPath(PATH.network, PATH.subnet, "eth0", bytes(4))) == ""
    assert "vxlan and host-gw" in unserved(msgspec.structs.replace(PATH, form="udp"))
    assert unserved(msgspec.structs.replace(PATH, limit="a mark")) == "a mark, which a flowtable would lose"


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("/dev/stdin:2:5-15: Error: syntax error, unexpected string", "this nft does not know flowtables"),
        ("/dev/stdin:2:15-15: Error: Could not process rule: No such file or directory", "nf_flow_table"),
        ("/dev/stdin:2:15-15: Error: Could not process rule: Operation not supported", "nft_flow_offload"),
        ("Error: Could not process rule: Operation not permitted (needs root or CAP_NET_ADMIN)", "needs root"),
    ],
)
def test_what_nft_says_about_the_probe(said, means):
    assert means in explained(said)
