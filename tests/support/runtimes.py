"""Container runtimes as people run them: podman, and containerd with `ctr` and with CRI, as a kubelet calls it.

Each host of a lab gets a mount namespace in which /etc, /var, /opt and /run are its own, so that runtimes, plugin and daemon
find each other at their default paths, and nothing of it is seen by the rest of the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from support.cni import STANDARD
from support.dockerd import busybox_image
from wincey.lab.node import Host
from wincey.lab.process import clean_environment, wait_for

_SETUP = """
set -e
for each in etc var opt; do
    mkdir -p "$0/$each.up" "$0/$each.work"
    mount -t overlay overlay -o "lowerdir=/$each,upperdir=$0/$each.up,workdir=$0/$each.work" "/$each"
done
mkdir -p "$0/run" /opt/cni/bin /etc/cni/net.d /var/lib/cni
rm -f /etc/cni/net.d/*
ln -s "$2"/* /opt/cni/bin/
mount -t tmpfs -o mode=755 tmpfs "$0/run"
mkdir -p "$0/run/flannel" "$0/run/lock"
mount --bind "$1" "$0/run/flannel"
mount --rbind "$0/run" /run
echo ready
exec sleep infinity
"""

IMAGE = "docker.io/library/bb:1"
_PODMAN = """
[containers]
default_ulimits = ["nofile=16384:16384", "nproc=16384:16384"]
[network]
network_backend = "cni"
cni_plugin_dirs = ["/opt/cni/bin"]
network_config_dir = "/etc/cni/net.d"
default_network = "{network}"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
_SOCKET = "/run/containerd.sock"
_CONTAINERD = """
version = 2
root = "{base}/root"
state = "/run/containerd"
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
"""


class Machine:
    """One host with its files and its runtimes. `close` ends what still runs."""

    def __init__(self, host: Host, directory: Path, network: str) -> None:
        self.host, self.directory, self.network = host, directory, network
        directory.mkdir(parents=True)
        (directory / "containers.conf").write_text(_PODMAN.format(network=network))
        self._keeper = host.popen(
            [
                *("unshare", "--mount", "--propagation", "slave", "sh", "-c", _SETUP),
                *(str(directory), str(host.directory), str(STANDARD)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._keeper.stdout
        assert self._keeper.stdout.readline() == "ready\n"
        self._containerd: subprocess.Popen[bytes] | None = None
        self._podman_used = False

    def argv(self, *command: str) -> list[str]:
        """The command that runs another one on this machine."""
        pid = self._keeper.pid
        return ["nsenter", "--mount", f"--target={pid}", f"--net=/proc/{pid}/ns/net", "--", *command]

    def run(self, *command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a program on the machine."""
        environment = clean_environment(os.environ) | {"CONTAINERS_CONF": str(self.directory / "containers.conf")}
        options = {"text": True, "timeout": 120, "input": "", "cwd": "/"} | options
        done = subprocess.run(self.argv(*command), env=environment, capture_output=True, check=False, **options)
        assert not check or done.returncode == 0, f"{command}: {done.stdout!r} {done.stderr!r}"
        return done

    def path(self, name: str) -> Path:
        """A file of the machine (`etc/cni/net.d/x`), as seen from outside."""
        top, _, rest = name.partition("/")
        return self.directory / f"{top}.up" / rest

    def podman(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run podman."""
        self._podman_used = True
        # podman refuses a long runroot.
        own = ["--root", str(self.directory / "podman"), "--runroot", "/run/podman", "--tmpdir", "/run/libpod"]
        return self.run("podman", *own, *arguments, check=check)

    def start_containerd(self) -> None:
        """Start containerd and wait until it answers."""
        base = self.directory / "containerd"
        base.mkdir()
        config = base / "config.toml"
        config.write_text(_CONTAINERD.format(base=base, image=IMAGE, socket=_SOCKET))
        with (base / "log").open("wb") as log:
            self._containerd = subprocess.Popen(
                self.argv("containerd", "-c", str(config)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )
        assert wait_for(lambda: self.ctr("version", check=False).returncode == 0, 60), (base / "log").read_text()

    def ctr(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ctr in CRI's namespace of containers."""
        return self.run("ctr", "-a", _SOCKET, "-n", "k8s.io", *arguments, check=check)

    def cri(self, method: str, message: dict[int, Any]) -> dict[int, list[Any]]:
        """Call CRI, as a kubelet does; messages by field number."""
        body = encode(message)
        done = self.run(
            *("curl", "-sS", "--http2-prior-knowledge", "--unix-socket", _SOCKET),
            *("-H", "content-type: application/grpc", "-H", "te: trailers", "--data-binary", "@-", "-D", "/dev/stderr"),
            f"http://localhost/runtime.v1.RuntimeService/{method}",
            input=b"\0" + len(body).to_bytes(4, "big") + body,
            text=False,
        )
        assert b"grpc-status: 0" in done.stderr, f"{method}: {done.stderr.decode()}"
        return decode(done.stdout[5:])

    def close(self) -> None:
        """End containers, runtimes and the namespace."""
        if self._podman_used:
            self.podman("rm", "-fa", "-t0", check=False)
        if self._containerd:
            for pod in self.cri("ListPodSandbox", {}).get(1, []):
                identity = decode(pod)[1][0].decode()
                self.cri("StopPodSandbox", {1: identity})
                self.cri("RemovePodSandbox", {1: identity})
            self._containerd.terminate()
            self._containerd.wait(20)
        self._keeper.kill()
        self._keeper.wait(10)
        assert self._keeper.stdout
        self._keeper.stdout.close()


class Pod:
    """A pod with one container, by CRI."""

    def __init__(self, machine: Machine, name: str) -> None:
        self._machine = machine
        config = {
            1: {1: name, 2: f"uid-{name}", 3: "default"},
            3: str(machine.directory),
            8: {1: f"/{machine.host.netns}"},
        }
        self.id = machine.cri("RunPodSandbox", {1: config})[1][0].decode()
        status = decode(machine.cri("PodSandboxStatus", {1: self.id})[1][0])
        self.address = decode(status[5][0])[1][0].decode()
        container = {1: {1: name}, 2: {1: IMAGE}, 3: ["/bin/sleep", "1000000"], 11: f"{name}.log"}
        self._container = machine.cri("CreateContainer", {1: self.id, 2: container, 3: config})[1][0].decode()
        machine.cri("StartContainer", {1: self._container})

    def exec(self, *command: str) -> tuple[int, str]:
        """Run a program in it; exit code and output."""
        done = self._machine.cri("ExecSync", {1: self._container, 2: list(command), 3: 30})
        output = b"".join([*done.get(1, []), *done.get(2, [])])
        return done.get(3, [0])[0], output.decode()

    def remove(self) -> None:
        """Stop and remove it."""
        for method in ("StopPodSandbox", "RemovePodSandbox"):
            self._machine.cri(method, {1: self.id})


def make_image(directory: Path, machine: Machine) -> Path:
    """An image out of this machine's busybox, put into podman's store of a machine; also as an archive for containerd."""
    root, archive = busybox_image(directory), directory / "image.tar"
    subprocess.run(["tar", "-C", root, "-cf", directory / "root.tar", "."], check=True)
    machine.podman("import", "-c", 'CMD ["/bin/sleep","1000000"]', str(directory / "root.tar"), IMAGE)
    machine.podman("image", "save", "--format", "oci-archive", "-o", str(archive), IMAGE)
    return archive


def encode(message: dict[int, Any]) -> bytes:
    """A message of protocol buffers, of numbers, texts, messages and lists of them."""
    parts = []
    for number, value in message.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int):
                parts.append(_varint(number << 3) + _varint(each))
            else:
                data = encode(each) if isinstance(each, dict) else each.encode()
                parts.append(_varint(number << 3 | 2) + _varint(len(data)) + data)
    return b"".join(parts)


def decode(data: bytes) -> dict[int, list[Any]]:
    """The fields of a message: numbers, and bytes that may be texts or messages."""
    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        value, at = _read_varint(data, at)
        if tag & 7 == 2:
            fields.setdefault(tag >> 3, []).append(data[at : at + value])
            at += value
        else:
            assert tag & 7 == 0
            fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def addresses(machine: Machine) -> list[str]:
    """The addresses that host-local has given away on a machine."""
    directory = machine.path(f"var/lib/cni/networks/{machine.network}")
    return sorted(each.name for each in directory.glob("*") if each.name[0].isdigit())


def veths(machine: Machine) -> list[str]:
    """The containers' ends on a machine; eth0 is the host's own cable."""
    links = json.loads(machine.run("ip", "-j", "link", "show", "type", "veth").stdout)
    return [link["ifname"] for link in links if link.get("ifname") != "eth0"]
