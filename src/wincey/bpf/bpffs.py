"""bpffs: the file system whose files are maps, programs and links of the kernel. What is pinned there outlives its maker.

    /sys/fs/bpf/wincey/OWNER/link_...               attachments
    /sys/fs/bpf/wincey/OWNER/DIGEST/map_NAME        of one release's programs (see objects)
    /sys/fs/bpf/wincey/OWNER/DIGEST/prog_NAME

OWNER is made of the network namespace and the network's run-time directory, so that hosts of a lab and networks of a host, which may
share one mount, never meet. Its file names can't have a dot.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from wincey.bpf import syscall
from wincey.bpf.syscall import BpfError

MOUNT = Path("/sys/fs/bpf")
_ROOT = "wincey"
_NOSUID_NODEV_NOEXEC = 0x2 | 0x4 | 0x8


class NoBpffs(BpfError):
    """There is no bpffs, and none can be mounted."""


def ensure_mounted(mount: Path = MOUNT) -> None:
    """Mount it where everybody has it, if nobody has yet. Raises NoBpffs."""
    if mounted(mount):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(mount), b"bpf", ctypes.c_ulong(_NOSUID_NODEV_NOEXEC), b"mode=0700"):
        raise NoBpffs(
            f"no bpffs at {mount} and it can't be mounted (`mount -t bpf bpf {mount}`, or give the container the host's)",
            ctypes.get_errno(),
        )


def mounted(mount: Path = MOUNT) -> bool:
    """Whether a bpffs is there."""
    with open("/proc/self/mountinfo") as table:
        for line in table:
            fields = line.split()
            if fields[4] == str(mount):
                return fields[fields.index("-") + 1] == "bpf"
    return False


def owner_directory(name: str, state: Path, mount: Path = MOUNT) -> Path:
    """Where one owner's pins lie. name: what keeps them, such as `udp`. state: the network's run-time directory."""
    namespace = os.stat("/proc/thread-self/ns/net").st_ino
    digest = hashlib.sha256(f"{namespace} {state.absolute()}".encode()).hexdigest()[:16]
    return mount / _ROOT / f"{name}_{digest}"


def mount_of(directory: Path) -> Path:
    """The mount that an owner's directory lies in."""
    return directory.parent.parent


def encoded(device: str) -> str:
    """A device's name as a part of a file name: bpffs knows no dots."""
    return device.replace("%", "%25").replace(".", "%2e").replace("_", "%5f")


def decoded(part: str) -> str:
    """The other way."""
    return part.replace("%5f", "_").replace("%2e", ".").replace("%25", "%")


def remove(directory: Path) -> None:
    """Unpin all that is in a directory, and it; none is no error."""
    shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Have no other process change what is pinned, of any owner, meanwhile. directory: an owner's. Raises BpfError.

    Two daemons of one owner, of which one retires what the other is making, would lose what is in the maps.
    """
    ensure_mounted(mount_of(directory))
    root = directory.parent
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise BpfError(f"directory {root}", error.errno or 0) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def sweep(mount: Path = MOUNT) -> None:
    """Remove the pins of owners all of whose devices are gone: of hosts of a lab, of containers that died.

    Raises nothing: what can't be read is left alone. To be called `alone`.
    """
    root = mount / _ROOT
    if not root.is_dir():
        return
    for owner in root.iterdir():
        links = list(owner.glob("link_*"))
        if links and all(_dead(link) for link in links):
            remove(owner)


def _dead(pin: Path) -> bool:
    try:
        link = syscall.obj_get(str(pin))
        if link is None:
            return True
        try:
            return syscall.link_info(link)[1] == 0
        finally:
            os.close(link)
    except BpfError:
        return False
