"""Bridges and veth pairs on this host, by the `ip` program; each step may be repeated.

The names follow from Docker's ids, as nothing else can tell which is whose after a crash: `wb-ID` a bridge, `wv-ID` and
`wc-ID` the host's and the container's end of a pair.
"""

from __future__ import annotations

import contextlib
import os
import re

from wincey.kernel import nft
from wincey.kernel.program import ProgramFailed, must

_USUAL_PORTS = (8472, 8285)  # flannel's, for vxlan and udp


def bridge_name(network: str) -> str:
    """Of a network, by its Docker id."""
    return f"wb-{network[:12]}"


def veth_names(endpoint: str) -> tuple[str, str]:
    """The host's end and the container's end, by the endpoint's Docker id."""
    return f"wv-{endpoint[:12]}", f"wc-{endpoint[:12]}"


def exists(device: str) -> bool:
    """Whether this host has a device of this name."""
    return os.path.exists(f"/proc/sys/net/ipv4/conf/{device}")


async def ensure_bridge(bridge: str, address: str, mtu: int) -> None:
    """Have the bridge, up, with its address (`10.3.200.65/26`) and MTU; raises ProgramFailed."""
    if not exists(bridge):
        with contextlib.suppress(ProgramFailed):  # another call was faster; what follows tells of anything else
            await must("ip", "link", "add", bridge, "type", "bridge")
    await _batch(
        f"link set {bridge} mtu {mtu}",
        f"address replace {address} dev {bridge}",
        f"link set {bridge} up",
    )
    # Published ports answer on 127.0.0.1 as well; the guard chain keeps containers from it.
    _sysctl(f"net/ipv4/conf/{bridge}/route_localnet", "1")
    _sysctl("net/ipv4/ip_forward", "1")


async def add_veth(endpoint: str, bridge: str, mac: str, mtu: int) -> str:
    """Make the pair and put its host end into the bridge; returns the name of the container's end."""
    await remove_device(veth_names(endpoint)[0])
    outer, inner = veth_names(endpoint)
    await _batch(
        f"link add {outer} mtu {mtu} type veth peer name {inner} address {mac} mtu {mtu}",
        f"link set {outer} master {bridge}",
        # With br_netfilter a call of one's own published port is bridged rather than routed, back out of the same port.
        f"link set {outer} type bridge_slave hairpin on",
        f"link set {outer} up",
    )
    return inner


async def remove_device(device: str) -> None:
    """Remove a device (of a pair both ends), there or not."""
    if exists(device):
        try:
            await must("ip", "link", "delete", device)
        except ProgramFailed:
            if exists(device):  # with its container's namespace it may have gone in between
                raise


async def commit_rules(script: str) -> None:
    """Have these rules in force; raises ProgramFailed."""
    await nft.commit(script)


async def addressed_devices() -> list[tuple[str, str]]:
    """Every device with each of its IPv4 addresses, as text with the length."""
    lines = (await must("ip", "-o", "-4", "address", "show")).splitlines()
    return [(words[1].partition("@")[0], words[3]) for line in lines if len(words := line.split()) > 3]


async def overlay_ports() -> list[int]:
    """The UDP ports by which this host may be sent packets of the overlay: its VXLAN devices', and the usual ones."""
    details = await must("ip", "-details", "-o", "link", "show", "type", "vxlan")
    return [*_USUAL_PORTS, *(int(port) for port in re.findall(r"\bdstport (\d+)", details))]


async def _batch(*lines: str) -> None:
    await must("ip", "-batch", "-", text="\n".join(lines) + "\n")


def _sysctl(name: str, value: str) -> None:
    path = f"/proc/sys/{name}"
    with open(path) as file:
        if file.read().strip() == value:
            return
    with open(path, "w") as file:
        file.write(value)
