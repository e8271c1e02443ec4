"""What a host tells of itself, where it can't tell."""

import os
import resource

import pytest

from wincey.agent.hostfacts import HostLook, Wishes
from wincey.model.config import NetworkConfig
from wincey.model.errors import NotJoinable


def test_a_host_without_free_descriptors_is_no_crash():
    """The daemon goes on with what it knew, as with an interface that is gone."""
    look = HostLook(Wishes(), {})
    config = NetworkConfig.parse('{"Network": "10.5.0.0/16"}')
    lowest_free = os.dup(0)
    os.close(lowest_free)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        with pytest.raises(NotJoinable, match="can't be read: Too many open files"):
            look(config)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
