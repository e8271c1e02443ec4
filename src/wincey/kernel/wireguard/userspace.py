"""wireguard-go: a process of its own for each device, which outlives the daemon and is found again by its control socket.

Its socket is /var/run/wireguard/DEVICE.sock, fixed at build time, and all network namespaces of a machine share that
directory. That is right for a host, where `wg show` then works as with the kernel's devices. Where several hosts live on one
machine, as in a lab, WIREGUARD_SOCKET_DIR gives each a directory of its own: wireguard-go then runs in a mount namespace in
which that directory lies over /var/run/wireguard (this takes CAP_SYS_ADMIN). A socket whose process is in another network
namespace than ours is never spoken to.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path

from wincey.kernel import rtnl
from wincey.kernel.links import read_link
from wincey.kernel.netlink import Netlink
from wincey.kernel.program import find, search_path
from wincey.kernel.wireguard import uapi
from wincey.kernel.wireguard.values import DeviceEdit, DeviceState, WireguardError

PROGRAM = "wireguard-go"
USUAL_DIRECTORY = "/var/run/wireguard"

_START = 20.0  # seconds
_ANSWER = 20.0  # seconds; with thousands of peers it takes one
_END = 5.0  # seconds
_POLL = 0.02
_LIMIT = 1 << 16
_LISTENING = "00010000"  # the flag of listening sockets in /proc/net/unix

# The shell is the one that has to be in the new mount namespace.
_IN_PRIVATE = 'mount --bind "$1" "$2" && exec "$3" "$4"'


def find_program() -> str | None:
    """The path of wireguard-go, None when it is not installed."""
    return find(PROGRAM)


class Userspace:
    """Devices of wireguard-go, in the network namespace that this is made in."""

    def __init__(self) -> None:
        self._links = Netlink()
        self._directory = Path(os.environ.get("WIREGUARD_SOCKET_DIR") or USUAL_DIRECTORY)
        self._ours: dict[str, tuple[int, int]] = {}

    async def make(self, device: str) -> None:
        """See Running."""
        link = read_link(self._links, device)
        if link is None:
            await self._ended(device)
            await self._launch(device)
            link = read_link(self._links, device)
        elif link.kind != "tun" or not self._listens(device):
            raise WireguardError(
                f"device {device} is already there and not wireguard-go's: rename or remove it (`ip link delete {device}`)"
            )
        if link is None:
            raise WireguardError(f"{PROGRAM} started, but device {device} is not there")
        if refusal := self._links.transact([rtnl.encode_link(rtnl.RTM_NEWLINK, 0, index=link.index, up=True)]).get(0):
            raise WireguardError(f"device {device} can't be brought up: {refusal}")

    async def remove(self, device: str) -> None:
        """Delete the device, which ends its process."""
        link = read_link(self._links, device)
        if link and (refusal := self._links.transact([rtnl.encode_link(rtnl.RTM_DELLINK, 0, index=link.index)]).get(0)):
            raise WireguardError(f"device {device} can't be deleted: {refusal}")
        await self._ended(device)
        self._ours.pop(device, None)

    async def read(self, device: str) -> DeviceState | None:
        """See Running."""
        answer = await self._ask(device, uapi.GET)
        return None if answer is None else uapi.decode_device(answer)

    async def change(self, device: str, edit: DeviceEdit) -> None:
        """See Running."""
        if edit.port is not None:
            self._check_port(edit.port, await self.read(device))
        answer = await self._ask(device, uapi.encode_change(edit))
        if answer is None:
            raise WireguardError(f"{PROGRAM} does not run for device {device}")
        if number := uapi.decode_answer(answer):
            raise WireguardError(f"{PROGRAM} refused a change of {device}: {os.strerror(number)}")

    def close(self) -> None:
        """Leave the processes to themselves."""
        self._links.close()

    async def _ended(self, device: str) -> None:
        """Wait a little for the process of a device that is gone: a successor must not meet its socket."""
        for _ in range(int(_END / _POLL)):
            if not self._listens(device):
                return
            await asyncio.sleep(_POLL)

    def _path(self, device: str) -> Path:
        return self._directory / f"{device}.sock"

    async def _ask(self, device: str, request: bytes) -> bytes | None:
        """Send a request and return the whole answer; None when nobody listens."""
        sock = self._connect(device)
        if sock is None:
            return None
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=_LIMIT)
        answer = bytearray()
        try:
            async with asyncio.timeout(_ANSWER):
                writer.write(request)
                await writer.drain()
                while not answer.endswith(uapi.END):
                    data = await reader.read(_LIMIT)
                    if not data:
                        raise WireguardError(f"{PROGRAM} for {device} ended while it was asked")
                    answer += data
        except TimeoutError:
            raise WireguardError(f"{PROGRAM} for {device} did not answer within {_ANSWER:.0f} s") from None
        except OSError as error:
            raise WireguardError(f"{PROGRAM} for {device}: {error.strerror}") from None
        finally:
            writer.close()
        return bytes(answer)

    def _listens(self, device: str) -> bool:
        sock = self._connect(device)
        if sock is None:
            return False
        sock.close()
        return True

    def _connect(self, device: str) -> socket.socket | None:
        path = self._path(device)
        try:
            status = path.stat()
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                sock.connect(os.fspath(path))
            except BaseException:
                sock.close()
                raise
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            return None
        except OSError as error:
            raise WireguardError(f"the control socket {path} of {PROGRAM}: {error.strerror or error}") from None
        identity = status.st_dev, status.st_ino
        if self._ours.get(device) != identity:
            if not _listens_here(device):
                sock.close()
                raise WireguardError(
                    f"the control socket {path} belongs to a {PROGRAM} in another network namespace; set"
                    " WIREGUARD_SOCKET_DIR to a directory of this host's own"
                )
            self._ours[device] = identity
        return sock

    async def _launch(self, device: str) -> None:
        program = find_program()
        if program is None:
            raise WireguardError(f"{PROGRAM} is not installed (Debian package wireguard-go)")
        command = [program, device]
        if os.fspath(self._directory) != USUAL_DIRECTORY:
            shell = ["sh", "-c", _IN_PRIVATE, "sh", os.fspath(self._directory), USUAL_DIRECTORY, *command]
            command = ["unshare", "--mount", "--propagation", "private", "--", *shell]
        # It lives long and needs no store password. With LOG_LEVEL set it would keep our pipe open.
        environment = {"PATH": search_path(), "LC_ALL": "C"}
        try:
            for directory in {self._directory, Path(USUAL_DIRECTORY)}:
                directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            raise WireguardError(f"{PROGRAM} can't be started: {error.strerror}: {error.filename}") from None
        try:
            async with asyncio.timeout(_START):  # it forwards from a child of its own, and this one ends
                _, words = await process.communicate()
        except TimeoutError:
            raise WireguardError(f"{PROGRAM} did not start within {_START:.0f} s") from None
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode:
            raise WireguardError(
                f"{PROGRAM} did not start: {_reason(words.decode(errors='replace'), process.returncode)}"
            )

    def _check_port(self, port: int, state: DeviceState | None) -> None:
        """Raise WireguardError when a port is taken: wireguard-go itself tells nobody."""
        if state and state.port == port:
            return
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                with socket.socket(family, socket.SOCK_DGRAM) as probe:
                    if family == socket.AF_INET6:
                        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    probe.bind(("", port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise WireguardError(
                        f"UDP port {port} is taken by another program: choose another ListenPort"
                    ) from None


def _listens_here(device: str) -> bool:
    """Whether a socket of wireguard-go's name listens in this network namespace.

    The far ends of connections bear its name too, and are in the namespace of whoever connects.
    """
    end = f" {USUAL_DIRECTORY}/{device}.sock\n"
    # That of this thread: it may be in another namespace than the rest of the process.
    with open("/proc/thread-self/net/unix", encoding="utf-8", errors="replace") as table:
        return any(line.endswith(end) and line.split()[3] == _LISTENING for line in table)


def _reason(words: str, code: int) -> str:
    """What it said of a failure, without the box that it prints first."""
    lines = [line.strip() for line in words.splitlines()]
    said = [line for line in lines if line and not line.startswith(("┌", "│", "└"))]
    return said[-1] if said else f"exit code {code}"
