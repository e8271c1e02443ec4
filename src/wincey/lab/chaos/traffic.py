"""What passes between containers while a scenario runs: echo requests, and a conversation over TCP, for every pair.

One thread serves all of it: a socket belongs to the namespace it was made in, and works from any thread afterwards. Requests
are answered by the other container's kernel, so that a request which is never answered was lost on the way, there or back.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TypeAlias

from wincey.lab.chaos.scenario import Counted
from wincey.lab.errors import LabError
from wincey.lab.namespace import call_in
from wincey.lab.node import Container
from wincey.model.checksum import checksum

Pair: TypeAlias = tuple[str, str]
"""From which host, and to which."""

INTERVAL = 0.02
"""Seconds between two requests of a pair."""
GRACE = 1.0
"""Seconds that answers have after the last request. A late one is no lost one: the machine may be busy."""

_PORT = 7007
_SAY_EVERY = 0.1
_BLOCK = 1024
_ICMP_FILTER, _SOL_RAW = 1, 255  # include/uapi/linux/icmp.h: a bit for each type that is not wanted
_HEADER = struct.Struct("!BBHHH")  # type, code, checksum, identifier, number: RFC 792
_REQUEST, _REPLY, _IP_HEADER = 8, 0, 20
_TOKEN = 8


class Way:
    """The requests of one pair, by number: when each was sent, in seconds of the monotonic clock, and which were answered."""

    def __init__(
        self, pair: Pair, source: Container, target: Container, sender: socket.socket, identifier: int
    ) -> None:
        self.pair, self.source, self.target = pair, source, target
        self.sent: list[float] = []
        self.answered: set[int] = set()
        self._socket, self._identifier = sender, identifier

    def ask(self, token: bytes) -> None:
        """Send the next request."""
        number = len(self.sent)
        self.sent.append(time.monotonic())
        data = token + number.to_bytes(4, "big") + bytes(40)
        head = _HEADER.pack(_REQUEST, 0, 0, self._identifier, number & 0xFFFF)
        head = _HEADER.pack(_REQUEST, 0, checksum(head + data), self._identifier, number & 0xFFFF)
        with suppress(OSError):  # no way out, say: it counts as lost
            self._socket.sendto(head + data, (self.target.address(4) or "", 0))

    def lost(self) -> list[float]:
        """When those that were never answered had been sent."""
        return [sent for number, sent in enumerate(self.sent) if number not in self.answered]

    def well_since(self, since: float) -> float | None:
        """When the first request was sent after which none was lost, `since` at the earliest; None when the last one was."""
        lost = self.lost()
        return next((sent for sent in self.sent if sent >= since and (not lost or sent > lost[-1])), None)

    def silence(self) -> float:
        """The longest time in seconds between two requests that were answered, as far as one was lost in between."""
        longest, last, broken = 0.0, 0.0, False
        for number, sent in enumerate(self.sent):
            if number not in self.answered:
                broken = True
                continue
            if broken and last:
                longest = max(longest, sent - last)
            last, broken = sent, False
        return longest


class Conversation:
    """One TCP connection that lasts: it sends a block now and then, and wants it back. `trouble`: what became of it."""

    def __init__(self, pair: Pair, connection: socket.socket) -> None:
        self.pair, self.trouble = pair, ""
        self.said = self.heard = 0
        self.connection = connection

    def say(self) -> None:
        """Send a block."""
        if self.trouble:
            return
        try:
            self.said += self.connection.send(bytes(_BLOCK))
        except BlockingIOError:
            pass  # so much is on its way already
        except OSError as error:
            self.trouble = str(error)

    def hear(self) -> bool:
        """Take in what came back; whether there is more to come."""
        try:
            piece = self.connection.recv(65536)
        except OSError as error:
            self.trouble = str(error)
            return False
        self.heard += len(piece)
        if not piece:
            self.trouble = self.trouble or "it was closed"
        return bool(piece)


class Traffic:
    """Between these containers, from entering to leaving it. Raises LabError where TCP can't even begin."""

    def __init__(self, containers: Sequence[Container]) -> None:
        self._containers = containers
        self._selector = selectors.DefaultSelector()
        self._token = os.urandom(_TOKEN)
        self._sockets: list[socket.socket] = []
        self._end = threading.Event()
        self._asking = True
        self._thread = threading.Thread(target=self._run, name="chaos-traffic", daemon=True)
        self.ways: list[Way] = []
        self.conversations: list[Conversation] = []

    def __enter__(self) -> Traffic:
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._asking = False
            time.sleep(GRACE)  # the latest may be answered yet
        self._end.set()
        self._thread.join()
        self._close()

    def counted(self, chosen: Callable[[Pair], bool]) -> Counted:
        """The requests between some pairs, once it has ended."""
        ways = [way for way in self.ways if chosen(way.pair)]
        return Counted(len(ways), sum(len(way.sent) for way in ways), sum(len(way.lost()) for way in ways))

    def conversation_works(self, source: Container, target: Container) -> bool:
        """Whether a new TCP connection carries some packets there and back."""

        def talk() -> bool:
            try:
                with socket.create_connection((target.address(4) or "", _PORT), timeout=5) as connection:
                    block, back = bytes(32 * _BLOCK), 0
                    connection.sendall(block)
                    while back < len(block) and (piece := connection.recv(65536)):
                        back += len(piece)
                    return back == len(block)
            except OSError:
                return False

        return call_in(source.netns, talk)

    def _open(self) -> None:
        senders = {container.name: call_in(container.netns, _icmp) for container in self._containers}
        self._sockets += senders.values()
        for container in self._containers:
            server = call_in(container.netns, _server)
            self._sockets.append(server)
            self._selector.register(server, selectors.EVENT_READ, lambda server=server: self._accept(server))
        for source in self._containers:
            for target in self._containers:
                if source is not target:
                    pair = source.host.name, target.host.name
                    identifier = 0x5743 ^ len(self.ways)
                    self.ways.append(Way(pair, source, target, senders[source.name], identifier))
        by_identifier = {(way.source.name, 0x5743 ^ number): way for number, way in enumerate(self.ways)}
        for name, sender in senders.items():
            self._selector.register(
                sender, selectors.EVENT_READ, lambda name=name, sender=sender: self._read(name, sender, by_identifier)
            )
        for way in self.ways:
            if way.pair[0] < way.pair[1]:
                self._converse(way)

    def _converse(self, way: Way) -> None:
        def connect() -> socket.socket:
            return socket.create_connection((way.target.address(4) or "", _PORT), timeout=5)

        try:
            connection = call_in(way.source.netns, connect)
        except OSError as error:
            raise LabError(f"no TCP from {way.source.name} to {way.target.name} before any fault: {error}") from None
        connection.setblocking(False)
        self._sockets.append(connection)
        conversation = Conversation(way.pair, connection)
        self.conversations.append(conversation)
        self._selector.register(
            connection, selectors.EVENT_READ, lambda: conversation.hear() or self._selector.unregister(connection)
        )

    def _accept(self, server: socket.socket) -> None:
        connection, _ = server.accept()
        connection.setblocking(False)
        self._sockets.append(connection)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._echo(connection))

    def _echo(self, connection: socket.socket) -> None:
        piece = b""
        with suppress(OSError):
            piece = connection.recv(65536)
            connection.sendall(piece)  # never more than the other side waits for, which fits into the socket
        if not piece:
            self._selector.unregister(connection)
            connection.close()

    def _read(self, name: str, receiver: socket.socket, ways: dict[tuple[str, int], Way]) -> None:
        with suppress(BlockingIOError):
            while True:
                packet = receiver.recv(2048)[_IP_HEADER:]
                if len(packet) < _HEADER.size + _TOKEN + 4:
                    continue
                identifier = _HEADER.unpack_from(packet)[3]
                data = packet[_HEADER.size :]
                way = ways.get((name, identifier))
                if way and data.startswith(self._token):
                    way.answered.add(int.from_bytes(data[_TOKEN : _TOKEN + 4], "big"))

    def _run(self) -> None:
        due = say_due = time.monotonic()
        while not self._end.is_set():
            now = time.monotonic()
            if now >= due:
                for way in self.ways if self._asking else ():
                    way.ask(self._token)
                due = max(due + INTERVAL, now)  # what a busy machine missed is not made up for
            if now >= say_due:
                for conversation in self.conversations if self._asking else ():
                    conversation.say()
                say_due = now + _SAY_EVERY
            for key, _ in self._selector.select(max(0.0, due - time.monotonic())):
                key.data()

    def _close(self) -> None:
        self._selector.close()
        for each in self._sockets:
            each.close()


def silent(conversations: Iterable[Conversation]) -> list[Conversation]:
    """Those that ended before their time, or did not get all back that they said."""
    return [each for each in conversations if each.trouble or each.heard < each.said]


def _icmp() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP)
    made.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("I", ~(1 << _REPLY) & 0xFFFFFFFF))
    return made


def _server() -> socket.socket:
    server = socket.create_server(("", _PORT), backlog=64)
    server.setblocking(False)
    return server
