"""Docker's calls, carried out. One at a time: Docker makes several at once, and they share the addresses. But calls that
wait for the store (making and removing networks) keep none waiting that does without it: containers start without a store.

An answer is given when what was asked for is in the state file and in the kernel. A call that fails half-way leaves
nothing, and every removal may be repeated.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import msgspec

from wincey.docker import host, pool, ports
from wincey.docker import protocol as docker
from wincey.docker.addresses import SPACE, Addresses, announced
from wincey.docker.blocks import Blocks
from wincey.docker.errors import Refused
from wincey.docker.fabric import Fabrics, Local
from wincey.docker.rules import Rules, render
from wincey.docker.state import Endpoint, Network, StateFile
from wincey.model.address import format_mac, parse_address
from wincey.model.errors import UNREADABLE

log = logging.getLogger(__name__)

Answer: TypeAlias = dict[str, Any]


class Driver:
    """Both drivers of one engine."""

    def __init__(self, file: StateFile, fabrics: Fabrics, blocks: Blocks) -> None:
        self._file, self._state = file, file.contents
        self._fabrics = fabrics
        self._addresses = Addresses(file, fabrics, blocks)
        self._lock = asyncio.Lock()  # for the kernel
        self._store_lock = asyncio.Lock()  # for the store; never held at the same time
        self._rules = ""
        self.calls: dict[str, tuple[type[Any], Callable[[Any], Awaitable[Answer]]]] = {
            "Plugin.Activate": (docker.Nothing, _answer({"Implements": ["NetworkDriver", "IpamDriver"]})),
            "IpamDriver.GetCapabilities": (docker.Nothing, _answer({"RequiresMACAddress": False})),
            "IpamDriver.GetDefaultAddressSpaces": (
                docker.Nothing,
                _answer({"LocalDefaultAddressSpace": SPACE, "GlobalDefaultAddressSpace": SPACE}),
            ),
            "IpamDriver.RequestPool": (docker.PoolRequest, self._addresses.request_pool),
            "IpamDriver.ReleasePool": (docker.PoolId, self._addresses.release_pool),
            "IpamDriver.RequestAddress": (docker.AddressRequest, self._addresses.request_address),
            "IpamDriver.ReleaseAddress": (docker.AddressId, self._addresses.release_address),
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
        except UNREADABLE as error:
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
            await self._addresses.keep()

    def _orphaned(self, network: Network) -> bool:
        """Whether Docker was killed amidst the removal of a network: it has given the addresses back, and is not to come."""
        return network.pool not in self._state.pools

    # --- networks -----------------------------------------------------------------------------------------------------

    async def _create_network(self, request: docker.NetworkRequest) -> Answer:
        data, given = request.IPv4Data or [], request.Options or {}
        if request.IPv6Data or given.get(docker.ENABLE_IPV6) is True:
            raise Refused("the wincey plugin has no IPv6 addresses for docker networks yet: leave out --ipv6")
        if len(data) != 1:
            raise Refused("a wincey network has one subnet")
        if data[0].AddressSpace != SPACE:
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
        used = self._addresses.pool(network.pool)
        address = f"{pool.gateway(used)}/{used.own.length}"
        await host.ensure_bridge(network.bridge, address, self._mtu_of(network))

    def _mtu_of(self, network: Network) -> int:
        return network.mtu or self._fabrics.named(self._addresses.pool(network.pool).fabric).mtu

    def _pool_of(self, subnet: str) -> str:
        for pool_id, each in self._state.pools.items():
            if subnet == announced(each) and not self._addresses.networks_of(pool_id):
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
        used = self._addresses.pool(network.pool)
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


def _boolean(name: str, value: object) -> bool:
    if str(value).lower() not in {"true", "false"}:
        raise Refused(f"--opt {name}={value}: it can be true or false")
    return str(value).lower() == "true"


def _mtu(text: str, local: Local) -> int:
    if not text.isascii() or not text.isdigit() or (int(text) and not 576 <= int(text) <= local.mtu):
        raise Refused(f"--opt mtu={text}: it must be 576 to {local.mtu}, which is what {local} carries")
    return int(text)
