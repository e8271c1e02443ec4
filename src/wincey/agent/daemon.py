"""The process: one network's agent with its store, its drivers, its health endpoint and its signals."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import random
import re
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec

from wincey.agent import sdnotify
from wincey.agent.desired import DesiredState
from wincey.agent.envfile import read_env_file
from wincey.agent.hostfacts import HostLook, Wishes
from wincey.agent.identity import this_host
from wincey.agent.network import Network, Settings, no_config
from wincey.agent.reconciler import Reconciler
from wincey.agent.statefile import State
from wincey.kernel.driver import Driver
from wincey.kernel.rtnetlink import RtnetlinkDriver
from wincey.kernel.sysctl import SysctlDriver, bridge_netfilter_note
from wincey.kernel.traffic import TrafficRulesDriver
from wincey.model.address import Subnet
from wincey.model.errors import StoreError, WinceyError
from wincey.model.state import Scope
from wincey.observe.health import Health, serve_health
from wincey.store.kv import KeyValueStore
from wincey.store.open import StoreOptions, open_store
from wincey.store.registry import Registry
from wincey.tunnel.driver import TunnelDriver

log = logging.getLogger(__name__)


class DaemonOptions(msgspec.Struct, frozen=True):
    """Everything that the process needs to know. healthz_port 0: no health endpoint. audit: seconds between audits."""

    store: StoreOptions
    prefix: str
    settings: Settings
    wishes: Wishes
    healthz_ip: str
    healthz_port: int
    audit: float


async def serve(options: DaemonOptions) -> None:
    """Run until SIGINT or SIGTERM; raises WinceyError when the host can't join."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stopping() -> None:
        stop.set()
        # A second signal ends the process at once.
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping)
    health = Health()
    server = await serve_health(health, options.healthz_ip, options.healthz_port) if options.healthz_port > 0 else None
    life = asyncio.create_task(_live(options, health))
    ended = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({life, ended}, return_when=asyncio.FIRST_COMPLETED)
        if not life.done():
            log.info("stopping; packets go on flowing, the lease stays ours")
            sdnotify.notify("STOPPING=1")
    finally:
        ended.cancel()
        life.cancel()
        results = await asyncio.gather(life, return_exceptions=True)
        if server:
            await server.close()
    if isinstance(results[0], Exception):
        raise results[0]


async def _live(options: DaemonOptions, health: Health) -> None:
    rng = random.Random()  # noqa: S311  # jitter and the choice of a subnet, no secrets
    state = State(options.settings.subnet_file, rng)
    rules = TrafficRulesDriver(_suffix(options.settings.subnet_file), _previous(options.settings.subnet_file))
    links = RtnetlinkDriver()
    drivers: Sequence[Driver] = (TunnelDriver(state.directory), links, SysctlDriver(), rules)
    reconciler = Reconciler(DesiredState(), drivers, audit_every=options.audit)
    if note := bridge_netfilter_note():
        log.warning("%s", note)
    store = await _open_store(options, health, state, rng)
    tasks: list[asyncio.Task[None]] = []
    try:

        def on_ready(reason: str | None) -> None:
            state.tell(reason)
            state.tell(reason)
            if reason is None:
                health.set_ready()
                sdnotify.notify("READY=1")
                _settle_memory()
            else:
                health.set_not_ready(reason)

        network = Network(
            options.settings,
            Registry(store, options.prefix),
            reconciler,
            state=state,
            host=this_host(),
            look=HostLook(options.wishes, state.macs),
            choose_rules=lambda config: rules.choose(config.enable_nftables),
            on_ready=on_ready,
            rng=rng,
        )
        links.watch_hosts(lambda why: network.host_changed())
        tasks = [asyncio.create_task(network.run()), asyncio.create_task(reconciler.run())]
        await asyncio.gather(*tasks)
    except WinceyError as error:
        state.tell(str(error))
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await reconciler.close()
        await store.close()


async def _open_store(options: DaemonOptions, health: Health, state: State, rng: random.Random) -> KeyValueStore:
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
            health.set_not_ready(reason)
            state.tell(reason)
        await asyncio.sleep(rng.uniform(0.8, 1.2))


async def clean_up(subnet_file: str) -> None:
    """Remove everything of ours from this host: devices, routes, rules, files. The lease stays until it expires."""
    state = State(subnet_file, random.Random())  # noqa: S311  # as above
    rules = TrafficRulesDriver(_suffix(subnet_file), _previous(subnet_file))
    tunnel, links = TunnelDriver(state.directory), RtnetlinkDriver()
    networks = state.networks | set(read_env_file(subnet_file).networks)
    reconciler = Reconciler(DesiredState(), (tunnel, links))
    reconciler.scope = Scope(tuple(sorted(state.devices)), tuple(sorted(networks)))
    failures = await reconciler.settle()
    await rules.remove_all()
    await reconciler.close()
    await rules.close()
    for failure in failures:
        log.error("%s: %s", failure.object, failure.reason)
    if not failures:
        state.forget()
        Path(subnet_file).unlink(missing_ok=True)  # noqa: ASYNC240  # nothing else runs at the end
        log.info("removed all of ours from this host; its lease stays in the store until it expires")


def _suffix(subnet_file: str) -> str:
    """What keeps the rules of several daemons on one host apart: the name of their subnet file, unless it is the usual."""
    stem = Path(subnet_file).stem
    return "" if stem == "subnet" else re.sub(r"[^a-z0-9_]", "", stem.lower()).lstrip("_")[:11]


def _previous(subnet_file: str) -> list[tuple[Subnet, Subnet]]:
    """Network and subnet of an earlier run, of ours or of flannel."""
    env = read_env_file(subnet_file)
    return [
        (network, subnet.masked())
        for network in env.networks
        for subnet in env.subnets
        if network.family == subnet.family
    ]


def _settle_memory() -> None:
    """What start-up left behind goes back to the system, and what lives on is not looked at by each collection."""
    gc.collect()
    gc.freeze()
    with contextlib.suppress(OSError, AttributeError):  # a libc without it
        ctypes.CDLL(None).malloc_trim(0)
