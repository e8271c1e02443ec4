"""A scenario: how many hosts, which store and config, and which faults when; made from a seed, kept as JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import get_args

import msgspec

from simulator import faults as f
from simulator.faults import AnyFault, Kind, What
from simulator.wire import Cut


class Timed(msgspec.Struct, frozen=True):
    """A fault, and the second at which it begins."""

    at: float
    fault: AnyFault


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """One run. seed: of everything left to chance within it. spread: seconds over which the hosts start.

    audit, probe: see host.Tempo. rest: seconds without a fault at the end, after all has settled. spare: subnets of the pool
    beyond one for each host.
    """

    seed: int
    hosts: int
    members: int = 1
    backend: str = "vxlan"
    spread: float = 2.0
    audit: float = 60.0
    probe: float = 60.0
    rest: float = 0.0
    spare: int = 200
    faults: tuple[Timed, ...] = ()

    def encode(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self), indent=1)

    @classmethod
    def decode(cls, text: bytes | str) -> Scenario:
        return msgspec.json.decode(text, type=cls)


BACKENDS = ("vxlan", "vxlan", "vxlan", "host-gw", "ipip", "udp")

CONFIGS = (
    {"Backend": {"Type": "vxlan", "VNI": 7}},
    {"Backend": {"Type": "vxlan"}},
    {"Backend": {"Type": "vxlan", "Port": 4789}},
    {"Backend": {"Type": "vxlan", "DirectRouting": False, "MTU": 1400}},
    {"Backend": {"Type": "host-gw"}},
    {"Backend": {"Type": "host-gw"}},
    {"Backend": {"Type": "ipip"}},
    {"Backend": {"Type": "udp"}},
    {"Network": "10.4.0.0/16"},
    {"SubnetLen": 25},
    {"SubnetLen": 22},
    {"SubnetMin": "10.3.100.0"},
    {"Network": "10.4.0.0/16", "SubnetLen": 26, "Backend": {"Type": "host-gw"}},
)

BAD_CONFIGS = (
    "",
    "{",
    "[]",
    '{"Network": "10.3.0.0/16", "SubnetLen": 31}',
    '{"Network": "10.3.0.0/16", "Backend": {"Type": "?"}}',
)


def generate(seed: int, *, hosts: int | None = None, faults: int | None = None) -> Scenario:
    """The scenario of a seed. hosts, faults: as many and not as the seed has it."""
    rng = random.Random(f"scenario {seed}")
    size = hosts or rng.choice((2, 3, 4, 5, 6, 8, 10))
    long = rng.random() < 0.1 and size <= 6
    many = faults if faults is not None else rng.choice((1, 1, 2, 3, 4, 5, 6))
    at = rng.choice((0.0, rng.uniform(0, 3), rng.uniform(20, 60)))
    timed = []
    for _ in range(many):
        fault = _fault(rng, size, long=long)
        timed.append(Timed(round(at, 3), fault))
        at += rng.choice(
            (0.0, rng.uniform(0, 2), rng.uniform(0, 30), rng.uniform(0, 200), fault.lasts + rng.uniform(0, 5))
        )
        if rng.random() < 0.15:
            at += fault.lasts + 1000.0  # a quiet time, in which all has to be well
    slow = 1800.0 if long else rng.choice((60.0, 60.0, 20.0, 300.0))
    return Scenario(
        seed=seed,
        hosts=size,
        members=rng.choice((1, 3)),
        backend=rng.choice(BACKENDS),
        spread=rng.choice((0.0, 0.5, 10.0)),
        audit=slow,
        probe=1800.0 if long else 60.0,
        rest=rng.choice((30.0, 50.0)) * 3600 if long else rng.choice((0.0, 0.0, 1800.0)),
        spare=rng.choice((1, 3, 10, 200)),
        faults=tuple(timed),
    )


def _fault(rng: random.Random, hosts: int, *, long: bool) -> AnyFault:
    host = rng.randint(1, hosts)
    anyone = rng.choice((0, host, host))
    short = round(rng.choice((rng.uniform(0.1, 5), rng.uniform(5, 60), rng.uniform(60, 600))), 2)
    hours = round(rng.choice((short, rng.uniform(1, 10) * 3600)), 2) if long else short
    # An agent that can't reach the store asks every few seconds: hours of that are simulated for one host, and seldom.
    lasts = hours if rng.random() < 0.2 else short
    part = rng.choice((0.1, 0.3, 0.6))
    member = rng.randint(1, 3)
    cuts: tuple[Cut, ...] = ("silent", "refused")
    cut = rng.choice(cuts)
    makers: tuple[tuple[int, Callable[[], AnyFault]], ...] = (
        (
            6,
            lambda: f.Partition(
                host=host if lasts > 600 else anyone, member=rng.choice((0, 0, member)), cut=cut, lasts=lasts
            ),
        ),
        (3, lambda: f.SlowAnswers(host=anyone, seconds=rng.choice((0.1, 1.0, 4.0)), lasts=short)),
        (4, lambda: f.LostMessages(host=anyone, requests=rng.choice((0.0, part)), answers=part, lasts=short)),
        (3, lambda: f.DisorderedEvents(host=anyone, repeat=rng.choice((0.0, part)), swap=part, lasts=short)),
        (3, f.CompactWhileCut),
        (3, lambda: f.CompactAfterRead(host=anyone, times=rng.randint(1, 3))),
        (3, lambda: f.StaleMember(member=member, lasts=short)),
        (2, lambda: f.LaggingMember(member=member, seconds=rng.choice((0.05, 1.0, 10.0)), lasts=short)),
        (4, lambda: f.StoreDown(member=rng.choice((0, member)), frozen=rng.random() < 0.3, lasts=short)),
        (2, lambda: f.DataLoss(lasts=round(rng.choice((0.5, 20.0, 200.0)), 2))),
        (3, lambda: f.Restore(age=rng.choice((1.0, 30.0, 300.0, 3600.0)), busy=rng.choice((0, 1, 5, 40)))),
        (6, lambda: f.Crash(host=anyone, steps=rng.choice((0, rng.randint(1, 20), rng.randint(1, 200))), lasts=short)),
        (
            6,
            lambda: f.CrashWhileStarting(
                host=host, steps=rng.choice((rng.randint(1, 25), rng.randint(1, 200))), lasts=short
            ),
        ),
        (3, lambda: f.Reboot(host=anyone, forgets=rng.random() < 0.7, lasts=hours)),
        (4, lambda: f.Joins(count=rng.randint(1, 3))),
        (2, lambda: f.Leaves(host=host)),
        (2, lambda: f.Stopped(host=host, lasts=hours)),
        (2, lambda: f.Suspended(host=host, lasts=hours)),
        (2, lambda: f.ClockJump(host=anyone, seconds=rng.choice((-1, 1)) * rng.choice((60.0, 90_000.0, 4e8)))),
        (3, lambda: f.Clone(host=host, own_address=rng.random() < 0.5, same_boot=rng.random() < 0.3, lasts=short)),
        (2, lambda: f.Rename(host=host)),
        (3, lambda: f.AddressChange(host=host, restart=rng.random() < 0.5)),
        (6, lambda: f.ConfigChange(keys=json.dumps(rng.choice(CONFIGS)), lasts=rng.choice((0.0, 0.0, short)))),
        (2, lambda: f.BadConfig(text=rng.choice(BAD_CONFIGS), lasts=short)),
        (3, lambda: f.BadKey(name=rng.randrange(9), value=rng.randrange(9), lasts=short)),
        (4, lambda: f.Meddling(host=anyone, what=rng.choice(_MEDDLING))),
        (4, lambda: f.Flush(host=anyone, kind=rng.choice(_KINDS), seen=rng.random() < 0.6)),
    )
    return rng.choices([make for _, make in makers], [weight for weight, _ in makers])[0]()


_MEDDLING: tuple[What, ...] = get_args(What)
_KINDS: tuple[Kind, ...] = get_args(Kind)
