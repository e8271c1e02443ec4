"""One flanneld as a process: how it ends and with which code, what it says, its signals, its health."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from support.flanneld import KLOG, ask, flanneld
from support.keys import put, wait_until
from wincey.lab.node import own_flanneld
from wincey.lab.plan import PREFIX, network_config
from wincey.lab.process import clean_environment

CLAIM = f"{PREFIX}/wincey/hosts/10.99.0.1"


def run(*flags, env=None):
    """Run flanneld to its end, where it needs neither root nor a host."""
    done = subprocess.run(
        [*own_flanneld(), *flags],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=clean_environment(os.environ) | (env or {}),
    )
    assert done.stdout == "", "all output is standard error's"
    return done.returncode, done.stderr


@pytest.fixture
def host(make_lab):
    """A host without a daemon, its network config in the store."""
    return make_lab("vxlan", hosts=1, start=[]).hosts[0]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "flanneld.log"


@pytest.mark.parametrize("flag", ["--help", "-help", "-h"])
def test_help_tells_every_flag(flag):
    code, text = run(flag)
    assert code == 0
    assert all(name in text for name in ("-etcd-endpoints", "-iface", "-subnet-file", "-ip-masq", "-healthz-port"))


def test_version():
    code, text = run("-version")
    assert (code, len(text.splitlines())) == (0, 1)
    assert re.match(r"\d+\.\d+", text)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--etcd-endpoitns=http://x"], 2, ["--etcd-endpoitns", "did you mean --etcd-endpoints?"]),
        (["--ip-mask"], 2, ["ip-mask", "ip-masq"]),
        (["--v=loud"], 2, ["loud", "v"]),
        (["--public-ip=10.99.0"], 2, ["--public-ip", "10.99.0", "IPv4"]),
        (["--subnet-lease-renew-margin=1440"], 1, ["1440", "1 to 1439"]),
        (["--subnet-lease-renew-margin", "0"], 1, ["subnet-lease-renew-margin 0"]),
        (["--kube-subnet-mgr"], 2, ["not yet", "kube-subnet-mgr", "Kubernetes"]),
        (["--listen=0.0.0.0"], 2, ["listen", "HOST:PORT"]),
        (["--networks=a,b/c"], 2, ["networks", "b/c", "letters"]),
        (["stray"], 2, ["stray"]),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(flags, code, words):
    ended, text = run(*flags)
    assert ended == code
    assert len(text.splitlines()) == 1
    assert all(word in text for word in words), text


def test_no_usable_interface(host, log):
    with flanneld(host, log, f"--store={host.argv()[-1].partition('=')[2]}", "--iface=eth7", bare=True) as daemon:
        assert daemon.end() == 1
    last = daemon.log.splitlines()[-1]
    assert last.startswith("F")
    assert all(word in last for word in ("--iface=eth7", "eth0 (10.99.0.1", "lo (127.0.0.1"))
    assert not host.subnet_file.exists()


def test_a_backend_that_there_is_not(make_lab, log):
    host = make_lab("nonsense", hosts=1, start=[]).hosts[0]
    with flanneld(host, log) as daemon:
        assert daemon.end() == 1
    assert all(word in daemon.log.splitlines()[-1] for word in ("'nonsense' is unknown", "vxlan")), daemon.log


def test_host_gw_with_a_public_address_that_is_not_its_own(make_lab, log):
    host = make_lab("host-gw", hosts=1, start=[]).hosts[0]
    with flanneld(host, log, "--public-ip=203.0.113.7") as daemon:
        assert daemon.end() == 1
    assert "203.0.113.7" in daemon.log.splitlines()[-1]
    assert "10.99.0.1" in daemon.log.splitlines()[-1]


def test_busy_health_port(host, log):
    port = 8400
    with flanneld(host, log, f"--healthz-port={port}") as first:
        wait_until(lambda: ask(host, "/healthz", port)[0] == 200)
        with flanneld(host, log.with_name("second.log"), f"--healthz-port={port}") as second:
            assert second.end() == 1
        assert re.search(rf"^F.*--healthz-port.*:{port}.*in use.*", second.log.splitlines()[-1]), second.log
        assert "Traceback" not in second.log
        assert first.running


# What a daemon may be doing when it is told to end: flags for it, and what its log says then.
SITUATIONS = {
    "running": ([], "lease acquired"),
    "waiting for its config": (["--etcd-prefix=/nothing/here"], "/nothing/here"),
    "waiting for a store that refuses": (["--store=", "--etcd-endpoints=http://10.99.0.1:9"], "10.99.0.1:9"),
    "waiting for a store that is silent": (["--store=", "--etcd-endpoints=http://10.99.0.77:9"], ""),
    "waiting for another host's claim": ([], "to object"),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_at_once(make_lab, tmp_path, number):
    """Five hosts, each doing something else. A deadline of a store or of a claim holds nothing up."""
    lab = make_lab("vxlan", hosts=len(SITUATIONS), start=[])
    put(lab, f"{PREFIX}/wincey/hosts/10.99.0.5", '{"name":"other","instance":"0123456789abcdef0123456789abcdef"}')
    with ExitStack() as stack:
        daemons = [
            stack.enter_context(flanneld(host, tmp_path / f"{host.name}.log", *flags, "--healthz-port=8400"))
            for host, (flags, _) in zip(lab.hosts, SITUATIONS.values(), strict=True)
        ]
        for host, daemon, (_, said) in zip(lab.hosts, daemons, SITUATIONS.values(), strict=True):
            wait_until(lambda host=host: ask(host, "/healthz", 8400)[0] == 200)
            daemon.says(said)
        wait_until(lab.hosts[0].subnet_file.exists)
        for daemon in daemons:
            daemon.send(number)
        # Two seconds are less than any deadline it could be waiting for, and much more than it needs.
        assert [daemon.end(2) for daemon in daemons] == [0] * len(daemons)
        assert all("Traceback" not in daemon.log for daemon in daemons)


def test_a_second_signal_ends_it_without_more_ado():
    """An end that hangs (here: a life that does not heed its cancellation) is no reason to wait for SIGKILL."""
    program = (
        "import asyncio, sys\n"
        "from wincey.agent import daemon\n"
        "async def stubborn(options, health, views):\n"
        "    try:\n"
        "        print('living', flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "    finally:\n"
        "        print('hanging', flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "daemon._live = stubborn\n"
        "from wincey.cli.flanneld import run\n"
        "sys.exit(run(['--store=sqlite:/nonexistent/store', '--api-socket=off'], {}))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "living\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "hanging\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
        assert process.returncode == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_systemd_is_told(host, log, tmp_path):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(20)
        with flanneld(host, log, env={"NOTIFY_SOCKET": str(path)}) as daemon:
            assert manager.recv(1000) == b"READY=1"
            assert host.env.subnets, "subnet.env comes first"
            daemon.send(signal.SIGTERM)
            assert manager.recv(1000) == b"STOPPING=1"
            assert daemon.end() == 0


def test_every_line_of_the_log_is_klogs(host, log):
    with flanneld(host, log, "-v=10") as daemon:
        daemon.says("lease acquired")
        wait_until(host.subnet_file.exists)
        assert daemon.stop() == 0
    lines = daemon.log.splitlines()
    assert len(lines) > 3
    assert [line for line in lines if not KLOG.match(line)] == []
    assert "--subnet-file" in lines[0]


def test_every_line_of_the_json_log_parses(make_lab, log):
    host = make_lab("nonsense", hosts=1, start=[]).hosts[0]
    with flanneld(host, log, "--log-format=json", "-v=10") as daemon:
        assert daemon.end() == 1
    lines = [json.loads(line) for line in daemon.log.splitlines()]
    assert lines[0]["level"] == "info"
    assert lines[-1]["level"] == "fatal"
    assert "nonsense" in lines[-1]["message"]
    assert all({"ts", "level", "logger", "message", "file", "line"} <= line.keys() for line in lines)


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_the_password_is_in_no_log(host, log, way):
    secret = "hunter2-rather-secret"
    flags = ["--store=", "--etcd-endpoints=http://10.99.0.1:9", "--etcd-username=root", "-v=10"]
    env = {"FLANNELD_ETCD_PASSWORD": secret} if way == "environment" else {}
    with flanneld(host, log, *flags, *([f"--etcd-password={secret}"] if way == "flag" else []), env=env) as daemon:
        daemon.says("trying on")
        daemon.stop()
    assert secret not in daemon.log


def test_an_endpoint_that_is_no_url(host, log):
    """Flannel writes it to its log as it is, with whatever password stands in it."""
    with flanneld(host, log, "--store=", "--etcd-endpoints=http://root:hunter2@10.99.0.1:9") as daemon:
        assert daemon.end() == 1
    assert re.match(r"F.*--etcd-endpoints: http://\*\*\*@10.99.0.1:9: .*http://HOST:PORT", daemon.log.splitlines()[-1])
    assert "hunter2" not in daemon.log


def test_health_while_it_waits_for_a_config_and_when_it_is_ready(make_lab, log):
    lab = make_lab("vxlan", hosts=1, start=[])
    host = lab.hosts[0]
    with flanneld(host, log, "--etcd-prefix=/later", "--healthz-port=8400") as daemon:
        wait_until(lambda: ask(host, "/readyz", 8400)[0] == 503)
        assert ask(host, "/healthz", 8400) == (200, "flanneld is running")
        wait_until(lambda: "/later/config" in ask(host, "/readyz", 8400)[1])
        assert "flanneld is not ready yet: " in ask(host, "/readyz", 8400)[1]
        put(lab, "/later/config", network_config("vxlan"), None)
        wait_until(lambda: ask(host, "/readyz", 8400) == (200, "flanneld is ready"))
        assert host.env.subnets
        assert ask(host, "/other", 8400)[0] == 404
        assert daemon.stop() == 0


def test_health_on_the_address_it_is_told_alone(host, log):
    with flanneld(host, log, "--healthz-port=8400", "--healthz-ip=10.99.0.1"):
        wait_until(lambda: ask(host, "/healthz", 8400, "10.99.0.1")[0] == 200)
        assert ask(host, "/healthz", 8400, "127.0.0.1")[0] == 0


@pytest.mark.etcd
def test_health_while_the_store_is_down(make_lab, log):
    """Down at the start: not ready, and why. Down later: packets flow, so it stays ready."""
    lab = make_lab("vxlan", hosts=1, start=[], store="etcd3")
    host = lab.hosts[0]
    lab.store.stop()
    with flanneld(host, log, "--healthz-port=8400") as daemon:
        wait_until(lambda: "10.99.0.254:2379" in ask(host, "/readyz", 8400)[1])
        assert ask(host, "/readyz", 8400)[0] == 503
        assert ask(host, "/healthz", 8400)[0] == 200
        lab.store.start()
        wait_until(lambda: ask(host, "/readyz", 8400)[0] == 200)
        lab.store.stop()
        daemon.says("the store can't be reached")
        assert ask(host, "/readyz", 8400) == (200, "flanneld is ready")
        assert daemon.stop() == 0
