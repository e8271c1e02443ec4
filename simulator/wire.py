"""The way between a host and the members of the store: latency, partitions, lost requests and answers, broken streams.

It takes the place of the agents' HTTP client and nothing above it, so that etcd's client with its failover, its doubts about
lost answers and its watches that begin anew are as real as the rest of the agent. What is lost here is lost as TCP loses it:
a request that may or may not have been carried out, or a connection that breaks, now or after half a minute of silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import copy_context
from typing import Literal

from simulator.etcd import UNAVAILABLE, Member, Refused, Watcher
from wincey.http.client import ConnectFailed, HttpClient, HttpError, Interrupted, Stream

SILENCE = 25.0
"""Seconds after which a connection on which nothing is acknowledged breaks."""

NO_QUORUM = 7.0
"""Seconds after which a member that waits for the majority gives up."""

Cut = Literal["silent", "refused"]
"""How a partition shows: packets vanish, or connections are refused and reset."""


class Link:
    """One host's way to all members.

    latency: bounds of one way in seconds. lose_request, lose_answer: how probable it is. repeat, swap: the same for a line
    of a watch that comes twice, or after its successor. cut: members that can't be reached, and how. told(text): for the
    history, None while nobody reads it.
    """

    def __init__(self, rng: random.Random, owner: str = "", latency: tuple[float, float] = (0.0005, 0.004)) -> None:
        self.rng, self.owner, self.latency = rng, owner, latency
        self.lose_request = self.lose_answer = self.repeat = self.swap = 0.0
        self.cut: dict[str, Cut] = {}
        self.requests = 0
        self.told: Callable[[str, str, bytes], None] | None = None
        self.reached_at = 0.0
        self.world = copy_context()
        self._clients: dict[WireClient, None] = {}

    def client(self, member: Member) -> WireClient:
        """A client of the member for one run of an agent."""
        made = WireClient(self, member)
        self._clients[made] = None
        return made

    def partition(self, members: Mapping[str, Cut]) -> None:
        """Cut the way to these members, and heal it to all others."""
        self.cut = dict(members)
        for client in self._clients:
            client.partitioned(self.cut.get(client.member.name))

    def forget(self) -> None:
        """The agent has died, and the kernel has closed its connections."""
        for client in self._clients:
            client.abort("the program died")
        self._clients.clear()

    def delay(self) -> float:
        """Seconds of one way."""
        return self.rng.uniform(*self.latency)


class WireStream(Stream):
    """An answer: whole from the beginning, or a watch to which lines are added."""

    def __init__(self, link: Link, status: int, body: bytes | None) -> None:
        self.status, self.headers = status, {}
        self.complete = body is not None
        self._link = link
        self._pieces: deque[bytes] = deque([body] if body else [])
        self._held: list[bytes] = []  # on the wire, while it is cut
        self._late: bytes | None = None  # to come after its successor
        self._news: asyncio.Future[None] | None = None
        self._broken: HttpError | None = None
        self._latest = 0.0
        self.silent = False

    async def read(self) -> bytes:
        """See Stream."""
        while not self._pieces:
            if self._broken:
                raise self._broken
            if self.complete:
                return b""
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        if len(self._pieces) == 1:
            return self._pieces.popleft()
        joined = b"".join(self._pieces)
        self._pieces.clear()
        return joined

    async def read_all(self) -> bytes:
        """See Stream."""
        parts = []
        while piece := await self.read():
            parts.append(piece)
        return b"".join(parts)

    def send(self, line: bytes) -> None:
        """From the server: on its way, after all that went before."""
        loop, link = asyncio.get_running_loop(), self._link
        self._latest = max(self._latest, loop.time() + link.delay())
        loop.call_at(self._latest, self._arrive, line, context=link.world)

    def _arrive(self, line: bytes) -> None:
        link = self._link
        if self.silent:
            self._held.append(line)
            return
        if link.swap and self._late is None and link.rng.random() < link.swap:
            self._late = line
            asyncio.get_running_loop().call_later(0.5, self._belated, context=link.world)
            return
        self._take(line)
        if link.repeat and link.rng.random() < link.repeat:
            self._take(line)
        self._belated()

    def _belated(self) -> None:
        if self._late is not None:
            line, self._late = self._late, None
            self._take(line)

    def _take(self, line: bytes) -> None:
        if self._broken:
            return
        half = len(line) // 2
        self._pieces.extend((line[:half], line[half:]) if self._link.repeat else (line,))
        self._wake()

    def heal(self) -> None:
        """What was held comes after all."""
        self.silent = False
        held, self._held = self._held, []
        for line in held:
            self._arrive(line)

    def break_off(self, why: str) -> None:
        """Nothing comes any more."""
        if not self.complete and not self._broken:
            self._broken = Interrupted(f"the answer broke off: {why}")
            self._wake()

    def _wake(self) -> None:
        if self._news and not self._news.done():
            self._news.set_result(None)


class WireClient(HttpClient):
    """The agent's HTTP client for one member."""

    def __init__(self, link: Link, member: Member) -> None:
        super().__init__(f"http://127.0.0.1:{2379 + member.cluster.members.index(member)}")
        self.link, self.member = link, member
        self._waiting: dict[asyncio.Future[tuple[int, bytes]], None] = {}
        self._streams: dict[WireStream, Watcher | None] = {}
        self._ended = False

    @contextlib.asynccontextmanager
    async def stream(
        self,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        timeout: float = 10.0,
        repeat: bool = True,
    ) -> AsyncIterator[Stream]:
        """See HttpClient."""
        what = target.removeprefix("/v3/")
        loop = asyncio.get_running_loop()
        await self._reach()
        answer: asyncio.Future[tuple[int, bytes]] = loop.create_future()
        self._waiting[answer] = None
        stream: WireStream | None = None
        try:
            loop.call_later(self.link.delay(), self._arrive, what, body, answer, context=self.link.world)
            try:
                async with asyncio.timeout(timeout):
                    status, data = await answer
            except TimeoutError:
                raise Interrupted(f"{self.member.name}: no answer within {timeout:g} s") from None
            if what != "watch":
                yield WireStream(self.link, status, data)
                return
            stream = WireStream(self.link, status, None)
            self._streams[stream] = None
            stream.silent = self.link.cut.get(self.member.name) == "silent"
            # The server began to watch when the request was there; that the client hears of it later is the stream's doing.
            loop.call_soon(self._begin, stream, body, context=self.link.world)
            yield stream
        finally:
            self._waiting.pop(answer, None)
            if stream:
                self._drop(stream)

    async def close(self) -> None:
        """See HttpClient."""
        self._ended = True
        self.abort("the client is closed")
        await asyncio.sleep(0)

    def abort(self, why: str) -> None:
        """Break all that is under way."""
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(Interrupted(f"{self.member.name}: the connection broke: {why}"))
        for stream in list(self._streams):
            stream.break_off(why)
            self._drop(stream)
        self.member.breaks.pop(self.abort, None)

    def partitioned(self, cut: Cut | None) -> None:
        """The way was cut or healed."""
        if cut == "refused":
            self.abort("reset by peer")
            return
        for stream in self._streams:
            if cut:
                stream.silent = True
            else:
                stream.heal()
        if cut:
            asyncio.get_running_loop().call_later(SILENCE, self._fell_silent, context=self.link.world)

    def _fell_silent(self) -> None:
        if self.link.cut.get(self.member.name) == "silent":
            self.abort("timed out")

    async def _reach(self) -> None:
        cut = self.link.cut.get(self.member.name)
        if self._ended or cut == "refused" or not self.member.up:
            await asyncio.sleep(self.link.delay())
            raise ConnectFailed(f"{self.member.name}: connection refused")
        if cut and self.link.rng.random() < 0.7:  # else one that was open already
            await asyncio.sleep(2.0)
            raise ConnectFailed(f"{self.member.name}: no connection within 2 s")

    def _arrive(self, what: str, body: bytes, answer: asyncio.Future[tuple[int, bytes]]) -> None:  # noqa: PLR0911  # each fate is one
        """At the server, in the world's own context."""
        link, member, loop = self.link, self.member, asyncio.get_running_loop()
        if answer.done() or member.name in link.cut:
            return
        if not member.up:
            self._fail(answer, "the server went away")
            return
        if member.paused:
            loop.call_later(1.0, self._arrive, what, body, answer, context=link.world)
            return
        if link.lose_request and link.rng.random() < link.lose_request:
            if link.told:
                link.told("lost request", what, body)
            loop.call_later(link.rng.choice((0.01, SILENCE)), self._fail, answer, "lost", context=link.world)
            return
        member.breaks[self.abort] = None
        link.requests += 1
        link.reached_at = loop.time()
        if what == "watch":
            self._answer(answer, (200, b""))
            return
        if member.stale:
            refusal = Refused(UNAVAILABLE, "etcdserver: request timed out")
            loop.call_later(NO_QUORUM, self._answer, answer, (refusal.status, refusal.body()), context=link.world)
            return
        try:
            reply = 200, member.cluster.answer(member, what, body, link.owner)
        except Refused as refused:
            reply = refused.status, refused.body()
        if link.told:
            link.told("asked", what, body)
        if link.lose_answer and link.rng.random() < link.lose_answer:
            if link.told:
                link.told("lost answer", what, body)
            loop.call_later(link.rng.choice((0.01, SILENCE)), self._fail, answer, "lost", context=link.world)
            return
        loop.call_later(link.delay() + member.lag, self._answer, answer, reply, context=link.world)

    def _answer(self, answer: asyncio.Future[tuple[int, bytes]], reply: tuple[int, bytes]) -> None:
        if not answer.done() and self.member.name not in self.link.cut:
            answer.set_result(reply)

    def _fail(self, answer: asyncio.Future[tuple[int, bytes]], why: str) -> None:
        if not answer.done():
            answer.set_exception(Interrupted(f"{self.member.name}: the connection broke: {why}"))

    def _begin(self, stream: WireStream, body: bytes) -> None:
        if stream not in self._streams:
            return
        if not self.member.up:
            stream.break_off("the server went away")
            return
        self._streams[stream] = self.member.cluster.watch(self.member, body, stream.send)

    def _drop(self, stream: WireStream) -> None:
        watcher = self._streams.pop(stream, None)
        if watcher:
            self.member.watchers.pop(watcher, None)
