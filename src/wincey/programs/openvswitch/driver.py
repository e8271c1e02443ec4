"""The reconciler's driver for Open vSwitch: bridges and ports in its database, flows in ovs-vswitchd.

The database's monitor keeps a picture of its tables, so that an audit reads nothing but the flows, and a change by another
program is noticed at once. Flows that another program takes away are found by the slow audit; when ovs-vswitchd loses them all
by starting anew, that is noticed. All of it lives in Open vSwitch and goes on without this daemon.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from wincey.kernel.program import ProgramFailed, must
from wincey.model.ovs import OvsBridge, OvsDatabase, OvsFlow, OvsTunnel
from wincey.model.state import Changes, Failure, Key, Object, Scope
from wincey.programs.openvswitch import edits, flows
from wincey.programs.openvswitch.database import Database
from wincey.programs.openvswitch.edits import Operation
from wincey.programs.openvswitch.host import OFCTL, OvsError, database_socket, is_installed, management_socket
from wincey.programs.openvswitch.liveness import Liveness

T = TypeVar("T", OvsBridge, OvsTunnel)

log = logging.getLogger(__name__)

_AGAIN = 1.0  # seconds between attempts to find a database again that went away


class OvsDriver:
    """Keeps the bridges, ports and flows of one network. owner: what marks them as its own, the same at every start."""

    handles: tuple[type[Object], ...] = (OvsDatabase, OvsBridge, OvsTunnel, OvsFlow)

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._database: Database | None = None
        self._liveness: dict[str, Liveness] = {}
        self._known: object = None
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._changed: Callable[[str], None] = lambda why: None

    async def observe(self, desired: Mapping[Key, Object], scope: Scope) -> dict[Key, Object]:
        """See Driver. Where the database does not answer, what an earlier run may have left is not given up."""
        wanted = any(isinstance(item, OvsBridge) for item in desired.values())
        try:
            database = await self._connected()
        except OvsError as error:
            if wanted or not is_installed():
                return {}
            log.warning("%s", error)
            left = OvsDatabase(database_socket())
            return {left.key: left}
        self._known = self._picture(database)
        found: dict[Key, Object] = dict(database.replica.objects())
        bridges = [item.name for item in found.values() if isinstance(item, OvsBridge)]
        for bridge in bridges:
            try:
                found |= await self._flows(bridge)
            except ProgramFailed as error:
                log.debug("flows of bridge %s: %s", bridge, error)
        await self._look_after(bridges)
        return found

    async def apply(self, changes: Changes) -> Sequence[Failure]:
        """See Driver. Few transactions, and one bundle of flows for each bridge, however many peers come and go."""
        self._busy = True
        try:
            database = await self._connected()
            before = _numbers(database)
            failures = await self._apply(database, changes)
            now = _numbers(database)
            if any(now.get(name, number) != number for name, number in before.items()):
                # A port that had to be made anew: flows that were right lead to its old number.
                self._changed("ports of Open vSwitch have other numbers")
            return failures
        except OvsError as error:
            # Of a bridge that can't be made, what is on it need not speak.
            items = [*changes.put, *changes.delete]
            return [Failure(item, str(error)) for item in items]
        finally:
            self._busy = False
            if self._database:
                self._known = self._picture(self._database)

    def watch(self, changed: Callable[[str], None]) -> None:
        """Call `changed` when bridges or ports change, and when ovs-vswitchd or the database ends or comes back."""
        self._changed = changed

    async def close(self) -> None:
        """See Driver."""
        if self._timer:
            self._timer.cancel()
        database, self._database = self._database, None
        if database:
            await database.close()
        await self._look_after([])

    async def _connected(self) -> Database:
        if self._database and self._database.alive:
            return self._database
        if self._database:
            await self._database.close()
        self._database = Database(self._owner, self._on_change)
        await self._database.connect()
        return self._database

    def _on_change(self) -> None:
        database = self._database
        if database is None:
            return
        if not database.alive:
            self._changed("the connection to Open vSwitch's database ended")
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(_AGAIN, self._look_again)
        elif not self._busy and self._picture(database) != self._known:
            self._changed("in Open vSwitch's database")

    def _look_again(self) -> None:
        self._timer = None
        if self._database and not self._database.alive:
            self._changed("the connection to Open vSwitch's database ended")
            self._timer = asyncio.get_running_loop().call_later(_AGAIN, self._look_again)

    def _picture(self, database: Database) -> object:
        """What is to be noticed when it changes: what is ours, and the numbers that its flows use."""
        return database.replica.objects(), _numbers(database)

    async def _look_after(self, bridges: Sequence[str]) -> None:
        for name in [name for name in self._liveness if name not in bridges]:
            await self._liveness.pop(name).close()
        for name in bridges:
            if name not in self._liveness:
                self._liveness[name] = Liveness(name, self._changed)

    async def _flows(self, bridge: str) -> Mapping[Key, OvsFlow]:
        text = await must(OFCTL, "--no-stats", "--names", "dump-flows", f"unix:{management_socket(bridge)}")
        return flows.read(bridge, text.splitlines())

    async def _apply(self, database: Database, changes: Changes) -> list[Failure]:
        replica, failures = database.replica, list[Failure]()
        going = [item for item in changes.delete if isinstance(item, OvsBridge)]
        put_bridges = [item for item in changes.put if isinstance(item, OvsBridge)]
        put_tunnels = [item for item in changes.put if isinstance(item, OvsTunnel)]
        gone = {item.name for item in going}

        async def commit(operations: Sequence[Operation], items: Sequence[Object]) -> None:
            if operations:
                try:
                    await database.transact(operations)
                except OvsError as error:
                    failures.extend(Failure(item, str(error)) for item in items)

        accepted = _accepted(database, put_bridges, failures)
        await commit(edits.bridges(replica, accepted, self._owner), accepted)
        failures += _unmade(database, accepted, failures)

        # Flows go before the ports that they lead to, and come after them.
        removed = [item for item in changes.delete if isinstance(item, OvsFlow) and item.device not in gone]
        for bridge in dict.fromkeys(item.device for item in removed):
            failures += await self._change_flows(database, bridge, [], [i for i in removed if i.device == bridge])

        tunnels = _accepted(database, put_tunnels, failures)
        leaving = [item.name for item in tunnels if edits.is_other(replica, item)]
        leaving += [item.name for item in changes.delete if isinstance(item, OvsTunnel)]
        await commit(edits.removal(replica, going, leaving), [*going, *tunnels])
        await commit(edits.tunnels(replica, tunnels, self._owner), tunnels)
        failures += _unmade(database, tunnels, failures)

        put = [item for item in changes.put if isinstance(item, OvsFlow)]
        for bridge in dict.fromkeys(item.device for item in put):
            failures += await self._change_flows(database, bridge, [i for i in put if i.device == bridge], [])
        await self._look_after([item.name for item in replica.objects().values() if isinstance(item, OvsBridge)])
        return failures

    async def _change_flows(
        self, database: Database, bridge: str, put: Sequence[OvsFlow], delete: Sequence[OvsFlow]
    ) -> list[Failure]:
        if reason := edits.no_bridge(database.replica, bridge):
            return [Failure(item, reason) for item in put]
        ports = {name for name, port in database.replica.ports().items() if port.number and port.bridge == bridge}
        failures = [
            Failure(item, f"port {item.port} is not there") for item in put if item.port and item.port not in ports
        ]
        lacking = {failure.object.key for failure in failures}
        put = [item for item in put if item.key not in lacking]
        lines = [line for item in delete for line in flows.to_remove(item)]
        lines += [line for item in put for line in flows.to_put(item)]
        if lines:
            try:
                target = f"unix:{management_socket(bridge)}"
                await must(OFCTL, "--bundle", "add-flows", target, "-", text="\n".join(lines) + "\n")
            except ProgramFailed as error:
                failures += [Failure(item, f"{error}; is ovs-vswitchd running?") for item in (*put, *delete)]
        return failures


def _numbers(database: Database) -> dict[str, int]:
    """The OpenFlow numbers of our ports by name."""
    return {name: port.number for name, port in database.replica.ports().items() if port.ours}


def _accepted(database: Database, items: Sequence[T], failures: list[Failure]) -> list[T]:
    """Those that may be put; of the others, why not."""
    accepted: list[T] = []
    for item in items:
        if reason := edits.refusal(database.replica, item):
            failures.append(Failure(item, reason))
        else:
            accepted.append(item)
    return accepted


def _unmade(database: Database, items: Sequence[OvsBridge | OvsTunnel], failures: Sequence[Failure]) -> list[Failure]:
    """Those that the database has now and ovs-vswitchd could not make."""
    failed = {failure.object.key for failure in failures}
    ports, found = database.replica.ports(), list[Failure]()
    for item in items:
        port = ports.get(item.name)
        if item.key not in failed and port and not port.number:
            hint = "; the kernel's module openvswitch may be missing: see Backend.Datapath" if item.makes else ""
            found.append(Failure(item, f"ovs-vswitchd could not make it: {port.error or 'its log says why'}{hint}"))
    return found
