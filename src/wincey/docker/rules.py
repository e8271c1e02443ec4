"""The plugin's nftables table: networks kept apart, containers masked towards the outside, ports published. Pure.

The table is one text that follows from the state, and is replaced whole. What it drops is dropped on the host where the
container lives, at both ends: a packet that leaves for another network of the cluster, and one that comes in from it. So
two networks are apart even when one of them is on a host without this plugin.

    guard    raw, before all: a container sends from its network's block, to no loopback address, and no packets in an
             envelope such as the hosts send each other, which a host would open
    forward  before flannel's chains, which accept, and iptables', which may drop
    source   before flannel's masquerading: a connection within a network keeps its addresses at both ends. Flannel knows
             only the host's own subnet and would hide a block's containers behind the host
    publish  -p HOST:PORT
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from wincey.docker.state import Port
from wincey.model.address import Subnet

TABLE = "wincey-docker"


class Rules(msgspec.Struct, frozen=True):
    """One network on this host. published: address of a container and its port."""

    bridge: str
    network: Subnet
    block: Subnet
    internal: bool
    masquerade: bool
    published: tuple[tuple[str, Port], ...] = ()


def render(networks: Iterable[Rules], clusters: Iterable[Subnet], ports: Iterable[int]) -> str:
    """The script that replaces the table.

    clusters: every container network that this host has a part in. ports: the UDP ports by which hosts send to each other.
    """
    networks = list(networks)
    script = remove()
    if not networks:
        return script
    everything = ", ".join(str(cluster) for cluster in _merged([*clusters, *(each.network for each in networks)]))
    envelopes = ", ".join(map(str, sorted(set(ports))))
    guard, forward, source, publish = [], ["ct state established,related accept"], [], []
    for each in networks:
        bridge, network, block = f'"{each.bridge}"', each.network, each.block
        guard += [
            f"iifname {bridge} ip saddr != {block} drop",
            f"iifname {bridge} ip daddr 127.0.0.0/8 drop",
            f"iifname {bridge} ip daddr != {network} udp dport {{ {envelopes} }} drop",
        ]
        if each.internal:
            forward += [f"iifname {bridge} ip daddr != {network} drop", f"oifname {bridge} ip saddr != {network} drop"]
        else:
            forward += [
                f"iifname {bridge} ip daddr {{ {everything} }} ip daddr != {network} ct status & dnat == 0 drop",
                f"oifname {bridge} ip saddr != {network} ct status & dnat == 0 drop",
            ]
        source += [
            # A container that calls a published port of its own network, or the host that calls one by 127.0.0.1:
            # the answer must come back this way.
            f"oifname {bridge} ct status & dnat == dnat ip saddr {{ {block}, 127.0.0.0/8 }} masquerade",
            f"ip saddr {network} ip daddr {network} snat to ip saddr",
        ]
        if each.masquerade and not each.internal:
            source.append(
                f"oifname != {bridge} ip saddr {block} ip daddr != {{ {everything}, 224.0.0.0/4 }} masquerade"
            )
        publish += [_publish(address, port) for address, port in each.published]
    chains = [
        _chain("guard", "filter hook prerouting priority -300", guard),
        _chain("forward", "filter hook forward priority -5", forward),
        _chain("source", "nat hook postrouting priority 90", source),
    ]
    if publish:
        chains += [
            _chain("publish", "nat hook prerouting priority -100", publish),
            _chain("publish-local", "nat hook output priority -100", publish),
        ]
    bridges = ", ".join(f'"{each.bridge}"' for each in networks)
    only_v4 = [f"iifname {{ {bridges} }} drop", f"oifname {{ {bridges} }} drop"]
    return (
        f"{script}table ip {TABLE} {{\n{''.join(chains)}}}\n"
        f"table ip6 {TABLE} {{\n{_chain('forward', 'filter hook forward priority -5', only_v4)}}}\n"
    )


def remove() -> str:
    """The script that removes the table, there or not."""
    return "".join(f"add table {family} {TABLE}\ndelete table {family} {TABLE}\n" for family in ("ip", "ip6"))


def _chain(name: str, kind: str, rules: list[str]) -> str:
    body = "".join(f"        {rule}\n" for rule in rules)
    return f"    chain {name} {{\n        type {kind}; policy accept;\n{body}    }}\n"


def _publish(address: str, port: Port) -> str:
    where = f"ip daddr {port.host_ip}" if port.host_ip else "fib daddr type local"
    return f"{where} {port.proto} dport {port.host_port} dnat to {address}:{port.port}"


def _merged(subnets: Iterable[Subnet]) -> list[Subnet]:
    """Without those inside another one: an anonymous set takes no overlaps."""
    found: list[Subnet] = []
    for subnet in sorted(set(subnets), key=lambda subnet: subnet.length):
        if not any(other.contains(subnet) for other in found):
            found.append(subnet)
    return found
