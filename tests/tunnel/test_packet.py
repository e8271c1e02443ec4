import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wincey.model.checksum import checksum
from wincey.tunnel import packet


def ipv4(payload=b"", *, protocol=17, source="10.3.1.2", destination="10.3.9.9", fragment=0, options=b""):
    words = 5 + len(options) // 4
    return (
        struct.pack(
            "!BBHHHBBH4s4s",
            0x40 | words,
            0,
            words * 4 + len(payload),
            7,
            fragment,
            64,
            protocol,
            0,
            ipaddress.ip_address(source).packed,
            ipaddress.ip_address(destination).packed,
        )
        + options
        + payload
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (ipv4(b"x"), ""),
        (ipv4(), ""),
        (ipv4(b"x", options=b"\x94\x04\0\0"), ""),
        (b"", "short"),
        (ipv4()[:19], "short"),
        (bytes([0x60]) + bytes(39), "version"),
        (bytes([0x44]) + ipv4()[1:], "header"),
        (bytes([0x4F]) + ipv4()[1:], "header"),
        (ipv4(b"xyz")[:-1], "length"),
        (ipv4(b"xyz") + b"!", "length"),
    ],
)
def test_fault_names_what_is_wrong(data, reason):
    assert packet.fault(data) == reason


@given(st.binary(max_size=100))
def test_no_input_raises(data):
    if not packet.fault(data):
        packet.may_be_answered(data)
        packet.net_unreachable(data, bytes(4))


@given(st.binary(max_size=200))
def test_checksum_over_data_with_its_checksum_is_zero(data):
    data += b"\0" * (len(data) % 2)
    assert checksum(data + struct.pack("!H", checksum(data))) == 0


def test_checksum_of_the_rfc_1071_example():
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == ~0xDDF2 & 0xFFFF


def test_net_unreachable_quotes_the_packet():
    original = ipv4(b"payload!" * 100)
    error = packet.net_unreachable(original, b"\x0a\x03\x01\x00")
    assert packet.fault(error) == ""
    assert len(error) == 576
    assert error[9] == 1
    assert error[12:20] == b"\x0a\x03\x01\x00" + original[12:16]
    assert error[20:22] == b"\x03\x00"
    assert checksum(error[20:]) == 0
    assert original.startswith(error[28:])


@pytest.mark.parametrize(
    ("data", "answered"),
    [
        (ipv4(b"udp"), True),
        (ipv4(b"\x08\0\0\0", protocol=1), True),
        (ipv4(b"\x03\0\0\0", protocol=1), False),
        (ipv4(b"\x0b\0\0\0", protocol=1), False),
        (ipv4(b"", protocol=1), False),
        (ipv4(b"\x03\0\0\0", protocol=1, options=b"\x94\x04\0\0"), False),
        (ipv4(b"first", fragment=0x2000), True),
        (ipv4(b"second", fragment=0x2010), False),
        (ipv4(b"last", fragment=0x0010), False),
        (ipv4(destination="224.0.0.251"), False),
        (ipv4(destination="255.255.255.255"), False),
        (ipv4(source="0.0.0.0"), False),
        (ipv4(source="127.0.0.1"), False),
        (ipv4(source="239.1.1.1"), False),
    ],
)
def test_errors_are_not_sent_where_rfc_1122_forbids_them(data, answered):
    assert packet.may_be_answered(data) is answered
