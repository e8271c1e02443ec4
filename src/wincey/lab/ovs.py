"""Open vSwitch on a lab's hosts: each has a database and an ovs-vswitchd of its own, with its files in its own directory.

On the user-space datapath ovs-vswitchd must own the way to the other hosts. So a host's card becomes `card`, a port of a bridge
that is named `eth0` in its place and has its address: daemon and tests find the host as any other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wincey.lab.errors import LabError
from wincey.lab.namespace import ip_batch, set_sysctls
from wincey.lab.node import Node
from wincey.lab.plan import LabSpec, sysctls

PROGRAMS = ("ovsdb-tool", "ovsdb-server", "ovs-vsctl", "ovs-vswitchd", "ovs-ofctl", "ethtool")
_SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"
CARD = "card"


def uses_ovs(spec: LabSpec) -> bool:
    """Whether the lab's config asks for Open vSwitch."""
    return str(_backend(spec).get("type", "")) == "ovs"


def in_user_space(spec: LabSpec) -> bool:
    """Whether the config asks for the user-space datapath."""
    return uses_ovs(spec) and str(_backend(spec).get("datapath", "")).lower() == "netdev"


def start(host: Node, directory: Path) -> None:
    """Start Open vSwitch on a host, its files in `directory`; it ends with the host's namespace. Raises LabError."""
    directory.mkdir(parents=True)
    database, socket = directory / "conf.db", directory / "db.sock"
    _run(host, directory, "ovsdb-tool", "create", str(database), _SCHEMA)
    _run(
        host, directory, "ovsdb-server", str(database), f"--remote=punix:{socket}", *_daemon(directory, "ovsdb-server")
    )
    _vsctl(host, directory, "--no-wait", "init")
    start_switch(host, directory)
    if in_user_space(host.spec):
        _take_card(host, directory)


def start_switch(host: Node, directory: Path) -> None:
    """Start ovs-vswitchd, which may have ended, with the database that runs. Raises LabError."""
    _run(host, directory, "ovs-vswitchd", f"unix:{directory / 'db.sock'}", *_daemon(directory, "ovs-vswitchd"))


def _take_card(host: Node, directory: Path) -> None:
    spec = host.spec
    addresses = [spec.underlay(host.name, family) for family in spec.families]
    ip_batch(
        ["link set eth0 down", f"link set eth0 name {CARD}", "addr flush dev card", f"link set {CARD} up"], host.netns
    )
    bridge = ["add-br", "eth0", "--", "set", "bridge", "eth0", "datapath_type=netdev"]
    mtu = ["--", "set", "interface", "eth0", f"mtu_request={spec.mtu}"]
    _vsctl(host, directory, *bridge, *mtu, "--", "add-port", "eth0", CARD)
    set_sysctls(host.netns, sysctls(spec, host.name))  # eth0 is another device now
    ip_batch([*(f"addr add {each} dev eth0" for each in addresses), "link set eth0 up"], host.netns)
    # ovs-vswitchd takes packets as they come, and nobody would fill in the checksums that were left to a card.
    for device in ("eth0", CARD):
        _run(host, directory, "ethtool", "-K", device, "tx", "off")


def _daemon(directory: Path, program: str) -> list[str]:
    return [
        f"--pidfile={directory / program}.id",
        f"--log-file={directory / program}.log",
        f"--unixctl={directory / program}.ctl",
        "--detach",
        "--no-chdir",
        "-vconsole:off",
    ]


def _vsctl(host: Node, directory: Path, *words: str) -> None:
    _run(host, directory, "ovs-vsctl", f"--db=unix:{directory / 'db.sock'}", "--timeout=20", *words)


def _run(host: Node, directory: Path, *argv: str) -> None:
    done = host.exec(["env", f"OVS_RUNDIR={directory}", *argv])
    if done.returncode:
        raise LabError(f"{host.name}: {argv[0]} failed: {done.stderr.strip() or done.stdout.strip()}")


def _backend(spec: LabSpec) -> dict[str, Any]:
    """The config's Backend, its keys in lower case."""
    try:
        document = json.loads(spec.config)
    except ValueError:
        return {}
    found = {key.lower(): value for key, value in document.items()} if isinstance(document, dict) else {}
    backend = found.get("backend")
    return {key.lower(): value for key, value in backend.items()} if isinstance(backend, dict) else {}
