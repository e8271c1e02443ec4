"""One network's parts on this host put together: store, drivers, reconciler, agent; and their removal from the host."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import re
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path

import msgspec

from wincey.agent import memory
from wincey.agent.company import Seat
from wincey.agent.desired import DesiredState
from wincey.agent.envfile import read_env_file
from wincey.agent.hostfacts import HostLook, Wishes
from wincey.agent.identity import this_host
from wincey.agent.network import Network, Settings
from wincey.agent.parts import HostAsk, fast_path_report, part_drivers
from wincey.agent.preparation import no_config
from wincey.agent.probing import Prober
from wincey.agent.reconciler import Reconciler
from wincey.agent.statefile import State
from wincey.agent.udpengine import UdpEngines, UdpWishes
from wincey.agent.view import NetworkView, Views, WaitingView, peer_subnets
from wincey.kernel.driver import Driver
from wincey.kernel.rtnetlink import RtnetlinkDriver
from wincey.kernel.sysctl import SysctlDriver
from wincey.kernel.traffic import TrafficRulesDriver
from wincey.leasing.claims import Host
from wincey.model.address import Subnet
from wincey.model.errors import StoreError, WinceyError
from wincey.model.networkname import UNNAMED
from wincey.model.state import Scope
from wincey.observe.apilisten import ApiListen
from wincey.store.kv import KeyValueStore
from wincey.store.measured import MeasuredLeases
from wincey.store.open import StoreOptions, open_remote, open_store
from wincey.store.registry import LeaseStore, Registry
from wincey.tunnel.driver import TunnelDriver

log = logging.getLogger(__name__)

_SUFFIX_SIZE = 11  # what an iptables chain's name has room for


class Several(msgspec.Struct, frozen=True):
    """Several networks in one daemon. names: those to join, none for all. watch: also leave one whose config is deleted.

    directory: for the networks' env files.
    """

    names: tuple[str, ...]
    watch: bool
    directory: str


class DaemonOptions(msgspec.Struct, frozen=True):
    """Everything that the process needs to know. healthz_port 0: no health endpoint. audit: seconds between audits.

    several: None for one network, which is the one at `prefix`. api_socket: the local API's, "" for none. api_group: the group
    that may use it, "" for root alone. api_listen: where it listens besides. metrics_listen: address and port, 0 for none.
    probe: seconds between two rounds of asking the peers, 0 for never.
    metrics_peers: of how many peers the traffic is told, 0 for none, which costs nothing.
    """

    store: StoreOptions
    prefix: str
    settings: Settings
    wishes: Wishes
    healthz_ip: str
    healthz_port: int
    audit: float
    api_socket: str = ""
    api_group: str = ""
    api_listen: ApiListen | None = None
    metrics_listen: tuple[str, int] = ("", 0)
    probe: float = 0.0
    metrics_peers: int = 0
    udp: UdpWishes = UdpWishes()
    several: Several | None = None


async def live(
    options: DaemonOptions, tell: Callable[[str | None], None], views: Views, seat: Seat | None = None
) -> None:
    """Join the network at `options.prefix` and stay in it until cancelled; raises WinceyError when the host can't join.

    tell: told None when containers can be started, or why not (yet). views: where it shows itself. seat: its place among
    several networks.
    """
    name = seat.name if seat else ""
    waiting = WaitingView(name, options.settings.subnet_file, options.store.described)
    views.put(name, waiting)
    view: NetworkView | None = None
    rng = random.Random()  # noqa: S311  # jitter and the choice of a subnet, no secrets
    subnet_file = options.settings.subnet_file
    state = State(subnet_file, rng)
    rules = _rules(subnet_file, seat.name if seat else None)
    links = RtnetlinkDriver()
    engines = UdpEngines(options.udp)
    reconciler = Reconciler(DesiredState(), _drivers(state, engines, links, SysctlDriver(), rules), options.audit)
    registry: LeaseStore | None = None
    tasks: list[asyncio.Task[None]] = []
    prober = Prober(rng, options.probe) if options.probe else None

    def on_ready(reason: str | None) -> None:
        waiting.reason = reason
        if view:
            view.reason = reason
        state.tell(reason)
        tell(reason)
        if reason is None:
            # A moment later, when the join has let go of what it read.
            asyncio.get_running_loop().call_later(1.0, memory.settle)

    try:
        me = this_host()
        registry = measured = MeasuredLeases(await _open_registry(options, seat, me, on_ready, rng))
        network = Network(
            options.settings,
            registry,
            reconciler,
            state=state,
            host=me,
            look=HostLook(options.wishes, state.macs, seat.tun(state.devices) if seat else "flannel0"),
            choose_rules=lambda config: rules.choose(config.enable_nftables),
            on_ready=on_ready,
            rng=rng,
            ask=HostAsk(state.directory, served=lambda: measured.keeps_cloud, engines=engines),
            seat=seat,
            targets=prober.targets if prober else None,
        )
        engines.reconsider = network.reconsider
        view = NetworkView(
            name,
            options.store.described,
            network,
            reconciler,
            requests=measured.requests,
            prober=prober,
            engine=engines.report,
            fast_path=lambda: fast_path_report(reconciler.drivers),
        )
        view.reason = waiting.reason
        views.put(name, view)
        links.watch_hosts(lambda why: network.host_changed())
        if seat:
            seat.listen(network.company_changed)
        beside = _beside(options, view, reconciler, prober)
        tasks = [asyncio.create_task(work) for work in (network.run(), reconciler.run(), *beside)]
        await asyncio.gather(*tasks)
    except WinceyError as error:
        state.tell(str(error))
        raise
    finally:
        views.remove(name)
        if seat:
            seat.listen(None)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await reconciler.close()
        if registry:
            await registry.close()


def _beside(
    options: DaemonOptions, view: NetworkView, reconciler: Reconciler, prober: Prober | None
) -> list[Coroutine[None, None, None]]:
    """What runs beside the network's life for those who look at it."""
    works = [prober.run()] if prober else []
    if options.metrics_peers:
        from wincey.agent.peertraffic import PeerTraffic  # noqa: PLC0415  # only where it is asked for

        traffic = PeerTraffic(lambda: peer_subnets(reconciler.desired.owners))
        view.busiest = lambda: traffic.busiest(options.metrics_peers)
        works.append(traffic.run())
    return works


async def _open_registry(
    options: DaemonOptions, seat: Seat | None, me: Host, tell: Callable[[str | None], None], rng: random.Random
) -> LeaseStore:
    if options.store.remote:
        return open_remote(options.store.remote, seat.name if seat else UNNAMED, f"{me.name} {me.instance}")
    return Registry(await _open_store(options, tell, rng), options.prefix)


async def _open_store(options: DaemonOptions, tell: Callable[[str | None], None], rng: random.Random) -> KeyValueStore:
    """Open it, with patience: a daemon may start before its store does, and before anybody has put a config."""
    told = ""
    while True:
        try:
            store = await open_store(options.store, options.prefix)
            registry = Registry(store, options.prefix)
            if (
                options.store.store.startswith("sqlite:")
                or options.store.api != "auto"
                or await registry.config() is not None
            ):
                return store
            await store.close()
            reason = no_config(registry.config_key)
        except StoreError as error:
            reason = str(error)
        if reason != told:
            told = reason
            log.error("%s; trying on", reason)
            tell(reason)
        await asyncio.sleep(rng.uniform(0.8, 1.2))


async def clean_up(subnet_file: str, network: str | None = None) -> bool:
    """Remove everything of ours from this host: devices, routes, rules, files. The lease stays until it expires.

    network: its name where it is one of several. False when something could not be removed, which is logged.
    """
    state = State(subnet_file, random.Random())  # noqa: S311  # as above
    rules = _rules(subnet_file, network)
    links = RtnetlinkDriver()
    networks = state.networks | set(read_env_file(subnet_file).networks)
    reconciler = Reconciler(DesiredState(), _drivers(state, UdpEngines(UdpWishes()), links))
    reconciler.scope = Scope(tuple(sorted(state.devices)), tuple(sorted(networks)))
    failures = await reconciler.settle()
    await rules.remove_all()
    await reconciler.close()
    await rules.close()
    for failure in failures:
        log.error("%s: %s", failure.object, failure.reason)
    if not failures:
        state.forget()
        Path(subnet_file).unlink(missing_ok=True)  # noqa: ASYNC240  # nothing waits for us meanwhile
        log.info("removed all of ours from this host; its lease stays in the store until it expires")
    return not failures


def _drivers(state: State, engines: UdpEngines, *others: Driver) -> list[Driver]:
    """All of a network's."""
    tunnel = TunnelDriver(state.directory, farewell=_farewell(state.directory))
    late = part_drivers(state, late=True, failed=engines.failed)
    engines.watch(tunnel.latest, lambda: {name: count for part in late for name, count in part.counters().items()})
    return [*part_drivers(state), tunnel, *late, *others]


def _farewell(directory: Path) -> list[str]:
    """What removes the udp tunnel's programs when its keeper ends without a daemon; see wincey.bpf.__main__."""
    return [sys.executable, "-P", "-m", "wincey.bpf", str(directory)]


def _rules(subnet_file: str, network: str | None) -> TrafficRulesDriver:
    suffix = daemon_suffix(subnet_file) if network is None else network_suffix(network)
    return TrafficRulesDriver(suffix, _previous(subnet_file), isolating=network is not None)


def daemon_suffix(subnet_file: str) -> str:
    """What keeps the rules of several daemons on one host apart: the name of their subnet file, unless it is the usual."""
    stem = Path(subnet_file).stem
    return "" if stem == "subnet" else re.sub(r"[^a-z0-9_]", "", stem.lower()).lstrip("_")[:_SUFFIX_SIZE]


def network_suffix(name: str) -> str:
    """What keeps the rules of a daemon's networks apart: the name, or where it does not fit its beginning and a digest."""
    if re.fullmatch(rf"[a-z0-9][a-z0-9_]{{0,{_SUFFIX_SIZE - 1}}}", name):
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"{re.sub('[^a-z0-9]', '', name.lower())[:4]}_{digest}".lstrip("_")[:_SUFFIX_SIZE]


def _previous(subnet_file: str) -> list[tuple[Subnet, Subnet]]:
    """Network and subnet of an earlier run, of ours or of flannel."""
    env = read_env_file(subnet_file)
    return [
        (network, subnet.masked())
        for network in env.networks
        for subnet in env.subnets
        if network.family == subnet.family
    ]
