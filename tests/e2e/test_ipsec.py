"""The ipsec backend between hosts, with ESP in user space, by pre-shared key and by certificates: nothing goes plain."""

import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import time

import pytest

from support.ipsec import MARKER, Capture, charon_pid, mark, nothing_plain, swanctl, vici_socket
from support.keys import delete, lease_key, put, wait_until
from support.traffic import ContinuousPing, ping, transfer
from wincey.lab.node import own_flanneld
from wincey.lab.plan import PREFIX, network_config


@pytest.fixture
def psk():
    return secrets.token_hex(48)


@pytest.fixture
def capture(tmp_path):
    running = []

    def start(lab):
        running.append(Capture(lab, tmp_path))
        return running[-1]

    yield start
    for each in running:
        each.kill()


def limit_is_right(source, target):
    """DF at the limit passes; above it the host answers with the limit."""
    mtu = source.host.mtu
    assert ping(source, target.address(4), "-M", "do", "-s", str(mtu - 28))[0] == 0
    ports = json.loads(source.host.exec(["ip", "-j", "link", "show", "master", "cni0"]).stdout)
    for device in ("cni0", *(port["ifname"] for port in ports)):
        source.host.exec(["ip", "link", "set", device, "mtu", str(mtu + 100)], check=True)
    source.exec(["ip", "link", "set", "eth0", "mtu", str(mtu + 100)], check=True)
    code, output = ping(source, target.address(4), "-M", "do", "-s", str(mtu - 28 + 1))
    assert code != 0
    assert re.search(rf"(Frag needed and DF set \(mtu = |message too long, mtu[:=] ?){mtu}\b", output), output


@pytest.fixture
def pinging(tmp_path):
    pings = []

    def start(source, target):
        pings.append(ContinuousPing(source, target, tmp_path))
        return pings[-1]

    yield start
    for each in pings:
        each.kill()


def test_pre_shared_key(make_lab, capture, psk):
    lab = make_lab(config=network_config("ipsec", PSK=psk, ESP="user"), hosts=3, start=[])
    captured = capture(lab)
    lab.join(lab.hosts)
    assert lab.ping(patience=20).unreachable == []
    first, second = lab.containers[:2]
    assert mark(first, second)[0] == 0
    sent, received = transfer(first, second, megabytes=20)
    assert sent == received
    limit_is_right(first, second)
    assert first.host.mtu == 1400
    pcap = captured.stop()
    nothing_plain(pcap, least=1_000)
    the_secret_is_kept(lab, psk, pcap)


def the_secret_is_kept(lab, psk, pcap):
    assert psk.encode() not in pcap
    for host in lab.hosts:
        for path in host.directory.rglob("*"):
            if path.is_file():
                assert psk not in path.read_text(errors="replace"), path
        assert psk not in subprocess.run(["ps", "-ww", "axe"], capture_output=True, text=True, check=True).stdout
    leases = lab.store.run(lambda registry: registry.snapshot()).leases.values()
    assert [lease.attrs.backend_data for lease in leases] == [b""] * 3


def test_daemons_killed_and_started_and_new_keys_lose_nothing(make_lab, pinging, psk):
    lab = make_lab(config=network_config("ipsec", PSK=psk))
    assert lab.ping(patience=20).unreachable == []
    before = [(host.env, charon_pid(host)) for host in lab.hosts]
    continuous = pinging(*lab.containers)
    for host in lab.hosts:
        host.kill_daemon()
        time.sleep(0.3)
        host.start_daemon()
        host.stop_daemon(signal.SIGTERM)
        time.sleep(0.3)
        host.start_daemon()
    mine, its = (str(host.gateways[0].network) for host in lab.hosts)
    swanctl(lab.hosts[0], "--rekey", "--child", f"{mine}-{its}")
    swanctl(lab.hosts[0], "--rekey", "--ike", f"10.99.0.1-{mine}-{its}-10.99.0.2")
    wait_until(lambda: "ECP_256" in swanctl(lab.hosts[0], "--list-sas"))
    time.sleep(0.5)
    sent, lost = continuous.sent_and_lost()
    assert sent > 100
    assert lost == 0, f"{lost} of {sent} lost"
    assert [(host.env, charon_pid(host)) for host in lab.hosts] == before
    assert all("repaired" not in line for host in lab.hosts for line in host.log())


def test_without_charon_packets_are_dropped_and_with_it_all_is_back(make_lab, capture, psk):
    lab = make_lab(config=network_config("ipsec", PSK=psk))
    h1, h2 = lab.hosts
    first, second = lab.containers
    assert lab.ping(patience=20).unreachable == []
    captured = capture(lab)
    # Host 2 loses daemon and charon: what each side sends goes nowhere, and not plain.
    h2.kill_daemon()
    killed = charon_pid(h2)
    subprocess.run(["kill", "-9", str(killed)], check=True)
    wait_until(lambda: "ipsec0" not in h2.exec(["ip", "-br", "link"]).stdout)
    assert mark(second, first)[0] != 0
    assert mark(first, second)[0] != 0
    # From the host itself, with an address that is not of its subnet, too.
    assert ping(h2, first.address(4), "-I", "10.99.0.2", "-p", MARKER.hex(), count=1)[0] != 0
    h2.start_daemon()
    assert charon_pid(h2) != killed
    assert lab.ping(patience=20).unreachable == []
    # With a daemon it is back by itself.
    subprocess.run(["kill", "-9", str(charon_pid(h1))], check=True)
    wait_until(lambda: "charon has ended" in "".join(h1.log()) or "repaired: IKE daemon" in "".join(h1.log()))
    assert lab.ping(patience=20).unreachable == []
    assert mark(first, second)[0] == 0
    nothing_plain(captured.stop(), least=6)


def test_a_peer_leaves_terms_change_and_all_is_removed(make_lab, psk):
    lab = make_lab(config=network_config("ipsec", PSK=psk), hosts=3)
    h1, h2, h3 = lab.hosts
    assert lab.ping(patience=20).unreachable == []
    gone = str(h3.gateways[0].network)
    assert gone in swanctl(h1, "--list-conns")
    h3.stop_daemon()
    delete(lab, lease_key(h3))
    wait_until(lambda: gone not in swanctl(h1, "--list-conns") + swanctl(h1, "--list-sas"))
    wait_until(lambda: gone not in h1.exec(["ip", "route", "show", "table", "all"]).stdout)
    assert str(h2.gateways[0].network) in swanctl(h1, "--list-sas")

    assert "AES_GCM_16-128" in swanctl(h1, "--list-sas")
    put(lab, f"{PREFIX}/config", network_config("ipsec", PSK=psk[::-1], ESPProposal="aes256gcm16-ecp384"))
    wait_until(
        lambda: "AES_GCM_16-256" in swanctl(h1, "--list-sas") and "AES_GCM_16-128" not in swanctl(h1, "--list-sas")
    )
    wait_until(lambda: ping(lab.containers[0], lab.containers[1].address(4))[0] == 0)

    pid = charon_pid(h1)
    h1.stop_daemon()
    done = h1.exec([*h1.argv(), "--cleanup"])
    assert done.returncode == 0, done.stderr
    assert not vici_socket(h1).parent.exists()
    left = h1.exec(["sh", "-c", "ip -br link; ip rule; ip route show table all; ip xfrm policy"]).stdout
    for trace in ("ipsec0", "220", "proto 87", str(h2.gateways[0].network), "xfrm", "tmpl"):
        assert trace not in left, left
    with pytest.raises(FileNotFoundError):  # a zombie has none either
        os.readlink(f"/proc/{pid}/exe")


def test_certificates(make_lab, capture, tmp_path):
    """Each host has its own files at the same place. Who has a certificate for another address, or by another authority,
    is not let in."""
    shared = tmp_path / "own"
    shared.mkdir()
    files = {key: str(shared / name) for key, name in (("CertFile", "cert"), ("KeyFile", "key"), ("CAFile", "ca"))}
    argv = "--iface={iface} --subnet-file={subnet_file} --etcd-prefix={etcd_prefix} --store={store}"
    command = f"unshare -m --propagation slave sh -c 'mount --bind {{dir}}/own {shared} && exec {shlex.join(own_flanneld())} {argv}'"
    lab = make_lab(
        config=network_config("ipsec", Auth="cert", **files, ESP="user"), hosts=4, start=[], daemons={"*": command}
    )
    ca, other = tmp_path / "ca", tmp_path / "other"
    for authority in (ca, other):
        openssl(
            "req",
            "-x509",
            *NEW,
            "-days",
            "2",
            "-subj",
            f"/CN={authority.name}",
            "-keyout",
            f"{authority}.key",
            "-out",
            authority,
        )
    for host, authority, address in (
        ("h1", ca, "10.99.0.1"),
        ("h2", ca, "10.99.0.2"),
        ("h3", ca, "10.99.0.33"),
        ("h4", other, "10.99.0.4"),
    ):
        own = lab.host(host).directory / "own"
        own.mkdir(parents=True)
        issue(tmp_path, own, authority, address)
        (own / "ca").write_bytes(ca.read_bytes())
    captured = capture(lab)
    lab.join(lab.hosts)
    one, two, three, four = lab.containers
    wait_until(lambda: mark(one, two)[0] == 0)
    sent, received = transfer(two, one, megabytes=5)
    assert sent == received
    assert "ECDSA" in lab.hosts[0].exec(["sh", "-c", f"cat {vici_socket(lab.hosts[0]).parent}/charon.log"]).stdout
    for impostor in (three, four):
        assert mark(one, impostor)[0] != 0
        assert mark(impostor, two)[0] != 0
    nothing_plain(captured.stop(), least=3000)


NEW = ("-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


def openssl(*words):
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


def issue(scratch, own, authority, address):
    request, extension = scratch / "request", scratch / "extension"
    extension.write_text(f"subjectAltName=IP:{address}\n")
    openssl("req", *NEW, "-subj", f"/CN={address}", "-keyout", own / "key", "-out", request)
    openssl(
        "x509",
        "-req",
        "-in",
        request,
        "-CA",
        authority,
        "-CAkey",
        f"{authority}.key",
        "-days",
        "2",
        "-extfile",
        extension,
        "-out",
        own / "cert",
    )


def test_a_daemon_without_strongswan_says_what_to_install(make_lab, psk):
    lab = make_lab(config=network_config("ipsec", PSK=psk), hosts=1, start=[])
    (host,) = lab.hosts
    hide = "mount -t tmpfs none /usr/lib/ipsec && exec"
    done = host.exec(["unshare", "-m", "sh", "-c", f"{hide} {' '.join(host.argv())}"])
    assert done.returncode == 1
    assert (
        "the ipsec backend needs strongSwan's charon, which is not installed (on Debian: apt-get install" in done.stderr
    )
    assert psk not in done.stderr
