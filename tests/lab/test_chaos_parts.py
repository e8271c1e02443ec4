"""The parts of the fault lab, each by itself: the clock of one process, the bad cable, what counts as lost."""

import email.utils
import http.client
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wincey.lab.chaos.catalogue import SCENARIOS
from wincey.lab.chaos.clock import move_clock
from wincey.lab.chaos.traffic import Way
from wincey.lab.process import Process

CLOCKS = """
import sys, time
for _ in sys.stdin:
    print(time.time(), time.monotonic(), flush=True)
"""
CABLE = """
import sys
from wincey.lab.chaos.cable import Weather, carry
carry((int(sys.argv[1]), int(sys.argv[2])), Weather(*map(float, sys.argv[3:])))
"""
DAY = 86_400

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the clock of a process is moved on x86_64 only")


def process_of(pid):
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return Process(pid, int(fields[19]))


@x86
@pytest.mark.root
def test_the_wall_clock_of_one_process_jumps_and_its_monotonic_clock_goes_on():
    with subprocess.Popen(
        [sys.executable, "-c", CLOCKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:

        def ahead():
            program.stdin.write("\n")
            program.stdin.flush()
            wall, monotonic = map(float, program.stdout.readline().split())
            return wall - time.time(), monotonic - time.monotonic()

        assert ahead() == pytest.approx((0, 0), abs=5)
        process = process_of(program.pid)
        for seconds in (DAY, -DAY, 3, 0):
            move_clock(process, seconds)
            assert ahead() == pytest.approx((seconds, 0), abs=2)
        program.stdin.close()


@x86
@pytest.mark.root
@pytest.mark.etcd
def test_the_wall_clock_of_etcd_jumps(own_etcd):
    """A Go program, which asks no library; its HTTP server tells its time."""

    def ahead():
        connection = http.client.HTTPConnection("127.0.0.1", own_etcd.port, timeout=5)
        connection.request("GET", "/health")
        date = connection.getresponse().headers["Date"]
        connection.close()
        return email.utils.parsedate_to_datetime(date).timestamp() - time.time()

    assert abs(ahead()) < 10
    process = process_of(own_etcd.pid)
    move_clock(process, DAY)
    assert ahead() == pytest.approx(DAY, abs=10)
    assert own_etcd.healthy()
    move_clock(process, -DAY)
    assert ahead() == pytest.approx(-DAY, abs=10)


class Cable:
    def __init__(self, *weather):
        self.near, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.far, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for each in (near, far):
            each.setblocking(False)
        words = [str(near.fileno()), str(far.fileno()), *map(str, weather)]
        self.program = subprocess.Popen([sys.executable, "-c", CABLE, *words], pass_fds=(near.fileno(), far.fileno()))
        near.close()
        far.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.program.kill()
        self.program.wait()
        self.near.close()
        self.far.close()

    def through(self, count, wanted):
        """How many of `count` frames come out at the far end, until `wanted` have, or nothing more comes."""
        for number in range(count):
            self.near.send(bytes([number]) * 60)
        self.far.settimeout(20)  # for the program to start
        got = []
        try:
            while len(got) < wanted:
                got.append(self.far.recv(100)[0])
                self.far.settimeout(1)
        except TimeoutError:
            pass
        return got


def test_a_cable_that_does_nothing_keeps_frames_and_their_order():
    with Cable(0, 0, 0) as cable:
        assert cable.through(5, 6) == [0, 1, 2, 3, 4]


def test_a_cable_that_doubles():
    with Cable(0, 0, 1) as cable:
        assert cable.through(4, 9) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_cable_that_loses_half_and_takes_its_time():
    with Cable(0.3, 0.5, 0) as cable:
        begin = time.monotonic()
        got = cable.through(100, 100)
        assert time.monotonic() - begin > 0.3
        assert 20 < len(got) < 80
        assert got == sorted(got)


def way(*answered):
    """Ten requests, a second apart, of which some were answered."""
    found = Way(("h1", "h2"), None, None, None, 0)
    found.sent += [float(at) for at in range(10)]
    found.answered.update(answered)
    return found


def test_what_is_lost_and_since_when_it_is_well():
    whole = way(*range(10))
    assert (whole.lost(), whole.well_since(4.5), whole.silence()) == ([], 5.0, 0.0)
    gap = way(0, 1, 2, 6, 7, 9)
    assert gap.lost() == [3.0, 4.0, 5.0, 8.0]
    assert (gap.well_since(4.5), gap.silence()) == (9.0, 4.0)
    still = way(0, 1)
    assert (still.well_since(0.0), len(still.lost())) == (None, 8)


def test_requests_are_sent_with_a_right_checksum_and_counted_even_without_a_way_out():
    """The kernel of a container answers none with a wrong one."""
    sent = []

    class Sender:
        def sendto(self, packet, address):
            sent.append(packet)
            raise OSError(101, os.strerror(101))

    class Target:
        def address(self, family):
            return "10.5.1.2"

    asking = Way(("h1", "h2"), None, Target(), Sender(), 7)
    asking.ask(b"12345678")
    assert len(asking.lost()) == 1
    words = [int.from_bytes(sent[0][at : at + 2], "big") for at in range(0, len(sent[0]), 2)]
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert total == 0xFFFF
    assert words[2] == 7


def test_the_page_tells_of_every_scenario():
    page = (Path(__file__).parents[2] / "docs" / "chaos.md").read_text()
    assert [name for name, each in SCENARIOS.items() if f"| `{name}` | {each.does} |" not in page] == []
