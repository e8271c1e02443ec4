"""The store on etcd v3, through its JSON gateway (compatibility reference, sections 3.2 and 3.5).

A time limit is an etcd lease of its own for each key, granted under a random id of our choice: when the answer to a write
is lost, the id beside the key says whether the write was ours. Renewing is a keep-alive of that lease, which wakes no
watcher in the cluster; a new value comes with a new lease, and the old one is revoked once nothing hangs on it.

A watch is one streamed answer. The gateway can't ask for "require leader", so a watch that hears nothing asks its endpoint
a linearizable question about once a minute; a member without a majority can't answer that. Whenever a watch connects, it
also checks that the store still has the past that it knows: a store restored from a backup may have gone back and forth
again, and would otherwise be taken for one where nothing happened.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import TypeVar

import msgspec

from wincey.http.client import HttpClient, Interrupted
from wincey.model.errors import HistoryLost, KeyConflict, KeyExists, StoreError, StoreUnavailable
from wincey.store.endpoints import CALL_DEADLINE, Endpoints, MakeClient, jitter
from wincey.store.etcd3_wire import KEEP_ALIVE, LEASE, RANGE, TXN, WATCH, KeyValue, Lines, StreamFault, key_text
from wincey.store.gateway import Gateway, GatewayError, StaleToken, decode, first_result
from wincey.store.kv import Change, Entry, Listing, OutageCallback

T = TypeVar("T")

_PAGE = 1000  # entries of one answer, so that the memory that its JSON takes stays small; later pages are of the first one's revision
_PROBE_DEADLINE = 5.0
_TIDY_DEADLINE = 2.0  # for revoking a lease that expires anyway
_PRECONDITION, _OUT_OF_RANGE = 9, 11  # gRPC codes


class _Seen(msgspec.Struct, frozen=True):
    """A key as a watch last saw it: put or (gone) deleted at a revision, created at one, on a lease ("0" for none)."""

    key: bytes
    revision: int
    created: int
    lease: str
    gone: bool = False


class _Cursor(msgspec.Struct):
    """How far a watch has come, and what must be so at `revision` if the store is still the one we knew.

    newest: the last change. leased: the last that hangs on a lease. Hosts that find a store restored from a snapshot put their
    keys again, often in the same order, and whoever else writes there too: only a lease, which has a random id, tells a key
    from the one that had its revision before.
    """

    revision: int
    newest: _Seen | None = None
    leased: _Seen | None = None

    def see(self, seen: _Seen) -> None:
        """Take in what is newer than all before."""
        self.newest = seen
        if seen.lease != "0" and not seen.gone:
            self.leased = seen
        elif self.leased and self.leased.key == seen.key:
            self.leased = None


class Etcd3Store:
    """A KeyValueStore on an etcd v3 cluster.

    urls: of its endpoints (see parse_endpoints). tls: for https ones. probe_interval: seconds of silence after which a watch
    asks whether its endpoint still takes part in the cluster, give or take a quarter. random: for jitter and the ids of leases,
    see Endpoints, as for `make`.
    """

    values_v2 = False

    def __init__(
        self,
        urls: Sequence[str],
        tls: ssl.SSLContext | None = None,
        *,
        username: str = "",
        password: str = "",
        deadline: float = CALL_DEADLINE,
        probe_interval: float = 60.0,
        random: Callable[[], float] = jitter,
        make: MakeClient = HttpClient,
    ) -> None:
        self._endpoints = Endpoints(urls, tls, random=random, make=make)
        self._gateway = Gateway(username, password)
        self._deadline = deadline
        self._probe_interval = probe_interval
        self._newest: dict[str, _Cursor] = {}  # by prefix: the newest entry of its last listing

    @property
    def name(self) -> str:
        return f"etcd v3 at {self._endpoints}"

    async def get(self, key: str) -> Entry | None:
        found = await self._call("kv/range", {"key": key.encode()}, RANGE)
        return found.kvs[0].entry() if found.kvs else None

    async def read_all(self, prefix: str) -> Listing:
        while True:
            try:
                listing = await self._read_pages(prefix)
            except GatewayError as error:
                if error.code != _OUT_OF_RANGE:
                    raise
                continue  # compacted between two pages
            cursor = _Cursor(listing.revision)
            by_revision = attrgetter("revision")
            leased = max((entry for entry in listing.entries if entry.handle), key=by_revision, default=None)
            newest = max(listing.entries, key=by_revision, default=None)
            for entry in (leased, newest):
                if entry:
                    cursor.see(_Seen(entry.key.encode(), entry.revision, entry.created, entry.handle or "0"))
            self._newest[prefix] = cursor
            return listing

    async def holds(self, prefix: str) -> bool:
        """Whether there is any key below the prefix."""
        body = {"key": prefix.encode(), "range_end": _end(prefix), "limit": 1, "keys_only": True}
        return bool((await self._call("kv/range", body, RANGE)).kvs)

    async def create(self, key: str, value: bytes, ttl: float | None) -> Entry:
        compare = {"key": key.encode(), "target": "VERSION", "version": 0}
        revision, handle = await self._put(compare, value, ttl, KeyExists(f"{key} exists"))
        return Entry(key, value, revision, revision, handle, ttl is None)

    async def replace(self, entry: Entry, value: bytes, ttl: float | None) -> Entry:
        compare = {"key": entry.key.encode(), "target": "MOD", "mod_revision": entry.revision}
        revision, handle = await self._put(compare, value, ttl, _changed(entry))
        if entry.handle:
            await self._retire(entry.handle)
        return Entry(entry.key, value, revision, entry.created, handle, ttl is None)

    async def refresh(self, entry: Entry, ttl: float) -> Entry:
        if not entry.handle:
            raise KeyConflict(f"{entry.key} has no time limit that could start anew")
        left = await self._endpoints.call(partial(self._keep_alive, entry.handle), self._deadline)
        # In this order: what is there now hangs on a lease that runs for its whole time again.
        current = await self.get(entry.key)
        if left <= 0 or not current or (current.revision, current.handle) != (entry.revision, entry.handle):
            raise _changed(entry)
        if left < ttl:  # it was granted for a shorter time than is wanted now
            return await self.replace(current, current.value, ttl)
        return current

    async def time_left(self, entry: Entry) -> float | None:
        if not entry.handle:
            current = await self.get(entry.key)
            if not current:
                raise _changed(entry)
            return await self.time_left(current) if current.handle else None
        status = await self._call("kv/lease/timetolive", {"ID": entry.handle, "keys": True}, LEASE)
        if status.TTL < 0 or entry.key.encode() not in status.keys:
            raise _changed(entry)
        return float(status.TTL)

    async def delete(self, key: str, revision: int | None = None) -> bool:
        name = key.encode()
        remove = {"request_delete_range": {"key": name, "prev_kv": True}}
        body: dict[str, object] = {"success": [remove], "failure": [{"request_range": {"key": name}}]}
        if revision is not None:
            body["compare"] = [{"key": name, "target": "MOD", "mod_revision": revision}]

        async def attempt(client: HttpClient, uncertain: bool) -> tuple[bool, KeyValue | None]:
            answer = await self._gateway.call(client, "kv/txn", body, TXN, repeat=False)
            result = first_result(answer, client)
            if answer.succeeded and result.response_delete_range:
                gone = result.response_delete_range.prev_kvs
                return bool(gone) or uncertain, gone[0] if gone else None
            if result.response_range and result.response_range.kvs:
                raise KeyConflict(f"{key} is no longer at revision {revision}")
            return uncertain, None

        deleted, gone = await self._endpoints.call(attempt, self._deadline)
        if gone and gone.lease != "0":
            await self._retire(gone.lease)
        return deleted

    def watch(self, prefix: str, after: int) -> AsyncIterator[list[Change]]:
        cursor = _Cursor(after)
        known = self._newest.get(prefix)
        if known and known.revision == after:
            cursor = msgspec.structs.replace(known)
        return self._endpoints.follow(partial(self._follow, prefix, cursor))

    def on_outage(self, callback: OutageCallback) -> None:
        self._endpoints.outage = callback

    async def close(self) -> None:
        await self._endpoints.close()

    async def _call(
        self, method: str, body: object, answer: msgspec.json.Decoder[T], deadline: float | None = None
    ) -> T:
        return await self._endpoints.call(
            lambda client, _uncertain: self._gateway.call(client, method, body, answer), deadline or self._deadline
        )

    async def _read_pages(self, prefix: str) -> Listing:
        body: dict[str, object] = {"key": prefix.encode(), "range_end": _end(prefix), "limit": _PAGE}
        page = await self._call("kv/range", body, RANGE)
        listing = Listing([found.entry() for found in page.kvs], page.header.revision)
        while page.more:
            body |= {"key": page.kvs[-1].key + b"\0", "revision": listing.revision}
            page = await self._call("kv/range", body, RANGE)
            listing.entries.extend(found.entry() for found in page.kvs)
        return listing

    async def _put(
        self, compare: dict[str, object], value: bytes, ttl: float | None, lost: StoreError
    ) -> tuple[int, str]:
        """Put if `compare` holds, else raise `lost`: the new revision and the lease that the key has now ("" for none)."""
        key, lease = compare["key"], await self._grant(ttl)
        put = {"key": key, "value": value, "lease": lease}
        body = {"compare": [compare], "success": [{"request_put": put}], "failure": [{"request_range": {"key": key}}]}

        async def attempt(client: HttpClient, uncertain: bool) -> int:
            answer = await self._gateway.call(client, "kv/txn", body, TXN, repeat=False)
            if answer.succeeded:
                return answer.header.revision
            found = first_result(answer, client).response_range
            if uncertain and found and found.kvs and (found.kvs[0].value, found.kvs[0].lease) == (value, lease):
                return found.kvs[0].mod_revision  # the earlier attempt, whose answer was lost
            return 0

        try:
            revision = await self._endpoints.call(attempt, self._deadline)
        except StoreUnavailable:
            raise  # perhaps the key hangs on that lease by now
        except StoreError:
            await self._retire(lease)
            raise
        if not revision:
            await self._retire(lease)
            raise lost
        return revision, "" if ttl is None else lease

    async def _grant(self, ttl: float | None) -> str:
        if ttl is None:
            return "0"
        random = self._endpoints.random
        lease = str(int(random() * 2**31) << 32 | int(random() * 2**32) | 1)
        try:
            await self._call("lease/grant", {"ID": lease, "TTL": max(1, math.ceil(ttl))}, LEASE)
        except GatewayError as error:
            if error.code != _PRECONDITION:  # "already exists": granted by an attempt whose answer was lost
                raise
        return lease

    async def _keep_alive(self, lease: str, client: HttpClient, _uncertain: bool) -> int:
        """Start a lease anew: the seconds that it has now, 0 when there is no such lease."""
        line = await self._gateway.call(client, "lease/keepalive", {"ID": lease}, KEEP_ALIVE)
        if line.error:
            raise self._gateway.error(line.error, client)
        return line.result.TTL

    async def _retire(self, lease: str) -> None:
        """Revoke a lease that no key hangs on. No matter if it fails: the lease expires by itself."""
        if lease == "0":
            return
        try:
            status = await self._call("kv/lease/timetolive", {"ID": lease, "keys": True}, LEASE, _TIDY_DEADLINE)
            if status.TTL > 0 and not status.keys:
                await self._call("kv/lease/revoke", {"ID": lease}, LEASE, _TIDY_DEADLINE)
        except StoreError:
            return

    async def _follow(self, prefix: str, cursor: _Cursor, client: HttpClient) -> AsyncGenerator[list[Change], None]:
        await self._check_past(client, prefix, cursor)
        request = {"key": prefix.encode(), "range_end": _end(prefix), "start_revision": cursor.revision + 1}
        body = {"create_request": {**request, "progress_notify": True}}
        lines = Lines()
        async with self._gateway.stream(client, "watch", body) as stream:
            while True:
                try:
                    async with asyncio.timeout(self._probe_interval * (0.75 + self._endpoints.random() / 2)):
                        piece = await stream.read()
                except TimeoutError:
                    async with asyncio.timeout(_PROBE_DEADLINE):
                        await self._gateway.call(client, "kv/range", {"key": prefix.encode()}, RANGE)
                    continue
                if not piece:
                    raise Interrupted(f"{client.url} ended the watch")
                for line in lines.feed(piece):
                    yield self._changes(line, cursor, client)

    async def _check_past(self, client: HttpClient, prefix: str, cursor: _Cursor) -> None:
        """Raise HistoryLost unless the store at the cursor's revision is what the watch saw there."""
        try:
            async with asyncio.timeout(_PROBE_DEADLINE):
                if cursor.newest is None:
                    await self._at(client, prefix.encode(), cursor.revision)
                    return
                known = await self._was(client, cursor.newest, cursor.revision)
                if known and cursor.leased and cursor.leased != cursor.newest:
                    known = await self._was(client, cursor.leased, cursor.revision)
        except GatewayError as error:
            if error.code == _OUT_OF_RANGE:  # compacted, or a revision that the store does not have yet
                raise HistoryLost(f"cannot resume at revision {cursor.revision}: {error}") from error
            raise
        if not known:
            raise HistoryLost(f"{client.url}: the store at revision {cursor.revision} is not the one we knew")

    async def _was(self, client: HttpClient, seen: _Seen, revision: int) -> bool:
        """Whether a key was so, at a revision since which we know it."""
        found = await self._at(client, seen.key, revision)
        if seen.gone:
            return not found and bool(await self._at(client, seen.key, seen.revision - 1))
        was = (seen.revision, seen.created, seen.lease)
        return [(entry.mod_revision, entry.create_revision, entry.lease) for entry in found] == [was]

    async def _at(self, client: HttpClient, key: bytes, revision: int) -> Sequence[KeyValue]:
        """The key as it was at a revision."""
        body = {"key": key, "revision": revision, "keys_only": True}
        return (await self._gateway.call(client, "kv/range", body, RANGE)).kvs

    def _changes(self, line: bytes, cursor: _Cursor, client: HttpClient) -> list[Change]:
        """Read one line of a watch and advance the cursor."""
        answer = decode(WATCH, line, client)
        result = answer.result
        if answer.error or result.canceled:
            if result.compact_revision:
                raise HistoryLost(f"{client.url}: revisions before {result.compact_revision} are compacted")
            error = self._gateway.error(answer.error or StreamFault(message=result.cancel_reason), client)
            if isinstance(error, StaleToken):  # connecting again gets a new one
                raise StoreUnavailable(str(error))
            raise error
        if not result.events and not result.created:  # a progress notification: nothing of ours up to this revision
            cursor.revision = max(cursor.revision, result.header.revision)
        changes = []
        if result.events and result.events[0].kv.mod_revision <= cursor.revision:
            # Never, by etcd's promise: whether it came twice or too late can't be told, so all is read anew.
            raise HistoryLost(f"{client.url}: changes did not come in their order after revision {cursor.revision}")
        for event in result.events:
            gone = event.type == "DELETE"
            cursor.revision = event.kv.mod_revision
            cursor.see(_Seen(event.kv.key, event.kv.mod_revision, event.kv.create_revision, event.kv.lease, gone))
            if gone:
                changes.append(Change(key_text(event.kv.key), None, event.kv.mod_revision))
            else:
                entry = event.kv.entry()
                changes.append(Change(entry.key, entry))
        return changes


def _end(prefix: str) -> bytes:
    """The end of the range of all keys that begin with a prefix, whose last byte is `/`."""
    name = prefix.encode()
    return name[:-1] + bytes([name[-1] + 1])


def _changed(entry: Entry) -> KeyConflict:
    return KeyConflict(f"{entry.key} is gone or was changed since revision {entry.revision}")
