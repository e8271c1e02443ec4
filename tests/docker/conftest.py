"""Hosts with a real Docker engine each, and flanneld on them."""

import os
import secrets
from contextlib import ExitStack

import pytest

from support.dockerd import require_docker
from support.machine import Machine
from wincey.lab.lab import Lab
from wincey.lab.plan import LabSpec, network_config


def pytest_collection_modifyitems(items):
    for item in items:
        if "/tests/docker/" in str(item.path):
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two hosts on one switch. They share /tmp, and so a store."""
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    require_docker()
    directory = tmp_path_factory.mktemp("machines")
    lab = Lab(LabSpec(name=f"docker-{secrets.token_hex(3)}", config=network_config("vxlan"), hosts=2, containers=0))
    made = []
    try:
        lab.up(hosts=[])
        with ExitStack() as stack:
            for host in lab.hosts:
                machine = Machine(host, directory / host.name)
                stack.callback(machine.close)
                made.append(machine)
            yield made
    finally:
        lab.down()
