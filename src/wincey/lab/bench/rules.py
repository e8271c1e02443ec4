"""Flannel's rules, to compare ours with: those that it keeps with --ip-masq (compatibility reference, section 7.1)."""

from __future__ import annotations

from ipaddress import IPv4Network

from wincey.lab.errors import LabError
from wincey.lab.node import Host

_MASQUERADE, _FORWARD = '-m comment --comment "flanneld masq"', '-m comment --comment "flanneld forward"'


def rules_text(network: IPv4Network, subnet: IPv4Network) -> str:
    """What flannel gives iptables-restore, for its network and the host's subnet."""
    masquerade = [
        f"-A FLANNEL-POSTRTG {match} {_MASQUERADE} -j {verdict}"
        for match, verdict in (
            ("-m mark --mark 0x4000/0x4000", "RETURN"),
            (f"-s {subnet} -d {network}", "RETURN"),
            (f"-s {network} -d {subnet}", "RETURN"),
            (f"! -s {network} -d {subnet}", "RETURN"),
            (f"-s {network} ! -d 224.0.0.0/4", "MASQUERADE --random-fully"),
            (f"! -s {network} -d {network}", "MASQUERADE --random-fully"),
        )
    ]
    forward = [f"-A FLANNEL-FWD {match} {_FORWARD} -j ACCEPT" for match in (f"-s {network}", f"-d {network}")]
    lines = [
        *(
            "*nat",
            ":FLANNEL-POSTRTG - [0:0]",
            f"-A POSTROUTING {_MASQUERADE} -j FLANNEL-POSTRTG",
            *masquerade,
            "COMMIT",
        ),
        *("*filter", ":FLANNEL-FWD - [0:0]", f"-A FORWARD {_FORWARD} -j FLANNEL-FWD", *forward, "COMMIT"),
    ]
    return "\n".join([*lines, ""])


def flannel_rules(host: Host, network: IPv4Network, subnet: IPv4Network) -> None:
    """Install them on a host; raises LabError."""
    done = host.exec(["iptables-restore", "--noflush", "--wait"], input=rules_text(network, subnet))
    if done.returncode:
        raise LabError(f"flannel's rules on {host.name}: {done.stderr.strip()}")
