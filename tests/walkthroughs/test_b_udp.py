"""docs/walkthroughs/udp.md: the config by curl, udp, `--iface` and `--ip-masq=true`, Docker by `--bip` and `--mtu`."""

from support.keys import wait_until


def test_udp(make_hosts):
    hosts = make_hosts(2)
    printed = hosts.follow("udp.md")
    assert '"action":"set"' in printed["h1"]
    for name, booted in hosts.items():
        env = hosts.env(name)
        assert (env["FLANNEL_MTU"], env["FLANNEL_IPMASQ"]) == ("1472", "true")
        assert f"inet {env['FLANNEL_SUBNET'].rpartition('.')[0]}.0/" in printed[name]
        assert f"inet {env['FLANNEL_SUBNET']} " in booted.sh("ip -4 address show dev docker0")
        assert " mtu 1472 " in booted.sh("docker run --rm busybox ip link show dev eth0")
    web = f"http://{hosts.container('h1', 'web')}/"
    wait_until(lambda: hosts["h2"].run("curl", "-sS", "-m", "5", web).stdout == "Welcome\n")
    assert hosts["h2"].sh(f"docker run --rm busybox wget -q -O - {web}") == "Welcome\n"
    assert hosts["h1"].sh(f"curl -sS -m 5 {web}") == "Welcome\n"
