"""Hosts of a cluster in one process: the backend's plan, the reconciler and the cloud driver of each, the real cloud behind.

There is no store: `leases` is what it would hold, and each host is told of each change, unless it is cut off. The clock is the
test's, so that minutes of patience pass at once.
"""

from __future__ import annotations

import random

from wincey.agent.desired import DesiredState
from wincey.agent.reconciler import Reconciler
from wincey.backends.base import HostFacts
from wincey.backends.catalogue import make
from wincey.cloud.driver import CloudDriver
from wincey.model.address import parse_address
from wincey.model.config import NetworkConfig
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.state import Scope


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class CloudHostProcess:
    """One daemon. It can be killed and started again: `directory` is what is left of it on the host."""

    def __init__(self, cluster, address, found, directory):
        self.cluster, self.address, self.found, self.directory = cluster, address, found, directory
        self.key = None
        self.current = True
        self.start()

    def start(self):
        self.driver = CloudDriver(self.directory, rng=random.Random(1), now=self.cluster.clock)
        self.reconciler = Reconciler(DesiredState(), [self.driver])

    @property
    def backend(self):
        ip = parse_address(self.address)
        facts = HostFacts(
            underlay="eth0", mtu=9001, local=ip, local_v6=None, public=ip, public_v6=None, found=self.found
        )
        return make(self.cluster.config, facts)

    @property
    def lease(self):
        return Lease(self.key, self.backend.attrs())

    def plan(self):
        """Take in what the store says."""
        desired, backend = self.reconciler.desired, self.backend
        if self.current:
            own = {self.key} if self.key else set()
            leases = self.cluster.leases
            for owner in [each for each in desired.owners if each and each not in map(str, leases)]:
                desired.put(owner, ())
            for key, lease in leases.items() if self.key else ():
                desired.put(str(key), () if key in own else backend.peer(self.key, lease))
        desired.put("", backend.local(self.key) if self.key else ())
        self.reconciler.scope = Scope(networks=self.cluster.config.networks, current=self.current)

    async def settle(self):
        self.plan()
        return await self.reconciler.settle()

    async def clean_up(self):
        """`flanneld --cleanup`, in a process of its own."""
        await self.driver.close()
        self.start()
        self.reconciler.scope = Scope(networks=self.cluster.config.networks)
        return await self.reconciler.settle()

    async def kill(self):
        """No more of it but its files; the object goes on to be the next process."""
        await self.driver.close()
        self.start()


class CloudServer(CloudHostProcess):
    """A server that keeps the tables for all who hold a lease. It remembers nothing."""

    def __init__(self, cluster, found):
        super().__init__(cluster, "0.0.0.0", found, None)

    def plan(self):
        desired, backend = self.reconciler.desired, self.backend
        for owner in [each for each in desired.owners if each and each not in map(str, self.cluster.leases)]:
            desired.put(owner, ())
        desired.put("", [backend.table(None)])
        for key, lease in self.cluster.leases.items():
            desired.put(str(key), backend.client(lease))
        self.reconciler.scope = Scope(networks=self.cluster.config.networks, current=self.current)


class CloudCluster:
    def __init__(self, config, tmp_path):
        self.config, self.clock = NetworkConfig.parse(config), Clock()
        self.leases: dict[LeaseKey, Lease] = {}
        self.hosts: list[CloudHostProcess] = []
        self._tmp_path = tmp_path

    def host(self, address, **found):
        made = CloudHostProcess(self, address, found, self._tmp_path / address)
        self.hosts.append(made)
        return made

    async def join(self, host, key):
        """The host gets the lease, all are told, all settle."""
        host.key = LeaseKey.parse(key)
        self.leases[host.key] = host.lease
        await self.settle()

    async def leave(self, host):
        """The host is gone, and its lease has ended."""
        del self.leases[host.key]
        self.hosts.remove(host)
        await host.driver.close()
        await self.settle()

    async def settle(self):
        return [failure for host in self.hosts for failure in await host.settle()]

    async def wait(self, seconds, step=60.0):
        """Time passes, with an audit each minute."""
        failures = []
        for _ in range(round(seconds / step)):
            self.clock.now += step
            failures = await self.settle()
        return failures

    async def close(self):
        for host in self.hosts:
            await host.driver.close()


def foreign_lease(key, address):
    """A lease as flannel writes it: neither type nor data."""
    return Lease(LeaseKey.parse(key), LeaseAttrs(parse_address(address)))
