"""Runs one command of the user's: its words, its environment, a text to read, a deadline.

What it prints is read while it runs, and only so far: a command may leave a program behind that keeps the pipe open, and is
not waited for. A command that is too slow, or is interrupted by the daemon's end, is killed with all that it has started.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from wincey.kernel.program import search_path
from wincey.model.command import VARIABLES, Command, CommandFailed, Environment

log = logging.getLogger(__name__)

_KEPT = 1 << 16  # bytes of a command's output; the rest is read and dropped
_SHOWN = 600  # characters of it in a line of the log
_NOT_THEIRS = {*VARIABLES, "FLANNELD_ETCD_PASSWORD", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"}


async def run(
    name: str,
    command: Command,
    environment: Environment,
    directory: Path,
    *,
    timeout: float,
    text: str = "",
    whom: str = "",
) -> str:
    """Run a command to its end and return its standard output; raises CommandFailed.

    name: its key in the config, for messages. directory: where it runs. timeout: seconds. text: a line for its standard
    input. whom: for whom it runs, told in the log.
    """
    everything = process_environment(os.environ, environment)
    try:
        argv = command.argv(everything)
    except CommandFailed as error:
        raise CommandFailed(f"{name} {error}") from None
    begin = time.monotonic()
    with _Pipe() as out, _Pipe() as err:
        code = await _execute(
            name, argv, environment=everything, directory=directory, text=text, timeout=timeout, out=out, err=err
        )
        printed = out.text()
        said = _one_line(printed, err.text())
    if code is None:
        raise CommandFailed(f"{name} did not end within {timeout:g} s and was killed{_quoted(said)}")
    if code:
        how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        raise CommandFailed(f"{name} ended with {how}{_quoted(said)}")
    log.info(
        "%s%s ended well after %.2f s%s", name, f" for {whom}" if whom else "", time.monotonic() - begin, _quoted(said)
    )
    return printed


def process_environment(inherited: Mapping[str, str], own: Environment) -> dict[str, str]:
    """The whole environment of a command: the daemon's, without its secrets, and the command's own."""
    kept = {name: value for name, value in inherited.items() if name not in _NOT_THEIRS}
    return {**kept, "PATH": search_path(kept), **dict(own)}


async def _execute(
    name: str,
    argv: list[str],
    *,
    environment: dict[str, str],
    directory: Path,
    text: str,
    timeout: float,
    out: _Pipe,
    err: _Pipe,
) -> int | None:
    """The exit code, negative for a signal, None when it took too long."""
    # A file in memory: a command that does not read its input blocks nobody.
    stdin = os.memfd_create("stdin")
    try:
        os.write(stdin, f"{text}\n".encode())
        os.lseek(stdin, 0, os.SEEK_SET)
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=stdin,
                stdout=out.end,
                stderr=err.end,
                env=environment,
                cwd=directory,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise CommandFailed(f"{name} can't be run: {argv[0]} is not installed") from None
        except OSError as error:
            raise CommandFailed(f"{name} can't be run: {argv[0]}: {error.strerror}") from None
    finally:
        os.close(stdin)
    out.close_end()
    err.close_end()
    try:
        async with asyncio.timeout(timeout):
            return await process.wait()
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


class _Pipe:
    """One stream of a command's output. `end` is the command's."""

    def __enter__(self) -> _Pipe:
        self._data = bytearray()
        self._descriptor, self.end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._descriptor, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._read)
        return self

    def __exit__(self, *_: object) -> None:
        self.close_end()
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)

    def close_end(self) -> None:
        """Close our copy of the command's end."""
        if self.end >= 0:
            os.close(self.end)
            self.end = -1

    def text(self) -> str:
        """What it has printed by now."""
        while self._read():
            pass
        return self._data.decode(errors="replace").strip()

    def _read(self) -> bool:
        try:
            piece = os.read(self._descriptor, _KEPT)
        except BlockingIOError:
            return False
        self._data += piece[: _KEPT - len(self._data)]
        if not piece:  # an end that stays readable for ever
            self._loop.remove_reader(self._descriptor)
        return bool(piece)


def _one_line(out: str, err: str) -> str:
    said = " | ".join(line.strip() for text in (out, err) for line in text.splitlines() if line.strip())
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}..."


def _quoted(said: str) -> str:
    return f", and said: {said}" if said else ""
