"""Two hosts with flanneld, the plugin and a real Docker engine each."""

import os
import secrets
import subprocess

import pytest

from support.dockerd import require_docker
from support.engine import Engine
from support.machine import PROGRAMS
from wincey.lab.lab import Lab
from wincey.lab.plan import LabSpec

CONFIG = '{"Network": "10.5.0.0/16", "SubnetMax": "10.5.127.0", "Backend": {"Type": "vxlan"}}'


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name == "test_engines.py":
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    require_docker()
    directory = tmp_path_factory.mktemp("engines")
    lab = Lab(LabSpec(name=f"plug-{secrets.token_hex(3)}", config=CONFIG, hosts=2, containers=0))
    made = []
    try:
        lab.up(hosts=[])
        store = f"sqlite:{directory / 'store.db'}"
        for host in lab.hosts:
            made.append(Engine(host, directory / host.name, store))  # noqa: PERF401  # those made must be closed
        subprocess.run(
            [PROGRAMS / "wincey", "config", "set", "--store", store, "-"], input=CONFIG, text=True, check=True
        )
        for engine in made:
            engine.start_flanneld()
            engine.start_plugin()
        for engine in made:
            engine.sh("setsid dockerd >>/var/log/dockerd.log 2>&1 </dev/null &")
        for engine in made:
            engine.wait_docker()
            engine.import_busybox()
        yield made
    finally:
        for engine in made:
            engine.close()
        lab.down()
