"""The connection to the database: a monitor that keeps a replica, and transactions, over one UNIX socket (RFC 7047)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from wincey.model.errors import UNREADABLE
from wincey.programs.openvswitch.edits import SERIAL, Operation
from wincey.programs.openvswitch.host import OvsError, database_socket, unreachable
from wincey.programs.openvswitch.jsonrpc import Splitter
from wincey.programs.openvswitch.replica import COLUMNS, Replica

DATABASE = "Open_vSwitch"
DEADLINE = 10.0
"""Seconds for an answer, and for ovs-vswitchd to do what the database asks for."""

_NOT_OVSDB = (LookupError, TypeError, ValueError, AttributeError)
"""What reading a message raises that is JSON and none of the protocol's."""


class Database:
    """One connection. changed: called when the replica has changed, and when the connection has ended."""

    def __init__(self, owner: str, changed: Callable[[], None]) -> None:
        self.replica = Replica(owner)
        self._changed = changed
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._news = asyncio.Event()

    @property
    def alive(self) -> bool:
        """Whether the connection stands."""
        return self._reader is not None and not self._reader.done()

    async def connect(self) -> None:
        """Connect and read the monitored tables. Raises OvsError."""
        try:
            reader, self._writer = await asyncio.open_unix_connection(database_socket())
        except OSError as error:
            raise OvsError(unreachable(error.strerror or str(error))) from None
        self._reader = asyncio.create_task(self._read(reader), name="OVSDB")
        tables = {table: {"columns": list(columns)} for table, columns in COLUMNS.items()}
        answer = await self._call("monitor", [DATABASE, None, tables])
        try:
            self.replica.update(answer)
        except _NOT_OVSDB:
            raise OvsError(unreachable("what answers there is no OVSDB server")) from None

    async def transact(self, operations: Sequence[Operation]) -> None:
        """Commit operations and wait until ovs-vswitchd has followed. Raises OvsError."""
        results = await self._call("transact", [DATABASE, *operations, *SERIAL])
        for result in results:
            if result and "error" in result:
                raise OvsError(f"Open vSwitch's database refuses: {result.get('details') or result['error']}")
        rows = results[len(operations) + 1].get("rows")
        if not rows:
            raise OvsError("Open vSwitch's database is empty: initialise it with `ovs-vsctl --no-wait init`")
        await self._followed(rows[0]["next_cfg"])

    async def close(self) -> None:
        """End the connection, which nobody is told."""
        self._changed = lambda: None
        if self._reader:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._writer:
            self._writer.close()

    async def _followed(self, serial: int) -> None:
        try:
            async with asyncio.timeout(DEADLINE):
                while self.replica.root["cur_cfg"] < serial:
                    self._news.clear()
                    if not self.alive:
                        raise OvsError(unreachable("the connection ended"))
                    await self._news.wait()
        except TimeoutError:
            raise OvsError(
                f"ovs-vswitchd did not follow the database within {DEADLINE:g} s: is it running? Start Open vSwitch's service"
            ) from None

    async def _call(self, method: str, parameters: list[Any]) -> Any:
        if self._writer is None or not self.alive:
            raise OvsError(unreachable("the connection ended"))
        self._number += 1
        number, answer = self._number, asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._send({"method": method, "params": parameters, "id": number})
            async with asyncio.timeout(DEADLINE):
                return await answer
        except TimeoutError:
            raise OvsError(unreachable(f"no answer within {DEADLINE:g} s")) from None
        finally:
            del self._answers[number]

    def _send(self, message: dict[str, Any]) -> None:
        if self._writer:
            self._writer.write(msgspec.json.encode(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        splitter, why = Splitter(), "the connection ended"
        try:
            while data := await reader.read(1 << 16):
                for message in splitter.feed(data):
                    self._take(message)
        except (OSError, *UNREADABLE, *_NOT_OVSDB) as error:
            why = str(error)
        finally:
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(OvsError(unreachable(why)))
            self._news.set()
            asyncio.get_running_loop().call_soon(self._end)

    def _end(self) -> None:
        self._changed()  # what is to be called by then, not now: nobody if it was we who ended it

    def _take(self, message: dict[str, Any]) -> None:
        match message.get("method"):
            case "echo":  # the server's probe
                self._send({"result": message["params"], "error": None, "id": message["id"]})
            case "update":
                self.replica.update(message["params"][1])
                self._news.set()
                self._changed()
            case None:
                answer = self._answers.get(message["id"])
                if answer and not answer.done():
                    if error := message.get("error"):
                        answer.set_exception(OvsError(f"Open vSwitch's database refuses: {error}"))
                    else:
                        answer.set_result(message["result"])
