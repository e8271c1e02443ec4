"""Interruptions become exceptions where work goes on, and wait where it is cleaned up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(SystemExit):
    """SIGTERM or SIGHUP came: clean up and end with the exit code that a shell gives to such an end."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT and Interrupted on SIGTERM and SIGHUP, but only once: the program then cleans up and
    ends, and further signals are ignored, so that none can hit the way from here to the clean-up.
    """

    def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else Interrupted(number)

    # An ignored signal (nohup) stays ignored.
    numbers = [each for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        if numbers and signal.getsignal(numbers[0]) is interrupt:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def shielded() -> Iterator[None]:
    """Ignore interruptions, in us and in programs we run: a second Ctrl-C must not leave half of a lab behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
