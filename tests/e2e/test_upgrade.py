"""A running lab goes from flannel to Wincey host by host and back, and from an earlier Wincey to this one and back.

All the time a ping a hundred times a second runs between containers. test_migration.py has one host's switch in detail (rules,
device, lease, new connections that are masqueraded); here every host goes, so that each kind of pair is there once: flannel and
flannel, both ways of flannel and Wincey, Wincey and Wincey, old and new.
"""

import re
import shlex
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from support.interop import ours, raw_lease, said, sh, standin
from support.keys import lease_key, wait_until
from support.traffic import none_lost
from wincey import __version__
from wincey.lab.errors import NotReady

pytestmark = [pytest.mark.root, pytest.mark.etcd]

ROOT = Path(__file__).parents[2]

EARLIER = "533c55ffafb00e8dbd7bd4a04bc57ca6923647b6"
"""The first state of the product with which hosts could live: one network, vxlan, host-gw and udp, before CNI and servers."""

BACKENDS = ["vxlan", "host-gw", "udp"]


@pytest.fixture(scope="session")
def earlier(tmp_path_factory):
    """The earlier version's flanneld as a command for `--daemon`. It has a release number of its own, as any release has."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", EARLIER, "src"], capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(
            f"this clone has no commit {EARLIER[:7]} (shallow? git fetch --unshallow): {archive.stderr.decode()}"
        )
    tree = tmp_path_factory.mktemp("earlier")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(tree, filter="data")
    package = tree / "src" / "wincey" / "__init__.py"
    text = package.read_text()
    assert '__version__ = "' in text
    package.write_text(text.replace('__version__ = "', '__version__ = "0.0.0+', 1))
    return shlex.join(["env", f"PYTHONPATH={tree / 'src'}", sys.executable, "-m", "wincey.cli.flanneld"])


def leases(lab):
    """As in the store, but for the engine of udp, which flannel neither writes nor reads (docs/backends/udp.md)."""
    return [raw_lease(lab, lease_key(host))[0].replace(',"BackendData":{"Engine":"bpf"}', "") for host in lab.hosts]


def versions(host):
    """Of each daemon that was started on a host, as it said itself."""
    return re.findall(r"\] wincey ([\d.]+)", said(host))


@pytest.mark.parametrize("backend", BACKENDS)
def test_flannel_is_replaced_host_by_host_and_comes_back(make_lab, measuring, backend):
    """With vxlan and host-gw no packet is lost. With udp flannel's own device goes with flannel: its host pauses, others don't."""
    flannel = standin()
    lab = make_lab(backend, store="etcd3", hosts=3, daemons={"*": flannel}, containers=1)
    assert lab.ping(patience=10).unreachable == []
    before, published = [host.env for host in lab.hosts], leases(lab)
    first, second, third = lab.containers
    pings = [] if backend == "udp" else measuring((first, second), (second, third), (third, first))

    for host in lab.hosts:
        bystanders = [each for each in lab.containers if each.host is not host]
        beside = measuring(bystanders) if backend == "udp" else []
        host.stop_daemon()
        host.start_daemon(ours(lab))
        assert lab.ping(patience=10).unreachable == []
        none_lost(beside)
    assert [host.env for host in lab.hosts] == before
    assert leases(lab) == published

    for host in lab.hosts:
        bystanders = [each for each in lab.containers if each.host is not host]
        beside = measuring(bystanders) if backend == "udp" else []
        host.stop_daemon()
        if (
            backend == "udp"
        ):  # the start that finds the port taken makes our tunnel go; flannel's supervisor starts it again
            with pytest.raises(NotReady, match="exit code 1"):
                host.start_daemon(flannel)
            wait_until(lambda at=host: "flannel0" not in sh(at, "ip -o link"))
        host.start_daemon(flannel)
        assert lab.ping(patience=10).unreachable == []
        none_lost(beside)
    assert [host.env for host in lab.hosts] == before
    assert leases(lab) == published
    assert not any("WIPED" in said(host) for host in lab.hosts)
    none_lost(pings)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_earlier_version_is_replaced_and_comes_back(make_lab, measuring, earlier, backend):
    """Nothing is lost either way; the udp tunnel is handed over to one of the other version, each time."""
    lab = make_lab(backend, store="etcd3", daemons={"*": f"{earlier} --etcd-api=v3 --ip-masq"}, containers=1)
    assert lab.ping(patience=10).unreachable == []
    before, published = [host.env for host in lab.hosts], leases(lab)
    pings = measuring(lab.containers, reversed(lab.containers))
    for command in (f"{ours(lab)} --ip-masq", None):
        for host in lab.hosts:
            host.stop_daemon()
            host.start_daemon(command)
            assert lab.ping(patience=10).unreachable == []
    none_lost(pings)
    assert [host.env for host in lab.hosts] == before
    assert leases(lab) == published
    for host in lab.hosts:
        assert versions(host) == ["0.0.0", __version__, "0.0.0"]
        assert not [line for line in said(host).splitlines() if line.startswith(("E", "F"))], said(host)
