"""WireGuard's two languages, its keys and the changes of peers, without a device."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
import threading
from base64 import b64decode, b64encode
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroute2.netlink.generic.wireguard import wgmsg

from wincey.kernel.netlink import HEADER, attribute, messages
from wincey.kernel.wireguard import genl, uapi
from wincey.kernel.wireguard.curve25519 import clamp, public_key
from wincey.kernel.wireguard.edits import LIVE, Known, compose, learned, moved, read_peers
from wincey.kernel.wireguard.keyfile import read_key, read_or_make_key
from wincey.kernel.wireguard.values import NO_KEY, DeviceEdit, DeviceState, PeerEdit, PeerState, WireguardError
from wincey.model.address import Subnet, format_address, parse_address
from wincey.model.errors import NotJoinable
from wincey.model.secret import Secret
from wincey.model.wireguard import WireguardPeer, WireguardSubnet

FAMILY = 33
key = st.binary(min_size=32, max_size=32)
subnet = st.one_of(
    st.builds(Subnet, st.binary(min_size=4, max_size=4), st.integers(0, 32)),
    st.builds(Subnet, st.binary(min_size=16, max_size=16), st.integers(0, 128)),
)
endpoint = st.tuples(
    st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16)), st.integers(1, 65535)
)
edit = st.builds(
    PeerEdit,
    key,
    remove=st.booleans(),
    create=st.booleans(),
    psk=st.none() | st.builds(Secret, key),
    endpoint=st.none() | endpoint,
    keepalive=st.none() | st.integers(0, 65535),
    replace=st.booleans(),
    subnets=st.lists(subnet, max_size=3).map(tuple),
)
A, B, C = (bytes([letter]) * 32 for letter in b"abc")
S1, S2, S3 = (Subnet.parse(f"10.3.{number}.0/24") for number in (1, 2, 3))
NOW = 1_700_000_000.0


def text(value: bytes) -> str:
    return b64encode(value).decode()


def read(request: bytes) -> Any:
    message = wgmsg(request)
    message.decode()
    return message


def peer(public_key: bytes = A, host: int = 2, port: int = 51820, **rest: Any) -> WireguardPeer:
    return WireguardPeer("flannel-wg", public_key, bytes([10, 99, 0, host]), port, **rest)


def owned(subnet: Subnet, public_key: bytes = A) -> WireguardSubnet:
    return WireguardSubnet("flannel-wg", subnet, public_key)


# --- generic netlink --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(edit, st.none() | st.builds(Secret, key), st.none() | st.integers(1, 65535))
def test_another_codec_reads_our_changes(change: PeerEdit, private: Secret | None, port: int | None) -> None:
    (request,) = genl.encode_change(FAMILY, "flannel-wg", DeviceEdit(private, port, (change,)))
    assert HEADER.unpack_from(request)[:2] == (len(request), FAMILY)
    message = read(request)
    assert message["cmd"] == 1
    assert message.get_attr("WGDEVICE_A_IFNAME") == "flannel-wg"
    assert message.get_attr("WGDEVICE_A_LISTEN_PORT") == port
    found = message.get_attr("WGDEVICE_A_PRIVATE_KEY")
    assert (b64decode(found) if found else None) == (private and private.value)
    (one,) = message.get_attr("WGDEVICE_A_PEERS")
    assert b64decode(one.get_attr("WGPEER_A_PUBLIC_KEY")) == change.public_key
    flags = one.get_attr("WGPEER_A_FLAGS")
    assert flags == (1 if change.remove else 0) + (2 if change.replace else 0) + (0 if change.create else 4)
    found = one.get_attr("WGPEER_A_PRESHARED_KEY")
    assert (b64decode(found) if found else None) == (change.psk and change.psk.value)
    assert one.get_attr("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL") == change.keepalive
    found = one.get_attr("WGPEER_A_ENDPOINT")
    assert ((parse_address(found["addr"]), found["port"]) if found else None) == change.endpoint
    assert [each["addr"] for each in one.get_attr("WGPEER_A_ALLOWEDIPS") or []] == [
        str(each) for each in change.subnets
    ]


def test_we_read_what_another_codec_writes() -> None:
    message = wgmsg()
    message["header"]["type"] = FAMILY
    inner = [
        ["WGPEER_A_PUBLIC_KEY", {"value": text(A)}],
        ["WGPEER_A_PRESHARED_KEY", {"value": text(B)}],
        ["WGPEER_A_ENDPOINT", {"addr": "fd00:99::2", "port": 4444}],
        ["WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL", 25],
        ["WGPEER_A_LAST_HANDSHAKE_TIME", {"tv_sec": 1_700_000_000, "tv_nsec": 500_000_000}],
        [
            "WGPEER_A_ALLOWEDIPS",
            [
                {
                    "attrs": [
                        ["WGALLOWEDIP_A_FAMILY", 2],
                        ["WGALLOWEDIP_A_IPADDR", S1.address],
                        ["WGALLOWEDIP_A_CIDR_MASK", 24],
                    ]
                }
            ],
        ],
    ]
    message["attrs"] = [
        ["WGDEVICE_A_IFNAME", "flannel-wg"],
        ["WGDEVICE_A_PUBLIC_KEY", {"value": text(C)}],
        ["WGDEVICE_A_LISTEN_PORT", 51820],
        ["WGDEVICE_A_PEERS", [{"attrs": inner}]],
    ]
    message.encode()
    data = bytes(message.data)
    state = genl.decode_device(messages([data]), FAMILY)
    assert state == DeviceState(
        C, 51820, [PeerState(A, (parse_address("fd00:99::2"), 4444), 1_700_000_000.5, 25, Secret(B), [S1])]
    )


def test_many_peers_are_a_few_messages_and_the_device_is_in_the_first() -> None:
    edits = tuple(
        PeerEdit(number.to_bytes(32, "big"), create=True, subnets=(Subnet(number.to_bytes(4, "big"), 32),))
        for number in range(3000)
    )
    requests = genl.encode_change(FAMILY, "flannel-wg", DeviceEdit(Secret(A), 51820, edits))
    assert 3000 / 400 < len(requests) < 3000 / 100
    assert max(map(len, requests)) < 1 << 16
    assert [read(request).get_attr("WGDEVICE_A_LISTEN_PORT") for request in requests] == [51820] + [None] * (
        len(requests) - 1
    )
    # What we send is laid out as what is told: read back, with a peer that goes on in the next message.
    state = genl.decode_device(messages([*requests, requests[-1]]), FAMILY)
    assert [each.public_key for each in state.peers] == [each.public_key for each in edits]
    assert state.peers[0].subnets == list(edits[0].subnets)
    assert state.peers[-1].subnets == list(edits[-1].subnets) * 2


def test_a_change_of_the_device_alone() -> None:
    (request,) = genl.encode_change(FAMILY, "flannel-wg", DeviceEdit(port=7))
    assert read(request).get_attr("WGDEVICE_A_PEERS") is None


def test_the_familys_number() -> None:
    answer = struct.pack("=BBH", 1, 2, 0) + attribute(2, b"wireguard\0") + attribute(1, struct.pack("=H", FAMILY))
    assert genl.read_family((16, answer, 0, len(answer))) == FAMILY


# --- UAPI -------------------------------------------------------------------------------------------------------------


def test_a_transaction_of_wireguard_go() -> None:
    edits = (
        PeerEdit(
            A, create=True, psk=Secret(NO_KEY), endpoint=(parse_address("fd00:99::2"), 7), keepalive=0, subnets=(S1,)
        ),
        PeerEdit(B, replace=True, subnets=(S2, S3)),
        PeerEdit(C, remove=True),
    )
    assert uapi.encode_change(DeviceEdit(Secret(C), 51820, edits)).decode() == (
        f"set=1\nprivate_key={C.hex()}\nlisten_port=51820\n"
        f"public_key={A.hex()}\npreshared_key={'0' * 64}\nendpoint=[fd00:99::2]:7\nallowed_ip=10.3.1.0/24\n"
        "persistent_keepalive_interval=0\n"
        f"public_key={B.hex()}\nupdate_only=true\nreplace_allowed_ips=true\nallowed_ip=10.3.2.0/24\nallowed_ip=10.3.3.0/24\n"
        f"public_key={C.hex()}\nremove=true\n\n"
    )


def test_the_answer_of_wireguard_go() -> None:
    private = clamp(bytes(range(32)))
    answer = (
        f"private_key={private.hex()}\nlisten_port=51820\nfwmark=5\n"
        f"public_key={A.hex()}\npreshared_key={B.hex()}\nprotocol_version=1\nendpoint=10.99.0.2:4444\n"
        "last_handshake_time_sec=1700000000\nlast_handshake_time_nsec=500000000\ntx_bytes=5\nrx_bytes=6\n"
        "persistent_keepalive_interval=25\nallowed_ip=10.3.1.0/24\nallowed_ip=fd00:3::/64\n"
        f"public_key={B.hex()}\npreshared_key={'0' * 64}\nendpoint=[fe80::1%eth0]:9\nlast_handshake_time_sec=0\n"
        "errno=0\n\n"
    )
    state = uapi.decode_device(answer.encode())
    assert (state.public_key, state.port) == (public_key(private), 51820)
    first, second = state.peers
    subnets = [S1, Subnet.parse("fd00:3::/64")]
    assert first == PeerState(A, (parse_address("10.99.0.2"), 4444), 1_700_000_000.5, 25, Secret(B), subnets)
    assert (second.endpoint, second.handshake, second.psk) == ((parse_address("fe80::1"), 9), 0, None)


def test_errors_of_wireguard_go() -> None:
    assert uapi.decode_answer(b"errno=0\n\n") == 0
    assert uapi.decode_answer(b"errno=-22\n\n") == 22
    with pytest.raises(WireguardError, match="without errno"):
        uapi.decode_answer(b"HTTP/1.1 400 Bad Request\n\n")
    with pytest.raises(WireguardError) as caught:
        uapi.decode_device(b"private_key=" + A.hex().encode() + b"\nlisten_port=many\n\n")
    assert A.hex() not in str(caught.value)


# --- keys -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(key)
def test_public_keys_are_those_of_wg(private: bytes) -> None:
    wg = shutil.which("wg", path=os.environ["PATH"] + ":/usr/bin")
    if not wg:
        pytest.skip("needs wg (package wireguard-tools)")
    done = subprocess.run([wg, "pubkey"], input=text(private), capture_output=True, text=True, timeout=20, check=True)
    assert text(public_key(private)) == done.stdout.strip()


def test_the_key_file_is_made_once(tmp_path: Any) -> None:
    path = tmp_path / "run" / "flannel" / "wgkey"
    keys: list[Secret] = []
    threads = [threading.Thread(target=lambda: keys.append(read_or_make_key(path))) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(keys) == 8
    assert len({each.value for each in keys}) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert b64decode(path.read_text(), validate=True) == keys[0].value == clamp(keys[0].value)
    assert [each.name for each in path.parent.iterdir()] == ["wgkey"]
    assert read_or_make_key(path) == keys[0]


def test_flannels_and_wgs_key_files_are_read(tmp_path: Any, caplog: Any) -> None:
    path = tmp_path / "wgkey"
    path.write_text(text(clamp(A)) + "\n")
    path.chmod(0o644)
    assert read_key(path).value == clamp(A)
    assert "chmod 0400" in caplog.text
    assert text(clamp(A)) not in caplog.text


@pytest.mark.parametrize("content", [b"", b"c2hvcnQ=", b"\xff\xfe", text(A).encode() + b"x", text(A + A).encode()])
def test_other_key_files_are_refused_unseen(tmp_path: Any, content: bytes) -> None:
    path = tmp_path / "wgkey"
    path.write_bytes(content)
    with pytest.raises(NotJoinable, match="must hold one private key") as caught:
        read_or_make_key(path)
    assert text(A)[:20] not in str(caught.value)


# --- changes of peers -------------------------------------------------------------------------------------------------


def test_a_new_peer() -> None:
    assert compose([peer(psk=Secret(B), keepalive=25), owned(S1)], [], Known()) == [
        PeerEdit(A, create=True, psk=Secret(B), endpoint=(bytes([10, 99, 0, 2]), 51820), keepalive=25, subnets=(S1,))
    ]


def test_a_peer_that_goes_takes_its_subnets_along() -> None:
    assert compose([], [peer(), owned(S1)], Known({S1: A})) == [PeerEdit(A, remove=True)]


def test_a_subnet_that_goes_leaves_the_others() -> None:
    known = Known({S1: A, S2: A, S3: B})
    assert compose([], [owned(S1)], known) == [PeerEdit(A, replace=True, subnets=(S2,))]
    assert compose([owned(S3)], [owned(S1)], known)[0] == PeerEdit(A, replace=True, subnets=(S2, S3))


def test_the_endpoint_is_given_when_it_is_news() -> None:
    known = Known(given={A: (bytes([10, 99, 0, 2]), 51820)})
    same, other = compose([peer(keepalive=5)], [], known), compose([peer(host=3)], [], known)
    assert (same[0].endpoint, same[0].keepalive) == (None, 5)
    assert other[0].endpoint == (bytes([10, 99, 0, 3]), 51820)
    assert moved([peer(keepalive=5)], known) == set()
    assert moved([peer(host=3), peer(B)], known) == {A}
    assert compose([peer(host=3)], [], known, frozenset({A}))[0].endpoint is None


def test_a_host_with_a_new_key_takes_its_subnet_over_and_is_called_at_once() -> None:
    known = Known({S1: A}, given={A: (bytes([10, 99, 0, 2]), 51820)})
    edits = compose([peer(B), owned(S1, B)], [peer(A)], known)
    assert [(each.public_key, each.subnets, each.keepalive, each.remove) for each in edits] == [
        (B, (S1,), 0, False),
        (B, (), 1, False),
        (B, (), 0, False),
        (A, (), None, True),
    ]
    with_keepalive = compose([peer(B, keepalive=9), owned(S1, B)], [], known)
    assert [each.keepalive for each in with_keepalive] == [9, 0, 9]


def test_peers_of_a_device_that_was_lost_are_called_at_once() -> None:
    """Only those that had a session."""
    edits = compose([peer(A), peer(B)], [], Known(live={A}))
    assert [(each.public_key, each.keepalive) for each in edits] == [(A, 0), (B, 0), (A, 1), (A, 0)]
    assert len(compose([peer(A, keepalive=7)], [], Known(given={A: (b"", 0)}, live={A}))) == 1


def test_where_a_live_peer_is_counts_more_than_its_lease() -> None:
    there, named = (bytes([203, 0, 113, 9]), 40000), (bytes([10, 99, 0, 2]), 51820)
    for age, shown in ((10.0, named), (LIVE + 1, there), (-3600.0, named)):
        state = DeviceState(C, 51820, [PeerState(A, there, NOW - age, 0, None, [S1])])
        objects, known = read_peers("flannel-wg", state, {A: peer()}, NOW)
        assert objects == [WireguardPeer("flannel-wg", A, *shown), owned(S1)]
        assert known.given == {A: shown}
        assert learned(state, known, NOW) == ({A} if shown == named else set())
    silent = DeviceState(C, 51820, [PeerState(A, there, 0.0)])
    assert read_peers("flannel-wg", silent, {A: peer()}, NOW)[0] == [WireguardPeer("flannel-wg", A, *there)]


def test_what_was_done_is_remembered() -> None:
    known = Known({S1: A, S2: A}, {A: (b"1234", 1)}, {A: 7}, {A, B})
    known.note_all([PeerEdit(B, endpoint=(b"5678", 2), keepalive=5, subnets=(S1,)), PeerEdit(A, remove=True)])
    assert known == Known({S1: B}, {B: (b"5678", 2)}, {B: 5}, {B})
    known.note_all([PeerEdit(B, replace=True, subnets=(S3,))])
    assert known.subnets == {S3: B}


def test_texts_show_public_keys_as_wg_does() -> None:
    assert str(peer()) == f"WireGuard peer {text(A)} at 10.99.0.2 port 51820 dev flannel-wg"
    assert str(owned(S1)) == f"WireGuard subnet {S1} of peer {text(A)} dev flannel-wg"
    assert format_address(peer().endpoint) == "10.99.0.2"
