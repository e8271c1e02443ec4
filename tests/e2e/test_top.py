"""`wincey top` beside traffic of a known amount."""

import json
import os
import subprocess
import sys

from support.interop import sh
from support.keys import wait_until

WINCEY = os.path.join(os.path.dirname(sys.executable), "wincey")


def test_traffic_is_told_by_peer_and_nothing_is_left_behind(make_lab):
    lab = make_lab("vxlan", hosts=3, families=(4, 6), options=("--probe", "--probe-interval=1"))
    host, source, target = lab.hosts[0], lab.containers[0], lab.containers[1]
    assert lab.ping(patience=10).unreachable == []
    rules = sh(host, "nft list ruleset")
    for family in (4, 6):
        ping = source.popen(
            ["ping", "-q", "-i", "0.01", "-s", "972", "-c", "6000", target.address(family)], stdout=subprocess.DEVNULL
        )
        try:
            looked = host.exec([WINCEY, "top", "-n", "1", "--interval", "2", "--json"])
        finally:
            ping.kill()
            ping.wait()
        assert looked.returncode == 0, looked.stderr
        peers = {peer["public"][0]: peer["rates"] for peer in json.loads(looked.stdout)["peers"]}
        busy, idle = peers["10.99.0.2"], peers["10.99.0.3"]
        size = 1000 if family == 4 else 1020
        assert busy["packets_to"] > 10
        assert 0.7 * size < busy["bytes_to"] / busy["packets_to"] <= size  # --probe sends small ones
        assert busy["packets_from"] > 10
        assert idle["packets_to"] < busy["packets_to"] / 3  # --probe asks there too
    assert sh(host, "nft list ruleset") == rules

    looking = host.popen([WINCEY, "top", "--interval", "0.5"], stdout=subprocess.PIPE, text=True)
    try:
        assert "out bit/s" in looking.stdout.readline()
        assert "wincey-top" in sh(host, "nft list tables")
    finally:
        looking.kill()  # as hard as can be
        looking.wait()
        looking.stdout.close()
    wait_until(lambda: "wincey-top" not in sh(host, "nft list tables"))


def test_without_peers_or_rights_it_says_so(make_lab):
    lab = make_lab("vxlan", hosts=1)
    done = lab.hosts[0].exec([WINCEY, "top"])
    assert (done.returncode, done.stderr) == (2, "wincey: no other host has a lease: there is nothing to look at\n")


def test_metrics_tell_the_busiest_peers(make_lab):
    lab = make_lab("vxlan", hosts=3, options=("--metrics-peers=1", "--metrics-listen=127.0.0.1:9470"))
    host, source, target = lab.hosts[0], lab.containers[0], lab.containers[1]
    assert lab.ping(patience=10).unreachable == []
    subnet = str(lab.hosts[1].gateways[0].network)

    def series():
        text = sh(host, "curl -s http://127.0.0.1:9470/metrics")
        return [line for line in text.splitlines() if line.startswith("wincey_peer_transmit_bytes_total")]

    wait_until(lambda: "wincey-top" in sh(host, "nft list tables"))
    sent = source.exec(["ping", "-q", "-i", "0.01", "-s", "972", "-c", "100", target.address(4)])
    assert " 0% packet loss" in sent.stdout
    wait_until(
        lambda: (
            [line.rpartition(" ")[0] for line in series()]
            == [f'wincey_peer_transmit_bytes_total{{network="",peer="{subnet}"}}']
        )
    )
    wait_until(lambda: int(series()[0].rpartition(" ")[2]) >= 100_000)
    lab.hosts[2].stop_daemon()
    host.kill_daemon()
    wait_until(lambda: "wincey-top" not in sh(host, "nft list tables"))
