"""`wincey lab chaos`: some of its scenarios, and that it sees what must not be. The whole table is `wincey lab chaos all`."""

import json
import os
import re
import signal
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from wincey.lab import Lab
from wincey.lab.chaos import run
from wincey.lab.chaos.catalogue import SCENARIOS
from wincey.lab.chaos.run import run_scenario
from wincey.lab.chaos.scenario import NotHere, Scenario
from wincey.lab.errors import LabError
from wincey.lab.lab import lab_names
from wincey.lab.report import silent

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.timeout(240)]

IN_CI = ["etcd-leader-killed", "card-readdressed"]


@pytest.fixture
def sandbox(sandbox):
    """With a short path: a daemon's socket has 108 bytes for its own."""
    with tempfile.TemporaryDirectory(prefix="c-") as directory:
        sandbox.root = Path(directory) / "l"
        yield sandbox
        for name in lab_names(sandbox.root):
            Lab.open(name, root=sandbox.root).down()


def test_scenarios_as_a_program_reads_them(sandbox):
    done = sandbox.wincey("chaos", *IN_CI, "--json", timeout=220)
    document = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, document["passed"], document["failed"]) == (0, len(IN_CI), 0), done.stdout + done.stderr
    killed, readdressed = document["scenarios"]
    assert [each["name"] for each in document["scenarios"]] == IN_CI
    for each in document["scenarios"]:
        assert each["whole"]["sent"] > 50
        assert each["whole"]["lost"] == 0
        assert each["heal_ms"] >= 0
    assert (killed["whole"]["pairs"], killed["affected"]["pairs"]) == (6, 0)
    assert killed["followed_ms"] > 0
    assert (readdressed["whole"]["pairs"], readdressed["affected"]["pairs"]) == (2, 4)
    assert readdressed["affected"]["lost"] > 0
    assert sandbox.leftovers() == []
    assert not sandbox.root.exists()


@contextmanager
def _wrong_host(world):
    """What the scenario says is not what it does."""
    world.host("h3").kill_daemon()
    world.pull("h2")
    yield
    world.plug("h2")


def test_a_violation_is_seen_and_told(sandbox):
    scenario = Scenario(
        name="worse",
        does="more than it says",
        expects="too much",
        fault=_wrong_host,
        affected=("h1",),
        hold=1,
        patience=2,
    )
    result = run_scenario(scenario, backend="host-gw", root=sandbox.root, report=silent)
    assert result.passed is False
    assert result.whole.pairs == 2
    assert result.whole.lost > 10
    assert result.affected.lost > 10
    assert result.silence_ms > 800
    assert result.heal_ms is None
    assert re.search(r"\d+ packets from h2c1 to h3c1 lost", result.reason)
    assert "not as wanted 2 s after the fault: the daemon of h3 does not run" in result.reason
    assert sandbox.leftovers() == []


@pytest.mark.parametrize(
    ("error", "passed", "reason"),
    [
        (NotHere("no moon tonight"), None, "no moon tonight"),
        (LabError("no etcd"), False, "could not be run: no etcd"),
    ],
)
def test_what_can_not_be_run_is_left_out_or_failed(monkeypatch, tmp_path, error, passed, reason):
    downs = []

    class NoWorld:
        def __init__(self, spec, **_):
            self.spec = spec

        def up(self):
            pass

        def down(self):
            downs.append(self.spec.name)

    def prepare(world):
        raise error

    monkeypatch.setattr(run, "World", NoWorld)
    scenario = msgspec.structs.replace(SCENARIOS["card-down"], prepare=prepare)
    result = run_scenario(scenario, backend="vxlan", root=tmp_path, report=silent)
    assert (result.name, result.passed, result.reason) == ("card-down", passed, reason)
    assert len(downs) == 1


def test_an_interruption_leaves_nothing_behind(sandbox):
    program = subprocess.Popen(
        sandbox.argv("chaos", "etcd-leader-paused"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        name = None
        for line in program.stderr:
            if found := re.match(r"making (lab-\w+):", line):
                name = found[1]
            if line.startswith("etcd-leader-paused:"):
                break
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=60)
        assert program.returncode == 130
        assert "Traceback" not in errors
        assert name
        assert [each for each in os.listdir("/run/netns") if name in each] == []
        assert not sandbox.root.exists()
    finally:
        program.kill()
        program.wait()


def test_names_are_known_or_suggested(sandbox):
    listed = sandbox.wincey("chaos", "--list", "--json")
    rows = json.loads(listed.stdout)["scenarios"]
    assert [row["name"] for row in rows] == list(SCENARIOS)
    assert all(row["does"] and row["expects"] for row in rows)
    wrong = sandbox.wincey("chaos", "card-donw")
    assert wrong.returncode == 2
    assert "no scenario 'card-donw'" in wrong.stderr
    assert "did you mean card-down?" in wrong.stderr
    none = sandbox.wincey("chaos")
    assert none.returncode == 2
    assert "wincey lab chaos --list" in none.stderr
