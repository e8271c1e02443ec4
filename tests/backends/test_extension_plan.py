"""The extension backend's plan, and which commands run without a shell."""

import json

import pytest

from wincey.backends.base import HostFacts
from wincey.backends.catalogue import make
from wincey.model.address import parse_address
from wincey.model.command import Command, CommandFailed, CommandNetwork, CommandPeer
from wincey.model.config import BackendOptions, NetworkConfig
from wincey.model.errors import BadConfig, BadLease
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey

OWN, PEER = LeaseKey.parse("10.3.1.0-24"), LeaseKey.parse("10.3.2.0-24")
DUAL = {"EnableIPv6": True, "IPv6Network": "fd00:3::/48"}


def backend(found=None, network=None, **options):
    config = {"Network": "10.3.0.0/16", "Backend": {"Type": "extension", **options}} | (network or {})
    facts = HostFacts(
        underlay="eth0",
        mtu=1500,
        local=parse_address("10.99.0.1"),
        local_v6=parse_address("fd00:99::1"),
        public=parse_address("10.99.0.1"),
        public_v6=parse_address("fd00:99::1"),
        found=found or {},
    )
    return make(NetworkConfig.parse(json.dumps(config)), facts)


def lease(key=PEER, data=b"", **attrs):
    return Lease(key, LeaseAttrs(parse_address("10.99.0.2"), backend_type="extension", backend_data=data, **attrs))


def read(command, **options):
    return Command.read(BackendOptions.of({"C": command, **options}), "C")


@pytest.mark.parametrize(
    "text",
    [
        "ip route add $SUBNET via $PUBLIC_IP",
        "ip  route\tadd ${SUBNET} via $PUBLIC_IP dev eth0.5",
        "/usr/local/bin/add --subnet=$SUBNET,$PUBLIC_IP @x a:b",
        "echo 10%",
    ],
)
def test_plain_words_need_no_shell(text):
    assert read(text) == Command(tuple(text.split()))
    assert read(text, Shell=True) == Command((text,), sh=True)


@pytest.mark.parametrize(
    "text",
    [
        "ip link del x; true",
        "a && b",
        "echo `date`",
        "echo $(date)",
        "cut -d'/' -f1",
        'echo "$SUBNET"',
        "ip link del x 2>/dev/null",
        "wg genkey | wg pubkey",
        "ls *.conf",
        "cat ~/key",
        "read KEY",
        "export X=1",
        "X=1 program",
        "exit 1",
        ". /etc/defaults",
        "$PROGRAM x",
        "echo $SUBNETS",
        "echo $HOME",
        "echo ${SUBNET%/*}",
        "echo a\necho b",
        "echo a # why",
        "echo back\\slash",
    ],
)
def test_what_only_a_shell_understands_gets_one(text):
    assert read(text) == Command((text,), sh=True)
    assert read(text).argv({}) == ["sh", "-c", text]
    with pytest.raises(BadConfig, match=r"Backend\.C is .* but needs a shell, which Backend\.Shell is false for"):
        read(text, Shell=False)


def test_a_list_is_taken_as_it_is():
    command = read(["add", "a b", "x;y", "$SUBNET/${IFACE}", "5$"])
    assert command.argv({"SUBNET": "10.3.2.0/24", "IFACE": "eth0"}) == ["add", "a b", "x;y", "10.3.2.0/24/eth0", "5$"]
    with pytest.raises(CommandFailed, match=r"names \$IFACE, which is not set here"):
        command.argv({"SUBNET": "10.3.2.0/24"})


@pytest.mark.parametrize("command", [[], [""], ["a", 1], 7, True, {"a": 1}, "a\0b", ["a\0b"]])
def test_what_is_no_command_is_refused(command):
    with pytest.raises(BadConfig, match=r"Backend\.C is"):
        read(command)


@pytest.mark.parametrize("command", [None, "", "  "])
def test_no_command(command):
    assert read(command) is None


def test_plan():
    made = backend(
        {"output": "my key"},
        PostStartupCommand="up",
        SubnetAddCommand="add $SUBNET",
        ShutdownCommand=["down"],
        MTU=1450,
    )
    assert made.mtu == 1450
    assert made.attrs() == LeaseAttrs(parse_address("10.99.0.1"), backend_type="extension", backend_data=b'"my key"')
    own = (("NETWORK", "10.3.0.0/16"), ("SUBNET", "10.3.1.0/24"), ("PUBLIC_IP", "10.99.0.1"), ("IFACE", "eth0"))
    assert made.local(OWN) == [
        CommandNetwork((*own, ("MTU", "1450")), None, "my key", Command(("up",)), Command(("down",)))
    ]
    env = (("NETWORK", "10.3.0.0/16"), ("SUBNET", "10.3.2.0/24"), ("PUBLIC_IP", "10.99.0.2"), ("IFACE", "eth0"))
    assert made.peer(OWN, lease(data=b'"its key"')) == [
        CommandPeer("10.3.2.0/24", env, "its key", Command(("add", "$SUBNET")))
    ]


def test_without_a_start_command_nothing_is_published():
    assert backend().attrs().backend_data == b""
    assert backend({"output": ""}).attrs().backend_data == b'""'
    assert backend().mtu == 1500
    assert backend().peer(OWN, lease())[0].data == ""


def test_dual_stack_is_one_event():
    own, key = LeaseKey.parse("10.3.1.0-24&fd00:3:0:1::-64"), LeaseKey.parse("10.3.2.0-24&fd00:3:0:2::-64")
    [peer] = backend(network=DUAL).peer(own, lease(key, public_ipv6=parse_address("fd00:99::2")))
    assert peer.subnet == "10.3.2.0/24 fd00:3:0:2::/64"
    assert dict(peer.environment) == {
        "NETWORK": "10.3.0.0/16",
        "SUBNET": "10.3.2.0/24",
        "PUBLIC_IP": "10.99.0.2",
        "IPV6NETWORK": "fd00:3::/48",
        "IPV6SUBNET": "fd00:3:0:2::/64",
        "PUBLIC_IPV6": "fd00:99::2",
        "IFACE": "eth0",
    }


@pytest.mark.parametrize("data", [b'{"VtepMAC":"x"}', b"7", b"[]"])
def test_data_that_is_no_text_is_one_bad_lease(data):
    with pytest.raises(BadLease, match=r"extension data of lease 10\.3\.2\.0-24"):
        backend().peer(OWN, lease(data=data))


@pytest.mark.parametrize(("option", "words"), [({"CommandTimeout": 0}, "CommandTimeout"), ({"MTU": 20}, "MTU")])
def test_wrong_keys_are_explained(option, words):
    with pytest.raises(BadConfig, match=words):
        backend(**option)


def test_subnets_of_a_family_that_is_not_ours_are_left_out():
    key = LeaseKey.parse("0.0.0.0-0&fd00:3:0:2::-64")
    assert backend().peer(OWN, Lease(key, LeaseAttrs(backend_type="extension"))) == []
