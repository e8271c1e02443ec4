"""What a picture is made of: figures and states by themselves, and a real daemon's view when no other host answers."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import pytest

from support.interop import sh
from support.keys import wait_until
from support.pictures import Serving, Simulated, generated
from wincey.http.client import HttpClient
from wincey.lab.namespace import call_in
from wincey.model.report import PeerReport, PeerTrafficReport, ProbeReport, TrafficReport, WayReport
from wincey.model.socketpath import SOCKET_VARIABLE
from wincey.observe.apilisten import Token
from wincey.web.gather import Api, DaemonLeases, Gatherer
from wincey.web.picture import FULL_MESH, MOST_LINKS, Known, Look, count_peers, draw, rates


def counted(received, sent, device="flannel.1"):
    rest = dict.fromkeys(
        f"{way}_{what}" for way in ("receive", "transmit") for what in ("packets", "errors", "dropped")
    )
    rest = dict.fromkeys(rest, 0)
    return TrafficReport(device=device, receive_bytes=received, transmit_bytes=sent, **rest)


def test_rates_are_of_the_time_between_two_looks():
    assert rates([counted(1000, 50)], [counted(4000, 50)], 2.0) == {"flannel.1": (1500.0, 0.0)}
    assert rates([], [counted(4000, 50)], 2.0) == {}
    assert rates([counted(9000, 50)], [counted(10, 60)], 2.0) == {}  # a new device of the same name
    assert rates([counted(1, 1)], [counted(2, 2)], 0.0) == {}


def test_what_went_between_two_hosts_is_of_the_time_between_two_counts():
    def looked(at, before, *figures):
        look = Look("", at=at)
        made = [
            PeerTrafficReport(subnet="10.5.2.0/24", packets_to=0, bytes_to=to, packets_from=0, bytes_from=back)
            for to, back in figures
        ]
        count_peers(look, before, made)
        return look

    first = looked(10.0, None, (100, 0))
    assert first.peer_rates == {}
    second = looked(15.0, first, (1100, 500))
    assert second.peer_rates == {"10.5.2.0/24": (200.0, 100.0)}
    same = looked(18.0, second, (1100, 500))  # not counted anew yet
    assert same.peer_rates == second.peer_rates
    assert looked(25.0, same, (2100, 500)).peer_rates == {"10.5.2.0/24": (100.0, 0.0)}
    assert looked(25.0, same, (10, 5)).peer_rates == {}  # its daemon began anew
    assert looked(25.0, same).peer_rates == {}


def known(number):
    return Known(f"10.5.{number}.0/24", [f"10.5.{number}.0/24"], [f"192.0.2.{number}"], "vxlan")


def peer(number, *, rtt=0.001, loss=0.0, troubles=(), probed=True):
    way = WayReport(asked=20, loss=loss, rtt=rtt)
    return PeerReport(
        lease=f"10.5.{number}.0-24",
        subnets=[f"10.5.{number}.0/24"],
        public=[f"192.0.2.{number}"],
        backend="vxlan",
        objects=[],
        troubles=list(troubles),
        probe=ProbeReport(ago=1.0, inner=way, outer=way, mtu=1450, promised=1450) if probed else None,
    )


def states(peers, hosts=3):
    made = draw(
        [known(number) for number in range(1, hosts + 1)],
        {known(1).id: Look("", peers=peers)},
        source="",
        every=3,
        notes=[],
    )
    return {link.b: link.state for link in made.links}


def test_a_link_is_as_well_as_its_worse_end_says():
    second, third = known(2).id, known(3).id
    assert states([peer(2), peer(3)]) == {second: "ok", third: "ok"}
    assert states([peer(2, loss=0.2, troubles=["20% lost"]), peer(3)])[second] == "warn"
    assert states([peer(2, rtt=None, loss=1.0, troubles=["no answer"])]) == {second: "bad"}
    assert states([peer(2), peer(99)]) == {second: "ok"}  # of a host whose lease has just gone


def test_a_large_network_has_only_links_that_say_something():
    peers = [peer(2), peer(3, probed=False), peer(4, probed=False, troubles=["no route"])]
    assert len(states(peers, FULL_MESH)) == 3
    assert states(peers, FULL_MESH + 1) == {known(2).id: "ok", known(4).id: "bad"}


def test_a_picture_has_a_bounded_number_of_links():
    """Those in trouble first, then the watched host's."""
    hosts = range(1, 102)
    looks = {known(each).id: Look("", peers=[peer(other) for other in hosts if other != each]) for each in hosts}
    looks[known(101).id].peers[49] = peer(50, troubles=["15% lost"], loss=0.15)
    made = draw([known(each) for each in hosts], looks, source="", every=3, notes=[], watched=known(100).id)
    assert (len(made.links), made.untold) == (MOST_LINKS, 101 * 100 // 2 - MOST_LINKS)
    assert {made.links[0].a, made.links[0].b, made.links[0].state} == {known(50).id, known(101).id, "warn"}
    assert sum(known(100).id in {each.a, each.b} for each in made.links) == 100


@pytest.mark.root
def test_without_tokens_this_host_tells_and_the_others_are_leases(make_lab):
    lab = make_lab(hosts=2)
    first, second = (str(host.gateways[0].network) for host in lab.hosts)
    socket = lab.hosts[0].environment[SOCKET_VARIABLE]
    wait_until(lambda: second in sh(lab.hosts[0], "ip route"))

    async def look():
        local = Api(f"unix://{socket}")
        gatherer = Gatherer(DaemonLeases(local, None, socket), None, local)
        try:
            made = await gatherer.picture()
            return made, await gatherer.explain(first, second.replace("0/24", "2"))
        finally:
            await gatherer.close()

    made, explained = call_in(lab.hosts[0].netns, lambda: asyncio.run(look()))
    hosts = {each.id: each for each in made.hosts}
    assert {id_: host.state for id_, host in hosts.items()} == {first: "ok", second: "lease"}
    assert hosts[second].public == ["10.99.0.2"]
    assert "--api-listen" in hosts[second].told
    assert [(link.backend, len(link.ways)) for link in made.links] == [("vxlan", 1)]
    assert made.networks == ["10.5.0.0/16"]
    assert explained.reaches
    # The command that people use, on that host.
    lab.hosts[0].exec([WINCEY, "web", "--help"], check=True)
    web = lab.hosts[0].popen(
        [WINCEY, "web"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, SOCKET_VARIABLE: socket},
    )
    try:
        url = web.stdout.readline().split()[4]
        answered = lab.hosts[0].exec(["curl", "-s", f"{url}v1/picture"])
        assert {each["id"] for each in json.loads(answered.stdout)["hosts"]} == {first, second}
    finally:
        web.send_signal(signal.SIGINT)
        assert web.wait(20) == 0
        web.stdout.close()


WINCEY = os.path.join(os.path.dirname(sys.executable), "wincey")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--listen=0.0.0.0:8470"], "needs --page-token-file"),
        (["--socket=/nonsense", "--listen=192.0.2.1:1", "--page-token-file=/nonsense"], "--page-token-file /nonsense"),
        (["--listen=fd://3"], "must be HOST:PORT"),
        (["--store=sqlite:/dev/null/x", "--token-file=/nonsense"], "/nonsense"),
    ],
)
def test_a_wrong_command_line_is_one_line(given, words):
    done = subprocess.run([WINCEY, "web", *given], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode in {1, 2}
    assert words in done.stderr
    assert "Traceback" not in done.stderr


async def get(url, target, **headers):
    client = HttpClient(url.rstrip("/"))
    try:
        return await client.request("GET", target, headers=headers)
    finally:
        await client.close()


async def test_who_gets_the_page_and_who_the_picture(tmp_path):
    token = "0123456789abcdef"
    (tmp_path / "token").write_text(token)
    with Serving(Simulated(generated(3)), Token(str(tmp_path / "token"), "--page-token-file")) as serving:
        page = await get(serving.url, "/")
        assert page.status == 200
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert b"://" not in page.body  # no asset of anybody else's
        for word, status in (("", 401), (token, 200), (token + "x", 401)):
            headers = {"authorization": f"Bearer {word}"} if word else {}
            assert (await get(serving.url, "/v1/picture", **headers)).status == status
    with Serving(Simulated(generated(3))) as serving:
        assert (await get(serving.url, "/v1/picture")).status == 200
        # Another site's name that leads to loopback.
        assert (await get(serving.url, "/v1/picture", host="rebinding.example:8470")).status == 421
        assert (await get(serving.url, "/v1/nonsense")).status == 404
        assert (await get(serving.url, "/../pyproject.toml")).status == 404
