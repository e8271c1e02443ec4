"""The process of the server mode: a store, an API on it, the addresses it listens on. It never joins a network."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import resource
import signal

import msgspec

from wincey.agent import sdnotify
from wincey.http.server import HttpServer, Limits
from wincey.model.errors import StoreError
from wincey.model.serveraddress import Where
from wincey.observe.health import Health, serve_health
from wincey.server.access import Access
from wincey.server.api import Api
from wincey.server.listen import listen, server_tls
from wincey.store.kv import KeyValueStore
from wincey.store.open import StoreOptions, open_store

log = logging.getLogger(__name__)

# A client has a long poll and now and then a second connection. When it ends them it is gone, and its address may be had.
_LIMITS = Limits(body=64 * 1024, connections=20_000, half_closed=0.1)


class ServerOptions(msgspec.Struct, frozen=True):
    """Everything that the process needs to know. token_file: "" for none. healthz_port 0: no health endpoint.

    cloud_routes: whether to keep the cloud's route tables for the clients.
    """

    store: StoreOptions
    prefix: str
    where: Where
    keyfile: str
    certfile: str
    cafile: str
    token_file: str
    healthz_ip: str
    healthz_port: int
    cloud_routes: bool = False


async def serve_remote(options: ServerOptions) -> None:
    """Serve until SIGINT or SIGTERM; raises CannotListen, UsageError, BadOption."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    access = Access(options.token_file)
    tls = server_tls(options.keyfile, options.certfile, options.cafile, tokens=bool(options.token_file))
    _warn(options, encrypted=tls is not None)
    _raise_descriptor_limit()
    health = Health()
    rng = random.Random()  # noqa: S311  # jitter and the choice of a subnet, no secrets
    api = Api(options.prefix, access, rng, keeps_cloud=options.cloud_routes)
    server = HttpServer(api.handle, _LIMITS)
    opening = asyncio.create_task(_keep_store(options, api, health))
    probe: HttpServer | None = None
    try:
        if options.healthz_port > 0:
            probe = await serve_health(health, options.healthz_ip, options.healthz_port)
        name = await listen(server, options.where, tls, os.environ)
        log.info("serving %s on %s%s", api.prefix, name, " with TLS" if tls else "")
        sdnotify.notify("READY=1")
        ended = asyncio.create_task(stop.wait())
        # The store is only looked for; what can end this task is a wrong command line.
        await asyncio.wait({ended, opening}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if opening.done():
            opening.result()
        log.info("stopping; clients go on forwarding, and to another server if they know one")
        sdnotify.notify("STOPPING=1")
    finally:
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        await server.close(grace=0.2)  # the long polls would never end by themselves
        api.close()
        if probe:
            await probe.close()
        if api.store:
            await api.store.close()


async def _keep_store(options: ServerOptions, api: Api, health: Health) -> None:
    """Open the store, with patience, and tell the health endpoint whether it can be reached."""
    told = ""
    while True:
        store: KeyValueStore | None = None
        try:
            store = await open_store(options.store, options.prefix)
            # Which of etcd's APIs it is shows only when there is something below the prefix.
            if options.store.api != "auto" or options.store.store.startswith("sqlite:"):
                await store.get(f"{api.prefix}/config")
                break
            if (await store.read_all(f"{api.prefix}/")).entries:
                break
            reason = f"there is no network config at {api.prefix}/config yet"
        except StoreError as error:
            reason = str(error)
        if store:
            await store.close()
        api.waiting = reason
        health.set_not_ready(reason)
        if reason != told:
            told = reason
            log.error("%s; trying on", reason)
        await asyncio.sleep(1)
    log.info("serving out of %s", store.name)
    api.store = store
    health.set_ready()
    tasks = [asyncio.create_task(_watch_store(store, api.prefix, health))]
    if options.cloud_routes:
        from wincey.agent.cloudtables import CloudTables  # noqa: PLC0415  # most servers keep none

        tasks.append(asyncio.create_task(CloudTables(store, api.prefix, random.Random()).run()))  # noqa: S311  # as above
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _watch_store(store: KeyValueStore, prefix: str, health: Health) -> None:
    while True:
        await asyncio.sleep(5)
        try:
            await store.get(f"{prefix}/config")
        except StoreError as error:
            health.set_not_ready(str(error))
        else:
            health.set_ready()


def _warn(options: ServerOptions, *, encrypted: bool) -> None:
    if not options.token_file and not (encrypted and options.cafile):
        log.warning(
            "whoever reaches this server may take and delete leases: give --remote-token-file, or --remote-cafile with"
            " --remote-certfile and --remote-keyfile, to have clients prove who they are"
        )
    if options.cafile and not encrypted:
        log.warning("--remote-cafile has no effect without --remote-certfile and --remote-keyfile")
    if options.token_file and not encrypted:
        log.warning("tokens are sent in the clear: give --remote-certfile and --remote-keyfile for TLS")


def _raise_descriptor_limit() -> None:
    """Each client holds a connection, and the usual limit of 1024 files would be theirs."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
