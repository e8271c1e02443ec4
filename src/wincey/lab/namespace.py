"""Network namespaces: make, enter, list who lives there, remove.

Programs enter with nsenter, which becomes the program: its pid is the program's, and /sys stays as it is (`ip netns exec`
mounts another one, without cgroups). Our own code enters in a thread of its own that ends with the call: a socket belongs to
the namespace it was made in, and works from any thread afterwards.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from wincey.lab.errors import LabError

T = TypeVar("T")

RUN_NETNS = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def ip_batch(lines: Iterable[str], netns: str | None = None, *, force: bool = False) -> None:
    """Run `ip` commands in one process, in `netns` if given. force: go on after a failing line, and tell nobody.

    Raises LabError with the failing line.
    """
    text = [*lines]
    argv = ["ip", *(["-netns", netns] if netns else []), *(["-force"] if force else []), "-batch", "-"]
    done = subprocess.run(argv, input="\n".join(text) + "\n", capture_output=True, text=True, timeout=120, check=False)
    if done.returncode and not force:
        # ip says `Command failed -:3` after its reason.
        reason, _, where = done.stderr.strip().rpartition("Command failed -:")
        line = text[int(where) - 1] if where.isdigit() and int(where) <= len(text) else "?"
        raise LabError(f"ip {line} (in {netns or 'the machine'}): {' '.join(reason.split()) or done.stderr.strip()}")


def enter_argv(netns: str, argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` in a namespace."""
    return ["nsenter", f"--net={RUN_NETNS / netns}", "--", *argv]


def call_in(netns: str, function: Callable[[], T]) -> T:
    """Call a function in a namespace. It must end by itself."""

    def entered() -> T:
        descriptor = os.open(RUN_NETNS / netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(descriptor, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns {netns}")
        finally:
            os.close(descriptor)
        return function()

    with ThreadPoolExecutor(1, thread_name_prefix=f"in-{netns}") as executor:
        return executor.submit(entered).result()


def set_sysctls(netns: str, settings: dict[str, str]) -> None:
    """Write sysctls (`net/ipv4/ip_forward`) of a namespace; /proc/sys/net shows the reading thread's own."""

    def write() -> None:
        for name, value in settings.items():
            Path("/proc/sys", name).write_text(value)

    call_in(netns, write)


def exists(netns: str) -> bool:
    """Whether a namespace of this name is there."""
    return (RUN_NETNS / netns).exists()


def remove(namespaces: Iterable[str], *, timeout: float = 10) -> None:
    """Remove namespaces that exist and end whatever still runs in them, ours or started by hand.

    The names go first, so that nothing can enter any more while we look. Raises LabError when a process will not end.
    """
    there = [name for name in namespaces if exists(name)]
    inodes = _inodes(there)
    ip_batch((f"netns del {name}" for name in there), force=True)
    deadline = time.monotonic() + timeout
    while pids := _inhabitants(inodes):
        if time.monotonic() > deadline:
            raise LabError(
                f"processes {sorted(pids)} did not end {timeout:.0f} s after SIGKILL: look at them with ps -fp"
            )
        for pid in pids:
            _kill(pid)
        time.sleep(0.01)


def inhabitants(namespaces: Iterable[str]) -> list[int]:
    """The processes whose network namespace is one of those named."""
    return _inhabitants(_inodes(namespaces))


def _inodes(namespaces: Iterable[str]) -> set[int]:
    return {(RUN_NETNS / name).stat().st_ino for name in namespaces}


def _inhabitants(inodes: set[int]) -> list[int]:
    """The processes whose network namespace is one of `inodes`; a zombie has none any more."""
    found = []
    with os.scandir("/proc") as entries:
        for entry in entries:
            if entry.name.isdigit():
                try:
                    inode = os.stat(f"/proc/{entry.name}/ns/net").st_ino
                except OSError:
                    continue  # gone since, or a zombie
                if inode in inodes:
                    found.append(int(entry.name))
    return found


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
