"""What a check has found, and the order of several: the worst first, and of these the cause before what follows from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

Severity = Literal["error", "warning", "note", "ok"]
_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note", "ok")

CAUSES = (
    "daemon",  # nothing of ours is kept up without it
    "config",
    "kernel",
    "interface",
    "address",
    "overlap",
    "lease",
    "device",  # what is missing with a device is missing because of it
    "state",
    "forwarding",
    "firewall",
    "rules",
    "route",
    "underlay",
    "peer",
    "rp-filter",
    "encapsulation",
    "mtu",
    "checksum",
    "nat",
    "hang",  # what broke is named first, and that nobody repairs it afterwards
    "store",
    "peer-lease",
    "bad-key",
    "bridge",
    "drift",
    "clock",
)
"""The checks, causes first: what stands earlier explains what stands later."""


class Finding(msgspec.Struct, frozen=True):
    """One. name: as in CAUSES. evidence: what was seen, where. remedy: what to do, "" for nothing."""

    severity: Severity
    name: str
    evidence: str
    remedy: str = ""


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Each once, the worst first, causes before their consequences."""
    return sorted(dict.fromkeys(findings), key=lambda each: (_SEVERITIES.index(each.severity), CAUSES.index(each.name)))


def exit_code(findings: Iterable[Finding]) -> int:
    """0 when nothing is wrong, 1 for warnings, 2 for errors."""
    severities = {each.severity for each in findings}
    return 2 if "error" in severities else 1 if "warning" in severities else 0
