"""The metrics: what Prometheus' own tool thinks of them, and of the rules and the dashboard that use them."""

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from wincey.agent.view import Views, WaitingView
from wincey.http.client import HttpClient
from wincey.model.report import (
    BadKeyReport,
    FailureReport,
    LeaseReport,
    NetworkReport,
    PeerTrafficReport,
    ProbesReport,
    ReconcileReport,
    RequestsReport,
    StatusReport,
    StoreReport,
    TrafficReport,
)
from wincey.observe.health import Health, serve_health
from wincey.observe.metrics import METRICS, render

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docs" / "prometheus"

REQUESTS = RequestsReport(
    operation="snapshot", count=4, failures=1, seconds=0.5, bounds=[0.005, 2.5], cumulated=[1, 3, 4]
)
TRAFFIC = TrafficReport(
    device="flannel.1",
    receive_bytes=1,
    receive_packets=2,
    receive_errors=3,
    receive_dropped=4,
    transmit_bytes=5,
    transmit_packets=6,
    transmit_errors=7,
    transmit_dropped=8,
)
NETWORK = NetworkReport(
    name='a "quoted"\\name',
    trouble=None,
    config_key="/x/config",
    networks=["10.5.0.0/16"],
    backend="vxlan",
    mtu=1450,
    interface=None,
    devices=["flannel.1"],
    traffic=[TRAFFIC],
    lease=LeaseReport(subnets=["10.5.1.0/24"], reservation=False, left=100.0),
    store=StoreReport(name="etcd", trouble="gone", requests=[REQUESTS]),
    subnet_file="/x",
    peers=7,
    peer_traffic=[PeerTrafficReport(subnet="10.5.7.0/24", packets_to=1, bytes_to=2, packets_from=3, bytes_from=4)],
    probe=ProbesReport(asked=6, well=5, loss=0.25, rtt=0.0015),
    bad_keys=[BadKeyReport(key="k", reason="r")],
    reconcile=ReconcileReport(
        objects=10,
        ago=1.0,
        took=0.1,
        audits=5,
        cpu=0.5,
        changes=12,
        repaired=3,
        failures=[FailureReport(what="w", reason="r")],
    ),
)


def status(*networks):
    return StatusReport(version="1.2.3", host="h1", pid=1, up=5.0, networks=list(networks))


def promtool(*arguments, text=None):
    if not shutil.which("promtool"):
        pytest.skip("needs promtool (package prometheus)")
    return subprocess.run(["promtool", *arguments], check=False, input=text, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("networks", [[NETWORK], [], [NETWORK, WaitingView("b", "/x", "etcd").report()]])
def test_prometheus_finds_no_fault_with_them(networks):
    done = promtool("check", "metrics", text=render(status(*networks)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_they_say_what_the_status_says():
    text = render(status(NETWORK))
    name = r'network="a \"quoted\"\\name"'
    for line in (
        'wincey_build_info{version="1.2.3"} 1',
        f"wincey_network_ready{{{name}}} 1",
        f"wincey_store_up{{{name}}} 0",
        f"wincey_peers{{{name}}} 7",
        f"wincey_probe_peers_well{{{name}}} 5",
        f"wincey_probe_rtt_seconds{{{name}}} 0.0015",
        f'wincey_peer_receive_bytes_total{{{name},peer="10.5.7.0/24"}} 4',
        f"wincey_objects_failed{{{name}}} 1",
        f"wincey_drift_repaired_total{{{name}}} 3",
        f'wincey_store_request_duration_seconds_bucket{{{name},operation="snapshot",le="2.5"}} 3',
        f'wincey_store_request_duration_seconds_bucket{{{name},operation="snapshot",le="+Inf"}} 4',
        f'wincey_device_transmit_dropped_total{{{name},device="flannel.1"}} 8',
    ):
        assert line in text.splitlines()


def test_the_alert_rules_are_right_and_use_metrics_that_there_are():
    rules = PROMETHEUS / "alerts.yml"
    done = promtool("check", "rules", str(rules))
    assert done.returncode == 0, done.stderr
    assert used(rules.read_text()) <= names()


def test_the_dashboard_uses_metrics_that_there_are():
    dashboard = json.loads((PROMETHEUS / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(expressions) >= 8
    assert all(used(expression) <= names() for expression in expressions)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_the_page_names_each_metric():
    assert names() == used((ROOT / "docs" / "metrics.md").read_text())


def names():
    return {metric.name for metric in METRICS}


def used(text):
    """The metrics that a text names; a histogram's by its family."""
    return {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\b(?:wincey|process)_[a-z_]+[a-z]\b", text)
    }


async def test_a_daemon_serves_them():
    views = Views("h1")
    views.put("", WaitingView("", "/x", "etcd"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = await serve_health(Health(), "127.0.0.1", port, status=views.status)
    client = HttpClient(f"http://127.0.0.1:{port}")
    try:
        answer = await client.request("GET", "/metrics")
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert b'wincey_network_ready{network=""} 0' in answer.body
        assert (await client.request("GET", "/healthz")).status == 200
    finally:
        await client.close()
        await server.close()
