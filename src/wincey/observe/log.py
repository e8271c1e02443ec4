"""The log on standard error: lines as klog writes them, or one JSON object a line.

A line of the log never raises and never gets lost: with arguments that don't fit its format it is written as it is, and a
standard error that is gone ends nothing. Verbosity is flannel's -v: level 0 is what an operator should read, 1 and up is
detail (`log.debug` is 1, `log.log(detail(3), ...)` is 3).
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import sys
import time
from typing import Any, TextIO

import msgspec

NETWORK: contextvars.ContextVar[str] = contextvars.ContextVar("network", default="")
"""The network that the running task is about, where a daemon has several: each line of the log names it."""

_SEVERITIES = ((logging.CRITICAL, "F"), (logging.ERROR, "E"), (logging.WARNING, "W"), (0, "I"))
_LEVELS = ((logging.CRITICAL, "fatal"), (logging.ERROR, "error"), (logging.WARNING, "warning"), (logging.INFO, "info"))

_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def detail(verbosity: int) -> int:
    """The logging level of a line that -v VERBOSITY and above shows, 1 to 10."""
    return logging.DEBUG + 1 - max(1, min(verbosity, 10))


def set_up_logging(form: str, verbosity: int, stream: TextIO | None = None) -> logging.Handler:
    """Send the log of this process to `stream` (standard error by default). form: "klog" or "json".

    Takes the place of every earlier handler of the root logger, and returns the new one.
    """
    # Nobody sees these, and each costs a call per line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = _Handler(stream or sys.stderr, JsonFormatter() if form == "json" else KlogFormatter())
    root = logging.getLogger()
    for earlier in root.handlers[:]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(detail(verbosity) if verbosity > 0 else logging.INFO)
    return handler


class KlogFormatter(logging.Formatter):
    """`I0102 15:04:05.000000    1234 file.py:12] message`, the time being local."""

    def __init__(self) -> None:
        super().__init__()
        self._pid = f"{os.getpid():7d}"
        self._second, self._clock = -1, ""

    def format(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second:
            self._second, self._clock = second, time.strftime("%m%d %H:%M:%S", time.localtime(second))
        severity = next(letter for level, letter in _SEVERITIES if record.levelno >= level)
        micros = int((record.created - second) * 1_000_000)
        head = f"{severity}{self._clock}.{micros:06d} {self._pid} {record.filename}:{record.lineno}] "
        network = NETWORK.get()
        return f"{head}{f'{network}: ' if network else ''}{record.getMessage()}{_traceback(self, record)}"


class JsonFormatter(logging.Formatter):
    """One object: ts (RFC 3339, UTC), level, logger, message, file, line, exception if any, and what `extra=` gave."""

    def format(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        micros = int((record.created - second) * 1_000_000)
        line: dict[str, Any] = {
            "ts": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{micros:06d}Z",
            "level": next((name for level, name in _LEVELS if record.levelno >= level), "debug"),
            "logger": record.name,
            "message": record.getMessage(),
            "file": record.filename,
            "line": record.lineno,
        }
        if network := NETWORK.get():
            line["network"] = network
        if trace := _traceback(self, record):
            line["exception"] = trace.lstrip("\n")
        line |= {key: value for key, value in record.__dict__.items() if key not in _OWN and key not in line}
        return msgspec.json.encode(line, enc_hook=str).decode()


class _Handler(logging.Handler):
    """Writes each line with one call, so that lines of several processes on one pipe don't mix."""

    def __init__(self, stream: TextIO, formatter: logging.Formatter) -> None:
        super().__init__()
        self._stream = stream
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # whatever the text of an object in it raises, the line must come
            line = self.format(_plain(record, error))
        with contextlib.suppress(OSError, ValueError):  # a closed standard error: there is nobody to tell
            self._stream.write(line + "\n")
            self._stream.flush()


def _plain(record: logging.LogRecord, error: Exception) -> logging.LogRecord:
    """The same record with nothing left in it that could fail."""
    words = record.msg if isinstance(record.msg, str) else type(record.msg).__name__
    safe = {key: record.__dict__[key] for key in ("name", "levelno", "filename", "lineno", "created")}
    safe["msg"] = (
        words.encode(errors="backslashreplace").decode() + f" ({type(error).__name__} while writing this line)"
    )
    return logging.makeLogRecord(safe)


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "".join(f"\n{part}" for part in parts)
