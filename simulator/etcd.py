"""An etcd cluster in memory, spoken to in the JSON of etcd's v3 gateway: the agents' own etcd client is part of what is tested.

The keys, their history, compaction and leases are those of etcd's mvcc (api/rpc.proto, "KV API guarantees"): a revision for
each change, reads at a past revision while it is not compacted, watches from a past revision, leases that take their keys
along. What is left out is what no agent can see: raft. A member is either in touch with the majority, or it is stale: then it
goes on serving watches with what it has, and can answer nothing that needs the others.

Everything happens in the running event loop, at its clock. `tests/store` holds this cluster against the same contract as the
real one.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import msgspec

OUT_OF_RANGE, NOT_FOUND, PRECONDITION, UNAVAILABLE = 11, 5, 9, 14
_STATUS = {OUT_OF_RANGE: 400, NOT_FOUND: 404, PRECONDITION: 400, UNAVAILABLE: 503}


class Refused(Exception):
    """A request that etcd answers with an error. code: gRPC's."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code, self.status = code, _STATUS[code]

    def body(self) -> bytes:
        return msgspec.json.encode({"error": str(self), "code": self.code, "message": str(self)})


class Version(msgspec.Struct, frozen=True, gc=False):
    """A key as it was from `revision` on; value None: deleted. text: its JSON."""

    key: bytes
    revision: int
    created: int = 0
    version: int = 0
    value: bytes | None = None
    lease: int = 0
    text: bytes = b""


class Lease(msgspec.Struct):
    """A lease: `ends` by the loop's clock. keys: as an ordered set."""

    id: int
    ttl: float
    ends: float
    keys: dict[bytes, None] = {}


class Picture(msgspec.Struct, frozen=True):
    """What a snapshot or backup of the cluster holds."""

    revision: int
    keys: dict[bytes, Version]
    leases: list[Lease]


class _Range(msgspec.Struct):
    key: bytes
    range_end: bytes = b""
    limit: int = 0
    revision: int = 0
    keys_only: bool = False


class _Compare(msgspec.Struct):
    key: bytes
    target: str
    version: int = 0
    mod_revision: int = 0


class _Put(msgspec.Struct):
    key: bytes
    value: bytes = b""
    lease: int = 0


class _Delete(msgspec.Struct):
    key: bytes


class _Operation(msgspec.Struct):
    request_put: _Put | None = None
    request_range: _Range | None = None
    request_delete_range: _Delete | None = None


class _Txn(msgspec.Struct):
    compare: list[_Compare] = []
    success: list[_Operation] = []
    failure: list[_Operation] = []


class _LeaseRequest(msgspec.Struct):
    ID: int
    TTL: int = 0


class _Create(msgspec.Struct):
    key: bytes
    range_end: bytes
    start_revision: int


class _Watch(msgspec.Struct):
    create_request: _Create


_range = msgspec.json.Decoder(_Range, strict=False)
_txn = msgspec.json.Decoder(_Txn, strict=False)
_lease = msgspec.json.Decoder(_LeaseRequest, strict=False)
_watch = msgspec.json.Decoder(_Watch, strict=False)


class Watcher:
    """One watch at one member. send(line): to the client, in order."""

    def __init__(self, member: Member, key: bytes, end: bytes, following: int, send: Callable[[bytes], None]) -> None:
        self.member, self.key, self.end, self.following, self.send = member, key, end, following, send

    def covers(self, key: bytes) -> bool:
        return self.key <= key < self.end


class Member:
    """One server of the cluster.

    up: it runs. stale: it is cut off from the majority, and knows nothing that came after `applied`. lag: seconds by which it
    is behind. streams: to be broken when it goes down, by whoever opened them.
    """

    def __init__(self, cluster: Etcd, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.up, self.stale, self.paused, self.lag = True, False, False, 0.0
        self.applied = 0
        self.watchers: dict[Watcher, None] = {}
        self.breaks: dict[Callable[[str], None], None] = {}

    def catch_up(self) -> None:
        """Tell the watchers what they have not been told, as far as this member knows it."""
        if self.stale or not self.up:
            return
        self.applied = self.cluster.revision
        for watcher in list(self.watchers):
            self.feed(watcher)

    def feed(self, watcher: Watcher) -> None:
        """Send a watcher what it is behind by."""
        store = self.cluster
        if watcher.following < store.compacted:
            self.watchers.pop(watcher, None)
            watcher.send(_line({"canceled": True, "compact_revision": str(store.compacted), **_header(store.revision)}))
            return
        lines = [
            text
            for revision, key, text in store.since(watcher.following)
            if revision <= self.applied and watcher.covers(key)
        ]
        watcher.following = max(watcher.following, self.applied + 1)
        if lines:
            joined = b",".join(lines)
            watcher.send(b'{"result":{"header":{"revision":"%d"},"events":[%s]}}\n' % (self.applied, joined))

    def cut(self, why: str) -> None:
        """Break every connection to it."""
        for each in list(self.breaks):
            each(why)
        self.breaks.clear()
        self.watchers.clear()


class Etcd:
    """The cluster's data, and its members.

    on_change(version): called for every change of a key. on_expiry(keys): before an expired lease takes its keys along.
    on_read(actor, key): after somebody has read. actor: who is being served, "" for time and administrators.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, members: int = 1) -> None:
        self._loop = loop
        self.context = copy_context()  # its timers are its own, whoever asked for what they are for
        self.on_change: Callable[[Version], None] = lambda version: None
        self.on_expiry: Callable[[list[bytes]], None] = lambda keys: None
        self.on_read: Callable[[str, bytes], None] = lambda actor, key: None
        self.actor = ""
        self.requests = 0
        self.revision = 1
        self._reset(Picture(1, {}, []))
        self.members = [Member(self, f"etcd{number}") for number in range(1, members + 1)]
        for member in self.members:
            member.applied = self.revision

    # Its life, as an administrator or a disaster has it

    def picture(self) -> Picture:
        """A backup of now."""
        leases = [Lease(lease.id, lease.ttl, lease.ends, dict(lease.keys)) for lease in self.leases.values()]
        return Picture(self.revision, dict(self.keys), leases)

    def restore(self, picture: Picture) -> None:
        """Put a backup in the place of all data; leases begin anew. Every connection breaks."""
        for member in self.members:
            member.cut("the server went away")
        self._reset(picture)
        for member in self.members:
            member.applied = self.revision

    def wipe(self) -> None:
        """Lose everything."""
        self.restore(Picture(1, {}, []))

    def compact(self) -> None:
        """Forget the history before now."""
        self.compacted = self.revision
        cut = bisect_left(self._revisions, self.compacted)
        del self._revisions[:cut], self._events[:cut]
        for versions in self._versions.values():
            del versions[: max(0, bisect_right(versions, self.compacted, key=_revision) - 1)]
        for key in [
            key for key, versions in self._versions.items() if len(versions) == 1 and versions[0].value is None
        ]:
            del self._versions[key]

    def put(self, key: str, value: bytes, lease: int = 0) -> None:
        """As an administrator does."""
        self._put(_Put(key.encode(), value, lease))
        self._spread()

    def delete(self, key: str) -> None:
        """As an administrator does."""
        self._delete(key.encode())
        self._spread()

    def get(self, key: str) -> bytes | None:
        """The value as it stands."""
        found = self.keys.get(key.encode())
        return found.value if found else None

    def since(self, revision: int) -> list[tuple[int, bytes, bytes]]:
        """Changes from a revision on: each with its key, and its JSON as an event."""
        return self._events[bisect_left(self._revisions, revision) :]

    # What clients ask

    def answer(self, member: Member, method: str, body: bytes, actor: str = "") -> bytes:
        """A request but a watch; raises Refused."""
        self.requests += 1
        self.actor = actor
        try:
            return self._answered(member, method, body)
        finally:
            self.actor = ""

    def _answered(self, member: Member, method: str, body: bytes) -> bytes:
        if method == "kv/range":
            request = _range.decode(body)
            answer = self._get(request)
            self.on_read(self.actor, request.key)
            return answer
        if method == "kv/txn":
            answer = self._transact(_txn.decode(body))
            self._spread()
            return answer
        lease = _lease.decode(body)
        if method == "lease/grant":
            if lease.ID in self.leases:
                raise Refused(PRECONDITION, "etcdserver: lease already exists")
            self._grant(lease.ID, lease.TTL)
            return self._answer({"ID": str(lease.ID), "TTL": str(lease.TTL)})
        found = self.leases.get(lease.ID)
        if method == "lease/keepalive":
            ttl = 0
            if found:
                found.ends = self._loop.time() + found.ttl
                ttl = int(found.ttl)
            return _line({**_header(self.revision), "ID": str(lease.ID), "TTL": str(ttl)})
        if method == "kv/lease/timetolive":
            left = int(found.ends - self._loop.time()) if found else -1
            return self._answer({"ID": str(lease.ID), "TTL": str(left), "keys": list(found.keys) if found else []})
        if method == "kv/lease/revoke":
            if not found:
                raise Refused(NOT_FOUND, "etcdserver: requested lease not found")
            self._end(found)
            self._spread()
            return self._answer({})
        raise Refused(NOT_FOUND, f"no such method: {method}")

    def watch(self, member: Member, body: bytes, send: Callable[[bytes], None]) -> Watcher:
        """Begin a watch; what it tells goes to `send`."""
        self.requests += 1
        request = _watch.decode(body).create_request
        watcher = Watcher(member, request.key, request.range_end, request.start_revision, send)
        send(_line({**_header(member.applied), "created": True}))
        member.watchers[watcher] = None
        member.feed(watcher)
        return watcher

    # How it does it

    def _reset(self, picture: Picture) -> None:
        self.revision = self.compacted = picture.revision
        self.keys: dict[bytes, Version] = dict(picture.keys)
        self._order = sorted(self.keys)
        self._versions: dict[bytes, list[Version]] = {key: [version] for key, version in self.keys.items()}
        self._events: list[tuple[int, bytes, bytes]] = []
        self._revisions: list[int] = []
        self.leases: dict[int, Lease] = {}
        for lease in picture.leases:
            self._grant(lease.id, lease.ttl).keys.update(lease.keys)

    def _get(self, request: _Range) -> bytes:
        if request.revision > self.revision:
            raise Refused(OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision")
        if request.revision and request.revision < self.compacted:
            raise Refused(OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted")
        found, more = self._found(request)
        if request.keys_only:
            texts = [_text(msgspec.structs.replace(version, value=b"")) for version in found]
        else:
            texts = [version.text for version in found]
        return b'{"header":{"revision":"%d"},"kvs":[%s]%s,"count":"%d"}' % (
            self.revision,
            b",".join(texts),
            b',"more":true' if more else b"",
            len(found),
        )

    def _found(self, request: _Range) -> tuple[list[Version], bool]:
        past = request.revision and request.revision < self.revision
        if not request.range_end:
            version = self._at(request.key, request.revision) if past else self.keys.get(request.key)
            return [version] if version else [], False
        if past:
            names = sorted(key for key in self._versions if request.key <= key < request.range_end)
            found = [version for key in names if (version := self._at(key, request.revision))]
        else:
            low, high = bisect_left(self._order, request.key), bisect_left(self._order, request.range_end)
            if request.limit and high - low > request.limit:
                return [self.keys[key] for key in self._order[low : low + request.limit]], True
            return [self.keys[key] for key in self._order[low:high]], False
        more = bool(request.limit) and len(found) > request.limit
        return found[: request.limit] if more else found, more

    def _at(self, key: bytes, revision: int) -> Version | None:
        versions = self._versions.get(key, [])
        place = bisect_right(versions, revision, key=_revision)
        return versions[place - 1] if place and versions[place - 1].value is not None else None

    def _transact(self, request: _Txn) -> bytes:
        holds = True
        for compare in request.compare:
            found = self.keys.get(compare.key)
            if compare.target == "VERSION":
                holds &= (found.version if found else 0) == compare.version
            else:
                holds &= (found.revision if found else 0) == compare.mod_revision
        responses = []
        for operation in request.success if holds else request.failure:
            if operation.request_put:
                self._put(operation.request_put)
                responses.append(b'{"response_put":{"header":{"revision":"%d"}}}' % self.revision)
            elif operation.request_range:
                responses.append(b'{"response_range":%s}' % self._get(operation.request_range))
            elif operation.request_delete_range:
                gone = self._delete(operation.request_delete_range.key)
                kvs = gone.text if gone else b""
                responses.append(b'{"response_delete_range":{"deleted":"%d","prev_kvs":[%s]}}' % (bool(gone), kvs))
        return b'{"header":{"revision":"%d"},"succeeded":%s,"responses":[%s]}' % (
            self.revision,
            b"true" if holds else b"false",
            b",".join(responses),
        )

    def _put(self, request: _Put) -> None:
        if request.lease and request.lease not in self.leases:
            raise Refused(NOT_FOUND, "etcdserver: requested lease not found")
        self.revision += 1
        before = self.keys.get(request.key)
        self._leave(before)
        if request.lease:
            self.leases[request.lease].keys[request.key] = None
        version = Version(
            request.key,
            self.revision,
            before.created if before else self.revision,
            before.version + 1 if before else 1,
            request.value,
            request.lease,
        )
        version = msgspec.structs.replace(version, text=_text(version))
        if not before:
            insort(self._order, request.key)
        self.keys[request.key] = version
        self._record(version, b'{"kv":%s}' % version.text)

    def _delete(self, key: bytes) -> Version | None:
        before = self.keys.pop(key, None)
        if before:
            self.revision += 1
            self._leave(before)
            del self._order[bisect_left(self._order, key)]
            gone = msgspec.json.encode({"type": "DELETE", "kv": {"key": key, "mod_revision": str(self.revision)}})
            self._record(Version(key, self.revision), gone)
        return before

    def _leave(self, version: Version | None) -> None:
        if version and version.lease and (lease := self.leases.get(version.lease)):
            lease.keys.pop(version.key, None)

    def _record(self, version: Version, event: bytes) -> None:
        self._versions.setdefault(version.key, []).append(version)
        self._events.append((self.revision, version.key, event))
        self._revisions.append(self.revision)
        self.on_change(version)

    def _grant(self, number: int, ttl: float) -> Lease:
        lease = self.leases[number] = Lease(number, ttl, self._loop.time() + ttl, {})
        self._loop.call_later(ttl, self._expire, lease, context=self.context)
        return lease

    def _expire(self, lease: Lease) -> None:
        if self.leases.get(lease.id) is not lease:
            return
        left = lease.ends - self._loop.time()
        if left > 0:
            self._loop.call_later(left, self._expire, lease, context=self.context)
        elif not any(member.up and not member.stale and not member.paused for member in self.members):
            self._loop.call_later(1.0, self._expire, lease, context=self.context)  # without a leader nothing expires
        else:
            self.on_expiry(list(lease.keys))
            self._end(lease)
            self._spread()

    def _end(self, lease: Lease) -> None:
        del self.leases[lease.id]
        for key in list(lease.keys):
            self._delete(key)

    def _spread(self) -> None:
        for member in self.members:
            if member.lag:
                self._loop.call_later(member.lag, member.catch_up, context=self.context)
            else:
                member.catch_up()

    def _answer(self, fields: dict[str, Any]) -> bytes:
        return msgspec.json.encode({**_header(self.revision), **fields})


def _revision(version: Version) -> int:
    return version.revision


def _header(revision: int) -> dict[str, Any]:
    return {"header": {"revision": str(revision)}}


def _line(result: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"result": result}) + b"\n"


def _text(version: Version) -> bytes:
    fields = {
        "key": version.key,
        "create_revision": str(version.created),
        "mod_revision": str(version.revision),
        "version": str(version.version),
        "value": version.value,
    }
    if version.lease:
        fields["lease"] = str(version.lease)
    return msgspec.json.encode(fields)
