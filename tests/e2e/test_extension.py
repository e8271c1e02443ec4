"""The extension backend with the samples that we ship, as hosts with real daemons use them."""

import json
import re
import shlex
from pathlib import Path

import pytest

from support.keys import delete, lease_key, wait_until
from support.mtu import mtu_is_right
from support.traffic import ContinuousPing, transfer
from wincey.lab.node import own_flanneld

SAMPLES = Path(__file__).parents[2] / "examples" / "extension"
FLAGS = "--iface={iface} --subnet-file={subnet_file} --store={store} --etcd-prefix={etcd_prefix}"

# WireGuard in user space keeps its socket under one path whatever the network namespace. The hosts of a lab share files.
APART = """#!/bin/sh
sockets=$1; shift
mkdir -p "$sockets" /var/run/wireguard
exec unshare -m sh -c 'mount --bind "$0" /var/run/wireguard && exec "$@"' "$sockets" {flanneld} "$@"
"""


def daemons(sample, tmp_path):
    if sample != "wireguard":
        return {}
    script = tmp_path / "apart.sh"
    script.write_text(APART.format(flanneld=shlex.join(own_flanneld())))
    script.chmod(0o755)
    return {"*": f"{script} {{dir}}/sockets {FLAGS}"}


def show(host, sample):
    """All that a peer leaves on a host."""
    if sample == "wireguard":
        # Its control socket is known to a namespace of files that ends with the daemon: what a daemon runs sees it.
        pid = host.daemon.pid
        return host.exec(["nsenter", f"--mount=/proc/{pid}/ns/mnt", "wg", "show", "flannel-wg"], check=True).stdout
    commands = [["ip", "route"], ["ip", "neigh", "show", "nud", "permanent"], ["bridge", "fdb"]]
    return "\n".join(host.exec(argv, check=True).stdout for argv in commands)


@pytest.mark.parametrize("sample", ["host-gw", "vxlan", "wireguard"])
def test_sample(make_lab, tmp_path, sample):
    config = (SAMPLES / f"{sample}.json").read_text()
    lab = make_lab(config=config, hosts=3, daemons=daemons(sample, tmp_path))
    first, second, third = lab.hosts
    a, b, c = lab.containers
    assert lab.ping(patience=5).unreachable == []
    sent, received = transfer(a, b, megabytes=40 if sample == "wireguard" else 200)
    assert sent == received

    ping = ContinuousPing(a, b, tmp_path)
    try:
        for host in (first, second):
            host.kill_daemon()
            host.start_daemon()
        total, lost = ping.sent_and_lost()
    finally:
        ping.kill()
    assert total > 100
    assert lost == 0, f"{lost} of {total} lost"

    mtu_is_right(a, c, 4)

    gone = [str(third.gateways[0].network), third.underlay(4)]
    assert all(text in show(first, sample) for text in gone)
    third.stop_daemon()
    delete(lab, lease_key(third))
    wait_until(lambda: not any(text in show(first, sample) for text in gone))
    assert str(second.gateways[0].network) in show(first, sample)
    assert lab.ping(patience=0).unreachable != []

    first.stop_daemon()
    flanneld = ["ip", "netns", "exec", first.netns, *first.argv(), "--cleanup"]
    second.exec(flanneld, check=True)
    routes = first.exec(["ip", "route"]).stdout
    assert str(second.gateways[0].network) not in routes
    assert "flannel" not in first.exec(["ip", "link"]).stdout
    assert not (first.directory / "wincey" / "subnet").exists()


# What flannel's own samples are made of: exports, backquotes, redirections, lists of commands. flannel since 0.28.2 splits
# these at blanks. The route of an earlier life of the host is in the way, as after a change from flannel.
SHELL = {
    "Type": "extension",
    "PreStartupCommand": "export NAME=tunnel; ip link del $NAME 2>/dev/null; ip link add $NAME type bridge && echo made $NAME",
    "PostStartupCommand": "export BASE=`echo $SUBNET | cut -d'/' -f 1`; ip addr add $BASE/32 dev tunnel && ip link set tunnel up",
    "SubnetAddCommand": "read WORDS; ip route add $SUBNET via $PUBLIC_IP && test \"$WORDS\" = 'made tunnel'",
    "SubnetRemoveCommand": "ip route del $SUBNET via $PUBLIC_IP",
    "ShutdownCommand": "export NAME=tunnel; ip link del $NAME",
}


def test_commands_for_a_shell(make_lab):
    config = json.dumps({"Network": "10.50.0.0/16", "Backend": SHELL})
    lab = make_lab(config=config, hosts=2)
    assert lab.ping(patience=5).unreachable == []
    first, second = lab.hosts
    for _ in range(2):
        first.kill_daemon()
        first.start_daemon()
        # The routes are there already, which `ip route add` refuses: the retry removes before it adds.
        assert lab.ping(patience=10).unreachable == []
    text = "\n".join(first.log())
    assert re.search(r"PreStartupCommand ended well after \S+ s, and said: made tunnel", text)
    assert re.search(
        rf"extension peer {second.gateways[0].network}: SubnetAddCommand ended with exit code 2, and said: .*File exists",
        text,
    )
    network = str(second.gateways[0].network)

    # Away at the time: what went meanwhile is removed at the next start.
    first.kill_daemon()
    second.stop_daemon()
    delete(lab, lease_key(second))
    assert network in first.exec(["ip", "route"]).stdout
    first.start_daemon()
    wait_until(lambda: network not in first.exec(["ip", "route"]).stdout)


def test_a_failing_start_command_ends_the_start(make_lab):
    backend = {"Type": "extension", "PreStartupCommand": "echo the card is missing >&2; exit 3"}
    lab = make_lab(config=json.dumps({"Network": "10.50.0.0/16", "Backend": backend}), hosts=1, start=[])
    [host] = lab.hosts
    host.start_daemon(wait=False)
    wait_until(lambda: not host.running)
    assert host.log()[-1].endswith(
        "the extension backend can't start: PreStartupCommand ended with exit code 3, and said: the card is missing"
    )
