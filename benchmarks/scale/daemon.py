"""A flanneld under measurement: its start, and what it costs as the kernel tells."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scale.etcd import CLIENT, Etcd
from scale.leases import PREFIX, Peer
from scale.table import routes
from wincey.model.socketpath import of_subnet_file

RTMGRP_IPV4_ROUTE = 0x40


class Daemon:
    """One process. scratch: where its files go, its log among them. environment: added to ours."""

    def __init__(
        self, command: Sequence[str], scratch: Path, backend: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = scratch / "notify"
        address.unlink(missing_ok=True)
        self._notify.bind(str(address))
        self._notify.settimeout(1)
        self.log = scratch / "log"
        self.socket = Path(of_subnet_file(str(scratch / "subnet.env")))
        self._backend = backend
        argv = [*command, f"--etcd-endpoints={CLIENT}", f"--etcd-prefix={PREFIX}", "--iface=eth0"]
        argv += [f"--subnet-file={scratch / 'subnet.env'}"]
        self._started = time.perf_counter()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                argv, env={**os.environ, **(environment or {}), "NOTIFY_SOCKET": str(address)}, stderr=log
            )

    def ready(self, count: int) -> float:
        """Seconds until READY=1 and every route is there."""
        while True:
            try:
                if b"READY=1" in self._notify.recv(4096):
                    break
            except TimeoutError:
                self.lives()
        if not wait(lambda: routes() >= count, 180):
            raise SystemExit(f"only {routes()} of {count} routes after 180 s")
        return time.perf_counter() - self._started

    def lives(self) -> None:
        """End the benchmark where the daemon has ended."""
        if self._process.poll() is not None:
            tail = self.log.read_text(errors="replace")[-2000:]
            raise SystemExit(f"the daemon ended with {self._process.returncode}:\n{tail}")

    def memory(self, what: str = "VmRSS") -> float:
        """Resident MB; of its life's most with VmHWM."""
        for line in self._proc("status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) / 1024
        raise SystemExit("the daemon is gone")

    def cpu(self) -> float:
        """Processor seconds used so far by all its threads, to the nanosecond."""
        tasks = self._proc("task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def files(self) -> int:
        """Open file descriptors."""
        return len(list(self._proc("fd").iterdir()))

    def threads(self) -> int:
        """Its threads."""
        return len(list(self._proc("task").iterdir()))

    def diff_cpu(self, times: int = 10) -> float:
        """Least CPU milliseconds of some looks at the whole host that find nothing to do (/v1/diff).

        The least, as all that others do on the machine only adds: emptied caches, waiting in the kernel.
        """
        samples = []
        for _ in range(times + 1):
            before = self.cpu()
            self.ask("/v1/diff")
            samples.append((self.cpu() - before) * 1e3)
        return min(samples[1:])  # the first one imports what the API needs

    def audits(self) -> int:
        """How many looks at the whole host there were for its own sake; 0 where it has no API that tells."""
        if not self.socket.exists():
            return 0
        return sum(int(each["reconcile"]["audits"]) for each in json.loads(self.ask("/v1/status"))["networks"])

    def ask(self, path: str) -> bytes:
        """GET from its local API."""
        connection = _Local(str(self.socket))
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        if answer.status != http.client.OK:
            raise SystemExit(f"{path}: {answer.status} {body[:300]!r}")
        return body

    def lease_to_route(self, etcd: Etcd, first: int, times: int = 15) -> list[float]:
        """Milliseconds from before a lease is put to its route's notification, of so many leases."""
        samples = []
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as monitor:
            monitor.bind((0, RTMGRP_IPV4_ROUTE))
            monitor.settimeout(60)
            for number in range(first, first + times):
                peer = Peer(number)
                wanted = socket.inet_aton(peer.subnet)
                started = time.perf_counter()
                etcd.put(peer.key, peer.value(self._backend))
                while wanted not in monitor.recv(65536):
                    pass
                samples.append((time.perf_counter() - started) * 1e3)
                time.sleep(0.1)
        return samples

    def stop(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._notify.close()

    def _proc(self, name: str) -> Path:
        return Path(f"/proc/{self._process.pid}/{name}")


class _Local(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(60)
        self.sock.connect(self._path)


def wait(condition: Callable[[], bool], seconds: float, every: float = 0.01) -> bool:
    """Until a condition holds; False when it does not in time."""
    deadline = time.perf_counter() + seconds
    while not condition():
        if time.perf_counter() > deadline:
            return False
        time.sleep(every)
    return True
