"""docs/walkthroughs/cni.md: a netconf of a name and a type, a network config with its key in lower case."""

import json
import re

from support.cni import require_plugins
from support.keys import wait_until


def test_cni(make_hosts):
    require_plugins()
    hosts = make_hosts(2)
    printed = hosts.follow("cni.md", until="## 6")
    found = {name: re.findall(r"inet (10\.1\.\d+\.2)/24", text) for name, text in printed.items()}
    assert all(found.values()), printed
    for name, booted in hosts.items():
        env = hosts.env(name)
        assert (env["FLANNEL_NETWORK"], env["FLANNEL_MTU"]) == ("10.1.0.0/16", "1472")
        assert f"10.1.0.0/16 via {env['FLANNEL_SUBNET'].partition('/')[0]} dev eth0" in printed[name]
        result, _ = json.JSONDecoder().raw_decode(printed[name], printed[name].index("{\n"))
        assert result["ip4"]["ip"] == f"{found[name][0]}/24"  # of CNI 0.1.0, as the netconf names no version
        assert '"mtu":1472' in booted.sh("cat /var/lib/cni/flannel/c1")
    for here, there in (("h1", "h2"), ("h2", "h1")):
        ping = f"ip netns exec c1 ping -c 1 -W 2 {found[there][0]}"
        wait_until(lambda here=here, ping=ping: " 0% packet loss" in hosts[here].run(*ping.split()).stdout)
    hosts.follow("cni.md", start="## 6")
    for booted in hosts.values():
        left = booted.sh("find /var/lib/cni/flannel /var/lib/cni/networks/containernet -type f -name '[c1]*'")
        assert left == ""
