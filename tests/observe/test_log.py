import contextvars
import io
import json
import logging
import re

import msgspec
import pytest

from wincey.observe.log import NETWORK, detail, set_up_logging

log = logging.getLogger("wincey.test")


@pytest.fixture
def lines():
    """Set the log up as asked; the lines it wrote come from the function returned. The root logger is put back after."""
    root = logging.getLogger()
    handlers, level, switches = root.handlers[:], root.level, (logging.logThreads, logging.logProcesses)
    multiprocessing = logging.logMultiprocessing
    stream = io.StringIO()

    def set_up(form="klog", verbosity=0):
        set_up_logging(form, verbosity, stream)
        return lambda: stream.getvalue().splitlines()

    yield set_up
    root.handlers[:] = handlers
    root.setLevel(level)
    (logging.logThreads, logging.logProcesses), logging.logMultiprocessing = switches, multiprocessing


class Unspeakable:
    def __str__(self):
        raise RuntimeError("no")

    __repr__ = __str__


@pytest.mark.parametrize(
    ("level", "letter"),
    [(logging.INFO, "I"), (logging.WARNING, "W"), (logging.ERROR, "E"), (logging.CRITICAL, "F")],
)
def test_klog_line(lines, level, letter):
    written = lines()
    log.log(level, "a lease of %s", "10.3.1.0/24")
    (line,) = written()
    form = rf"{letter}[01]\d[0-3]\d [0-2]\d:[0-5]\d:[0-6]\d\.\d{{6}} [ \d]{{7,}} test_log\.py:\d+\] a lease of 10\.3\.1\.0/24"
    assert re.fullmatch(form, line), line


def test_klog_time_is_the_records_own(lines):
    written = lines()
    logging.getLogger().handle(
        logging.makeLogRecord({"created": 86399.25, "msg": "x", "levelno": 20, "levelname": "INFO"})
    )
    assert re.search(r"\d{4} \d\d:\d\d:59\.250000 ", written()[0])


@pytest.mark.parametrize(("form", "expected"), [("klog", "] blue: joined"), ("json", '"network":"blue"')])
def test_lines_of_one_of_several_networks_name_it(lines, form, expected):
    written = lines(form)
    contextvars.copy_context().run(lambda: (NETWORK.set("blue"), log.info("joined")))
    log.info("alone")
    about, other = written()
    assert expected in about
    assert "blue" not in other


def test_json_line(lines):
    written = lines("json")
    log.warning("peer %s", "h2", extra={"subnet": "10.3.2.0/24", "raw": b"x", "other": {1, 2}, "line": "not ours"})
    (line,) = written()
    fields = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", fields.pop("ts"))
    assert isinstance(fields.pop("line"), int)
    assert fields == {
        "level": "warning",
        "logger": "wincey.test",
        "message": "peer h2",
        "file": "test_log.py",
        "subnet": "10.3.2.0/24",
        "raw": "eA==",
        "other": [1, 2],
    }


@pytest.mark.parametrize("form", ["klog", "json"])
def test_tracebacks_are_there(lines, form):
    written = lines(form)
    try:
        raise KeyError("gone")
    except KeyError:
        log.exception("it failed")
    text = "\n".join(written())
    assert "it failed" in text
    assert "KeyError: 'gone'" in text
    assert len(written()) == 1 if form == "json" else len(written()) > 2


@pytest.mark.parametrize("form", ["klog", "json"])
@pytest.mark.parametrize(
    ("message", "arguments", "extra"),
    [
        ("two %s %s", ("one",), {}),
        ("number %d", ("x",), {}),
        ("object %s", (Unspeakable(),), {}),
        ("fine", (), {"extra": {"odd": Unspeakable()}}),
        ("surrogate \udc80", (), {}),
        (Unspeakable(), (), {}),
    ],
)
def test_a_line_that_cannot_be_formatted_is_still_one(lines, form, message, arguments, extra):
    written = lines(form)
    log.error(message, *arguments, **extra)
    (line,) = written()
    word = message.split(" ")[0] if isinstance(message, str) else "Unspeakable"
    assert word in line
    assert "test_log.py" in line
    if form == "json":
        assert json.loads(line)["level"] == "error"


def test_a_closed_standard_error_ends_nothing(lines):
    lines()
    closed = io.StringIO()
    closed.close()
    set_up_logging("klog", 0, closed)
    log.error("nobody reads this")


@pytest.mark.parametrize(("verbosity", "shown"), [(0, []), (1, [1]), (3, [1, 2, 3]), (99, [1, 2, 3, 5, 10]), (-1, [])])
def test_verbosity(lines, verbosity, shown):
    written = lines("klog", verbosity)
    for number in (1, 2, 3, 5, 10):
        log.log(detail(number), "v %d", number)
    assert [line.rpartition(" v ")[2] for line in written()] == [str(number) for number in shown]


def test_debug_is_verbosity_one():
    assert detail(1) == logging.DEBUG
    assert detail(0) == logging.DEBUG


def test_standard_error_is_the_default_and_is_set_up_once(lines, capsys):
    lines()
    set_up_logging("json", 0)
    set_up_logging("json", 0)
    log.info("hello")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert msgspec.json.decode(captured.err)["message"] == "hello"
