"""What is etcd v3's own: leases, authentication, compaction, a cluster's troubles. On real servers."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from base64 import b64encode
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from support.certs import Authority
from support.etcd import EtcdCluster, EtcdServer, free_ports, require_etcd
from support.stores import eventually, fresh_prefix, watching
from wincey.model.errors import HistoryLost, KeyConflict, KeyExists, StoreDenied, StoreError, StoreUnavailable
from wincey.store import etcd3
from wincey.store.endpoints import tls_context
from wincey.store.etcd3 import Etcd3Store
from wincey.store.etcd3_wire import Lines
from wincey.store.kv import Change

pytestmark = pytest.mark.etcd

PREFIX = "/coreos.com/network/"


@pytest.fixture(params=["etcd34", "etcd35"])
def server(request: pytest.FixtureRequest) -> EtcdServer:
    made = request.getfixturevalue(request.param)
    assert isinstance(made, EtcdServer)
    return made


@pytest.fixture
async def store(server: EtcdServer) -> AsyncIterator[Etcd3Store]:
    made = Etcd3Store([server.url])
    yield made
    await made.close()


@pytest.fixture
def prefix() -> str:
    return fresh_prefix()


def leases(server: EtcdServer) -> set[int]:
    return {int(line, 16) for line in server.ctl("lease", "list").split("\n")[1:] if line}


# Keys and leases


async def test_what_etcdctl_and_flannel_see(store: Etcd3Store, server: EtcdServer, prefix: str) -> None:
    value = b'{"PublicIP":"10.99.0.2","PublicIPv6":null}'
    entry = await store.create(f"{prefix}subnets/10.3.1.0-24&fd00:1::-64", value, 86400.0)
    told = json.loads(server.ctl("get", "--prefix", prefix, "-w", "json"))["kvs"]
    assert [kv["value"] for kv in told] == [b64encode(value).decode()]
    assert [kv["key"] for kv in told] == [b64encode(entry.key.encode()).decode()]
    lease = server.ctl("lease", "timetolive", f"{int(entry.handle):x}", "--keys")
    assert "granted with TTL(86400s)" in lease
    assert entry.key in lease


async def test_every_lease_has_a_key_and_no_key_two_leases(store: Etcd3Store, server: EtcdServer, prefix: str) -> None:
    before = leases(server)
    entry = await store.create(prefix + "a", b"1", 100.0)
    with pytest.raises(KeyExists):
        await store.create(prefix + "a", b"2", 100.0)
    changed = await store.replace(entry, b"2", 100.0)
    with pytest.raises(KeyConflict):
        await store.replace(entry, b"3", 100.0)
    assert leases(server) - before == {int(changed.handle)}
    assert await store.get(prefix + "a") == changed
    permanent = await store.replace(changed, b"4", None)
    assert leases(server) == before
    limited = await store.replace(permanent, b"5", 100.0)
    assert await store.delete(limited.key, limited.revision)
    assert leases(server) == before


async def test_a_lease_that_another_key_hangs_on_is_left_alone(
    store: Etcd3Store, server: EtcdServer, prefix: str
) -> None:
    lease = server.ctl("lease", "grant", "100").split()[1]
    server.ctl("put", f"--lease={lease}", prefix + "a", "1")
    server.ctl("put", f"--lease={lease}", prefix + "b", "1")
    entry = await store.get(prefix + "a")
    assert entry
    assert entry.handle == str(int(lease, 16))
    await store.replace(entry, b"2", 100.0)
    assert await store.get(prefix + "b")


async def test_a_lease_granted_for_less_is_replaced_when_more_is_wanted(store: Etcd3Store, prefix: str) -> None:
    short = await store.create(prefix + "a", b"1", 20.0)
    long = await store.refresh(short, 1000.0)
    assert long.value == b"1"
    assert (await store.time_left(long) or 0) > 900
    assert await store.refresh(long, 1000.0) == long


async def test_a_key_that_is_no_text_hides_no_other(store: Etcd3Store, server: EtcdServer, prefix: str) -> None:
    listing = await store.read_all(prefix)
    async with watching(store, prefix, listing.revision) as watch:
        key = b64encode(prefix.encode() + b"\xff\xfe").decode()
        server.http("POST", "/v3/kv/put", json.dumps({"key": key, "value": "AA=="}))
        made = await store.create(prefix + "a", b"1", None)
        assert [change.key for change in await watch.until(2)] == [prefix + "\\xff\\xfe", prefix + "a"]
    assert [entry.key for entry in (await store.read_all(prefix)).entries] == [prefix + "a", prefix + "\\xff\\xfe"]
    assert await store.get(prefix + "a") == made


async def test_a_listing_in_pages_is_of_one_moment(
    store: Etcd3Store, server: EtcdServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [await store.create(f"{prefix}{n:02}", b"1", None) for n in range(25)]
    monkeypatch.setattr(etcd3, "_PAGE", 10)
    whole = store._gateway.call
    calls = 0

    async def call(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:  # between the first page and the second
            server.ctl("del", f"{prefix}24")
        if calls == 5:  # after the first page of the second listing
            server.ctl("put", f"{prefix}24", "2")
        return await whole(*arguments, **options)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(store._gateway, "call", call)
    assert (await store.read_all(prefix)).entries == made
    second = await store.read_all(prefix)
    assert second.entries == made[:24]
    assert calls == 6


async def test_a_page_whose_revision_is_compacted_begins_the_listing_again(
    store: Etcd3Store, server: EtcdServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(5):
        await store.create(f"{prefix}{n}", b"1", None)
    monkeypatch.setattr(etcd3, "_PAGE", 3)
    whole = store._gateway.call
    calls = 0

    async def call(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            changed = json.loads(server.ctl("put", f"{prefix}5", "1", "-w", "json"))
            server.ctl("compact", str(changed["header"]["revision"]))
        return await whole(*arguments, **options)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(store._gateway, "call", call)
    assert [entry.key for entry in (await store.read_all(prefix)).entries] == [f"{prefix}{n}" for n in range(6)]


async def test_a_transaction_of_many_keys_is_one_batch(store: Etcd3Store, server: EtcdServer, prefix: str) -> None:
    listing = await store.read_all(prefix)
    async with watching(store, prefix, listing.revision) as watch:
        puts = [
            {"request_put": {"key": b64encode(f"{prefix}{n}".encode()).decode(), "value": "AA=="}} for n in range(50)
        ]
        server.http("POST", "/v3/kv/txn", json.dumps({"success": puts}))
        changes = await watch.until(50)
        assert [change.key for change in changes] == [f"{prefix}{n}" for n in range(50)]
        assert {change.entry.revision for change in changes if change.entry} == {listing.revision + 1}
        assert watch.batches == 1


async def test_an_older_path_of_the_gateway_is_found(store: Etcd3Store, prefix: str) -> None:
    store._gateway._root = 2  # v3alpha, which neither server has
    with pytest.raises(StoreError, match="no etcd v3 JSON API"):
        await store.get(prefix + "a")
    assert await store.get(prefix + "a") is None
    store._gateway._root = 1
    await store.create(prefix + "a", b"1", 100.0)


def test_lines_are_cut_wherever_the_pieces_end() -> None:
    text = b"one\n\nthree and more\nfour\nrest"
    for size in range(1, len(text) + 1):
        lines = Lines()
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert [line for piece in pieces for line in lines.feed(piece)] == [b"one", b"three and more", b"four"]
        assert lines.feed(b"\n") == [b"rest"]


# The past


async def test_compaction_behind_a_watch_does_not_hurt_it(own_etcd: EtcdServer, prefix: str) -> None:
    store = Etcd3Store([own_etcd.url], probe_interval=0.2)
    listing = await store.read_all(prefix)
    async with watching(store, prefix, listing.revision) as watch:
        made = await store.create(prefix + "a", b"1", None)
        await watch.until(1)
        for n in range(5):
            own_etcd.ctl("put", "/elsewhere", str(n))
        own_etcd.ctl("compact", str(made.revision + 5))
        await asyncio.sleep(1)  # a few probes
        again = await store.create(prefix + "b", b"1", None)
        assert (await watch.until(2))[1] == Change(prefix + "b", again)
    await store.close()


async def test_a_store_that_went_back_and_came_on_again_is_found_out(own_etcd: EtcdServer, prefix: str) -> None:
    """A backup restored, or all data lost, and then so many writes that revisions alone tell nothing."""
    store = Etcd3Store([own_etcd.url])
    await store.create(prefix + "a", b"1", None)
    entry = await store.create(prefix + "b", b"1", None)
    listing = await store.read_all(prefix)
    async with watching(store, prefix, listing.revision) as same:
        await store.replace(entry, b"2", None)
        await same.until(1)
        own_etcd.kill()
        own_etcd.wipe()
        own_etcd.launch()
        while not own_etcd.healthy():
            await asyncio.sleep(0.02)
        for n in range(40):
            own_etcd.ctl("put", f"{prefix}other{n}", "1")
        assert isinstance(await same.end(), HistoryLost)
    async with watching(store, prefix, listing.revision) as resumed:
        assert isinstance(await resumed.end(), HistoryLost)
    await store.close()


async def test_the_same_keys_at_the_same_revisions_in_another_history_are_found_out(
    own_etcd: EtcdServer, prefix: str
) -> None:
    """After a loss each host puts its keys again: what comes back can look like what was there, and be something else."""
    store = Etcd3Store([own_etcd.url])
    start = (await store.read_all(prefix)).revision
    await store.create(prefix + "a", b"1", 100.0)
    async with watching(store, prefix, start) as watch:
        await watch.until(1)
        again = Etcd3Store([own_etcd.url])
        own_etcd.kill()
        own_etcd.wipe()
        own_etcd.start()
        await again.create(prefix + "a", b"1", 100.0)
        await again.close()
        assert isinstance(await watch.end(), HistoryLost)
    await store.close()


async def test_a_key_without_a_time_limit_hides_no_other_history(own_etcd: EtcdServer, prefix: str) -> None:
    """It has nothing random about it: written as often as before, it is as it was. A key on a lease is asked for besides."""
    store = Etcd3Store([own_etcd.url])
    await store.create(prefix + "a", b"1", 100.0)
    own_etcd.ctl("put", f"{prefix}config", "1")
    listing = await store.read_all(prefix)
    async with watching(store, prefix, listing.revision) as watch:
        own_etcd.kill()
        own_etcd.wipe()
        own_etcd.start()
        own_etcd.ctl("put", f"{prefix}other", "1")
        own_etcd.ctl("put", f"{prefix}config", "1")
        assert isinstance(await watch.end(), HistoryLost)
    await store.close()


# Who we are


async def test_a_user_with_password(own_etcd: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    own_etcd.enable_auth("overlay", "s3cret", PREFIX)
    store = Etcd3Store([own_etcd.url], username="overlay", password="s3cret")
    entry = await store.create(PREFIX + "a", b"1", 100.0)
    listing = await store.read_all(PREFIX)
    async with watching(store, PREFIX, listing.revision) as watch:
        entry = await store.replace(await store.refresh(entry, 100.0), b"2", 100.0)
        assert await watch.until(1) == [Change(entry.key, entry)]
    assert (await store.time_left(entry) or 0) > 90
    assert await store.delete(entry.key, entry.revision)
    with pytest.raises(StoreDenied, match=r"permission denied.*role"):
        await store.get("/elsewhere")
    with pytest.raises(StoreDenied, match="permission denied"):
        await anext(aiter(store.watch("/elsewhere/", 1)))
    await store.close()
    for username, password, message in [
        ("overlay", "wr0ng", "does not accept user 'overlay'"),
        ("nobody", "s3cret", "does not accept user 'nobody'"),
        ("", "", "give --etcd-username and --etcd-password"),
    ]:
        refused = Etcd3Store([own_etcd.url], username=username, password=password)
        with pytest.raises(StoreDenied, match=message) as caught:
            await refused.get(PREFIX + "a")
        assert "s3cret" not in str(caught.value)
        assert "wr0ng" not in str(caught.value)
        await refused.close()
    assert "s3cret" not in caplog.text


async def test_a_token_that_is_no_longer_good_is_renewed_unseen(own_etcd: EtcdServer) -> None:
    own_etcd.enable_auth("overlay", "pw", PREFIX)
    store = Etcd3Store([own_etcd.url], username="overlay", password="pw")
    entry = await store.create(PREFIX + "a", b"1", 100.0)
    listing = await store.read_all(PREFIX)
    async with watching(store, PREFIX, listing.revision) as watch:
        own_etcd.stop()  # tokens live in its memory
        await asyncio.to_thread(own_etcd.start)
        assert await store.get(PREFIX + "a") == entry
        entry = await store.replace(entry, b"2", 100.0)
        assert await watch.until(1) == [Change(entry.key, entry)]
        own_etcd.ctl("role", "grant-permission", "overlay", "readwrite", "/more")  # the permissions' revision moves
        entry = await store.replace(entry, b"3", 100.0)
        assert (await watch.until(2))[1] == Change(entry.key, entry)
        store._gateway._token = "junk.1"  # no secret: what an expired one amounts to
        results = await asyncio.gather(*(store.get(PREFIX + "a") for _ in range(10)))
        assert results == [entry] * 10
    await store.close()


async def test_a_user_where_authentication_is_off_until_it_is_not(own_etcd: EtcdServer) -> None:
    store = Etcd3Store([own_etcd.url], username="overlay", password="pw")
    await store.create(PREFIX + "a", b"1", None)
    own_etcd.enable_auth("overlay", "pw", PREFIX)
    assert await store.get(PREFIX + "a")
    await store.close()


@pytest.fixture
def secured(tmp_path: Path) -> AsyncIterator[tuple[EtcdServer, Authority]]:
    authority = Authority(tmp_path / "ca")
    server = EtcdServer(tmp_path / "etcd", require_etcd(), authority=authority)
    try:
        server.start()
        yield server, authority  # type: ignore[misc]  # a plain generator, as pytest wants
    finally:
        server.kill()


async def test_client_certificates(secured: tuple[EtcdServer, Authority], tmp_path: Path) -> None:
    server, authority = secured
    named, unnamed = authority.issue("overlay"), authority.issue("unnamed", "/O=overlay")
    stranger = Authority(tmp_path / "other").issue("stranger")
    ca = str(authority.ca)
    good = Etcd3Store([server.url], tls_context(str(named.key), str(named.cert), ca))
    entry = await good.create(PREFIX + "a", b"1", 100.0)
    listing = await good.read_all(PREFIX)
    async with watching(good, PREFIX, listing.revision) as watch:
        entry = await good.replace(entry, b"2", 100.0)
        await watch.until(1)

    for tls, message in [
        (tls_context(cafile=ca), "certificate"),
        (tls_context(str(stranger.key), str(stranger.cert), ca), "certificate"),
        (tls_context(str(named.key), str(named.cert)), "the server's certificate is not accepted"),
    ]:
        refused = Etcd3Store([server.url], tls)
        with pytest.raises(StoreDenied, match=message):
            await refused.get(PREFIX + "a")
        with pytest.raises(StoreDenied, match=message):
            await anext(aiter(refused.watch(PREFIX, 1)))
        await refused.close()
    plain = Etcd3Store([server.url.replace("https", "http")], deadline=0.5)
    with pytest.raises(StoreError):
        await plain.get(PREFIX + "a")
    await plain.close()

    # With authentication on, the gateway wants a certificate without a name, and a user.
    server.enable_auth("overlay", "pw", PREFIX)
    with pytest.raises(StoreDenied, match="--etcd-username and --etcd-password, or --etcd-api=v2"):
        await good.get(PREFIX + "a")
    await good.close()
    tls = tls_context(str(unnamed.key), str(unnamed.cert), ca)
    both = Etcd3Store([server.url], tls, username="overlay", password="pw")
    assert await both.get(PREFIX + "a") == entry
    await both.close()


# Several members


@pytest.fixture
def cluster(tmp_path: Path) -> AsyncIterator[EtcdCluster]:
    made = EtcdCluster(tmp_path, require_etcd())
    try:
        made.start()
        yield made  # type: ignore[misc]  # a plain generator, as pytest wants
    finally:
        made.kill()


async def test_a_dead_first_endpoint(server: EtcdServer, prefix: str) -> None:
    dead = f"http://127.0.0.1:{free_ports(1)[0]}"
    store = Etcd3Store([dead, server.url])
    entry = await store.create(prefix + "a", b"1", None)
    told: list[str | None] = []
    store.on_outage(told.append)
    async with watching(store, prefix, entry.revision - 1) as watch:
        assert await watch.until(1) == [Change(entry.key, entry)]
    assert told == []
    assert dead in store.name
    await store.close()


async def test_a_first_endpoint_that_never_answers(server: EtcdServer, prefix: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as blackhole:  # the kernel accepts, and nobody reads
        store = Etcd3Store([f"http://127.0.0.1:{blackhole.getsockname()[1]}", server.url], deadline=2.0)
        assert await store.get(prefix + "a") is None
        await store.close()


async def test_members_killed_under_a_watch_and_under_writes(cluster: EtcdCluster, prefix: str) -> None:
    """Whichever dies, leader or not: every write is made once and every change is told once."""
    store = Etcd3Store(cluster.urls)
    told: list[str | None] = []
    store.on_outage(told.append)
    listing = await store.read_all(prefix)
    made = []

    async def write(round_: str, victim: EtcdServer) -> None:
        for n in range(40):
            if n == 10:
                victim.kill()
            made.append(await store.create(f"{prefix}{round_}-{n:02}", os.urandom(8), 100.0))
            await asyncio.sleep(0.01)

    async with watching(store, prefix, listing.revision) as watch:
        first = cluster.members[0]  # whom the store asks
        await write("first", first)
        await asyncio.to_thread(first.start)
        await write("leader", cluster.leader())
        changes = await watch.until(len(made))
    assert [change.entry for change in changes] == made
    assert (await store.read_all(prefix)).entries == sorted(made, key=lambda entry: entry.key)
    assert told[-1:] in ([], [None])  # an election may count as an outage, but not as one without end
    await store.close()


async def test_a_member_without_a_majority_is_noticed_by_a_silent_watch(cluster: EtcdCluster, prefix: str) -> None:
    first = cluster.members[0]
    store = Etcd3Store([first.url], probe_interval=0.5, deadline=2.0)
    listing = await store.read_all(prefix)
    told: list[str | None] = []
    store.on_outage(told.append)
    async with watching(store, prefix, listing.revision) as watch:
        for member in cluster.members[1:]:
            member.kill()
        await eventually(lambda: told, "the outage told")
        assert first.url in (told[0] or "")
        with pytest.raises(StoreUnavailable):
            await store.get(prefix + "a")
        for member in cluster.members[1:]:
            member.launch()
        for member in cluster.members:
            await asyncio.to_thread(member.wait_ready)
        entry = await store.create(prefix + "a", b"1", None)
        assert await watch.until(1) == [Change(entry.key, entry)]
        assert told[-1] is None
    await store.close()
