"""What the tests of the ipsec backend share: a capture between hosts and what may be in it, and charon's own view."""

from __future__ import annotations

import ipaddress
import signal
import socket
import struct
import subprocess
import time

from support.traffic import ping

MARKER = bytes.fromhex("57696e6365792d706c61696e2d6d6b21")  # what `ping -p` fills its packets with


class Capture:
    """Records what passes a lab's switch, whole packets, until `stop`, which returns it."""

    def __init__(self, lab, scratch):
        self._path = scratch / f"{lab.spec.name}.pcap"
        self._process = lab.node("switch").popen(
            [
                "tcpdump",
                "-i",
                "br0",
                "-B",
                "65536",
                "--immediate-mode",
                "-U",
                "-Z",
                "root",
                "-s",
                "0",
                "-w",
                str(self._path),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert any("listening on" in line for line in self._process.stderr)

    def stop(self):
        time.sleep(0.3)
        self._process.send_signal(signal.SIGINT)
        self._process.communicate(timeout=20)
        return self._path.read_bytes()

    def kill(self):
        self._process.kill()
        self._process.wait()
        self._process.stderr.close()


def frames(pcap):
    """The Ethernet frames of a capture."""
    at = 24
    while at < len(pcap):
        (size,) = struct.unpack_from("=8xI4x", pcap, at)
        yield pcap[at + 16 : at + 16 + size]
        at += 16 + size


def nothing_plain(pcap, least):
    """Only ARP, IKE and ESP (in UDP or not) between hosts, and nowhere a byte of what containers said."""
    encrypted = 0
    for frame in frames(pcap):
        kind = int.from_bytes(frame[12:14], "big")
        if kind in (0x0806, 0x86DD):  # ARP, and neighbor discovery of the devices themselves
            continue
        assert kind == 0x0800, frame.hex()
        protocol, header = frame[23], 4 * (frame[14] & 15)
        addresses = [ipaddress.ip_address(frame[at : at + 4]) for at in (26, 30)]
        assert all(address in ipaddress.ip_network("10.99.0.0/24") for address in addresses), addresses
        if protocol == 1 and frame[14 + header : 16 + header] == b"\3\3":  # a host without charon: port unreachable
            continue
        ports = struct.unpack_from("!HH", frame, 14 + header)
        assert protocol == 50 or (protocol == 17 and set(ports) <= {500, 4500}), (protocol, ports)
        encrypted += protocol == 50 or ports == (4500, 4500)
    assert encrypted >= least
    assert MARKER not in pcap
    for pattern in (b"GET /", b"10.5."):
        assert pattern not in pcap


def mark(source, target):
    """Pings whose payload can be recognised."""
    return ping(source, target.address(4), "-p", MARKER.hex(), "-s", "400", count=3)


def vici_socket(host):
    return host.directory / "wincey" / "subnet" / "charon.vici"


def charon_pid(host):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(vici_socket(host)))
        return struct.unpack("=iii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


def swanctl(host, *what):
    done = subprocess.run(
        ["swanctl", *what, "--uri", f"unix://{vici_socket(host)}"], capture_output=True, text=True, check=True
    )
    return done.stdout
