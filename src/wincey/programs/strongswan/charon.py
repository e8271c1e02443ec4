"""The process charon: where it is, its private configuration, its start and its end.

It is no child of the daemon's and outlives it, so that keys go on being renewed; the next daemon finds it by its control
socket. All of its files lie in the network's own directory, and it reads nothing of the system's strongSwan configuration.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

from wincey.model.errors import WinceyError
from wincey.programs.strongswan.client import Vici

log = logging.getLogger(__name__)

SOCKET, CONFIGURATION, LOG = "charon.vici", "charon.conf", "charon.log"
DIRECTORIES = ("/usr/lib/strongswan", "/usr/lib/ipsec", "/usr/libexec/strongswan", "/usr/libexec/ipsec")
"""Where distributions have charon, besides PATH."""

PACKAGES = "on Debian: apt-get install strongswan-charon libstrongswan-standard-plugins libstrongswan-extra-plugins"
USER_PACKAGE = "libcharon-extra-plugins"

_START = 30.0  # seconds; a tenth of one on an idle machine
_END = 10.0  # seconds for saying goodbye to the peers
_POLL = 0.05
_LOG_LIMIT = 16 << 20  # bytes
_SOCKET_PATH = 107  # bytes that a unix socket's path may have

_PLUGINS = (
    "random nonce openssl aes sha1 sha2 hmac kdf gmp curve25519 gcm ccm ctr cmac chapoly pem pkcs1 pkcs8 pubkey x509"
    " constraints vici"
)


class CharonError(WinceyError):
    """charon is not installed, does not start or does not end; says why and what to do."""


def find_charon() -> str:
    """The path of the program; raises CharonError."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *DIRECTORIES))
    found = shutil.which("charon", path=path)
    if not found:
        raise CharonError(f"the ipsec backend needs strongSwan's charon, which is not installed ({PACKAGES})")
    return found


def has_user_esp(charon: str) -> bool:
    """Whether the plugin for user-space ESP lies where this charon's plugins do."""
    places = {Path(charon).parent / "plugins", *(Path(each) / "plugins" for each in DIRECTORIES)}
    return any((place / "libstrongswan-kernel-libipsec.so").exists() for place in places)


def configuration(directory: Path, esp: str) -> str:
    """strongswan.conf for a charon of ours.

    Only the plugins that are needed, whatever the distribution turns on. Retries come faster than by default, as a peer may
    be away for a restart only. Routes are installed by user-space ESP alone, which needs them to get packets at all.
    """
    user = esp == "user"
    return f"""\
# Written by the Wincey daemon at each start of charon; changes are lost.
charon {{
  load_modular = no
  load = {_PLUGINS} {"kernel-libipsec " if user else ""}kernel-netlink socket-default
  install_routes = {"yes" if user else "no"}
  process_route = no
  retransmit_tries = 5
  retransmit_timeout = 2.0
  retransmit_base = 1.6
  retry_initiate_interval = 10
  plugins {{
    vici {{
      socket = unix://{directory / SOCKET}
    }}
  }}
  filelog {{
    wincey {{
      path = {directory / LOG}
      append = yes
      flush_line = yes
      time_format = %Y-%m-%d %H:%M:%S
      default = 0
      ike = 1
      cfg = 0
      dmn = 1
      net = 0
      lib = 0
    }}
  }}
}}
"""


async def start(directory: Path, esp: str) -> None:
    """Start charon; returns when it listens on its control socket. Raises CharonError."""
    charon = find_charon()
    path = directory / SOCKET
    if len(os.fsencode(path)) > _SOCKET_PATH:
        raise CharonError(f"charon's control socket {path} has too long a path: use a shorter --subnet-file")
    _check_ports()
    directory.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240  # at once
    path.unlink(missing_ok=True)
    shorten_log(directory)
    conf = directory / CONFIGURATION
    conf.unlink(missing_ok=True)
    with open(os.open(conf, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: ASYNC230  # a few lines
        file.write(configuration(directory, esp))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-P", "-m", "wincey.programs.strongswan.launcher", charon, str(conf), str(directory)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name.startswith(("PYTHON", "LD_", "PATH"))},
        start_new_session=True,
    )
    _, words = await process.communicate()
    if process.returncode:
        raise CharonError(f"charon did not start: {words.decode(errors='replace').strip().rpartition(chr(10))[2]}")
    await _listens(directory)


async def _listens(directory: Path) -> None:
    deadline = time.monotonic() + _START
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            if not sock.connect_ex(str(directory / SOCKET)):
                return
        await asyncio.sleep(_POLL)
    raise CharonError(f"charon did not start within {_START:.0f} s; its log is {directory / LOG}")


async def stop(directory: Path, connection: Vici) -> None:
    """End the charon behind a connection and remove its files; it says goodbye to its peers. Raises CharonError."""
    try:
        descriptor = os.pidfd_open(connection.pid)
    except ProcessLookupError:
        descriptor = -1
    try:
        # While the connection stands, the pid is charon's still.
        if descriptor >= 0 and connection.alive:
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            if not await _ended(descriptor, _END):
                log.warning("charon did not end within %.0f s and is killed", _END)
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                if not await _ended(descriptor, _END):
                    raise CharonError(f"charon (pid {connection.pid}) does not end")
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    remove_files(directory)


def remove_files(directory: Path) -> None:
    """Remove what an ended charon left."""
    for name in (SOCKET, CONFIGURATION, LOG):
        (directory / name).unlink(missing_ok=True)


def shorten_log(directory: Path) -> None:
    """Empty a log that has grown large; charon appends, and so goes on from the start."""
    path = directory / LOG
    if path.exists() and path.stat().st_size > _LOG_LIMIT:
        os.truncate(path, 0)


async def _ended(descriptor: int, patience: float) -> bool:
    """A descriptor of a process is readable when it has ended."""
    deadline = time.monotonic() + patience
    while not select.select([descriptor], [], [], 0)[0]:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL)
    return True


def _check_ports() -> None:
    """Fail early: charon goes on without ports that it can't have, and with ports that it shares, and works in neither case."""
    for port in (500, 4500):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.bind(("", port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise CharonError(
                        f"UDP port {port} is in use, perhaps by another IKE daemon: stop that one"
                        " (on Debian: systemctl disable --now strongswan-starter strongswan)"
                    ) from None
                raise CharonError(f"UDP port {port} can't be used: {error.strerror}") from None
