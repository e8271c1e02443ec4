"""Real etcd servers on loopback: one or a cluster, plain or TLS, started, stopped, killed, paused and wiped at will.

The ports lie below the kernel's ephemeral range, so that a stopped server finds its own free when it starts again.
"""

from __future__ import annotations

import functools
import http.client
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from support.certs import Authority, Certificate

_FETCH = Path(__file__).parents[2] / "scripts" / "fetch-etcd35.sh"


def require_etcd() -> Path:
    """The directory of the installed etcd and etcdctl; skips the test when there are none."""
    etcd, etcdctl = shutil.which("etcd"), shutil.which("etcdctl")
    if not etcd or not etcdctl:
        pytest.skip("etcd is not installed: apt-get install etcd-server etcd-client")
    return Path(etcd).parent


def require_etcd35() -> Path:
    """The directory of etcd 3.5's programs, fetched on first use; skips the test when they can't be had."""
    programs, reason = _fetch_etcd35()
    if programs is None:
        pytest.skip(f"etcd 3.5 can't be had here: {reason}")
    return programs


@functools.cache
def _fetch_etcd35() -> tuple[Path | None, str]:
    try:
        done = subprocess.run([str(_FETCH)], capture_output=True, text=True, timeout=100, check=False)
    except subprocess.TimeoutExpired:
        return None, "scripts/fetch-etcd35.sh took more than 100 s"
    if done.returncode:
        return None, done.stderr.strip()
    return Path(done.stdout.strip()), ""


class EtcdServer:
    """One etcd member. Data and log live in `directory`, and the ports stay the same over restarts.

    programs: where etcd and etcdctl are (require_etcd()). authority: TLS for clients and peers, client certificates
    asked for. `peers` (the name and peer URL of each member) is set before the start to make it one of a cluster.
    """

    def __init__(
        self,
        directory: Path,
        programs: Path,
        *,
        authority: Authority | None = None,
        name: str = "m1",
        election_timeout_ms: int = 500,
        flags: tuple[str, ...] = (),
    ) -> None:
        self.directory = directory
        self.name = name
        self.programs = programs
        self.port, peer_port = free_ports(2)
        scheme = "https" if authority else "http"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.peer_url = f"{scheme}://127.0.0.1:{peer_port}"
        self.peers = {name: self.peer_url}
        self.authority = authority
        self.user: str | None = None  # NAME:PASSWORD that etcdctl says
        self._client: Certificate | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._flags = list(flags)
        self._timing = ["--heartbeat-interval", str(election_timeout_ms // 10)]
        self._timing += ["--election-timeout", str(election_timeout_ms)]
        directory.mkdir(parents=True, exist_ok=True)
        if authority:
            server = authority.issue(f"server-{name}", "/CN=server")
            self._client = authority.issue(f"client-{name}", "/CN=root")
            for prefix in ("", "peer-"):
                self._flags += [f"--{prefix}cert-file", str(server.cert), f"--{prefix}key-file", str(server.key)]
                self._flags += [f"--{prefix}trusted-ca-file", str(authority.ca), f"--{prefix}client-cert-auth"]

    @property
    def pid(self) -> int:
        """The process as it runs."""
        assert self._process, "not started"
        return self._process.pid

    def launch(self) -> None:
        """Start the process; see wait_ready."""
        assert self._process is None, "already started"
        arguments = [
            str(self.programs / "etcd"), "--name", self.name, "--data-dir", str(self.directory / "data"),
            "--listen-client-urls", self.url, "--advertise-client-urls", self.url,
            "--listen-peer-urls", self.peer_url, "--initial-advertise-peer-urls", self.peer_url,
            "--initial-cluster", ",".join(f"{name}={url}" for name, url in self.peers.items()),
            "--enable-v2", "--unsafe-no-fsync", "--logger", "zap", "--log-level", "warn", *self._timing, *self._flags,
        ]  # fmt: skip
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(), start_new_session=True
            )

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Until /health says so; fails with the log after `timeout` seconds."""
        assert self._process
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self._process.poll() is None:
            if self.healthy():
                return
            time.sleep(0.05)
        log = (self.directory / "log").read_text(errors="replace")[-3000:]
        pytest.fail(f"etcd {self.name} at {self.url} is not ready after {timeout:.0f} s:\n{log}")

    def healthy(self) -> bool:
        """Whether it answers and has a leader."""
        try:
            return bool(self.http("GET", "/health")["health"] == "true")
        except (OSError, http.client.HTTPException, ValueError, KeyError):
            return False

    def start(self) -> None:
        """Start and wait until ready."""
        self.launch()
        self.wait_ready()

    def stop(self) -> None:
        """End it in order, if it runs."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, if it runs."""
        self._end(signal.SIGKILL)

    def wipe(self) -> None:
        """Forget all data; only while stopped."""
        assert self._process is None, "still running"
        shutil.rmtree(self.directory / "data", ignore_errors=True)

    def pause(self) -> None:
        """Stop it without ending it: connections stay, nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)
        while any(_state(thread) != "T" for thread in Path(f"/proc/{self.pid}/task").iterdir()):
            time.sleep(0.001)  # threads stop one by one, and may serve another request until then

    def resume(self) -> None:
        """Let it go on after `pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def http(self, method: str, path: str, body: str | None = None) -> Any:
        """One request, the JSON of its answer."""
        if self.authority and self._client:
            context = ssl.create_default_context(cafile=str(self.authority.ca))
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # Python 3.13 would want more extensions of the CA
            context.load_cert_chain(self._client.cert, self._client.key)
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                "127.0.0.1", self.port, timeout=2, context=context
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request(method, path, body)
            with connection.getresponse() as response:
                return json.loads(response.read())
        finally:
            connection.close()

    def ctl(self, *arguments: str, api: int = 3) -> str:
        """What etcdctl prints; raises CalledProcessError when it fails."""
        command = [str(self.programs / "etcdctl"), "--endpoints", self.url]
        if self.authority and self._client:
            names = ("--cacert", "--cert", "--key") if api == 3 else ("--ca-file", "--cert-file", "--key-file")
            for name, file in zip(names, (self.authority.ca, self._client.cert, self._client.key), strict=True):
                command += [name, str(file)]
        if self.user:
            command += ["--user" if api == 3 else "--username", self.user]
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True, text=True, timeout=20, check=True, env=_environment() | {"ETCDCTL_API": str(api)},
        )  # fmt: skip
        return done.stdout

    def enable_auth(self, user: str, password: str, prefix: str) -> None:
        """Turn on authentication in v3: `user` may read and write below `prefix` alone; etcdctl goes on as root."""
        self.ctl("role", "add", user)
        self.ctl("role", "grant-permission", user, "readwrite", prefix, "--prefix")
        self.ctl("user", "add", f"{user}:{password}")
        self.ctl("user", "grant-role", user, user)
        self.ctl("user", "add", "root:rootpw")
        self.ctl("user", "grant-role", "root", "root")
        self.ctl("auth", "enable")
        self.user = "root:rootpw"

    def enable_auth_v2(self, user: str, password: str, prefix: str) -> None:
        """The same in v2, which has users of its own; guests may do nothing any more."""
        self.ctl("user", "add", "root:rootpw", api=2)
        self.ctl("user", "add", f"{user}:{password}", api=2)
        self.ctl("role", "add", user, api=2)
        self.ctl("role", "grant", user, "--path", f"{prefix}*", "--readwrite", api=2)
        self.ctl("user", "grant", user, "--roles", user, api=2)
        self.ctl("auth", "enable", api=2)
        self.user = "root:rootpw"
        self.ctl("role", "revoke", "guest", "--path", "/*", "--readwrite", api=2)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class EtcdCluster:
    """Several members that know each other."""

    def __init__(self, directory: Path, programs: Path, *, size: int = 3, authority: Authority | None = None) -> None:
        self.members = [
            EtcdServer(
                directory / f"m{number}", programs, authority=authority, name=f"m{number}", election_timeout_ms=1000
            )
            for number in range(1, size + 1)
        ]
        for member in self.members:
            member.peers = {other.name: other.peer_url for other in self.members}

    @property
    def urls(self) -> list[str]:
        """The client URL of each member."""
        return [member.url for member in self.members]

    def start(self) -> None:
        """Start all and wait until each is ready."""
        for member in self.members:
            member.launch()
        for member in self.members:
            member.wait_ready()

    def kill(self) -> None:
        """End those that run, at once."""
        for member in self.members:
            member.kill()

    def leader(self) -> EtcdServer:
        """The member that leads now."""
        for member in self.members:
            status = json.loads(member.ctl("endpoint", "status", "-w", "json"))[0]["Status"]
            if status["leader"] == status["header"]["member_id"]:
                return member
        pytest.fail("no member leads")


def free_ports(count: int) -> list[int]:
    """TCP ports of loopback that nobody listens on now, below those that the kernel gives out for connections."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randint(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


def _state(task: Path) -> str:
    """The state of a thread, see proc_pid_stat(5)."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def _environment() -> dict[str, str]:
    """Ours, without settings for etcd and proxies that would change what the tests mean."""
    unwanted = ("ETCD", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "GODEBUG")
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(unwanted)}
