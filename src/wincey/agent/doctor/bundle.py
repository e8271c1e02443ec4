"""The archive for a bug report: what doctor found, what the daemon says, what programs print; without secrets.

Secrets are taken out twice: whatever the daemon's flags and the config hold as one, wherever it turns up, and whatever looks
like one.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterable, Mapping

HIDDEN = "<removed>"

_COMMANDS = {
    "ip-link": ["ip", "-d", "-s", "link"],
    "ip-address": ["ip", "address"],
    "ip-route": ["ip", "route", "show", "table", "all"],
    "ip-rule": ["ip", "rule"],
    "ip-neighbor": ["ip", "neighbor"],
    "bridge-fdb": ["bridge", "fdb"],
    "nft": ["nft", "-a", "list", "ruleset"],
    "iptables-legacy": ["iptables-legacy-save"],
    "iptables-nft": ["iptables-nft-save"],
    "sysctl-net": ["sysctl", "-e", "net.ipv4.ip_forward", "net.ipv4.conf", "net.ipv6.conf.all", "net.bridge"],
    "uname": ["uname", "-a"],
    "journal": ["journalctl", "-u", "flanneld", "-n", "300", "--no-pager"],
}

_WORD = r"[\w.-]*(?:passw(?:or)?d|passwd|secret|token|psk|pre-?shared-?key|private-?key)[\w.-]*"
_NAME = re.compile(_WORD, re.IGNORECASE)
_PATTERNS = (
    (re.compile(r"-----BEGIN [^-]*PRIVATE KEY-----.*?(?:-----END [^-]*-----|\Z)", re.DOTALL), HIDDEN),
    (re.compile(rf"((?:\b|-){_WORD}[\"']?\s*[:=]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;]+)", re.IGNORECASE), rf"\g<1>{HIDDEN}"),
    (re.compile(rf"(--?{_WORD}\s+)([^\s-]\S*)", re.IGNORECASE), rf"\g<1>{HIDDEN}"),
    (re.compile(r"(://[^/\s:@]*:)[^/\s@]+@"), rf"\g<1>{HIDDEN}@"),
    (re.compile(r"(\b(?:Bearer|Basic)\s+)[\w.~+/=-]+", re.IGNORECASE), rf"\g<1>{HIDDEN}"),
    # A key as WireGuard writes them: 32 bytes. A public one is no loss to the report.
    (re.compile(r"(?<![\w+/])[A-Za-z0-9+/]{43}=(?![\w+/=])"), HIDDEN),
)


def without_secrets(text: str, known: Iterable[str] = ()) -> str:
    """The text with all that is, or looks like, a secret replaced. known: secrets by their value."""
    for secret in sorted(filter(None, known), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def config_secrets(raw: bytes) -> list[str]:
    """What a network config holds under names of secrets, however deep."""
    try:
        document = json.loads(raw or b"{}")
    except ValueError:
        return []
    found: list[str] = []

    def walk(value: object, secret: bool) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, secret or bool(_NAME.fullmatch(name)))
        elif isinstance(value, list):
            for inner in value:
                walk(inner, secret)
        elif secret and isinstance(value, str):
            found.append(value)

    walk(document, False)
    return found


def write_bundle(path: str, texts: Mapping[str, str], known: Iterable[str] = ()) -> None:
    """A tar.gz of `texts` by name and of what the programs print, readable by its owner alone; raises OSError."""
    secrets = list(known)
    printed = {f"{name}.txt": _print(argv) for name, argv in _COMMANDS.items() if shutil.which(argv[0])}
    with open(path, "xb", opener=_private) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, text in {**texts, **printed}.items():
            data = without_secrets(text, secrets).encode()
            member = tarfile.TarInfo(f"wincey-doctor/{name}")
            member.size, member.mtime, member.mode = len(data), int(time.time()), 0o600
            archive.addfile(member, io.BytesIO(data))


def _private(path: str, flags: int) -> int:

    return os.open(path, flags, 0o600)


def _print(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=15, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{' '.join(argv)}: {error}\n"
    return done.stdout + done.stderr
