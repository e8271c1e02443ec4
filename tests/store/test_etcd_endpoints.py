"""The endpoints of a store: what the flags may say, TLS identity, and who is asked when."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from itertools import islice
from pathlib import Path

import pytest

from support.certs import Authority
from support.etcd import free_ports
from support.tls_listener import tls_listener
from wincey.http.client import HttpClient
from wincey.model.errors import HistoryLost, StoreDenied, StoreUnavailable, UsageError
from wincey.store.endpoints import Endpoints, parse_endpoints, pauses, tls_context


def test_a_list_of_urls() -> None:
    assert parse_endpoints("http://127.0.0.1:4001, https://b:2379/,10.0.0.1:2379,http://[fd00::1]:2379,") == [
        "http://127.0.0.1:4001",
        "https://b:2379",
        "http://10.0.0.1:2379",
        "http://[fd00::1]:2379",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (",", "empty"),
        ("http://a:x", "http://HOST:PORT"),
        ("ftp://a", "http://HOST:PORT"),
        ("unix:///run/etcd.sock", "only http"),
        ("http://root:secret@a:2379", "--etcd-username"),
    ],
)
def test_what_is_no_list_of_urls(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"^--etcd-endpoints.*{reason}") as caught:
        parse_endpoints(text)
    assert "secret" not in str(caught.value)


def test_pauses_grow_to_a_limit_and_are_jittered() -> None:
    assert list(islice(pauses(lambda: 0.0), 8)) == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert list(islice(pauses(lambda: 0.5), 3)) == pytest.approx([0.075, 0.15, 0.3])
    assert next(islice(pauses(lambda: 0.0), 5000, None)) == 5.0


# TLS


def test_tls_identities(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one = authority.issue("one")
    for context in [
        tls_context(),
        tls_context(cafile=str(authority.ca)),
        tls_context(str(one.key), str(one.cert)),
        tls_context(str(one.key), str(one.cert), str(authority.ca)),
    ]:
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.check_hostname
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert len(tls_context(cafile=str(authority.ca)).get_ca_certs()) == 1


def test_what_is_wrong_with_the_files_is_said_in_one_line(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one, two = authority.issue("one"), authority.issue("two")
    junk = tmp_path / "junk"
    junk.write_text("-----BEGIN CERTIFICATE-----\nnot base64\n-----END CERTIFICATE-----\n")
    wrong = {
        f"^--etcd-cafile {tmp_path}/none: No such file or directory$": ("", "", f"{tmp_path}/none"),
        f"^--etcd-cafile {tmp_path}: Is a directory$": ("", "", str(tmp_path)),
        f"^--etcd-cafile {junk}: it holds no certificate in PEM form$": ("", "", str(junk)),
        f"^--etcd-certfile {tmp_path}/none: No such file": (str(one.key), f"{tmp_path}/none", ""),
        f"^--etcd-keyfile {tmp_path}/none: No such file": (f"{tmp_path}/none", str(one.cert), ""),
        f"^--etcd-keyfile {two.key}: it is not the key of": (str(two.key), str(one.cert), ""),
        f"^--etcd-certfile {junk}, --etcd-keyfile {one.key}: not a certificate": (str(one.key), str(junk), ""),
        "^--etcd-keyfile needs --etcd-certfile": (str(one.key), "", ""),
        "^--etcd-certfile needs --etcd-keyfile": ("", str(one.cert), ""),
    }
    for message, files in wrong.items():
        with pytest.raises(UsageError, match=message) as caught:
            tls_context(*files)
        assert "\n" not in str(caught.value)


def test_a_locked_key_does_not_ask_for_its_password(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one = authority.issue("one")
    locked = tmp_path / "locked.key"
    authority._openssl("pkcs8", "-topk8", "-in", one.key, "-out", locked, "-passout", "pass:secret")
    with pytest.raises(UsageError, match="an open key"):
        tls_context(str(locked), str(one.cert))


# Who is asked


@contextlib.asynccontextmanager
async def endpoints(*urls: str) -> AsyncIterator[Endpoints]:
    made = Endpoints(urls or [f"http://127.0.0.1:{port}" for port in free_ports(3)], random=lambda: 0.99)
    yield made
    await made.close()


async def test_the_endpoint_that_answered_is_asked_first() -> None:
    asked: list[str] = []

    async def attempt(client: HttpClient, uncertain: bool) -> bool:
        asked.append(client.url)
        if client.url == dead:
            raise StoreUnavailable("no leader")
        return uncertain

    async with endpoints() as some:
        dead = some.current.url
        assert await some.call(attempt) is True  # the first may have done it
        second = some.current.url
        assert second != dead
        assert await some.call(attempt) is False
        assert asked == [dead, second, second]


async def test_what_was_never_sent_leaves_no_doubt() -> None:
    async def attempt(client: HttpClient, uncertain: bool) -> bool:
        if client is first:
            await client.request("GET", "/")  # refused
        return uncertain

    async with endpoints() as some:
        first = some.current
        assert await some.call(attempt) is False


async def test_where_nobody_listens_each_endpoint_is_asked_once() -> None:
    asked: list[str] = []

    async def attempt(client: HttpClient, _uncertain: bool) -> None:
        asked.append(client.url)
        await client.request("GET", "/")

    async with endpoints() as some:
        with pytest.raises(StoreUnavailable) as caught:
            await some.call(attempt)
        assert len(asked) == len(set(asked)) == 3
        assert all(url.removeprefix("http://") in str(caught.value) for url in asked)


async def test_an_election_is_waited_for() -> None:
    attempts = 0

    async def attempt(_client: HttpClient, _uncertain: bool) -> str:
        nonlocal attempts
        attempts += 1
        if attempts < 5:
            raise StoreUnavailable("no leader")
        return "done"

    async with endpoints("http://127.0.0.1:1") as some:
        assert await some.call(attempt) == "done"


async def test_a_hung_endpoint_leaves_time_for_the_next() -> None:
    async def attempt(client: HttpClient, _uncertain: bool) -> str:
        if client is first:
            await asyncio.Event().wait()
        return "done"

    async with endpoints() as some:
        first = some.current
        assert await some.call(attempt, deadline=0.2) == "done"


async def test_a_call_ends_at_its_deadline() -> None:
    async def attempt(_client: HttpClient, _uncertain: bool) -> None:
        await asyncio.Event().wait()

    async with endpoints() as some:
        with pytest.raises(StoreUnavailable, match="no answer in time"):
            await some.call(attempt, deadline=0.1)


async def test_a_watch_goes_round_and_tells_of_outages_only() -> None:
    told: list[str | None] = []
    asked: list[str] = []
    batches: list[list[int]] = []

    async def attempt(client: HttpClient) -> AsyncGenerator[list[int], None]:
        asked.append(client.url)
        match len(asked):
            case 1:
                yield []
                yield [1]  # then it ends
            case 2:
                yield []
                yield [2]
                raise StoreUnavailable("lost")
            case 5:
                yield [3]
                raise HistoryLost("compacted")
            case _:
                raise StoreUnavailable(f"down at {len(asked)}")

    async def collect() -> None:
        async for batch in some.follow(attempt):
            batches.extend([batch])

    async with endpoints() as some:
        some.outage = told.append
        with pytest.raises(HistoryLost):
            await collect()
    assert batches == [[1], [2], [3]]
    assert told == ["down at 4", None]
    assert len(set(asked[:3])) == 3


async def test_a_refused_certificate_ends_a_watch_and_a_call(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "a")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue("server"))

    async def call(client: HttpClient, _uncertain: bool) -> None:
        await client.request("GET", "/")

    async def watch(client: HttpClient) -> AsyncGenerator[list[int], None]:
        await client.request("GET", "/")
        yield []

    with tls_listener(context) as url:
        async with endpoints(url) as some:
            with pytest.raises(StoreDenied, match="certificate is not accepted"):
                await some.call(call)
            with pytest.raises(StoreDenied, match="certificate is not accepted"):
                await anext(aiter(some.follow(watch)))
