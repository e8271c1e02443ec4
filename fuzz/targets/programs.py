"""What other programs on the host say: charon (vici), OVSDB, BIRD, FRR, wireguard-go, commands of the user's."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from fuzz.target import Cut, pieces, play, target
from wincey.kernel.wireguard.uapi import decode_answer, decode_device
from wincey.kernel.wireguard.values import WireguardError
from wincey.model.address import parse_address
from wincey.model.bgp import BgpPeer
from wincey.model.command import Command, CommandFailed
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig
from wincey.programs.bgp import bird, frr
from wincey.programs.bgp.control import BirdControl, ControlError, VtyControl
from wincey.programs.extension import running
from wincey.programs.openvswitch.database import Database
from wincey.programs.openvswitch.host import OvsError
from wincey.programs.strongswan import vici

_SAS: dict[str, Any] = {
    "wincey": {"uniqueid": "1", "state": "ESTABLISHED", "child-sas": {"a": {"local-ts": ["10.3.1.0/24"]}}}
}


@target(
    "vici",
    ValueError,
    seeds=(
        vici.packet(vici.RESPONSE, message={"success": "yes"}),
        vici.packet(vici.EVENT, "list-sa", _SAS),
        vici.packet(vici.EVENT, "x", {"a": ["b", "c"]}) * 2,
    ),
)
def vici_packets(data: bytes) -> None:
    """Packets of charon: whole ones come out, what is none is a ValueError, and what is taken is written as it was."""
    buffer = bytearray(data)
    while (taken := vici.take(buffer)) is not None:
        kind, name, message = taken
        again = vici.take(bytearray(vici.packet(kind, name, message)))
        assert again == (kind, name if kind in vici._NAMED else "", message)


_ROWS = (
    '{"id":1,"error":null,"result":{"Open_vSwitch":{"r":{"new":{"bridges":["set",[["uuid","b"]]],"cur_cfg":1,"next_cfg":1}}},'
    '"Bridge":{"b":{"new":{"name":"ovs-br","ports":["uuid","p"],"datapath_type":"","fail_mode":"secure","external_ids":["map",[["wincey","/x"]]],"other_config":["map",[["hwaddr","0e:2a:00:00:00:02"]]]}}},'
    '"Port":{"p":{"new":{"name":"ovs-br","interfaces":["uuid","i"],"external_ids":["map",[["wincey","/x"]]]}}},'
    '"Interface":{"i":{"new":{"name":"t","type":"vxlan","options":["map",[["key","1"],["local_ip","192.0.2.1"],["remote_ip","192.0.2.2"]]],"ofport":3,"mtu_request":1450,"error":["set",[]]}}}}}'
)


@target("ovsdb", OvsError, seeds=(_ROWS, _ROWS + '{"method":"echo","params":[],"id":"echo"}', _ROWS + '{"method":"update","params":[null,{"Port":{"p":{"old":{}}}}],"id":null}',
        '{"id":1,"error":"x","result":null}'))  # fmt: skip
def ovsdb(data: bytes) -> None:
    """The database's stream, in pieces: a replica, or an end that is told as an OvsError; nothing else stops the reading."""
    cut = Cut(data)

    async def scene() -> None:
        changes: list[int] = []
        database = Database("/x", lambda: changes.append(1))
        reader = asyncio.StreamReader()

        async def feed() -> None:
            while cut.left:
                reader.feed_data(cut.bytes(200))
                await asyncio.sleep(0.01)
            reader.feed_eof()

        async def opened(_path: str) -> tuple[Any, Any]:
            feeding.append(asyncio.create_task(feed()))
            return reader, SimpleNamespace(write=lambda _: None, close=lambda: None)

        feeding: list[asyncio.Task[None]] = []
        before, asyncio.open_unix_connection = asyncio.open_unix_connection, opened
        try:
            await database.connect()
        finally:
            asyncio.open_unix_connection = before
            await asyncio.wait(feeding)
            assert database._reader
            await asyncio.wait([database._reader])
            assert database._reader.exception() is None, database._reader.exception()
            assert isinstance(database.replica.objects(), dict)
            assert isinstance(database.replica.root, dict)
            await database.close()

    play(scene)


_NEIGHBOURS = [BgpPeer(parse_address("192.0.2.2"), 64512, 179), BgpPeer(parse_address("fd01::2"), 64512, 179)]


@target("bird", ControlError, seeds=(
    "0001 BIRD 2.0.12 ready.\n", "0001 x\n1002-wincey_192_0_2_2 BGP --- up 12:00:01.001 Established\n wincey_fd01__2 BGP --- start 12:00 Active Socket: refused\n0000 \n", "8002 parse error\n",
))  # fmt: skip
def bird_replies(data: bytes) -> None:
    """BIRD's control socket, and the table of sessions."""
    text = data.decode(errors="replace")
    assert isinstance(bird.sessions(text.splitlines(), _NEIGHBOURS), dict)

    async def scene() -> None:
        control = BirdControl()
        control._reader = asyncio.StreamReader(limit=1 << 12)
        control._writer = SimpleNamespace(write=lambda _: None)  # type: ignore[assignment]  # pretended
        control._reader.feed_data(data)
        control._reader.feed_eof()
        for _ in range(4):
            code, lines = await control.ask("show protocols")
            assert 0 <= code <= 9999
            assert isinstance(bird.sessions(lines, _NEIGHBOURS), dict)

    play(scene)


@target("frr", ControlError, seeds=(
    b'{"ipv4Unicast":{"peers":{"192.0.2.2":{"state":"Established"}}}}\0\0\0\0', b"% no\0\0\0\1", b"\0\0\0\0\0\0\0\0",
))  # fmt: skip
def frr_replies(data: bytes) -> None:
    """FRR's vty socket, and its table of sessions."""
    assert isinstance(frr.sessions(data.decode(errors="replace")), dict)

    async def scene() -> None:
        control = VtyControl("bgpd")
        control._reader = asyncio.StreamReader(limit=1 << 12)
        control._writer = SimpleNamespace(write=lambda _: None)  # type: ignore[assignment]  # likewise
        control._reader.feed_data(data)
        control._reader.feed_eof()
        for _ in range(4):
            assert isinstance(frr.sessions(await control.ask("show bgp summary json")), dict)

    play(scene)


@target("wireguard-go", WireguardError, seeds=(
    f"private_key={'11' * 32}\nlisten_port=51820\npublic_key={'22' * 32}\nendpoint=192.0.2.2:51820\nallowed_ip=10.3.5.0/24\nlast_handshake_time_sec=1\nlast_handshake_time_nsec=5\npreshared_key={'00' * 32}\npersistent_keepalive_interval=25\nerrno=0\n\n",
    f"public_key={'22' * 32}\nendpoint=[fe80::1%eth0]:51820\nerrno=0\n\n", "errno=-22\n\n",
))  # fmt: skip
def wireguard_go(data: bytes) -> None:
    """wireguard-go's socket; an error never quotes the answer, which has the private key."""
    for read in (decode_answer, decode_device):
        try:
            read(data)
        except WireguardError as error:
            assert "1111111111" not in str(error)  # noqa: PT017  # this is no test of pytest's


@target("command", BadConfig, CommandFailed, seeds=[pieces(key, value) for key, value in (
    ("SubnetAddCommand", '"ip route add $SUBNET via ${PUBLIC_IP}"'), ("SubnetAddCommand", '["a","$SUBNET"]'), ("PreStartupCommand", '"a | b; c"'), ("Shell", "true"),
)])  # fmt: skip
def command(data: bytes) -> None:
    """A command of the config: words that a shell would make too, or a text for a shell where one is allowed. Values never
    become part of a shell's text."""
    cut = Cut(data)
    key, value = cut.piece().decode(errors="replace"), cut.piece().decode(errors="replace")
    quoted = '"' + key.replace("\\", "").replace('"', "") + '"'
    options = NetworkConfig.parse(
        '{"Network":"10.3.0.0/16","Backend":{"Type":"extension",%s:%s}}' % (quoted, value)
    ).backend
    for name in ("PreStartupCommand", "SubnetAddCommand"):
        found = Command.read(options, name)
        if found is None:
            continue
        evil = "1; touch /tmp/x $(id)"
        argv = found.argv({"SUBNET": evil, "PUBLIC_IP": evil})
        assert argv
        if found.sh:
            assert argv[:2] == ["sh", "-c"]
            assert argv[2] == found.words[0]
        else:
            assert len(argv) == len(found.words)
    environment = running.process_environment({"FLANNELD_ETCD_PASSWORD": "x", "PATH": "/bin"}, (("SUBNET", key),))
    assert "FLANNELD_ETCD_PASSWORD" not in environment


@target("command-output", seeds=(b"line one\nline two\n", b"\xff\0\x1b[2J" * 3))
def command_output(data: bytes) -> None:
    """What a command prints: bounded, and one line of the log."""
    said = running._one_line(data.decode(errors="replace") * 9, data.decode(errors="replace"))
    assert len(said) <= 603
    assert "\n" not in said
