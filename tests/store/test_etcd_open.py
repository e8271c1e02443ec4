"""Which store is opened, and which of etcd's APIs."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.etcd import EtcdServer, free_ports, require_etcd, require_etcd35
from wincey.model.errors import StoreDenied, StoreUnavailable, UsageError
from wincey.store.etcd2 import Etcd2Store
from wincey.store.etcd3 import Etcd3Store
from wincey.store.kv import KeyValueStore
from wincey.store.open import StoreOptions, open_store

PREFIX = "/coreos.com/network"
CONFIG = '{"Network":"10.3.0.0/16"}'


async def opened(options: StoreOptions) -> KeyValueStore:
    """The store, closed again."""
    store = await open_store(options, PREFIX)
    await store.close()
    return store


@pytest.mark.etcd
async def test_the_api_that_holds_the_network(own_etcd: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wincey.store")
    options = StoreOptions(endpoints=[own_etcd.url])
    own_etcd.ctl("put", f"{PREFIX}-other/config", CONFIG)
    assert isinstance(await opened(options), Etcd3Store)
    assert caplog.messages == []  # nothing is decided yet, and this is asked each second
    own_etcd.ctl("set", f"{PREFIX}/config", CONFIG, api=2)
    store = await opened(options)
    assert isinstance(store, Etcd2Store)
    assert caplog.messages == [f"Using etcd v2 at {own_etcd.url}: it holds {PREFIX}/, and v3 does not"]
    own_etcd.ctl("put", f"{PREFIX}/config", CONFIG)
    assert isinstance(await opened(options), Etcd3Store)
    assert caplog.messages[1:] == [f"Using etcd v3 at {own_etcd.url}: it holds {PREFIX}/"]
    for api, kind in (("v2", Etcd2Store), ("v3", Etcd3Store)):
        options.api = api  # type: ignore[assignment]  # one of the literals
        assert type(await opened(options)) is kind


@pytest.fixture
def without_v2(tmp_path: Path) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path / "etcd", require_etcd35(), flags=("--enable-v2=false",))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.mark.etcd
async def test_a_server_without_v2(without_v2: EtcdServer) -> None:
    options = StoreOptions(endpoints=[without_v2.url])
    assert isinstance(await opened(options), Etcd3Store)
    store = Etcd2Store([without_v2.url])
    with pytest.raises(Exception, match="no etcd v2 API"):
        await store.get(f"{PREFIX}/config")
    await store.close()


@pytest.fixture
def without_v3(tmp_path: Path) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path / "etcd", require_etcd(), flags=("--enable-grpc-gateway=false",))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.mark.etcd
async def test_a_server_without_v3(without_v3: EtcdServer) -> None:
    assert isinstance(await opened(StoreOptions(endpoints=[without_v3.url])), Etcd2Store)


@pytest.mark.etcd
async def test_denied_by_v3_is_said_unless_v2_holds_the_network(own_etcd: EtcdServer) -> None:
    own_etcd.enable_auth("overlay", "pw", f"{PREFIX}/")
    options = StoreOptions(endpoints=[own_etcd.url])
    with pytest.raises(StoreDenied, match="--etcd-username"):
        await open_store(options, PREFIX)
    options.username, options.password = "overlay", "pw"
    assert isinstance(await opened(options), Etcd3Store)
    options.username = ""
    own_etcd.http("PUT", f"/v2/keys{PREFIX}/config?value=x")  # v3's users don't guard v2
    assert isinstance(await opened(options), Etcd2Store)


async def test_no_etcd_at_all() -> None:
    with pytest.raises(StoreUnavailable, match="refused"):
        await open_store(StoreOptions(endpoints=[f"http://127.0.0.1:{free_ports(1)[0]}"]), PREFIX)


async def test_sqlite_and_what_is_no_store(tmp_path: Path) -> None:
    store = await open_store(StoreOptions(store=f"sqlite:{tmp_path}/a.db"), PREFIX)
    assert f"{tmp_path}/a.db" in store.name
    await store.close()
    for text in ("sqlite", "sqlite:", "etcd:x", "mysql"):
        with pytest.raises(UsageError, match=f"--store={text}"):
            await open_store(StoreOptions(store=text), PREFIX)


async def test_certificates_count_for_https_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = str(tmp_path / "none")
    options = StoreOptions(endpoints=["http://127.0.0.1:2379"], api="v3", cafile=missing)
    await opened(options)
    assert "not used" in caplog.text
    options.endpoints.append("https://127.0.0.1:2379")
    with pytest.raises(UsageError, match=f"--etcd-cafile {missing}"):
        await open_store(options, PREFIX)


def test_options_show_no_password() -> None:
    assert "secret" not in repr(StoreOptions(username="root", password="secret"))


def test_only_what_is_used_is_imported() -> None:
    program = (
        "import sys, wincey.store.open; print([m for m in sys.modules if m in ('h11', 'sqlite3', 'ssl', 'asyncio')])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
