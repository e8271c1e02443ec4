"""Who is let in: tokens, certificates, networks; what is refused is logged, without the token."""

import os
import re
import socket
import ssl
import subprocess
import sys

import pytest

from support.certs import Authority
from support.keys import wait_until
from support.server import free_port, put_config, serving
from wincey.lab.node import own_flanneld
from wincey.model.errors import BadOption
from wincey.server.access import Access, read_grants
from wincey.store.servers import read_token

BLUE, ALL = "blue-0123456789abcdef", "all-0123456789abcdef"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def store(tmp_path):
    put_config(tmp_path / "s.db", network="blue")
    put_config(tmp_path / "s.db", network="green")
    return put_config(tmp_path / "s.db")


def tokens(tmp_path, text):
    path = tmp_path / "tokens"
    path.write_text(text)
    return path


def bearer(token):
    return {"authorization": f"Bearer {token}"}


def test_tokens_and_their_networks(tmp_path, store):
    path = tokens(tmp_path, f"# who may what\n{BLUE} blue,yellow\n\n{ALL} *  # operators\n")
    with serving(tmp_path / "log", f"--store={store}", f"--remote-token-file={path}") as server:
        assert server.ask("GET", "/v1/blue/config")[0] == 401
        assert server.ask("GET", "/v1/blue/config", **bearer("wrong-0123456789abcdef"))[0] == 401
        assert server.ask("GET", "/v1/blue/config", **bearer(BLUE))[0] == 200
        assert server.take("10.0.0.1", "blue", **bearer(BLUE))["Subnet"]
        for method, target in (
            ("GET", "/v1/green/config"), ("GET", "/v1/_/leases"), ("POST", "/v1/green/leases"),
            ("PUT", "/v1/green/leases/10.5.1.0-24"), ("DELETE", "/v1/green/leases/10.5.1.0-24"),
            ("GET", "/v1/green/reservations"),
        ):  # fmt: skip
            assert server.ask(method, target, "{}", **bearer(BLUE))[0] == 403
        assert server.ask("GET", "/v1/green/config", **bearer(ALL))[0] == 200
        assert server.ask("GET", "/v1/_/config", **bearer(ALL))[0] == 200
        assert server.get("/v1/", **bearer(BLUE))["snapshot"] == ["blue"]
        assert server.get("/v1/", **bearer(ALL))["snapshot"] == ["blue", "green"]
        assert re.search(
            r"W.*refused 127\.0\.0\.1: no token or certificate that we know \(/v1/blue/config\)", server.log
        )
        assert "refused 127.0.0.1: the token of line 2 does not allow network green" in server.log
        assert "tokens are sent in the clear" in server.log
        assert BLUE not in server.log
        assert "wrong-0123456789abcdef" not in server.log
        # A token that is taken back is refused at once; a file that is wrong changes nothing.
        tokens(tmp_path, f"{ALL} *\n")
        assert server.ask("GET", "/v1/blue/config", **bearer(BLUE))[0] == 401
        tokens(tmp_path, "nonsense\n")
        assert server.ask("GET", "/v1/blue/config", **bearer(ALL))[0] == 200
        assert f"{path}, line 1" in server.log


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no line"),
        ("short *\n", "line 1: a token has at least 16"),
        (f"{ALL}\n", "line 1: it is not of the form"),
        (f"# x\n{ALL} a b\n", "line 2: it is not of the form"),
        (f"{ALL} *\n{ALL} blue\n", "line 2: there was a line for the same"),
    ],
)
def test_token_files_that_are_wrong(tmp_path, text, words):
    with pytest.raises(BadOption, match=words) as caught:
        read_grants(str(tokens(tmp_path, text)))
    assert ALL not in str(caught.value)


def test_a_token_file_that_is_not_there(tmp_path):
    with pytest.raises(BadOption, match="No such file"):
        Access(str(tmp_path / "none"))
    with pytest.raises(BadOption, match="No such file"):
        read_token(str(tmp_path / "none"))


def test_a_clients_token_file(tmp_path):
    assert read_token(str(tokens(tmp_path, f"# ours\n{BLUE} blue\n"))) == BLUE
    with pytest.raises(BadOption, match="one line"):
        read_token(str(tokens(tmp_path, f"{BLUE}\n{ALL}\n")))


def context(authority, name=None, *, trust=None):
    made = ssl.create_default_context(cafile=str((trust or authority).ca))
    if name:
        issued = authority.issue(name)
        made.load_cert_chain(issued.cert, issued.key)
    return made


def tls_flags(authority):
    issued = authority.issue("server")
    return [f"--remote-certfile={issued.cert}", f"--remote-keyfile={issued.key}"]


def test_certificates_are_demanded(tmp_path, store, authority):
    other = Authority(tmp_path / "other")
    flags = [*tls_flags(authority), f"--remote-cafile={authority.ca}"]
    with serving(tmp_path / "log", f"--store={store}", *flags) as server:
        server.tls = context(authority, "client1")
        assert server.get("/v1/_/config")["Network"] == "10.5.0.0/16"
        server.tls = context(authority)
        with pytest.raises(OSError, match=r"(?i)certificate|reset|eof|broken pipe|closed"):
            server.ask("GET", "/v1/_/config")
        server.tls = context(other, "client2", trust=authority)
        with pytest.raises(OSError, match=r"(?i)unknown|reset|eof|broken pipe|closed"):
            server.ask("GET", "/v1/_/config")
        wait_until(lambda: server.log.count("TLS with 127.0.0.1 failed") == 2)
        # A client does not talk to a server of another authority either.
        server.tls = context(other)
        with pytest.raises(ssl.SSLCertVerificationError):
            server.ask("GET", "/v1/_/config")


def test_a_certificate_or_a_token(tmp_path, store, authority):
    path = tokens(tmp_path, f"cert:client3 blue\n{ALL} *\n")
    flags = [*tls_flags(authority), f"--remote-cafile={authority.ca}", f"--remote-token-file={path}"]
    with serving(tmp_path / "log", f"--store={store}", *flags) as server:
        server.tls = context(authority, "client3")
        assert server.ask("GET", "/v1/blue/config")[0] == 200
        assert server.ask("GET", "/v1/green/config")[0] == 403
        server.tls = context(authority, "client4")
        assert server.ask("GET", "/v1/blue/config")[0] == 401
        server.tls = context(authority)
        assert server.ask("GET", "/v1/blue/config")[0] == 401
        assert server.ask("GET", "/v1/green/config", **bearer(ALL))[0] == 200
        assert "cert:client3 does not allow network green" in server.log


def test_plain_http_to_a_tls_server(tmp_path, store, authority):
    with serving(tmp_path / "log", f"--store={store}", *tls_flags(authority)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
            sock.sendall(b"GET /v1/_/config HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(100)[:4] != b"HTTP"
        wait_until(lambda: "TLS with 127.0.0.1 failed: http request" in server.log)
        server.tls = context(authority)
        assert server.ask("GET", "/v1/_/config")[0] == 200


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--listen=127.0.0.1"], 2, "must be HOST:PORT"),
        (["--listen=127.0.0.1:1", "--remote=h:1"], 1, "exclude each other"),
        (["--listen=203.0.113.9:18999"], 1, "Cannot assign requested address"),
        (["--listen=fd://"], 1, "no such socket was passed"),
        (["--listen=fd://2"], 2, "must name a descriptor"),
        (["--remote=h"], 2, "must be HOST:PORT"),
        (["--listen=127.0.0.1:18999", "--remote-certfile=/none"], 2, "needs --remote-keyfile"),
        (["--listen=127.0.0.1:18999", "--remote-token-file=/none"], 1, "No such file"),
        (["--remote=127.0.0.1:1", "--remote-cafile=/none"], 2, "--remote-cafile /none: No such file"),
    ],
)  # fmt: skip
def test_wrong_command_lines(tmp_path, flags, code, words):
    done = subprocess.run(
        [*own_flanneld(), f"--store=sqlite:{tmp_path / 's.db'}", f"--subnet-file={tmp_path / 'subnet.env'}", *flags],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert words in done.stderr


def test_a_socket_that_systemd_passes(tmp_path, store):
    """As systemd does: the socket at 3, LISTEN_FDS and LISTEN_PID in the environment of that very process."""
    launch = (
        "import os, sys; fd = int(sys.argv[1]); os.dup2(fd, 3, inheritable=True);"
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"
    )
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(tmp_path / "notify"))
    notify.settimeout(30)
    with socket.create_server(("127.0.0.1", 0)) as listener, notify, (tmp_path / "log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", launch, str(listener.fileno()), *own_flanneld(), "--listen=fd://", f"--store={store}"],
            pass_fds=[listener.fileno()], stdout=output, stderr=output,
            env=os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")},
        )  # fmt: skip
        try:
            assert notify.recv(100) == b"READY=1"
            with socket.create_connection(listener.getsockname(), timeout=20) as sock:
                sock.sendall(b"GET /v1/_/config HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert sock.makefile("rb").read().startswith(b"HTTP/1.1 ")
            process.terminate()
            assert notify.recv(100) == b"STOPPING=1"
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()


def test_health_in_server_mode(tmp_path, store):
    port = free_port()
    with serving(tmp_path / "log", f"--store={store}", f"--healthz-port={port}", "--healthz-ip=127.0.0.1") as server:
        for path in ("healthz", "readyz"):
            assert subprocess.run(
                ["curl", "-sf", f"http://127.0.0.1:{port}/{path}"], capture_output=True, check=False
            ).returncode == 0  # fmt: skip
        assert server.stop() == 0
