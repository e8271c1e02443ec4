"""A sample of how much passes between two containers: iperf3 where it is installed, else a TCP sender of our own."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec

from wincey.lab.errors import LabError
from wincey.lab.namespace import call_in
from wincey.lab.node import Container

_PORT = 5201
_BLOCK = 1 << 20
_LONGEST = 10.0  # seconds to connect


class Throughput(msgspec.Struct, frozen=True, rename={"source": "from", "target": "to"}):
    """TCP payload that arrived, in bits per second, and the program that measured it."""

    source: str
    target: str
    bits_per_second: float
    seconds: float
    program: str


def measure(source: Container, target: Container, family: int, *, seconds: float = 2) -> Throughput:
    """Send as fast as TCP goes over one connection for some seconds; raises LabError."""
    address = target.address(family)
    if address is None:
        raise LabError(f"{target.name} has no IPv{family} address")
    if shutil.which("iperf3"):
        return Throughput(source.name, target.name, _iperf(source, target, address, seconds), seconds, "iperf3")
    return Throughput(source.name, target.name, _tcp(source, target, address, seconds), seconds, "built-in TCP sender")


def _iperf(source: Container, target: Container, address: str, seconds: float) -> float:
    server = target.popen(
        ["iperf3", "--server", "--one-off", "--forceflush", "--bind", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert server.stdout
    try:
        if not any("listening" in line for line in server.stdout):  # it listens, or it ends with a reason
            raise LabError(f"iperf3 does not start on {target.name}")
        argv = ["iperf3", "--client", address, "--time", f"{seconds:.0f}", "--connect-timeout", "2000", "--json"]
        done = source.exec(argv, timeout=seconds + 30)
        answer = json.loads(done.stdout or "{}")
        if "error" in answer or done.returncode:
            raise LabError(f"iperf3 from {source.name} to {target.name}: {answer.get('error', done.stderr.strip())}")
        return float(answer["end"]["sum_received"]["bits_per_second"])
    except (ValueError, KeyError, subprocess.TimeoutExpired) as error:
        raise LabError(f"iperf3 from {source.name} to {target.name} gave no result: {error!r}") from None
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def _tcp(source: Container, target: Container, address: str, seconds: float) -> float:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with (
            call_in(target.netns, lambda: socket.create_server((address, _PORT), family=family)) as server,
            call_in(source.netns, lambda: socket.create_connection((address, _PORT), timeout=_LONGEST)) as sender,
        ):
            server.settimeout(_LONGEST)
            receiver, _ = server.accept()
            with receiver, ThreadPoolExecutor(1) as executor:
                receiver.settimeout(_LONGEST)
                counting = executor.submit(_count, receiver)
                block = bytes(_BLOCK)
                begin = time.monotonic()
                while time.monotonic() < begin + seconds:
                    sender.sendall(block)
                sender.shutdown(socket.SHUT_WR)
                return counting.result() * 8 / (time.monotonic() - begin)
    except OSError as error:
        raise LabError(f"TCP from {source.name} to {target.name} ({address}): {error}") from None


def _count(receiver: socket.socket) -> int:
    buffer = bytearray(_BLOCK)
    total = 0
    while got := receiver.recv_into(buffer):
        total += got
    return total
