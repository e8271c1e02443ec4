"""A vici connection: one command at a time, and the events that were asked for. No command waits longer than its deadline."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from wincey.model.errors import WinceyError
from wincey.programs.strongswan import vici
from wincey.programs.strongswan.vici import Message, Value
from wincey.tunnel.control import connect

_ANSWER = 20.0  # seconds
_READ = 1 << 16
_SO_PEERCRED = struct.Struct("=iii")  # pid, uid, gid

Reply = tuple[int, str, dict[str, Value]]


class ViciError(WinceyError):
    """charon does not answer, or refuses a command; says which and why, and never what was sent."""


class Vici:
    """A connection to a charon. `ended` is called once when charon ends it (not after `close`), `event` with each event."""

    def __init__(
        self,
        sock: socket.socket,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        event: Callable[[str, Message], None],
        ended: Callable[[], None],
    ) -> None:
        self.pid: int = _SO_PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _SO_PEERCRED.size))[
            0
        ]
        """The process that listens: charon."""
        self._reader, self._writer = reader, writer
        self._event, self._on_end = event, ended
        self._lock = asyncio.Lock()
        self._answer: asyncio.Future[Reply] | None = None
        self._stream: tuple[str, list[Message]] = ("", [])
        self._task = asyncio.get_running_loop().create_task(self._read(), name="vici")

    @classmethod
    async def open(cls, path: Path, *, event: Callable[[str, Message], None], ended: Callable[[], None]) -> Vici | None:
        """Connect to the charon behind a socket, None when there is none. Raises ViciError."""
        try:
            sock = connect(str(path), blocking=False)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except OSError as error:
            raise ViciError(f"charon's control socket {path}: {error.strerror}") from None
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=_READ)
        return cls(sock, reader, writer, event=event, ended=ended)

    @property
    def alive(self) -> bool:
        """Whether charon has not ended the connection."""
        return not self._task.done()

    async def command(self, name: str, message: Message | None = None) -> Message:
        """Run a command; raises ViciError when charon says that it failed."""
        async with self._lock:
            return await self._command(name, message)

    async def stream(self, name: str, event: str, message: Message | None = None) -> list[Message]:
        """Run a command that answers by events, and return these."""
        async with self._lock:
            await self._ask(vici.REGISTER, event)
            self._stream = (event, [])
            try:
                await self._command(name, message)
                return self._stream[1]
            finally:
                self._stream = ("", [])
                if self.alive:
                    await self._ask(vici.UNREGISTER, event)

    async def listen(self, *events: str) -> None:
        """Have `event` called with these from now on."""
        async with self._lock:
            for event in events:
                await self._ask(vici.REGISTER, event)

    async def close(self) -> None:
        """Leave charon to itself."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._writer.close()

    async def _command(self, name: str, message: Message | None) -> Message:
        kind, _, reply = await self._ask(vici.REQUEST, name, message)
        if kind != vici.RESPONSE:
            raise ViciError(f"charon does not know the command {name}")
        if reply.get("success") == "no":
            raise ViciError(f"charon refused {name}: {reply.get('errmsg') or 'it said no more than that'}")
        return reply

    async def _ask(self, kind: int, name: str, message: Message | None = None) -> Reply:
        if not self.alive:
            raise ViciError("charon has ended")
        self._answer = asyncio.get_running_loop().create_future()
        self._writer.write(vici.packet(kind, name, message))
        try:
            async with asyncio.timeout(_ANSWER):
                return await self._answer
        except TimeoutError:
            # What it may answer later would be taken for the next answer.
            self._task.cancel()
            raise ViciError(f"charon did not answer {name} within {_ANSWER:.0f} s") from None
        finally:
            self._answer = None

    async def _read(self) -> None:
        buffer = bytearray()
        try:
            while data := await self._reader.read(_READ):
                buffer += data
                while reply := vici.take(buffer):
                    self._take(reply)
        except (OSError, ValueError):
            pass  # cut off, or no charon: an end all the same
        finally:
            if self._answer and not self._answer.done():
                self._answer.set_exception(ViciError("charon has ended"))
            self._writer.close()
        self._on_end()

    def _take(self, reply: Reply) -> None:
        kind, name, message = reply
        if kind != vici.EVENT:
            if self._answer and not self._answer.done():
                self._answer.set_result(reply)
        elif name == self._stream[0]:
            self._stream[1].append(message)
        else:
            self._event(name, message)
