"""The daemons' control sockets, spoken directly: BIRD's (what birdc speaks) and FRR's vty (what vtysh speaks).

A connection stays open between requests: its end is how a daemon's death is noticed at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from wincey.model.errors import WinceyError

_ANSWER = 15.0  # seconds


class ControlError(WinceyError):
    """A routing daemon does not answer, or refuses what it is told; the text has its own words."""


class _Protocol(asyncio.StreamReaderProtocol):
    """A stream that tells its end at once, without anybody reading."""

    def __init__(self, reader: asyncio.StreamReader, ended: Callable[[], None]) -> None:
        super().__init__(reader)
        self._ended_callback = ended

    def eof_received(self) -> bool:
        super().eof_received()
        return False  # nothing can be asked of a daemon that listens no more

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._ended_callback()


class Control:
    """A connection to one socket."""

    def __init__(self, name: str) -> None:
        self.gone = False
        """Whether it can't be used any more."""
        self._name = name
        self._lock = asyncio.Lock()
        self._ended: Callable[[], None] = lambda: None
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def connect(self, path: Path, ended: Callable[[], None]) -> bool:
        """False when nobody listens. ended: called when the daemon ends, but not after `close`. Raises ControlError."""
        loop = asyncio.get_running_loop()
        self._ended = ended
        self._reader = asyncio.StreamReader(limit=1 << 24)
        protocol = _Protocol(self._reader, self._lost)
        try:
            async with asyncio.timeout(_ANSWER):
                transport, _ = await loop.create_unix_connection(lambda: protocol, str(path))
                self._writer = asyncio.StreamWriter(transport, protocol, self._reader, loop)
                await self._greet()
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except TimeoutError:
            raise ControlError(f"the control socket {path} does not answer") from None
        except OSError as error:
            raise ControlError(f"the control socket {path}: {error.strerror or error}") from None
        return True

    async def close(self) -> None:
        """Leave the daemon to itself."""
        self.gone = True
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _greet(self) -> None:
        raise NotImplementedError

    def _lost(self) -> None:
        if not self.gone:
            self.gone = True
            self._ended()

    def _fail(self, why: str) -> ControlError:
        return ControlError(f"{self._name} {why}")


class BirdControl(Control):
    """BIRD's control socket. A reply is lines of a code and a text, of which the last has a blank after its code."""

    def __init__(self) -> None:
        super().__init__("BIRD")

    async def _greet(self) -> None:
        await self._reply()

    async def ask(self, command: str) -> tuple[int, list[str]]:
        """The last code and the texts of the reply to a command; raises ControlError when there is none."""
        async with self._lock:
            self._writer.write(command.encode() + b"\n")
            return await self._reply()

    async def configure(self) -> None:
        """Have the configuration file read anew; raises ControlError with BIRD's complaint."""
        code, lines = await self.ask("configure")
        if code >= 8000:
            raise ControlError(f"BIRD refuses its configuration: {' '.join(lines)}")

    async def _reply(self) -> tuple[int, list[str]]:
        lines: list[str] = []
        try:
            async with asyncio.timeout(_ANSWER):
                while raw := await self._reader.readline():
                    text = raw.decode(errors="replace").rstrip("\n")
                    if text[:4].isdigit() and text[4:5] in ("-", " "):
                        lines.append(text[5:])
                        if text[4] == " ":
                            return int(text[:4]), lines
                    else:  # goes on as the line before; "+" marks a message that nobody asked for
                        lines.append(text[1:])
        except TimeoutError:
            raise self._fail(f"did not answer within {_ANSWER:.0f} s") from None
        except (OSError, ValueError) as error:
            raise self._fail(f"broke off: {error}") from None
        raise self._fail("has ended")


class VtyControl(Control):
    """FRR's vty socket: commands end with a NUL; a reply is a text, three NULs and a status, 0 for success."""

    async def _greet(self) -> None:
        await self._exchange("enable")

    async def ask(self, command: str) -> str:
        """The reply to a command; raises ControlError when it is refused."""
        async with self._lock:
            status, text = await self._exchange(command)
        if status:
            raise ControlError(f"{self._name} refuses a command: {_first(text) or f'status {status}'}")
        return text

    async def configure(self, lines: list[str]) -> None:
        """Enter configuration lines, each in the place where the ones before it led."""
        async with self._lock:
            refused = ""
            for line in ["configure terminal", *lines, "end"]:
                status, text = await self._exchange(line.strip())
                if status and line != "exit":
                    # Never the line itself: it may hold the password.
                    refused = refused or f"{' '.join(line.split()[:3])}: {_first(text) or f'status {status}'}"
        if refused:
            raise ControlError(f"{self._name} refuses its configuration at {refused}")

    async def _exchange(self, command: str) -> tuple[int, str]:
        try:
            self._writer.write(command.encode() + b"\0")
            async with asyncio.timeout(_ANSWER):
                text = await self._reader.readuntil(b"\0\0\0")
                status = await self._reader.readexactly(1)
        except TimeoutError:
            raise self._fail(f"did not answer within {_ANSWER:.0f} s") from None
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError) as error:
            raise self._fail(f"broke off: {error}") from None
        return status[0], text[:-3].decode(errors="replace")


def _first(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
