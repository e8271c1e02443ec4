"""Runs nft and iptables: a list of arguments, a text in, what it said back, and never longer than the deadline."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping
from typing import NamedTuple

from wincey.model.errors import KernelError

DEADLINE = 10.0
"""Seconds a program may take; the longest wait for another program's xtables lock (5 s) fits in."""


SBIN = ":/usr/sbin:/sbin"
"""What is added to PATH: services are often started without the directories that nft and iptables are in."""


def search_path(environ: Mapping[str, str] = os.environ) -> str:
    """Where programs are looked for: PATH, and SBIN."""
    return environ.get("PATH", os.defpath) + SBIN


def environment() -> dict[str, str]:
    """Ours, for a program whose words we read: in English, and with the whole search path."""
    return {**os.environ, "LC_ALL": "C", "PATH": search_path()}


def find(program: str) -> str | None:
    """Where a program is, None if it is not installed."""
    return shutil.which(program, path=search_path())


class ProgramFailed(KernelError):
    """A program is missing, takes too long or ended with an error; the text has its name and its own first words."""


class Output(NamedTuple):
    """What a program left behind when it ended."""

    code: int
    out: str
    err: str


async def run(*command: str, text: str = "") -> Output:
    """Run a program to its end with `text` as standard input; raises ProgramFailed if it can't start or hangs."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(),
        )
    except FileNotFoundError:
        raise ProgramFailed(f"{command[0]} is not installed") from None
    except OSError as error:
        raise ProgramFailed(f"{command[0]} can't be started: {error.strerror}") from None
    try:
        async with asyncio.timeout(DEADLINE):
            out, err = await process.communicate(text.encode())
    except TimeoutError:
        raise ProgramFailed(f"{command[0]} did not end within {DEADLINE:g} s") from None
    finally:
        if process.returncode is None:  # too slow, or we were cancelled
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Output(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))


async def must(*command: str, text: str = "") -> str:
    """Run a program that has to succeed and return its output; raises ProgramFailed with its first words."""
    result = await run(*command, text=text)
    if result.code:
        raise ProgramFailed(f"{command[0]}: {complaint(result)}")
    return result.out


def complaint(result: Output) -> str:
    """The first line of an error that says something, and what to do where we know it."""
    lines = [line.strip() for line in result.err.splitlines() if line.strip() and not line.startswith("#")]
    said = lines[0] if lines else f"exit code {result.code}"
    if "Operation not permitted" in result.err or "Permission denied" in result.err:
        return f"{said.removesuffix('(you must be root)').rstrip()} (needs root or CAP_NET_ADMIN)"
    return said
