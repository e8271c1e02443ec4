"""The peers of a network: each lease in the store, and what it asks for in the desired state, its store key being the owner.

Two things keep packets flowing where the store is at fault. What a lease asked for outlives it a little, as a host whose
lease was deleted claims the same subnet again at once; and what a host had published stays in force while its lease's value
can't be read.
"""

from __future__ import annotations

import asyncio

from wincey.agent.once import Once
from wincey.agent.planner import Planner
from wincey.agent.reconciler import Reconciler
from wincey.agent.territory import Territory
from wincey.model.errors import BadLease
from wincey.model.lease import Lease
from wincey.model.probe import Target
from wincey.store.registry import BadEntry, Snapshot

LOCAL = ""
"""The owner, in the desired state, of what exists for the host itself."""

COMES_BACK = 1.5
"""Seconds that a peer has for putting its lease back after it was removed."""

COME_BACK_AFTER_LOSS = 60.0
"""The same when the store lost all it had: each host has to find it again, with pauses that grow to 5 s."""


class Peers:
    """Keeps what the leases ask for. `planner` says what that is; `bad` are the leases that can't be read.

    targets: kept as the peers that can be asked whether they answer, by their key; None where nobody asks.
    """

    def __init__(
        self, reconciler: Reconciler, territory: Territory, once: Once, targets: dict[str, Target] | None = None
    ) -> None:
        self.planner: Planner | None = None
        self.bad: dict[str, BadEntry] = {}
        self._reconciler, self._territory, self._once, self._targets = reconciler, territory, once, targets
        self._leaving: dict[str, asyncio.TimerHandle] = {}

    def put_all(self, snapshot: Snapshot, patience: float) -> None:
        """Take over a snapshot. patience: seconds that leases which are not in it any more have for coming back."""
        for key in [*self._reconciler.desired.owners, *self.bad]:
            if key != LOCAL and key not in snapshot.leases and key not in snapshot.bad:
                self.remove(key, patience)
        for key, lease in sorted(snapshot.leases.items(), key=lambda item: item[1].created):
            self.put(key, lease)
        for bad in snapshot.bad.values():
            self.put_bad(bad)

    def put(self, key: str, lease: Lease) -> None:
        """A lease is there, or changed."""
        assert self.planner
        self._stays(key)
        self.bad.pop(key, None)
        try:
            # Who may write leases is trusted with the cluster network, not with the rest of this host's traffic.
            if not self._territory.holds(lease.key):
                raise BadLease(f"lease {lease.key} is passed over: it lies outside of the network")
            objects = self.planner.peer(lease)
        except BadLease as error:
            self._once.warn(key, str(error))
            objects = []
        self._territory.claim(objects=objects)  # a peer may be reached through a device that nobody needed before
        self._reconciler.desired.put(key, objects)
        if self._targets is not None:
            if target := self.planner.target(lease):
                self._targets[key] = target
            else:
                self._targets.pop(key, None)

    def put_bad(self, bad: BadEntry) -> None:
        """A lease's value can't be read."""
        self._stays(bad.key)
        self.bad[bad.key] = bad
        self._once.warn(bad.key, bad.reason)

    def remove(self, key: str, patience: float) -> None:
        """A lease is gone; what it asked for goes `patience` seconds later unless the lease comes back."""
        self.bad.pop(key, None)
        if key not in self._leaving:
            self._leaving[key] = asyncio.get_running_loop().call_later(patience, self._left, key)

    def _left(self, key: str) -> None:
        del self._leaving[key]
        if self._targets is not None:
            self._targets.pop(key, None)
        self._reconciler.desired.put(key, ())
        self._reconciler.apply_soon()

    def _stays(self, key: str) -> None:
        if timer := self._leaving.pop(key, None):
            timer.cancel()
