"""subnet.env: what container runtimes are told about this host (compatibility reference, section 4.1).

The file is written byte for byte as flannel does, and replaced as a whole: a reader sees the old one or the new one, also
after a power cut. It is read again at the next start, for the subnet that this host had, and so by the syntax of dotenv
files, as people and tools edit it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket

import msgspec

from wincey.model.address import Subnet
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadAddress
from wincey.model.lease import LeaseKey

log = logging.getLogger(__name__)

_FAMILIES = ((socket.AF_INET, "FLANNEL"), (socket.AF_INET6, "FLANNEL_IPV6"))
_LINE = re.compile(
    r"""\s*(?:export\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*[=:]\s*
    (?:'(?P<literal>[^']*)' | "(?P<quoted>(?:[^"\\]|\\.)*)" | (?P<plain>.*?))
    \s*(?:(?<=\s)\#.*)?\Z""",
    re.VERBOSE,
)


class EnvFile(msgspec.Struct, frozen=True):
    """The file's content, IPv4 first. A subnet is its first host address with the subnet's length: `10.3.1.1/24`.

    mtu: bytes, 0 when a file that was read has none.
    """

    networks: tuple[Subnet, ...] = ()
    subnets: tuple[Subnet, ...] = ()
    mtu: int = 0
    ip_masq: bool = False

    @classmethod
    def of(cls, config: NetworkConfig, key: LeaseKey, *, mtu: int, ip_masq: bool) -> EnvFile:
        """What is to be told about a host that holds a lease."""
        return cls(
            config.networks, tuple(Subnet(subnet.host(1), subnet.length) for subnet in key.subnets), mtu, ip_masq
        )

    def render(self) -> bytes:
        """The file's bytes."""
        lines = []
        for family, prefix in _FAMILIES:
            for word, values in (("NETWORK", self.networks), ("SUBNET", self.subnets)):
                if text := ",".join(str(value) for value in values if value.family == family):
                    lines.append(f"{prefix}_{word}={text}\n")
        lines.append(f"FLANNEL_MTU={self.mtu}\n")
        lines.append(f"FLANNEL_IPMASQ={'true' if self.ip_masq else 'false'}\n")
        return "".join(lines).encode()

    @classmethod
    def parse(cls, text: str) -> EnvFile:
        """Read a file's text. Whatever can't be read is left out: a line, or one subnet of a list."""
        variables = {match["name"]: _value(match) for line in text.splitlines() if (match := _LINE.match(line))}
        networks: list[Subnet] = []
        subnets: list[Subnet] = []
        for family, prefix in _FAMILIES:
            networks += (subnet.masked() for subnet in _subnets(variables.get(f"{prefix}_NETWORK", ""), family))
            subnets += _subnets(variables.get(f"{prefix}_SUBNET", ""), family)
        mtu = variables.get("FLANNEL_MTU", "")
        return cls(
            tuple(networks),
            tuple(subnets),
            int(mtu) if re.fullmatch("[0-9]{1,9}", mtu) else 0,
            variables.get("FLANNEL_IPMASQ") == "true",
        )


def read_env_file(path: str) -> EnvFile:
    """What an earlier run of ours or of flannel left; empty when there is no such file or it can't be read."""
    try:
        with open(path, "rb") as file:
            return EnvFile.parse(file.read(1 << 20).decode(errors="replace"))
    except FileNotFoundError:
        return EnvFile()
    except OSError as error:
        log.warning("%s can't be read (%s): going on without knowing an earlier subnet", path, error.strerror)
        return EnvFile()


def write_env_file(path: str, env: EnvFile) -> None:
    """Replace the file; raises OSError. Its directory is made (0755) if need be, the file is 0644 whatever the umask."""
    directory, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(directory):
        os.makedirs(directory, exist_ok=True)
        os.chmod(directory, 0o755)  # noqa: S103  # the runtimes that read the file need not be root
    draft = os.path.join(directory, f".{name}.{os.urandom(6).hex()}")
    try:
        # No one else writes a draft of this name: two daemons may well share a directory, and not their process ids.
        with open(draft, "xb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(env.render())
            file.flush()
            os.fsync(file.fileno())
        os.rename(draft, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
        raise


class EnvPublisher:
    """Keeps the file up to date for one run. `previous` is what an earlier one left, `written` what this one wrote."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.previous = read_env_file(path)
        self.written: EnvFile | None = None

    def publish(self, env: EnvFile) -> str | None:
        """Write it unless it is written already; why that is not possible, None if it is."""
        if env == self.written:
            return None
        try:
            write_env_file(self._path, env)
        except OSError as error:
            reason = f"{self._path} can't be written: {error.strerror}; containers can't be started until it can"
            log.error("%s", reason)
            return reason
        before = (self.written or self.previous).subnets
        if before and before != env.subnets:
            log.warning(
                "the subnet of this host changed from %s to %s: restart the container runtime so that it follows",
                ", ".join(map(str, before)), ", ".join(map(str, env.subnets)),
            )  # fmt: skip
        subnets = ", ".join(map(str, env.subnets))
        log.info("wrote %s: %s, MTU %d; containers can be started", self._path, subnets, env.mtu)
        self.written = env
        return None


def _value(match: re.Match[str]) -> str:
    if match["quoted"] is not None:
        return re.sub(r"\\(.)", r"\1", match["quoted"])
    return match["literal"] if match["literal"] is not None else match["plain"]


def _subnets(text: str, family: int) -> list[Subnet]:
    found = []
    for part in text.split(","):
        with contextlib.suppress(BadAddress):
            subnet = Subnet.parse(part.strip())
            if subnet.family == family:
                found.append(subnet)
    return found
