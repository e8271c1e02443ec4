"""The process: the life of one network or of several, its health endpoint and its signals."""

from __future__ import annotations

import asyncio
import logging
import signal

from wincey.agent import sdnotify
from wincey.agent.identity import this_host
from wincey.agent.life import DaemonOptions, live
from wincey.agent.view import Views
from wincey.kernel.sysctl import bridge_netfilter_note
from wincey.model.errors import CannotListen
from wincey.observe.apilisten import serve_api
from wincey.observe.health import Health, serve_health
from wincey.observe.localapi import LocalApi

log = logging.getLogger(__name__)


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
    views = Views(this_host().name)
    servers = [
        await serve_health(health, host, port, status=views.status, flags=flags)
        for host, port, flags in (
            (options.healthz_ip, options.healthz_port, "--healthz-ip and --healthz-port"),
            (*options.metrics_listen, "--metrics-listen"),
        )
        if port > 0
    ]
    api = LocalApi(views)
    if options.api_listen:
        servers.append(await serve_api(api, options.api_listen))
    if options.api_socket:
        try:
            await api.listen(options.api_socket, options.api_group)
        except CannotListen as error:
            # What can't be seen can still work: a network is not refused for that, unless it was asked for by name.
            if options.api_group:
                raise
            log.warning("%s; going on without wincey status", error)
    life = asyncio.create_task(_live(options, health, views))
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
        await api.close()
        for server in servers:
            await server.close()
    if isinstance(results[0], Exception):
        raise results[0]


async def _live(options: DaemonOptions, health: Health, views: Views) -> None:
    def tell(reason: str | None) -> None:
        if reason is None:
            health.set_ready()
            sdnotify.notify("READY=1")
        else:
            health.set_not_ready(reason)

    if note := bridge_netfilter_note():
        log.warning("%s", note)
    if options.several:
        from wincey.agent.networks import Networks  # noqa: PLC0415  # one network does without it

        await Networks(options, options.several, tell, views).run()
    else:
        await live(options, tell, views)
