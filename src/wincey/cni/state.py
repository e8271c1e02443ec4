"""What ADD leaves behind: `<dataDir>/<container id>`, the delegate's config, byte for byte as flannel writes it (0600).

DEL hands it to the delegate again, whatever subnet.env or the netconf have become meanwhile. Beside these files we keep
`.attachments/<container id>:<interface>`: the network and the namespace of each attachment. Without them GC could not remove
an interface, and a container in two networks, which has one file, would leak an address (with flannel it does). A container
id can't begin with a dot, so flannel never looks there.
"""

from __future__ import annotations

import os

from wincey.cni.jsontext import decode
from wincey.cni.protocol import INTERNAL, CniError, is_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ATTACHMENTS = ".attachments"


class StateDir:
    """The state directory. A file in it is there as a whole or not at all."""

    def __init__(self, path: str) -> None:
        self.path = path

    def file(self, container: str) -> str:
        """The path of a container's file."""
        return f"{self.path}/{container}"

    def write(self, network: str, container: str, interface: str, netns: str, config: bytes) -> None:
        """Remember an attachment; raises CniError."""
        attachment = f"{network}\n{netns}\n{_identity(netns)}\n"
        draft = f"{self.path}/.{container}"
        before = os.umask(0o022)  # the runtime's may be 0, and the delegate gets that one
        try:
            for directory in (self.path, f"{self.path}/{_ATTACHMENTS}"):
                if not os.path.isdir(directory):
                    os.makedirs(directory, mode=0o700, exist_ok=True)  # its parents are for all to see
            _write(f"{self.path}/{_ATTACHMENTS}/{container}:{interface}", attachment.encode())
            _write(draft, config, sync=True)
            os.rename(draft, self.file(container))
        except OSError as error:
            raise CniError(INTERNAL, f"failed to save the state for DEL: {error}") from None
        finally:
            os.umask(before)

    def read(self, container: str) -> tuple[bytes, dict[str, Any]] | None:
        """A container's file, as it is and decoded; None when there is none. Raises ValueError for one that can't be read."""
        try:
            with open(self.file(container), "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(str(error)) from None
        config = decode(data)
        if not isinstance(config, dict) or not isinstance(config.get("type"), str):
            raise ValueError("it is no config of a delegate")
        return data, config

    def forget(self, container: str, interface: str) -> None:
        """An attachment is no more. The container's file goes with the last one; raises nothing when it is gone already."""
        for path in (f"{self.path}/{_ATTACHMENTS}/{container}:{interface}", f"{self.path}/.{container}"):
            _remove(path)
        if container not in self.attached():
            _remove(self.file(container))

    def containers(self) -> list[str]:
        """The containers that have a file."""
        return sorted(name for name in _listed(self.path) if is_name(name))

    def attached(self) -> set[str]:
        """The containers with an attachment that we made, in any network."""
        return {name.partition(":")[0] for name in _listed(f"{self.path}/{_ATTACHMENTS}")}

    def attachments(self, network: str) -> list[tuple[str, str, str]]:
        """Those that we made in a network: container id, interface, and the path of the namespace.

        The path is "" when the namespace is gone or unknown, or when there is another one by now.
        """
        found = []
        for name in sorted(_listed(f"{self.path}/{_ATTACHMENTS}")):
            container, _, interface = name.partition(":")
            try:
                with open(f"{self.path}/{_ATTACHMENTS}/{name}", encoding="utf-8") as file:
                    its_network, netns, identity = file.read().splitlines()
            except FileNotFoundError:
                continue  # gone since
            except (OSError, ValueError):  # cut off by a crash
                if self.may_be_of(container, network):
                    found.append((container, interface, ""))
                continue
            if its_network == network:
                found.append((container, interface, netns if identity and identity == _identity(netns) else ""))
        return found

    def may_be_of(self, container: str, network: str) -> bool:
        """Whether a container's file is of a network, or of no use to any other."""
        try:
            saved = self.read(container)
        except ValueError:
            return True
        return saved is None or saved[1].get("name") == network


def _identity(netns: str) -> str:
    """What tells a namespace from a later one with the same path: its inode, which is used again, and since when it is there."""
    try:
        status = os.stat(netns)
    except OSError:
        return ""
    return f"{status.st_ino} {status.st_ctime_ns}"


def _write(path: str, data: bytes, *, sync: bool = False) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, data)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CniError(INTERNAL, f"failed to remove {path}: {error.strerror}") from None


def _listed(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []
