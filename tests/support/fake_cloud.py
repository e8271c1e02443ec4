"""What the fake clouds share: an HTTP server in threads, whose state tests look into, and faults on demand.

A fake listens on any number of sockets, made in whichever network namespace. Which instance a call comes from is known by
the listener it was made for, or else by the client's address, as a real metadata server knows it.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import parse_qsl, urlsplit


@dataclass
class Call:
    """One request. headers: lower-case names. instance: who asks, "" when unknown."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    peer: str
    instance: str

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def json_answer(status: int, document: Any, **headers: str) -> Answer:
    return Answer(status, json.dumps(document).encode(), {"Content-Type": "application/json", **headers})


class FakeCloud:
    """Base of the fakes; `answer` is theirs.

    actions: the API calls that were answered, by name, in order. faults: by action, answers to give instead of acting, one
    per call. after: called with the action's name when it was carried out and before it is answered.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.actions: list[str] = []
        self.faults: dict[str, list[Answer]] = {}
        self.after: Callable[[str], None] = lambda action: None
        self.addresses: dict[str, str] = {}
        self._servers: list[_Server] = []

    def __enter__(self) -> FakeCloud:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def answer(self, call: Call) -> Answer:
        raise NotImplementedError

    def fault(self, action: str) -> Answer | None:
        """The next fault prepared for an action."""
        waiting = self.faults.get(action)
        return waiting.pop(0) if waiting else None

    def listen(self, address: str = "127.0.0.1", port: int = 0, instance: str = "") -> str:
        """Listen in the calling thread's network namespace; returns the URL. instance: whose calls come here."""
        server = _Server(self, address, port, instance)
        self._servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://{address}:{server.server_address[1]}"

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
            server.drop()


class _Server(ThreadingMixIn, HTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, fake: FakeCloud, address: str, port: int, instance: str) -> None:
        self.fake, self.instance = fake, instance
        self.open: set[socket.socket] = set()
        super().__init__((address, port), _Handler)

    def drop(self) -> None:
        """Close the connections that clients keep."""
        for connection in list(self.open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else shows as the connection's end in the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.open.add(self.connection)

    def finish(self) -> None:
        self.server.open.discard(self.connection)
        super().finish()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        fake, peer = self.server.fake, str(self.client_address[0])
        call = Call(
            self.command,
            parts.path,
            dict(parse_qsl(parts.query, keep_blank_values=True)),
            {name.lower(): value for name, value in self.headers.items()},
            body,
            peer,
            self.server.instance or fake.addresses.get(peer, ""),
        )
        answer = fake.answer(call)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815  # the base class looks for these names

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the base class names it so
        """Nothing: tests look at `actions`."""
