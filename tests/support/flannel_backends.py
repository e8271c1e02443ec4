"""flannel's backends vxlan, host-gw, udp and alloc by ip and bridge commands (compatibility reference, section 6). For the stand-in.

Each knows `prepare` (before the lease), `data` (what the lease tells), `configure` (with the lease), `added`, `removed` and
`check` (called every 10 s). What a backend has programmed stays when the program ends; only the TUN device goes.
"""

import ipaddress
import json
import os
import subprocess
import sys
from pathlib import Path


def run(command, check=True):
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=20, check=False)
    if done.returncode and check:
        raise SystemExit(f"{command}: {done.stderr.strip()}")
    return done


def attempt(command):
    """Run and log; flannel goes on whatever becomes of it."""
    done = run(command, check=False)
    print(f"{command}: {done.stderr.strip() or 'done'}", flush=True)
    return done.returncode == 0


class Backend:
    """host: the interface and its addresses, see flannel_standin.Host. options: the config's Backend, keys in lower case."""

    type = ""

    def __init__(self, host, options, network):
        self.host, self.options, self.network = host, options, network

    @property
    def mtu(self):
        return self.host.mtu

    def prepare(self, families):
        pass

    def data(self, family):
        return None

    def configure(self, subnets):
        pass

    def added(self, subnets, value):
        pass

    def removed(self, subnets, value):
        pass

    def check(self):
        pass


class Alloc(Backend):
    """A lease and nothing else."""


class Vxlan(Backend):
    """Section 6.2, as since 0.9 with the explicit MAC of 0.14.1."""

    type = "vxlan"

    def __init__(self, host, options, network):
        super().__init__(host, options, network)
        self.vni = options.get("vni", 1)
        self.port = options.get("port", 0) or 8472
        self.direct = options.get("directrouting", False)

    @property
    def mtu(self):
        return (self.options.get("mtu") or self.host.mtu) - 50

    def device(self, family):
        return f"flannel.{self.vni}" if family == 4 else f"flannel-v6.{self.vni}"

    def prepare(self, families):
        self.macs = {}
        for family in families:
            device = self.device(family)
            found = run(f"ip -d -j link show {device}", check=False)
            if not (found.returncode == 0 and self._compatible(json.loads(found.stdout)[0], family)):
                run(f"ip link del {device}", check=False)
                mac = bytearray(os.urandom(6))
                mac[0] = (mac[0] & 0xFE) | 0x02
                run(
                    f"ip link add {device} mtu {self.mtu} address {mac.hex(':')} type vxlan id {self.vni} dev {self.host.iface}"
                    f" local {self.host.public[family]} dstport {self.port}"
                    f" {'learning' if self.options.get('learning') else 'nolearning'}{' gbp' if self.options.get('gbp') else ''}"
                )
            run(f"sysctl -qw net/ipv6/conf/{device}/accept_ra=0", check=False)
            self.macs[family] = json.loads(run(f"ip -j link show {device}").stdout)[0]["address"]

    def _compatible(self, link, family):
        info = link.get("linkinfo", {})
        data = info.get("info_data", {})
        return (
            info.get("info_kind") == "vxlan"
            and data["id"] == self.vni
            and data.get("link", self.host.iface) == self.host.iface
            and data.get("local", data.get("local6", self.host.public[family])) == self.host.public[family]
            and data["port"] == self.port
            and bool(data.get("gbp")) == bool(self.options.get("gbp"))
            and not data.get("l2miss")
            and not data.get("group")
        )

    def data(self, family):
        return {"VNI": self.vni, "VtepMAC": self.macs[family]}

    def configure(self, subnets):
        for subnet in subnets:
            device, wanted = self.device(subnet.version), subnet.network_address
            present = json.loads(run(f"ip -{subnet.version} -j addr show dev {device}").stdout or "[]")
            there = False
            for entry in (entry for link in present for entry in link.get("addr_info", [])):
                if entry["local"] == str(wanted) and entry["prefixlen"] == subnet.max_prefixlen:
                    there = True
                elif ipaddress.ip_address(entry["local"]) in self.network[subnet.version]:
                    run(f"ip addr del {entry['local']}/{entry['prefixlen']} dev {device}")
            if not there:
                run(f"ip addr add {wanted}/{subnet.max_prefixlen} dev {device}")
            run(f"ip link set {device} up")
            mac = json.loads(run(f"ip -j link show {device}").stdout)[0]["address"]
            if mac != self.macs[subnet.version]:
                raise SystemExit(f"{device} has got another MAC address: {mac}")

    def added(self, subnets, value):
        self._change("replace", subnets, value)

    def removed(self, subnets, value):
        self._change("del", subnets, value)

    def _change(self, verb, subnets, value):
        for subnet in subnets:
            v4 = subnet.version == 4
            peer = value["PublicIP" if v4 else "PublicIPv6"]
            if self.direct and " via " not in run(f"ip route get {peer}").stdout:
                attempt(f"ip route {verb} {subnet} via {peer}")
                continue
            mac, base = value["BackendData" if v4 else "BackendV6Data"]["VtepMAC"], subnet.network_address
            device = self.device(subnet.version)
            attempt(f"ip neigh {verb} {base} lladdr {mac} nud permanent dev {device}")
            attempt(f"bridge fdb {verb} {mac} dst {peer} dev {device} self permanent")
            attempt(f"ip -{subnet.version} route {verb} {subnet} via {base} dev {device} onlink")


class HostGw(Backend):
    """Section 6.3."""

    type = "host-gw"

    def prepare(self, families):
        if 4 in families and self.host.public[4] != self.host.local[4]:
            raise SystemExit("the public address is not the interface's")
        self.routes = {}

    def added(self, subnets, value):
        for subnet in subnets:
            gateway = value["PublicIP" if subnet.version == 4 else "PublicIPv6"]
            self.routes[subnet] = gateway
            wanted = (gateway, self.host.iface)
            for route in json.loads(run(f"ip -{subnet.version} -j route show {subnet} table main").stdout or "[]"):
                if (route.get("gateway"), route.get("dev")) != wanted:
                    attempt(f"ip -{subnet.version} route del {subnet}")
                    break
            self._ensure(subnet, *wanted)

    def removed(self, subnets, value):
        for subnet in subnets:
            self.routes.pop(subnet, None)
            attempt(f"ip -{subnet.version} route del {subnet}")

    def check(self):
        for subnet, gateway in self.routes.items():
            self._ensure(subnet, gateway, self.host.iface)

    def _ensure(self, subnet, gateway, iface):
        if f"via {gateway} dev {iface}" not in run(f"ip -{subnet.version} route show {subnet}").stdout:
            attempt(f"ip -{subnet.version} route add {subnet} via {gateway} dev {iface}")


class Udp(Backend):
    """Section 6.1. The proxy is a process of its own here and ends with its standard input, so with us."""

    @property
    def mtu(self):
        return self.host.mtu - 28

    def configure(self, subnets):
        port = str(self.options.get("port", 8285))
        self.proxy = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("flannel_proxy.py")), "flannel%d", self.host.local[4], port, "-"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        device = self.proxy.stdout.readline().strip()
        run(f"ip addr add {subnets[0].network_address}/32 dev {device}")
        run(f"ip link set {device} mtu {self.mtu} up")
        run(f"ip route add {self.network[4]} dev {device}", check=False)
        self._tell("listen")
        if self.proxy.stdout.readline() != "ready\n":
            raise SystemExit(f"failed to start listening on UDP socket {self.host.local[4]}:{port}")

    def added(self, subnets, value):
        self._tell(f"set {subnets[0]} {value['PublicIP']}")

    def removed(self, subnets, value):
        self._tell(f"delete {subnets[0]}")

    def check(self):
        if self.proxy.poll() is not None:
            raise SystemExit("the proxy ended")  # flannel's ends the whole program

    def _tell(self, line):
        self.proxy.stdin.write(line + "\n")
        self.proxy.stdin.flush()


BACKENDS = {"vxlan": Vxlan, "host-gw": HostGw, "udp": Udp, "alloc": Alloc}
