"""The IPAM driver's calls: which addresses a docker network has on this engine, and which container has which.

Pools come and go with the store's consent, addresses without it.
"""

from __future__ import annotations

import logging
import time
from typing import Any, TypeAlias

from wincey.docker import host, pool
from wincey.docker import protocol as docker
from wincey.docker.blocks import Blocks
from wincey.docker.errors import Refused
from wincey.docker.fabric import Fabrics, Local
from wincey.docker.state import Network, Pool, StateFile
from wincey.model.address import Subnet
from wincey.model.errors import BadAddress, WinceyError

log = logging.getLogger(__name__)

SPACE = "wincey"
"""The name of our address space, by which a network's addresses are known as ours."""

_ABANDONED = 60.0
"""Seconds after which an address that no container came for is free again, when addresses are short."""

Answer: TypeAlias = dict[str, Any]


class Addresses:
    """The pools of one engine and what is given out of them."""

    def __init__(self, file: StateFile, fabrics: Fabrics, blocks: Blocks) -> None:
        self._file, self._state = file, file.contents
        self._fabrics, self._blocks = fabrics, blocks
        self._told: set[str] = set()

    async def keep(self) -> None:
        """From time to time: leases follow this host's address, late removals are made up for. Raises WinceyError."""
        for given in list(self._state.giving_back):
            await self._blocks.give_back(given.fabric, given.own)
            self._state.giving_back.remove(given)
            self._file.save()
        leased = [each for each in self._state.pools.values() if each.leased]
        wrong = []
        for fabric in {each.fabric for each in leased}:
            blocks = [(each.own, each.subnet) for each in leased if each.fabric == fabric]
            wrong += await self._blocks.keep(self._fabrics.named(fabric), blocks)
        wrong += [
            f"a docker network has the addresses {each.block}, but this host's subnet is {local.subnet} now: remove"
            " its containers, and make the network anew"
            for each in self._state.pools.values()
            if not each.leased and (local := self._fabrics.all().get(each.fabric)) and local.subnet != each.own
        ]
        for text in wrong:
            if text not in self._told:
                log.error("%s", text)
        self._told = set(wrong)

    async def request_pool(self, request: docker.PoolRequest) -> Answer:
        options = dict(request.Options or {})
        name, length = options.pop("network", None), options.pop("block", None)
        if request.V6:
            raise Refused("the wincey plugin has no IPv6 addresses for docker networks yet: leave out --ipv6")
        if options:
            raise Refused(f"unknown --ipam-opt {', '.join(sorted(options))}: there are network and block")
        if request.SubPool:
            raise Refused(
                "leave out --ip-range: each engine takes its own part of the subnet, of --ipam-opt block=LENGTH"
            )
        if request.Pool:
            subnet = _subnet(request.Pool)
            local = self._fabrics.named(name) if name else self._fabrics.containing(subnet)
            if not local.network.contains(subnet) or subnet == local.network:
                raise Refused(f"--subnet {subnet} is not a part of {local}")
        else:
            local = self._fabrics.named(name or "")
            subnet = local.network
        for pool_id, other in self._state.pools.items():
            if other.fabric == local.name and other.network == str(subnet):
                if not self.networks_of(pool_id) and other.since < time.time() - _ABANDONED:
                    return _pool_answer(pool_id, other)
                what = (
                    f"with --subnet {subnet}" if request.Pool else f"on this host's subnet {other.block}; give --subnet"
                )
                raise Refused(f"this engine has a docker network already {what}")
        if request.Pool:
            made = await self._lease(local, subnet, length)
        else:
            if length:
                raise Refused("--ipam-opt block goes with --subnet: without, a network has this host's whole subnet")
            made = await self._host_subnet(local)
        made.since = time.time()
        pool_id = f"{local.name}/{made.network}/{made.block}"
        self._state.pools[pool_id] = made
        self._file.save()
        log.info("docker network of %s: this engine gives addresses from %s", made.network, made.block)
        return _pool_answer(pool_id, made)

    def networks_of(self, pool_id: str) -> list[Network]:
        return [network for network in self._state.networks.values() if network.pool == pool_id]

    async def _lease(self, local: Local, subnet: Subnet, length: str | None) -> Pool:
        if length is not None and not (length.isascii() and length.isdigit()):
            raise Refused(f"--ipam-opt block={length}: it is a prefix length, such as 26")
        made = Pool(local.name, str(subnet), "", leased=True)

        def note(block: Subnet) -> None:
            """Should we end or fail before it is in use, it will be given back."""
            if not made.block:
                self._state.giving_back.append(made)
            made.block = str(block)
            self._file.save()

        try:
            await self._blocks.take(local, subnet, int(length) if length else None, note)
        except BaseException:
            if made.block:
                await self._give_back(made)
            raise
        self._state.giving_back.remove(made)
        return made

    async def _host_subnet(self, local: Local) -> Pool:
        for device, text in await host.addressed_devices():
            address = Subnet.parse(text)
            # flannel's own devices have the first address of the subnet, without a neighborhood.
            if local.subnet.contains(address.address) and address.length < address.bits:
                raise Refused(
                    f"this host's subnet {local.subnet} is in use by {device} ({text}): two would give out the same"
                    " addresses; give the network a --subnet of its own"
                )
        return Pool(local.name, str(local.network), str(local.subnet), leased=False)

    async def release_pool(self, request: docker.PoolId) -> Answer:
        # Docker gives the addresses back first, and removes the network after that.
        given = self._state.pools.pop(request.PoolID, None)
        if given and given.leased:
            self._state.giving_back.append(given)
        self._file.save()
        if given and given.leased:
            await self._give_back(given)
        return {}

    async def _give_back(self, given: Pool) -> None:
        """Give a block's lease back, now or, where the store does not answer, later."""
        try:
            await self._blocks.give_back(given.fabric, given.own)
        except WinceyError as error:
            log.warning("the lease of block %s stays until the store answers: %s", given.block, error)
        else:
            self._state.giving_back.remove(given)
            self._file.save()

    async def request_address(self, request: docker.AddressRequest) -> Answer:
        given = self.pool(request.PoolID)
        gateway = pool.gateway(given)
        if (request.Options or {}).get("RequestAddressType") == docker.GATEWAY_TYPE:
            if request.Address not in {"", gateway}:
                raise Refused(f"--gateway {request.Address}: leave it out, each engine has its own, here {gateway}")
            return {"Address": f"{gateway}/{given.own.length}", "Data": {}}
        try:
            address = pool.choose(given, request.Address)
        except Refused:
            if request.Address or not self._reclaim(request.PoolID):
                raise
            address = pool.choose(given, "")
        given.addresses[address] = time.time()
        if not request.Address:
            given.last = address
        self._file.save()
        return {"Address": f"{address}/{given.own.length}", "Data": {}}

    async def release_address(self, request: docker.AddressId) -> Answer:
        given = self._state.pools.get(request.PoolID)
        if given and given.addresses.pop(request.Address.partition("/")[0], None) is not None:
            self._file.save()
        return {}

    def _reclaim(self, pool_id: str) -> bool:
        """Free the addresses of containers that ended while nobody told us, as when Docker was killed."""
        given, before = self.pool(pool_id), time.time() - _ABANDONED
        used = set()
        for network in self.networks_of(pool_id):
            for endpoint_id, endpoint in list(network.endpoints.items()):
                if endpoint.joined and not host.exists(host.veth_names(endpoint_id)[0]):
                    del network.endpoints[endpoint_id]  # its interface went with its container
                else:
                    used.add(endpoint.address)
        gone = [each for each, since in given.addresses.items() if each not in used and since < before]
        for address in gone:
            del given.addresses[address]
        return bool(gone)

    def pool(self, pool_id: str) -> Pool:
        if pool_id not in self._state.pools:
            raise Refused(
                f"this plugin does not know the addresses {pool_id}: remove the docker network and make it anew"
            )
        return self._state.pools[pool_id]


def announced(pool: Pool) -> str:
    """What Docker is told that a network's addresses are; the same on every engine, where they have no subnet of a host."""
    return pool.network if pool.leased else pool.block


def _pool_answer(pool_id: str, made: Pool) -> Answer:
    return {"PoolID": pool_id, "Pool": announced(made), "Data": {}}


def _subnet(text: str) -> Subnet:
    try:
        subnet = Subnet.parse(text)
    except BadAddress as error:
        raise Refused(str(error)) from None
    if subnet.bits != 32:
        raise Refused(f"--subnet {text}: the wincey plugin has no IPv6 addresses for docker networks yet")
    return subnet.masked()
