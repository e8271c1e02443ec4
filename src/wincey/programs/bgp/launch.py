"""Starts and ends routing daemons, which put themselves into the background, and finds who is in their way."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

from wincey.kernel.program import SBIN
from wincey.model.address import Address, family_of, format_address
from wincey.model.errors import WinceyError

FRR_PLACES = ("/usr/lib/frr", "/usr/libexec/frr", "/usr/lib64/frr", "/usr/local/sbin", "/usr/sbin")
_START = 15.0  # seconds
_STOP = 10.0
_POLL = 0.05
_UCRED = struct.Struct("=iII")


class LaunchError(WinceyError):
    """A routing daemon can't be started or ended; says which and why."""


def find_bird() -> str | None:
    """The path of BIRD, None where it is not installed."""
    return shutil.which("bird", path=os.environ.get("PATH", os.defpath) + SBIN)


def find_frr(program: str) -> str | None:
    """The path of one of FRR's daemons, which are in nobody's PATH; None where it is not installed."""
    return next((path for place in FRR_PLACES if os.access(path := f"{place}/{program}", os.X_OK)), None)


async def launch(*command: str) -> None:
    """Run a program that goes on in the background; raises LaunchError with its own words when it does not."""
    # It lives long and needs none of what our environment holds, a password of the store perhaps.
    environment = {"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath) + SBIN}
    name = os.path.basename(command[0])
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise LaunchError(f"{name} can't be started: {error.strerror}") from None
    try:
        async with asyncio.timeout(_START):
            _, words = await process.communicate()
    except TimeoutError:
        raise LaunchError(f"{name} did not start within {_START:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        said = [line.strip() for line in words.decode(errors="replace").splitlines() if line.strip()]
        raise LaunchError(f"{name} did not start: {said[-1] if said else f'exit code {process.returncode}'}")


async def appears(path: Path, program: str, log: Path) -> None:
    """Wait for a socket of a program that was started; raises LaunchError with the end of its log."""
    for _ in range(int(_START / _POLL)):
        if path.exists():  # noqa: ASYNC240  # a look at a tmpfs waits for nothing
            return
        await asyncio.sleep(_POLL)
    raise LaunchError(f"{program} did not open {path.name} within {_START:.0f} s{_last_words(log)}")


async def end(pidfile: Path, mark: str) -> None:
    """End the daemon that a pid file names, if its command line has `mark` in it; raises LaunchError."""
    pid = running(pidfile, mark)
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        for _ in range(int(_STOP / _POLL)):
            if running(pidfile, mark, pid) is None:
                return
            await asyncio.sleep(_POLL)
        os.kill(pid, signal.SIGKILL)
    for _ in range(int(_STOP / _POLL)):
        if running(pidfile, mark, pid) is None:
            return
        await asyncio.sleep(_POLL)
    raise LaunchError(f"process {pid} ({pidfile.stem}) does not end")


def running(pidfile: Path, mark: str, pid: int | None = None) -> int | None:
    """The pid of the daemon that a pid file names, or the one given, if it runs and is the one with `mark`; else None."""
    try:
        pid = pid or int(pidfile.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()  # of a zombie it is empty
    except (OSError, ValueError):
        return None
    return pid if mark.encode() in command else None


def taken(addresses: Iterable[Address], port: int) -> Address | None:
    """The first of our addresses at whose TCP port another program listens."""
    for address in addresses:
        with socket.socket(family_of(address), socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((format_address(address), port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return address
    return None


def lives_here(path: str) -> bool:
    """Whether a program of this network namespace listens at a Unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
            pid, _, _ = _UCRED.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
            return os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
        except OSError:
            return False


def _last_words(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return f"; its log ends with: {lines[-1].strip()}" if lines else ""
