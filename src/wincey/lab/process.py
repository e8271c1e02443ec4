"""A program that runs on in a namespace after the command that started it has ended.

A pid alone may be another program's by tomorrow: a process is known by its pid and its start time, both kept in a file, so
that the next command finds the same one or none.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from wincey.lab.namespace import enter_argv

_DROPPED = ("FLANNELD_", "ETCD_", "ETCDCTL_")
_PROXIES = {"http_proxy", "https_proxy", "all_proxy", "notify_socket"}


class Process:
    """A running or ended program, by pid and start time (clock ticks since boot)."""

    def __init__(self, pid: int, started: int, child: subprocess.Popen[bytes] | None = None) -> None:
        self.pid = pid
        self.started = started
        self._child = child  # only in the process that started it, which must also reap it

    @classmethod
    def spawn(
        cls, argv: Sequence[str], *, netns: str, log: Path, pidfile: Path, variables: Mapping[str, str] | None = None
    ) -> Process:
        """Start a program in a namespace and in a session of its own, its output appended to `log`.

        variables: join its environment.
        """
        with log.open("ab") as output:
            child = subprocess.Popen(
                enter_argv(netns, argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=clean_environment(os.environ) | dict(variables or {}),
                cwd="/",
            )
        process = cls(child.pid, _start_time(child.pid) or 0, child)
        pidfile.write_text(f"{process.pid} {process.started}\n")
        return process

    @classmethod
    def find(cls, pidfile: Path) -> Process | None:
        """The process that a pid file speaks of, None without one."""
        try:
            pid, started = pidfile.read_text().split()
        except (OSError, ValueError):
            return None
        return cls(int(pid), int(started))

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        if self._child and self._child.poll() is not None:
            return False
        return self.started != 0 and _start_time(self.pid) == self.started

    @property
    def exit_code(self) -> int | None:
        """How it ended (negative: the signal), None while it runs or when another process started it."""
        return self._child.poll() if self._child else None

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.alive:
            os.kill(self.pid, number)

    def reap(self) -> None:
        """Take note of the end of a child that has been killed, so that no zombie of it stays."""
        if self._child:
            self._child.wait(timeout=10)

    def stop(self, number: int = signal.SIGTERM, *, timeout: float = 5) -> bool:
        """Send a signal and wait until it ends; SIGKILL after `timeout` seconds. Whether the signal was enough."""
        self.send(number)
        enough = wait_for(lambda: not self.alive, timeout)
        if not enough:
            self.send(signal.SIGKILL)
            wait_for(lambda: not self.alive, timeout)
        if self._child:
            with suppress(subprocess.TimeoutExpired):
                # `alive` has seen the end of its first thread, or that it is a zombie; the others may take a moment more.
                self._child.wait(timeout)
        return enough


def wait_for(condition: Callable[[], bool], timeout: float) -> bool:
    """Whether a condition came true within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what would change a daemon behind the user's back: its own variables, proxies, sd_notify."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(_DROPPED) and name.lower() not in _PROXIES
    }


def tail(log: Path, lines: int = 8) -> list[str]:
    """The last lines of a log, none if there is none."""
    try:
        return log.read_text(errors="replace").splitlines()[-lines:] if lines else []
    except OSError:
        return []


def _start_time(pid: int) -> int | None:
    """The start time of a process that is alive; a zombie is not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The name in parentheses may hold blanks: the fields begin after the last one.
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in b"ZX" else int(fields[19])
