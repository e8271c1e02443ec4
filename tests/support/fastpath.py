"""The fast path of containers in a lab: what its programs counted, and flows that show whether they go on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from support.keys import wait_until
from wincey.bpf.bpffs import owner_directory
from wincey.bpf.fastpath import COUNTERS
from wincey.bpf.maps import Map
from wincey.lab.namespace import call_in

ECHO = """
import socket, sys, threading
def serve(connection):
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while data := connection.recv(65536):
                connection.sendall(data)
        except OSError:
            pass
def stream():
    with socket.create_server(("", 7)) as server:
        while True:
            threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
threading.Thread(target=stream, daemon=True).start()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.setsockopt(socket.SOL_SOCKET, 33, 1 << 23)  # SO_RCVBUFFORCE: room for a busy machine
    s.bind(("", 7))
    print("listening", flush=True)
    while True:
        data, peer = s.recvfrom(65536)
        try:
            s.sendto(data, peer)
        except OSError:
            pass
"""

TALK = """
import os, socket, sys, time
address, port, size, path, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
out = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
count, end, message = 0, time.monotonic() + seconds, b"x" * size
with socket.create_connection((address, port), timeout=10) as s:
    s.settimeout(seconds)  # TCP may be at rest for long, while it waits to try again
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while time.monotonic() < end:
        s.sendall(message)
        left = size
        while left:
            left -= len(s.recv(left))
        count += 1
        os.pwrite(out, b"%08d" % count, 0)
        time.sleep(0.002)
"""

PING = """
import select, signal, socket, sys, time
address, interval = sys.argv[1], float(sys.argv[2])
going = True
def stop(*_):
    global going
    going = False
signal.signal(signal.SIGINT, stop)
sent, got, due, end = 0, set(), time.monotonic(), time.monotonic() + 60
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.setsockopt(socket.SOL_SOCKET, 33, 1 << 23)  # SO_RCVBUFFORCE: room for a busy machine
    s.connect((address, 7))
    s.setblocking(False)
    def read():
        while True:
            try:
                got.add(int(s.recv(100)))
            except BlockingIOError:
                return
            except OSError:
                pass  # an ICMP error: what was sent is counted as lost
    print("pinging", flush=True)
    while going and time.monotonic() < end:
        try:
            s.send(b"%d" % sent)
        except OSError:
            pass
        sent += 1
        due = max(due + interval, time.monotonic())
        while (left := due - time.monotonic()) > 0:
            select.select([s], [], [], left)
            read()
    until = time.monotonic() + 3
    while len(got) < sent and time.monotonic() < until:
        select.select([s], [], [], 0.1)
        read()
print(sent, sent - len(got), flush=True)
"""


def directory(host) -> Path:
    """Where the pins of a host's fast path lie."""
    return call_in(host.netns, lambda: owner_directory("fastpath", host.directory / "wincey" / "subnet"))


def counted(host) -> dict[str, int]:
    """What the programs of a host have counted so far."""
    pin, *_ = directory(host).glob("*/map_counters")  # two while a release takes over the maps of another
    counters = Map.opened(str(pin))
    assert counters
    try:
        return {name: counters.total(number) for number, name in enumerate(COUNTERS)}
    finally:
        counters.close()


def pins(host) -> list[str]:
    """The attachments, by the names of their pins."""
    return sorted(pin.name for pin in directory(host).glob("link_*"))


@contextmanager
def taken(*hosts, least=20):
    """What happens inside goes the fast way, out of and into the containers of each of these hosts."""
    before = [counted(host) for host in hosts]
    yield
    for host, was in zip(hosts, before, strict=True):
        now = counted(host)
        assert all(now[way] - was[way] >= least for way in ("out", "in")), (host.name, was, now)


@contextmanager
def not_taken(*hosts):
    """Nothing that happens inside goes the fast way."""
    before = [counted(host) for host in hosts]
    yield
    for host, was in zip(hosts, before, strict=True):
        now = counted(host)
        assert (now["out"], now["in"]) == (was["out"], was["in"]), host.name


class Talk:
    """A TCP connection over which `size` bytes go back and forth, some hundred times a second, until closed or for `seconds`."""

    def __init__(self, source, address: str, scratch: Path, *, port: int = 7, size: int = 10, seconds: int = 60):
        self._path = scratch / f"talk-{source.netns}-{time.monotonic_ns()}"
        self._process = source.popen(
            [sys.executable, "-c", TALK, address, str(port), str(size), str(self._path), str(seconds)],
            stderr=subprocess.DEVNULL,
        )

    @property
    def count(self) -> int:
        """How often it went back and forth."""
        return int(self._path.read_text() or 0) if self._path.exists() else 0

    def goes_on(self, more: int = 20, timeout: float = 10) -> None:
        """Wait until it has gone on a while."""
        target = self.count + more
        wait_until(lambda: self.count >= target, timeout=timeout)

    def stands_still(self, seconds: float = 0.6) -> bool:
        """Whether nothing arrives any more."""
        before = self.count
        time.sleep(seconds)
        return self.count == before

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


class DatagramPing:
    """Datagrams to a container's echo, 1000 a second unless told otherwise; `end()` tells how many were sent and lost."""

    def __init__(self, source, address: str, interval: float = 0.001):
        self._process = source.popen(
            [sys.executable, "-c", PING, address, str(interval)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout.readline() == "pinging\n"

    def end(self) -> tuple[int, int]:
        self._process.send_signal(signal.SIGINT)
        output, _ = self._process.communicate(timeout=15)
        sent, lost = map(int, output.split())
        return sent, lost

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@contextmanager
def echo(*containers):
    """Containers answer at port 7, TCP and UDP."""
    servers = [each.popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True) for each in containers]
    try:
        for server in servers:
            assert server.stdout.readline() == "listening\n"
        yield
    finally:
        for server in servers:
            server.kill()
            server.wait()
            server.stdout.close()
