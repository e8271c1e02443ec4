import os
import socket

import pytest

from wincey.agent.sdnotify import notify


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path):
    """A systemd that listens: its socket, and the environment of its services."""
    abstract = f"wincey-test-{os.getpid()}-{os.urandom(4).hex()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        if request.param == "path":
            name = str(tmp_path / "notify")
            receiver.bind(name)
        else:
            name = "@" + abstract
            receiver.bind("\0" + abstract)
        receiver.settimeout(5)
        yield receiver, {"NOTIFY_SOCKET": name}


def test_told_in_one_message(manager):
    receiver, environ = manager
    assert notify("READY=1", "STATUS=two\nlines", environ=environ) is True
    assert receiver.recv(4096) == b"READY=1\nSTATUS=two lines"


def test_without_systemd_nothing_happens(caplog):
    assert notify("READY=1", environ={}) is False
    assert notify("READY=1", environ={"NOTIFY_SOCKET": ""}) is False
    assert caplog.text == ""


@pytest.mark.parametrize("address", ["/nonexistent/notify", "@nobody-listens-here", "vsock:2:1", "/" + "x" * 200])
def test_a_socket_that_is_not_there_is_only_logged(address, caplog):
    assert notify("READY=1", environ={"NOTIFY_SOCKET": address}) is False
    assert address in caplog.text


def test_a_manager_that_does_not_read_holds_nobody_up(manager, caplog):
    _, environ = manager
    results = [notify("STATUS=x", environ=environ) for _ in range(10_000)]
    assert results[0] is True
    assert results[-1] is False
