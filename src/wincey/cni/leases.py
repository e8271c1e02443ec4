"""host-local's files: `<dataDir>/<network>/<address>`, in each the container id and, since 0.7, its interface.

They are read and removed under host-local's own lock, so that no address is given away and freed at the same time.
"""

from __future__ import annotations

import fcntl
import os

from wincey.cni.netconf import HOST_LOCAL_DATA, NetConf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def release(conf: NetConf, leaked: Callable[[str, str], bool]) -> list[str]:
    """Free the addresses of this network that `leaked` is true for; returns them.

    `leaked` is given a container id and an interface, "" where an old host-local wrote none. Does nothing for another IPAM.
    """
    if conf.ipam.get("type", "host-local") != "host-local":
        return []
    base = conf.ipam.get("dataDir")
    directory = f"{base if isinstance(base, str) and base else HOST_LOCAL_DATA}/{conf.name}"
    try:
        lock = os.open(f"{directory}/lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return []  # no address was ever given
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _release(directory, leaked)
    finally:
        os.close(lock)


def _release(directory: str, leaked: Callable[[str, str], bool]) -> list[str]:
    freed = []
    for name in sorted(os.listdir(directory)):
        if name == "lock" or name.startswith("last_reserved_ip."):
            continue
        path = f"{directory}/{name}"
        with open(path, encoding="utf-8", errors="replace") as file:
            container, _, interface = file.read().strip().partition("\n")
        if leaked(container.strip(), interface.strip()):
            os.unlink(path)
            freed.append(name)
    return freed
