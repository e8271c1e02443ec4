"""The words of the CNI specification (1.1.0): versions, error codes, and what names may look like."""

from __future__ import annotations

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""The versions of a network config that we can read, oldest first."""

SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
"""The version that brought a command, where it was not the first."""

INCOMPATIBLE_VERSION = 1
BAD_ENVIRONMENT = 4
IO_FAILURE = 5
UNDECODABLE = 6
BAD_NETWORK_CONFIG = 7
BAD_NETNS = 8
NOT_AVAILABLE = 50
INTERNAL = 999

_ALPHANUMERIC = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_NAME = _ALPHANUMERIC | frozenset("_.-")
_LONGEST_INTERFACE = 15


class CniError(Exception):
    """An answer to the runtime: `{"code", "msg", "details"}` on standard output and exit code 1."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details


def check_version(version: str, command: str) -> None:
    """Raise CniError when a network config of this version can't be read, or knows no such command."""
    if version not in VERSIONS:
        supported = ", ".join(VERSIONS)
        raise CniError(
            INCOMPATIBLE_VERSION, "incompatible CNI versions", f"config is {version!r}, plugin supports {supported}"
        )
    if command in SINCE and VERSIONS.index(version) < VERSIONS.index(SINCE[command]):
        raise CniError(
            INCOMPATIBLE_VERSION,
            f"config version does not allow {command}",
            f"config is {version!r}, {command} needs {SINCE[command]!r}",
        )


def is_name(text: str) -> bool:
    """Whether a text can name a container or a network: letters, digits, `_`, `.` and `-`, the first a letter or digit."""
    return bool(text) and text[0] in _ALPHANUMERIC and _NAME.issuperset(text)


def check_interface(name: str) -> None:
    """Raise CniError for what can't be the name of a network interface."""
    if len(name) > _LONGEST_INTERFACE:
        raise CniError(
            BAD_ENVIRONMENT, "interface name is too long", "interface name should be less than 16 characters"
        )
    if name in {".", ".."}:
        raise CniError(BAD_ENVIRONMENT, "interface name is . or ..")
    if any(character in "/:" or character.isspace() for character in name):
        raise CniError(BAD_ENVIRONMENT, "interface name contains / or : or whitespace characters", f"it is {name!r}")
