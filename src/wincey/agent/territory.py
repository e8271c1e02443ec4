"""What of this host is ours: told to the drivers as their scope, and remembered over restarts.

It grows before anything is made, so that a crash leaves nothing that a later run does not know as ours, and shrinks when all
that is not wanted any more is known to be gone.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from wincey.agent.reconciler import Reconciler
from wincey.agent.statefile import State
from wincey.model.address import Subnet
from wincey.model.lease import LeaseKey
from wincey.model.state import Link, Object, Route, Scope


class Territory:
    """Keeps the scope of a reconciler and the state file in step."""

    def __init__(self, state: State, reconciler: Reconciler) -> None:
        self._state, self._reconciler = state, reconciler
        self._current = True

    def follow(self, *, current: bool) -> None:
        """Whether the leases are known as the store has them."""
        self._current = current
        self._reconciler.scope = msgspec.structs.replace(self._reconciler.scope, current=current)

    def claim(self, networks: Iterable[Subnet] = (), objects: Iterable[Object] = ()) -> None:
        """Add networks, and the devices among some objects."""
        devices = {item.name for item in objects if isinstance(item, Link)}.difference(self._state.devices)
        new = set(networks).difference(self._state.networks)
        if devices or new:
            self._state.devices |= devices
            self._state.networks |= new
        if devices or new or not self._reconciler.scope.networks:
            self._apply()

    def holds(self, key: LeaseKey) -> bool:
        """Whether a lease is of a network that this host is in, or was in a moment ago. Of a family that this host has no
        network of it may have what it likes: nothing is made of that."""
        return all(
            any(network.contains(subnet) for network in known)
            for subnet in key.subnets
            if (known := [network for network in self._state.networks if network.bits == subnet.bits])
        )

    def settle(self, networks: Iterable[Subnet]) -> None:
        """Give up all but these networks and the devices that are desired."""
        desired = self._reconciler.desired.objects.values()
        self._state.devices = {item.name for item in desired if isinstance(item, Link)}
        # A network that we have left stays ours to keep in order while peers that have not are reached there.
        routes = [item.destination for item in desired if isinstance(item, Route)]
        left = self._state.networks.difference(networks)
        self._state.networks = {
            *networks,
            *(network for network in left if any(network.contains(route) for route in routes)),
        }
        self._apply()

    def _apply(self) -> None:
        self._state.save()
        self._reconciler.scope = Scope(
            tuple(sorted(self._state.devices)), tuple(sorted(self._state.networks)), self._current
        )
