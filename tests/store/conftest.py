"""The kinds of store that the tests of this directory run on, each on the real thing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from support.etcd import EtcdServer, require_etcd, require_etcd35
from support.simulated_etcd import SimulatedEtcdBackend
from support.stores import Backend, EtcdBackend, SqliteBackend, fresh_prefix
from wincey.store.kv import KeyValueStore

KINDS = [
    "sqlite",
    "simulated etcd",
    pytest.param("etcd34 v3", marks=pytest.mark.etcd),
    pytest.param("etcd34 v2", marks=pytest.mark.etcd),
    pytest.param("etcd35 v3", marks=pytest.mark.etcd),
    pytest.param("etcd35 v2", marks=pytest.mark.etcd),
]


@pytest.fixture(params=KINDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """Shared by all tests of its kind, where it is a server: keep to `prefix`."""
    if request.param == "sqlite":
        return SqliteBackend(tmp_path / "store.db")
    if request.param == "simulated etcd":
        return SimulatedEtcdBackend()
    fixture, api = request.param.split()
    return EtcdBackend(request.getfixturevalue(fixture), int(api[1]))


@pytest.fixture(params=KINDS)
def own_backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    """For one test alone, to be ill-treated."""
    if request.param == "sqlite":
        file = SqliteBackend(tmp_path / "store.db")
        yield file
        file.resume()
        return
    if request.param == "simulated etcd":
        yield SimulatedEtcdBackend()
        return
    version, api = request.param.split()
    server = EtcdServer(tmp_path / "etcd", require_etcd35() if version == "etcd35" else require_etcd())
    try:
        server.start()
        yield EtcdBackend(server, int(api[1]))
    finally:
        server.kill()


@pytest.fixture
async def store(backend: Backend) -> AsyncIterator[KeyValueStore]:
    store = backend.open()
    yield store
    await store.close()


@pytest.fixture
def prefix() -> str:
    return fresh_prefix()
