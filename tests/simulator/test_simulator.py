"""The simulator: what it promises of itself, past failures, fresh seeds, and mutants that it must catch."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from simulator.forwarding import Station, obstacle
from simulator.kernel import Kernel
from simulator.loop import Process, VirtualLoop, running
from simulator.mutants import MUTANTS, hunt
from simulator.scenario import Scenario, Timed, generate
from simulator.shrink import broken, shrink
from simulator.world import World

from simulator import faults as f
from wincey.model.address import Subnet, parse_address
from wincey.model.state import FdbEntry, Link, Neighbor, Route, RuleSet, Vxlan

ROOT = Path(__file__).parents[2]
KEPT = sorted(Path(__file__).with_name("scenarios").glob("*.json"))
FRESH = 20


def scenario(*timed, hosts=3, **fields):
    return Scenario(**{"seed": 1, "hosts": hosts, "faults": tuple(Timed(at, fault) for at, fault in timed)} | fields)


# Past failures and fresh seeds


@pytest.mark.parametrize("path", KEPT, ids=[path.stem for path in KEPT])
def test_what_once_failed_does_not_fail_any_more(path):
    assert World(Scenario.decode(path.read_bytes())).run().violations == []


def test_fresh_seeds():
    start = int.from_bytes(os.urandom(5), "big")
    print(f"seeds {start} to {start + FRESH - 1}")
    for seed in range(start, start + FRESH):
        violations = World(generate(seed)).run().violations
        assert violations == [], f'make sim ARGS="--seed {seed}" shows it'


def test_an_agent_that_dies_at_any_of_its_steps_comes_back():
    """At every await of a start beside another that stays; CrashWhileStarting is at the step of that number."""
    starts = []
    for step in range(1, 26):
        world = World(scenario((40.0, f.CrashWhileStarting(host=1, steps=step, lasts=1.0)), seed=1, hosts=2))
        assert world.run().violations == [], step
        starts.append(world.hosts[0].starts)
    # Started, killed and started, dead at that step and started once more: until a start has no step of that number.
    assert starts == sorted(starts, reverse=True)
    assert starts.count(3) > 12
    assert starts[-1] == 2


# Mutants


@pytest.mark.parametrize(
    ("name", "seed", "invariant"),
    [
        ("move_at_will", 2, "a host keeps its subnet"),
        ("forget_to_renew", 8, "a lease is kept"),
        ("create_regardless", 25, "a lease is kept"),
        ("drop_one_event", 3, "every pair reaches each other"),
        ("ignore_removals", 1, "the kernel is as wanted"),
    ],
)
def test_mutants_are_caught(name, seed, invariant):
    caught = hunt(name, seed, 1)
    assert caught
    assert (caught.invariant, caught.took) == (invariant, "1")


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("copied-machine-with-its-own-address", "keep_double_mac"),
        ("restart-with-another-address", "keep_double_mac"),
        ("restored-store-after-a-deletion", "trust_deletions"),
        ("a-bad-key-that-stays", "bad_key_empties"),
        ("a-member-that-stays-stale", "never_probe"),
    ],
)
def test_past_failures_would_be_found_again(name, mutant):
    kept = Scenario.decode((Path(__file__).parent / "scenarios" / f"{name}.json").read_bytes())
    with MUTANTS[mutant].applied():
        assert broken(kept)


def test_a_failure_shrinks_to_what_it_needs():
    large = scenario(
        (35.0, f.ClockJump(host=2, seconds=60.0)),
        (40.0, f.Clone(host=2, own_address=True, lasts=1.5)),
        (41.0, f.SlowAnswers(host=1, seconds=0.1, lasts=5.0)),
        hosts=5,
        rest=1800.0,
        members=3,
    )
    with MUTANTS["keep_double_mac"].applied():
        small = shrink(large, lambda candidate: bool(broken(candidate)))
        assert broken(small)
    assert [type(timed.fault) for timed in small.faults] == [f.Clone]
    assert (small.hosts, small.members, small.rest) == (2, 1, 0.0)


# What it promises of itself


def test_one_seed_is_one_history_whatever_the_process():
    """Two processes whose hashes of texts differ tell the same, line by line."""
    told = []
    for number in ("1", "2"):
        command = [sys.executable, "-m", "simulator", "--seed", "4711", "--mermaid"]
        environment = os.environ | {"PYTHONHASHSEED": number, "PYTHONPATH": str(ROOT / "src")}
        told.append(
            subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        )
    assert told[0] == told[1]
    assert "sequenceDiagram" in told[0]
    assert told[0].count("the agent starts") >= 2
    assert generate(4711) == generate(4711) != generate(4712)


def test_several_processes_share_the_runs():
    command = [sys.executable, "-m", "simulator", "--start", "4711", "--runs", "3", "--hosts", "2", "--processes", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "3 runs, seeds 4711 to 4713: 0 failed" in done.stdout, done.stderr
    assert done.returncode == 0


def test_scenarios_are_kept_as_json():
    made = [generate(seed) for seed in range(300)]
    assert [Scenario.decode(each.encode()) for each in made] == made
    kinds = {type(timed.fault) for each in made for timed in each.faults}
    assert kinds == set(f.Fault.__subclasses__()), "every fault comes up"


def test_time_is_virtual_and_each_process_has_its_own():
    loop = VirtualLoop()
    woken = {}

    async def sleeper(process, name):
        await asyncio.sleep(100)
        woken[name] = loop.now, asyncio.get_running_loop().time()

    with running(loop):
        processes = {name: Process(name) for name in ("awake", "stopped", "suspended", "dead")}
        for name, process in processes.items():
            loop.spawn(sleeper(process, name), process)
        loop.run_until(50)
        for name in ("stopped", "suspended"):
            processes[name].stopped = True
        processes["dead"].crash()
        loop.run_until(150)
        loop.resume(processes["stopped"])
        loop.resume(processes["suspended"], slept=100.0)
        loop.run_until(300)
        loop.bury()
    assert woken["awake"] == (100, 100)
    assert woken["stopped"] == (150, 150)
    assert woken["suspended"] == (200, 100)  # its clock stood still for as long
    assert "dead" not in woken


# Packets are followed through the kernels


@pytest.fixture
def stations():
    made = []
    for number, other in ((1, 2), (2, 1)):
        kernel = Kernel(random.Random(number))
        own, theirs = (Subnet.parse(f"10.3.{place}.0/24") for place in (number, other))
        address, remote = (parse_address(f"10.99.0.{place}") for place in (number, other))
        mac, their_mac = (bytes((2, 0, 0, 0, 0, place)) for place in (number, other))
        for item in (
            Link("flannel.1", "vxlan", 1450, mac=mac, vxlan=Vxlan(1, 8472, address, "eth0")),
            Neighbor("flannel.1", theirs.address, their_mac),
            FdbEntry("flannel.1", their_mac, remote),
            Route(theirs, "flannel.1", gateway=theirs.address, onlink=True),
            RuleSet(Subnet.parse("10.3.0.0/16"), own, masquerade=True, forward=True),
        ):
            assert kernel.put(item) == ("", "")
        made.append(Station(f"h{number}", address, kernel, own))
    return made


def way(stations):
    return obstacle(stations[0], stations[1], {station.address: station for station in stations})


def test_a_packet_gets_there(stations):
    assert way(stations) == ""


@pytest.mark.parametrize(
    ("host", "item", "reason"),
    [
        (0, Route(Subnet.parse("10.3.2.0/24"), "flannel.1", gateway=parse_address("10.3.2.0")), "nobody has"),
        (0, Neighbor("flannel.1", parse_address("10.3.2.0"), b""), "knows no MAC"),
        (0, FdbEntry("flannel.1", bytes((2, 0, 0, 0, 0, 2)), b""), "does not know where"),
        (
            0,
            RuleSet(Subnet.parse("10.3.0.0/16"), Subnet.parse("10.3.1.0/24"), masquerade=True, forward=True),
            "no rules",
        ),
        (1, Link("flannel.1", "vxlan", 1450), "h2 has no vxlan device"),
        (1, Route(Subnet.parse("10.3.1.0/24"), "flannel.1", gateway=parse_address("10.3.1.0")), "reverse-path filter"),
    ],
    ids=["route", "neighbor", "fdb", "rules", "device", "way back"],
)
def test_a_packet_is_lost_without(stations, host, item, reason):
    stations[host].kernel.remove(item.key)
    assert reason in way(stations)


def test_a_packet_is_lost_to_a_wrong_mac_address_and_to_a_route_onward(stations):
    kernel = stations[1].kernel
    kernel.put(Route(Subnet.parse("10.3.2.0/25"), "eth0", gateway=parse_address("10.99.0.1")))
    assert "sends 10.3.2.2 on" in way(stations)
    kernel.remove((Route.tag, Subnet.parse("10.3.2.0/25"), "unicast"))
    kernel.put(
        Link(
            "flannel.1", "vxlan", 1450, mac=bytes((2, 0, 0, 0, 0, 9)), vxlan=Vxlan(1, 8472, stations[1].address, "eth0")
        )
    )
    assert "is 02:00:00:00:00:09, not 02:00:00:00:00:02" in way(stations)
