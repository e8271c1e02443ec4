"""How much the store is asked: by the number of leases and of changes, never by their product. Counted by etcd itself."""

from __future__ import annotations

import re
import urllib.request

from support.etcd import EtcdServer
from wincey.model.address import parse_address
from wincey.model.lease import LeaseAttrs, LeaseKey
from wincey.store.etcd3 import Etcd3Store
from wincey.store.registry import Registry

LEASES = 2_200
ATTRS = LeaseAttrs(parse_address("10.99.0.9"), backend_type="vxlan")


def calls(server: EtcdServer) -> dict[str, int]:
    """What has been asked so far, by method. Watches count when they end."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(r'^grpc_server_handled_total\{.*grpc_method="(\w+)".*\} (\d+)$', text, re.MULTILINE)
    counts: dict[str, int] = {}
    for method, count in found:
        counts[method] = counts.get(method, 0) + int(count)
    return counts


def since(server: EtcdServer, before: dict[str, int]) -> dict[str, int]:
    return {method: count - before[method] for method, count in calls(server).items() if count > before[method]}


async def test_leases_are_listed_in_pages_and_followed_without_asking(own_etcd: EtcdServer) -> None:
    """One call for a thousand leases, none for one that changes: nobody asks for each one's time limit."""
    store = Etcd3Store([own_etcd.url])
    registry = Registry(store, "/coreos.com/network")
    keys = [LeaseKey.parse(f"10.{number // 256}.{number % 256}.0-24") for number in range(LEASES)]
    for key in keys[:100]:
        await registry.create(key, ATTRS)
    for key in keys[100:]:
        await store.create(registry.lease_key(key), ATTRS.encode(etcd_v2=False), None)

    before = calls(own_etcd)
    snapshot = await registry.snapshot()
    assert len(snapshot.leases) == LEASES
    assert since(own_etcd, before) == {"Range": 3}

    before = calls(own_etcd)
    watch = registry.watch(snapshot.revision)
    seen: set[str] = set()
    for key in keys[:50]:
        lease = snapshot.leases[registry.lease_key(key)]
        await store.replace(
            registry._entry(lease), ATTRS.encode(etcd_v2=False), None
        )  # without calls for its time limit
    own = since(own_etcd, before)
    before = calls(own_etcd)
    async for updates in watch:
        seen |= {update.key for update in updates}
        if len(seen) == 50:
            break
    await watch.aclose()  # type: ignore[attr-defined]  # an async generator behind its protocol
    asked = since(own_etcd, before)
    assert own["Txn"] == 50
    assert set(asked) <= {"Range", "Watch"}
    assert (
        asked["Range"] == 2
    )  # whether the store is still the one that was listed: its last change, and the last on a lease
    await store.close()
