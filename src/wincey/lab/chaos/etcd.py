"""The store of these labs: a cluster of three real etcd servers, each on a host of its own, that can be treated badly.

Data and log of a member are in its host's directory. A member may keep its data on a small file system of its own, a tmpfs in
a mount namespace that a sleeping process holds: it outlives the member and ends with the lab, whoever takes that down.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wincey.lab.chaos.scenario import NotHere
from wincey.lab.errors import LabError, NotReady
from wincey.lab.namespace import call_in, enter_argv
from wincey.lab.node import Host
from wincey.lab.plan import LabSpec
from wincey.lab.process import Process, clean_environment, tail, wait_for
from wincey.lab.store import LabStore
from wincey.store.options import StoreOptions

_LOG_LINES = 8
_ELECTION = 20.0  # seconds
_DISK = 200  # MiB: two segments of the log, which etcd makes in advance, and its database


class Member:
    """One etcd server. `peers`: the name and peer URL of each member."""

    def __init__(self, host: Host, asks_from: str, peers: Mapping[str, str]) -> None:
        self.host, self.name = host, host.name
        self.url = f"http://{host.underlay(host.spec.families[0])}:2379"
        self.directory = host.directory
        self.log_path = self.directory / "etcd.log"
        self._asks_from, self._peers = asks_from, peers
        self._process: Process | None = None
        self._disk: Process | None = None

    @property
    def process(self) -> Process:
        """The server last started."""
        assert self._process, "not started"
        return self._process

    @property
    def running(self) -> bool:
        """Whether it runs; a paused one does."""
        return bool(self._process and self._process.alive)

    @property
    def data(self) -> Path:
        """Its data, as we reach them."""
        root = Path(f"/proc/{self._disk.pid}/root") if self._disk else Path("/")
        return root / self._data.relative_to("/")

    @property
    def _data(self) -> Path:
        return self.directory / "etcd" / "data"

    def give_disk(self) -> None:
        """Keep its data on a file system of its own, from its next start on."""
        place = self.directory / "etcd"
        place.mkdir(parents=True, exist_ok=True)
        mount = f'mount -t tmpfs -o size={_DISK}m wincey-chaos "$0" && : > "$0/mounted" && exec sleep 3600'
        self._disk = Process.spawn(
            ["unshare", "-m", "sh", "-c", mount, str(place)],
            netns=self.host.netns,
            log=self.log_path,
            pidfile=self.directory / "disk.pid",
        )
        if not wait_for((self.data.parent / "mounted").exists, 10):
            raise LabError("\n  ".join([f"{self.name} gets no disk of its own:", *tail(self.log_path, _LOG_LINES)]))

    def start(self) -> None:
        """Start it, with the data it has; `Cluster.wait` waits."""
        self.directory.mkdir(parents=True, exist_ok=True)
        inside = ["nsenter", f"--mount=/proc/{self._disk.pid}/ns/mnt", "--"] if self._disk else []
        self._process = Process.spawn(
            [
                *inside,
                "etcd",
                f"--name={self.name}",
                f"--data-dir={self._data}",
                f"--listen-client-urls={self.url}",
                f"--advertise-client-urls={self.url}",
                f"--listen-peer-urls={self._peers[self.name]}",
                f"--initial-advertise-peer-urls={self._peers[self.name]}",
                f"--initial-cluster={self._initial}",
                "--log-level=warn",
                "--logger=zap",
                "--unsafe-no-fsync",  # the data need not survive a power cut
            ],
            netns=self.host.netns,
            log=self.log_path,
            pidfile=self.directory / "etcd.pid",
        )

    @property
    def _initial(self) -> str:
        return ",".join(f"{name}={url}" for name, url in self._peers.items())

    def kill(self) -> None:
        """End it at once, as a crash, if it runs."""
        if self._process:
            self._process.send(signal.SIGKILL)
            self._process.reap()

    def wipe(self) -> None:
        """Forget all it knew; only while it does not run."""
        shutil.rmtree(self.data, ignore_errors=True)

    def restore(self, snapshot: Path) -> None:
        """Begin a new cluster with what a snapshot holds; only while it does not run, and wiped."""
        etcdctl(
            [
                *("snapshot", "restore", str(snapshot), f"--name={self.name}", f"--data-dir={self._data}"),
                *(f"--initial-cluster={self._initial}", f"--initial-advertise-peer-urls={self._peers[self.name]}"),
            ]
        )

    def ask(self, path: str, body: object = None) -> Any:
        """The JSON of its answer, None without one."""

        def request() -> Any:
            connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=1)
            try:
                connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
                return json.loads(connection.getresponse().read(100_000))
            except (OSError, http.client.HTTPException, ValueError):
                return None
            finally:
                connection.close()

        return call_in(self._asks_from, request)

    @property
    def healthy(self) -> bool:
        """Whether it answers and has a leader."""
        answer = self.ask("/health")
        return isinstance(answer, dict) and answer.get("health") == "true"

    def wait(self, timeout: float) -> bool:
        """Whether it serves within that many seconds."""
        return wait_for(lambda: not self.running or self.healthy, timeout) and self.running

    def reap(self) -> None:
        """Leave no zombie behind."""
        for process in (self._process, self._disk):
            if process:
                process.reap()


class Cluster(LabStore):
    """The members as one store. `hosts`: where they run."""

    def __init__(self, spec: LabSpec, directory: Path, hosts: Sequence[Host]) -> None:
        super().__init__(spec, directory)
        peers = {host.name: f"http://{host.underlay(spec.families[0])}:2380" for host in hosts}
        self.members = [Member(host, self.netns, peers) for host in hosts]

    @property
    def running(self) -> bool:
        """Whether any member runs."""
        return any(member.running for member in self.members)

    def start(self, *, timeout: float = 30) -> None:
        """Start those that do not run, and wait for all; raises NotReady."""
        for member in self.members:
            if not member.running:
                member.start()
        self.wait(self.members, timeout=timeout)

    def wait(self, members: Sequence[Member], *, timeout: float = 30) -> None:
        """Until these members serve; raises NotReady."""
        deadline = time.monotonic() + timeout
        for member in members:
            if not member.wait(deadline - time.monotonic()):
                why = f"did not serve within {timeout:.0f} s" if member.running else "ended"
                raise NotReady("\n  ".join([f"etcd on {member.name} {why}:", *tail(member.log_path, _LOG_LINES)]))

    def stop(self) -> None:
        """End all at once."""
        for member in self.members:
            member.kill()

    def reap(self) -> None:
        """Leave no zombie behind after the namespaces were removed."""
        for member in self.members:
            member.reap()

    def leader(self) -> Member:
        """The member that leads now; raises LabError when none does within a while."""
        deadline = time.monotonic() + _ELECTION
        while time.monotonic() < deadline:
            for member in self.members:
                status = member.ask("/v3/maintenance/status", {}) or {}
                if "leader" in status and status["leader"] == status["header"]["member_id"]:
                    return member
            time.sleep(0.05)
        raise LabError(f"the etcd cluster has no leader after {_ELECTION:.0f} s")

    def snapshot(self) -> Path:
        """Save what the store holds now, and tell where."""
        path = self.directory / "snapshot.db"
        etcdctl([f"--endpoints={self.members[0].url}", "snapshot", "save", str(path)], netns=self.netns)
        return path

    def _options(self) -> StoreOptions:
        return StoreOptions(endpoints=[member.url for member in self.members], api="v3")


def etcdctl(words: Sequence[str], *, netns: str | None = None) -> None:
    """Run etcdctl; raises LabError with what it says, NotHere without it."""
    if not shutil.which("etcdctl"):
        raise NotHere("there is no etcdctl on this machine: on Debian it is in etcd-client")
    argv = enter_argv(netns, ["etcdctl", *words]) if netns else ["etcdctl", *words]
    environment = clean_environment(os.environ) | {"ETCDCTL_API": "3"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False, env=environment)
    if done.returncode:
        raise LabError(f"etcdctl {' '.join(words)}: {(done.stderr or done.stdout).strip()}")
