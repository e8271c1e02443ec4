"""Where a server listens: addresses, sockets that systemd passes, and the TLS in front of them."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Mapping

from wincey.http.server import HttpServer
from wincey.model.errors import CannotListen
from wincey.model.serveraddress import FIRST_PASSED, Where
from wincey.store.endpoints import tls_context


async def listen(server: HttpServer, where: Where, tls: ssl.SSLContext | None, environ: Mapping[str, str]) -> str:
    """Listen there; returns what to call it in the log. Raises CannotListen."""
    if where.fd is not None:
        sock = _passed(where.fd, environ)
        await server.listen_socket(sock, tls)
        return f"fd://{where.fd}"
    shown = f"[{where.host}]:{where.port}" if ":" in where.host else f"{where.host}:{where.port}"
    try:
        await server.listen_tcp(where.host, where.port, tls)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise CannotListen(f"--listen={shown}: {reason}; choose a free port and an address of this host") from None
    return shown


def server_tls(keyfile: str, certfile: str, cafile: str, *, tokens: bool) -> ssl.SSLContext | None:
    """The server's side of TLS, None without certificate and key. With a CA it demands certificates of clients; where there
    are `tokens`, a client may have one of them instead. Raises UsageError."""
    if not (keyfile or certfile):
        return None
    context = tls_context(keyfile, certfile, cafile, server=True, flags="--remote")
    if tokens and cafile:
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _passed(fd: int, environ: Mapping[str, str]) -> socket.socket:
    """A listening socket by sd_listen_fds(3)'s rules."""
    count = int(environ["LISTEN_FDS"]) if environ.get("LISTEN_FDS", "").isdigit() else 0
    if environ.get("LISTEN_PID") != str(os.getpid()) or not FIRST_PASSED <= fd < FIRST_PASSED + count:
        raise CannotListen(
            f"--listen=fd://{fd}: no such socket was passed to this process (LISTEN_FDS={count}); it takes a socket unit of"
            " systemd, or systemd-socket-activate"
        )
    try:
        sock = socket.socket(fileno=fd)
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or sock.type != socket.SOCK_STREAM:
            raise CannotListen(f"--listen=fd://{fd}: it is no listening stream socket; set ListenStream= in its unit")
    except OSError as error:
        raise CannotListen(f"--listen=fd://{fd}: {error.strerror}") from None
    sock.setblocking(False)
    os.set_inheritable(fd, False)
    return sock
