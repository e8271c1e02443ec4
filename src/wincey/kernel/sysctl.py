"""Kernel settings below /proc/sys.

Reading and writing one is some microseconds and never waits, so there are no threads. The files below /proc/sys/net are
those of the network namespace of whoever opens them. A setting has no owner: it is put, and never deleted.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from wincey.kernel.driver import Desired
from wincey.model.state import Changes, Failure, Key, Object, Scope, Sysctl

_ROOT = Path("/proc/sys")


class SysctlDriver:
    """Keeps Sysctls (a kernel.driver.Driver). The kernel doesn't tell of changes: the audit finds them."""

    handles: tuple[type[Object], ...] = (Sysctl,)

    async def observe(self, desired: Desired, scope: Scope) -> dict[Key, Object]:
        """See kernel.driver.Driver. An optional setting that this kernel doesn't have at all counts as fulfilled."""
        found: dict[Key, Object] = {}
        for key, setting in desired.items():
            if not isinstance(setting, Sysctl):
                continue
            value = read(setting.path)
            if value is not None:
                found[key] = Sysctl(setting.path, value, setting.optional)
            elif setting.optional and not _possible(setting.path):
                found[key] = setting
        return found

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """See kernel.driver.Driver."""
        settings = (setting for setting in changes.put if isinstance(setting, Sysctl))
        return [Failure(setting, reason) for setting in settings if (reason := write(setting))]

    def watch(self, changed: Callable[[str], None]) -> None:
        """There is nothing to listen to."""

    async def close(self) -> None:
        """There is nothing to release."""


def read(path: str) -> str | None:
    """A setting's value, its words separated by one blank each; None if it is absent or not ours to read."""
    try:
        return " ".join((_ROOT / path).read_text(encoding="ascii").split())
    except OSError:
        return None


def _possible(path: str) -> bool:
    """Whether an absent setting may yet appear: with the device it is of, unless its whole subtree isn't there (IPv6 off)."""
    family, per_device, _ = path.partition("/conf/")
    return bool(per_device) and (_ROOT / family).is_dir()


def bridge_netfilter_note() -> str | None:
    """What it costs, in a line for the log, that bridged packets don't pass iptables here; None if they do."""
    value = read("net/bridge/bridge-nf-call-iptables")
    if value == "1":
        return None
    why, remedy = (
        ("br_netfilter is not loaded", "modprobe br_netfilter")
        if value is None
        else ("net.bridge.bridge-nf-call-iptables is 0", "sysctl -w net.bridge.bridge-nf-call-iptables=1")
    )
    return (
        f"{why}: traffic between containers on the same bridge is not seen by iptables, so a container can't reach"
        f" a Kubernetes service whose endpoint is on its own bridge; all else works (to change it: {remedy})"
    )


def write(setting: Sysctl) -> str:
    """Why it could not be written, "" if it was."""
    what = f"sysctl {setting.path} = {setting.value}"
    try:
        # Not Path.write_text: that would make the file in a directory that is no sysctl.
        descriptor = os.open(_ROOT / setting.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, f"{setting.value}\n".encode())
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return "" if setting.optional else f"{what}: this kernel, or device, has no such setting"
    except PermissionError:
        return f"{what}: not permitted (needs root or CAP_NET_ADMIN and a writable /proc/sys)"
    except OSError as error:
        read_only = "; mount /proc/sys writable, or set it on the host" if error.errno == errno.EROFS else ""
        return f"{what}: {error.strerror}{read_only}"
    return ""
