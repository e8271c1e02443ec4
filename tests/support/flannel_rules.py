"""The iptables rules that flannel keeps with --ip-masq, and its forward rules. For the stand-in.

Today's are in chains of their own (compatibility reference, section 7.1), those of 0.16.2 to 0.19 stand in the kernel's
chains (7.2). Installed by iptables-restore and looked for every five seconds, as 7.3 has it; nothing removes them (7.6).
"""

import shlex
import shutil
import subprocess

MARK = "-m mark --mark 0x4000/0x4000"
MASQ = '-m comment --comment "flanneld masq"'
FORWARD = '-m comment --comment "flanneld forward"'
MULTICAST = {4: "224.0.0.0/4", 6: "ff00::/8"}


def chains(network, subnet):
    """Today's rules by table: (chain, rule), in order."""
    c, s, m = network, subnet, MULTICAST[network.version]
    return {
        "nat": [
            ("POSTROUTING", f"{MASQ} -j FLANNEL-POSTRTG"),
            ("FLANNEL-POSTRTG", f"{MARK} {MASQ} -j RETURN"),
            ("FLANNEL-POSTRTG", f"-s {s} -d {c} {MASQ} -j RETURN"),
            ("FLANNEL-POSTRTG", f"-s {c} -d {s} {MASQ} -j RETURN"),
            ("FLANNEL-POSTRTG", f"! -s {c} -d {s} {MASQ} -j RETURN"),
            ("FLANNEL-POSTRTG", f"-s {c} ! -d {m} {MASQ} -j MASQUERADE --random-fully"),
            ("FLANNEL-POSTRTG", f"! -s {c} -d {c} {MASQ} -j MASQUERADE --random-fully"),
        ],
        "filter": [
            ("FORWARD", f"{FORWARD} -j FLANNEL-FWD"),
            ("FLANNEL-FWD", f"-s {c} {FORWARD} -j ACCEPT"),
            ("FLANNEL-FWD", f"-d {c} {FORWARD} -j ACCEPT"),
        ],
    }


def flat(network, subnet):
    """Those of 0.16.2 to 0.19."""
    c, s, m = network, subnet, MULTICAST[network.version]
    return {
        "nat": [
            ("POSTROUTING", f"-s {c} -d {c} {MASQ} -j RETURN"),
            ("POSTROUTING", f"-s {c} ! -d {m} {MASQ} -j MASQUERADE --random-fully"),
            ("POSTROUTING", f"! -s {c} -d {s} {MASQ} -j RETURN"),
            ("POSTROUTING", f"! -s {c} -d {c} {MASQ} -j MASQUERADE --random-fully"),
        ],
        "filter": [("FORWARD", f"-s {c} {FORWARD} -j ACCEPT"), ("FORWARD", f"-d {c} {FORWARD} -j ACCEPT")],
    }


class Rules:
    """The rules of one network and one family. `layout`: chains or flat."""

    def __init__(self, network, subnet, layout, masquerade):
        self._modern = layout is chains
        self._program = "iptables" if network.version == 4 else "ip6tables"
        self._tables = {
            table: rules for table, rules in layout(network, subnet).items() if masquerade or table == "filter"
        }

    def install(self):
        if not shutil.which(self._program):  # flannel does no more than to log it
            print(f"{self._program} is not installed", flush=True)
            self._tables = {}
        if self._modern:  # since 0.25 the other flavour's tables go at the start
            for family, name in (("ip", "flannel-ipv4"), ("ip6", "flannel-ipv6")):
                subprocess.run(["nft", "delete", "table", family, name], capture_output=True, check=False)
        for table, rules in self._tables.items():
            for chain in dict.fromkeys(chain for chain, _ in rules if chain.startswith("FLANNEL")):
                if not self._iptables(table, "-N", chain):
                    self._iptables(table, "-F", chain)
            self._restore(table)

    def keep(self):
        for table, rules in self._tables.items():
            if not all(self._there(table, *rule) for rule in rules):
                self._restore(table)

    def _restore(self, table):
        lines = [f"*{table}"]
        for chain, rule in self._tables[table]:
            lines += [f"-D {chain} {rule}"] if self._there(table, chain, rule) else []
            lines.append(f"-A {chain} {rule}")
        text = "\n".join([*lines, "COMMIT", ""])
        subprocess.run([f"{self._program}-restore", "--noflush", "--wait"], input=text, text=True, check=True)

    def _there(self, table, chain, rule):
        return self._iptables(table, "-C", chain, *shlex.split(rule))

    def _iptables(self, table, *words):
        argv = [self._program, "-w", "-t", table, *words]
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0
