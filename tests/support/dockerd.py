"""What a test must prepare so that Docker engines run side by side on this machine, and an image without a registry."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

DAEMON_JSON = "/etc/docker/daemon.json"


def require_docker() -> None:
    """Skip where there is no Docker."""
    for program in ("dockerd", "docker", "busybox"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed: apt-get install docker.io busybox-static")


def daemon_json(cgroup: str) -> str:
    """The engine's settings file: containers in a control group of their own, which `remove_cgroups` removes."""
    return json.dumps(
        {
            "storage-driver": "overlay2",
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "cgroup-parent": f"/{cgroup}",
            "userland-proxy": False,
        }
    )


def remove_cgroups(cgroup: str) -> None:
    """Remove the control groups that an engine has left."""
    for group in [path for path in Path("/sys/fs/cgroup").glob(f"**/{cgroup}") if path.is_dir()]:
        for path in sorted(group.glob("**/"), reverse=True):
            with contextlib.suppress(OSError):  # the kernel may still be emptying it
                path.rmdir()


def busybox_image(directory: Path) -> Path:
    """The root of an image out of this machine's busybox, with a page to serve in /www."""
    root = directory / "image"
    if not root.exists():
        for each in ("bin", "etc", "tmp", "proc", "sys", "dev", "www"):
            (root / each).mkdir(parents=True)
        shutil.copy(shutil.which("busybox") or "", root / "bin" / "busybox")
        subprocess.run(["chroot", root, "/bin/busybox", "--install", "-s", "/bin"], check=True)
        (root / "www" / "index.html").write_text("Welcome\n")
    return root
