"""Raw keys in a lab's store, as an administrator with etcdctl has them."""

import time

from wincey.lab.plan import PREFIX


def put(lab, key, value, ttl=3600.0):
    async def work(registry):
        entry = await registry.store.get(key)
        if entry:
            await registry.store.replace(entry, value.encode(), ttl)
        else:
            await registry.store.create(key, value.encode(), ttl)

    lab.store.run(work)


def get(lab, key):
    entry = lab.store.run(lambda registry: registry.store.get(key))
    return entry.value.decode() if entry else None


def delete(lab, key):
    lab.store.run(lambda registry: registry.store.delete(key))


def lease_keys(lab):
    return sorted(lab.store.run(lambda registry: registry.snapshot()).leases)


def lease_key(host):
    """The store key of a host's lease."""
    gateways = host.gateways
    return f"{PREFIX}/subnets/" + "&".join(str(each.network).replace("/", "-") for each in gateways)


def wait_until(true, timeout=40.0):
    """Wait for a condition, which is the assertion; the bound is generous, as the machine may be busy."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.05)
