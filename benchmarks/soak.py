"""Half an hour of a busy life: memory, descriptors, threads and tasks must stay flat, and the kernel must equal the store.

One flanneld and a real etcd in a namespace of their own, with many leases of which some are replaced each second (half of them
change their address and MAC, half go and others come). Now and then the store's history is compacted, etcd is killed or stopped
and starts again with its history compacted at once, and `ip route flush` takes all routes. Leases live for five minutes instead
of a day, so that the daemon's own lease and claim are renewed many times. Figures are sampled every few seconds; after the
warm-up their slope (Theil and Sen) must not add up to more than the bounds. At the end the kernel's table is compared with what
the leases ask for, object by object. The exit code is 1 where something is not as it must be.

    sudo .venv/bin/python benchmarks/soak.py [--minutes 30] [--leases 10000] [--backend vxlan] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from scale import window
from scale.arena import end, inside, needs, run
from scale.daemon import Daemon, wait
from scale.etcd import Etcd, fill
from scale.leases import LAST_OF_PEERS, Peer, config
from scale.steady import judge
from scale.table import DEVICES, routes, table

SAMPLE_EVERY = 5.0
COMPACT_EVERY, FLUSH_EVERY, RESTART_EVERY = 60.0, 170.0, 290.0
SETTLES_WITHIN = 60.0
"""Seconds that the kernel's table has for equalling the store, when churn has ended."""


class Soak:
    """The life of one daemon. per_second: leases replaced."""

    def __init__(self, scratch: Path, count: int, backend: str, per_second: int, seed: int) -> None:
        self._rng = random.Random(seed)  # noqa: S311  # which lease is replaced is no secret
        self._backend, self._per_second = backend, per_second
        self._live = [Peer(number) for number in range(count)]
        self._free = list(range(count, min(LAST_OF_PEERS, 3 * count + 1000)))
        self._etcd = Etcd(scratch / "etcd")
        self._window = scratch / "window"
        self._revision = 0
        self._scratch = scratch
        self.counts = {"replaced": 0, "compactions": 0, "flushes": 0, "restarts": 0}
        self.samples: list[dict[str, float]] = []

    def run(self, seconds: float) -> list[str]:
        """Live that long; what is wrong at the end."""
        self._etcd.start()
        try:
            fill(self._etcd, self._live, self._backend, config(self._backend))
            environment = {"WINDOW_FILE": str(self._window), "WINDOW_TTL": "300"}
            command = [sys.executable, str(window.__file__), "--subnet-lease-renew-margin=1"]
            daemon = Daemon(command, self._scratch, self._backend, environment)
            try:
                ready = daemon.ready(len(self._live))
                print(f"ready after {ready:.2f} s with {len(self._live)} leases", file=sys.stderr, flush=True)
                self._live_on(daemon, seconds)
                return self._compare(daemon)
            finally:
                daemon.stop()
        finally:
            self._etcd.stop()

    def _live_on(self, daemon: Daemon, seconds: float) -> None:
        started = told = time.monotonic()
        due = {"sample": started, "compact": started + 20, "flush": started + 40, "restart": started + 75}
        while (now := time.monotonic()) < started + seconds:
            self._replace()
            for what, every, action in (
                ("compact", COMPACT_EVERY, self._compact),
                ("flush", FLUSH_EVERY, self._flush),
                ("restart", RESTART_EVERY, self._restart),
            ):
                if now >= due[what]:
                    due[what] = now + every
                    action()
            if now >= due["sample"]:
                due["sample"] = now + SAMPLE_EVERY
                self._sample(daemon, now - started)
            if now >= told + 60:
                told = now
                print(f"{now - started:6.0f} s  {self.samples[-1]}  {self.counts}", file=sys.stderr, flush=True)
            time.sleep(max(0.0, now + 1 - time.monotonic()))

    def _replace(self) -> None:
        gone: list[Peer] = []
        come: list[Peer] = []
        for turn in range(self._per_second):
            place = self._rng.randrange(len(self._live))
            peer = self._live[place]
            if peer in come:
                continue
            if turn % 2:
                new = peer._replace(turn=peer.turn + 1)
            else:
                gone.append(peer)
                new = Peer(self._free.pop(self._rng.randrange(len(self._free))))
            come.append(new)
            self._live[place] = new
        self._free += [peer.number for peer in gone]  # only now: in one transaction no key may come twice
        self._revision = self._etcd.change(come, gone, backend=self._backend)
        self.counts["replaced"] += len(come)

    def _compact(self) -> None:
        self._etcd.compact(self._revision)
        self.counts["compactions"] += 1

    def _flush(self) -> None:
        run("ip", "route", "flush", "root", "10.0.0.0/8", "dev", DEVICES[self._backend])
        self.counts["flushes"] += 1

    def _restart(self) -> None:
        self._etcd.stop(kill=self.counts["restarts"] % 2 == 0)
        time.sleep(self._rng.uniform(0.5, 4))
        self._etcd.start()
        # Often before the daemon is back: what it has missed is no longer to be had.
        self._replace()
        self._compact()
        self.counts["restarts"] += 1

    def _sample(self, daemon: Daemon, seconds: float) -> None:
        daemon.lives()
        tasks, blocks = map(int, self._window.read_text().split())
        self.samples.append(
            {
                "seconds": round(seconds, 1),
                "rss_mb": round(daemon.memory(), 2),
                "fds": daemon.files(),
                "threads": daemon.threads(),
                "tasks": tasks,
                "blocks": blocks,
                "cpu_s": round(daemon.cpu(), 3),
                "routes": routes(),
            }
        )

    def _compare(self, daemon: Daemon) -> list[str]:
        wanted = {line for peer in self._live for line in peer.objects(self._backend)}
        wait(lambda: table(self._backend) == wanted, SETTLES_WITHIN, every=1)
        daemon.lives()
        found = table(self._backend)
        troubles = []
        if missing := sorted(wanted - found):
            troubles.append(f"{len(missing)} objects are missing in the kernel: {', '.join(missing[:3])}")
        if surplus := sorted(found - wanted):
            troubles.append(
                f"{len(surplus)} objects are in the kernel that no lease asks for: {', '.join(surplus[:3])}"
            )
        if self._etcd.leases() != len(self._live) + 1:
            troubles.append(
                f"{self._etcd.leases()} leases in the store instead of {len(self._live)} and the daemon's own"
            )
        return troubles


def soak(minutes: float, count: int, backend: str, per_second: int, seed: int) -> dict[str, object]:
    """One run, in the namespace that we are in."""
    with tempfile.TemporaryDirectory() as scratch:
        life = Soak(Path(scratch), count, backend, per_second, seed)
        troubles = life.run(minutes * 60)
        log = (Path(scratch) / "log").read_text(errors="replace").splitlines()
        errors = [line for line in log if line.startswith(("E", "F"))]
        return {"samples": life.samples, "counts": life.counts, "troubles": troubles, "errors": errors[:20]}


def show(result: Mapping[str, object], warm_up: float) -> int:
    """Print the verdict; the exit code."""
    samples: Sequence[Mapping[str, float]] = result["samples"]  # type: ignore[assignment]  # as `soak` made it
    print(f"done to it: {result['counts']}")
    print(f"{'figure':>10} {'median':>12} {'growth':>10} {'allowed':>10}")
    troubles = list(result["troubles"])  # type: ignore[call-overload]  # likewise
    verdicts = judge(samples, warm_up)
    if not verdicts:
        troubles.append(f"nothing was sampled after the warm-up of {warm_up:.0f} s")
    for verdict in verdicts:
        print(f"{verdict.name:>10} {verdict.median:12.1f} {verdict.growth:+10.2f} {verdict.allowed:10.2f}")
        if not verdict.flat:
            troubles.append(f"{verdict.name} grew by {verdict.growth:.2f}, more than {verdict.allowed:.2f}")
    for trouble in troubles:
        print(f"WRONG: {trouble}")
    print("not flat, or not as the store says" if troubles else "flat, and the kernel's table equals the store")
    return 1 if troubles else 0


def main() -> None:
    """Parse, soak, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--leases", type=int, default=10_000)
    parser.add_argument("--backend", default="vxlan", choices=list(DEVICES))
    parser.add_argument("--replace", type=int, default=20, metavar="N", help="leases replaced each second")
    parser.add_argument("--warm-up", type=float, metavar="SECONDS", help="that don't count; a fifth of the time")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--json", metavar="FILE", help="write all samples there")
    parser.add_argument("--inner", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, end)
    if options.inner:
        minutes, count, backend, per_second, seed = options.inner
        print(json.dumps(soak(float(minutes), int(count), backend, int(per_second), int(seed))))
        return
    needs("benchmarks/soak.py")
    print(f"seed {options.seed}", flush=True)
    arguments = [options.minutes, options.leases, options.backend, options.replace, options.seed]
    output = inside(__file__, [str(argument) for argument in arguments], timeout=options.minutes * 60 + 600)
    result = json.loads(output.splitlines()[-1])
    if options.json:
        Path(options.json).write_text(json.dumps({**result, "leases": options.leases, "seed": options.seed}, indent=1))
    warm_up = options.minutes * 60 / 5 if options.warm_up is None else options.warm_up
    sys.exit(show(result, warm_up))


if __name__ == "__main__":
    main()
