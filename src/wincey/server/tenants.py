"""The hosts that live behind this server, and their claims on their public addresses.

A host with a store of its own defends its claim itself (leasing.claims). For a client the server does: it stakes the claim
when the client takes or renews a lease, and puts it back when another host overwrites it while the client still polls.
Clients of flannel don't say who they are, and are left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator

from wincey.leasing.claims import Claim, Host
from wincey.model.errors import StoreDenied, StoreError
from wincey.store.registry import Registry, Update

log = logging.getLogger(__name__)

_COMES_BACK = 2.0
"""Seconds that a client has between two polls. Less than leasing.claims.ANSWER_WITHIN, or it would answer too late."""

_FORGOTTEN = 3600.0  # seconds after its last poll


class _Tenant:
    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.staked = False
        self.polls = 0
        self.polling = asyncio.Event()
        self.last = 0.0

    async def alive(self) -> bool:
        """Whether it polls, or does so again in a moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_COMES_BACK):
                await self.polling.wait()
        return self.polls > 0


class Tenants:
    """Those of one network."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._tenants: dict[tuple[str, str], _Tenant] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def stake(self, address: str, host: Host) -> None:
        """Claim an address for a host, once; raises DuplicateHost when another live host has it, StoreError."""
        tenant = self._tenant(address, host)
        if tenant.staked:
            return
        try:
            await tenant.claim.stake()
        except StoreDenied as error:
            log.warning("no protection against a second host with the address %s: %s", address, error)
        tenant.staked = True

    @contextlib.contextmanager
    def polling(self, address: str, host: Host) -> Iterator[None]:
        """The host waits for news within this context, and so is alive."""
        tenant = self._tenant(address, host)
        tenant.polls += 1
        tenant.polling.set()
        try:
            yield
        finally:
            tenant.polls -= 1
            tenant.last = asyncio.get_running_loop().time()
            if not tenant.polls:
                tenant.polling.clear()

    def seen(self, update: Update) -> None:
        """Something changed in the store."""
        if update.what != "claim":
            return
        for (key, _), tenant in self._tenants.items():
            if key == update.key:
                # Not waited for: no client's news may depend on another one's claim.
                task = asyncio.create_task(self._defend(tenant, update))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Defend no more."""
        for task in self._tasks:
            task.cancel()

    def _tenant(self, address: str, host: Host) -> _Tenant:
        key = self._registry.claim_key(address)
        if (found := self._tenants.get((key, host.instance))) is None:
            old = asyncio.get_running_loop().time() - _FORGOTTEN
            self._tenants = {name: each for name, each in self._tenants.items() if each.polls or each.last > old}
            found = self._tenants[key, host.instance] = _Tenant(Claim(self._registry.store, key, host))
            found.last = asyncio.get_running_loop().time()
        return found

    async def _defend(self, tenant: _Tenant, update: Update) -> None:
        if not await tenant.alive():
            tenant.staked = False  # when it is back it has to ask again
            return
        try:
            await tenant.claim.seen(update.claim)
        except StoreError as error:
            log.warning("%s could not be put back: %s", update.key, error)
