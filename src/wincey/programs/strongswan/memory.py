"""What a later run has to know of a running charon and can't ask it: `charon.json`, readable by root alone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

import msgspec

from wincey.model.errors import UNREADABLE

NAME = "charon.json"


class Memory(msgspec.Struct, frozen=True):
    """esp: how it was started. terms: fingerprint of those that its connections were loaded with. No secrets."""

    esp: Literal["kernel", "user", ""] = ""
    terms: str = ""


def recall(directory: Path) -> Memory:
    """What was written last; an empty memory when there is none, or none that can be read."""
    with contextlib.suppress(OSError, *UNREADABLE):
        return msgspec.json.decode((directory / NAME).read_bytes(), type=Memory)
    return Memory()


def remember(directory: Path, memory: Memory) -> None:
    """Write it. A failure costs that connections are loaded anew at the next start."""
    with contextlib.suppress(OSError):
        temporary = directory / f".{NAME}"
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(memory))
        os.replace(temporary, directory / NAME)


def forget(directory: Path) -> None:
    """Remove it."""
    with contextlib.suppress(OSError):
        (directory / NAME).unlink(missing_ok=True)
