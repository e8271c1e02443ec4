"""The least that each backend's daemon needs: it is run as root with just these capabilities and none to gain, and containers
reach each other. docs/security.md has the table."""

from __future__ import annotations

import os
import re
import secrets
import shlex
from pathlib import Path

import pytest

from wincey.lab.errors import NotReady
from wincey.lab.lab import Lab
from wincey.lab.node import own_flanneld
from wincey.lab.plan import LabSpec, network_config

pytestmark = pytest.mark.root

LEAST = {
    "host-gw": {"NET_ADMIN"},
    "vxlan": {"NET_ADMIN"},
    "udp": {"NET_ADMIN", "NET_RAW"},
    "bgp": {"NET_ADMIN", "NET_BIND_SERVICE"},
}


@pytest.fixture
def lab_with():
    """Make a lab whose daemons have some capabilities."""
    if os.geteuid():
        pytest.skip("needs root: network namespaces")
    labs = []

    def make(backend, capabilities):
        bounding = ",".join(["-all", *(f"+{name.lower()}" for name in sorted(capabilities))])
        daemon = f"setpriv --bounding-set={bounding} --inh-caps=-all --no-new-privs -- {shlex.join(own_flanneld())}"
        spec = LabSpec(
            name=f"cap-{secrets.token_hex(3)}", config=network_config(backend), hosts=2, daemons={"*": daemon}
        )
        labs.append(Lab(spec))
        return labs[-1]

    yield make
    for lab in labs:
        lab.down()


@pytest.mark.parametrize("backend", LEAST)
def test_it_works_with_just_these(lab_with, backend):
    lab = lab_with(backend, LEAST[backend])
    lab.up()
    assert lab.ping(patience=40).unreachable == []
    for host in lab.hosts:
        status = Path(f"/proc/{host.daemon.pid}/status").read_text()
        bits = {int(each, 16) for each in re.findall(r"Cap(?:Eff|Prm|Bnd):\s+(\w+)", status)}
        assert bits == {sum(1 << NUMBERS[name] for name in LEAST[backend])}
        assert re.search(r"NoNewPrivs:\s+1", status)


NUMBERS = {"NET_BIND_SERVICE": 10, "NET_ADMIN": 12, "NET_RAW": 13}  # linux/capability.h


@pytest.mark.parametrize(
    ("backend", "lacks", "words"),
    [
        ("host-gw", "NET_ADMIN", "needs root or CAP_NET_ADMIN"),
        ("udp", "NET_RAW", "Operation not permitted"),
    ],
)
def test_with_one_less_it_says_why(lab_with, backend, lacks, words):
    lab = lab_with(backend, LEAST[backend] - {lacks})
    with pytest.raises(NotReady, match=re.escape(words)):
        lab.up()
