"""vici as bytes, and what charon is told of a peer, beside what flannel tells it."""

import pytest

from wincey.model.address import Subnet, parse_address
from wincey.model.ipsec import IpsecPeer, IpsecTerms
from wincey.programs.strongswan import vici
from wincey.programs.strongswan.connections import connection_name, definition, fingerprint, has_tunnel, read

US, IT = parse_address("10.99.0.1"), parse_address("10.99.0.2")
TERMS = IpsecTerms(US, "psk", "kernel", "aes128gcm16-sha256-prfsha256-ecp256", False)
PEER = IpsecPeer(Subnet.parse("10.3.1.0/24"), Subnet.parse("10.3.2.0/24"), US, IT, TERMS)
NAME = "10.99.0.1-10.3.1.0/24-10.3.2.0/24-10.99.0.2"
# The example of strongSwan's own description of the protocol.
MESSAGE = {"key1": "value1", "section1": {"sub-section": {"key2": "value2"}, "list1": ["item1", "item2"]}}
BYTES = (
    b"\x03\x04key1\x00\x06value1\x01\x08section1\x01\x0bsub-section\x03\x04key2\x00\x06value2\x02\x04\x05list1"
    b"\x05\x00\x05item1\x05\x00\x05item2\x06\x02"
)


def test_the_protocols_own_example():
    packet = vici.packet(vici.RESPONSE, message=MESSAGE)
    assert packet == (len(BYTES) + 1).to_bytes(4, "big") + b"\x01" + BYTES
    assert vici.take(bytearray(packet)) == (vici.RESPONSE, "", MESSAGE)


def test_packets_arrive_in_pieces_and_several_at_once():
    packets = vici.packet(vici.REQUEST, "version") + vici.packet(vici.EVENT, "list-sa", MESSAGE)
    buffer, taken = bytearray(), []
    for byte in packets:
        buffer.append(byte)
        while reply := vici.take(buffer):
            taken.append(reply)
    assert taken == [(vici.REQUEST, "version", {}), (vici.EVENT, "list-sa", MESSAGE)]
    assert not buffer


def test_any_bytes_can_be_a_value():
    key = bytes(range(256)).decode(errors="surrogateescape")
    packet = vici.packet(vici.REQUEST, "load-key", {"data": key})
    assert bytes(range(256)) in packet
    assert vici.take(bytearray(packet)) == (vici.REQUEST, "load-key", {"data": key})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x01\x03\x04ke",  # ends in a name
        b"\x01\x03\x04key1\x00\x06val",  # in a value
        b"\x01\x01\x04sect",  # in a section
        b"\x01\x04\x04list\x05\x00\x01a",  # in a list
        b"\x01\x04\x04list\x03\x00\x01a\x06",  # something else in a list
        b"\x01\x02",  # an end without a start
        b"\x01\x09",
        b"\x00\x07ver",
    ],
)
def test_what_is_no_packet_is_refused(body):
    with pytest.raises(ValueError, match="vici"):
        vici.take(bytearray(len(body).to_bytes(4, "big") + body))


def test_a_length_that_charon_never_sends_is_refused():
    with pytest.raises(ValueError, match="bytes"):
        vici.take(bytearray(b"\xff\xff\xff\xff"))


def test_what_a_peer_can_see_of_a_connection_is_flannels():
    """Names, addresses, identities, selectors, proposals and times: compatibility reference, section 6.6."""
    ((name, connection),) = definition(PEER).items()
    assert name == NAME
    assert connection["version"] == "2"
    assert connection["proposals"] == ["aes256-sha256-modp4096"]
    assert (connection["local_addrs"], connection["remote_addrs"]) == (["10.99.0.1"], ["10.99.0.2"])
    assert (connection["keyingtries"], connection["encap"]) == ("0", "no")
    assert connection["local"] == {"auth": "psk", "id": "10.99.0.1"}
    assert connection["remote"] == {"auth": "psk", "id": "10.99.0.2"}
    ((child, content),) = connection["children"].items()
    assert child == "10.3.1.0/24-10.3.2.0/24"
    assert (content["local_ts"], content["remote_ts"]) == (["10.3.1.0/24"], ["10.3.2.0/24"])
    assert content["esp_proposals"] == ["aes128gcm16-sha256-prfsha256-ecp256"]
    assert [content[key] for key in ("mode", "reqid", "rekey_time", "policies", "dpd_action")] == [
        "tunnel",
        "11",
        "1h",
        "no",
        "restart",
    ]


def test_user_space_esp_keeps_policies_and_tells_tunnels_apart_itself():
    terms = IpsecTerms(US, "cert", "user", "aes256gcm16", True)
    ((_, connection),) = definition(IpsecPeer(PEER.own, PEER.subnet, US, IT, terms)).items()
    ((_, child),) = connection["children"].items()
    assert child["policies"] == "yes"
    assert "reqid" not in child
    assert (connection["encap"], connection["local"]["auth"], connection["remote"]["auth"]) == (
        "yes",
        "pubkey",
        "pubkey",
    )
    assert fingerprint(terms) != fingerprint(TERMS)


def test_a_connection_is_known_by_its_name():
    found = read(NAME, {"local_addrs": ["10.99.0.1"]})
    assert found == (IpsecPeer(PEER.own, PEER.subnet, US, IT, None), "10.99.0.1")
    assert connection_name(found[0]) == NAME
    for foreign in ("home", "10.99.0.1-10.3.1.0/24-10.3.2.0/24", "10.99.0.1-10.3.1.0/99-10.3.2.0/24-10.99.0.2"):
        assert read(foreign, {"local_addrs": ["10.99.0.1"]}) is None
    assert read(NAME, {}) is None


@pytest.mark.parametrize(
    ("state", "children", "expected"),
    [
        ("CONNECTING", {}, (False, True)),
        ("ESTABLISHED", {}, (False, False)),
        ("ESTABLISHED", {"c-1": {"state": "INSTALLED"}}, (True, False)),
        ("ESTABLISHED", {"c-1": {"state": "DELETED"}, "c-2": {"state": "REKEYING"}}, (True, False)),
        ("DELETING", {"c-1": {"state": "DELETING"}}, (False, False)),
    ],
)
def test_a_tunnel_is_a_child_with_keys(state, children, expected):
    assert has_tunnel({"state": state, "child-sas": children}) == expected
