"""Two hosts with flanneld, the plugin and a real Docker engine each."""

import contextlib
import json
import os
import secrets
import subprocess

import pytest

from support.dockerd import require_docker
from support.engine import Engine
from support.machine import PROGRAMS
from wincey.lab.lab import Lab
from wincey.lab.plan import LabSpec

PREFIX = "/coreos.com/network"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in {"test_engines.py", "test_coloured.py"}:
            item.add_marker(pytest.mark.root)


def config(network, vni):
    """A network config with room for docker networks from .128.0 on."""
    low = network.replace("0.0/16", "127.0")
    return json.dumps({"Network": network, "SubnetMax": low, "Backend": {"Type": "vxlan", "VNI": vni}})


@contextlib.contextmanager
def two_engines(directory, configs, *flags, files):
    """configs: by prefix. flags: of flanneld, which writes the files."""
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    require_docker()
    first = next(iter(configs.values()))
    lab = Lab(LabSpec(name=f"plug-{secrets.token_hex(3)}", config=first, hosts=2, containers=0))
    store = f"sqlite:{directory / 'store.db'}"
    made = []
    try:
        lab.up(hosts=[])
        for host in lab.hosts:
            made.append(Engine(host, directory / host.name, store))  # noqa: PERF401  # those made must be closed
        for prefix, text in configs.items():
            put = [PROGRAMS / "wincey", "config", "set", "--store", store, "--etcd-prefix", prefix, "-"]
            subprocess.run(put, input=text, text=True, check=True)
        for engine in made:
            engine.start_flanneld(*flags, files=files)
            engine.start_plugin()
            engine.sh("setsid dockerd >>/var/log/dockerd.log 2>&1 </dev/null &")
        for engine in made:
            engine.wait_docker()
            engine.import_busybox()
        yield made
    finally:
        for engine in made:
            engine.close()
        lab.down()


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """All in one container network."""
    directory = tmp_path_factory.mktemp("engines")
    with two_engines(directory, {PREFIX: config("10.5.0.0/16", 1)}, files=["/run/flannel/subnet.env"]) as made:
        yield made


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """In two networks, blue and green."""
    configs = {f"{PREFIX}/blue": config("10.6.0.0/16", 6), f"{PREFIX}/green": config("10.7.0.0/16", 7)}
    files = [f"/run/flannel/networks/{name}.env" for name in ("blue", "green")]
    with two_engines(tmp_path_factory.mktemp("coloured"), configs, "--networks=blue,green", files=files) as made:
        yield made
