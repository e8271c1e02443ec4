"""Who may ask for which network: bearer tokens and client certificates (the file of --remote-token-file).

A line is `TOKEN NETWORK[,NETWORK...]` or `cert:COMMON-NAME NETWORK[,NETWORK...]`; `*` is every network and `_` the one
without a name; `#` begins a comment. The file is read again when it changed, so a token can be taken back at any time.

Without a file, whoever the TLS layer lets in may ask for everything, as with flannel.
"""

from __future__ import annotations

import hashlib
import logging
import os

import msgspec

from wincey.model.errors import BadOption

log = logging.getLogger(__name__)

_SHORTEST = 16
_BEARER = "bearer "


class Grant(msgspec.Struct, frozen=True):
    """What somebody may do. who: for the log, never the token."""

    who: str
    networks: frozenset[str]

    def allows(self, network: str) -> bool:
        """Whether it holds for a network (`_`: the unnamed one)."""
        return "*" in self.networks or network in self.networks


EVERYTHING = Grant("anybody", frozenset("*"))


def read_grants(path: str) -> dict[str, Grant]:
    """A token file: its grants by `cert:NAME` or by a token's digest. Raises BadOption with file and line, never a token."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadOption(f"--remote-token-file {path}: {getattr(error, 'strerror', None) or error}") from None
    grants: dict[str, Grant] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"--remote-token-file {path}, line {number}"
        if len(words) != 2:
            raise BadOption(f"{where}: it is not of the form TOKEN NETWORK[,NETWORK...], with * for every network")
        if words[0].startswith("cert:"):
            key = who = words[0]
        elif len(words[0]) < _SHORTEST:
            raise BadOption(f"{where}: a token has at least {_SHORTEST} characters; make one with openssl rand -hex 16")
        else:
            key, who = _digest(words[0]), f"the token of line {number}"
        if key in grants:
            raise BadOption(f"{where}: there was a line for the same client before")
        grants[key] = Grant(who, frozenset(filter(None, words[1].split(","))))
    if not grants:
        raise BadOption(f"--remote-token-file {path}: it has no line TOKEN NETWORK[,NETWORK...]")
    return grants


class Access:
    """Judges requests. path: the token file, "" for none; raises BadOption when it can't be used."""

    def __init__(self, path: str = "") -> None:
        self._path = path
        self._seen = _identity(path)
        self._grants = read_grants(path) if path else {}

    def judge(self, authorization: str, certificate: str | None) -> Grant | None:
        """What a client may do, None when it is nobody we know. certificate: the common name that TLS verified."""
        if not self._path:
            return EVERYTHING
        self._refresh()
        if authorization[: len(_BEARER)].lower() == _BEARER:
            # Found by its digest: how long that takes tells nothing about the tokens there are.
            return self._grants.get(_digest(authorization[len(_BEARER) :].strip()))
        if certificate:
            return self._grants.get(f"cert:{certificate}")
        return None

    def _refresh(self) -> None:
        identity = _identity(self._path)
        if identity == self._seen:
            return
        self._seen = identity
        try:
            self._grants = read_grants(self._path)
        except BadOption as error:
            log.error("%s; going on with what it said before", error)
        else:
            log.info("--remote-token-file %s was read again: %d lines", self._path, len(self._grants))


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _identity(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path) if path else None
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size) if found else None
