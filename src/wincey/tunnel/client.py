"""The daemon's side of one keeper: start it, connect to it, ask it. No call here waits longer than its deadline."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from wincey.model.errors import WinceyError
from wincey.tunnel.control import BUSY, Header, connect, decode, encode

_START = 20.0  # seconds; a keeper starts in a tenth of one on an idle machine
_ANSWER = 10.0  # seconds
_APPEARS = 3.0  # seconds until the keeper that another daemon is starting listens; it holds the device already
_POLL = 0.05  # seconds between looks for it
_READ = 1 << 16


class TunnelError(WinceyError):
    """A udp tunnel can't be started, does not answer or refuses a change; says which and why."""


class KeeperConnection:
    """A connection to a keeper; the keeper's end is noticed at once, and `ended` called (not after `close`)."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ended: Callable[[KeeperConnection], None]
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._ended = ended
        self._waiting: deque[asyncio.Future[tuple[Header, bytes]]] = deque()
        self._task = asyncio.get_running_loop().create_task(self._read(), name="udp tunnel control")

    @classmethod
    async def open(cls, path: Path, ended: Callable[[KeeperConnection], None]) -> KeeperConnection | None:
        """Connect to the keeper behind a control socket; None when there is none."""
        try:
            sock = connect(str(path), blocking=False)
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except OSError as error:
            raise TunnelError(f"the control socket {path} of the udp tunnel: {error.strerror}") from None
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=_READ)
        return cls(reader, writer, ended)

    async def ask(self, header: Header, body: bytes = b"") -> tuple[Header, bytes]:
        """Send a request and return its reply; raises TunnelError."""
        answer: asyncio.Future[tuple[Header, bytes]] = asyncio.get_running_loop().create_future()
        if self._task.done():
            raise TunnelError("the udp tunnel has ended")
        self._waiting.append(answer)
        self._writer.write(encode(header, body))
        try:
            async with asyncio.timeout(_ANSWER):
                reply, content = await answer
        except TimeoutError:
            raise TunnelError(f"the udp tunnel did not answer {header['do']!r} within {_ANSWER:.0f} s") from None
        if "error" in reply:
            raise TunnelError(f"the udp tunnel refused {header['do']!r}: {reply['error']}")
        return reply, content

    async def close(self) -> None:
        """Leave the keeper to itself."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._writer.close()

    async def _read(self) -> None:
        buffer = bytearray()
        try:
            while data := await self._reader.read(_READ):
                buffer += data
                while frame := decode(buffer):
                    answer = self._waiting.popleft()
                    if not answer.done():
                        answer.set_result(frame)
        except (OSError, ValueError, IndexError):
            pass  # cut off, or no keeper of ours: an end all the same
        finally:
            for answer in self._waiting:
                if not answer.done():
                    answer.set_exception(TunnelError("the udp tunnel has ended"))
            self._waiting.clear()
        self._writer.close()
        self._ended(self)


async def launch(control: Path, *settings: object) -> None:
    """Start a keeper with `device, mtu, local, port`, or, without settings, one that takes over from the one running.

    Returns when it forwards and listens at `control`; raises TunnelError. If another daemon is starting one for the same
    device at this moment, it is waited for, and is as good as ours.
    """
    # The keeper lives long and needs no store password, so of the environment it gets what Python and the loader read.
    environment = {name: value for name, value in os.environ.items() if name.startswith(("PYTHON", "LD_"))}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-P", "-m", "wincey.tunnel", str(control), *map(str, settings)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(_START):
            _, words = await process.communicate()
    except TimeoutError:
        raise TunnelError(f"the udp tunnel did not start within {_START:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode == BUSY:
        await _appears(control, settings)
    elif process.returncode:
        reason = words.decode(errors="replace").strip().rpartition("\n")[2] or f"exit code {process.returncode}"
        raise TunnelError(f"the udp tunnel did not start: {reason}")


async def _appears(control: Path, settings: tuple[object, ...]) -> None:
    """Wait for the keeper of another daemon that was first."""
    for _ in range(int(_APPEARS / _POLL)):
        try:
            connect(str(control), blocking=False).close()
        except OSError:
            await asyncio.sleep(_POLL)
        else:
            return
    raise TunnelError(
        f"another program holds the device {settings[0] if settings else ''}, perhaps another flanneld: stop that one first"
    )
