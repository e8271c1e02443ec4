"""The private key of this host: flannel's file, in flannel's format (compatibility reference, section 6.5)."""

from __future__ import annotations

import logging
import os
import secrets
import stat
from base64 import b64decode, b64encode
from pathlib import Path

from wincey.kernel.wireguard.curve25519 import clamp
from wincey.model.errors import NotJoinable
from wincey.model.secret import Secret
from wincey.model.wireguard import KEY_SIZE

log = logging.getLogger(__name__)

DEFAULT = "/run/flannel/wgkey"


def key_path() -> Path:
    """The path, from the environment."""
    return Path(os.environ.get("WIREGUARD_KEY_FILE") or DEFAULT)


def read_key(path: Path) -> Secret[bytes]:
    """The private key in a file; raises NotJoinable with what is wrong about it, and never shows it."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(1024)
    except OSError as error:
        raise NotJoinable(f"the WireGuard key file {path} can't be read: {error.strerror}") from None
    try:
        key = b64decode(text.strip(), validate=True)
    except ValueError:
        key = b""
    if len(key) != KEY_SIZE:
        raise NotJoinable(
            f"the WireGuard key file {path} must hold one private key, 32 bytes in base64, as `wg genkey` makes it;"
            " delete it to get a new one"
        )
    if mode & 0o077:
        log.warning("the WireGuard key file %s is open to others (mode %04o): chmod 0400 it", path, mode)
    return Secret(clamp(key))


def read_or_make_key(path: Path) -> Secret[bytes]:
    """The private key in a file, which is made with a new key if it is not there: mode 0400, its directory 0755.

    Of several that make it at once one wins, and all get that one's key. Raises NotJoinable.
    """
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
            try:
                os.write(descriptor, b64encode(clamp(secrets.token_bytes(KEY_SIZE))))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
        except OSError as error:
            raise NotJoinable(
                f"the WireGuard key file {path} can't be made: {error.strerror}; set WIREGUARD_KEY_FILE to another place"
            ) from None
    return read_key(path)
