"""Fixtures of all tests: real etcd servers, and the helper package `support` made importable."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test modules are imported by file (--import-mode=importlib), so their directory is on no path.
sys.path.insert(0, str(Path(__file__).parent))

from support.etcd import EtcdServer, require_etcd, require_etcd35

# Whoever was started in the background by a shell, or by nohup, ignores these, and so would all that the tests start and interrupt:
# a program inherits what is ignored, and not what is handled.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

pytest_plugins = ["support.ci_skips", "support.figures"]  # in CI a skipped test is a failure


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests boot a virtual machine take minutes of a processor: one begins, and the others follow as far apart as
    can be, so that they are neither under way at once nor what everybody waits for at the end."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    slow = [path for path, tests in files.items() if any(test.get_closest_marker("vm") for test in tests)]
    others = [path for path in files if path not in slow]
    ordered = [] if slow else others
    for number, path in enumerate(slow):
        first, end = (len(others) * step // len(slow) for step in (number, number + 1))
        ordered += [path, *others[first:end]]
    items[:] = [item for path in ordered for item in files[path]]


@pytest.fixture(scope="session")
def etcd34(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """The installed etcd (3.4 on Debian 12), shared by all tests of a run: each keeps to a prefix of its own."""
    yield from _running(EtcdServer(tmp_path_factory.mktemp("etcd34"), require_etcd()))


@pytest.fixture(scope="session")
def etcd35(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """etcd 3.5, shared likewise."""
    yield from _running(EtcdServer(tmp_path_factory.mktemp("etcd35"), require_etcd35()))


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """The installed etcd for one test alone, to stop, kill, pause and wipe."""
    yield from _running(EtcdServer(tmp_path / "etcd", require_etcd()))


def _running(server: EtcdServer) -> Iterator[EtcdServer]:
    try:
        server.start()
        yield server
    finally:
        server.kill()
