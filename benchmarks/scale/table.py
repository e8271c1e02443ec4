"""What the kernel of the namespace has for peers."""

from __future__ import annotations

import json
from pathlib import Path

from scale.arena import run

DEVICES = {"vxlan": "flannel.1", "host-gw": "eth0"}


def routes() -> int:
    """Routes of /24 into the network in the main table, as /proc tells without a fork."""
    lines = Path("/proc/net/route").read_text().splitlines()[1:]
    return sum(1 for line in lines if line.split()[1].endswith("0A") and line.split()[7] == "00FFFFFF")


def table(backend: str) -> set[str]:
    """Routes and, with vxlan, neighbors and FDB entries, one line each, as `Peer.objects` words them."""
    device = DEVICES[backend]
    found = {
        f"route {each['dst']} {each['gateway']}"
        for each in json.loads(run("ip", "-j", "route", "show", "dev", device))
        if "gateway" in each and each["dst"].startswith("10.")
    }
    if backend == "vxlan":
        neighbors = json.loads(run("ip", "-j", "-4", "neigh", "show", "dev", device, "nud", "permanent"))
        found |= {f"neighbor {each['dst']} {each['lladdr']}" for each in neighbors}
        entries = json.loads(run("bridge", "-j", "fdb", "show", "dev", device))
        found |= {f"fdb {each['mac']} {each['dst']}" for each in entries if "dst" in each}
    return found
