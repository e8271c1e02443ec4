"""BGP in a lab: hosts with BIRD or FRR, what their routing daemons tell, and routers that are not ours."""

import json
import shlex
from contextlib import suppress

from wincey.lab.node import own_flanneld

FRR = "/usr/lib/frr"


def daemons(*kinds):
    """For LabSpec: the routing daemon of each host, h1 first."""
    flanneld = shlex.join(own_flanneld())
    return {f"h{number}": f"env WINCEY_BGP_DAEMON={kind} {flanneld}" for number, kind in enumerate(kinds, start=1)}


def run_directory(host):
    """Where a host's own routing daemon has its sockets, pid files and logs."""
    return host.subnet_file.parent / "wincey" / host.subnet_file.stem / "bgp" / "run"


def pid(host, program):
    """The pid of bird, bgpd or zebra as its pid file has it, None when it does not run."""
    with suppress(OSError, ValueError):
        number = int((run_directory(host) / f"{program}.pid").read_text())
        with open(f"/proc/{number}/cmdline") as file:
            return number if file.read() else None
    return None


def sessions(host, kind):
    """The sessions that are up by the neighbour's name, with what changes when one begins anew: BIRD's time, FRR's count."""
    run = run_directory(host)
    if kind == "bird":
        lines = host.exec(["birdc", "-s", f"{run}/bird.ctl", "show", "protocols"]).stdout.splitlines()
        return {line.split()[0]: line.split()[4] for line in lines if line.endswith("Established   ")}
    answer = host.exec(["vtysh", "--vty_socket", str(run), "-c", "show bgp ipv4 unicast summary json"]).stdout
    peers = json.loads(answer).get("peers", {})
    return {
        "wincey_" + name.replace(".", "_"): peer["connectionsEstablished"]
        for name, peer in peers.items()
        if peer["state"] == "Established"
    }


def bird_router(node, directory, config):
    """Start a BIRD in a node of a lab; it ends with the lab."""
    directory.mkdir(exist_ok=True)
    path, control = directory / "bird.conf", directory / "bird.ctl"
    path.write_text(f'log "{directory}/bird.log" all;\nprotocol device {{ }}\n{config}')
    node.exec(["bird", "-c", str(path), "-s", str(control), "-P", f"{directory}/bird.id"], check=True)


def frr_router(node, directory, config):
    """Start a bgpd without zebra in a node of a lab; it ends with the lab."""
    directory.mkdir(exist_ok=True)
    path = directory / "bgpd.conf"
    path.write_text(config)
    path.chmod(0o644)
    run = directory / "frr"
    run.mkdir()
    node.exec(["chown", "-R", "frr:frr", str(run)], check=True)
    options = ["-n", "-Z", "-d", "-P", "0", "--vty_socket", str(run), "-i", f"{run}/bgpd.pid", "-f", str(path)]
    node.exec([f"{FRR}/bgpd", *options], check=True)
