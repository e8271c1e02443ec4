"""A stand-in for flannel on one host: an independent, deliberately simple daemon to test mixed clusters with.

It follows the compatibility reference and shares no code with the product: it takes flannel's flags, leases a subnet in etcd
v3 with etcdctl (sections 3.2, 3.3, 3.5, 3.6), makes the vxlan device or none (6.2, 6.3), writes subnet.env (4.1, 4.2) and
programs what each other lease asks for with ip and bridge commands, looking at the store a few times a second. IPv4 only.
A lease of another backend type is ignored, as flannel does.
"""

import argparse
import base64
import ipaddress
import json
import os
import random
import subprocess
import time

TTL = 86400


def run(*argv, check=True, text_input=None):
    return subprocess.run(argv, check=check, capture_output=True, text=True, input=text_input, timeout=20).stdout


class Standin:
    def __init__(self, options):
        self.options = options
        self.etcd = ("etcdctl", "--endpoints", options.etcd_endpoints)
        os.environ["ETCDCTL_API"] = "3"
        link = json.loads(run("ip", "-j", "-4", "addr", "show", "dev", options.iface))[0]
        self.mtu = link["mtu"]
        self.address = next(each["local"] for each in link["addr_info"] if each["scope"] == "global")
        self.public_ip = options.public_ip or self.address
        self.applied = {}  # key of a lease: its value as applied

    def read(self, *key):
        answer = json.loads(run(*self.etcd, "get", *key, "-w", "json"))
        return {
            base64.b64decode(each["key"]).decode(): base64.b64decode(each["value"]).decode()
            for each in answer.get("kvs", [])
        }

    def wait_for_config(self):
        key = self.options.etcd_prefix + "/config"
        while key not in (found := self.read(key)):
            time.sleep(1)
        config = {name.lower(): value for name, value in json.loads(found[key]).items()}
        self.network = ipaddress.ip_network(config["network"])
        backend = {name.lower(): value for name, value in config["backend"].items()}
        self.type = backend["type"].lower()
        if self.type not in ("vxlan", "host-gw"):
            raise SystemExit(f"the stand-in knows no backend {self.type!r}")
        self.vni = backend.get("vni", 1)
        self.device = f"flannel.{self.vni}" if self.type == "vxlan" else self.options.iface
        self.env_mtu = self.mtu - 50 if self.type == "vxlan" else self.mtu

    def make_device(self):
        if self.type != "vxlan":
            return
        if subprocess.run(["ip", "link", "show", self.device], capture_output=True, check=False).returncode:
            mac = bytearray(os.urandom(6))
            mac[0] = (mac[0] & 0xFE) | 0x02
            run(
                *f"ip link add {self.device} mtu {self.env_mtu} address {mac.hex(':')} type vxlan id {self.vni}".split(),
                *f"dev {self.options.iface} local {self.public_ip} dstport 8472 nolearning".split(),
            )
        self.mac = json.loads(run("ip", "-j", "link", "show", self.device))[0]["address"]

    def take_lease(self):
        value = {"PublicIP": self.public_ip, "PublicIPv6": None, "BackendType": self.type}
        if self.type == "vxlan":
            value["BackendData"] = {"VNI": self.vni, "VtepMAC": self.mac}
        text = json.dumps(value, separators=(",", ":"))
        leases = self.read("--prefix", self.options.etcd_prefix + "/subnets/")
        lease = run(*self.etcd, "lease", "grant", str(TTL)).split()[1]
        for key, other in leases.items():
            if json.loads(other)["PublicIP"] == self.public_ip:
                run(*self.etcd, "put", f"--lease={lease}", key, text)
                self.key = key
                break
        else:
            self.key = self.create(text, lease)
        self.subnet = subnet_of(self.key)

    def create(self, text, lease):
        length = 24 if self.network.prefixlen <= 22 else self.network.prefixlen + 2
        while True:
            taken = [subnet_of(key) for key in self.read("--prefix", self.options.etcd_prefix + "/subnets/")]
            # The first subnet is never used; the last one is.
            free = [each for each in list(self.network.subnets(new_prefix=length))[1:] if not overlaps(each, taken)][
                :100
            ]
            subnet = random.choice(free)
            key = f"{self.options.etcd_prefix}/subnets/{subnet.network_address}-{length}"
            transaction = f'ver("{key}") = "0"\n\nput --lease={lease} {key} {json.dumps(text)}\n\n\n'
            if "SUCCESS" in run(*self.etcd, "txn", text_input=transaction):
                return key

    def configure(self):
        if self.type == "vxlan":
            run("ip", "addr", "flush", "dev", self.device, "scope", "global")
            run("ip", "addr", "add", f"{self.subnet.network_address}/32", "dev", self.device)
            run("ip", "link", "set", self.device, "up")
        path = self.options.subnet_file
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = os.path.join(os.path.dirname(path), "." + os.path.basename(path))
        with open(temporary, "w") as file:
            file.write(
                f"FLANNEL_NETWORK={self.network}\n"
                f"FLANNEL_SUBNET={self.subnet.network_address + 1}/{self.subnet.prefixlen}\n"
                f"FLANNEL_MTU={self.env_mtu}\n"
                f"FLANNEL_IPMASQ={'true' if self.options.ip_masq else 'false'}\n"
            )
        os.rename(temporary, path)

    def follow(self):
        while True:
            try:
                leases = self.read("--prefix", self.options.etcd_prefix + "/subnets/")
            except (subprocess.SubprocessError, ValueError) as error:
                print(f"store: {error}", flush=True)
                time.sleep(1)
                continue
            for key in self.applied.keys() - leases.keys():
                self.change(key, self.applied.pop(key), "del")
            for key, text in leases.items():
                if key != self.key and self.applied.get(key) != text:
                    self.change(key, text, "replace")
                    self.applied[key] = text
            time.sleep(0.2)

    def change(self, key, text, verb):
        try:
            subnet, value = subnet_of(key), json.loads(text)
            if value.get("BackendType", "") != self.type:
                print(f"ignoring non-{self.type} lease {key}", flush=True)
                return
            if self.type == "host-gw":
                commands = [f"ip route {verb} {subnet} via {value['PublicIP']} dev {self.device}"]
            else:
                mac, base, peer = value["BackendData"]["VtepMAC"], subnet.network_address, value["PublicIP"]
                commands = [
                    f"ip neigh {verb} {base} lladdr {mac} nud permanent dev {self.device}",
                    f"bridge fdb {verb} {mac} dst {peer} dev {self.device} self permanent",
                    f"ip route {verb} {subnet} via {base} dev {self.device} onlink",
                ]
        except (ValueError, KeyError, TypeError) as error:
            print(f"ignoring {key} {text}: {error}", flush=True)
            return
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            print(f"{command}: {done.stderr.strip() or 'done'}", flush=True)


def subnet_of(key):
    address, _, length = key.rpartition("/")[2].partition("-")
    return ipaddress.ip_network(f"{address}/{int(length)}")


def overlaps(subnet, taken):
    return any(subnet.overlaps(other) for other in taken)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--iface", required=True)
    parser.add_argument("--subnet-file", default="/run/flannel/subnet.env")
    parser.add_argument("--etcd-endpoints", default="http://127.0.0.1:2379")
    parser.add_argument("--etcd-prefix", default="/coreos.com/network")
    parser.add_argument("--public-ip", default="")
    parser.add_argument("--ip-masq", action="store_true")
    standin = Standin(parser.parse_args())
    standin.wait_for_config()
    standin.make_device()
    standin.take_lease()
    standin.configure()
    print(f"lease {standin.key}", flush=True)
    standin.follow()


if __name__ == "__main__":
    main()
