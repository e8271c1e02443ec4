"""`wincey bench data`: what it compares and says, and short runs of it in real namespaces."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from support.flannel_rules import chains
from wincey.lab.bench.load import METRICS
from wincey.lab.bench.page import page, plot
from wincey.lab.bench.results import Results, Underlay, ratio, verdicts
from wincey.lab.bench.rules import rules_text
from wincey.lab.bench.run import Plan
from wincey.lab.bench.variants import VARIANTS, chosen, parse_peers
from wincey.model.errors import UsageError

BENCH = [sys.executable, "-m", "wincey.cli.wincey", "bench", "data"]


def rounds(**figures: list[float]) -> dict[str, list[float]]:
    return {metric: figures.get(metric, [1.0, 1.0, 1.0]) for metric in METRICS}


def results(**variants: dict[str, list[float]]) -> Results:
    named = {name.replace("_", "-"): figures for name, figures in variants.items()}
    return Results(
        version="1",
        kernel="6.1",
        machine="x86_64",
        cores=2,
        date="today",
        realtime=True,
        rounds=3,
        seconds=1,
        baseline="vxlan-flannel-rules",
        what=dict.fromkeys(named, "something <else>"),
        underlays={"segmenting": Underlay(named, {"ipip": "no such\n device"})},
    )


# ---- what it says


def test_a_ratio_is_that_of_each_round_and_not_of_medians() -> None:
    """The machine was three times as fast in one round, for both."""
    assert str(ratio([10, 33, 12], [10, 30, 10])) == "1.10 (1.00 to 1.20)"


def test_targets_are_met_or_missed() -> None:
    found = {
        (verdict.target.variant, verdict.target.against, verdict.target.metric): verdict.met
        for verdict in verdicts(
            results(
                vxlan_flannel_rules=rounds(udp=[100, 100, 100]),
                vxlan=rounds(udp=[109, 109, 150], tcp1=[2, 2, 2]),
                vxlan_fast=rounds(udp=[200, 200, 200], rr=[1.3, 1.5, 1.5], tcp1=[1.9, 1.9, 2.0], tcp4=[0.9, 0.9, 0.9]),
                udp_offload=rounds(cpu=[2, 2, 2], p50=[3, 3, 3]),
                proxy=rounds(cpu=[8, 9, 8], p50=[2, 3, 3]),
            )
        )
    }
    assert found["vxlan", "vxlan-flannel-rules", "udp"] is False
    assert found["vxlan-fast", "vxlan", "udp"] is True
    assert found["vxlan-fast", "vxlan", "rr"] is True
    assert found["vxlan-fast", "vxlan", "tcp1"] is True  # no worse, as far as can be told
    assert found["vxlan-fast", "vxlan", "tcp4"] is False
    assert found["udp-offload", "proxy", "cpu"] is True  # a quarter, where less is better
    assert found["udp-offload", "proxy", "p50"] is True
    assert ("vxlan-fast", "host-gw", "rr") not in found  # which was not measured


def test_page_and_plot_show_every_variant_and_who_was_left_out() -> None:
    shown = results(vxlan_flannel_rules=rounds(), vxlan=rounds(udp=[2000, 3000, 4000]))
    text = page(shown, "data-path.svg")
    assert "![Medians of every variant, with the lowest and the highest of the rounds](data-path.svg)" in text
    assert "| vxlan | something <else> | 1.00 | 1.00 | 3,000 | 1 | 1 | 1.0 | 1.00 |" in text
    assert "| segmenting | vxlan | vxlan-flannel-rules | udp | 3000.00 (2000.00 to 4000.00) | ≥ 1.1 | met |" in text
    assert "- ipip was left out: no such device" in text
    texts = [element.text for element in ET.fromstring(plot(shown)).iter() if element.tag.endswith("text")]
    assert {"vxlan-flannel-rules", "vxlan", "3,000", METRICS["rr"]} <= set(texts)


def test_an_estimate_grows_with_what_is_asked() -> None:
    one, two = (Plan(VARIANTS[:number], rounds=number).estimate for number in (1, 2))
    assert two > 2 * one


# ---- what it compares


def test_names_are_checked_and_peers_join() -> None:
    with pytest.raises(UsageError, match=r"no variant 'vxlam': there are .*did you mean vxlan"):
        chosen(["vxlam"], [], quick=False)
    peers = parse_peers(["flannel=/opt/flanneld -v=1"])
    picked = chosen(["vxlan", "vxlan-flannel-rules", "vxlan"], [], quick=False)
    assert [variant.name for variant in picked] == ["vxlan", "vxlan-flannel-rules"]
    assert [variant.name for variant in chosen(["vxlan", "flannel-udp"], peers, quick=False)] == [
        "vxlan",
        "flannel-udp",
    ]
    assert len(chosen(["vxlan"], peers, quick=False)) == 4
    everything = chosen([], peers, quick=False)
    assert [variant.name for variant in everything[-3:]] == ["flannel-vxlan", "flannel-host-gw", "flannel-udp"]
    assert {variant.name for variant in chosen([], [], quick=True)} < {variant.name for variant in VARIANTS}


@pytest.mark.parametrize("text", ["flannel", "=x", "Flannel=/x", "a b=/x", "9=/x", "flannel= "])
def test_a_peer_needs_a_name_and_a_command(text: str) -> None:
    with pytest.raises(UsageError, match="--peer"):
        parse_peers([text])


def test_the_rules_to_compare_with_are_flannels() -> None:
    network, subnet = ipaddress.IPv4Network("10.5.0.0/16"), ipaddress.IPv4Network("10.5.1.0/24")
    lines = rules_text(network, subnet).splitlines()
    added = [line.removeprefix("-A ") for line in lines if line.startswith("-A ")]
    expected = chains(network, subnet)
    assert added == [f"{chain} {rule}" for table in ("nat", "filter") for chain, rule in expected[table]]


# ---- runs


@pytest.mark.root
def test_a_short_run_measures_everything_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(*BENCH, "--variants=underlay,vxlan-flannel-rules,vxlan,proxy", "--rounds=1", "--seconds=0.2"),
            *("--underlay=segmenting", "--json=-", f"--write={tmp_path}"),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)["underlays"]["segmenting"]
    assert measured["left_out"] == {}
    assert list(measured["variants"]) == ["underlay", "vxlan-flannel-rules", "vxlan", "proxy"]
    for figures in measured["variants"].values():
        assert {metric: len(rounds) for metric, rounds in figures.items()} == dict.fromkeys(METRICS, 1)
        assert all(rounds[0] > 0 for rounds in figures.values())
    assert json.loads((tmp_path / "data-path.json").read_text())["rounds"] == 1
    assert "| vxlan |" in (tmp_path / "data-path.md").read_text()
    nothing_of(done.stderr)


@pytest.mark.root
def test_an_interrupted_run_leaves_nothing() -> None:
    with subprocess.Popen(
        [*BENCH, "--variants=vxlan-flannel-rules,vxlan", "--rounds=50", "--underlay=offloading"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        said = ""
        assert running.stderr
        for line in running.stderr:
            said += line
            if "round 1 of 50" in line:
                break
        running.send_signal(signal.SIGINT)
        _, rest = running.communicate(timeout=60)
    assert running.returncode == 130, said + rest
    nothing_of(said)


def nothing_of(said: str) -> None:
    """No namespace and no process of a run that told its name."""
    told = re.search(r"names begin with (bench-[0-9a-f]{4})-", said)
    assert told, said
    assert [name for name in os.listdir("/run/netns") if name.startswith(told[1])] == []
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line for line in lines if told[1] in line] == []


def test_a_variant_that_is_not_there_is_a_wrong_command_line() -> None:
    done = subprocess.run([*BENCH, "--variants=nosuch"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("wincey: no variant 'nosuch': there are underlay, ")
