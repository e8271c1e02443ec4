"""AWS for the tests of this directory: one moto for all, one VPC for each test."""

import pytest

from support.aws import aws_stage


@pytest.fixture(scope="session")
def aws_server(tmp_path_factory):
    with aws_stage(tmp_path_factory.mktemp("aws")) as aws:
        yield aws


@pytest.fixture
def aws(aws_server, monkeypatch):
    """The stage without faults, its endpoint and credentials in the environment, as a host of EC2 outside any instance."""
    aws_server.heal()
    aws_server.blackholes.clear()
    aws_server.calls.clear()
    aws_server.quota, aws_server.quota_visible, aws_server.imds_v2 = None, True, True
    for name, value in aws_server.environment("i-none").items():
        monkeypatch.setenv(name, value)
    return aws_server
