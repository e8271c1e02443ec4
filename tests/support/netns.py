"""Network namespaces for tests: made, entered, and removed even when the test fails."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import json
import os
import secrets
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


def require_namespaces() -> None:
    """Skip where the kernel or our rights don't allow namespaces."""
    if os.geteuid() or not Path("/proc/self/ns/net").exists():
        pytest.skip("needs root and Linux")


class Netns:
    """A network namespace with a name of its own, `lo` up."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, command: str) -> str:
        """Run a command, split at blanks, inside; raises on failure. Returns its output."""
        argv = ["ip", "netns", "exec", self.name, *command.split()]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def ip(self, arguments: str) -> None:
        """`ip ARGUMENTS` inside."""
        self.run(f"ip {arguments}")

    def json(self, command: str) -> list[dict[str, Any]]:
        """Run `ip -j ...` or `bridge -j ...` inside and read what it prints; empty lists and objects removed."""
        return [entry for entry in json.loads(self.run(command) or "[]") if entry]

    def call(self, function: Callable[[], T]) -> T:
        """Call a function in a thread of its own inside the namespace."""
        results: list[T] = []
        errors: list[BaseException] = []

        def inside() -> None:
            try:
                enter(self.name)
                results.append(function())
            except BaseException as error:  # told to the caller below
                errors.append(error)

        thread = threading.Thread(target=inside)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def run_async(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine function in an event loop of its own inside the namespace."""

        async def main() -> T:
            return await function()

        return self.call(lambda: asyncio.run(main()))


def enter(name: str) -> None:
    """Move this thread into a namespace."""
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {name}")
    finally:
        os.close(descriptor)


@contextmanager
def netns() -> Iterator[Netns]:
    """Make a namespace and remove it at the end."""
    require_namespaces()
    name = f"wt-{os.getpid()}-{next(_numbers)}-{secrets.token_hex(2)}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=30)
    try:
        made = Netns(name)
        made.ip("link set lo up")
        yield made
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True, timeout=30)


@contextmanager
def joined(left_address: str = "10.99.0.1/24", right_address: str = "10.99.0.2/24") -> Iterator[tuple[Netns, Netns]]:
    """Two namespaces joined by a veth pair, each end named eth0, with an IPv6 address fd99::1 and fd99::2 too."""
    with netns() as left, netns() as right:
        left.ip(f"link add eth0 type veth peer name eth0 netns {right.name}")
        for end, address, v6 in ((left, left_address, "fd99::1/64"), (right, right_address, "fd99::2/64")):
            end.ip(f"address add {address} dev eth0")
            end.ip(f"address add {v6} dev eth0 nodad")
            end.ip("link set eth0 up")
        yield left, right
