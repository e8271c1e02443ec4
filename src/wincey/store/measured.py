"""A lease store that counts: how many requests of each kind, how many failed, how long they took."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import msgspec

from wincey.model.errors import KeyConflict, KeyExists, StoreError
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.store.kv import KeyValueStore, OutageCallback
from wincey.store.registry import LeaseStore, Snapshot, Update

T = TypeVar("T")

BUCKETS = (0.005, 0.025, 0.1, 0.5, 2.5)
"""Upper bounds in seconds; what took longer is counted beyond the last one."""


class Requests(msgspec.Struct):
    """Those of one kind. seconds: their sum. buckets: how many took at most as long as each of BUCKETS, or longer than all."""

    count: int = 0
    failures: int = 0
    seconds: float = 0.0
    buckets: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BUCKETS) + 1))


class MeasuredLeases:
    """A LeaseStore in front of another. `requests`: what was asked of it, by operation.

    A lost race (KeyConflict, KeyExists) is an answer and no failure.
    """

    def __init__(self, store: LeaseStore) -> None:
        self.requests: dict[str, Requests] = {}
        self._store = store

    @property
    def claims(self) -> KeyValueStore | None:
        return self._store.claims

    @property
    def keeps_cloud(self) -> bool:
        return self._store.keeps_cloud

    @property
    def config_key(self) -> str:
        return self._store.config_key

    def lease_key(self, key: LeaseKey) -> str:
        return self._store.lease_key(key)

    def claim_key(self, identity: str) -> str:
        return self._store.claim_key(identity)

    def on_outage(self, callback: OutageCallback) -> None:
        self._store.on_outage(callback)

    def watch(self, after: int) -> AsyncIterator[list[Update]]:
        return self._store.watch(after)

    async def snapshot(self) -> Snapshot:
        return await self._measure("snapshot", self._store.snapshot())

    async def create(self, key: LeaseKey, attrs: LeaseAttrs) -> Lease:
        return await self._measure("create", self._store.create(key, attrs))

    async def update(self, lease: Lease, attrs: LeaseAttrs) -> Lease:
        return await self._measure("update", self._store.update(lease, attrs))

    async def renew(self, lease: Lease) -> Lease:
        return await self._measure("renew", self._store.renew(lease))

    async def time_left(self, lease: Lease) -> float | None:
        return await self._measure("time_left", self._store.time_left(lease))

    async def release(self, lease: Lease) -> bool:
        return await self._measure("release", self._store.release(lease))

    async def close(self) -> None:
        await self._store.close()

    async def _measure(self, operation: str, call: Awaitable[T]) -> T:
        requests = self.requests.setdefault(operation, Requests())
        started = time.monotonic()
        try:
            return await call
        except (KeyConflict, KeyExists):
            raise
        except StoreError:
            requests.failures += 1
            raise
        finally:
            took = time.monotonic() - started
            requests.count += 1
            requests.seconds += took
            requests.buckets[bisect_left(BUCKETS, took)] += 1
