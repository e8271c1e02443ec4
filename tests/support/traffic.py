"""Traffic between containers of a lab: what is sent, lost and answered."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

SEND = """
import hashlib, os, socket, sys
address, megabytes = sys.argv[1], int(sys.argv[2])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
digest = hashlib.sha256()
with socket.create_connection((address, 5001), timeout=20) as s:
    block = os.urandom(1 << 20)
    for n in range(megabytes):
        piece = n.to_bytes(8, "big") + block[8:]
        digest.update(piece)
        s.sendall(piece)
    s.shutdown(socket.SHUT_WR)
    s.recv(1)
print(digest.hexdigest())
"""

RECEIVE = """
import hashlib, socket, sys
family = socket.AF_INET6 if sys.argv[1] == "6" else socket.AF_INET
with socket.create_server(("", 5001), family=family) as server:
    server.settimeout(30)
    print("listening", flush=True)
    connection, _ = server.accept()
    digest = hashlib.sha256()
    connection.settimeout(30)
    while piece := connection.recv(1 << 20):
        digest.update(piece)
    connection.sendall(b"x")
print(digest.hexdigest())
"""


def transfer(source, target, family=4, megabytes=200):
    """Send random data over TCP; returns the SHA-256 at both ends."""
    receiver = target.popen(
        [sys.executable, "-c", RECEIVE, str(family)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert receiver.stdout.readline() == "listening\n"
        sender = source.exec([sys.executable, "-c", SEND, target.address(family), str(megabytes)], timeout=60)
        assert sender.returncode == 0, sender.stderr
        output, errors = receiver.communicate(timeout=30)
        assert receiver.returncode == 0, errors
        return sender.stdout.strip(), output.strip()
    finally:
        receiver.kill()
        receiver.wait()


def ping(source, address, *options, count=2):
    """The exit code and output of a ping, 0.2 s between requests."""
    done = source.exec(["ping", "-n", "-c", str(count), "-i", "0.2", "-W", "1", *options, address], timeout=30)
    return done.returncode, done.stdout + done.stderr


class ContinuousPing:
    """100 echo requests a second in the background, or one each `interval` seconds; `sent_and_lost()` ends it."""

    def __init__(self, source, target, scratch: Path, family=4, interval=0.01):
        self.path = scratch / f"ping-{source.netns}-{family}.log"
        self._output = self.path.open("w")
        address = target.address(family)
        self._process = source.popen(
            # Bounded by a count: with a deadline it would end at the first ICMP error.
            ["ping", "-n", "-i", str(interval), "-W", "1", "-c", "15000", address],
            stdout=self._output,
            stderr=self._output,
        )
        # What is watched may be over before enough was sent to tell, and a busy guest sends half as often.
        self._least = time.monotonic() + max(2.5, 200 * interval)
        time.sleep(0.3)

    def sent_and_lost(self):
        time.sleep(max(0.5, self._least - time.monotonic()))
        self._process.send_signal(signal.SIGINT)
        self._process.wait(10)
        self._output.close()
        found = re.search(r"(\d+) packets transmitted, (\d+) received", self.path.read_text())
        assert found, self.path.read_text()[-2000:]
        sent, received = int(found[1]), int(found[2])
        return sent, max(0, sent - received - 1)  # the request under way at the end has no answer yet

    def kill(self):
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._output.close()


def none_lost(pings, least=50):
    """Assert that each of the ContinuousPings sent more than `least` and had every answer."""
    for ping in pings:
        sent, lost = ping.sent_and_lost()
        assert sent > least
        assert lost == 0, f"{lost} of {sent} lost: {ping.path}"
