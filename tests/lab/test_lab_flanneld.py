"""`wincey lab run` with our own flanneld, alone and beside the stand-in for flannel."""

import pytest

pytestmark = [pytest.mark.root, pytest.mark.etcd]


@pytest.mark.parametrize(
    "words",
    [
        ["--backend=vxlan"],
        ["--backend=host-gw", "--store=etcd3", "--dual"],
        ["--backend=udp", "--store=etcd2"],
        ["--backend=vxlan", "--store=etcd3", "--ipv6", "--underlay=segmenting"],
    ],
    ids=" ".join,
)
def test_our_daemon_on_every_host(sandbox, words):
    document = sandbox.json("run", "--name", sandbox.name(), "--seconds=1", *words)
    assert document["failures"] == {}
    assert document["unreachable"] == []
    assert document["pairs"] == document["reachable"] == (12 if "--dual" in words else 6)
    assert sandbox.leftovers() == []


@pytest.mark.parametrize("backend", ["vxlan", "host-gw"])
def test_our_daemon_beside_the_stand_in(sandbox, standin, backend):
    words = ["--name", sandbox.name(), "--store=etcd3", f"--backend={backend}", f"--daemon=h2={standin}"]
    document = sandbox.json("run", "--seconds=1", *words)
    assert document["failures"] == {}
    assert document["unreachable"] == []
    assert sandbox.leftovers() == []
