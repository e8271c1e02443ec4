"""A host of a lab as a machine of its own, so that commands from a page run as they are printed there.

A network namespace alone shares /run, /etc and /var with everyone. A machine adds a mount namespace in which /run is empty,
/etc, /var and /opt take changes that nobody else sees, and /opt/wincey/bin has our programs. It lives in the mount
namespace of one sleeping process and is gone with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.dockerd import DAEMON_JSON, busybox_image, daemon_json, remove_cgroups
from support.keys import wait_until
from wincey.lab.node import Host
from wincey.lab.process import clean_environment

PROGRAMS = Path(sys.executable).parent

_SETUP = """
set -e
for each in etc var opt; do
    mkdir -p "$0/$each.up" "$0/$each.work"
    mount -t overlay overlay -o "lowerdir=/$each,upperdir=$0/$each.up,workdir=$0/$each.work" "/$each"
done
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /opt/wincey /etc/docker /var/lib/docker "$0/docker"
# A store of images on an overlay can't hold overlays itself.
mount --bind "$0/docker" /var/lib/docker
ln -s "$1" /opt/wincey/bin
ln -sf /run/resolv.conf /etc/resolv.conf
echo ready
exec sleep infinity
"""


class Machine:
    """One host. `close` stops its engine and leaves the rest to the lab, which ends all who live in its namespace."""

    def __init__(self, host: Host, directory: Path) -> None:
        self.host, self.name, self.directory = host, host.name, directory
        directory.mkdir(parents=True)
        self._keeper = host.popen(
            ["unshare", "--mount", "--propagation", "slave", "sh", "-c", _SETUP, str(directory), str(PROGRAMS)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._keeper.stdout
        assert self._keeper.stdout.readline() == "ready\n"
        # What a page need not say: how an engine must be set up to run beside others on this machine.
        self.write(DAEMON_JSON, daemon_json(host.netns))

    def argv(self, *command: str) -> list[str]:
        """The command that runs another one on this machine."""
        return [
            "nsenter",
            "--mount",
            f"--target={self._keeper.pid}",
            f"--net=/proc/{self._keeper.pid}/ns/net",
            "--",
            *command,
        ]

    def run(self, *command: str, timeout: float = 60, **options: object) -> subprocess.CompletedProcess[str]:
        """Run a program on the machine."""
        environment = clean_environment(os.environ) | {"PATH": f"/opt/wincey/bin:{os.environ['PATH']}:/usr/sbin:/sbin"}
        return subprocess.run(  # type: ignore[call-overload,no-any-return]  # options of the caller
            self.argv(*command),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd="/",
            env=environment,
            **options,
        )

    def sh(self, script: str, timeout: float = 60) -> str:
        """Run a shell script that has to succeed; what it prints. Programs that it leaves running must not hold its output."""
        done = self.run("sh", "-ec", script, timeout=timeout, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, (
            f"on {self.name}: {script}\nexit code {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout

    def write(self, path: str, text: str) -> None:
        """Write a file on the machine."""
        assert self.run("sh", "-c", 'mkdir -p "${0%/*}" && cat >"$0"', path, input=text).returncode == 0

    def read(self, path: str) -> str:
        """A file of the machine."""
        return self.sh(f"cat {path}")

    # --- Docker -------------------------------------------------------------------------------------------------------

    def start_docker(self, *flags: str) -> None:
        """Start an engine and wait until it answers."""
        self.sh("setsid dockerd " + " ".join(flags) + " >>/var/log/dockerd.log 2>&1 </dev/null &")
        self.wait_docker()

    def wait_docker(self) -> None:
        """Wait until the engine answers, or has ended."""
        wait_until(lambda: self.run("docker", "info").returncode == 0 or self._docker_ended(), timeout=60)
        assert self.run("docker", "info").returncode == 0, self.read("/var/log/dockerd.log")[-3000:]

    def import_busybox(self, name: str = "busybox") -> None:
        """An image out of the machine's own busybox, as no registry is asked."""
        root = busybox_image(self.directory)
        self.sh(f"tar -C {root} -c . | docker import - {name}")

    def container(self, name: str, *command: str, image: str = "busybox") -> str:
        """Run a container; its address."""
        self.sh(f"docker run -d --name {name} --stop-signal KILL {image} {' '.join(command or ('sleep', '1000000'))}")
        return self.container_address(name)

    def container_address(self, name: str) -> str:
        """A container's address."""
        return self.sh("docker inspect -f '{{.NetworkSettings.IPAddress}}' " + name).strip()

    def stop_docker(self) -> None:
        """End the containers and the engine, if it runs."""
        if self._docker_pid() is None:
            return
        self.run("sh", "-c", "docker ps -q | xargs -r docker kill")
        self.run("sh", "-c", "kill $(cat /run/docker.pid)")
        wait_until(lambda: self._docker_pid() is None, timeout=60)

    def close(self) -> None:
        """Stop the engine; the machine itself ends with its namespaces."""
        try:
            self.stop_docker()
        finally:
            self._keeper.kill()
            self._keeper.wait()
            assert self._keeper.stdout
            self._keeper.stdout.close()
            remove_cgroups(self.host.netns)

    def _docker_pid(self) -> int | None:
        done = self.run("cat", "/run/docker.pid")
        return int(done.stdout) if done.returncode == 0 and Path(f"/proc/{done.stdout.strip()}").exists() else None

    def _docker_ended(self) -> bool:
        """Whether the engine wrote its pid and is gone, or never got so far."""
        done = self.run("cat", "/run/docker.pid")
        return done.returncode == 0 and not Path(f"/proc/{done.stdout.strip()}").exists()
