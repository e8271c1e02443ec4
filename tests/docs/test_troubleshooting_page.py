"""docs/troubleshooting.md: what it shows is what the commands say of these faults, in a lab."""

import os
import re
import secrets
import sys
from pathlib import Path

import pytest

from support.interop import sh
from support.keys import wait_until
from wincey.lab.lab import Lab
from wincey.lab.plan import LabSpec, network_config

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
WINCEY = os.path.join(os.path.dirname(sys.executable), "wincey")
VARIABLE = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}|\d+(?:\.\d+)*(?:/\d+)?%?")
"""Addresses, numbers and what else differs from lab to lab."""


def general(text):
    """A line without what differs, and with single spaces."""
    return " ".join(VARIABLE.sub("#", text).split())


SHOWN = general(PAGE)


def said(host, *words):
    done = host.exec([WINCEY, *words])
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def shown(output, part):
    """Whether what the line of the output with this part in it says (its last column) is on the page."""
    line = next((each for each in output.splitlines() if part in each), "")
    words = general(re.split(r"\s{2,}", line.strip())[-1])
    return len(words) > 5 and words in SHOWN


@pytest.fixture
def lab():
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    spec = LabSpec(
        name=f"docs-{secrets.token_hex(3)}",
        config=network_config("vxlan", (4,)).replace(
            '"Network"', '"SubnetMin": "10.5.1.0", "SubnetMax": "10.5.2.0", "Network"'
        ),
    )
    made = Lab(spec)
    try:
        made.up(hosts=["h1", "h2"])
        yield made
    finally:
        made.down()


@pytest.mark.root
def test_faults_look_as_the_page_shows_them(lab):
    host, peer, late = lab.hosts
    address = peer.containers[0].address(4)
    wait_until(lambda: " ok" in said(host, "peers"))

    sh(
        peer,
        "nft 'add table ip f; add chain ip f i { type filter hook input priority -300; }; add rule ip f i udp dport 8472 drop'",
    )
    assert shown(said(host, "doctor"), "encapsulation: ")
    sh(peer, "nft delete table ip f")

    network = peer.gateways[0].network
    sh(host, f"ip route add {network} dev lo table 77; ip rule add to {network} table 77 pref 100")
    explained = said(host, "explain", address)
    for part in ("  lease", "  route", "  neighbor", "  fdb", "NO  kernel"):
        assert shown(explained, part), part
    sh(host, "ip rule del pref 100")
    assert shown(said(host, "explain", "10.5.250.2"), "NO  lease")

    sh(
        host,
        "sysctl -w net.ipv4.ip_forward=0; ip link add x0 type bridge; ip addr add 10.5.0.1/16 dev x0; ip link set x0 up",
    )
    found = said(host, "doctor")
    assert shown(found, "forwarding: ")
    assert shown(found, "overlap: ")

    late.start_daemon(wait=False)
    wait_until(lambda: not late.running)
    fatal = " ".join(line for line in late.log() if "out of subnets" in line)
    assert general(fatal.partition("] ")[2]) in SHOWN
    listed = said(host, "leases", "list", "--store", lab.store.url)
    row = next(line for line in listed.splitlines() if "10.5.1.0/24" in line)
    assert general(row) in SHOWN


def test_each_section_is_about_a_symptom_of_its_own():
    titles = re.findall(r"^### (.*)", PAGE, re.MULTILINE)
    assert len(titles) == len(set(titles)) >= 20


def test_messages_that_it_quotes_are_in_the_programs():
    """Words of each message; the lab above does not make all of them."""
    source = " ".join(path.read_text() for path in (Path(__file__).parents[2] / "src").rglob("*.py"))
    for words in (
        "FORWARD drops what no rule accepts, so ",
        "both have the public address",
        "restart the container runtime so that it follows",
        "out of subnets: all",
        "has a prefix that is too long",
        "there is no network config at",
        " could serve us",
        "which is its quota",
        "its host answers, but not through the network: is a firewall between?",
        "bytes don't get there, and containers may send",
        "its host is down, or the way to it is",
        "host-gw needs all hosts on one layer-2 network",
        "no interface to join the network by",
        "this host's packet filter drops",
        "black hole: packets larger than",
        "peers send to an address that they may not reach",
        "two machines answer to",
        "its containers are not in the network",
    ):
        assert words in PAGE
        assert words in re.sub(r'"\s+f?"', "", source), words
