"""A lab with real hosts, that goes down at the test's end whatever happens."""

import secrets

import pytest

from wincey.lab.lab import Lab
from wincey.lab.plan import LabSpec, network_config


@pytest.fixture
def make_lab(tmp_path):
    labs = []

    def make(backend="vxlan", **spec):
        lab = Lab(LabSpec(name=f"web-{secrets.token_hex(3)}", config=network_config(backend, (4,)), **spec))
        labs.append(lab)
        lab.up()
        return lab

    yield make
    for lab in labs:
        for host in lab.hosts:
            (tmp_path / f"{lab.spec.name}-{host.name}.log").write_text("\n".join(host.log()))
        lab.down()
