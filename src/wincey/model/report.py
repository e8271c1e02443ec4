"""What a daemon tells of itself: the answers of its local API (observe.localapi), version 1.

Reports are values without I/O. Durations are in seconds, times in seconds since now (`ago`, `left`), so that no two clocks are
compared; addresses and subnets are text. Fields are only ever added within a version.
"""

from __future__ import annotations

import msgspec

API = "v1"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all of them."""


class InterfaceReport(Report, frozen=True, kw_only=True):
    """The interface for traffic between hosts. addresses: its own. public: what peers are told, IPv4 first."""

    name: str
    mtu: int
    addresses: list[str]
    public: list[str]


class LeaseReport(Report, frozen=True, kw_only=True):
    """A lease. left: seconds until it expires unless renewed, None for a reservation, or as long as it is not known."""

    subnets: list[str]
    reservation: bool
    left: float | None


class RequestsReport(Report, frozen=True, kw_only=True):
    """Requests of one kind to the store, since the daemon's start.

    seconds: what all of them took. cumulated: how many took at most as many seconds as each of `bounds`, and at last all.
    """

    operation: str
    count: int
    failures: int
    seconds: float
    bounds: list[float]
    cumulated: list[int]


class StoreReport(Report, frozen=True, kw_only=True):
    """Where config and leases are kept. trouble: why it can't be reached, None while it can."""

    name: str
    trouble: str | None
    requests: list[RequestsReport]


class TrafficReport(Report, frozen=True, kw_only=True):
    """What the kernel counted on one of our devices."""

    device: str
    receive_bytes: int
    receive_packets: int
    receive_errors: int
    receive_dropped: int
    transmit_bytes: int
    transmit_packets: int
    transmit_errors: int
    transmit_dropped: int


class FailureReport(Report, frozen=True, kw_only=True):
    """Something that could not be made as it should be."""

    what: str
    reason: str


class BadKeyReport(Report, frozen=True, kw_only=True):
    """A key beside the leases that can't be read; it is passed over."""

    key: str
    reason: str


class ReconcileReport(Report, frozen=True, kw_only=True):
    """How the host is kept as it should be.

    objects: how many are wanted. ago: seconds since the last audit, None before the first. took: its seconds of CPU time;
    cpu: those of all of them. changes: objects made, changed or removed since the daemon's start. repaired: objects that another program had changed, since the daemon's start. failures: what could not be done.
    """

    objects: int
    ago: float | None
    took: float
    audits: int
    cpu: float
    changes: int
    repaired: int
    failures: list[FailureReport]


class EngineReport(Report, frozen=True, kw_only=True):
    """What carries a network's packets where there is a choice, as of the udp backend (--udp-engine).

    name: the engine. why: why it is no better one, "" for none. keeper: the engine of the process that takes what the kernel leaves,
    or all. counters: packets, bytes and drops by who counted (`kernel`, `keeper`) and what, such as `in.drop.source`.
    """

    name: str
    why: str
    keeper: str
    counters: dict[str, dict[str, int]]


class FastPathReport(Report, frozen=True, kw_only=True):
    """The fast path of containers (--fast-path).

    way: how packets go by it, or why there is none. counters: packets by what became of them, such as `out` (of a container) and `in`.
    """

    way: str
    counters: dict[str, int]


class PeerTrafficReport(Report, frozen=True, kw_only=True):
    """What went to and came from a peer's subnet since the daemon's start, or since the peer came."""

    subnet: str
    packets_to: int
    bytes_to: int
    packets_from: int
    bytes_from: int


class ProbesReport(Report, frozen=True, kw_only=True):
    """What asking the peers has shown: how many were asked, how many of these answer without fault. loss: the mean, 0 to 1.
    rtt: the median, in seconds."""

    asked: int
    well: int
    loss: float
    rtt: float | None


class NetworkReport(Report, frozen=True, kw_only=True):
    """One network on this host. name: "" where the daemon joins a single one.

    trouble: why containers can't be started (yet), None when they can. peers: how many other hosts hold leases. peer_traffic: of the
    busiest peers, with --metrics-peers. probe: None without --probe. engine: None where the backend has but one way. fast_path:
    None without --fast-path. Before the
    config is known, backend is "" and mtu 0.
    """

    name: str
    trouble: str | None
    config_key: str
    networks: list[str]
    backend: str
    mtu: int
    interface: InterfaceReport | None
    devices: list[str]
    traffic: list[TrafficReport]
    lease: LeaseReport | None
    store: StoreReport
    subnet_file: str
    peers: int
    peer_traffic: list[PeerTrafficReport]
    probe: ProbesReport | None
    bad_keys: list[BadKeyReport]
    reconcile: ReconcileReport
    engine: EngineReport | None = None
    fast_path: FastPathReport | None = None


class StatusReport(Report, frozen=True, kw_only=True):
    """The daemon. up: seconds since its start."""

    api: str = API
    version: str
    host: str
    pid: int
    up: float
    networks: list[NetworkReport]


class WayReport(Report, frozen=True, kw_only=True):
    """The latest echo requests along one way. loss: 0 to 1. rtt: their median in seconds, None while none was answered."""

    asked: int
    loss: float
    rtt: float | None


class ProbeReport(Report, frozen=True, kw_only=True):
    """What asking a peer has shown (--probe). ago: seconds since it was asked last.

    inner: through the network, None where this host has no address of its own there. outer: from host to host. mtu: the
    largest packet that gets there whole, None while that is not known; promised: how large one may be.
    """

    ago: float
    inner: WayReport | None
    outer: WayReport
    mtu: int | None
    promised: int


class PeerReport(Report, frozen=True, kw_only=True):
    """Another host, as this one sees it.

    public: its addresses between hosts; empty where the store can't be asked now. backend: what it publishes. objects: what
    exists here for it. troubles: what is wrong with it, seen from here. probe: None where it was not asked (yet).
    """

    lease: str
    subnets: list[str]
    public: list[str]
    backend: str
    objects: list[str]
    troubles: list[str]
    probe: ProbeReport | None


class PeersReport(Report, frozen=True, kw_only=True):
    """The peers of one network. note: what this report could not find out, "" if nothing."""

    network: str
    peers: list[PeerReport]
    note: str


class ContainerReport(Report, frozen=True, kw_only=True):
    """An address of this host's subnet that was lately spoken with. mac: "" where it is not known."""

    address: str
    device: str
    mac: str


class ContainersReport(Report, frozen=True, kw_only=True):
    """The containers of one network on this host, as far as the kernel's neighbor table knows them."""

    network: str
    containers: list[ContainerReport]


class DifferenceReport(Report, frozen=True, kw_only=True):
    """What would have to change for one network to be as it should be, read just now; nothing was changed.

    missing: what has to be there and is not. changed: is there, but otherwise. surplus: is ours and not wanted.
    """

    network: str
    wanted: int
    missing: list[str]
    changed: list[str]
    surplus: list[str]


class StepReport(Report, frozen=True, kw_only=True):
    """One hop or condition on a packet's way. what: `lease`, `route`, `neighbor`, `fdb`, `wrapped`, `underlay` and so on."""

    what: str
    text: str
    ok: bool


class ExplainReport(Report, frozen=True, kw_only=True):
    """The way of a packet from this host to an address. breaks_at: the first step that is wrong, "" if none is."""

    network: str
    address: str
    reaches: bool
    breaks_at: str
    steps: list[StepReport]


class ErrorReport(Report, frozen=True, kw_only=True):
    """Why a request has no other answer."""

    error: str
