"""What a target is, the ways its input is cut into values, and a clock that makes waiting cost nothing.

A target takes bytes. It may raise the documented errors of what it tries, which it names, and nothing else; what must hold
besides, it asserts. The same function serves the fuzzer, the replay of the corpus in the tests, and a person with a crash.
"""

from __future__ import annotations

import asyncio
import logging
import selectors
import struct
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import msgspec

LONGEST = 4096
"""Bytes of an input: what needs more to fail is found by the limits that other tests check."""


class Target(msgspec.Struct, frozen=True):
    """One thing that is fuzzed. errors: the documented ones. seeds: well-formed inputs to begin with."""

    name: str
    run: Callable[[bytes], None]
    errors: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]

    def check(self, data: bytes) -> None:
        """Try one input; whatever leaves this is a find."""
        try:
            self.run(data)
        except self.errors as error:
            told = str(error)
            assert told, f"{type(error).__name__} that tells nothing"  # noqa: PT017  # this is no test of pytest's
            assert len(told) < 20_000, f"an error text of {len(told)} characters"


TARGETS: dict[str, Target] = {}


def target(
    name: str, *errors: type[Exception], seeds: Iterable[bytes | str] = ()
) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Register a target."""

    def register(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
        given = tuple(seed.encode() if isinstance(seed, str) else seed for seed in seeds)
        TARGETS[name] = Target(name, run, errors, given or (b"",))
        return run

    return register


class Cut:
    """Takes values off the front of an input; one that is used up gives zeros and empty bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """Bytes not taken yet."""
        return len(self._data) - self._at

    def number(self, below: int) -> int:
        """A number from 0 to below - 1; one byte of input, or two where one is not enough."""
        size = 1 if below <= 256 else 2
        return int.from_bytes(self.bytes(size).ljust(size, b"\0"), "big") % below

    def bytes(self, size: int) -> bytes:
        """Up to `size` bytes."""
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def piece(self) -> bytes:
        """Some bytes, with their length (two bytes) before them."""
        return self.bytes(int.from_bytes(self.bytes(2).ljust(2, b"\0"), "big"))

    def rest(self) -> bytes:
        """All that is left."""
        return self.bytes(self.left)


def pieces(*parts: bytes | str) -> bytes:
    """The input that `Cut.piece` takes these parts from, one after another."""
    encoded = [part.encode() if isinstance(part, str) else part for part in parts]
    return b"".join(struct.pack("!H", len(part)) + part for part in encoded)


class _Instant(selectors.BaseSelector):
    """Never waits: where it would, the loop's clock goes forward instead."""

    def __init__(self, clock: list[float]) -> None:
        self._selector, self._clock = selectors.SelectSelector(), clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._selector.select(0)
        if not ready:
            # Nothing to read and no timer: nobody will ever wake it.
            assert timeout is not None, "everything waits, and for nothing"
            self._clock[0] += timeout
            assert self._clock[0] < _FOREVER, "it did not end within a day"
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._selector.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._selector.modify(fileobj, events, data)

    def close(self) -> None:
        self._selector.close()

    def get_map(self) -> Any:
        return self._selector.get_map()


_FOREVER = 3 * 86_400.0  # seconds


def play(scene: Callable[[], Awaitable[None]]) -> None:
    """Run a coroutine to its end on a loop whose clock jumps; no task of it may be left, or end with an exception unseen."""
    clock = [0.0]
    loop = asyncio.SelectorEventLoop(_Instant(clock))
    loop.time = lambda: clock[0]  # type: ignore[method-assign]  # the loop's clock is made for this
    unseen: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: unseen.append(context))
    logged = _Logged()
    logger = logging.getLogger("wincey")
    logger.addHandler(logged)
    try:
        loop.run_until_complete(_whole(scene))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        logger.removeHandler(logged)
        loop.close()
    for context in unseen:
        raise AssertionError(f"the event loop was told: {context.get('message')}") from context.get("exception")
    if logged.failure:
        raise AssertionError("an unexpected exception was logged") from logged.failure


async def _whole(scene: Callable[[], Awaitable[None]]) -> None:
    await scene()
    for _ in range(50):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if not others:
            return
        await asyncio.sleep(10)
    raise AssertionError(f"still under way: {sorted(map(repr, others))[:3]}")


class _Logged(logging.Handler):
    """What is logged with a traceback is an exception that nobody expected."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.failure: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.failure = record.exc_info[1]


def chosen(cut: Cut, values: Sequence[Any]) -> Any:
    """One of some values, by the input."""
    return values[cut.number(len(values))]
