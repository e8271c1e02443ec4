"""Our flows as ovs-ofctl writes and reads them. Pure.

All carry our cookie, and none else of a bridge's flows is read or changed. What no flow matches is dropped, as the bridge is in
fail mode `secure`. Ports go by their names: a port that is made anew has another number, and that is known to ovs-vswitchd first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from wincey.model.address import format_mac, parse_mac
from wincey.model.ovs import OvsFlow
from wincey.model.state import Key

COOKIE = 0x77696E636579  # "wincey"

_IN, _OUT = 100, 200  # priorities
_FLOW = re.compile(
    r"priority=(?P<priority>\d+)(?P<local>,in_port=LOCAL)?,dl_dst=(?P<mac>[0-9a-f:]{17})"
    r" actions=(?:output:(?P<port>[vgn][0-9a-f]{14})|(?P<host>LOCAL)|.*)$"
)


def to_remove(flow: OvsFlow) -> list[str]:
    """Lines for `ovs-ofctl --bundle add-flows`, which has no objection where there is no such flow."""
    return [f"delete_strict cookie={COOKIE:#x}/-1,{match}" for match in (_inward(flow), _outward(flow))]


def to_put(flow: OvsFlow) -> list[str]:
    """Likewise, lines that put a flow in the place of whatever we have for this address, in either direction."""
    match, action = (_outward(flow), f"output:{flow.port}") if flow.port else (_inward(flow), "LOCAL")
    return [*to_remove(flow), f"add cookie={COOKIE:#x},{match},actions={action}"]


def read(bridge: str, dump: Iterable[str]) -> dict[Key, OvsFlow]:
    """Our flows in the output of `ovs-ofctl --no-stats --names dump-flows`.

    One with other actions than ours, or a second one for an address, has the port "?".
    """
    found: dict[Key, OvsFlow] = {}
    for line in dump:
        if f"cookie={COOKIE:#x}," in line and (match := _FLOW.search(line)):
            inward = match["priority"] == str(_IN) and not match["local"]
            port = "?"
            if match["port"] and not inward:
                port = match["port"]
            elif match["host"] and inward:
                port = ""
            flow = OvsFlow(bridge, parse_mac(match["mac"]), port)
            if flow.key in found:
                flow = OvsFlow(bridge, flow.mac, "?")
            found[flow.key] = flow
    return found


def _inward(flow: OvsFlow) -> str:
    return f"priority={_IN},dl_dst={format_mac(flow.mac)}"


def _outward(flow: OvsFlow) -> str:
    return f"priority={_OUT},in_port=LOCAL,dl_dst={format_mac(flow.mac)}"
