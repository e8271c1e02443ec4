"""What the store and files hold: config, leases, claims, lists of networks, subnet.env, state files."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from fuzz.target import Cut, chosen, pieces, target
from wincey.agent.envfile import EnvFile
from wincey.agent.planner import Planner, Policy
from wincey.agent.statefile import State
from wincey.backends.base import HostFacts
from wincey.backends.catalogue import BACKENDS, make
from wincey.backends.static import BadHosts, find_self, others, read_hosts
from wincey.backends.static import plan as plan_static
from wincey.cni.netconf import delegate_config, parse_netconf
from wincey.cni.protocol import CniError
from wincey.cni.subnetenv import parse_subnet_env
from wincey.leasing.allocate import Identity, decide
from wincey.leasing.claims import Host
from wincey.model.address import Subnet, parse_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig, BadLease, NotJoinable, OutOfSubnets, WinceyError
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.store.kv import Change, Entry, Listing
from wincey.store.networklist import NetworkList
from wincey.store.registry import Registry

_CONFIGS = (
    '{"Network": "10.3.0.0/16"}',
    '{"Network": "10.3.0.0/16", "SubnetLen": 24, "SubnetMin": "10.3.1.0", "SubnetMax": "10.3.9.0", "Backend": {"Type": "vxlan", "VNI": 7, "Port": 4789, "GBP": true, "MacPrefix": "0E-2A"}}',
    '{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:3::/48", "IPv6SubnetLen": 64, "Backend": {"Type": "host-gw"}}',
    '{"Network": "10.3.0.0/16", "Backend": {"Type": "wireguard", "ListenPort": 51820, "PSK": "ev8rTlC9dYGCDPFkWp8+aGeXtLVzGa1Q4QUiKXVPh4I=", "Mode": "separate"}}',
    '{"Network": "10.3.0.0/16", "Backend": {"Type": "ipsec", "PSK": "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"}}',
    '{"Network": "10.3.0.0/16", "Backend": {"Type": "extension", "PreStartupCommand": "echo x", "SubnetAddCommand": ["a", "$SUBNET"], "Shell": true}}',
    '{"Network": "10.3.0.0/16", "Backend": {"Type": "bgp", "ASN": 64512, "Peers": [{"Address": "192.0.2.1", "ASN": 64513}]}}',
    '{"Network": "10.3.0.0/16", "Backend": {"Type": "ovs", "Encapsulation": "geneve", "Key": 3}}',
    '{"Network": "10.3.0.0/16", "Backend": {"Type": "ipip", "DirectRouting": true}}',
    '{"Network": "10.3.0.0/16", "Backend": {"Type": "aws-vpc", "RouteTableID": ["rtb-1", "rtb-2"]}}',
    '{"Network": "10.3.0.0/16", "Backend": {"Type": "udp", "Port": 8285}}',
)
_VALUES = (
    '{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"0e:2a:00:00:00:02"}}',
    '{"PublicIP":"192.0.2.2"}',
    '{"PublicIP":"0.0.0.0","PublicIPv6":"fd01::2","BackendType":"host-gw"}',
    '{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"ev8rTlC9dYGCDPFkWp8+aGeXtLVzGa1Q4QUiKXVPh4I="}}',
    '{"PublicIP":"192.0.2.2","BackendType":"extension","BackendData":"\\"text\\""}',
    '{"PublicIP":"192.0.2.2","BackendType":"udp","BackendV6Data":{"a":[1,{}]}}',
    '{"PublicIP":"192.0.2.2","BackendType":"aws-vpc","BackendData":{"InstanceID":"i-1"}}',
)
_FACTS = HostFacts(
    "eth0", 1500, parse_address("192.0.2.1"), parse_address("fd01::1"), parse_address("192.0.2.1"),
    parse_address("fd01::1"), ((Subnet.parse("192.0.2.0/24"), "eth0"),), {"flannel.1": b"\x0e*\0\0\0\1"} , (6, 1),
    found={"public_key": "ev8rTlC9dYGCDPFkWp8+aGeXtLVzGa1Q4QUiKXVPh4I=", "key_file": "/k", "way": "kernel", "instance": "i-1"},
)  # fmt: skip


class _AnyMac(dict[str, bytes]):
    def __missing__(self, device: str) -> bytes:
        return b"\x0e*\0\0\0\1"


def _facts() -> HostFacts:
    return HostFacts(
        _FACTS.underlay, _FACTS.mtu, _FACTS.local, _FACTS.local_v6, _FACTS.public, _FACTS.public_v6, _FACTS.connected,
        _AnyMac(), _FACTS.kernel, found=_FACTS.found,
    )  # fmt: skip


@target("config", BadConfig, seeds=_CONFIGS)
def config(data: bytes) -> None:
    """Network config to a backend: only the rules' own errors, and what is taken is consistent."""
    parsed = NetworkConfig.parse(data)
    for network, low, high in (
        (parsed.network, parsed.subnet_min, parsed.subnet_max),
        (parsed.ipv6_network, parsed.ipv6_subnet_min, parsed.ipv6_subnet_max),
    ):
        if network:
            assert network == network.masked()
            assert network.contains(low)
            assert network.contains(high)
            assert parsed.capacity(network.family) >= 0
    try:
        backend = make(parsed, _facts())
        assert backend.mtu > 0
        attrs = backend.attrs()
        assert LeaseAttrs.decode(attrs.encode()) == attrs
    except (NotJoinable, BadConfig, BadLease):
        return


@target(
    "lease-key", BadLease, seeds=("10.3.1.0-24", "10.3.1.0-24&fd00:1::-64", "0.0.0.0-0&fd00:1::-64", "x/10.3.1.0-24")
)
def lease_key(data: bytes) -> None:
    """A key that is taken is written as one that reads the same."""
    key = LeaseKey.parse(data.decode("utf-8", "backslashreplace"))
    assert LeaseKey.parse(str(key)) == key
    assert key.subnets
    assert all(subnet == subnet.masked() for subnet in key.subnets)


@target("lease-value", BadLease, seeds=_VALUES)
def lease_value(data: bytes) -> None:
    """Values in both forms, round trip."""
    attrs = LeaseAttrs.decode(data)
    assert LeaseAttrs.decode(attrs.encode()) == attrs
    if not attrs.public_ipv6 and not attrs.backend_v6_data:
        assert LeaseAttrs.decode(attrs.encode(etcd_v2=True)) == attrs


@target("plan", seeds=[pieces(c, "10.3.5.0-24", v) for c in _CONFIGS for v in _VALUES[:3]])
def plan(data: bytes) -> None:
    """A peer's lease of any kind under any config is either planned or a BadLease: no other error, or all peers would go."""
    cut = Cut(data)
    try:
        parsed = NetworkConfig.parse(cut.piece())
        key, attrs = LeaseKey.parse(cut.piece().decode("utf-8", "backslashreplace")), LeaseAttrs.decode(cut.piece())
        backend = make(parsed, _facts())
    except WinceyError:
        return
    own_v4 = Subnet(parsed.subnet_min, parsed.subnet_len) if parsed.network else None
    own_v6 = Subnet(parsed.ipv6_subnet_min, parsed.ipv6_subnet_len) if parsed.ipv6_network else None
    planner = Planner(
        config=parsed, host=_facts(), backend=backend, identity=Identity(_FACTS.public, _FACTS.public_v6),
        own=LeaseKey(own_v4, own_v6), policy=Policy(masquerade=True),
    )  # fmt: skip
    planner.local()
    lease = Lease(key, attrs, 1, 1)
    try:
        objects = planner.peer(lease)
        planner.target(lease)
        for item in objects:
            assert str(item)
            hash(item.key)
    except BadLease as error:
        assert str(error)  # noqa: PT017  # this is no test of pytest's


@target(
    "lease-data", seeds=[bytes([number]) + pieces(value) for number in range(len(BACKENDS)) for value in _VALUES[:4]]
)
def lease_data(data: bytes) -> None:
    """The same with a config that is right, so that each backend sees what a foreign lease may tell it."""
    cut = Cut(data)
    kind = chosen(cut, sorted(BACKENDS))
    value = cut.piece()
    text = next(
        (text for text in _CONFIGS if f'"Type": "{kind}"' in text),
        '{"Network": "10.3.0.0/16", "Backend": {"Type": "%s"}}' % kind,
    )
    plan(pieces(text, "10.3.5.0-24", value))


class _Store:
    """A store with one page of entries, and one batch of changes."""

    name, values_v2 = "fuzz", False

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries

    async def read_all(self, prefix: str) -> Listing:
        return Listing([each for each in self._entries if each.key.startswith(prefix)], 9)

    async def watch(self, prefix: str, after: int):  # type: ignore[no-untyped-def]  # an async generator
        yield [Change(each.key, each) for each in self._entries if each.key.startswith(prefix)]


_GOOD = (Entry("/n/subnets/10.3.77.0-24", _VALUES[0].encode(), 5, 5), Entry("/n/config", _CONFIGS[1].encode(), 4, 4))


@target("registry", seeds=[pieces("subnets/10.3.5.0-24", _VALUES[0], "wincey/hosts/192.0.2.1", '{"name":"a","instance":"b"}'),
                           pieces("a/config", _CONFIGS[0], "subnets/10.3.5.0-25", "{"), pieces("subnets/", "", "config", "x")])  # fmt: skip
def registry(data: bytes) -> None:
    """Whatever else lies below the prefix, the one good lease and the config are read, from a listing and from a watch."""
    cut, entries = Cut(data), list[Entry]()
    while cut.left:
        key = "/n/" + cut.piece().decode("utf-8", "backslashreplace")
        if key not in {"/n/config", _GOOD[0].key}:
            entries.append(Entry(key, cut.piece(), 6, 6))

    async def read() -> None:
        known = Registry(_Store([*entries, *_GOOD]), "/n")  # type: ignore[arg-type]  # what is asked of it, it has
        snapshot = await known.snapshot()
        assert snapshot.config == _GOOD[1].value
        assert snapshot.leases[_GOOD[0].key].key == LeaseKey.parse("10.3.77.0-24")
        updates = [update async for batch in known.watch(1) for update in batch]
        assert sum(update.lease is not None for update in updates) >= 1
        for claim in snapshot.claims.values():
            assert str(Host.decode(claim.value))
        networks, _ = await NetworkList(_Store([*entries, *_GOOD]), "/n").read()  # type: ignore[arg-type]  # likewise
        assert "" not in networks
        assert all("/" not in name and len(name) < 64 for name in networks)
        _decide(list(snapshot.leases.values()))

    coroutine = read()
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("a listing waits for nothing")


def _decide(leases: list[Lease]) -> None:
    parsed, me = NetworkConfig.parse(_CONFIGS[1]), parse_address("192.0.2.1")
    try:
        decision = decide(parsed, leases, Identity(me, None), previous=(), rng=random.Random(1))
    except OutOfSubnets:
        return
    taken = decision.take
    if taken:
        assert parsed.allows(taken)
        assert not any(taken.overlaps(lease.key) for lease in leases if lease.attrs.public_ip != me)


@target("claim", seeds=('{"name":"a","instance":"b"}',))
def claim(data: bytes) -> None:
    """Another host's claim is never an error: one that can't be read is a host nobody knows."""
    assert str(Host.decode(data))


@target("subnet-env", CniError, seeds=("FLANNEL_NETWORK=10.3.0.0/16\nFLANNEL_SUBNET=10.3.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
        "export FLANNEL_IPV6_SUBNET='fd00::1/64' # x\nFLANNEL_IPV6_NETWORK=\"fd00::/48\"\nFLANNEL_MTU: 9\n"))  # fmt: skip
def subnet_env(data: bytes) -> None:
    """The daemon reads what it can, and what it writes the plugin reads."""
    text = data.decode(errors="replace")
    env = EnvFile.parse(text)
    again = EnvFile.parse(env.render().decode())
    assert set(again.subnets) == set(env.subnets)
    assert again.mtu == env.mtu
    parse_subnet_env(text, "/x")


@target(
    "state-file",
    seeds=(
        '{"devices":["flannel.1"],"networks":["10.3.0.0/16"],"macs":{"flannel.1":"0e:2a:00:00:00:02"},"parts":["bgp"]}',
    ),
)
def state_file(data: bytes) -> None:
    """A state file that somebody spoilt is made anew, never an end of the daemon."""
    with tempfile.TemporaryDirectory(prefix="wincey-fuzz-", dir="/dev/shm") as directory:  # a memory file system
        file = Path(directory) / "wincey" / "subnet" / "state.json"
        file.parent.mkdir(parents=True)
        file.write_bytes(data)
        state = State(f"{directory}/subnet.env", random.Random(1))
        before = (set(state.devices), set(state.networks), dict(state.macs), set(state.parts))
        state.save()
        again = State(f"{directory}/subnet.env", random.Random(1))
        assert (again.devices, again.networks, dict(again.macs), again.parts) == before


@target("cni-netconf", CniError, seeds=('{"name":"n","type":"flannel","cniVersion":"1.0.0","delegate":{"isDefaultGateway":true}}',
        '{"NAME":"n","network":"blue","ipam":{"routes":[{"dst":"10.0.0.0/8"}]},"runtimeConfig":{},"cni.dev/valid-attachments":[{"containerID":"a","ifname":"b"}]}'))  # fmt: skip
def cni_netconf(data: bytes) -> None:
    """A runtime's config to the delegate's."""
    conf = parse_netconf(data)
    env = parse_subnet_env(
        "FLANNEL_NETWORK=10.3.0.0/16\nFLANNEL_SUBNET=10.3.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n", "/x"
    )
    made = delegate_config(conf, env)
    assert made["ipam"]["ranges"] == [[{"subnet": "10.3.1.0/24"}]]
    assert "/" not in conf.name
    assert "/" not in conf.network


@target(
    "hosts-list", BadHosts, seeds=("192.0.2.1 10.3.1.0/24 a\n192.0.2.2 10.3.2.0/24\n# x\nfd01::2 fd00:3:0:2::/64 b\n",)
)
def hosts_list(data: bytes) -> None:
    """A list of static routes: what is taken has no two hosts for an address."""
    hosts = read_hosts(data.decode(errors="replace"), "list")
    me = find_self(hosts, [hosts[0].addresses[0]] if hosts else [], "list")
    for route in plan_static(others(hosts, me), _FACTS.connected):
        assert route.gateway
