"""The reconciler's driver for IkeDaemon, IpsecPeer and XfrmPolicy: what charon and the kernel have, and what they should.

charon is found by its control socket in the network's directory, and asked for its connections with one command. It tells
neither their proposals nor its secrets: whether the former are as desired stands in a small file beside the socket, and the
latter are loaded once by each run, in place of all that were there, which leaves every tunnel as it is. The connection stays
open: its end is how charon's death is noticed at once, and events on it are how a lost tunnel is.

Policies come before what they protect, and go after it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from wincey.model.address import Address, Subnet, format_address
from wincey.model.errors import WinceyError
from wincey.model.ipsec import IkeDaemon, IpsecPeer, XfrmPolicy
from wincey.model.state import Changes, Failure, Key, Object, Scope
from wincey.programs.strongswan import charon
from wincey.programs.strongswan.charon import CharonError
from wincey.programs.strongswan.client import Vici, ViciError
from wincey.programs.strongswan.connections import connection_name, definition, fingerprint, read
from wincey.programs.strongswan.memory import Memory, forget, recall, remember
from wincey.programs.strongswan.upkeep import EVENTS, Upkeep
from wincey.programs.strongswan.vici import Message
from wincey.programs.strongswan.xfrm import PolicyWatch, Xfrm

log = logging.getLogger(__name__)


class StrongswanDriver:
    """Keeps IPsec in the network namespace that it is made in. directory: for charon's files, made if absent."""

    handles: tuple[type[Object], ...] = (IkeDaemon, IpsecPeer, XfrmPolicy)

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._changed: Callable[[str], None] = lambda why: None
        self._charon: Vici | None = None
        self._credentials: tuple[IkeDaemon, str] | None = None  # those loaded by this run, and a digest of their files
        self._names: dict[Key, set[str]] = {}  # the connections of each peer that charon has
        self._peers: dict[str, IpsecPeer] = {}  # those that are as desired
        self._networks: Sequence[Subnet] = ()
        self._xfrm: Xfrm | None = None
        self._policy_watch: PolicyWatch | None = None
        self._upkeep = Upkeep(self._peers, lambda: self._charon, str(directory / charon.LOG))
        self._lock = asyncio.Lock()

    async def observe(self, desired: Mapping[Key, Object], scope: Scope) -> dict[Key, Object]:
        """The running charon, its connections, and the kernel's policies of the scope's networks."""
        self._networks = scope.networks
        found: dict[Key, Object] = {}
        async with self._lock:
            for policy in self._policies():
                found[policy.key] = policy
            try:
                connection = await self._reach()
                if connection:
                    daemon = self._daemon(desired)
                    found[daemon.key] = daemon
                    found |= await self._connections(connection, desired)
                else:
                    self._names, self._credentials = {}, None
                    self._peers.clear()
            except ViciError as error:
                log.warning("%s", error)
        self._upkeep.look()
        return found

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """Policies to put, old connections, charon and connections to put; then policies and charon to delete."""
        put, delete = _Share(changes.put), _Share(changes.delete)
        async with self._lock:
            failures = self._change_policies(put.policies, ())
            failures += [
                Failure(peer, reason) for peer in delete.peers if (reason := await self._attempt(self._unload(peer)))
            ]
            reason = ""
            for daemon in put.daemons:
                if reason := await self._attempt(self._start(daemon)):
                    failures.append(Failure(daemon, reason))
            for peer in put.peers:
                if why := reason or await self._attempt(self._load(peer)):
                    failures.append(Failure(peer, why))
            self._remember(put.peers)
            failures += self._change_policies((), delete.policies)
            failures += [Failure(each, why) for each in delete.daemons if (why := await self._attempt(self._stop()))]
            self._remove_states(delete.policies)
        self._upkeep.look()
        return failures

    def watch(self, changed: Callable[[str], None]) -> None:
        """Call `changed` when charon has ended without our doing, or another program changed the kernel's policies."""
        self._changed = changed

    async def close(self) -> None:
        """Leave charon, tunnels and policies as they are."""
        await self._upkeep.close()
        async with self._lock:
            connection, self._charon = self._charon, None
            if connection:
                await connection.close()
            if self._policy_watch:
                self._policy_watch.close()
            if self._xfrm:
                self._xfrm.close()
            self._policy_watch = self._xfrm = None

    # --- charon -------------------------------------------------------------------------------------------------------

    async def _reach(self) -> Vici | None:
        if self._charon and self._charon.alive:
            return self._charon
        connection = await Vici.open(self._directory / charon.SOCKET, event=self._upkeep.on_event, ended=self._ended)
        self._charon, self._credentials = connection, None
        if connection:
            await connection.listen(*EVENTS)
        return connection

    def _ended(self) -> None:
        if self._charon and not self._charon.alive:
            self._charon = None
            self._changed("charon has ended")

    def _daemon(self, desired: Mapping[Key, Object]) -> IkeDaemon:
        charon.shorten_log(self._directory)
        wanted = next((each for each in desired.values() if isinstance(each, IkeDaemon)), None)
        esp = recall(self._directory).esp or "kernel"
        if wanted and wanted.esp == esp and self._credentials:
            loaded, digest = self._credentials
            try:
                current = _digest(wanted)
            except OSError:  # charon still has what the files had
                current = digest
            if loaded == wanted and digest == current:
                return wanted
        return IkeDaemon(esp)

    async def _start(self, daemon: IkeDaemon) -> None:
        """Have charon run as given and know the credentials."""
        connection = await self._reach()
        if connection and recall(self._directory).esp != daemon.esp:
            await self._stop()
            connection = None
        if connection is None:
            await charon.start(self._directory, daemon.esp)
            remember(self._directory, Memory(daemon.esp))
            log.info(
                "charon was started; ESP is done %s", "by the kernel" if daemon.esp == "kernel" else "in user space"
            )
            self._names = {}
            if self._peers:
                self._peers.clear()
                self._changed("charon was started anew")
            connection = await self._reach()
            if connection is None:
                raise CharonError(f"charon ended at once; its log is {self._directory / charon.LOG}")
        messages = _credentials(daemon)
        await connection.command("clear-creds")
        for command, message in messages:
            await connection.command(command, message)
        self._credentials = (daemon, _digest(daemon))

    async def _stop(self) -> None:
        connection = await self._reach()
        self._charon = self._credentials = None
        self._names = {}
        self._peers.clear()
        if connection:
            await charon.stop(self._directory, connection)
            await connection.close()
        charon.remove_files(self._directory)
        forget(self._directory)

    # --- connections --------------------------------------------------------------------------------------------------

    async def _connections(self, connection: Vici, desired: Mapping[Key, Object]) -> dict[Key, Object]:
        loaded_with = recall(self._directory).terms
        found: dict[Key, Object] = {}
        self._names = {}
        self._peers.clear()
        for event in await connection.stream("list-conns", "list-conn"):
            for name, content in event.items():
                ours = read(name, content) if isinstance(content, dict) else None
                if ours is None:
                    continue
                peer, local = ours
                self._names.setdefault(peer.key, set()).add(name)
                wanted = desired.get(peer.key)
                if not isinstance(wanted, IpsecPeer) or connection_name(wanted) != name:
                    # Beside the desired one, if that is there, it is surplus and goes alone.
                    found[(*peer.key, name)] = peer
                elif wanted.terms and (fingerprint(wanted.terms), format_address(wanted.terms.local)) == (
                    loaded_with,
                    local,
                ):
                    found[peer.key] = self._peers[name] = wanted
                else:
                    found[peer.key] = peer
        return found

    async def _load(self, peer: IpsecPeer) -> None:
        connection = await self._reach()
        if connection is None:
            raise CharonError("charon does not run")
        name = connection_name(peer)
        for other in self._names.get(peer.key, set()) - {name}:
            await self._unload_name(connection, other)
        await connection.command("load-conn", definition(peer))
        if name in self._names.get(peer.key, ()) and name not in self._peers:
            await self._terminate(connection, name)  # its tunnels were made on other terms
        self._names[peer.key] = {name}
        self._peers[name] = peer

    async def _unload(self, peer: IpsecPeer) -> None:
        connection = await self._reach()
        if connection:
            await self._unload_name(connection, connection_name(peer))
        names = self._names.get(peer.key, set())
        names.discard(connection_name(peer))

    async def _unload_name(self, connection: Vici, name: str) -> None:
        self._peers.pop(name, None)
        try:
            await connection.command("unload-conn", {"name": name})
        except ViciError:
            if not connection.alive:
                raise
            log.debug("connection %s was gone already", name)
        await self._terminate(connection, name)

    async def _terminate(self, connection: Vici, name: str) -> None:
        """End a connection's tunnels, with a word to the peer but no wait for its answer."""
        try:
            await connection.command("terminate", {"ike": name, "force": "yes", "timeout": "-1"})
        except ViciError:
            if not connection.alive:
                raise
            log.debug("connection %s had no tunnel", name)

    def _remember(self, loaded: Sequence[IpsecPeer]) -> None:
        terms = {fingerprint(peer.terms) for peer in loaded if peer.terms and connection_name(peer) in self._peers}
        memory = recall(self._directory)
        if terms and terms != {memory.terms}:
            # With several at once it would be anybody's: then the next run loads all of them anew.
            remember(self._directory, Memory(memory.esp, terms.pop() if len(terms) == 1 else ""))

    async def _attempt(self, step: Awaitable[None]) -> str:
        """Why a step failed, "" if it did not."""
        try:
            await step
        except WinceyError as error:
            return str(error)
        except OSError as error:
            return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        return ""

    # --- policies -----------------------------------------------------------------------------------------------------

    def _kernel(self) -> Xfrm:
        if self._xfrm is None:
            self._xfrm = Xfrm()
            self._policy_watch = PolicyWatch(self._xfrm.port, self._policies_changed)
        return self._xfrm

    def _policies_changed(self, why: str) -> None:
        self._changed(why)

    def _policies(self) -> list[XfrmPolicy]:
        try:
            return self._kernel().policies(self._networks)
        except OSError as error:  # no XFRM in this kernel: then there are none, and putting one tells
            log.debug("IPsec policies can't be read: %s", error)
            return []

    def _change_policies(self, put: Sequence[XfrmPolicy], delete: Sequence[XfrmPolicy]) -> list[Failure]:
        if not put and not delete:
            return []
        try:
            return [Failure(policy, str(refusal)) for policy, refusal in self._kernel().change(put, delete)]
        except OSError as error:
            reason = f"the kernel's IPsec can't be reached ({error.strerror}); it needs xfrm_user and CAP_NET_ADMIN"
            return [Failure(policy, reason) for policy in (*put, *delete)]

    def _remove_states(self, deleted: Sequence[XfrmPolicy]) -> None:
        """Keys of hosts that no policy leads to any more, which a charon that was killed can't remove."""
        gone: set[Address] = {policy.tunnel[1] for policy in deleted if policy.tunnel and policy.direction == "out"}
        if gone:
            gone -= {policy.tunnel[1] for policy in self._policies() if policy.tunnel and policy.direction == "out"}
            self._kernel().remove_states(gone)


class _Share:
    """Objects by class."""

    def __init__(self, objects: Sequence[Object]) -> None:
        self.daemons = [each for each in objects if isinstance(each, IkeDaemon)]
        self.peers = [each for each in objects if isinstance(each, IpsecPeer)]
        self.policies = [each for each in objects if isinstance(each, XfrmPolicy)]


def _credentials(daemon: IkeDaemon) -> list[tuple[str, Message]]:
    """The commands that give charon what to prove itself by. Raises OSError for a file that can't be read."""
    if daemon.psk:
        return [("load-shared", {"id": "wincey", "type": "IKE", "data": daemon.psk.value})]
    certificate, key, authority = (
        Path(path).read_bytes().decode(errors="surrogateescape")
        for path in (daemon.cert_file, daemon.key_file, daemon.ca_file)
    )
    return [
        ("load-cert", {"type": "X509", "flag": "CA", "data": authority}),
        ("load-cert", {"type": "X509", "flag": "NONE", "data": certificate}),
        ("load-key", {"type": "any", "data": key}),
    ]


def _digest(daemon: IkeDaemon) -> str:
    """Of the credentials' files; "" when they are none. Raises OSError."""
    digest = hashlib.sha256()
    for path in filter(None, (daemon.cert_file, daemon.key_file, daemon.ca_file)):
        content = Path(path).read_bytes()
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()
