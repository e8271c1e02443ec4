"""The store on etcd v2's HTTP API (compatibility reference, section 3.4).

Reads are quorum reads. They cost the cluster a raft entry each, but we read at a start, while there is no config, and after
lost history: seldom. In return what we read is never older than what we wrote or saw before, at whichever member we ask;
an old listing would show leases as gone.

A watch is a series of long polls, one event each. A poll is given up after about a minute and asked anew, so a dead
connection is noticed; a quorum read in between notices a member that lost its cluster. etcd keeps the last 1000 events of
the whole store: the cursor follows the store's index with each empty poll, and yet a busy store may leave it behind, which
is an ordinary HistoryLost. Nothing tells a store that lost its data from one that did not once its index has passed our
cursor again; v3 can be asked for that, v2 can't.
"""

from __future__ import annotations

import asyncio
import math
import re
import ssl
from binascii import b2a_base64
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial

import msgspec

from wincey.http.client import HttpClient, Stream
from wincey.model.errors import (
    UNREADABLE,
    HistoryLost,
    KeyConflict,
    KeyExists,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from wincey.store.endpoints import CALL_DEADLINE, Endpoints, NoSuchApi, jitter
from wincey.store.kv import Change, Entry, Listing, OutageCallback

_NOT_FOUND, _COMPARE_FAILED, _EXISTS, _NO_USER, _RAFT, _ELECTION, _CLEARED = 100, 101, 105, 110, 300, 301, 401
_REMOVED = frozenset({"delete", "expire", "compareAndDelete"})
_PROBE_DEADLINE = 5.0
_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/")
_VERSION = re.compile(rb'"etcdcluster":\s*"(\d+)\.(\d+)')


class Failure(StoreError):
    """What etcd answered instead of a result. code: etcd v2's errorCode; index: the store's."""

    def __init__(self, code: int, index: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.index = index


class _Node(msgspec.Struct, rename="camel", gc=False):
    key: str = "/"
    value: str = ""
    dir: bool = False
    nodes: list[_Node] = []
    modified_index: int = 0
    created_index: int = 0
    expiration: str = ""
    ttl: int = 0

    def entry(self) -> Entry:
        return Entry(
            self.key, self.value.encode(), self.modified_index, self.created_index, permanent=not self.expiration
        )

    def leaves(self) -> Iterator[_Node]:
        if not self.dir:
            yield self
        for node in self.nodes:
            yield from node.leaves()


class _Answer(msgspec.Struct):
    action: str
    node: _Node


class _Fault(msgspec.Struct, rename="camel"):
    error_code: int
    message: str = ""
    cause: str = ""
    index: int = 0


_answer = msgspec.json.Decoder(_Answer)
_fault = msgspec.json.Decoder(_Fault)


class Etcd2Store:
    """A KeyValueStore on an etcd cluster that serves the v2 API.

    urls: of its endpoints (see parse_endpoints). tls: for https ones. poll: seconds of one long poll, give or take a
    quarter. random: for jitter, see Endpoints.
    """

    values_v2 = True

    def __init__(
        self,
        urls: Sequence[str],
        tls: ssl.SSLContext | None = None,
        *,
        username: str = "",
        password: str = "",
        deadline: float = CALL_DEADLINE,
        poll: float = 60.0,
        random: Callable[[], float] = jitter,
    ) -> None:
        self._endpoints = Endpoints(urls, tls, random=random)
        self._username = username
        credentials = b2a_base64(f"{username}:{password}".encode(), newline=False).decode()
        self._headers = {"authorization": f"Basic {credentials}"} if username else {}
        self._deadline = deadline
        self._poll = poll
        self._can_refresh: bool | None = None

    @property
    def name(self) -> str:
        return f"etcd v2 at {self._endpoints}"

    async def get(self, key: str) -> Entry | None:
        node = await self._node(key)
        return None if node is None or node.dir else node.entry()

    async def read_all(self, prefix: str) -> Listing:
        async def attempt(client: HttpClient, _uncertain: bool) -> Listing:
            target = _target(prefix, recursive="true", quorum="true")
            try:
                answer, index = await self._request(client, "GET", target)
            except Failure as failure:
                if failure.code != _NOT_FOUND:
                    raise
                return Listing([], failure.index)
            entries = [node.entry() for node in answer.node.leaves() if node.key.startswith(prefix)]
            return Listing(sorted(entries, key=lambda entry: entry.key), index)

        return await self._endpoints.call(attempt, self._deadline)

    async def holds(self, prefix: str) -> bool:
        """Whether there is any key below the prefix."""
        node = await self._node(prefix)
        return node is not None and bool(node.nodes)

    async def create(self, key: str, value: bytes, ttl: float | None) -> Entry:
        async def attempt(client: HttpClient, uncertain: bool) -> Entry:
            try:
                return await self._put(client, _target(key, prevExist="false"), _form(value, ttl))
            except Failure as failure:
                if failure.code != _EXISTS:
                    raise
            if uncertain and (ours := await self.get(key)) and ours.value == value:
                return ours  # by an earlier attempt, whose answer was lost
            raise KeyExists(f"{key} exists")

        return await self._endpoints.call(attempt, self._deadline)

    async def replace(self, entry: Entry, value: bytes, ttl: float | None) -> Entry:
        return await self._swap(entry, value, _form(value, ttl))

    async def refresh(self, entry: Entry, ttl: float) -> Entry:
        if entry.permanent:
            raise KeyConflict(f"{entry.key} has no time limit that could start anew")
        node = await self._node(entry.key)
        if node is None or node.modified_index != entry.revision:
            raise _changed(entry)
        value = node.value.encode()
        # `refresh` leaves the value and wakes no watcher. A server that does not know it would take it for an empty value.
        form = f"ttl={_seconds(ttl)}&refresh=true".encode() if await self._refreshes() else _form(value, ttl)
        return await self._swap(entry, value, form)

    async def time_left(self, entry: Entry) -> float | None:
        node = await self._node(entry.key)
        if node is None or node.created_index != entry.created:
            raise _changed(entry)
        return float(node.ttl) if node.expiration else None

    async def delete(self, key: str, revision: int | None = None) -> bool:
        target = _target(key) if revision is None else _target(key, prevIndex=str(revision))

        async def attempt(client: HttpClient, uncertain: bool) -> bool:
            try:
                await self._request(client, "DELETE", target)
            except Failure as failure:
                if failure.code == _NOT_FOUND:
                    return uncertain
                if failure.code == _COMPARE_FAILED:
                    raise KeyConflict(f"{key} is no longer at revision {revision}") from None
                raise
            return True

        return await self._endpoints.call(attempt, self._deadline)

    def watch(self, prefix: str, after: int) -> AsyncIterator[list[Change]]:
        return self._endpoints.follow(partial(self._follow, prefix, [after]))

    def on_outage(self, callback: OutageCallback) -> None:
        self._endpoints.outage = callback

    async def close(self) -> None:
        await self._endpoints.close()

    async def _node(self, key: str) -> _Node | None:
        async def attempt(client: HttpClient, _uncertain: bool) -> _Node | None:
            try:
                return (await self._request(client, "GET", _target(key, quorum="true")))[0].node
            except Failure as failure:
                if failure.code == _NOT_FOUND:
                    return None
                raise

        return await self._endpoints.call(attempt, self._deadline)

    async def _swap(self, entry: Entry, value: bytes, form: bytes) -> Entry:
        """PUT the form if the key is still at the entry's revision. value: what the key has then."""

        async def attempt(client: HttpClient, uncertain: bool) -> Entry:
            try:
                return await self._put(client, _target(entry.key, prevIndex=str(entry.revision)), form)
            except Failure as failure:
                if failure.code not in {_NOT_FOUND, _COMPARE_FAILED}:
                    raise
            now = await self.get(entry.key) if uncertain else None
            if now and now.created == entry.created and now.value == value:
                return now  # by an earlier attempt, whose answer was lost
            raise _changed(entry)

        return await self._endpoints.call(attempt, self._deadline)

    async def _put(self, client: HttpClient, target: str, form: bytes) -> Entry:
        return (await self._request(client, "PUT", target, form))[0].node.entry()

    async def _refreshes(self) -> bool:
        """Whether every member is of 2.3 or later."""
        if self._can_refresh is None:

            async def attempt(client: HttpClient, _uncertain: bool) -> bool:
                found = _VERSION.search((await client.request("GET", "/version", headers=self._headers)).body)
                return found is not None and (int(found[1]), int(found[2])) >= (2, 3)

            self._can_refresh = await self._endpoints.call(attempt, self._deadline)
        return self._can_refresh

    async def _request(self, client: HttpClient, method: str, target: str, form: bytes = b"") -> tuple[_Answer, int]:
        """The answer and the store's index with it; raises HttpError, StoreUnavailable, StoreDenied, Failure."""
        headers = self._headers | ({"content-type": "application/x-www-form-urlencoded"} if form else {})
        response = await client.request(method, target, headers=headers, body=form, repeat=method == "GET")
        return self._read(client, response.status, response.headers, response.body)

    def _read(self, client: HttpClient, status: int, headers: dict[str, str], body: bytes) -> tuple[_Answer, int]:
        index = _index(headers)
        try:
            if status < 300:
                return _answer.decode(body), index
            fault = _fault.decode(body)
        except UNREADABLE:
            raise self._unreadable(client, status, body) from None
        text = f"etcd at {client.url}: {fault.message}: {fault.cause} (errorCode {fault.error_code})"
        if fault.error_code == _NO_USER:
            advice = f"does it know user {self._username!r}?" if self._username else "give --etcd-username"
            raise StoreDenied(f"{text}: {advice}")
        if fault.error_code in {_RAFT, _ELECTION}:
            raise StoreUnavailable(text)
        raise Failure(fault.error_code, max(index, fault.index), text)

    def _unreadable(self, client: HttpClient, status: int, body: bytes) -> StoreError:
        text = f"etcd at {client.url}: HTTP status {status}: {body[:200].decode('utf-8', 'replace').strip()}"
        if status in {401, 403}:
            return StoreDenied(text)
        if status >= 500:
            return StoreUnavailable(text)
        if status == 404:
            return NoSuchApi(f"{client.url} has no etcd v2 API (its server needs --enable-v2)")
        return StoreError(text)

    async def _follow(self, prefix: str, cursor: list[int], client: HttpClient) -> AsyncGenerator[list[Change], None]:
        while True:
            target = _target(prefix, recursive="true", wait="true", waitIndex=str(cursor[0] + 1))
            async with client.stream("GET", target, headers=self._headers) as stream:
                index = _index(stream.headers)
                if stream.status == 200:
                    if index < cursor[0]:  # a member that lags, or a store that lost data
                        await self._check_past(client, prefix, cursor[0])
                    yield []
                body = await self._wait(stream)
            if stream.status == 200 and not body.strip():
                await self._check_past(client, prefix, cursor[0])
                cursor[0] = max(cursor[0], index)  # nothing of ours happened up to the beginning of this poll
                continue
            try:
                answer, _ = self._read(client, stream.status, stream.headers, body)
            except Failure as failure:
                if failure.code == _CLEARED:
                    raise HistoryLost(str(failure)) from None
                raise
            cursor[0] = answer.node.modified_index
            yield self._changes(prefix, answer)

    async def _wait(self, stream: Stream) -> bytes:
        """The event of a long poll, b"" when its time is over."""
        try:
            async with asyncio.timeout(self._poll * (0.75 + self._endpoints.random() / 2)):
                return await stream.read_all()
        except TimeoutError:
            return b""

    async def _check_past(self, client: HttpClient, prefix: str, cursor: int) -> None:
        """Raise HistoryLost when the cluster is at an earlier index than the watch was."""
        try:
            async with asyncio.timeout(_PROBE_DEADLINE):
                _, index = await self._request(client, "GET", _target(prefix + "config", quorum="true"))
        except Failure as failure:
            index = failure.index
        if index < cursor:
            raise HistoryLost(f"{client.url}: the store is at index {index}, we have seen {cursor}")

    def _changes(self, prefix: str, answer: _Answer) -> list[Change]:
        key, removed = answer.node.key, answer.action in _REMOVED
        if key.startswith(prefix) and not answer.node.dir:
            return [Change(key, None, answer.node.modified_index) if removed else Change(key, answer.node.entry())]
        if removed:  # one event stands for every key that was below
            raise HistoryLost(f"the directory {key} was removed")
        return []


def _target(key: str, **query: str) -> str:
    # A prefix keeps its last slash: who may read /net/* may not read /net, as etcd compares.
    path = _quote(key.encode())
    return f"/v2/keys{path}" + ("?" + "&".join(f"{name}={value}" for name, value in query.items()) if query else "")


def _index(headers: Mapping[str, str]) -> int:
    """The store's index in an answer's headers, 0 where there is none that can be one."""
    text = headers.get("x-etcd-index", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def _form(value: bytes, ttl: float | None) -> bytes:
    """A PUT's body. Without a ttl the key has no time limit, whatever it had before."""
    try:
        value.decode()
    except UnicodeDecodeError:
        raise StoreError("etcd v2 holds text; this value is no UTF-8") from None
    return (f"ttl={_seconds(ttl)}&" if ttl is not None else "").encode() + f"value={_quote(value)}".encode()


def _quote(data: bytes) -> str:
    return "".join(chr(byte) if byte in _SAFE else f"%{byte:02X}" for byte in data)


def _seconds(ttl: float) -> int:
    return max(1, math.ceil(ttl))


def _changed(entry: Entry) -> KeyConflict:
    return KeyConflict(f"{entry.key} is gone or was changed since revision {entry.revision}")
