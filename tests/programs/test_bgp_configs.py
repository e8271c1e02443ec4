"""What is written for BIRD and FRR, judged by the programs themselves, and what is read from their answers."""

import subprocess

import pytest

from support.bgp import needs_bird_and_frr
from wincey.model.address import Subnet, parse_address
from wincey.model.bgp import Accepted, BgpPeer, BgpRoute, BgpSession, BgpSpeaker
from wincey.model.secret import Secret
from wincey.programs.bgp import bird, frr
from wincey.programs.bgp.check import Check
from wincey.programs.bgp.md5 import rejected
from wincey.programs.bgp.session import Session


def ip(text):
    return parse_address(text)


def net(text):
    return Subnet.parse(text)


def speaker(**changes):
    values = {
        "daemon": "bird",
        "instance": "own",
        "asn": 64512,
        "port": 179,
        "router_id": ip("10.99.0.1"),
        "local": ip("10.99.0.1"),
        "local_v6": ip("fd00:99::1"),
        "subnets": (net("10.3.1.0/24"), net("fd00:3:0:1::/64")),
        "accepted": (Accepted(net("10.3.0.0/16"), 24), Accepted(net("fd00:3::/48"), 64)),
    }
    return BgpSpeaker(**(values | changes))


PEERS = [
    BgpPeer(ip("10.99.0.2"), 64512, 179, (net("10.3.2.0/24"),)),
    BgpPeer(ip("fd00:99::2"), 64512, 179, (net("fd00:3:0:2::/64"),)),
    BgpPeer(ip("10.99.0.254"), 64512, 179),
    BgpPeer(ip("fd00:99::ff"), 64512, 179),
    BgpPeer(ip("10.99.0.253"), 65000, 1790),
]
SIGNS = "".join(chr(code) for code in range(33, 127) if chr(code) not in "\"'?\\")[:80]
SPEAKERS = [
    speaker(),
    speaker(password=Secret(SIGNS), bfd=True, hold=3, port=1179, asn=4294967294),
    speaker(local_v6=None, subnets=(net("10.3.1.0/24"),), accepted=(Accepted(net("10.3.0.0/16"), 24),)),
]


def fitting(who):
    return [peer for peer in PEERS if who.local_v6 or len(peer.address) == 4]


@needs_bird_and_frr
@pytest.mark.root
@pytest.mark.parametrize("who", SPEAKERS, ids=["plain", "all", "ipv4"])
def test_bird_takes_it(tmp_path, who):
    path = tmp_path / "bird.conf"
    path.write_text(bird.config(who, fitting(who), str(tmp_path / "log")))
    done = subprocess.run(["/usr/sbin/bird", "-p", "-c", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@needs_bird_and_frr
@pytest.mark.root
def test_bird_takes_it_beside_what_a_host_has(tmp_path):
    who = speaker(instance="host", include=str(tmp_path / "wincey.conf"), control="x")
    (tmp_path / "wincey.conf").write_text(bird.config(who, PEERS, ""))
    path = tmp_path / "bird.conf"
    path.write_text(
        f'router id 1.2.3.4;\nprotocol device {{ }}\nprotocol kernel {{ ipv4 {{ export all; }}; }}\ninclude "{who.include}";\n'
    )
    done = subprocess.run(["/usr/sbin/bird", "-p", "-c", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@needs_bird_and_frr
@pytest.mark.root
@pytest.mark.parametrize("who", SPEAKERS, ids=["plain", "all", "ipv4"])
def test_frr_takes_it(tmp_path, who):
    path = tmp_path / "bgpd.conf"
    path.write_text(frr.config(who, fitting(who), str(tmp_path / "log")))
    command = ["/usr/lib/frr/bgpd", "-C", "-S", "-Z", "-f", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    known = "Graceful restart configuration changed, reset all peers to take effect\n"
    assert (done.returncode, (done.stdout + done.stderr).replace(known, "")) == (0, "")


def test_a_host_may_announce_its_own_subnet_only():
    text = bird.config(speaker(), PEERS, "log")
    assert "import where net ~ [ 10.3.2.0/24 ];" in text
    assert text.count("import filter wincey_import4;") == 2  # the routers
    assert "if net = 10.3.1.0/24 then reject;\n  if net ~ [ 10.3.0.0/16{24,24} ] then accept;" in text
    lines = frr.config(speaker(), PEERS, "log").splitlines()
    assert "ip prefix-list wincey-10.99.0.2 seq 1 permit 10.3.2.0/24" in lines
    assert "  neighbor 10.99.0.2 prefix-list wincey-10.99.0.2 in" in lines
    assert "  neighbor 10.99.0.254 prefix-list wincey-accepted4 in" in lines
    assert "ip prefix-list wincey-accepted4 seq 100 permit 10.3.0.0/16 ge 24 le 24" in lines


def test_frr_is_told_of_changed_neighbours_only():
    first, second, router = PEERS[0], PEERS[1], PEERS[2]
    moved = BgpPeer(first.address, 64512, 179, (net("10.3.9.0/24"),))
    old = {peer.address: peer for peer in (first, second)}
    lines = frr.changes(speaker(), old, {peer.address: peer for peer in (moved, second, router)})
    assert not any("fd00:99::2" in line for line in lines)
    gone = lines.index(" no neighbor 10.99.0.2")
    assert gone < lines.index("ip prefix-list wincey-10.99.0.2 seq 1 permit 10.3.9.0/24")
    assert " neighbor 10.99.0.254 remote-as 64512" in lines
    assert frr.changes(speaker(), old, old) == []


def test_sessions_of_bird():
    text = """Name       Proto      Table      State  Since         Info
wincey_own4 Static     master4    up     06:44:08.421
wincey_10_99_0_2 BGP        ---        up     06:44:09.501  Established
wincey_10_99_0_254 BGP        ---        start  2026-11-21 06:44:09  Active        Socket: Connection refused
other_10_99_0_253 BGP        ---        up     06:44:09.501  Established
wincey_fd00_99__2 BGP        ---        down   06:44:09.501"""
    assert bird.sessions(text.splitlines(), PEERS) == {
        ip("10.99.0.2"): Session("Established"),
        ip("10.99.0.254"): Session("Active", "Socket: Connection refused"),
        ip("fd00:99::2"): Session("down"),
    }


def test_sessions_of_frr():
    text = """{"ipv4Unicast": {"as": 1, "peers": {"10.99.0.2": {"state": "Established"}, "eth7": {"state": "Idle"}}},
        "ipv6Unicast": {"peers": {"fd00:99::2": {"state": "Active"}}}}"""
    assert frr.sessions(text) == {ip("10.99.0.2"): Session("Established"), ip("fd00:99::2"): Session("Active")}
    assert frr.sessions("{}") == frr.sessions("% BGP instance not found") == {}


def test_dropped_signatures_are_counted(tmp_path):
    path = tmp_path / "netstat"
    path.write_text(
        "TcpExt: SyncookiesSent TCPMD5NotFound TCPMD5Unexpected TCPMD5Failure Other\nTcpExt: 9 1 2 4 8\n"
        "IpExt: InNoRoutes\nIpExt: 5\n"
    )
    assert rejected(path) == 7
    assert rejected(tmp_path / "none") == 0


ROUTE = BgpRoute(net("10.3.2.0/24"), gateway=ip("10.99.0.2"), neighbour=ip("10.99.0.2"))
BEHIND = BgpRoute(net("10.3.3.0/24"), gateway=ip("10.99.0.3"))
ROUTER = BgpSession(ip("10.99.0.254"))
UP, DOWN = Session("Established"), Session("Active", "Socket: No route to host")


def judge(expected, learned=None, sessions=None, patience=10.0):
    """The findings once the patience is over."""
    check = Check(patience)
    world = {item.key: item for item in expected}, learned or {}, sessions or {}
    assert check.judge(*world, now=100.0) == {}
    assert check.judge(*world, now=109.0) == {}
    return [(str(item.object), item.reason, item.told) for item in check.judge(*world, now=110.0).values()]


def test_all_in_order():
    learned = {ROUTE.subnet: frozenset([ROUTE.gateway]), BEHIND.subnet: frozenset([BEHIND.gateway])}
    assert judge([ROUTE, BEHIND, ROUTER], learned, {ROUTER.address: UP}) == []


def test_a_lease_without_a_route():
    [(what, why, told)] = judge([ROUTE], sessions={ROUTE.neighbour: DOWN})
    assert what == "BGP route 10.3.2.0/24 via 10.99.0.2"
    assert why == "the session with 10.99.0.2 is not up: Active (Socket: No route to host)"
    assert told
    [(_, why, _)] = judge([ROUTE], sessions={ROUTE.neighbour: UP})
    assert why == "10.99.0.2 has not announced it"
    [(_, why, _)] = judge([ROUTE])
    assert "not known to the routing daemon" in why


def test_another_next_hop():
    [(_, why, _)] = judge([ROUTE], {ROUTE.subnet: frozenset([ip("10.99.0.66")])})
    assert why == "was taught with another next hop: 10.99.0.66"
    v6 = BgpRoute(net("fd00:3:0:2::/64"), gateway=ip("fd00:99::2"))
    assert judge([v6], {v6.subnet: frozenset([ip("fe80::1")])}) == []


def test_a_route_without_a_lease():
    [(what, why, _)] = judge([], {net("10.3.7.0/24"): frozenset([ip("10.99.0.66")])})
    assert what == "BGP route 10.3.7.0/24 via 10.99.0.66"
    assert "no lease knows" in why


def test_a_router_that_is_down_is_one_line():
    findings = judge([BEHIND, ROUTER], sessions={ROUTER.address: DOWN})
    assert [(what, told) for what, _, told in findings] == [
        ("BGP session with 10.99.0.254", True),
        ("BGP route 10.3.3.0/24 via 10.99.0.3", False),
    ]
    [(what, why, told)] = judge([BEHIND, ROUTER], sessions={ROUTER.address: UP})
    assert (what, why, told) == ("BGP route 10.3.3.0/24 via 10.99.0.3", "the routers have not announced it", True)


def test_what_comes_and_goes_has_its_time_anew():
    check, expected = Check(10.0), {ROUTE.key: ROUTE}
    learned = {ROUTE.subnet: frozenset([ROUTE.gateway])}
    assert check.judge(expected, {}, {}, now=0.0) == {}
    assert check.pending(0.0)
    assert check.judge(expected, learned, {}, now=9.0) == {}
    assert not check.pending(9.0)
    assert check.judge(expected, {}, {}, now=11.0) == {}
    assert check.judge(expected, {}, {}, now=21.0).keys() == {ROUTE.key}
    assert not check.pending(21.0)
