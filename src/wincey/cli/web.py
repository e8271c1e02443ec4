"""`wincey web`: the page that shows the network."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from wincey.cli.config import options_of_store, store_options
from wincey.cli.localapi import USUAL, NoDaemon
from wincey.model.errors import UsageError
from wincey.model.serveraddress import Where, parse_listen
from wincey.model.socketpath import SOCKET_VARIABLE
from wincey.observe.apilisten import Token, is_loopback
from wincey.store.endpoints import tls_context
from wincey.store.open import open_store
from wincey.store.servers import read_token
from wincey.web.gather import Api, DaemonLeases, Gatherer, Leases, StoreLeases
from wincey.web.server import Page


def _where(ctx: click.Context, param: click.Parameter, value: str) -> Where:
    try:
        where = parse_listen(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if where.fd is not None:
        raise click.BadParameter("must be HOST:PORT, like 127.0.0.1:8470")
    return where


def _store_is_optional(command: Any) -> Any:
    for parameter in command.params:
        if parameter.name == "store":
            parameter.required = False
    return command


@_store_is_optional
@click.command("web")
@click.option(
    "--listen", default="127.0.0.1:8470", show_default=True, callback=_where, help="Where browsers find the page."
)
@click.option("--page-token-file", default="", help="What browsers have to show. Needed off loopback.")
@click.option("--page-certfile", default="", help="The page's TLS certificate.")
@click.option("--page-keyfile", default="", help="The page's TLS key.")
@click.option("--token-file", default="", help="The token of the hosts, as their --api-token-file.")
@click.option("--cafile", default="", help="The certificate authority of the hosts' --api-certfile.")
@click.option(
    "--api-port",
    type=click.IntRange(1, 65535),
    default=8471,
    show_default=True,
    help="The port of the hosts' --api-listen.",
)
@click.option(
    "--socket",
    envvar=SOCKET_VARIABLE,
    metavar="PATH",
    help=f"The socket of this host's daemon; otherwise ${SOCKET_VARIABLE}, else {' or '.join(USUAL)}.",
)
@click.option("--network", metavar="NAME", help="Which network, where hosts are in several.")
@store_options
def web(
    *,
    listen: Where,
    page_token_file: str,
    page_certfile: str,
    page_keyfile: str,
    token_file: str,
    cafile: str,
    api_port: int,
    socket: str | None,
    network: str | None,
    **store: Any,
) -> None:
    """Show the network in a browser: its hosts, who reaches whom and how well, and the containers behind them.

    Who there is comes from this host's daemon, or with --store from the store. With --token-file each host is asked by
    its own --api-listen; without it only this host's view is shown.

    \b
    Examples:
      wincey web
      wincey web --token-file /etc/wincey/api.token --cafile /etc/wincey/ca.crt
      wincey web --store http://10.0.0.1:2379 --token-file api.token --cafile ca.crt
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    if not page_token_file and not is_loopback(listen.host):
        raise UsageError(
            f"--listen={listen.host}:{listen.port} needs --page-token-file: whoever reaches it would see the whole network"
        )
    page_token = Token(page_token_file, "--page-token-file") if page_token_file else None
    page_tls = None
    if page_certfile or page_keyfile:
        page_tls = tls_context(page_keyfile, page_certfile, server=True, flags="--page")
    elif not is_loopback(listen.host):
        click.echo(
            "wincey: the page and its token are sent in the clear: give --page-certfile and --page-keyfile", err=True
        )
    path = socket or next((usual for usual in USUAL if Path(usual).exists()), None)
    if path is None and not store["store"]:
        raise NoDaemon(
            f"no daemon is found: there is neither {' nor '.join(USUAL)}; start flanneld, name its socket with --socket,"
            " or the store with --store"
        )

    url = f"unix://{Path(path).absolute()}" if path else ""

    async def work() -> None:
        local = Api(url) if url else None
        gatherer = Gatherer(
            await _leases(store, local, network, path), _asking(token_file, cafile, api_port), local, network=network
        )
        page = Page(gatherer, page_token)
        try:
            port = await page.listen(listen.host, listen.port, page_tls)
            host = f"[{listen.host}]" if ":" in listen.host else listen.host or "0.0.0.0"
            click.echo(f"the page is at {'https' if page_tls else 'http'}://{host}:{port}/  (Ctrl-C ends it)")
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await stop.wait()
        finally:
            await page.close()
            await gatherer.close()

    asyncio.run(work())


async def _leases(store: dict[str, Any], local: Api | None, network: str | None, path: str | None) -> Leases:
    if store["store"]:
        prefix = store["etcd_prefix"].rstrip("/") + (f"/{network}" if network else "")
        return StoreLeases(await open_store(options_of_store(store), prefix), prefix)
    assert local is not None
    assert path is not None
    return DaemonLeases(local, network, path)


def _asking(token_file: str, cafile: str, port: int) -> Callable[[str], Api] | None:
    """How hosts are asked, None where they can't be."""
    if not token_file:
        return None
    token = read_token(token_file, "--token-file")
    tls = tls_context(cafile=cafile, flags="-")

    def api_of(address: str) -> Api:
        return Api(f"https://[{address}]:{port}" if ":" in address else f"https://{address}:{port}", tls, token)

    return api_of
