"""A flanneld in server mode on loopback, over an SQLite file or another store, to talk to byte by byte."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from support.keys import wait_until
from wincey.lab.node import own_flanneld

CONFIG = '{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}'


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Server:
    """One server process; it can be killed and started again at the same port."""

    def __init__(self, log: Path, *flags: str, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.port, self.path, self.tls = port or free_port(), log, tls
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.path.read_text()

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    def start(self) -> Server:
        with self.path.open("ab") as output:
            before = self.path.stat().st_size
            self._process = subprocess.Popen(
                [*own_flanneld(), f"--listen={self.address}", *self._flags],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        # Its store may be there later than its socket, and both have to be.
        wait_until(
            lambda: (
                {"serving out", f"on {self.address}"}
                <= {part for part in ("serving out", f"on {self.address}") if part in self.log[before:]}
            )
        )
        return self

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> int:
        assert self._process
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(20)
        self._process = None
        return code

    def open(self) -> http.client.HTTPConnection:
        if self.tls:
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=20, context=self.tls)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def ask(self, method: str, path: str, body: str | None = None, **headers: str) -> tuple[int, str, str]:
        """Status, content type and body."""
        with closing(self.open()) as connection:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.getheader("content-type", ""), answer.read().decode()

    def get(self, path: str, **headers: str) -> dict:
        """A JSON body."""
        status, _, body = self.ask("GET", path, **headers)
        assert status == 200, body
        return json.loads(body)

    def take(self, address: str, network: str = "_", **headers: str) -> dict:
        """A lease for a public address."""
        attrs = json.dumps(
            {"PublicIP": address, "BackendType": "vxlan", "BackendData": {"VtepMAC": "aa:bb:cc:00:00:01"}}
        )
        status, _, body = self.ask("POST", f"/v1/{network}/leases", attrs, **headers)
        assert status == 200, body
        return json.loads(body)


@contextmanager
def serving(log: Path, *flags: str, **options) -> Iterator[Server]:
    """A server that ends with the block, whatever happens."""
    server = Server(log, *flags, **options)
    try:
        yield server.start()
    finally:
        server.kill()


def put_config(path: Path, text: str = CONFIG, network: str = "") -> str:
    """Put a config into an SQLite store; returns what --store calls it."""
    prefix = "/coreos.com/network" + (f"/{network}" if network else "")
    subprocess.run(
        [Path(own_flanneld()[0]).with_name("wincey"), "config", "set", f"--store=sqlite:{path}", f"--etcd-prefix={prefix}", "-"],
        input=text.encode(), check=True, capture_output=True,
    )  # fmt: skip
    return f"sqlite:{path}"
