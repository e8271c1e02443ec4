"""What a lab needs from the machine, said in one line when it is not there."""

from __future__ import annotations

import os
import shutil

from wincey.lab.errors import LabError
from wincey.lab.ovs import PROGRAMS as OVS_PROGRAMS
from wincey.lab.ovs import uses_ovs
from wincey.lab.plan import LabSpec
from wincey.model.ovs import PACKAGE as OVS_PACKAGE

_PACKAGES = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "ping": "iputils-ping",
    "etcd": "etcd-server",
    "ethtool": "ethtool",
}


def extend_path() -> None:
    """Add the directories of system programs to PATH: sudo and cron often leave them out."""
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    extra = [each for each in ("/usr/local/sbin", "/usr/sbin", "/sbin") if each not in path]
    os.environ["PATH"] = os.pathsep.join([*path, *extra])


def check_root() -> None:
    """Raise LabError unless we are root."""
    if os.geteuid() != 0:
        raise LabError("a lab makes network namespaces, which needs root: run the command with sudo")


def check_needs(spec: LabSpec) -> None:
    """Raise LabError for the programs that this lab needs and the machine lacks, with the packages to install."""
    check_root()
    wanted = ["ip", "nsenter", "ping"]
    if spec.store != "sqlite":
        wanted.append("etcd")
    if spec.segmenting:
        wanted.append("ethtool")
    if uses_ovs(spec):
        wanted += OVS_PROGRAMS
    missing = [program for program in wanted if not shutil.which(program)]
    if missing:
        packages = " ".join(dict.fromkeys(_PACKAGES.get(program, OVS_PACKAGE) for program in missing))
        raise LabError(f"the lab needs {', '.join(missing)}: install it, on Debian with apt-get install {packages}")
