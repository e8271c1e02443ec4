"""AWS for the tests of this directory: one moto for all, one VPC for each test."""

import os

import pytest

from support.aws import aws_stage
from wincey.cloud import aws as dialect


@pytest.fixture(scope="session")
def aws_server(tmp_path_factory):
    with aws_stage(tmp_path_factory.mktemp("aws")) as aws:
        yield aws


_clients = {}
_really_open = dialect._open


def _open_once(region):
    """boto3 reads its description of EC2's API for each client anew, which takes longer than all of a test's calls."""
    key = (
        region,
        *(os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")),
    )
    if key not in _clients:
        _clients[key] = _really_open(region)
    return _clients[key]


@pytest.fixture
def aws(aws_server, monkeypatch):
    """The stage without faults, its endpoint and credentials in the environment, as a host of EC2 outside any instance."""
    aws_server.heal()
    aws_server.blackholes.clear()
    aws_server.calls.clear()
    aws_server.quota, aws_server.quota_visible, aws_server.imds_v2 = None, True, True
    for name, value in aws_server.environment("i-none").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dialect, "_open", _open_once)
    return aws_server
