"""flannel 0.5's HTTP API (compatibility reference, sections 5.2 and 5.3): paths, status codes and texts.

What flannel's server gets wrong is right here: a long poll ends with its client, one unreadable lease is nobody's event,
and a renewal never takes over a subnet that became another host's.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias
from urllib.parse import quote

import msgspec

from wincey.http.server import Request, Response
from wincey.leasing.claims import Host
from wincey.model import remote_api as wire
from wincey.model.address import Subnet, format_address, parse_address
from wincey.model.errors import (
    UNREADABLE,
    BadAddress,
    BadLease,
    DuplicateHost,
    KeyConflict,
    KeyExists,
    OutOfSubnets,
    StoreError,
    WinceyError,
)
from wincey.model.lease import TTL, Lease, LeaseAttrs, LeaseKey
from wincey.model.networkname import UNNAMED, is_network_name
from wincey.server.access import Access, Grant
from wincey.server.feed import Feed
from wincey.server.network import Network, host_of, poll, wished
from wincey.server.networks import NetworkChange, list_networks, network_prefix, watch_networks
from wincey.store.kv import KeyValueStore
from wincey.store.registry import Registry

log = logging.getLogger(__name__)

_JSON = "application/json; charset=utf-8"
_NOT_FOUND = Response(404, b"404 page not found\n")
_Head: TypeAlias = tuple[int, tuple[tuple[str, str], ...]]
_OTHERWISE: _Head = (500, ())
_FAILURES: tuple[tuple[type[WinceyError], _Head], ...] = (
    (BadLease, (400, ())),
    (DuplicateHost, (409, ((wire.ERROR, wire.DUPLICATE_HOST),))),
    (KeyConflict, (409, ())),
    (KeyExists, (409, ())),
    (OutOfSubnets, (500, ((wire.ERROR, wire.OUT_OF_SUBNETS),))),
)

Answering: TypeAlias = Callable[[Request, Network, str], Awaitable[Response]]


class Api:
    """Answers requests out of `store`, which may come later than the first of them; `waiting`: why it is not there yet.

    keeps_cloud: clients are told that this server keeps the cloud's route tables, and not told the keys to the cloud.
    """

    def __init__(self, prefix: str, access: Access, rng: random.Random, *, keeps_cloud: bool = False) -> None:
        self._keeps_cloud = keeps_cloud
        self.prefix = "/" + prefix.strip("/")
        self.store: KeyValueStore | None = None
        self.waiting = "the store is not open yet"
        self._access, self._rng = access, rng
        self._networks: dict[str, Network] = {}
        self._list: Feed[NetworkChange] = Feed(self._watch_networks, self._position)
        self._routes: dict[tuple[str, str, bool], Answering] = {
            ("GET", "config", False): self._config,
            ("GET", "leases", False): self._watch_all,
            ("POST", "leases", False): self._take,
            ("GET", "leases", True): self._watch_one,
            ("PUT", "leases", True): self._renew,
            ("DELETE", "leases", True): self._release,
            ("GET", "reservations", False): self._reservations,
            ("POST", "reservations", False): self._reserve,
            ("DELETE", "reservations", True): self._unreserve,
        }

    def close(self) -> None:
        """End the watches."""
        self._list.close()
        for network in self._networks.values():
            network.close()

    async def handle(self, request: Request) -> Response:
        """Answer a request and log it, as flannel does."""
        status = 0  # a client that went away has got none
        try:
            response = await self._answer(request)
            status = response.status
            return response
        finally:
            query = "?" + "&".join(f"{quote(name)}={quote(value)}" for name, value in request.query.items())
            log.info("%s %s%s - %d", request.method, quote(request.path), query.rstrip("?"), status)

    async def _answer(self, request: Request) -> Response:
        grant = self._access.judge(request.headers.get("authorization", ""), request.certificate)
        if grant is None:
            log.warning("refused %s: no token or certificate that we know (%s)", request.peer, quote(request.path))
            headers = (("WWW-Authenticate", "Bearer"),)
            return Response(401, b"a token or certificate that this server knows is needed\n", headers=headers)
        try:
            return await self._route(request, grant)
        except WinceyError as error:
            head: _Head = next((head for kind, head in _FAILURES if isinstance(error, kind)), _OTHERWISE)
            return Response(head[0], f"{error}\n".encode(), headers=head[1])

    async def _route(self, request: Request, grant: Grant) -> Response:
        parts = request.path.split("/")
        if parts[:2] != ["", "v1"] or not 3 <= len(parts) <= 5:
            return _NOT_FOUND
        if parts[2:] == [""]:
            return await self._all_networks(request, grant) if request.method == "GET" else _NOT_FOUND
        name, what, key = (*parts[2:], "", "")[:3]
        answering = self._routes.get((request.method, what, len(parts) == 5))
        if answering is None or not (name == UNNAMED or is_network_name(name)):
            return _NOT_FOUND
        if not grant.allows(name):
            log.warning("refused %s: %s does not allow network %s", request.peer, grant.who, name)
            return Response(403, f"no permission for network {name}\n".encode())
        return await answering(request, self._network(name), key)

    def _store(self) -> KeyValueStore:
        if self.store is None:
            raise StoreError(self.waiting)
        return self.store

    def _network(self, name: str) -> Network:
        if (found := self._networks.get(name)) is None:
            # Those that nobody watches hold nothing: names that somebody makes up must not fill the memory.
            for idle in [each for each, network in self._networks.items() if len(self._networks) > 1000]:
                if not self._networks[idle].feed.waiting:
                    self._networks.pop(idle).close()
            registry = Registry(self._store(), network_prefix(self.prefix, name))
            found = self._networks[name] = Network(registry, self._rng)
        return found

    async def _config(self, request: Request, network: Network, key: str) -> Response:
        config, raw = await network.config()
        if not self._keeps_cloud:
            return _json(wire.encode_config(config, raw))
        return _json(wire.encode_config(config, raw, wire.CLOUD_KEYS), ((wire.CLOUD, wire.KEPT),))

    async def _take(self, request: Request, network: Network, key: str) -> Response:
        lease = await network.take(
            wire.decode_attrs(request.body), wished(request.headers.get(wire.WISH, "")), _host(request)
        )
        return _json(wire.encode_lease(lease, _expiration(lease)))

    async def _renew(self, request: Request, network: Network, key: str) -> Response:
        attrs = wire.decode_lease(request.body)[0].attrs
        formerly = request.headers.get(wire.FORMERLY, "")
        try:
            former = parse_address(formerly) if formerly else None
        except BadAddress as error:
            raise BadLease(str(error)) from None
        lease = await network.renew(wire.parse_key(key), attrs, former, _host(request))
        return _json(wire.encode_lease(lease, _expiration(lease)))

    async def _release(self, request: Request, network: Network, key: str) -> Response:
        await network.release(wire.parse_key(key))
        return Response(200)

    async def _watch_all(self, request: Request, network: Network, key: str) -> Response:
        return await self._watch(request, network, None)

    async def _watch_one(self, request: Request, network: Network, key: str) -> Response:
        return await self._watch(request, network, wire.parse_key(key))

    async def _watch(self, request: Request, network: Network, key: LeaseKey | None) -> Response:
        cursor, host = _cursor(request), _host(request)
        if cursor is not None:
            # One of ours knows more than one event an answer, and wants to know of the config, too.
            address = request.headers.get(wire.ADDRESS, "") if host else ""
            if host and address:
                with network.tenants.polling(_canonical(address), host):
                    answer = await poll(network, cursor, key=key, all_at_once=True, config=True)
            else:
                answer = await poll(network, cursor, key=key, all_at_once=bool(host), config=bool(host))
            if answer:
                changes = [
                    wire.Change(LeaseKey.parse(update.key.rpartition("/")[2]), update.lease)
                    for update in answer.updates
                    if update.what == "lease" and _is_lease_key(update.key)
                ]
                headers: tuple[tuple[str, str], ...] = ()
                if any(update.what == "config" for update in answer.updates):
                    headers = ((wire.CONFIG, "changed"),)
                return _json(wire.encode_changes(changes, _in_a_day(), answer.cursor), headers)
        if key is None:
            snapshot = await network.snapshot()
            leases = [(lease, _expiration(lease)) for lease in snapshot.leases.values()]
            return _json(wire.encode_snapshot(leases, snapshot.revision))
        revision = await network.position()
        lease = await network.read(key)
        left = await network.registry.time_left(lease)
        expiration = wire.ZERO_TIME if left is None else wire.format_time(time.time_ns() + int(left * 1e9))
        return _json(wire.encode_snapshot([(lease, expiration)], revision))

    async def _reservations(self, request: Request, network: Network, key: str) -> Response:
        return _json(wire.encode_reservations((await network.snapshot()).leases.values()))

    async def _reserve(self, request: Request, network: Network, key: str) -> Response:
        try:
            wanted = msgspec.json.decode(request.body, type=wire.Reservation)
            subnet, address = Subnet.parse(wanted.Subnet), parse_address(wanted.PublicIP)
        except (*UNREADABLE, BadAddress) as error:
            raise BadLease(f"JSON decoding error: {error}") from None
        await network.reserve(subnet, LeaseAttrs(address))
        return Response(200)

    async def _unreserve(self, request: Request, network: Network, key: str) -> Response:
        await network.unreserve(wire.parse_key(key))
        return Response(200)

    async def _all_networks(self, request: Request, grant: Grant) -> Response:
        cursor = _cursor(request)
        if cursor is not None:
            changes = await self._list.after(cursor, lambda change: grant.allows(change.name))
            if changes:
                first = [change for change in changes if change.revision == changes[0].revision]
                body = wire.encode_network_changes(((each.name, each.there) for each in first), first[0].revision)
                return _json(body)
        names, revision = await list_networks(self._store(), self.prefix)
        return _json(wire.encode_networks([name for name in names if grant.allows(name)], revision))

    async def _position(self) -> int:
        return (await self._store().read_all(f"{self.prefix}/wincey/none/")).revision

    def _watch_networks(self, after: int) -> AsyncIterator[list[NetworkChange]]:
        return watch_networks(self._store(), self.prefix, after)


def _json(body: bytes, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    return Response(200, body, _JSON, headers)


def _host(request: Request) -> Host | None:
    return host_of(wire.split_host(request.headers.get(wire.HOST, "")))


def _cursor(request: Request) -> int | None:
    text = request.query.get("next", "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise BadLease(f"bad cursor {text[:40]!r}: it is a number from an earlier answer")
    return int(text)


def _canonical(address: str) -> str:
    try:
        return format_address(parse_address(address))
    except BadAddress as error:
        raise BadLease(str(error)) from None


def _is_lease_key(key: str) -> bool:
    try:
        LeaseKey.parse(key.rpartition("/")[2])
    except BadLease:
        return False
    return True


def _in_a_day() -> str:
    return wire.format_time(time.time_ns() + int(TTL * 1e9))


def _expiration(lease: Lease) -> str:
    """When a lease that was just renewed ends. For another's it is the latest that it can be: asking the store for each
    lease's time would be a call a lease."""
    return wire.ZERO_TIME if lease.permanent else _in_a_day()
