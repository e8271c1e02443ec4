"""The life of a lab with a secret in every place that can hold one, at the highest verbosity and under the most liberal umask:
none of the secrets is told anywhere, and what is written nobody else may change, or read where it matters."""

from __future__ import annotations

import base64
import json
import os
import random
import secrets
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from support.keys import get, put, wait_until
from support.server import free_port
from wincey.agent.doctor.bundle import write_bundle
from wincey.agent.envfile import EnvFile, write_env_file
from wincey.agent.statefile import State
from wincey.docker.state import Contents, StateFile
from wincey.lab.lab import Lab
from wincey.lab.node import own_flanneld
from wincey.lab.plan import PREFIX, LabSpec, network_config
from wincey.model.errors import WinceyError
from wincey.model.socketpath import SOCKET_VARIABLE

pytestmark = pytest.mark.root

WINCEY = Path(sys.executable).parent / "wincey"


def word(name: str) -> str:
    """A secret that is like nothing else on this machine."""
    return f"SeCrEt-{name}-{secrets.token_hex(8)}"


class World:
    """Two hosts, whose daemons are started by hand. secrets: by where they were put."""

    def __init__(self, lab, directory):
        self.lab, self.directory, self.secrets = lab, directory, dict[str, str]()
        self.logs, self.processes = list[Path](), list[subprocess.Popen]()
        self.gathered = list[dict[str, str]]()
        self.port = free_port()
        self.token = directory / "api-token"

    def secret(self, name, value=""):
        self.secrets[name] = value or word(name)
        return self.secrets[name]

    def start(self, host, *flags, **environment):
        host.directory.mkdir(parents=True, exist_ok=True)
        log = self.directory / f"{host.name}.log"
        self.logs.append(log)
        with log.open("ab") as out:
            argv = [*host.argv(), "-v=10", "--healthz-port=8471", *flags]
            env = {**os.environ, **host.environment, **host.variables, **environment}
            self.processes.append(host.popen(argv, stdout=out, stderr=out, umask=0, env=env))

    def switch(self, text, kind):
        """Put a config, and wait until every host's lease is of its kind."""
        put(self.lab, f"{PREFIX}/config", text, None)
        wanted = None if kind == "udp" else kind  # whose leases say nothing of it
        wait_until(lambda: [json.loads(each).get("BackendType") for each in self.leases()] == [wanted] * 2, 150)

    def leases(self):
        snapshot = self.lab.store.run(lambda registry: registry.snapshot())
        return [lease.attrs.encode().decode() for lease in snapshot.leases.values()]

    def told(self, host, path):
        """A health endpoint's answer."""
        argv = ["curl", "-s", f"http://127.0.0.1:8471{path}"]
        return host.exec(argv).stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    if os.geteuid():
        pytest.skip("needs root: network namespaces")
    directory = tmp_path_factory.mktemp("secrets")
    spec = LabSpec(
        name=f"sec-{secrets.token_hex(3)}", config=network_config("vxlan"), hosts=2, containers=0, store="etcd3"
    )
    lab = Lab(spec)
    world = World(lab, directory)
    try:
        lab.up(hosts=[])
        live(world)
        yield world
    finally:
        for process in world.processes:
            process.terminate()
        for process in world.processes:
            process.wait(30)
        lab.down()


def live(world):
    """The life: each backend that has secrets, in turn, and everything that tells of it is asked on the way."""
    h1, h2 = world.lab.hosts
    world.token.write_text(world.secret("api-token", secrets.token_hex(16)) + "\n")
    environment = {
        name: world.secret(name) for name in ("ACCESS_KEY_SECRET", "AWS_SECRET_ACCESS_KEY", "FLANNELD_ETCD_PASSWORD")
    }
    listen = [f"--api-listen=127.0.0.1:{world.port}", f"--api-token-file={world.token}"]
    world.start(h1, "--etcd-username=root", *listen, **environment)
    world.start(h2, "--etcd-username=root", f"--etcd-password={world.secret('flag')}")
    world.switch(network_config("udp"), "udp")
    world.gathered.append(gather(world, whole=False))
    phases = [
        ("wireguard", {"PSK": world.secret("wg", base64.b64encode(secrets.token_bytes(32)).decode())}),
        ("ipsec", {"PSK": world.secret("ipsec", secrets.token_hex(48))}),
        ("bgp", {"Password": world.secret("bgp", f"bgp-{secrets.token_hex(8)}")}),
    ]
    for kind, options in phases:
        world.switch(network_config(kind, **options), kind)
        world.gathered.append(gather(world, whole=kind == "ipsec"))
    for name, text in (
        ("broken", '{"Network": "10.5.0.0/16", "Backend": {"Type": "bgp", "Password": "%s'),
        ("wrong", '{"Network": "10.5.0.0/16", "Backend": {"Type": "wireguard", "PSK": "%s"}}'),
        (
            "key",
            '{"Network": "10.5.0.0/16", "Backend": {"Type": "tencent-vpc", "AccessKeyID": "id", "AccessKeySecret": "%s"}}',
        ),
    ):
        before = len(world.logs[0].read_text())
        put(world.lab, f"{PREFIX}/config", text % world.secret(f"config-{name}"), None)
        wait_until(lambda before=before: "\nE" in world.logs[0].read_text()[before - 1 :], 150)
    world.gathered.append(gather(world, whole=True))
    for path in (h1.directory / "wgkey", h2.directory / "wgkey"):
        world.secret(f"{path.parent.name} private key", path.read_text().strip())


def gather(world, *, whole):
    """Everything that tells something to somebody, by name. whole: with what takes seconds, the programs for people."""
    h1, h2 = world.lab.hosts
    found = {}
    for host in (h1, h2):
        for path in ("status", "peers", "diff", "containers"):
            argv = ["curl", "-s", "--unix-socket", host.environment[SOCKET_VARIABLE], f"http://localhost/v1/{path}"]
            found[f"{host.name} {path}"] = host.exec(argv).stdout
        for path in ("/metrics", "/healthz", "/readyz"):
            found[f"{host.name} {path}"] = world.told(host, path)
        env_file = host.subnet_file
        found[f"{host.name} subnet.env"] = env_file.read_text() if env_file.exists() else ""
        found |= {f"{host.name} {name}": text for name, text in command_lines(host).items()}
    curl = ["curl", "-s", "-H", f"Authorization: Bearer {world.token.read_text().strip()}"]
    found["api"] = h1.exec([*curl, f"http://127.0.0.1:{world.port}/v1/status"]).stdout
    found["wrong token"] = h1.exec(["curl", "-si", f"http://127.0.0.1:{world.port}/v1/status"]).stdout
    if whole:
        archive = world.directory / f"{len(world.gathered)}.tar.gz"
        for command in (["status"], ["peers"], ["doctor", "--bundle", str(archive)]):
            done = h1.exec([str(WINCEY), *command], env={**os.environ, **h1.environment}, timeout=120)
            found[f"wincey {command[0]}"] = done.stdout + done.stderr
        found |= unpacked(archive)
    return found


def unpacked(archive):
    with tarfile.open(archive) as tar:
        return {
            f"bundle {each.name}": tar.extractfile(each).read().decode(errors="replace") for each in tar.getmembers()
        }


def command_lines(host):
    """Of every process in the host's namespace: its command line, but that of a daemon that was given a secret in a flag."""
    inode = os.stat(f"/run/netns/{host.netns}").st_ino
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "ns/net").stat().st_ino == inode:
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if "--etcd-password" not in line or "flanneld" not in line:
                    found[f"process {process.name}"] = line
                if "wincey.tunnel" in line:
                    found[f"environment of the tunnel {process.name}"] = (
                        (process / "environ").read_bytes().decode(errors="replace")
                    )
        except OSError:
            continue
    return found


def test_everything_was_asked(world):
    """Or that nothing tells a secret would mean nothing."""
    assert len(world.gathered) == 5
    for number, found in enumerate(world.gathered[:4]):
        assert json.loads(found["h1 status"])["networks"], number
        assert "wincey_" in found["h1 /metrics"]
        assert found["h1 subnet.env"].startswith("FLANNEL_NETWORK=")
        assert json.loads(found["api"])["networks"]
        assert "401" in found["wrong token"]
        assert any("flanneld" in text for name, text in found.items() if " process " in name)
    bundles = [found for found in world.gathered if "wincey doctor" in found]
    assert len(bundles) == 2
    assert all(found["bundle wincey-doctor/daemon.log"] for found in bundles)
    assert all(found["bundle wincey-doctor/config.json"] for found in bundles)
    assert any("environment of the tunnel" in name for name in world.gathered[0])
    assert len(world.secrets) == 13
    text = "\n".join(log.read_text() for log in world.logs)
    assert "--etcd-password=***" in text
    assert "AccessKey" in text or "tencent" in text


def test_no_secret_is_told(world):
    everything = {
        f"{number} {name}": text for number, found in enumerate(world.gathered) for name, text in found.items()
    }
    everything |= {str(log): log.read_text(errors="replace") for log in world.logs}
    told = [
        (place, name) for place, text in everything.items() for name, value in world.secrets.items() if value in text
    ]
    assert told == []


def test_secrets_on_disk_are_for_their_owner_alone(world):
    """Those that programs need as files, and there is no other way: no one else may read these."""
    files = [path for host in world.lab.hosts for path in host.directory.rglob("*") if path.is_file()]
    assert files
    for path in files:
        text = path.read_bytes()
        if any(value.encode() in text for value in world.secrets.values()):
            assert not path.stat().st_mode & 0o007, path


def test_nobody_else_may_write_what_we_made(world):
    paths = [path for host in world.lab.hosts for path in (host.directory, *host.directory.rglob("*"))]
    assert any(path.name == "state.json" for path in paths)
    assert any(path.is_socket() for path in paths)
    for path in paths:
        status = path.lstat()
        if not stat.S_ISLNK(status.st_mode) and path.name != "daemon.log":
            assert not status.st_mode & 0o022 or (status.st_mode & 0o020 and stat.S_ISSOCK(status.st_mode)), (
                f"{path} {status.st_mode:o}"
            )
            assert not stat.S_ISSOCK(status.st_mode) or not status.st_mode & 0o007, f"{path} {status.st_mode:o}"


def test_the_bundle_is_for_its_owner(world):
    for archive in world.directory.glob("*.tar.gz"):
        assert stat.S_IMODE(archive.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "flags",
    [
        ["--etcd-endpoints=http://user:{}@127.0.0.1:1"],
        ["--remote=http://user:{}@127.0.0.1:1"],
        ["--etcd-password={}", "--no-such-flag"],
        ["--etcd-password={}", "--etcd-endpoints=http://127.0.0.1:1", "--etcd-api=v9"],
    ],
)
def test_a_command_line_that_is_refused_does_not_quote_the_password(flags):
    value = word("refused")
    done = subprocess.run(
        [*own_flanneld(), *(flag.format(value) for flag in flags)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode in {1, 2}
    assert done.stderr
    assert value not in done.stdout + done.stderr


def test_the_store_has_no_secret_of_a_host(world):
    """Leases are for everybody to read; the config is where the operator put secrets."""
    keys = world.lab.store.run(lambda registry: registry.store.read_all("/"))
    for entry in keys.entries:
        if not entry.key.endswith("/config"):
            assert not any(value.encode() in entry.value for value in world.secrets.values()), entry.key
    assert get(world.lab, f"{PREFIX}/config")


def test_a_link_in_the_way_is_replaced_or_refused_and_never_followed(tmp_path, monkeypatch):
    monkeypatch.setattr("wincey.agent.doctor.bundle._COMMANDS", {})
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "wincey" / "subnet").mkdir(parents=True)
    places = [tmp_path / "subnet.env", tmp_path / "wincey" / "subnet" / "state.json", tmp_path / "docker.json.new"]
    for place in (*places, tmp_path / "docker.json", tmp_path / "bundle.tar.gz"):
        place.symlink_to(victim)
    write_env_file(str(places[0]), EnvFile(mtu=1450))
    state = State(str(places[0]), random.Random(1))
    state.devices.add("flannel.1")
    state.save()
    docker = StateFile.__new__(StateFile)
    docker._path, docker.contents = str(tmp_path / "docker.json"), Contents()
    with pytest.raises(WinceyError, match="can't be written"):
        docker.save()
    docker.save()  # the link is gone by now
    with pytest.raises(FileExistsError):
        write_bundle(str(tmp_path / "bundle.tar.gz"), {})
    assert victim.read_text() == "precious"
    assert not places[0].is_symlink()
    assert not places[1].is_symlink()
    assert stat.S_IMODE((tmp_path / "docker.json").stat().st_mode) == 0o600
