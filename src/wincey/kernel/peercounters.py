"""Packets and bytes to and from each peer's subnets, counted by the packet filter for as long as somebody wants them.

The kernel keeps no counters by peer for most backends, and counting costs each packet a look-up in a set; so it is done only
meanwhile. The rules live in a table that its maker owns: the kernel removes it when the maker ends, however that happens.
They only count. nftables 0.9.9 and Linux 5.12 or later (NFT_TABLE_F_OWNER).
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from wincey.kernel.program import environment
from wincey.model.address import Subnet
from wincey.model.errors import KernelError

_TABLE = "wincey-top"
_HOOKS = ("input", "forward", "output")  # a packet passes one of them only
_TIMEOUT = 10.0
_numbers = itertools.count()


class Counted(msgspec.Struct):
    """What was counted for one subnet since the table was made."""

    packets_to: int = 0
    bytes_to: int = 0
    packets_from: int = 0
    bytes_from: int = 0


class PeerCounters:
    """Counts while it is entered; raises KernelError when the packet filter can't."""

    def __init__(self, subnets: Iterable[Subnet]) -> None:
        self._subnets = sorted(set(subnets))
        self._name = f"{_TABLE}-{os.getpid()}-{next(_numbers)}"
        self._nft: subprocess.Popen[str] | None = None

    def __enter__(self) -> PeerCounters:
        try:
            self._nft = subprocess.Popen(
                ["nft", "-i"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment(),
            )
        except OSError as error:
            raise KernelError(f"packets of peers can't be counted: nft: {error.strerror}") from None
        assert self._nft.stdin
        for line in ruleset(self._name, self._subnets):
            self._nft.stdin.write(line + "\n")
        try:
            self._nft.stdin.flush()
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._nft:
            self._nft.kill()  # the kernel removes what it owned
            self._nft.communicate()
            self._nft = None

    def read(self) -> dict[Subnet, Counted]:
        """What was counted so far, for each subnet."""
        counted = {subnet: Counted() for subnet in self._subnets}
        for family in sorted({_family(subnet) for subnet in self._subnets}):
            for direction in ("to", "from"):
                take(json.loads(self._list(family, direction)), counted)
        return counted

    def _list(self, family: str, direction: str) -> str:
        # Set by set: nft 1.0 writes broken JSON for a whole table that has an owner.
        done = subprocess.run(
            ["nft", "-j", "list", "set", family, self._name, direction],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
            env=environment(),
        )
        if done.returncode:
            raise KernelError(f"packets of peers can't be counted: {done.stderr.strip().splitlines()[0]}")
        return done.stdout

    def _wait(self) -> None:
        """Until the rules are there: nft answers a question when it has done what came before."""
        assert self._nft
        assert self._nft.stdout
        for line in iter(self._nft.stdout.readline, ""):
            if "Error" in line:
                raise KernelError(f"packets of peers can't be counted: {line.partition('Error:')[2].strip()}")
            if "wincey-done" in line:
                return
        raise KernelError(
            "packets of peers can't be counted: nft ended; it takes nftables 0.9.9 and Linux 5.12, and root"
        )


def ruleset(name: str, subnets: Iterable[Subnet]) -> list[str]:
    """Nft's commands for a table that counts, line by line; the last makes nft say `wincey-done`."""
    lines = []
    by_family: dict[str, list[str]] = {}
    for subnet in subnets:
        by_family.setdefault(_family(subnet), []).append(str(subnet))
    for family, texts in by_family.items():
        kind = "ipv4_addr" if family == "ip" else "ipv6_addr"
        lines.append(f"add table {family} {name} {{ flags owner; }}")
        for direction in ("to", "from"):
            elements = ", ".join(texts)
            lines.append(
                f"add set {family} {name} {direction} {{ type {kind}; flags interval; counter; elements = {{ {elements} }}; }}"
            )
        for hook in _HOOKS:
            lines += [
                f"add chain {family} {name} {hook} {{ type filter hook {hook} priority -300; }}",
                f"add rule {family} {name} {hook} {family} daddr @to",
                f"add rule {family} {name} {hook} {family} saddr @from",
            ]
    family = next(iter(by_family), "ip")
    return [*lines, f"add chain {family} {name} wincey-done", f"list chain {family} {name} wincey-done"]


def take(document: Mapping[str, Any], counted: dict[Subnet, Counted]) -> None:
    """Add what `nft -j list set` says."""
    for item in document["nftables"]:
        found = item.get("set")
        for entry in found.get("elem", ()) if found else ():
            element = entry["elem"]
            prefix = element["val"]["prefix"]
            target = counted.get(Subnet.parse(f"{prefix['addr']}/{prefix['len']}"))
            if target is None:
                continue
            if found["name"] == "to":
                target.packets_to, target.bytes_to = element["counter"]["packets"], element["counter"]["bytes"]
            else:
                target.packets_from, target.bytes_from = element["counter"]["packets"], element["counter"]["bytes"]


def _family(subnet: Subnet) -> str:
    return "ip" if subnet.bits == 32 else "ip6"
