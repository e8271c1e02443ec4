"""Containers in named networks, on the hosts of a lab whose daemons have several networks: a bridge for each, built by hand."""

from __future__ import annotations

import ipaddress
import json
import struct
import subprocess
import sys
import time
from pathlib import Path

from support.flanneld import Flanneld
from support.keys import delete, put, wait_until
from wincey.agent.envfile import read_env_file
from wincey.lab.namespace import ip_batch
from wincey.lab.plan import PREFIX

BLUE = {"Network": "10.1.0.0/16", "Backend": {"Type": "vxlan", "VNI": 1}}
GREEN = {"Network": "10.2.0.0/16", "Backend": {"Type": "vxlan", "VNI": 2}}
RED = {"Network": "10.3.0.0/16", "Backend": {"Type": "udp"}}


def config_key(network):
    return f"{PREFIX}/{network}/config"


def define(lab, **networks):
    """Put the configs of networks, given as objects."""
    for name, config in networks.items():
        put(lab, config_key(name), json.dumps(config), None)


def forget(lab, network):
    """Delete a network's config."""
    delete(lab, config_key(network))


class Member:
    """A host with a daemon of several networks, which ends with the block."""

    def __init__(self, host, directory: Path, *flags: str) -> None:
        self.host = host
        self.directory = host.directory / "networks"
        self._log = directory / f"{host.name}-networks.log"
        self._flags = (*flags, f"--subnet-dir={self.directory}")
        self._starts = 0
        self.daemon: Flanneld | None = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.daemon.kill()

    def start(self, *flags: str) -> None:
        self._starts += 1
        log = self._log.with_suffix(f".{self._starts}.log")
        self.daemon = Flanneld(self.host, log, *self._flags, *flags)

    def restart(self, *flags: str) -> None:
        assert self.daemon.stop() == 0, self.daemon.log
        self.start(*flags)

    def env_path(self, network: str) -> Path:
        return self.directory / f"{network}.env"

    def env(self, network: str):
        return read_env_file(str(self.env_path(network)))

    def joins(self, *networks: str) -> None:
        """Wait until the host is in these networks."""
        wait_until(lambda: not self.daemon.running or all(self.env_path(network).exists() for network in networks), 40)
        assert all(self.env_path(network).exists() for network in networks), self.daemon.log

    def gateway(self, network: str):
        return ipaddress.ip_interface(str(self.env(network).subnets[0]))

    def attach(self, container, network: str, number: int = 1):
        """Put a container into a network, with the address that many after the gateway's; returns its address."""
        gateway, mtu = self.gateway(network), self.env(network).mtu
        bridge, port = f"br-{network}", container.name.removeprefix(self.host.name)
        address = gateway.ip + number
        if not any(link["ifname"] == bridge for link in self.links()):
            ip_batch([f"link add {bridge} type bridge mcast_snooping 0", f"link set {bridge} up"], self.host.netns)
        ip_batch(
            [
                f"link set {bridge} mtu {mtu}",
                f"addr replace {gateway} dev {bridge}",
                f"link set {port} master {bridge} mtu {mtu} up",
            ],
            self.host.netns,
        )
        ip_batch(
            [
                "addr flush dev eth0 scope global",
                f"link set eth0 mtu {mtu} up",
                f"addr add {address}/{gateway.network.prefixlen} dev eth0",
                f"route replace default via {gateway.ip}",
            ],
            container.netns,
        )
        return str(address)

    def links(self):
        return json.loads(self.host.exec(["ip", "-j", "link"], check=True).stdout)

    def devices(self) -> set[str]:
        return {link["ifname"] for link in self.links()}

    def routes(self, within: str) -> list[str]:
        """The routes into a range, but those of bridges."""
        lines = self.host.exec(["ip", "route", "show", "root", within], check=True).stdout.splitlines()
        return [line for line in lines if "proto kernel" not in line]

    def table(self, network: str) -> str:
        """A network's nftables table, "" when there is none."""
        return self.host.exec(["nft", "list", "table", "ip", f"flannel-{network}-ipv4"]).stdout

    def flush_rules(self) -> None:
        """Remove all rules of whomever."""
        script = "nft flush ruleset; for t in nat filter mangle; do iptables -t $t -F; done"
        self.host.exec(["sh", "-c", script], check=True)


_LISTEN = """
import select, socket, sys
seen = set()
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("0.0.0.0", 7))
print("ready", flush=True)
while True:
    readable, _, _ = select.select([s, sys.stdin], [], [])
    if s in readable:
        seen.add(s.recv(1000).decode())
    else:
        break
print(*sorted(seen), sep="\\n")
"""

_SEND = """
import json, socket, sys, time
for label, source, address, port, payload in json.loads(sys.argv[1]):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.setsockopt(socket.SOL_IP, 19, 1)  # IP_TRANSPARENT: any source
    s.bind((source, 0))
    for _ in range(3):
        s.sendto(bytes.fromhex(payload) if payload else label.encode(), (address, port))
        time.sleep(0.01)
"""


def arrivals(receivers, sender, attempts) -> set[str]:
    """Send UDP packets, whatever comes back, and tell which arrive at one of the receivers.

    attempts: label, source address, destination address, port, payload; without a payload it is the label.
    """
    listeners = [
        each.popen([sys.executable, "-c", _LISTEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for each in receivers
    ]
    try:
        assert all(listener.stdout.readline() == "ready\n" for listener in listeners)
        sent = sender.exec([sys.executable, "-c", _SEND, json.dumps(attempts)])
        assert sent.returncode == 0, sent.stderr
        time.sleep(0.5)
        return {line for listener in listeners for line in listener.communicate()[0].splitlines() if line}
    finally:
        for listener in listeners:
            listener.kill()
            listener.wait()


def enveloped(vni: int, mac: str, source: str, destination: str, label: str) -> str:
    """The payload of a vxlan packet, in hexadecimal: in it a UDP packet to port 7."""
    udp = struct.pack("!HHHH", 9, 7, 8 + len(label), 0) + label.encode()
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(destination).packed
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0) + addresses
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    header = header[:10] + struct.pack("!H", ~total & 0xFFFF) + header[12:]
    frame = bytes.fromhex(mac.replace(":", "")) + bytes.fromhex("020000000099") + b"\x08\x00" + header + udp
    return (struct.pack("!II", 0x08000000, vni << 8) + frame).hex()
