"""Labs for the end-to-end tests: real daemons, real stores, a real kernel, each lab in namespaces of its own."""

import os
import secrets
import shutil

import pytest

from support.fastpath import Talk
from support.traffic import ContinuousPing
from wincey.lab.lab import Lab
from wincey.lab.plan import LabSpec, network_config


def pytest_collection_modifyitems(items):
    for item in items:
        if "/e2e/" in str(item.path):
            item.add_marker(pytest.mark.root)


@pytest.fixture
def make_lab(tmp_path):
    """Make labs that go down at the test's end, whatever happens."""
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    labs = []

    def make(backend="vxlan", *, families=(4,), store="sqlite", hosts=2, config=None, start=None, **spec):
        if store != "sqlite" and not shutil.which("etcd"):
            pytest.skip("needs etcd (package etcd-server)")
        text = config or network_config(backend, families)
        lab = Lab(LabSpec(name=f"e2e-{secrets.token_hex(3)}", config=text, hosts=hosts, store=store, **spec))
        labs.append(lab)
        lab.up(hosts=start)
        return lab

    yield make
    for lab in labs:
        for host in lab.hosts:
            target = tmp_path / f"{lab.spec.name}-{host.name}.log"
            target.write_text("\n".join(host.log()))
        lab.down()


@pytest.fixture
def measuring(tmp_path):
    """Start pings between containers; they end with the test."""
    started = []

    def start(*pairs):
        started.extend(ContinuousPing(*pair, tmp_path) for pair in pairs)
        return started[-len(pairs) :]

    yield start
    for each in started:
        each.kill()


@pytest.fixture
def talk(tmp_path):
    """Start talks over TCP between containers; they end with the test."""
    talks = []

    def start(source, address, **rest):
        talks.append(Talk(source, address, tmp_path, **rest))
        return talks[-1]

    yield start
    for each in talks:
        each.close()
