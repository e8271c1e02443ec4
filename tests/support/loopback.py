"""A server on this machine's loopback, reached from hosts of a lab at the same address: 127.0.0.1 on their own loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterable, Iterator

from wincey.lab.namespace import call_in


@contextlib.contextmanager
def reachable(hosts: Iterable, ports: Iterable[int]) -> Iterator[None]:
    """While this is open, connections to these ports on the hosts' loopback are passed on to ours."""
    ports = list(ports)
    with contextlib.ExitStack() as stack:
        for host in hosts:
            for port in ports:
                # A socket stays in the namespace that it was made in; the outgoing ones below are made in ours.
                listener = call_in(host.netns, lambda port=port: socket.create_server(("127.0.0.1", port)))
                stack.callback(_close, listener)
                threading.Thread(target=_serve, args=(listener, port), daemon=True).start()
        yield


def _serve(listener: socket.socket, port: int) -> None:
    while True:
        try:
            near, _ = listener.accept()
        except OSError:
            return
        try:
            far = socket.create_connection(("127.0.0.1", port), timeout=5)
        except OSError:
            near.close()
            continue
        far.settimeout(None)
        for source, target in ((near, far), (far, near)):
            threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for each in (source, target):  # one direction's end is the connection's
        _close(each)


def _close(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)  # wakes whoever waits in it
    one.close()
