"""Our flanneld as one process on a host of a lab: its end, its log, its health."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
from contextlib import contextmanager
from pathlib import Path

from support.keys import wait_until
from wincey.lab.namespace import call_in
from wincey.lab.node import own_flanneld
from wincey.lab.process import clean_environment

KLOG = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d{6} {1,7}\d+ [a-z_0-9]+\.py:\d+\] .")


class Flanneld:
    """A running or ended daemon. flags: added to those that the lab gives to a host's daemon; `bare`: instead of them."""

    def __init__(self, host, log: Path, *flags: str, bare=False, env=None):
        host.directory.mkdir(parents=True, exist_ok=True)
        self.host, self.path = host, log
        with log.open("wb") as output:
            self._process = host.popen(
                [*(own_flanneld() if bare else host.argv()), *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=clean_environment(os.environ) | (env or {}),
            )

    @property
    def log(self) -> str:
        return self.path.read_text()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def says(self, text: str) -> None:
        """Wait until the log has a text."""
        wait_until(lambda: text in self.log or not self.running)
        assert text in self.log, self.log

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self, timeout: float = 30) -> int:
        """Wait for the end; the exit code, negative for a signal."""
        return self._process.wait(timeout)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 30) -> int:
        self.send(number)
        return self.end(timeout)

    def kill(self) -> None:
        if self.running:
            self._process.kill()
        self._process.wait()


@contextmanager
def flanneld(host, log: Path, *flags: str, bare=False, env=None):
    """A daemon that ends with the block, whatever happens."""
    daemon = Flanneld(host, log, *flags, bare=bare, env=env)
    try:
        yield daemon
    finally:
        daemon.kill()


def ask(host, path: str, port: int, address: str = "127.0.0.1") -> tuple[int, str]:
    """GET from a health endpoint of a host, from inside it; status 0 when nobody listens."""

    def get():
        connection = http.client.HTTPConnection(address, port, timeout=5)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except ConnectionError as error:
            return 0, str(error)
        finally:
            connection.close()

    return call_in(host.netns, get)


def sh(node, command: str) -> str:
    """Run a shell command on a host; its output."""
    done = node.exec(["sh", "-c", command])
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def log_of(host) -> str:
    """All that a host's daemon has said."""
    return "\n".join(host.log())
