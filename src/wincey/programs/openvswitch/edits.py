"""Transactions of the database that turn what it holds into what is wanted, each for all bridges and ports at once. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from wincey.model.address import format_address, format_mac
from wincey.model.ovs import OvsBridge, OvsTunnel
from wincey.programs.openvswitch.jsonrpc import Row, to_map
from wincey.programs.openvswitch.replica import MARK, Replica

Operation = dict[str, Any]

SERIAL: list[Operation] = [
    {"op": "mutate", "table": "Open_vSwitch", "where": [], "mutations": [["next_cfg", "+=", 1]]},
    {"op": "select", "table": "Open_vSwitch", "where": [], "columns": ["next_cfg"]},
]
"""Ends every transaction: ovs-vswitchd copies next_cfg to cur_cfg once it has done all that the database asks for."""


def refusal(replica: Replica, item: OvsBridge | OvsTunnel) -> str:
    """Why something can't be put, "" if it can: what has its name and is not ours stays."""
    if isinstance(item, OvsBridge):
        found = replica.bridge(item.name)
        if found and not found[2]:
            return (
                f"a bridge {item.name} is there that Wincey did not make: remove it, or choose another name by Bridge"
            )
        port = replica.ports().get(item.name)
        if port and port.bridge != item.name:
            return f"bridge {port.bridge} has a port {item.name}: remove it, or choose another name by Bridge"
        return ""
    port = replica.ports().get(item.name)
    if port and not port.ours:
        return f"bridge {port.bridge} has a port of this name that Wincey did not make: remove it"
    return no_bridge(replica, item.device)


def no_bridge(replica: Replica, name: str) -> str:
    """Why nothing can be put on a bridge, "" if it can."""
    found = replica.bridge(name)
    return (
        "" if found and found[2] else f"bridge {name} is not there" if found is None else f"bridge {name} is not ours"
    )


def is_other(replica: Replica, tunnel: OvsTunnel) -> bool:
    """Whether a port of ours has this name and is of another kind, or on another bridge: it must go before."""
    port = replica.ports().get(tunnel.name)
    return port is not None and (port.interface["type"] != tunnel.encapsulation or port.bridge != tunnel.device)


def removal(replica: Replica, bridges: Iterable[OvsBridge], ports: Iterable[str]) -> list[Operation]:
    """Take bridges of ours, and ports of ours by name, out of the database; empty when none of them is there."""
    found = replica.ports()
    gone = [uuid for name in {each.name for each in bridges} if (uuid := _our_bridge(replica, name))]
    operations = []
    if gone:
        operations.append(_mutate("Open_vSwitch", [], "bridges", "delete", [["uuid", uuid] for uuid in gone]))
    leaving: dict[str, list[list[str]]] = {}
    for name in ports:
        port = found.get(name)
        if port and port.ours:
            leaving.setdefault(port.bridge, []).append(["uuid", port.id])
    for bridge, ids in leaving.items():
        operations.append(_mutate("Bridge", [["name", "==", bridge]], "ports", "delete", ids))
    return operations


def bridges(replica: Replica, wanted: Iterable[OvsBridge], owner: str) -> list[Operation]:
    """Make or change bridges."""
    operations: list[Operation] = []
    for number, item in enumerate(wanted):
        row: Row = {"datapath_type": item.datapath, "fail_mode": "secure"}
        hwaddr = {"hwaddr": format_mac(item.mac)}
        if found := replica.bridge(item.name):
            this = [["_uuid", "==", ["uuid", found[0]]]]
            operations += [
                {"op": "update", "table": "Bridge", "where": this, "row": row},
                _mutate("Bridge", this, "other_config", "delete", ["hwaddr"]),
                {
                    "op": "mutate",
                    "table": "Bridge",
                    "where": this,
                    "mutations": [["other_config", "insert", to_map(hwaddr)]],
                },
                {
                    "op": "update",
                    "table": "Interface",
                    "where": [["name", "==", item.name]],
                    "row": {"mtu_request": item.mtu},
                },
            ]
            continue
        bridge, port, interface = (f"{kind}{number}" for kind in ("bridge", "port", "interface"))
        ids = to_map({MARK: owner})
        operations += [
            _insert("Interface", interface, {"name": item.name, "type": "internal", "mtu_request": item.mtu}),
            _insert("Port", port, {"name": item.name, "interfaces": ["named-uuid", interface]}),
            _insert(
                "Bridge",
                bridge,
                {
                    "name": item.name,
                    "ports": ["named-uuid", port],
                    "external_ids": ids,
                    "other_config": to_map(hwaddr),
                    **row,
                },
            ),
            _mutate("Open_vSwitch", [], "bridges", "insert", [["named-uuid", bridge]]),
        ]
    return operations


def tunnels(replica: Replica, wanted: Sequence[OvsTunnel], owner: str) -> list[Operation]:
    """Make or change tunnel ports; their bridges are there."""
    operations: list[Operation] = []
    ports, joining = replica.ports(), dict[str, list[list[str]]]()
    for number, item in enumerate(wanted):
        options = {
            "key": str(item.key_id),
            "local_ip": format_address(item.local),
            "remote_ip": format_address(item.remote),
        }
        if item.port:
            options["dst_port"] = str(item.port)
        row: Row = {"type": item.encapsulation, "options": to_map(options)}
        if found := ports.get(item.name):
            this = [["_uuid", "==", ["uuid", found.interface_id]]]
            operations.append({"op": "update", "table": "Interface", "where": this, "row": row})
            continue
        port, interface = f"port{number}", f"interface{number}"
        operations += [
            _insert("Interface", interface, {"name": item.name, **row}),
            _insert(
                "Port",
                port,
                {
                    "name": item.name,
                    "interfaces": ["named-uuid", interface],
                    "external_ids": to_map({MARK: owner}),
                },
            ),
        ]
        joining.setdefault(item.device, []).append(["named-uuid", port])
    for bridge, ids in joining.items():
        operations.append(_mutate("Bridge", [["name", "==", bridge]], "ports", "insert", ids))
    return operations


def _our_bridge(replica: Replica, name: str) -> str:
    found = replica.bridge(name)
    return found[0] if found and found[2] else ""


def _insert(table: str, name: str, row: Row) -> Operation:
    return {"op": "insert", "table": table, "uuid-name": name, "row": row}


def _mutate(table: str, where: list[Any], column: str, mutator: str, members: list[Any]) -> Operation:
    return {"op": "mutate", "table": table, "where": where, "mutations": [[column, mutator, ["set", members]]]}
