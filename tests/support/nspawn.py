"""systemd as PID 1, on an overlay of this machine's root, in the network namespace of a lab's host.

Units run with the real Python and tree, and nothing is written outside. There is no registration with this machine's own
systemd, of which there may be none.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.dockerd import remove_cgroups
from support.keys import wait_until
from wincey.lab.node import Host
from wincey.lab.process import clean_environment

PROGRAMS = Path(sys.executable).parent
TREE = Path(__file__).parents[2]

# A machine has these writable; nspawn mounts them read-only.
_WRITABLE = """[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'mount -o remount,rw,bind /proc/sys; for each in /sys/fs/cgroup/*/; do mount -o remount,rw,bind $$each; done'
"""

# Of what this machine has installed, only what a test names is started.
_MASKED = (
    *("systemd-udevd.service", "systemd-timesyncd.service", "systemd-resolved.service", "systemd-networkd.service"),
    *("containerd.service", "etcd.service", "docker.service", "docker.socket"),
)


def require_nspawn() -> None:
    """Skip where systemd can't be booted."""
    if os.geteuid():
        pytest.skip("needs root: systemd-nspawn")
    if not shutil.which("systemd-nspawn"):
        pytest.skip("systemd-nspawn is not installed: apt-get install systemd-container")


class Booted:
    """One boot. files: path to text, put into the root beforehand; those that it masks by default may be among them.

    wants: the units that the boot's target starts. shared: directories of this machine that are mounted as they are.
    """

    def __init__(
        self, host: Host, directory: Path, *, files: dict[str, str], wants: list[str], shared: dict[Path, str]
    ) -> None:
        self.host, self.root, self._overlay = host, directory / "root", directory / "overlay"
        self.root.mkdir(parents=True)
        self._overlay.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", self._overlay]
        subprocess.run(mount, check=True)
        try:
            for each in ("up", "work"):
                (self._overlay / each).mkdir()
            layers = f"lowerdir=/,upperdir={self._overlay}/up,workdir={self._overlay}/work"
            subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, self.root], check=True)
        except BaseException:
            subprocess.run(["umount", self._overlay], check=False)
            raise
        self._log = directory / "console.log"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._init = 0
        try:
            self._furnish(files, wants)
            self._boot(shared)
        except BaseException:
            self.close()
            raise

    def _furnish(self, files: dict[str, str], wants: list[str]) -> None:
        units = self.root / "etc/systemd/system"
        for name in _MASKED:
            (units / name).unlink(missing_ok=True)
            (units / name).symlink_to("/dev/null")
        target = "[Unit]\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\n"
        for path, text in {
            "/etc/systemd/system/test.target": target,
            "/etc/machine-id": "",
            "/etc/hostname": f"{self.host.name}\n",
            "/etc/systemd/system/writable.service": _WRITABLE,
            **files,
        }.items():
            file = self.root / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
            file.write_text(text)
            file.chmod(0o755 if text.startswith("#!") else 0o644)
        # A unit with a /tmp of its own, or without /home, has to see the tree where it was cloned.
        # Not Docker's: such a unit gets its mounts to itself, and containerd would not see the engine's.
        ours = {Path(path).name for path, text in files.items() if path.endswith(".service") and "/opt/wincey" in text}
        for unit in {"flanneld.service", *ours}:
            drop_in = units / f"{unit}.d" / "99-tree.conf"
            drop_in.parent.mkdir(exist_ok=True)
            drop_in.write_text(f"[Service]\nBindReadOnlyPaths={TREE}\n")
        (self.root / "opt/wincey").mkdir(parents=True)
        (self.root / "opt/wincey/bin").symlink_to(PROGRAMS)
        # Where the package has them.
        (self.root / "opt/wincey/share/wincey").mkdir(parents=True)
        (self.root / "opt/wincey/share/wincey/systemd").symlink_to(TREE / "packaging" / "systemd")
        for target, names in (("test.target", wants), ("sysinit.target", ["writable.service"])):
            (units / f"{target}.wants").mkdir(exist_ok=True)
            for name in names:
                (units / f"{target}.wants" / name).symlink_to(f"/etc/systemd/system/{name}")

    def _boot(self, shared: dict[Path, str]) -> None:
        # Without a group of its own a machine would share that of every other one, and kill their processes for its own.
        base = Path("/sys/fs/cgroup")
        groups = [base / each / self.host.netns for each in ("systemd", "unified") if (base / each).is_dir()]
        groups = groups or [base / self.host.netns]
        for group in groups:
            group.mkdir()
        enter = 'for each in $GROUPS_; do echo $$ >$each/cgroup.procs; done; exec systemd-nspawn "$@"'
        with self._log.open("wb") as log:
            self._nspawn = subprocess.Popen(
                [
                    *(
                        "sh",
                        "-c",
                        enter,
                        "sh",
                        "-q",
                        "--register=no",
                        "--keep-unit",
                        "--capability=CAP_NET_ADMIN",
                        "--system-call-filter=@keyring",
                        "-D",
                        self.root,
                    ),
                    f"--machine={self.host.netns}",
                    f"--network-namespace-path=/run/netns/{self.host.netns}",
                    # Wherever the tree lies: nspawn puts a /tmp of its own over this machine's, and the overlay shows
                    # nothing of other file systems.
                    f"--bind-ro={TREE}",
                    *(f"--bind={outside}:{inside}" for outside, inside in shared.items()),
                    *("--boot", "systemd.unit=test.target"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=clean_environment(os.environ) | {"GROUPS_": " ".join(map(str, groups))},
            )
        wait_until(lambda: self._ended() or b"Reached target" in self._log.read_bytes(), timeout=60)
        assert not self._ended(), self._log.read_text(errors="replace")
        # The payload's first process, also when nspawn has helpers of its own.
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        self._init = int(children[0])

    def run(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a program inside."""
        enter = ["nsenter", f"--target={self._init}", "--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup", "--"]
        environment = {"PATH": "/opt/wincey/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        return subprocess.run(
            [*enter, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=environment,
            cwd="/",
        )

    def sh(self, script: str, timeout: float = 120) -> str:
        """Run a shell script that has to succeed; what it prints. Programs that it leaves running must not hold its output."""
        done = self.run("bash", "-ec", script, timeout=timeout)
        assert done.returncode == 0, (
            f"on {self.host.name}: {script}\nexit code {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", unit, "--value", "-p", name).stdout.strip()

    def journal(self, unit: str) -> str:
        """What a unit said."""
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit).stdout

    def wait_state(self, unit: str, state: str = "active") -> None:
        """Wait until a unit is in a state."""
        try:
            wait_until(lambda: self.show(unit, "ActiveState") == state, timeout=60)
        except AssertionError:
            pytest.fail(f"{unit} is {self.show(unit, 'ActiveState')}, not {state}:\n{self.journal(unit)[-4000:]}")

    def close(self) -> None:
        """Power off, and remove every trace."""
        if self._nspawn and not self._ended():
            if self._init:
                os.kill(self._init, signal.SIGRTMIN + 4)  # systemd: power off
            try:
                self._nspawn.wait(20 if self._init else 0)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        remove_cgroups(self.host.netns)
        for path in (self.root, self._overlay):
            subprocess.run(["umount", path], check=True)

    def _ended(self) -> bool:
        return self._nspawn is None or self._nspawn.poll() is not None
