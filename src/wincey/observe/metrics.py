"""Metrics for Prometheus, in its text format 0.0.4: what StatusReport says, as numbers. Pure but for the process's own.

Names follow Prometheus' conventions: base units, `_total` for what only grows, `_info` for what is text. Each series of one
network carries its name, "" for the only one. How many series there are does not depend on how many peers there are: the
traffic of peers is told of as many as --metrics-peers says, the busiest.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from wincey.model.report import NetworkReport, StatusReport

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metric(msgspec.Struct, frozen=True):
    """One family of series: its type, what it means, and its samples in a status (suffix of the name, labels, value)."""

    name: str
    kind: str
    help: str
    samples: Callable[[StatusReport, float], Iterator[tuple[str, dict[str, str], float]]]


Samples = Iterator[tuple[str, dict[str, str], float]]


def _each(value: Callable[[NetworkReport], float | None]) -> Callable[[StatusReport, float], Samples]:
    """One sample a network, none where `value` knows none."""

    def samples(status: StatusReport, now: float) -> Samples:
        for network in status.networks:
            found = value(network)
            if found is not None:
                yield "", {"network": network.name}, found

    return samples


def _build(status: StatusReport, now: float) -> Samples:
    yield "", {"version": status.version}, 1


def _start(status: StatusReport, now: float) -> Samples:
    yield "", {}, now - status.up


def _info(status: StatusReport, now: float) -> Samples:
    for each in status.networks:
        subnets = ",".join(each.lease.subnets) if each.lease else ""
        yield (
            "",
            {"network": each.name, "backend": each.backend, "range": ",".join(each.networks), "subnet": subnets},
            1,
        )


def _expiry(status: StatusReport, now: float) -> Samples:
    for each in status.networks:
        if each.lease and each.lease.left is not None:
            yield "", {"network": each.name}, now + each.lease.left


def _audited(status: StatusReport, now: float) -> Samples:
    for each in status.networks:
        if each.reconcile.ago is not None:
            yield "", {"network": each.name}, now - each.reconcile.ago


def _durations(status: StatusReport, now: float) -> Samples:
    for each in status.networks:
        for requests in each.store.requests:
            labels = {"network": each.name, "operation": requests.operation}
            for bound, count in zip([*map(str, requests.bounds), "+Inf"], requests.cumulated, strict=True):
                yield "_bucket", {**labels, "le": bound}, count
            yield "_sum", labels, requests.seconds
            yield "_count", labels, requests.count


def _store_failures(status: StatusReport, now: float) -> Samples:
    for each in status.networks:
        for requests in each.store.requests:
            yield "", {"network": each.name, "operation": requests.operation}, requests.failures


def _traffic(direction: str, unit: str) -> Callable[[StatusReport, float], Samples]:
    field = f"{direction}_{unit}"

    def samples(status: StatusReport, now: float) -> Samples:
        for each in status.networks:
            for device in each.traffic:
                yield "", {"network": each.name, "device": device.device}, getattr(device, field)

    return samples


def _engine(status: StatusReport, now: float) -> Samples:
    for each in status.networks:
        if each.engine:
            yield "", {"network": each.name, "engine": each.engine.name, "keeper": each.engine.keeper}, 1


def _engine_counters(unit: str) -> Callable[[StatusReport, float], Samples]:
    def samples(status: StatusReport, now: float) -> Samples:
        for each in status.networks:
            for who, counters in each.engine.counters.items() if each.engine else ():
                for name, count in counters.items():
                    direction, _, what = name.partition(".")
                    labels = {"network": each.name, "by": who, "direction": direction}
                    if what == unit:
                        yield "", labels, count
                    elif unit == "drop" and what.startswith("drop."):
                        yield "", {**labels, "reason": what.removeprefix("drop.")}, count

    return samples


def _fast_path(status: StatusReport, now: float) -> Samples:
    for each in status.networks:
        for what, count in each.fast_path.counters.items() if each.fast_path else ():
            yield "", {"network": each.name, "what": what}, count


def _devices() -> Iterator[Metric]:
    meanings = {"bytes": "Bytes", "packets": "Packets", "errors": "Errors", "dropped": "Packets dropped"}
    for direction in ("receive", "transmit"):
        for unit, meaning in meanings.items():
            name = f"wincey_device_{direction}_{unit}_total"
            text = f"{meaning} of our devices, {direction} side, as the kernel counts them."
            yield Metric(name, "counter", text, _traffic(direction, unit))


def _peers(field: str) -> Callable[[StatusReport, float], Samples]:
    def samples(status: StatusReport, now: float) -> Samples:
        for each in status.networks:
            for peer in each.peer_traffic:
                yield "", {"network": each.name, "peer": peer.subnet}, getattr(peer, field)

    return samples


def _process_memory(status: StatusReport, now: float) -> Samples:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    yield "", {}, pages * resource.getpagesize()


def _process_cpu(status: StatusReport, now: float) -> Samples:
    used = os.times()
    yield "", {}, used.user + used.system


def _process_files(status: StatusReport, now: float) -> Samples:
    yield "", {}, len(os.listdir("/proc/self/fd"))


METRICS: tuple[Metric, ...] = (
    Metric("wincey_build_info", "gauge", "The version that runs.", _build),
    Metric("wincey_network_info", "gauge", "What a network is on this host.", _info),
    Metric(
        "wincey_network_ready", "gauge", "Whether containers can be started.", _each(lambda n: float(n.trouble is None))
    ),
    Metric("wincey_peers", "gauge", "Other hosts that hold leases.", _each(lambda n: n.peers)),
    Metric(
        "wincey_probe_peers",
        "gauge",
        "Peers that were asked whether they answer (--probe).",
        _each(lambda n: n.probe.asked if n.probe else None),
    ),
    Metric(
        "wincey_probe_peers_well",
        "gauge",
        "Those that answer without fault.",
        _each(lambda n: n.probe.well if n.probe else None),
    ),
    Metric(
        "wincey_probe_loss_ratio",
        "gauge",
        "The part of requests to peers that was lost, their mean.",
        _each(lambda n: n.probe.loss if n.probe else None),
    ),
    Metric(
        "wincey_probe_rtt_seconds",
        "gauge",
        "The round trip to peers, their median.",
        _each(lambda n: n.probe.rtt if n.probe else None),
    ),
    Metric("wincey_bad_keys", "gauge", "Keys beside the leases that can't be read.", _each(lambda n: len(n.bad_keys))),
    Metric("wincey_lease_expiry_timestamp_seconds", "gauge", "When our lease ends unless it is renewed.", _expiry),
    Metric("wincey_objects", "gauge", "Objects that should exist on this host.", _each(lambda n: n.reconcile.objects)),
    Metric(
        "wincey_objects_failed",
        "gauge",
        "Objects that could not be made as they should be.",
        _each(lambda n: len(n.reconcile.failures)),
    ),
    Metric(
        "wincey_reconcile_changes_total",
        "counter",
        "Objects made, changed or removed.",
        _each(lambda n: n.reconcile.changes),
    ),
    Metric("wincey_reconcile_audits_total", "counter", "Looks at the whole host.", _each(lambda n: n.reconcile.audits)),
    Metric(
        "wincey_reconcile_audit_cpu_seconds_total",
        "counter",
        "Processor time of these looks.",
        _each(lambda n: n.reconcile.cpu),
    ),
    Metric("wincey_reconcile_last_audit_timestamp_seconds", "gauge", "When the last look was.", _audited),
    Metric(
        "wincey_drift_repaired_total",
        "counter",
        "Objects that another program had changed or removed, and that were put right.",
        _each(lambda n: n.reconcile.repaired),
    ),
    Metric(
        "wincey_store_up",
        "gauge",
        "Whether the store can be followed.",
        _each(lambda n: float(n.store.trouble is None)),
    ),
    Metric("wincey_store_request_duration_seconds", "histogram", "How long requests to the store took.", _durations),
    Metric("wincey_store_request_failures_total", "counter", "Requests to the store that failed.", _store_failures),
    *_devices(),
    Metric("wincey_udp_engine_info", "gauge", "What carries the packets of the udp backend.", _engine),
    Metric(
        "wincey_udp_packets_total",
        "counter",
        "Packets through a udp tunnel, by who carried them: the kernel's programs or the keeper.",
        _engine_counters("packets"),
    ),
    Metric("wincey_udp_bytes_total", "counter", "Bytes of these, without outer headers.", _engine_counters("bytes")),
    Metric("wincey_udp_drops_total", "counter", "Packets that a udp tunnel dropped.", _engine_counters("drop")),
    Metric(
        "wincey_fast_path_packets_total",
        "counter",
        "Packets of containers by what the fast path did with them: out, in, learned from, left to the ordinary path.",
        _fast_path,
    ),
    Metric(
        "wincey_peer_transmit_bytes_total",
        "counter",
        "Bytes to a peer's subnet, of the busiest peers (--metrics-peers).",
        _peers("bytes_to"),
    ),
    Metric(
        "wincey_peer_transmit_packets_total", "counter", "Packets to a peer's subnet, likewise.", _peers("packets_to")
    ),
    Metric("wincey_peer_receive_bytes_total", "counter", "Bytes from a peer's subnet, likewise.", _peers("bytes_from")),
    Metric(
        "wincey_peer_receive_packets_total",
        "counter",
        "Packets from a peer's subnet, likewise.",
        _peers("packets_from"),
    ),
    Metric("process_start_time_seconds", "gauge", "When the daemon started.", _start),
    Metric("process_cpu_seconds_total", "counter", "Processor time of the daemon.", _process_cpu),
    Metric("process_resident_memory_bytes", "gauge", "Resident memory of the daemon.", _process_memory),
    Metric("process_open_fds", "gauge", "Open files of the daemon.", _process_files),
)


def render(status: StatusReport) -> str:
    """All metrics as text."""
    now = time.time()
    lines: list[str] = []
    for metric in METRICS:
        samples = [
            f"{metric.name}{suffix}{_labels(labels)} {_number(value)}"
            for suffix, labels, value in metric.samples(status, now)
        ]
        if samples:
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}", *samples]
    return "\n".join(lines) + "\n"


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    escaped = {
        name: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for name, value in labels.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
