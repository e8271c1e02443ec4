"""The page in a real Chromium: with three real hosts, and with 200 and 1,000 simulated ones.

It makes the pictures of docs/images/page-*.png where WINCEY_PICTURES names a directory: WINCEY_PICTURES=docs/images.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from playwright.sync_api import sync_playwright

from support.certs import Authority
from support.keys import wait_until
from support.pictures import Serving, Simulated, generated
from wincey.observe.apilisten import Token

pytestmark = pytest.mark.slow

PICTURES = os.environ.get("WINCEY_PICTURES")  # not at each run: the tree would change
WINCEY = os.path.join(os.path.dirname(sys.executable), "wincey")
TOKEN = "0123456789abcdef0123"
SIZE = {"width": 1240, "height": 760}
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
]


@contextlib.contextmanager
def browser(executable=None):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium (Debian package chromium)")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=executable or chromium, args=FLAGS)
        try:
            yield found
        finally:
            found.close()


@contextlib.contextmanager
def opened(found, url, scheme="light", **options):
    """A page of a browser, in which neither script nor policy may fail."""
    context = found.new_context(viewport=SIZE, color_scheme=scheme, reduced_motion="reduce", **options)
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    try:
        page.goto(url)
        yield page
        assert [each for each in errors if "401" not in each] == []
    finally:
        context.close()


def shoot(page, name):
    page.mouse.move(1, 1)
    taken = page.screenshot(path=Path(PICTURES) / f"page-{name}.png" if PICTURES else None)
    assert taken.startswith(b"\x89PNG")
    assert len(taken) > 20_000, "there is something in it"


@pytest.mark.root
def test_three_real_hosts(make_lab, tmp_path):
    authority = Authority(tmp_path / "tls", addresses=["10.99.0.1", "10.99.0.2", "10.99.0.3"])
    made = authority.issue("host")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    lab = make_lab(
        "vxlan",
        hosts=3,
        containers=2,
        options=(
            "--api-listen=:8471",
            f"--api-certfile={made.cert}",
            f"--api-keyfile={made.key}",
            f"--api-token-file={tmp_path / 'token'}",
            "--probe",
            "--probe-interval=1",
            "--metrics-peers=10",
        ),
    )
    store = lab.node("store")
    for source, target in zip(lab.containers, lab.containers[2:] + lab.containers[:2], strict=True):
        assert source.exec(["ping", "-c", "2", "-i", "0.1", "-W", "2", target.address(4)]).returncode == 0
    wrapper = tmp_path / "chromium"
    wrapper.write_text(f'#!/bin/sh\nexec ip netns exec {store.netns} {shutil.which("chromium")} "$@"\n')
    wrapper.chmod(0o755)
    web = store.popen(
        [
            WINCEY,
            "web",
            f"--store={lab.store.url}",
            f"--token-file={tmp_path / 'token'}",
            f"--cafile={authority.ca}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        url = re.search(r"http://\S+", web.stdout.readline())[0]
        with browser(str(wrapper)) as chromium, opened(chromium, url) as page:
            page.wait_for_selector(".node.ok >> nth=2")
            # The round trips that --probe found, and the containers, come with a later look.
            page.wait_for_function("() => document.getElementById('summary').textContent.includes('6 containers')")
            page.wait_for_function(
                "() => fetch('v1/picture').then(a => a.json()).then(p => p.links.length == 3 &&"
                " p.links.every(l => l.ways.length == 2 && l.ways.every(w => w.rtt > 0 && w.mtu == 1450)))",
                polling=500,
            )
            # --probe's own packets are traffic as well.
            page.wait_for_function(
                "() => fetch('v1/picture').then(a => a.json()).then(p => p.links.every(l => l.ways.some(w => w.send > 0)))",
                polling=500,
            )
            source, target = lab.hosts[0], lab.containers[2]
            subnet = str(source.gateways[0].network)
            page.fill("#search", lab.containers[0].address(4))  # inside the subnet: finds its host
            page.press("#search", "Enter")
            detail = page.locator("#detail")
            assert subnet in detail.inner_text()
            assert "cni0" in detail.inner_text()
            page.fill("#search", "")
            detail.locator("input").fill(target.address(4))
            detail.get_by_role("button", name="Explain", exact=True).click()
            page.wait_for_selector(".steps li >> nth=5")
            assert "Nothing keeps packets to" in detail.inner_text()
            assert "in VXLAN, VNI 1, from 10.99.0.1 to UDP port 8472" in detail.inner_text()
            page.wait_for_function("() => document.querySelectorAll('.node .under').length == 6")
            shoot(page, "3-hosts-light")
            page.get_by_role("button", name="Colours: auto").click()
            page.get_by_role("button", name="Colours: light").click()
            shoot(page, "3-hosts-dark")
            # A daemon that is gone: its host is known by its lease, and stays where it is.
            lab.hosts[2].stop_daemon()
            page.wait_for_selector(".node.lease")
            assert page.locator(".node").count() == 3
            assert subnet in detail.inner_text()  # what was selected still is
    finally:
        web.send_signal(signal.SIGTERM)
        assert web.wait(20) == 0
        web.stdout.close()


def test_two_hundred_and_a_thousand_simulated_hosts(tmp_path):
    simulated = Simulated(generated(200, links_each=3))
    with browser() as chromium:
        with Serving(simulated) as serving:
            with opened(chromium, serving.url) as page:
                page.wait_for_selector(".node >> nth=199")
                shoot(page, "200-hosts-light")
                by_keyboard(page, simulated)
                by_table(page, simulated)
            with opened(chromium, serving.url, "dark") as page:
                page.wait_for_selector(".node >> nth=199")
                assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(14, 20, 27)"
                broken = next(each for each in simulated.shown.hosts if each.state == "bad")
                page.fill("#search", broken.name)
                page.press("#search", "Enter")
                assert broken.troubles[0] in page.locator("#detail").inner_text()
                page.fill("#search", "")
                shoot(page, "200-hosts-dark")
        (tmp_path / "token").write_text(TOKEN)
        shown = Simulated(generated(1000, links_each=4, every=1.0))
        with Serving(shown, Token(str(tmp_path / "token"), "--page-token-file")) as serving:
            with opened(chromium, serving.url) as page:
                for word, done in (("wrong-token-that-is-long", False), (TOKEN, True)):
                    page.wait_for_selector("#login[open]")
                    page.fill("#token", word)
                    page.press("#token", "Enter")
                    page.wait_for_selector(".node >> nth=999" if done else "#refused:not(:empty)")
            with opened(chromium, f"{serving.url}#token={TOKEN}") as page:
                page.wait_for_selector(".node >> nth=999")
                assert "token" not in page.url
                page.keyboard.press("/")
                page.keyboard.type("node-777")
                page.wait_for_function("() => document.querySelectorAll('.node:not(.faded)').length == 1")
                page.keyboard.press("Enter")
                page.wait_for_selector("#detail h2")
                looks = shown.looks
                wait_until(lambda: (page.wait_for_timeout(50), shown.looks > looks + 1)[1])
                assert "node-777" in page.locator("#detail h2").inner_text()


def by_keyboard(page, simulated):
    focused = "document.activeElement.dataset.id"
    page.locator("#whole").focus()
    page.locator("#tab-links").focus()
    page.keyboard.press("Tab")  # the colours
    page.keyboard.press("Tab")
    first = page.evaluate(focused)
    assert first == simulated.shown.hosts[0].id
    assert re.search(r"node-001, 10\.64\.1\.0/24", page.evaluate("document.activeElement.getAttribute('aria-label')"))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    there = page.evaluate(focused)
    assert there not in {first, None}
    assert page.locator(".node[tabindex='0']").count() == 1  # one stop for Tab
    assert (
        page.evaluate("getComputedStyle(document.activeElement.querySelector('.halo')).strokeWidth") == "4px"
    )  # the focus is seen
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "detail"
    name = next(each.name for each in simulated.shown.hosts if each.id == there)
    assert name in page.locator("#detail h2").inner_text()
    looks = simulated.looks
    wait_until(lambda: (page.wait_for_timeout(50), simulated.looks > looks + 1)[1])
    assert name in page.locator("#detail h2").inner_text()  # a refresh takes neither selection nor focus
    assert page.evaluate("document.activeElement.id") == "detail"
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail", state="hidden")
    assert page.evaluate(focused) == there


def by_table(page, simulated):
    page.get_by_role("tab", name="Hosts").click()
    assert page.locator("tbody tr").count() == 200
    page.get_by_role("button", name="State").click()
    assert page.locator("tbody tr >> nth=0 >> .badge").inner_text() == "broken"
    page.locator("tbody tr >> nth=3").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    chosen = page.locator("#detail h2").inner_text().split("\n")[0]
    assert page.locator("tr.chosen").count() == 1
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.tagName") == "TR"
    page.fill("#search", "10.64.7.9")  # no name: an address inside of a subnet
    assert page.locator("tbody tr").count() == 1
    assert "10.64.7.0/24" in page.locator("tbody tr").inner_text()
    page.fill("#search", "")
    page.get_by_role("tab", name="Links").click()
    assert page.locator("tbody tr").count() == len(simulated.shown.links)
    page.locator("tbody tr >> nth=0").click()
    assert "Round trip" in page.locator("#detail").inner_text()
    page.locator("#detail").get_by_role("button", name="Explain", exact=True).first.click()
    page.wait_for_selector(".steps li")
    assert simulated.asked
    page.keyboard.press("Escape")
    page.get_by_role("tab", name="Map").click()
    assert chosen


def test_the_generated_picture_is_what_the_page_is_given():
    """A picture that the real types can't read would prove nothing."""
    shown = generated(50)
    assert msgspec.json.decode(msgspec.json.encode(shown), type=type(shown)) == shown
