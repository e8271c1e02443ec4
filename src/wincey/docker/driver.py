"""Docker's calls, carried out. One at a time: Docker makes several at once, and they share the addresses. But calls that
wait for the store (making and removing networks) keep none waiting that does without it: containers start without a store.

An answer is given when what was asked for is in the state file and in the kernel. A call that fails half-way leaves
nothing, and every removal may be repeated.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import msgspec

from wincey.docker import host, pool, ports
from wincey.docker import protocol as docker
from wincey.docker.blocks import Blocks
from wincey.docker.errors import Refused
from wincey.docker.fabric import Fabrics, Local
from wincey.docker.rules import Rules, render
from wincey.docker.state import Endpoint, Network, Pool, StateFile
from wincey.model.address import Subnet, format_mac, parse_address
from wincey.model.errors import BadAddress, WinceyError

log = logging.getLogger(__name__)

_SPACE = "wincey"
_ABANDONED = 60.0
"""Seconds after which an address that no container came for is free again, when addresses are short."""

Answer: TypeAlias = dict[str, Any]


class Driver:
    """Both drivers of one engine."""

    def __init__(self, file: StateFile, fabrics: Fabrics, blocks: Blocks) -> None:
        self._file, self._state = file, file.contents
        self._fabrics, self._blocks = fabrics, blocks
        self._lock = asyncio.Lock()  # for the kernel
        self._store_lock = asyncio.Lock()  # for the store; never held at the same time
        self._rules = ""
        self._told: dict[str, str] = {}
        self.calls: dict[str, tuple[type[Any], Callable[[Any], Awaitable[Answer]]]] = {
            "Plugin.Activate": (docker.Nothing, _answer({"Implements": ["NetworkDriver", "IpamDriver"]})),
            "IpamDriver.GetCapabilities": (docker.Nothing, _answer({"RequiresMACAddress": False})),
            "IpamDriver.GetDefaultAddressSpaces": (
                docker.Nothing,
                _answer({"LocalDefaultAddressSpace": _SPACE, "GlobalDefaultAddressSpace": _SPACE}),
            ),
            "IpamDriver.RequestPool": (docker.PoolRequest, self._request_pool),
            "IpamDriver.ReleasePool": (docker.PoolId, self._release_pool),
            "IpamDriver.RequestAddress": (docker.AddressRequest, self._request_address),
            "IpamDriver.ReleaseAddress": (docker.AddressId, self._release_address),
            # Local: each engine has a network when it is told to. Global would need Docker's swarm or its removed store.
            "NetworkDriver.GetCapabilities": (
                docker.Nothing,
                _answer({"Scope": "local", "ConnectivityScope": "global"}),
            ),
            "NetworkDriver.CreateNetwork": (docker.NetworkRequest, self._create_network),
            "NetworkDriver.DeleteNetwork": (docker.NetworkId, self._delete_network),
            "NetworkDriver.CreateEndpoint": (docker.EndpointRequest, self._create_endpoint),
            "NetworkDriver.EndpointOperInfo": (docker.EndpointId, self._endpoint_info),
            "NetworkDriver.DeleteEndpoint": (docker.EndpointId, self._delete_endpoint),
            "NetworkDriver.Join": (docker.EndpointId, self._join),
            "NetworkDriver.Leave": (docker.EndpointId, self._leave),
            "NetworkDriver.ProgramExternalConnectivity": (docker.ConnectivityRequest, self._publish),
            "NetworkDriver.RevokeExternalConnectivity": (docker.EndpointId, self._unpublish),
            # What other nodes do is known from the store; these are for drivers of swarms.
            "NetworkDriver.DiscoverNew": (docker.Nothing, _answer({})),
            "NetworkDriver.DiscoverDelete": (docker.Nothing, _answer({})),
            "NetworkDriver.AllocateNetwork": (docker.Nothing, _answer({"Options": {}})),
            "NetworkDriver.FreeNetwork": (docker.Nothing, _answer({})),
        }

    async def call(self, method: str, body: bytes) -> Answer:
        """Carry out one call; raises WinceyError with a text for Docker's user."""
        if method not in self.calls:
            raise Refused(f"this plugin has no {method}")
        kind, act = self.calls[method]
        try:
            request = msgspec.json.decode(body or b"{}", type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Refused(f"{method}: the request can't be read: {error}") from None
        async with self._store_lock if kind in {docker.PoolRequest, docker.PoolId} else self._lock:
            return await act(request)

    async def restore(self) -> None:
        """After a start: have the bridges and rules as the state says, also after a boot of the machine."""
        async with self._lock:
            for network in self._state.networks.values():
                if not self._orphaned(network):
                    await self._ensure_bridge(network)
            await self._apply_rules(anew=True)

    async def keep(self) -> None:
        """From time to time: leases follow this host's address, late removals are made up for, rules follow the cluster."""
        async with self._lock:
            for network_id in [each for each, network in self._state.networks.items() if self._orphaned(network)]:
                await self._forget_network(network_id)
            await self._apply_rules()
        async with self._store_lock:
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
            self._told = dict.fromkeys(wrong, "")

    def _orphaned(self, network: Network) -> bool:
        """Whether Docker was killed amidst the removal of a network: it has given the addresses back, and is not to come."""
        return network.pool not in self._state.pools

    # --- addresses ----------------------------------------------------------------------------------------------------

    async def _request_pool(self, request: docker.PoolRequest) -> Answer:
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
                if not self._networks_of(pool_id) and other.since < time.time() - _ABANDONED:
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

    def _networks_of(self, pool_id: str) -> list[Network]:
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

    async def _release_pool(self, request: docker.PoolId) -> Answer:
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

    async def _request_address(self, request: docker.AddressRequest) -> Answer:
        given = self._pool(request.PoolID)
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

    async def _release_address(self, request: docker.AddressId) -> Answer:
        given = self._state.pools.get(request.PoolID)
        if given and given.addresses.pop(request.Address.partition("/")[0], None) is not None:
            self._file.save()
        return {}

    def _reclaim(self, pool_id: str) -> bool:
        """Free the addresses of containers that ended while nobody told us, as when Docker was killed."""
        given, before = self._pool(pool_id), time.time() - _ABANDONED
        used = set()
        for network in self._networks_of(pool_id):
            for endpoint_id, endpoint in list(network.endpoints.items()):
                if endpoint.joined and not host.exists(host.veth_names(endpoint_id)[0]):
                    del network.endpoints[endpoint_id]  # its interface went with its container
                else:
                    used.add(endpoint.address)
        gone = [each for each, since in given.addresses.items() if each not in used and since < before]
        for address in gone:
            del given.addresses[address]
        return bool(gone)

    def _pool(self, pool_id: str) -> Pool:
        if pool_id not in self._state.pools:
            raise Refused(
                f"this plugin does not know the addresses {pool_id}: remove the docker network and make it anew"
            )
        return self._state.pools[pool_id]

    # --- networks -----------------------------------------------------------------------------------------------------

    async def _create_network(self, request: docker.NetworkRequest) -> Answer:
        data, given = request.IPv4Data or [], request.Options or {}
        if request.IPv6Data or given.get(docker.ENABLE_IPV6) is True:
            raise Refused("the wincey plugin has no IPv6 addresses for docker networks yet: leave out --ipv6")
        if len(data) != 1:
            raise Refused("a wincey network has one subnet")
        if data[0].AddressSpace != _SPACE:
            raise Refused(
                "addresses of a wincey network are agreed between engines, which Docker's own address management does not"
                " do: say --ipam-driver wincey as well"
            )
        pool_id = self._pool_of(data[0].Pool)
        used = self._state.pools[pool_id]
        options = dict(given.get(docker.GENERIC) or {})
        name = options.pop("network", used.fabric)
        masquerade = _boolean("masquerade", options.pop("masquerade", "true"))
        mtu = options.pop(docker.MTU, options.pop("mtu", "0"))
        if options:
            raise Refused(f"unknown --opt {', '.join(sorted(options))}: there are network, masquerade and mtu")
        if name != used.fabric:
            raise Refused(
                f"--opt network={name}: Docker chose the addresses {used.block} before it told of that option;"
                f" say --ipam-opt network={name} as well, or a --subnet inside of that network"
            )
        local = self._fabrics.named(used.fabric)
        network = Network(
            pool_id,
            host.bridge_name(request.NetworkID),
            given.get(docker.INTERNAL) is True,
            masquerade,
            _mtu(str(mtu), local),
        )
        self._state.networks[request.NetworkID] = network
        try:
            await self._ensure_bridge(network)
            await self._apply_rules()
            self._file.save()
        except BaseException:
            await self._forget_network(request.NetworkID)
            raise
        return {}

    async def _delete_network(self, request: docker.NetworkId) -> Answer:
        await self._forget_network(request.NetworkID)
        return {}

    async def _forget_network(self, network_id: str) -> None:
        network = self._state.networks.pop(network_id, None)
        if network:
            for endpoint in network.endpoints:
                await host.remove_device(host.veth_names(endpoint)[0])
        await host.remove_device(host.bridge_name(network_id))
        await self._apply_rules()
        self._file.save()

    async def _ensure_bridge(self, network: Network) -> None:
        used = self._pool(network.pool)
        address = f"{pool.gateway(used)}/{used.own.length}"
        await host.ensure_bridge(network.bridge, address, self._mtu_of(network))

    def _mtu_of(self, network: Network) -> int:
        return network.mtu or self._fabrics.named(self._pool(network.pool).fabric).mtu

    def _pool_of(self, subnet: str) -> str:
        for pool_id, each in self._state.pools.items():
            if subnet == _announced(each) and not self._networks_of(pool_id):
                return pool_id
        raise Refused(f"this plugin gave out no addresses {subnet}: remove the network and make it anew")

    def _network(self, network_id: str) -> Network:
        if network_id not in self._state.networks:
            raise Refused(
                f"this plugin does not know the network {network_id[:12]} (was its state file removed?): remove the docker"
                " network and make it anew"
            )
        return self._state.networks[network_id]

    async def _apply_rules(self, *, anew: bool = False) -> None:
        networks = [
            Rules(
                network.bridge,
                used.subnet,
                used.own,
                network.internal,
                network.masquerade,
                tuple((each.address, port) for each in network.endpoints.values() for port in each.ports),
            )
            for network in self._state.networks.values()
            if (used := self._state.pools.get(network.pool))
        ]
        clusters = [local.network for local in self._fabrics.all().values()]
        script = render(networks, clusters, await host.overlay_ports() if networks else ())
        if anew or script != self._rules:
            await host.commit_rules(script)
            self._rules = script

    # --- containers ---------------------------------------------------------------------------------------------------

    async def _create_endpoint(self, request: docker.EndpointRequest) -> Answer:
        network = self._network(request.NetworkID)
        given = request.Interface or docker.Interface()
        if not given.Address:
            raise Refused("the wincey plugin needs the container's IPv4 address, which its IPAM driver gives")
        address = given.Address.partition("/")[0]
        if request.EndpointID in network.endpoints:
            raise Refused(f"endpoint {request.EndpointID[:12]} exists already")
        # An address has its MAC, so that neighbors need not learn a new one when a container is made anew.
        mac = given.MacAddress or format_mac(b"\x02\x42" + parse_address(address))
        network.endpoints[request.EndpointID] = Endpoint(address, mac)
        self._file.save()
        return {"Interface": {} if given.MacAddress else {"MacAddress": mac}}

    async def _endpoint_info(self, request: docker.EndpointId) -> Answer:
        network = self._network(request.NetworkID)
        return {"Value": {"bridge": network.bridge, "veth": host.veth_names(request.EndpointID)[0]}}

    async def _delete_endpoint(self, request: docker.EndpointId) -> Answer:
        await host.remove_device(host.veth_names(request.EndpointID)[0])
        network = self._state.networks.get(request.NetworkID)
        if network and network.endpoints.pop(request.EndpointID, None):
            await self._apply_rules()
            self._file.save()
        return {}

    async def _join(self, request: docker.EndpointId) -> Answer:
        network = self._network(request.NetworkID)
        endpoint = self._endpoint(network, request.EndpointID)
        used = self._pool(network.pool)
        await self._ensure_bridge(network)
        inner = await host.add_veth(request.EndpointID, network.bridge, endpoint.mac, self._mtu_of(network))
        endpoint.joined = True
        self._file.save()
        answer: Answer = {
            "InterfaceName": {"SrcName": inner, "DstPrefix": "eth"},
            # Docker would add its own bridge for the way outside.
            "DisableGatewayService": True,
        }
        if network.internal:
            answer["StaticRoutes"] = [{"Destination": used.network, "RouteType": 0, "NextHop": pool.gateway(used)}]
        else:
            answer["Gateway"] = pool.gateway(used)
        return answer

    async def _leave(self, request: docker.EndpointId) -> Answer:
        await host.remove_device(host.veth_names(request.EndpointID)[0])
        network = self._state.networks.get(request.NetworkID)
        endpoint = network.endpoints.get(request.EndpointID) if network else None
        if endpoint:
            endpoint.joined = False
            self._file.save()
        return {}

    async def _publish(self, request: docker.ConnectivityRequest) -> Answer:
        endpoint = self._endpoint(self._network(request.NetworkID), request.EndpointID)
        bindings = (request.Options or {}).get(docker.PORT_MAP) or []
        taken = [
            port
            for network in self._state.networks.values()
            for each_id, each in network.endpoints.items()
            if each_id != request.EndpointID
            for port in each.ports
        ]
        endpoint.ports = ports.choose(bindings, taken)
        if endpoint.ports:
            await self._apply_rules()
            self._file.save()
        return {}

    async def _unpublish(self, request: docker.EndpointId) -> Answer:
        network = self._state.networks.get(request.NetworkID)
        endpoint = network.endpoints.get(request.EndpointID) if network else None
        if endpoint and endpoint.ports:
            endpoint.ports = []
            await self._apply_rules()
            self._file.save()
        return {}

    def _endpoint(self, network: Network, endpoint_id: str) -> Endpoint:
        if endpoint_id not in network.endpoints:
            raise Refused(f"this plugin does not know the endpoint {endpoint_id[:12]}: start the container anew")
        return network.endpoints[endpoint_id]


def _answer(answer: Answer) -> Callable[[Any], Awaitable[Answer]]:
    async def act(request: object) -> Answer:
        return answer

    return act


def _announced(pool: Pool) -> str:
    """What Docker is told that a network's addresses are; the same on every engine, where they have no subnet of a host."""
    return pool.network if pool.leased else pool.block


def _pool_answer(pool_id: str, made: Pool) -> Answer:
    return {"PoolID": pool_id, "Pool": _announced(made), "Data": {}}


def _subnet(text: str) -> Subnet:
    try:
        subnet = Subnet.parse(text)
    except BadAddress as error:
        raise Refused(str(error)) from None
    if subnet.bits != 32:
        raise Refused(f"--subnet {text}: the wincey plugin has no IPv6 addresses for docker networks yet")
    return subnet.masked()


def _boolean(name: str, value: object) -> bool:
    if str(value).lower() not in {"true", "false"}:
        raise Refused(f"--opt {name}={value}: it can be true or false")
    return str(value).lower() == "true"


def _mtu(text: str, local: Local) -> int:
    if not text.isascii() or not text.isdigit() or (int(text) and not 576 <= int(text) <= local.mtu):
        raise Refused(f"--opt mtu={text}: it must be 576 to {local.mtu}, which is what {local} carries")
    return int(text)
