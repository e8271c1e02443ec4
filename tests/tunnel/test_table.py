import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wincey.tunnel.control import PEER
from wincey.tunnel.table import PeerTable

addresses = st.integers(0, 2**32 - 1).map(lambda number: number.to_bytes(4, "big"))
# Few distinct high bits, so that prefixes do nest.
near = st.integers(0, 255).map(lambda number: bytes((10, 3, number, number ^ 0x55)))
records = st.lists(
    st.tuples(near | addresses, st.integers(0, 32), st.sampled_from([b"\x0a\x63\0\1", b"\x0a\x63\0\2", bytes(4)]))
)


def packed(peers):
    return b"".join(PEER.pack(*peer) for peer in peers)


@given(records, st.lists(near | addresses, max_size=20))
def test_look_up_finds_the_longest_prefix(peers, wanted):
    table = PeerTable()
    table.update(packed(peers))
    model = {}
    for address, length, endpoint in peers:
        network = ipaddress.ip_network((address, length), strict=False)
        model.pop(network, None)
        if endpoint != bytes(4):
            model[network] = endpoint
    for address in wanted:
        matches = [network for network in model if ipaddress.ip_address(address) in network]
        best = max(matches, key=lambda network: network.prefixlen, default=None)
        assert table.lookup(address) == model.get(best)
    assert len(table) == len(model)
    assert table.endpoints == set(model.values())


@given(records)
def test_records_make_an_equal_table(peers):
    table, copy = PeerTable(), PeerTable()
    table.update(packed(peers))
    copy.update(table.records())
    assert sorted(copy.records()[i : i + 9] for i in range(0, len(copy) * 9, 9)) == sorted(
        table.records()[i : i + 9] for i in range(0, len(table) * 9, 9)
    )


@pytest.mark.parametrize("bad", [b"12345678", PEER.pack(b"\x0a\3\1\0", 33, b"\x0a\x63\0\1")])
def test_a_malformed_record_changes_nothing(bad):
    table = PeerTable()
    table.update(PEER.pack(b"\x0a\3\1\0", 24, b"\x0a\x63\0\1"))
    with pytest.raises(ValueError, match="malformed"):
        table.update(PEER.pack(b"\x0a\3\1\0", 24, bytes(4)) + bad)
    assert table.lookup(b"\x0a\3\1\2") == b"\x0a\x63\0\1"
