"""Byte for byte what flannel writes, and every way to write what flannel reads, as etcdctl and curl see it.

Compatibility reference, sections 3.2 to 3.5, 4.1, 4.2 and 5.4. One host for each case, each in a network of its own, so that
a lab for each API does for all.
"""

import json
import shlex
from contextlib import ExitStack

import pytest

from support.flanneld import flanneld
from support.interop import etcdctl, sh
from support.keys import wait_until
from wincey.lab.plan import STORE, network_config

pytestmark = [pytest.mark.root, pytest.mark.etcd]

KEYS = {(4,): "10.5.7.0-24", (6,): "0.0.0.0-0&fd00:5:0:7::-64", (4, 6): "10.5.7.0-24&fd00:5:0:7::-64"}
NETWORK = {4: "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.7.1/24\n",
           6: "FLANNEL_IPV6_NETWORK=fd00:5::/48\nFLANNEL_IPV6_SUBNET=fd00:5:0:7::1/64\n"}  # fmt: skip
CASES = [
    ("vxlan", (4,), 1450),
    ("vxlan", (4, 6), 1450),
    ("vxlan", (6,), 1430),  # flannel says 1450 and loses what is larger than 1430
    ("host-gw", (4,), 1500),
    ("host-gw", (4, 6), 1500),
    ("host-gw", (6,), 1500),
    ("udp", (4,), 1472),
    ("alloc", (4,), 1500),
    ("alloc", (4, 6), 1500),
]
WRITERS = {
    "etcd3": ["etcdctl put {key} {value}"],
    "etcd2": [
        "etcdctl set {key} {value}",
        "etcdctl mk {key} {value}",
        "curl -sS --fail -XPUT {url}/v2/keys{key} --data-urlencode value={value}",
    ],
}


@pytest.fixture(params=["etcd3", "etcd2"])
def lab(make_lab, request):
    return make_lab("vxlan", families=(4, 6), store=request.param, hosts=len(CASES), containers=0, start=[])


def test_values_keys_and_files(lab, tmp_path):
    writers = WRITERS[lab.spec.store]
    with ExitStack() as stack:
        for number, (host, (backend, families, _)) in enumerate(zip(lab.hosts, CASES, strict=True)):
            write(lab, writers[number % len(writers)], f"/case/{host.name}/config", config_of(backend, families))
            flags = [f"--etcd-prefix=/case/{host.name}", f"--ip-masq={'true' if number % 2 else 'false'}"]
            stack.enter_context(flanneld(host, tmp_path / f"{host.name}.log", *flags))
        for number, (host, (backend, families, mtu)) in enumerate(zip(lab.hosts, CASES, strict=True)):
            wait_until(host.subnet_file.exists)
            env = "".join(NETWORK[family] for family in families)
            masq = "true" if number % 2 else "false"
            assert host.subnet_file.read_bytes().decode() == f"{env}FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ={masq}\n"
            key = f"/case/{host.name}/subnets/{KEYS[families]}"
            value = value_of(lab, host, backend, families)
            found = everything(lab, f"/case/{host.name}")
            claim = found.pop(f"/case/{host.name}/wincey/hosts/{host.underlay(families[0])}")
            assert set(json.loads(claim)) == {"name", "instance"}
            assert found == {f"/case/{host.name}/config": config_of(backend, families), key: value}
            assert 86_000 < time_left(lab, key) <= 86_400
            assert time_left(lab, f"/case/{host.name}/config") is None
            assert networks_below(lab, f"/case/{host.name}") == []
        assert networks_below(lab, "/case") == sorted(host.name for host in lab.hosts)


def config_of(backend, families):
    config = json.loads(network_config(backend, families))
    bounds = {4: ("Subnet{}", "10.5.7.0"), 6: ("IPv6Subnet{}", "fd00:5:0:7::")}
    config |= {bounds[family][0].format(end): bounds[family][1] for family in families for end in ("Min", "Max")}
    return json.dumps(config)


def value_of(lab, host, backend, families):
    """The lease value as the reference has it."""
    mac = {family: mac_of(host, family) for family in families} if backend == "vxlan" else {}
    parts = [f'"PublicIP":"{host.underlay(4) if 4 in families else "0.0.0.0"}"']
    # What flannel up to 0.14 wrote, the last to be common with etcd v2, has no word of IPv6.
    if lab.spec.store == "etcd3" or 6 in families:
        parts.append(f'"PublicIPv6":"{host.underlay(6)}"' if 6 in families else '"PublicIPv6":null')
    if backend in {"vxlan", "host-gw"}:
        parts.append(f'"BackendType":"{backend}"')
    for family, name in ((4, "BackendData"), (6, "BackendV6Data")):
        if family in mac:
            parts.append(f'"{name}":{{"VNI":1,"VtepMAC":"{mac[family]}"}}')
    if backend == "udp":  # the one thing that we say and flannel does not, nor reads (docs/backends/udp.md)
        parts.append('"BackendData":{"Engine":"bpf"}')
    return "{" + ",".join(parts) + "}"


def mac_of(host, family):
    device = "flannel.1" if family == 4 else "flannel-v6.1"
    return json.loads(sh(host, f"ip -j link show {device}"))[0]["address"]


def write(lab, command, key, value):
    line = command.format(key=key, value=shlex.quote(value), url=lab.store.url)
    api = 2 if lab.spec.store == "etcd2" else 3
    sh(lab.node(STORE), f"ETCDCTL_ENDPOINTS={lab.store.url} ETCDCTL_ENDPOINT={lab.store.url} ETCDCTL_API={api} {line}")


def everything(lab, prefix):
    """All keys below a prefix and their values, by plain etcdctl."""
    if lab.spec.store == "etcd3":
        lines = etcdctl(lab, "get", "--prefix", prefix + "/").splitlines()
        return dict(zip(lines[::2], lines[1::2], strict=True))
    names = [line for line in etcdctl(lab, "ls", "--recursive", "-p", prefix).splitlines() if not line.endswith("/")]
    return {name: etcdctl(lab, "get", name).removesuffix("\n") for name in names}


def time_left(lab, key):
    """Seconds, None for ever."""
    if lab.spec.store == "etcd2":
        return json.loads(sh(lab.node(STORE), f"curl -sS '{lab.store.url}/v2/keys{key}'"))["node"].get("ttl")
    entry = json.loads(etcdctl(lab, "get", key, "-w", "json"))["kvs"][0]
    if not entry.get("lease"):
        return None
    return json.loads(etcdctl(lab, "lease", "timetolive", f"{entry['lease']:x}", "-w", "json"))["ttl"]


def networks_below(lab, prefix):
    """The networks that an old flannel with several of them finds: the children that have a key `config`."""
    if lab.spec.store == "etcd2":
        names = etcdctl(lab, "ls", "--recursive", "-p", prefix).splitlines()
    else:
        names = etcdctl(lab, "get", "--prefix", "--keys-only", prefix + "/").split()
    below = [name.removeprefix(prefix + "/").split("/") for name in names]
    return sorted({parts[0] for parts in below if parts[1:] == ["config"]})
