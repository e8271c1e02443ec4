"""One daemon with one number of leases, measured in the namespace that we are in."""

from __future__ import annotations

import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from scale import window
from scale.arena import run
from scale.daemon import RTMGRP_IPV4_ROUTE, Daemon
from scale.etcd import Etcd, count_the_wire, fill, wire
from scale.leases import LAST_OF_PEERS, Peer, config

RTM_NEWROUTE, RTM_DELROUTE = 24, 25
SO_RCVBUFFORCE = 33
AUDIT_EVERY, AUDIT_SHARE = 60.0, 1000
"""Seconds between the daemon's audits without a cause, or this many times what one costs, where that is more."""


class Notices:
    """Routes as they come and go."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
        self._socket.bind((0, RTMGRP_IPV4_ROUTE))
        self._socket.settimeout(60)

    def count(self, kind: int, wanted: int) -> float:
        """Wait for so many of a kind; when the last one came, in seconds of the performance counter."""
        while wanted > 0:
            data = self._socket.recv(1 << 16)
            offset = 0
            while offset + 16 <= len(data):
                length, found = struct.unpack_from("=IH", data, offset)
                wanted -= found == kind
                offset += (length + 3) & ~3
        return time.perf_counter()

    def close(self) -> None:
        """End."""
        self._socket.close()


def yardstick(count: int, backend: str) -> float:
    """Seconds that `ip -batch` and `bridge -batch` take for the same objects, device included."""
    peers = [Peer(number) for number in range(count)]
    routes, neighbors, entries = [], [], []
    for peer in peers:
        if backend == "vxlan":
            routes.append(f"route replace {peer.subnet}/24 via {peer.subnet} dev flannel.1 onlink")
            neighbors.append(f"neigh replace {peer.subnet} lladdr {peer.mac} dev flannel.1 nud permanent")
            entries.append(f"fdb replace {peer.mac} dst {peer.public_ip} dev flannel.1 self permanent")
        else:
            routes.append(f"route replace {peer.subnet}/24 via {peer.public_ip} dev eth0")
    started = time.perf_counter()
    if backend == "vxlan":
        device = "type vxlan id 1 dev eth0 dstport 8472 nolearning"
        run("ip", "link", "add", "flannel.1", *device.split())
        run("ip", "link", "set", "flannel.1", "up")
        run("bridge", "-batch", "-", stdin="\n".join(entries))
    run("ip", "-batch", "-", stdin="\n".join(neighbors + routes))
    took = time.perf_counter() - started
    if backend == "vxlan":
        run("ip", "link", "del", "flannel.1")
    else:
        run("ip", "-batch", "-", stdin="\n".join(f"route del {peer.subnet}/24" for peer in peers))
    return took


def measure(command: Sequence[str], count: int, backend: str, rest: float, churn: int) -> dict[str, float]:
    """All figures of one size. rest: seconds; churn: leases added at once, and then removed."""
    with tempfile.TemporaryDirectory() as scratch:
        etcd = Etcd(Path(scratch) / "etcd")
        etcd.start()
        try:
            fill(etcd, [Peer(number) for number in range(count)], backend, config(backend))
            figures = {"yardstick_s": yardstick(count, backend)} if count else {}
            count_the_wire()
            before = etcd.operations()
            daemon = Daemon(command, Path(scratch), backend)
            try:
                figures["ready_s"] = daemon.ready(count)
                figures["cpu_to_ready_s"] = daemon.cpu()
                figures["start_bytes"] = sum(wire())
                figures["start_operations"] = sum(etcd.operations().values()) - sum(before.values())
                figures["lease_to_route_ms"] = statistics.median(daemon.lease_to_route(etcd, count))
                figures["resident_mb"] = daemon.memory()
                # Other daemons have no such API.
                if daemon.socket.exists():
                    figures["diff_cpu_ms"] = daemon.diff_cpu()
                figures |= _churn(daemon, etcd, backend, churn)
                figures |= _rest(daemon, rest, figures.get("diff_cpu_ms", 0.0))
                figures["churned_mb"] = daemon.memory()
                figures["load"] = os.getloadavg()[0]
                figures["peak_mb"] = daemon.memory("VmHWM")
            finally:
                daemon.stop()
            return figures
        finally:
            etcd.stop()


def _churn(daemon: Daemon, etcd: Etcd, backend: str, churn: int) -> dict[str, float]:
    """Leases added and removed: how long after the store has the last one the kernel has it."""
    peers = [Peer(number) for number in range(LAST_OF_PEERS - churn, LAST_OF_PEERS)]
    before, cpu, audits = wire()[0], daemon.cpu(), daemon.audits()
    notices = Notices()
    try:
        etcd.change(peers, backend=backend)
        stored = time.perf_counter()
        added = notices.count(RTM_NEWROUTE, churn)
        etcd.change(delete=peers, backend=backend)
        gone = time.perf_counter()
        removed = notices.count(RTM_DELROUTE, churn)
    finally:
        notices.close()
    return {
        "churn_added_lag_ms": max(0.0, (added - stored) * 1e3),
        "churn_removed_lag_ms": max(0.0, (removed - gone) * 1e3),
        "churn_cpu_ms": (daemon.cpu() - cpu) * 1e3 / (2 * churn),
        "churn_audits": daemon.audits() - audits,
        "event_bytes": (wire()[0] - before) / (2 * churn),
    }


def _rest(daemon: Daemon, rest: float, diff_cpu_ms: float) -> dict[str, float]:
    """CPU with nothing to do. Audits come too seldom for a short rest, so their share is added by what one costs."""
    time.sleep(2)
    before, audits = daemon.cpu(), daemon.audits()
    time.sleep(rest)
    used, seen = daemon.cpu() - before, daemon.audits() - audits
    cost = diff_cpu_ms / 1e3
    return {"rest_percent": 100 * (max(0.0, used - seen * cost) / rest + cost / max(AUDIT_EVERY, AUDIT_SHARE * cost))}


def store_use(backend: str, span: float, ttl: float | None) -> dict[str, float]:
    """What one host at rest asks of etcd in `span` seconds: calls by method, and bytes. ttl: of its lease, if not a day."""
    with tempfile.TemporaryDirectory() as scratch:
        etcd = Etcd(Path(scratch) / "etcd")
        etcd.start()
        try:
            fill(etcd, [Peer(number) for number in range(10)], backend, config(backend))
            count_the_wire()
            environment = {"WINDOW_TTL": str(ttl)} if ttl else {}
            command = [sys.executable, str(window.__file__), "--subnet-lease-renew-margin=1"]
            daemon = Daemon(command, Path(scratch), backend, environment)
            try:
                daemon.ready(10)
                time.sleep(5)
                calls, passed = etcd.operations(), sum(wire())
                time.sleep(span)
                daemon.lives()
                after = etcd.operations()
                figures: dict[str, float] = {
                    method: after[method] - calls.get(method, 0)
                    for method in after
                    if after[method] > calls.get(method, 0)
                }
                return figures | {"bytes": sum(wire()) - passed}
            finally:
                daemon.stop()
        finally:
            etcd.stop()
