"""Pictures of networks that don't exist, for the page: generated hosts, the same ones for the same number."""

import asyncio
import random
import threading

from wincey.model.report import ContainerReport, ExplainReport, StepReport
from wincey.web.picture import Device, HostPicture, LinkPicture, Picture, WayPicture
from wincey.web.server import Page


def generated(count, *, links_each=6, every=0.5):
    """`count` hosts: most are well, some not, some known by their lease only."""
    rng = random.Random(count)
    hosts, links = [], []
    for number in range(count):
        subnet = f"10.{64 + number // 250}.{number % 250 + 1}.0"
        state = rng.choices(["ok", "warn", "bad", "lease"], [92, 3, 1.5, 3.5])[0]
        known = state != "lease"
        speed = 10 ** rng.uniform(3, 8.5)
        trouble = {"warn": "3 objects repaired in the last minute: another program changes them"}
        trouble["bad"] = f"route 10.64.9.0/24 via 10.64.9.0 dev flannel.1: Network is unreachable ({subnet})"
        hosts.append(
            HostPicture(
                id=f"{subnet}/24",
                name=f"node-{number + 1:03}" if known else f"192.0.{number // 250}.{number % 250 + 1}",
                public=[f"192.0.{number // 250}.{number % 250 + 1}"],
                subnets=[f"{subnet}/24"],
                backend="vxlan",
                state=state,
                told="" if known else "192.0.2.7:8471: connection refused",
                troubles=[trouble[state]] if state in trouble else [],
                version="0.1.0" if known else "",
                up=90_000.0 + number,
                mtu=1450 if known else 0,
                interface="eth0, MTU 1500" if known else "",
                left=80_000.0 if known else None,
                objects=3 * count if known else 0,
                devices=[Device("flannel.1", speed, speed * rng.uniform(0.2, 2), 0, 0)] if known else [],
                containers=[
                    ContainerReport(
                        address=f"{subnet.removesuffix('0')}{at + 2}", device="cni0", mac=f"0a:58:0a:00:00:{at:02x}"
                    )
                    for at in range(rng.randrange(2, 24) if known else 0)
                ],
            )
        )
    for number, host in enumerate(hosts):
        for other in rng.sample(hosts[number + 1 :], min(links_each, count - number - 1)):
            state = "ok" if host.state == other.state == "ok" and rng.random() > 0.004 else "warn"
            state = "bad" if "bad" in {host.state, other.state} and rng.random() < 0.4 else state
            state = "ok" if state == "warn" and rng.random() < 0.9 else state
            ways = [
                WayPicture(
                    start=one.id,
                    end=two.id,
                    rtt=None if state == "bad" else rng.uniform(0.0001, 0.002),
                    loss={"ok": 0.0, "warn": 0.15, "bad": 1.0}[state],
                    mtu=None if state == "bad" else 1450,
                    promised=1450,
                    through=True,
                    objects=[f"route {two.subnets[0]} via {two.subnets[0][:-3]} dev flannel.1"],
                    troubles=[] if state == "ok" else ["15% of the last 20 requests were lost"],
                )
                for one, two in ((host, other), (other, host))
                if one.state != "lease"
            ]
            links.append(LinkPicture(a=host.id, b=other.id, state=state, backend="vxlan", ways=ways))
    return Picture(
        network="",
        networks=["10.64.0.0/10"],
        source=f"a generator: {count} simulated hosts",
        every=every,
        notes=[],
        hosts=hosts,
        links=links,
    )


class Simulated:
    """What a Page takes in place of a Gatherer. asked: the explanations that were asked for. looks: how often it was read."""

    def __init__(self, picture):
        self.shown, self.asked, self.looks = picture, [], 0

    async def picture(self, watched=""):
        self.looks += 1
        return self.shown

    async def explain(self, start, address):
        self.asked.append((start, address))
        step = StepReport(what="route", text=f"route to {address} dev flannel.1", ok=True)
        return ExplainReport(network="", address=address, reaches=True, breaks_at="", steps=[step])


class Serving:
    """A page on loopback, served by a thread of its own for as long as it is entered; `url`."""

    def __init__(self, shown, token=None):
        self._shown, self._token = shown, token

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        page = Page(self._shown, self._token)
        self._page = page
        port = asyncio.run_coroutine_threadsafe(page.listen("127.0.0.1", 0), self._loop).result(20)
        self.url = f"http://127.0.0.1:{port}/"
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._page.close(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
