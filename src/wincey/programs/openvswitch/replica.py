"""What the monitored tables hold, kept up by the database's updates, and what of it is ours. No I/O.

Ours is what carries our mark: `external_ids:wincey=<owner>` on a bridge or a port. The owner is the directory of a network's
run-time files, so that a restarted daemon knows its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

import msgspec

from wincey.model.address import parse_address, parse_mac
from wincey.model.errors import BadAddress
from wincey.model.ovs import Datapath, Encapsulation, OvsBridge, OvsTunnel
from wincey.model.state import Key
from wincey.programs.openvswitch.jsonrpc import Row, as_list, as_map, uuids

MARK = "wincey"

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "Open_vSwitch": ("bridges", "cur_cfg", "next_cfg"),
    "Bridge": ("name", "ports", "datapath_type", "fail_mode", "external_ids", "other_config"),
    "Port": ("name", "interfaces", "external_ids"),
    "Interface": ("name", "type", "options", "ofport", "mtu_request", "error"),
}
"""What is monitored."""

_REFERENCES = frozenset({"bridges", "ports", "interfaces"})
_MAPS = frozenset({"external_ids", "other_config", "options"})
_SETS: Mapping[str, type] = {"fail_mode": str, "ofport": int, "mtu_request": int, "error": str}


class PortSeen(msgspec.Struct, frozen=True):
    """A port of any bridge, with its only or first interface. of: its rows' ids."""

    id: str
    interface_id: str
    bridge: str
    interface: Row
    ours: bool

    @property
    def number(self) -> int:
        """Its OpenFlow port number, 0 for none."""
        numbers = [each for each in as_list(self.interface["ofport"]) if each > 0]
        return numbers[0] if numbers else 0

    @property
    def error(self) -> str:
        """Why ovs-vswitchd could not make it, "" if it tells nothing."""
        return " ".join(as_list(self.interface["error"])).removeprefix("could not ")


class Replica:
    """The monitored tables. owner: whose bridges and ports are ours."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._tables: dict[str, dict[str, Row]] = {table: {} for table in COLUMNS}

    def update(self, tables: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Take in a `<table-updates>` of the database; LookupError, TypeError, AttributeError for what is none."""
        for table, rows in tables.items():
            for uuid, change in rows.items():
                # A row of another form than the schema's is none: what reads the others must not stumble over it.
                if "new" in change and _fits(table, change["new"]):
                    self._tables[table][uuid] = change["new"]
                else:
                    self._tables[table].pop(uuid, None)

    @property
    def root(self) -> Row:
        """The one row of Open_vSwitch; without it `ovs-vsctl init` never ran, which every start script does."""
        return next(iter(self._tables["Open_vSwitch"].values()), {"bridges": ["set", []], "cur_cfg": 0, "next_cfg": 0})

    def bridges(self) -> Iterator[tuple[str, Row, bool]]:
        """Every bridge: the row's id, the row, and whether it is ours."""
        for uuid, row in self._tables["Bridge"].items():
            yield uuid, row, self._is_ours(row)

    def bridge(self, name: str) -> tuple[str, Row, bool] | None:
        """A bridge by name."""
        return next((found for found in self.bridges() if found[1]["name"] == name), None)

    def ports(self) -> dict[str, PortSeen]:
        """Every port by name, the bridges' local ports included."""
        found = {}
        for _, bridge, _ in self.bridges():
            for uuid in uuids(bridge["ports"]):
                port = self._tables["Port"].get(uuid)
                interfaces = uuids(port["interfaces"]) if port else []
                if port and interfaces and (interface := self._tables["Interface"].get(interfaces[0])):
                    found[port["name"]] = PortSeen(uuid, interfaces[0], bridge["name"], interface, self._is_ours(port))
        return found

    def objects(self) -> dict[Key, OvsBridge | OvsTunnel]:
        """Our bridges and ports. What ovs-vswitchd could not make, or has another form, comes with a value nobody wants."""
        ports = self.ports()
        found: dict[Key, OvsBridge | OvsTunnel] = {}
        for _, row, ours in self.bridges():
            if ours:
                bridge = _bridge(row, ports.get(row["name"]))
                found[bridge.key] = bridge
        for name, port in ports.items():
            if port.ours and port.interface["type"] != "internal":
                tunnel = _tunnel(port)
                # By the name that it has, whatever its options say.
                found[(OvsTunnel.tag, name)] = tunnel
        return found

    def _is_ours(self, row: Row) -> bool:
        return as_map(row["external_ids"]).get(MARK) == self._owner


def _fits(table: str, row: Any) -> bool:
    return isinstance(row, dict) and all(column in row and _is_value(column, row[column]) for column in COLUMNS[table])


def _is_value(column: str, value: Any) -> bool:
    """Whether a column's value is of its type, in the notation of RFC 7047, section 5.1."""
    if isinstance(value, list) and not (len(value) == 2 and (value[0] == "uuid" or isinstance(value[1], list))):
        return False
    if column in _REFERENCES:
        return all(isinstance(each, list) and len(each) == 2 and isinstance(each[1], str) for each in as_list(value))
    if column in _MAPS:
        pairs = value[1] if isinstance(value, list) and value[0] == "map" else None
        return isinstance(pairs, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
        )
    if column in _SETS:
        return all(type(each) is _SETS[column] for each in as_list(value))
    return isinstance(value, int if column.endswith("_cfg") else str)


def _bridge(row: Row, local: PortSeen | None) -> OvsBridge:
    mtus = as_list(local.interface["mtu_request"]) if local else []
    wanted_form = as_list(row["fail_mode"]) == ["secure"] and local is not None and local.number
    datapath: Datapath = "netdev" if row["datapath_type"] == "netdev" else "system"
    try:
        mac = parse_mac(as_map(row["other_config"]).get("hwaddr", ""))
    except BadAddress:
        mac = b""
    return OvsBridge(row["name"], datapath, mac, mtus[0] if wanted_form and mtus else 0)


def _tunnel(port: PortSeen) -> OvsTunnel:
    options, kind = as_map(port.interface["options"]), port.interface["type"]
    nobodys = OvsTunnel(port.bridge, kind, -1, b"", b"", 0)
    try:
        tunnel = OvsTunnel(
            port.bridge,
            kind,
            int(options.pop("key")),
            parse_address(options.pop("local_ip")),
            parse_address(options.pop("remote_ip")),
            int(options.pop("dst_port", 0)),
        )
    except (KeyError, ValueError, BadAddress):
        return nobodys
    return nobodys if options or not port.number or kind not in get_args(Encapsulation) else tunnel
