"""Starts and ends routing daemons, which put themselves into the background, and finds who is in their way."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Iterable
from pathlib import Path

from wincey.kernel.program import find, search_path
from wincey.model.address import Address, family_of, format_address
from wincey.model.errors import WinceyError

FRR_PLACES = ("/usr/lib/frr", "/usr/libexec/frr", "/usr/lib64/frr", "/usr/local/sbin", "/usr/sbin")
_OTHER_USERS = (0, 1, 5, 6, 7)  # CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_KILL, CAP_SETGID, CAP_SETUID
_START = 15.0  # seconds
_STOP = 10.0
_POLL = 0.05


class LaunchError(WinceyError):
    """A routing daemon can't be started or ended; says which and why."""


def find_bird() -> str | None:
    """The path of BIRD, None where it is not installed."""
    return find("bird")


def find_frr(program: str) -> str | None:
    """The path of one of FRR's daemons, which are in nobody's PATH; None where it is not installed."""
    return next((path for place in FRR_PLACES if os.access(path := f"{place}/{program}", os.X_OK)), None)


def may_change_user() -> bool:
    """Whether we have the capabilities for files and processes of another user: a sandboxed service lacks them."""
    status = Path("/proc/self/status").read_text()
    effective = next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)
    return all(effective >> capability & 1 for capability in _OTHER_USERS)


async def launch(*command: str) -> None:
    """Run a program that goes on in the background; raises LaunchError with its own words when it does not."""
    # It lives long and needs none of what our environment holds, a password of the store perhaps.
    environment = {"LC_ALL": "C", "PATH": search_path()}
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


async def end(pidfile: Path, mark: str, *, by: signal.Signals = signal.SIGTERM) -> None:
    """End the daemon that a pid file names, if its command line has `mark` in it; raises LaunchError."""
    pid = running(pidfile, mark)
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, by)
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


def refused(addresses: Iterable[Address], port: int) -> tuple[Address, int] | None:
    """The first of our addresses at whose TCP port nobody of ours can listen, and the errno: EADDRINUSE or EACCES."""
    for address in addresses:
        with socket.socket(family_of(address), socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((format_address(address), port))
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    return address, error.errno
    return None


def rival(program: str, mark: str) -> int | None:
    """The pid of a program of this name in this network namespace whose command line has no `mark` in it."""
    here = os.stat("/proc/thread-self/ns/net").st_ino
    for process in [Path("/proc", name) for name in os.listdir("/proc") if name.isdigit()]:
        with contextlib.suppress(OSError):  # gone since
            if (process / "comm").read_text().strip() == program and (process / "ns/net").stat().st_ino == here:
                command = (process / "cmdline").read_bytes()
                if command and mark.encode() not in command:
                    return int(process.name)
    return None


def _last_words(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return f"; its log ends with: {lines[-1].strip()}" if lines else ""
