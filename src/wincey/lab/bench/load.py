"""One load on one path, and where on the machine it runs.

For TCP and for requests everything is on one core: both ends, all that the kernel does in between, and the programs of
the two hosts. Then a figure is one over the path's whole cost in processor time; and nothing is reordered, which a veth
pair does when two cores feed it (the sender's thread, and acknowledgements in a soft interrupt on the other core), and no
wake-up crosses cores, which takes a virtual machine longer than all the rest. Requests run with real-time priority
where that is allowed, and without the kernel's limit on it. Datagrams are sent on one core and counted on the other; the
programs of the hosts are on the sender's core first, and then have both.

The processes of the hosts are in sessions of their own, and with autogroup scheduling a session has its share of
the processor whatever the nice values in it: their groups are made as important as ours.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from wincey.lab.bench.pair import Pair
from wincey.lab.errors import LabError
from wincey.lab.node import Node

METRICS = {
    "tcp1": "TCP, one stream, Gb/s",
    "tcp4": "TCP, four streams, Gb/s",
    "udp": "UDP, 64 bytes, 1,000 packets/s",
    "udp2": "the same, the hosts' programs on both cores",
    "rr": "requests/s, one byte each",
    "p50": "half of the requests within, µs",
    "cpu": "processor seconds per GB, TCP one stream",
}
LOWER_IS_BETTER = ("p50", "cpu")

LOADS = ("tcp1", "tcp4", "rr", "udp", "udp2")
"""What is run, in this order; some yield two metrics."""

_PORT = "5201"
_PATIENCE = 30.0  # seconds beyond the load's own
_IMPORTANT = "-20"
_RT_RUNTIME = Path("/proc/sys/kernel/sched_rt_runtime_us")


class Machine(msgspec.Struct, frozen=True):
    """The cores that loads run on (the same one twice where there is but one), and whether real-time priority is allowed."""

    path: int
    receiver: int
    realtime: bool

    @classmethod
    def find(cls) -> Machine:
        """Look at this machine."""
        cores = sorted(os.sched_getaffinity(0))
        tried = subprocess.run(["chrt", "-f", "1", "true"], capture_output=True, check=False)
        return cls(cores[0], cores[-1], tried.returncode == 0)


@contextmanager
def important() -> Iterator[None]:
    """Make our own session's group more important than others'."""
    path = Path("/proc/self/autogroup")
    with suppress(OSError):
        path.write_text(_IMPORTANT)
    try:
        yield
    finally:
        with suppress(OSError):
            path.write_text("0")


@contextmanager
def unthrottled() -> Iterator[None]:
    """Let real-time tasks have a core for longer than the 95 % of a second that the kernel grants them.

    A path in the kernel runs as part of the load, and so would lose a twentieth; one through a process, which has no such
    priority, would not. What is loaded ends by itself, and the machine's other tasks have its other cores.
    """
    try:
        before = _RT_RUNTIME.read_text()
        _RT_RUNTIME.write_text("-1")
    except OSError:  # not ours to set
        yield
        return
    try:
        yield
    finally:
        _RT_RUNTIME.write_text(before)


class Loader:
    """Loads pairs. programs: where the compiled helpers are; seconds: of each load, without what warms it up."""

    def __init__(self, programs: Path, machine: Machine, seconds: float) -> None:
        self._program = str(programs / "load")
        self._machine = machine
        self._seconds = seconds

    def measure(self, load: str, pair: Pair) -> dict[str, float]:
        """The metrics that one of LOADS yields; raises LabError."""
        machine = self._machine
        _pin(pair.processes(), {machine.path, machine.receiver} if load == "udp2" else {machine.path})
        try:
            match load:
                case "tcp1":
                    busy = _busy(machine.path)
                    seen = self._run(pair, ["tcp-sink"], ["tcp"], ["1"])
                    busy = _busy(machine.path) - busy
                    return {"tcp1": _gigabits(seen), "cpu": busy / (seen["total"] / 1e9)}
                case "tcp4":
                    return {"tcp4": _gigabits(self._run(pair, ["tcp-sink"], ["tcp"], ["4"]))}
                case "rr":
                    seen = self._run(pair, ["rr-server"], ["rr"], [], realtime=machine.realtime, answer="client")
                    return {"rr": seen["transactions"] / seen["seconds"], "p50": seen["p50_us"]}
                case _:
                    seen = self._run(pair, ["udp-sink"], ["udp"], [], apart=True)
                    return {load: seen["packets"] / seen["seconds"] / 1e3}
        except ZeroDivisionError:
            raise LabError(f"{load}: next to nothing arrived") from None

    def _run(
        self,
        pair: Pair,
        serve: Sequence[str],
        send: Sequence[str],
        more: Sequence[str],
        *,
        realtime: bool = False,
        apart: bool = False,
        answer: str = "server",
    ) -> dict[str, Any]:
        sender, receiver, address = pair.ends
        machine = self._machine
        long = f"{self._seconds}"
        flood = f"{self._seconds + 0.3}"  # datagrams: until the one who counts has enough
        server_argv = [*serve, _PORT, *([long] if apart else [])]
        client_argv = [*send, address, _PORT, flood if apart else long, *more]
        server = self._popen(receiver, server_argv, machine.receiver if apart else machine.path, realtime)
        try:
            assert server.stdout
            if server.stdout.readline().strip() != "ready":
                raise LabError(f"{' '.join(server_argv)} on {receiver.name} does not start")
            client = self._popen(sender, client_argv, machine.path, realtime)
            try:
                said, complaint = client.communicate(timeout=self._seconds + _PATIENCE)
                heard, reply = server.communicate(timeout=_PATIENCE)
            finally:
                _end(client)
        except subprocess.TimeoutExpired:
            raise LabError(f"{' '.join(client_argv)} from {sender.name} to {receiver.name} does not end") from None
        finally:
            _end(server)
        if client.returncode or server.returncode:
            raise LabError(
                f"{' '.join(client_argv)} from {sender.name} to {receiver.name}: {(complaint + reply).strip() or 'failed'}"
            )
        return dict(json.loads(heard if answer == "server" else said))

    def _popen(self, node: Node, argv: Sequence[str], core: int, realtime: bool) -> subprocess.Popen[str]:
        front = ["taskset", "-c", str(core), *(["chrt", "-f", "50"] if realtime else [])]
        return node.popen([*front, self._program, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _gigabits(seen: dict[str, Any]) -> float:
    """Per second."""
    return float(seen["bytes"] * 8 / seen["seconds"] / 1e9)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()


def _pin(pids: Iterable[int], cores: set[int]) -> None:
    """Put all threads of processes on these cores, and make their groups important."""
    for pid in pids:
        with suppress(OSError):  # it has ended
            for task in os.listdir(f"/proc/{pid}/task"):
                os.sched_setaffinity(int(task), cores)
            Path(f"/proc/{pid}/autogroup").write_text(_IMPORTANT)


def _busy(core: int) -> float:
    """Seconds that a core has worked since boot."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _wait, hard, soft, *_ = map(int, fields)
            return (user + nice + system + hard + soft) / os.sysconf("SC_CLK_TCK")
    raise LabError(f"/proc/stat has no core {core}")
