"""Lease keys and values: the vectors of the compatibility reference, sections 3.2 and 3.3, and round trips."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wincey.model.address import Subnet, parse_address
from wincey.model.errors import BadLease
from wincey.model.lease import LeaseAttrs, LeaseKey


@pytest.mark.parametrize(
    "text",
    [
        "10", "10.12.13.0", "10.12.13-24", "10.12.13.300-24", "10.12.13.0-24hi", "&2001::-56", "10.12.13.0-24&:12:13:-56",
        "10.12.13.0-24&20011::-56", "10.12.13.0-24&2001-56", "10.12.13.0-24&2001::", "10.12.13.0-24&2001::-56hi",
    ],
)  # fmt: skip
def test_keys_that_must_be_rejected(text: str) -> None:
    with pytest.raises(BadLease):
        LeaseKey.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "10.12.13.0-32", "10.12.13.0-24&2001::-128", "0.0.0.0-0", "10.3.1.0-0", "10.3.1.0-24&fd00::-0", "10.3.1.0-24\n",
        "10.03.1.0-24", "10.3.1.0-", "10.3.1.0--24", "10.3.1.0-24&", "10.3.1.0-٢٤", "10.3.1.0-" + "1" * 5000,
        "10.3.1.0-24&fd00::-" + "1" * 5000,
    ],
)  # fmt: skip
def test_keys_that_are_no_lease_either(text: str) -> None:
    with pytest.raises(BadLease):
        LeaseKey.parse(text)


@pytest.mark.parametrize(
    ("text", "v4", "v6"),
    [
        ("10.12.13.0-24", "10.12.13.0/24", None),
        ("10.12.13.0-31", "10.12.13.0/31", None),
        ("10.12.13.77-24", "10.12.13.0/24", None),  # host bits go
        ("any text10.12.13.0-24", "10.12.13.0/24", None),  # flannel's parser is anchored at the end alone
        ("10.12.13.0-24&fd00:12:13::-56", "10.12.13.0/24", "fd00:12:13::/56"),
        ("10.12.13.0-24&FD00:12:13::-127", "10.12.13.0/24", "fd00:12:13::/127"),
        ("10.12.13.0-24&2001::-56", "10.12.13.0/24", "2001::/56"),
        ("0.0.0.0-0&fc00:0:0:1::-64", None, "fc00:0:0:1::/64"),
    ],
)
def test_keys_that_are_accepted(text: str, v4: str | None, v6: str | None) -> None:
    key = LeaseKey.parse(text)
    assert key == LeaseKey(Subnet.parse(v4) if v4 else None, Subnet.parse(v6) if v6 else None)
    assert [str(subnet) for subnet in key.subnets] == [subnet for subnet in (v4, v6) if subnet]


@pytest.mark.parametrize(
    "text", ["10.12.13.0-24", "10.12.13.0-24&fd00:12:13::-56", "0.0.0.0-0&fc00:0:0:1::-64", "10.3.0.0-16&2001:db8::-64"]
)
def test_keys_are_written_as_flannel_writes_them(text: str) -> None:
    assert str(LeaseKey.parse(text)) == text


def prefixes(size: int) -> st.SearchStrategy[Subnet]:
    return st.builds(
        lambda address, length: Subnet(address, length).masked(),
        # flannel leases lie in unicast ranges; what begins with ten zero bytes would be written with dots
        st.binary(min_size=size, max_size=size).filter(lambda address: address[0] != 0),
        st.integers(8, size * 8 - 1),
    )


keys = st.one_of(
    st.builds(LeaseKey, prefixes(4)),
    st.builds(LeaseKey, prefixes(4), prefixes(16)),
    st.builds(LeaseKey, st.none(), prefixes(16)),
)


@given(keys)
def test_keys_survive_being_written_and_read(key: LeaseKey) -> None:
    assert LeaseKey.parse(str(key)) == key


@given(st.text() | st.from_regex(r"[0-9.&:a-f-]{0,40}", fullmatch=True))
def test_any_text_is_a_key_or_a_bad_lease(text: str) -> None:
    try:
        key = LeaseKey.parse(text)
    except BadLease:
        return
    assert LeaseKey.parse(str(key)) == key


@given(keys, keys)
def test_overlap_is_in_either_family(one: LeaseKey, other: LeaseKey) -> None:
    expected = any(mine.overlaps(theirs) for mine in one.subnets for theirs in other.subnets)
    assert one.overlaps(other) == other.overlaps(one) == expected
    assert one.overlaps(one)


VXLAN = LeaseAttrs(
    public_ip=parse_address("10.99.0.2"),
    backend_type="vxlan",
    backend_data=b'{"VNI":1,"VtepMAC":"ce:8b:74:a6:9d:80"}',
)
UDP = LeaseAttrs(public_ip=parse_address("10.99.0.2"))


@pytest.mark.parametrize(
    ("attrs", "value"),
    [
        (
            VXLAN,
            b'{"PublicIP":"10.99.0.2","PublicIPv6":null,"BackendType":"vxlan",'
            b'"BackendData":{"VNI":1,"VtepMAC":"ce:8b:74:a6:9d:80"}}',
        ),
        (UDP, b'{"PublicIP":"10.99.0.2","PublicIPv6":null}'),
        (
            LeaseAttrs(parse_address("10.99.0.2"), parse_address("fd00:99::2"), "vxlan", b'{"VNI":1}', b'{"VNI":1}'),
            b'{"PublicIP":"10.99.0.2","PublicIPv6":"fd00:99::2","BackendType":"vxlan",'
            b'"BackendData":{"VNI":1},"BackendV6Data":{"VNI":1}}',
        ),
        (LeaseAttrs(public_ipv6=parse_address("fd00::2")), b'{"PublicIP":"0.0.0.0","PublicIPv6":"fd00::2"}'),
    ],
)
def test_values_are_byte_equal_to_flannels(attrs: LeaseAttrs, value: bytes) -> None:
    assert attrs.encode() == value
    assert LeaseAttrs.decode(value) == attrs


@pytest.mark.parametrize(
    ("attrs", "value"),
    [
        (
            VXLAN,
            b'{"PublicIP":"10.99.0.2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"ce:8b:74:a6:9d:80"}}',
        ),
        (UDP, b'{"PublicIP":"10.99.0.2"}'),
        (LeaseAttrs(UDP.public_ip, None, "host-gw"), b'{"PublicIP":"10.99.0.2","BackendType":"host-gw"}'),
        (LeaseAttrs(public_ipv6=parse_address("fd00::2")), b'{"PublicIP":"0.0.0.0","PublicIPv6":"fd00::2"}'),
    ],
)
def test_values_in_etcd_v2_have_the_form_of_its_eras(attrs: LeaseAttrs, value: bytes) -> None:
    assert attrs.encode(etcd_v2=True) == value
    assert LeaseAttrs.decode(value) == attrs


@pytest.mark.parametrize(
    ("value", "attrs"),
    [
        (b'{"PublicIP":"10.99.0.2","Later":{"x":[1]},"Expires":0}', UDP),
        (b' { "PublicIP" : "10.99.0.2" }\n', UDP),
        (b'{"PublicIP":"10.99.0.2","PublicIPv6":null,"BackendType":null,"BackendData":null,"BackendV6Data":null}', UDP),
        (b'{"PublicIP":"10.99.0.2","PublicIPv6":"","BackendType":""}', UDP),
        (b'{"PublicIP":"10.99.0.9","PublicIP":"10.99.0.2"}', UDP),  # the last one counts, as in Go
        (
            b'{"PublicIP":"10.99.0.2","BackendType":"extension","BackendData":"any \\"text\\""}',
            LeaseAttrs(UDP.public_ip, None, "extension", b'"any \\"text\\""'),
        ),
        (
            b'{"PublicIP":"10.99.0.2","BackendType":"vxlan","BackendData":{"VtepMAC":"aa:bb:cc:dd:ee:ff"}}',
            LeaseAttrs(UDP.public_ip, None, "vxlan", b'{"VtepMAC":"aa:bb:cc:dd:ee:ff"}'),
        ),
    ],
)
def test_values_that_are_read(value: bytes, attrs: LeaseAttrs) -> None:
    assert LeaseAttrs.decode(value) == attrs


@pytest.mark.parametrize(
    "value",
    [
        b"", b"null", b"[]", b'"x"', b"nonsense", b'{"PublicIP":"10.99.0.2"', b'{"PublicIP":"10.99.0.2"} x',
        b'{"PublicIP":1}', b'{"PublicIP":"10.99.0"}', b'{"PublicIP":"fd00::1"}', b'{"PublicIPv6":"10.99.0.2"}',
        b'{"PublicIP":"10.99.0.2","BackendType":1}', b'{"PublicIP":"10.99.0.2","BackendData":"\xff"}', b"\xff",
        b'{"PublicIP":"\xff"}', b'{"x":' + b"[" * 100_000, b'{"PublicIP":"10.99.0.2","BackendData":' + b"[" * 100_000,
    ],
)  # fmt: skip
def test_values_that_are_contained_as_bad(value: bytes) -> None:
    with pytest.raises(BadLease) as caught:
        LeaseAttrs.decode(value)
    assert len(str(caught.value)) < 1500, "a huge value must not flood the log"


json_data = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
).filter(lambda data: data is not None)
raw = st.just(b"") | json_data.map(lambda data: json.dumps(data).encode())
attributes = st.builds(
    LeaseAttrs,
    public_ip=st.none() | st.binary(min_size=4, max_size=4).filter(any),
    public_ipv6=st.none() | st.binary(min_size=16, max_size=16),
    backend_type=st.text(),
    backend_data=raw,
    backend_v6_data=raw,
)


@given(attributes, st.booleans())
def test_attributes_survive_being_written_and_read(attrs: LeaseAttrs, etcd_v2: bool) -> None:
    value = attrs.encode(etcd_v2=etcd_v2)
    assert LeaseAttrs.decode(value) == attrs
    assert ("PublicIPv6" in json.loads(value)) == (not etcd_v2 or bool(attrs.public_ipv6 or attrs.backend_v6_data))


@given(st.binary() | st.text().map(str.encode) | json_data.map(lambda data: json.dumps({"PublicIP": data}).encode()))
def test_any_bytes_are_a_value_or_a_bad_lease(value: bytes) -> None:
    try:
        attrs = LeaseAttrs.decode(value)
    except BadLease:
        return
    assert LeaseAttrs.decode(attrs.encode()) == attrs
