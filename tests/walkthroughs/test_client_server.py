"""Walkthrough: one server and no etcd, by the page's own commands; and servers that fail while packets flow."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from support.keys import delete, lease_key, wait_until
from support.traffic import ContinuousPing
from support.traffic import ping as reach
from wincey.agent.envfile import read_env_file
from wincey.lab.lab import Lab
from wincey.lab.namespace import enter_argv
from wincey.lab.node import own_flanneld
from wincey.lab.plan import LabSpec, network_config

PAGE = Path(__file__).parents[2] / "docs" / "walkthroughs" / "client-server.md"
BIN = Path(own_flanneld()[0]).parent
OWN = ("/etc/wincey", "/var/lib/wincey", "/run/flannel", "/var/log")


class Machine:
    """A host of a lab with directories of its own, where a page's commands can be run as they are printed."""

    def __init__(self, host, directory):
        self.host = host
        binds = []
        for path in OWN:
            mine = directory / path.strip("/").replace("/", "-")
            mine.mkdir(parents=True)
            binds += [f"mkdir -p {path}", f"mount --bind {mine} {path}"]
        # Processes of its own, too, so that all end with it.
        script = " && ".join(
            ["mount --make-rprivate /", "mount -t proc proc /proc", *binds, "echo up", "exec sleep 600"]
        )
        self._process = subprocess.Popen(
            enter_argv(host.netns, ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout.readline() == "up\n"
        self._init = int(Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()[0])

    def sh(self, script):
        done = subprocess.run(
            ["nsenter", "-t", str(self._init), "-m", "-p", "-n", "sh", "-euc", script], timeout=60, check=False,
            capture_output=True, text=True, env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def end(self):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture
def make_lab(tmp_path):
    labs = []

    def make(**spec):
        lab = Lab(
            LabSpec(name=f"cs-{secrets.token_hex(3)}", config=network_config("vxlan", (4,)), store="sqlite", **spec)
        )
        labs.append(lab)
        lab.up(hosts=[])
        return lab

    yield make
    for lab in labs:
        for host in lab.hosts:
            (tmp_path / f"{host.name}.log").write_text("\n".join(host.log()))
        lab.down()


@pytest.fixture
def machines(make_lab, tmp_path):
    lab = make_lab(hosts=3)
    with contextlib.ExitStack() as stack:
        made = {}
        for host in lab.hosts:
            made[host.name] = Machine(host, tmp_path / host.name)
            stack.callback(made[host.name].end)
        yield made


@pytest.fixture
def ping_between(tmp_path):
    with contextlib.ExitStack() as stack:

        def start(source, target):
            made = ContinuousPing(source, target, tmp_path)
            stack.callback(made.kill)
            return made

        yield start


def attach(machine, directory):
    """Give the host's containers the addresses that its subnet.env has, as a runtime would."""
    machine.host.subnet_file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(directory / "run-flannel" / "subnet.env", machine.host.subnet_file)
    machine.host.attach()


def start_ping(machines, ping_between):
    source, target = (machines[name].host.containers[0] for name in ("h2", "h3"))
    wait_until(lambda: reach(source, target.address(4))[0] == 0)
    return ping_between(source, target)


def test_the_page(machines, tmp_path, ping_between):
    pinging = None
    blocks = re.findall(r"<!-- on: ([\w ]+) -->\n```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    for where, script in blocks:
        if "kill " in script:  # all are joined: the server may stop
            for name, machine in machines.items():
                attach(machine, tmp_path / name)
            pinging = start_ping(machines, ping_between)
        if where == "every host" and "--remote=" in script:
            for name in ("h2", "h3"):  # what the page leaves to scp
                for file in ("server.crt", "tokens"):
                    shutil.copy(tmp_path / "h1" / "etc-wincey" / file, tmp_path / name / "etc-wincey" / file)
        for name in machines if where == "every host" else [where]:
            printed = machines[name].sh(script)
            if "cat /run/flannel/subnet.env" in script:
                assert "FLANNEL_NETWORK=10.5.0.0/16" in printed
    server_log = tmp_path / "h1" / "var-log" / "flanneld-server.log"
    wait_until(lambda: server_log.read_text().count("serving /coreos.com/network on 0.0.0.0:8888 with TLS") == 2)
    for name in machines:  # all are back at the restarted server
        log = tmp_path / name / "var-log" / "flanneld.log"
        wait_until(lambda log=log: "the store is back" in log.read_text(), 60)
    sent, lost = pinging.sent_and_lost()
    assert sent > 50
    assert lost == 0
    subnets = {read_env_file(str(tmp_path / name / "run-flannel" / "subnet.env")).subnets for name in machines}
    assert len(subnets) == 3
    token = (tmp_path / "h1" / "etc-wincey" / "tokens").read_text().split()[0]
    assert token not in server_log.read_text()
    # Somebody without a token gets nothing, and the server says who it was.
    machines["h2"].sh("! curl -sf --cacert /etc/wincey/server.crt https://10.99.0.1:8888/v1/_/leases")
    wait_until(lambda: "refused 10.99.0.2: no token" in server_log.read_text())


class Servers:
    """Two servers of a lab's store, on two of its hosts."""

    def __init__(self, lab, tmp_path):
        self.lab, self.paths, self.processes = lab, [], []
        for host in lab.hosts[:2]:
            path = tmp_path / f"server-{host.name}.log"
            with path.open("wb") as output:
                self.processes.append(
                    host.popen(
                        [*own_flanneld(), "--listen=0.0.0.0:8888", f"--store={lab.store.url}"],
                        stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    )
                )  # fmt: skip
            self.paths.append(path)
            wait_until(lambda path=path: "0.0.0.0:8888" in path.read_text().rpartition("serving /")[2])

    def kill(self, number):
        self.processes[number].send_signal(signal.SIGKILL)
        self.processes[number].wait()

    def end(self):
        for process in self.processes:
            process.kill()
            process.wait()


CLIENT = f"{own_flanneld()[0]} --iface=eth0 --subnet-file={{subnet_file}} --remote=10.99.0.1:8888,10.99.0.2:8888"


@pytest.fixture
def fleet(make_lab, tmp_path, request):
    lab = make_lab(hosts=getattr(request, "param", 4), containers=1, daemons={"*": CLIENT})
    servers = Servers(lab, tmp_path)
    yield lab, servers
    servers.end()


@pytest.mark.parametrize("fleet", [20], indirect=True)
def test_a_server_is_killed_and_nothing_is_lost(fleet, ping_between):
    lab, servers = fleet
    _, h2, h3, *_, last = lab.hosts
    lab.join(lab.hosts[:-1], timeout=120)
    containers = [host.containers[0] for host in (h2, h3)]
    wait_until(lambda: reach(containers[0], containers[1].address(4))[0] == 0)
    pinging = ping_between(*containers)
    servers.kill(0)
    # Through the other server hosts come, and old ones hear of them.
    last.join(timeout=60)
    assert lab.ping(patience=30).unreachable == []
    assert len({host.env.subnets for host in lab.hosts}) == 20
    # With no server at all packets go on, and a daemon may even be stopped.
    servers.kill(1)
    h2.stop_daemon()
    assert lab.ping(patience=5).unreachable == []
    sent, lost = pinging.sent_and_lost()
    assert sent > 50
    assert lost == 0


def test_a_partition_heals_without_a_duplicate(fleet):
    lab, _ = fleet
    _, _, h3, h4 = lab.hosts
    lab.join([h3], timeout=60)
    before = h3.env.subnets
    # h3 reaches no server; its lease ends meanwhile, and h4 asks for that very subnet.
    cut = "add table inet cut; add chain inet cut out { type filter hook output priority 0; }; add rule inet cut out tcp dport 8888 drop"
    h3.exec(["nft", cut], check=True)
    delete(lab, lease_key(h3))
    h4.directory.mkdir(parents=True, exist_ok=True)
    h4.subnet_file.write_text(h3.subnet_file.read_text())
    h4.start_daemon(timeout=60)
    assert h4.env.subnets == before
    h3.exec(["nft", "delete table inet cut"], check=True)
    wait_until(lambda: h3.env.subnets != before, 90)
    assert h3.running
    assert h4.env.subnets == before
    leases = lab.store.run(lambda registry: registry.snapshot()).leases.values()
    assert len(leases) == len({lease.key for lease in leases}) == 2
    h3.attach()
    h4.attach()
    assert lab.ping(patience=10).unreachable != []  # h1 and h2 have not joined
    wait_until(lambda: reach(h3.containers[0], h4.containers[0].address(4))[0] == 0)


def test_a_host_that_is_refused(make_lab, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("token-0123456789abcdef blue\n")
    lab = make_lab(hosts=2, containers=1, daemons={"*": CLIENT + f" --remote-token-file={tokens}"})
    h1, h2 = lab.hosts
    log = tmp_path / "server.log"
    with log.open("wb") as output:
        server = h1.popen(
            [*own_flanneld(), "--listen=0.0.0.0:8888", f"--store={lab.store.url}", f"--remote-token-file={tokens}"],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        h2.start_daemon(wait=False)
        wait_until(lambda: "refused 10.99.0.2: the token of line 1 does not allow network _" in log.read_text())
        wait_until(lambda: "no permission for network _" in "\n".join(h2.log()))
        assert h2.running
        assert not h2.ready
        # It joins when it is given the permission.
        tokens.write_text("token-0123456789abcdef blue,_\n")
        h2.wait_ready(60)
    finally:
        server.kill()
        server.wait()
