"""A network namespace with an underlay, and a program of the benchmarks run inside it.

The program runs itself again in the namespace (`--inner`), so that one process stays outside that cleans up whatever happens.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

UNDERLAY = (
    "link set lo up",
    "link add eth0 type veth peer name wire",
    "link set wire up",
    "link set eth0 up",
    "addr add 172.16.0.1/12 dev eth0",
)


def run(*argv: str, stdin: str | None = None) -> str:
    """Run a program that must succeed; what it prints."""
    done = subprocess.run(argv, check=True, input=stdin, text=True, timeout=300, stdout=subprocess.PIPE)
    return done.stdout


def needs(program: str) -> None:
    """End with a clear line where root or etcd is missing."""
    if os.geteuid() != 0 or not shutil.which("etcd"):
        raise SystemExit(f"{program} needs root (network namespaces) and etcd (package etcd-server)")


@contextmanager
def namespace() -> Iterator[str]:
    """The name of a new namespace with an underlay; it goes with the block."""
    name = f"wincey-bench-{os.getpid()}-{secrets.token_hex(2)}"
    run("ip", "netns", "add", name)
    try:
        for command in UNDERLAY:
            run("ip", "-n", name, *command.split())
        yield name
    finally:
        run("ip", "netns", "del", name)


def inside(script: str, arguments: Sequence[str], timeout: float) -> str:
    """Run a script with `--inner ARGUMENTS` in a namespace of its own: its standard output. Its errors go to ours.

    timeout: seconds after which it is ended. Told to end ourselves (see `end`), we end it first.
    """
    with namespace() as name:
        argv = ["ip", "netns", "exec", name, sys.executable, script, "--inner", *arguments]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
        if process.returncode:
            raise SystemExit(process.returncode)
        return output


def end(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM as an exception, so that everything is cleaned up."""
    raise SystemExit(143)
