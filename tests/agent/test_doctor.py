"""The parts of `wincey doctor` that need no host: order, rules of packet filters, checks on made-up hosts, secrets."""

import json
import tarfile

import msgspec
import pytest

from wincey.agent.doctor.bundle import HIDDEN, config_secrets, without_secrets, write_bundle
from wincey.agent.doctor.checks import CHECKS, diagnose
from wincey.agent.doctor.facts import Answered, Daemon, Facts, Network, Peer, Store
from wincey.agent.doctor.finding import CAUSES, Finding, exit_code, ordered
from wincey.agent.doctor.rules import Packet, dropped, read_iptables, read_nft
from wincey.model.address import Subnet, parse_address

ONE, TWO = parse_address("10.99.0.1"), parse_address("10.99.0.2")
PEER = Peer(
    subnets=[Subnet.parse("10.5.2.0/24")],
    public=TWO,
    backend="vxlan",
    left=80_000.0,
    way="eth0",
    way_mtu=1500,
    inner=Answered(3, 0),
    outer=Answered(3, 0),
    mtu=1450,
    promised=1450,
    seen_from=[TWO],
    macs=["02:00:00:00:00:02"],
)
NETWORK = Network(
    ranges=[Subnet.parse("10.5.0.0/16")],
    backend="vxlan",
    mtu=1450,
    underlay="eth0",
    local=[ONE],
    public=[],
    own=[Subnet.parse("10.5.1.0/24")],
    left=80_000.0,
    leased=True,
    devices=["flannel.1"],
    port=8472,
    peers=[PEER],
)
FACTS = Facts(daemon=Daemon(state="answers"), networks=[NETWORK], sysctls={"net/ipv4/ip_forward": "1"})


def with_network(**changes):
    return msgspec.structs.replace(FACTS, networks=[msgspec.structs.replace(NETWORK, **changes)])


def with_peer(**changes):
    return with_network(peers=[msgspec.structs.replace(PEER, **changes)])


def test_a_healthy_host_has_no_findings():
    assert diagnose(FACTS) == []


def test_the_worst_first_and_causes_before_consequences():
    late, early = Finding("error", "mtu", "b"), Finding("error", "device", "a")
    minor = Finding("warning", "daemon", "c")
    assert ordered([minor, late, early, late]) == [early, late, minor]
    assert [exit_code(each) for each in ([], [minor], [late, minor], [Finding("note", "nat", "")])] == [0, 1, 2, 0]
    assert len(CHECKS) > 15
    assert len(set(CAUSES)) == len(CAUSES)


@pytest.mark.parametrize(
    ("facts", "name", "words"),
    [
        (with_network(backend="udp", peers=[]), None, ""),
        (with_network(failures=["vxlan device flannel.1: not supported"]), "kernel", "not supported"),
        (with_network(left=600.0), "lease", "ends in 10 min"),
        (with_network(left=100_000.0), "clock", "more than a lease ever gets"),
        (with_network(repaired=100), "drift", "100 objects"),
        (with_network(surplus=["route 10.5.9.0/24"]), "state", "stale"),
        (with_network(public=[TWO]), "nat", "behind NAT"),
        (with_peer(mtu=1300), "mtu", "larger than 1300"),
        (with_peer(inner=Answered(3, 1)), "peer", "1 of 3"),
        (with_peer(refusal="no route to host"), "underlay", "no route to host"),
        (with_peer(way_mtu=1400), "mtu", "has MTU 1400"),
        (msgspec.structs.replace(FACTS, store=Store(asked=True, name="etcd", took=3.0)), "store", "3.0 s"),
        (
            msgspec.structs.replace(FACTS, counters={"total.Udp.InCsumErrors": 500, "total.Udp.InDatagrams": 1000}),
            "checksum",
            "500 UDP packets",
        ),
        (
            msgspec.structs.replace(with_network(backend="udp", peers=[]), features={"/dev/net/tun": False}),
            "kernel",
            "/dev/net/tun",
        ),
    ],
)
def test_a_check_finds_its_fault(facts, name, words):
    found = diagnose(facts)
    assert [each.name for each in found] == ([name] if name else [])
    assert all(words in each.evidence for each in found)


FORWARDED = Packet(parse_address("10.5.1.2"), parse_address("10.5.2.2"), "cni0", "flannel.1")
WRAPPED = Packet(TWO, ONE, "eth0", "", "udp", 8472)


@pytest.mark.parametrize(
    ("rules", "packet", "hook", "words"),
    [
        ("-P FORWARD DROP", FORWARDED, "forward", "policy"),
        ("-P FORWARD DROP\n-A FORWARD -s 10.5.0.0/16 -j ACCEPT", FORWARDED, "forward", ""),
        ("-P FORWARD DROP\n-N OK\n-A OK -i cni+ -j ACCEPT\n-A FORWARD -j OK", FORWARDED, "forward", ""),
        ("-P FORWARD ACCEPT\n-A FORWARD ! -i cni0 -j DROP", FORWARDED, "forward", ""),
        ("-P INPUT ACCEPT\n-A INPUT -p udp -m multiport --dports 53,8000:9000 -j REJECT", WRAPPED, "input", "--dports"),
        ("-P INPUT ACCEPT\n-A INPUT -p tcp --dport 8472 -j DROP", WRAPPED, "input", ""),
        ("-P INPUT ACCEPT\n-A INPUT -m limit --limit 3/min -j DROP", WRAPPED, "input", ""),
        ("-P INPUT DROP\n-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", WRAPPED, "input", "policy"),
    ],
)
def test_rules_of_iptables(rules, packet, hook, words):
    found = dropped(read_iptables("iptables-legacy", "filter", rules), hook, packet)
    assert words in found
    assert bool(found) == bool(words)


def test_rules_of_nft():
    def match(left, right, op="=="):
        return {"match": {"op": op, "left": left, "right": right}}

    port = {"payload": {"protocol": "udp", "field": "dport"}}
    source = {"payload": {"protocol": "ip", "field": "saddr"}}
    base = {"family": "inet", "table": "fw"}

    def rule(*expressions):
        return {"rule": {**base, "chain": "input", "handle": 4, "expr": list(expressions)}}

    def chains(policy, *rules):
        chain = {**base, "name": "input", "type": "filter", "hook": "input", "prio": 0, "policy": policy}
        return read_nft({"nftables": [{"chain": chain}, *rules]})

    drop, accept = {"drop": None}, {"accept": None}
    assert dropped(chains("drop"), "input", WRAPPED)
    assert not dropped(
        chains("drop", rule(match(port, {"set": [53, {"range": [8000, 9000]}]}), accept)), "input", WRAPPED
    )
    prefix = {"prefix": {"addr": "10.99.0.0", "len": 24}}
    assert dropped(chains("accept", rule(match(source, prefix), {"counter": {}}, drop)), "input", WRAPPED)
    assert not dropped(chains("accept", rule(match(source, prefix, "!="), drop)), "input", WRAPPED)
    assert not dropped(chains("accept", rule({"limit": {}}, drop)), "input", WRAPPED)


SECRETS = {
    "flags": "flanneld --etcd-password hunter2secretly --etcd-endpoints=http://root:pa55word@10.0.0.1:2379",
    "json": json.dumps({"Backend": {"Type": "ipsec", "PSK": "c0ffeec0ffeec0ffee"}}),
    "env": "FLANNELD_ETCD_PASSWORD=letmein123",
    "header": "Authorization: Bearer abcdef.ghijkl-mnop",
    "wireguard": "PrivateKey = yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=",
    "pem": "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIabcdefgh\n-----END EC PRIVATE KEY-----",
    "log": "the value is planted-known-secret, as given",
}
PLANTED = (
    "hunter2secretly",
    "pa55word",
    "c0ffeec0ffee",
    "letmein123",
    "abcdef.ghijkl",
    "yAnz5TF",
    "MHcCAQEE",
    "planted-known-secret",
)


def test_a_bundle_holds_no_secrets(tmp_path):
    path = tmp_path / "report.tar.gz"
    write_bundle(str(path), {f"{name}.txt": text for name, text in SECRETS.items()}, ["planted-known-secret"])
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as archive:
        texts = {each.name: archive.extractfile(each).read().decode() for each in archive.getmembers()}
    assert "wincey-doctor/uname.txt" in texts
    everything = "\n".join(texts.values())
    assert not [each for each in PLANTED if each in everything]
    assert HIDDEN in texts["wincey-doctor/json.txt"]
    assert "10.0.0.1:2379" in everything
    with pytest.raises(FileExistsError):
        write_bundle(str(path), {})


def test_what_is_no_secret_stays():
    text = "route 10.5.2.0/24 via 10.5.2.0 dev flannel.1\nip saddr 10.5.0.0/16 counter accept # handle 4"
    assert without_secrets(text) == text


def test_secrets_of_the_config_are_known_by_value():
    raw = json.dumps({"Backend": {"Type": "ipsec", "PSK": "quiet", "Keys": [{"AuthToken": ["hush"]}]}}).encode()
    known = config_secrets(raw)
    assert known == ["quiet", "hush"]
    assert config_secrets(b"{") == []
    assert without_secrets("they say quiet, hush", known) == f"they say {HIDDEN}, {HIDDEN}"
