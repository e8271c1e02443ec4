"""The process: the plugin's socket, the state that it begins with, and what is done from time to time."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal

import msgspec

from wincey.docker.blocks import Blocks
from wincey.docker.driver import Driver
from wincey.docker.errors import Refused
from wincey.docker.fabric import Fabrics
from wincey.docker.protocol import CONTENT_TYPE
from wincey.docker.state import StateFile
from wincey.http.server import HttpServer, Request, Response
from wincey.model.errors import CannotListen, WinceyError
from wincey.store.kv import KeyValueStore
from wincey.store.open import StoreOptions, open_store

log = logging.getLogger(__name__)

_KEEP_EVERY = 15.0  # seconds


class PluginOptions(msgspec.Struct, frozen=True):
    """Everything that the process needs to know; the names are the command line's."""

    store: StoreOptions
    prefix: str
    socket: str
    state: str
    subnet_file: str
    networks: str


async def serve(options: PluginOptions) -> None:
    """Run until SIGINT or SIGTERM; raises WinceyError. Containers keep their networks when the process ends."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    file = StateFile(options.state)
    file.save()  # from now on the store may know this engine, by the identifier in it

    async def opened() -> KeyValueStore:
        return await open_store(options.store, options.prefix)

    rng = random.Random()  # noqa: S311  # the choice of a block is no secret
    blocks = Blocks(file.contents.engine, options.prefix, opened, rng)
    driver = Driver(file, Fabrics(options.subnet_file, options.networks), blocks)
    server = HttpServer(lambda request: _handle(driver, request))
    keeper = asyncio.create_task(_keep(driver))
    try:
        await _listen(server, options.socket)
        log.info("wincey is ready for Docker at %s", options.socket)
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({keeper, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if keeper.done():
            keeper.result()
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        await server.close()
        await blocks.close()


async def _listen(server: HttpServer, path: str) -> None:
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        await server.listen_unix(path)
    except OSError as error:
        raise CannotListen(f"--socket {path}: {error.strerror or error}") from None


async def _handle(driver: Driver, request: Request) -> Response:
    method = request.path.removeprefix("/")
    if request.method != "POST":
        return Response(405, b"this is a plugin of Docker's: it takes POST\n")
    try:
        answer = await driver.call(method, request.body)
    except WinceyError as error:
        level = logging.WARNING if isinstance(error, Refused) else logging.ERROR
        log.log(level, "%s refused: %s", method, error)
        answer = {"Err": str(error), "Error": str(error)}  # the network driver's word for it, and the IPAM driver's
    else:
        log.debug("%s %s: %s", method, request.body, answer)
    return Response(200, msgspec.json.encode(answer), CONTENT_TYPE)


async def _keep(driver: Driver) -> None:
    """Restore what was before, then look after it. A first look needs flanneld, which may start later than we do."""
    restored, told = False, ""
    while True:
        try:
            if not restored:
                await driver.restore()
                restored = True
            await driver.keep()
            told = ""
        except (WinceyError, OSError) as error:
            if str(error) != told:
                told = str(error)
                log.warning("%s; trying on", error)
        await asyncio.sleep(_KEEP_EVERY if restored else 1.0)
