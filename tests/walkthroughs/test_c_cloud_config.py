"""docs/walkthroughs/cloud-config.md: vxlan, with the example of a cloud-config applied to two hosts under systemd."""

import re
import shlex

import yaml

from support.keys import wait_until
from support.nspawn import TREE

EXAMPLE = TREE / "examples" / "cloud-config" / "wincey.yaml"

# What needs a package index: the hosts have the result of it.
INSTALLS = [["python3", "-m", "venv", "/opt/wincey"], ["/opt/wincey/bin/pip", "install", "wincey"]]


def apply(booted, text):
    """What cloud-init does with write_files and runcmd."""
    config = yaml.safe_load(text)
    for file in config["write_files"]:
        booted.sh(f"mkdir -p $(dirname {file['path']}); printf %s {shlex.quote(file['content'])} >{file['path']}")
    installs = [command for command in config["runcmd"] if isinstance(command, list)]
    assert installs == INSTALLS
    for command in config["runcmd"]:
        if command not in INSTALLS:
            booted.sh(command)


def test_cloud_config(make_hosts):
    hosts = make_hosts(2)
    hosts.follow("cloud-config.md", until="## 2.")
    for booted in hosts.values():
        apply(booted, EXAMPLE.read_text().replace("10.0.0.1", "10.99.0.1"))
    printed = hosts.follow("cloud-config.md", start="## 2.")
    envs = {name: hosts.env(name) for name in hosts}
    for (name, booted), other in zip(hosts.items(), ("h2", "h1"), strict=True):
        env, theirs = envs[name], envs[other]["FLANNEL_SUBNET"]
        assert f'DOCKER_OPT_BIP="--bip={env["FLANNEL_SUBNET"]}"\nDOCKER_OPT_IPMASQ="--ip-masq=false"\n' in printed[name]
        assert re.search(r"flannel\.1: .* mtu 1450 .*\n.*\n +vxlan id 1 local 10\.99\.0\.\d dev eth0", printed[name])
        network = theirs.rpartition(".")[0] + ".0"
        own = env["FLANNEL_SUBNET"].rpartition(".")[0]

        def routed(booted=booted, network=network):
            return f"{network}/24 via {network} dev flannel.1 proto 87 onlink" in booted.sh("ip route")

        wait_until(routed)
        assert f"{own}.0/24 dev docker0 proto kernel scope link src {own}.1 \n" in booted.sh("ip route")
        booted.sh(f"docker exec c1 ping -c 1 -W 5 {hosts.container(other, 'c1')}")
