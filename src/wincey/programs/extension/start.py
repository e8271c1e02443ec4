"""What runs before the lease: once for each run of the daemon, however often the config is considered.

What it printed is kept by the network's directory. The driver forgets it when all was shut down, as then a return to this
backend is a start.
"""

from __future__ import annotations

from pathlib import Path

from wincey.model.command import Command, CommandFailed, Environment
from wincey.model.errors import NotJoinable
from wincey.programs.extension.running import run

_said: dict[Path, tuple[Command, str]] = {}


async def start_up(command: Command, environment: Environment, directory: Path, timeout: float) -> str:
    """Run PreStartupCommand, unless it has run, and return what it printed; raises NotJoinable with what it said."""
    known = _said.get(directory)
    if known is None or known[0] != command:
        try:
            output = await run("PreStartupCommand", command, environment, place(directory), timeout=timeout)
        except (CommandFailed, OSError) as error:
            raise NotJoinable(f"the extension backend can't start: {error}") from None
        known = _said[directory] = (command, output)
    return known[1]


def forget_start(directory: Path) -> None:
    """The next start begins anew."""
    _said.pop(directory, None)


def place(directory: Path) -> Path:
    """Where a network's commands run, made if absent, for root alone: they may leave keys there. Raises OSError."""
    made = directory / "extension"
    made.mkdir(mode=0o700, parents=True, exist_ok=True)
    return made
