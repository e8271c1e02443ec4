"""The process: the life of one network or of several, its health endpoint and its signals."""

from __future__ import annotations

import asyncio
import logging
import signal

from wincey.agent import sdnotify
from wincey.agent.life import DaemonOptions, live
from wincey.kernel.sysctl import bridge_netfilter_note
from wincey.observe.health import Health, serve_health

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

        await Networks(options, options.several, tell).run()
    else:
        await live(options, tell)
