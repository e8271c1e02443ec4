"""docs/walkthroughs/three-hosts.md: three etcd members, `etcdctl mk`, `mk-docker-opts.sh -i`, docker0, Docker restarted."""

import ipaddress

from support.keys import wait_until


def test_three_hosts(make_hosts):
    hosts = make_hosts(3)
    printed = hosts.follow("three-hosts.md")
    assert "cluster is healthy" in printed["h1"]
    subnets = set()
    for name, booted in hosts.items():
        env = hosts.env(name)
        assert env["FLANNEL_NETWORK"] == "10.5.0.0/16"
        subnet = ipaddress.ip_interface(env["FLANNEL_SUBNET"])
        assert ipaddress.ip_address("10.5.10.0") <= subnet.network.network_address <= ipaddress.ip_address("10.5.99.0")
        subnets.add(subnet.network)
        for option in (f'BIP="--bip={subnet}', 'IPMASQ="--ip-masq=false', 'MTU="--mtu=1450'):
            assert f'DOCKER_OPT_{option}"\n' in printed[name]
        assert [subnet] == [
            ipaddress.ip_interface(line.split()[3])
            for line in booted.sh("ip -4 -oneline address show dev docker0").splitlines()
        ]
        assert ipaddress.ip_address(hosts.container(name, "c1")) in subnet.network
    assert len(subnets) == 3
    for name, booted in hosts.items():
        wait_until(lambda booted=booted: booted.sh("ip route show dev flannel.1").count("10.5.") >= 2)
        for other in hosts:
            if other != name:
                booted.sh(f"docker exec c1 ping -c 1 -W 5 {hosts.container(other, 'c1')}")
    refused = hosts["h1"].run("sh", "-c", "ETCDCTL_API=2 etcdctl mk /coreos.com/network/config '{}'")
    assert refused.returncode != 0
