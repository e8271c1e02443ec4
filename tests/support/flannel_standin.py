"""A stand-in for flannel on one host: an independent, deliberately simple daemon to test mixed clusters with.

It does what the compatibility reference says that flannel does, rough edges included, and shares no code with the product.
It takes flannel's flags, leases a subnet in etcd (sections 3.2 to 3.6; v3 as today, v2 as 0.14), makes the device of its backend
and programs what each other lease asks for (section 6), keeps the iptables rules (7.1 to 7.3), writes subnet.env (4.1, 4.2),
and at its end leaves everything behind (7.6). `--etcd-api` is the one flag that flannel has not: there the version decides.

Where it is simpler: each event leads to a new listing, whose difference from the last one stands for events (RE-13 and RE-1
are as flannel's: a change of anything unparsable below the prefix `subnets` removes every peer); a lease is not renewed after
its 23 hours; IPv6 needs IPv4 beside it, as flannel's IPv6 alone does not work with etcd (RE-4).
"""

import argparse
import ipaddress
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

from flannel_backends import BACKENDS
from flannel_rules import Rules, chains, flat
from flannel_store import EtcdV2, EtcdV3, StoreFailed

KEY = re.compile(r"(\d+\.\d+\.\d+\.\d+)-(\d+)(?:&([\da-f:]+)-(\d+))?$")
V6_FIELDS = {"PublicIPv6", "BackendV6Data"}


def say(text):
    print(text, flush=True)


def subnets_of(key):
    """Raises ValueError."""
    match = KEY.search(key)
    if not match:
        raise ValueError(f"failed to parse subnet key {key}")
    found = [ipaddress.ip_network(f"{match[1]}/{match[2]}")]
    return [*found, ipaddress.ip_network(f"{match[3]}/{match[4]}")] if match[3] else found


class Host:
    """The interface and its addresses by family: its own, and those that others reach it by."""

    def __init__(self, options):
        self.iface = options.iface
        self.local = {}
        for family in (4, 6):
            found = subprocess.run(
                ["ip", "-j", f"-{family}", "addr", "show", "dev", options.iface],
                check=True,
                capture_output=True,
                text=True,
            )
            for link in filter(None, json.loads(found.stdout or "[]")):
                self.mtu = link["mtu"]
                addresses = [each["local"] for each in link["addr_info"] if each["scope"] == "global"]
                self.local |= {family: addresses[0]} if addresses else {}
        given = {4: options.public_ip, 6: options.public_ipv6}
        self.public = {family: given[family] or address for family, address in self.local.items()}


class Pool:
    """Section 2.1: the subnets of one family that may be leased."""

    def __init__(self, config, network, prefix, usual):
        self.network = network
        length = config.get(prefix + "subnetlen") or max(usual, network.prefixlen + 2)
        size = 1 << (network.max_prefixlen - length)
        last = int(network.broadcast_address) + 1 - size
        self.length, self.size = length, size
        self.first = int(ipaddress.ip_address(config.get(prefix + "subnetmin") or int(network.network_address) + size))
        self.last = int(ipaddress.ip_address(config.get(prefix + "subnetmax") or last))

    def allows(self, subnet):
        return subnet.prefixlen == self.length and self.first <= int(subnet.network_address) <= self.last

    def pick(self, taken):
        """One of the first hundred free subnets."""
        free, number = [], self.first
        family = ipaddress.IPv4Network if self.network.version == 4 else ipaddress.IPv6Network
        while number <= self.last and len(free) < 100:
            candidate = family((number, self.length))
            if not any(candidate.overlaps(other) for other in taken if other.version == candidate.version):
                free.append(candidate)
            number += self.size
        if not free:
            raise SystemExit("out of subnets")
        return random.choice(free)


class Standin:
    def __init__(self, options):
        self.options = options
        self.prefix = options.etcd_prefix
        self.store = (EtcdV2 if options.etcd_api == "v2" else EtcdV3)(options.etcd_endpoints, self.prefix)
        self.host = Host(options)
        self.peers = {}  # key of a lease: its value as it was applied
        self.unparsable = None

    def run(self):
        self.read_config()
        previous = self.previous()
        self.backend.prepare(self.families)
        self.take_lease(previous)
        self.backend.configure(self.subnets)
        layout = flat if self.options.etcd_api == "v2" else chains
        self.rules = [
            Rules(self.pools[subnet.version].network, subnet, layout, self.options.ip_masq) for subnet in self.subnets
        ]
        for rules in self.rules:
            rules.install()
        self.write_env()
        say(f"lease {self.key}")
        self.follow()

    def read_config(self):
        while True:
            try:
                if text := self.store.read(self.prefix + "/config"):
                    break
            except StoreFailed as error:
                say(f"couldn't fetch network config: {error}")
            say("timed out")
            time.sleep(1)
        config = {name.lower(): value for name, value in json.loads(text).items()}
        self.pools = {4: Pool(config, ipaddress.ip_network(config["network"], strict=False), "", 24)}
        if config.get("enableipv6") and self.store.ipv6:
            self.pools[6] = Pool(config, ipaddress.ip_network(config["ipv6network"], strict=False), "ipv6", 64)
        self.families = list(self.pools)
        options = {name.lower(): value for name, value in config.get("backend", {"type": "udp"}).items()}
        backend = BACKENDS.get(options.get("type", "").lower())
        if backend is None:
            raise SystemExit("unknown backend type")
        self.backend = backend(self.host, options, {family: pool.network for family, pool in self.pools.items()})

    def previous(self):
        """The IPv4 subnet of an earlier subnet.env."""
        try:
            with open(self.options.subnet_file) as file:
                found = re.search(r"^FLANNEL_SUBNET=(\S+)", file.read(), re.MULTILINE)
            return ipaddress.ip_network(found[1], strict=False) if found else None
        except (OSError, ValueError):
            return None

    def value(self):
        fields = {
            "PublicIP": self.host.public[4],
            "PublicIPv6": self.host.public.get(6) if 6 in self.families else None,
        }
        if self.backend.type:
            fields["BackendType"] = self.backend.type
        if data := self.backend.data(4):
            fields["BackendData"] = data
        if 6 in self.families and (data := self.backend.data(6)):
            fields["BackendV6Data"] = data
        if not self.store.ipv6:
            fields = {name: value for name, value in fields.items() if name not in V6_FIELDS}
        return json.dumps(fields, separators=(",", ":"))

    def take_lease(self, previous):
        """Section 3.6."""
        while True:
            leases = {key: self.parse(key, text) for key, text in self.store.leases().items()}
            leases = {key: lease for key, lease in leases.items() if lease}
            own = next((key for key, (_, value) in leases.items() if value["PublicIP"] == self.host.public[4]), None)
            if own and self.fits(leases[own][0]):
                self.key, self.subnets = own, leases[own][0]
                self.store.put(own, self.value())
                return
            if own:
                self.store.delete(own)
                del leases[own]
            taken = [subnet for subnets, _ in leases.values() for subnet in subnets]
            subnets = [pool.pick(taken) for pool in self.pools.values()]
            if previous and self.pools[4].allows(previous) and previous not in taken:
                subnets[0] = previous
            name = "&".join(f"{subnet.network_address}-{subnet.prefixlen}" for subnet in subnets)
            if self.store.create(f"{self.prefix}/subnets/{name}", self.value()):
                self.key, self.subnets = f"{self.prefix}/subnets/{name}", subnets
                return

    def fits(self, subnets):
        return [subnet.version for subnet in subnets] == self.families and all(
            self.pools[subnet.version].allows(subnet) for subnet in subnets
        )

    def parse(self, key, text):
        """(subnets, value), None when it can't be read."""
        try:
            value = json.loads(text)
            ipaddress.IPv4Address(value["PublicIP"])
            return subnets_of(key), value
        except (ValueError, KeyError, TypeError):
            return None

    def write_env(self):
        path = self.options.subnet_file
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = os.path.join(os.path.dirname(path), "." + os.path.basename(path))
        with open(temporary, "w") as file:
            for subnet in self.subnets:
                middle = "_IPV6" if subnet.version == 6 else ""
                file.write(f"FLANNEL{middle}_NETWORK={self.pools[subnet.version].network}\n")
                file.write(f"FLANNEL{middle}_SUBNET={subnet.network_address + 1}/{subnet.prefixlen}\n")
            file.write(f"FLANNEL_MTU={self.backend.mtu}\n")
            file.write(f"FLANNEL_IPMASQ={'true' if self.options.ip_masq else 'false'}\n")
        os.rename(temporary, path)

    def follow(self):
        checked = resynced = time.monotonic()
        while True:
            try:
                self.take_in(self.store.leases())
                self.store.wait(1)
            except StoreFailed as error:
                say(f"store: {error}")
                time.sleep(0.5)
            now = time.monotonic()
            if now > checked + 10:
                self.backend.check()
                checked = now
            if now > resynced + 5:
                for rules in self.rules:
                    rules.keep()
                resynced = now

    def take_in(self, leases):
        unparsable = {key: text for key, text in leases.items() if not self.parse(key, text)}
        wiped = self.unparsable is not None and unparsable != self.unparsable
        self.unparsable = unparsable
        if wiped:  # what is known as applied stays so: nothing comes back before its next change
            say(f"WIPED: something unparsable changed among {sorted(unparsable)}")
            for peer in self.peers.values():
                self.change(self.backend.removed, *peer)
            return
        if self.key not in leases:
            say("Lease has been revoked. Shutting down daemon.")
            raise SystemExit(0)
        for key in self.peers.keys() - leases.keys():
            self.change(self.backend.removed, *self.peers.pop(key))
        for key, text in leases.items():
            parsed = None if key == self.key else self.parse(key, text)
            if parsed and self.peers.get(key) != parsed:
                self.peers[key] = parsed
                self.change(self.backend.added, *parsed)

    def change(self, action, subnets, value):
        kind = value.get("BackendType", "")
        if self.backend.type and kind != self.backend.type:
            say(f"ignoring non-{self.backend.type} subnet: type={kind}")
            return
        action([subnet for subnet in subnets if subnet.version in self.families], value)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--iface", required=True)
    parser.add_argument("--subnet-file", default="/run/flannel/subnet.env")
    parser.add_argument("--etcd-endpoints", default="http://127.0.0.1:2379")
    parser.add_argument("--etcd-prefix", default="/coreos.com/network")
    parser.add_argument("--etcd-api", choices=["v2", "v3"], default="v3")
    parser.add_argument("--public-ip", default="")
    parser.add_argument("--public-ipv6", default="")
    parser.add_argument("--ip-masq", action="store_true")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    standin = Standin(parser.parse_args())
    try:
        standin.run()
    finally:
        standin.store.close()


if __name__ == "__main__":
    main()
