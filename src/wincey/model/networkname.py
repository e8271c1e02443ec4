"""The names of networks, which become parts of store keys, of file names and of addresses of the HTTP API."""

from __future__ import annotations

import re

from wincey.model.errors import UsageError

UNNAMED = "_"
"""What stands for the network without a name, in addresses of the HTTP API and in permissions."""

RESERVED = frozenset({"config", "subnets", "wincey"})
"""Names that have a meaning of their own below a prefix."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def is_network_name(name: str) -> bool:
    """Whether a network can have this name."""
    return name not in RESERVED and _NAME.fullmatch(name) is not None


def check_network_name(name: str) -> str:
    """The name; raises UsageError for one that no network can have."""
    if not is_network_name(name):
        raise UsageError(
            f"{name!r} can't be a network's name: use up to 63 letters, digits, dots, _ and -, beginning with a letter or"
            f" a digit, and none of {', '.join(sorted(RESERVED))}"
        )
    return name
