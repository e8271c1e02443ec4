"""How fast a daemon takes in leases, how soon a new lease is a route, what it costs to run, and how all of that grows.

For each backend and number of leases: a fresh network namespace with a real etcd in it that already holds the leases, then
flanneld is started. Measured are the seconds from its start to READY=1 with everything in the kernel; the CPU time of a look at
the whole host that finds nothing to do (the least of ten); milliseconds from a lease put to its route in the kernel (median); how far the kernel
lags behind the store when 1,000 leases come at once, and when they go (peers have 1.5 s for coming back before anything of theirs
is removed: that is in the second figure), with the looks at the whole host that this led to; resident memory after the start and
after all that; the share of a processor at rest. The same objects put in place by
`ip -batch` and `bridge -batch` in the same namespace are the yardstick: a ratio in one run holds where seconds don't. Another
daemon is measured in turn with `--peer NAME=COMMAND` (the command gets flannel's flags appended).

What a host at rest asks of etcd is counted by etcd and by a packet filter, twice for --store-span seconds: with a lease that lives
for a day (which shows what it asks each minute), and with one that lives for 120 seconds (which shows a day's renewals in two
minutes). Per hour is the first figure by its span, plus a 24th of the second one by its span in lease lives.

    sudo .venv/bin/python benchmarks/control_plane.py [--leases 100,1000,5000,10000] [--backend vxlan,host-gw] [--rounds 1]
        [--quick] [--peer NAME=COMMAND] [--json FILE] [--plot FILE.svg]
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scale import growth, plot, targets
from scale.arena import end, inside, needs
from scale.measure import measure, store_use

Rounds = list[dict[str, float]]
Results = dict[str, dict[int, Rounds]]
"""By daemon and backend ("wincey vxlan"), by leases: the figures of each round."""

SHORT_TTL = 120.0
COLUMNS = {
    "ready s": ("ready_s", ".2f"),
    "of it CPU s": ("cpu_to_ready_s", ".2f"),
    "× ip -batch": ("yardsticks", ".1f"),
    "diff CPU ms": ("diff_cpu_ms", ".0f"),
    "lease→route ms": ("lease_to_route_ms", ".1f"),
    "added lag ms": ("churn_added_lag_ms", ".0f"),
    "gone lag ms": ("churn_removed_lag_ms", ".0f"),
    "CPU ms/change": ("churn_cpu_ms", ".2f"),
    "audits": ("churn_audits", ".0f"),
    "at rest %": ("rest_percent", ".2f"),
    "resident MB": ("resident_mb", ".1f"),
    "churned MB": ("churned_mb", ".1f"),
    "peak MB": ("peak_mb", ".1f"),
    "B/event": ("event_bytes", ".0f"),
    "start kB": ("start_kb", ".0f"),
    "load": ("load", ".1f"),
}
PICTURES = {
    "start to ready, s": "ready_s",
    "processor time of the start, s": "cpu_to_ready_s",
    "a look with nothing to do, CPU ms": "diff_cpu_ms",
    "1,000 leases added, lag in ms": "churn_added_lag_ms",
    "resident, MB": "resident_mb",
    "at rest, % of a processor": "rest_percent",
}


def medians(rounds: Rounds) -> dict[str, float]:
    """Of all rounds; the ratio to the yardstick round by round."""
    rounds = [
        figures
        | {"start_kb": figures["start_bytes"] / 1000}
        | ({"yardsticks": figures["ready_s"] / figures["yardstick_s"]} if figures.get("yardstick_s") else {})
        for figures in rounds
    ]
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


def show(results: Results) -> None:
    """Medians, growth, and targets met or missed."""
    for name, by_count in results.items():
        print(f"\n{name}: medians of {len(next(iter(by_count.values())))} rounds\n")
        print("  ".join(f"{column:>{max(8, len(column))}}" for column in ("leases", *COLUMNS)))
        for count, rounds in by_count.items():
            found = medians(rounds)
            cells = [f"{count:>8,}"]
            for column, (figure, form) in COLUMNS.items():
                cells.append(
                    f"{found[figure]:>{max(8, len(column))}{form}}"
                    if figure in found
                    else f"{'-':>{max(8, len(column))}}"
                )
            print("  ".join(cells))
        print("\n  how it grows, a + b·f(n):")
        for title, figure in PICTURES.items():
            points = [
                (count, medians(rounds)[figure]) for count, rounds in by_count.items() if count and figure in rounds[0]
            ]
            print(f"    {title}: {growth.say([point for point in points if point[1] > 0])}")
        print("\n  targets:")
        for text, figure, met in targets.judge({count: medians(rounds) for count, rounds in by_count.items()}):
            print(f"    {'met   ' if met else 'MISSED'} {text}: {figure:.2f}")


def draw(results: Results) -> str:
    """The picture."""
    return plot.svg(
        {
            title: {
                name.removeprefix("wincey "): [
                    (count, medians(rounds)[figure])
                    for count, rounds in by_count.items()
                    if count and figure in rounds[0]
                ]
                for name, by_count in results.items()
            }
            for title, figure in PICTURES.items()
        }
    )


def per_hour(at_rest: Mapping[str, float], renewing: Mapping[str, float], span: float) -> dict[str, float]:
    """Calls by method and bytes that one host costs etcd in an hour."""
    methods = dict.fromkeys([*at_rest, *renewing])
    days = span / SHORT_TTL
    return {method: at_rest.get(method, 0) * 3600 / span + renewing.get(method, 0) / days / 24 for method in methods}


def ask_store(backend: str, span: float) -> dict[str, dict[str, float]]:
    """Both lives at once: each is hardly any work."""
    with ThreadPoolExecutor(2) as pool:
        kinds = ("", str(SHORT_TTL))
        calls = [pool.submit(in_namespace, "store", backend, str(span), ttl) for ttl in kinds]
        at_rest, renewing = (call.result() for call in calls)
    return {"at rest": at_rest, "renewing": renewing, "per hour": per_hour(at_rest, renewing, span)}


def show_store(found: Mapping[str, Mapping[str, float]], span: float) -> None:
    """What one host costs etcd."""
    print(f"\netcd, for one host at rest (counted for {span:.0f} s twice, see --help):")
    print(f"  {'':>20} {'a lease of a day':>18} {f'a lease of {SHORT_TTL:.0f} s':>18} {'so per hour':>14}")
    for method, hourly in found["per hour"].items():
        counts = [found[kind].get(method, 0) for kind in ("at rest", "renewing")]
        print(f"  {method:>20} {counts[0]:>18,.0f} {counts[1]:>18,.0f} {hourly:>14,.2f}")


def in_namespace(*arguments: str) -> dict[str, float]:
    """Run this program's inner part in a namespace of its own."""
    output = inside(__file__, arguments, timeout=900)
    return json.loads(output.splitlines()[-1])  # type: ignore[no-any-return]  # our own output, in `inner`


def inner(arguments: list[str]) -> dict[str, float]:
    """What runs in the namespace."""
    if arguments[0] == "store":
        _, backend, span, ttl = arguments
        return store_use(backend, float(span), float(ttl) if ttl else None)
    command, count, backend, rest, churn = arguments
    return measure(shlex.split(command), int(count), backend, float(rest), int(churn))


def main() -> None:
    """Parse, measure in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leases", default="0,100,1000,5000,10000", help="numbers of leases, comma separated")
    parser.add_argument("--backend", default="vxlan,host-gw", help="backends, comma separated")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rest", type=float, default=10, help="seconds of rest to measure")
    parser.add_argument("--churn", type=int, default=1000, help="leases added at once, and removed")
    parser.add_argument(
        "--store-span", type=float, default=130, metavar="SECONDS", help="0: don't count what etcd is asked"
    )
    parser.add_argument(
        "--quick", action="store_true", help="100 and 1,000 leases, vxlan, one round, little rest, no store"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="another flanneld")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", metavar="FILE", help="draw the growth there, as SVG")
    parser.add_argument("--inner", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, end)
    if options.inner:
        print(json.dumps(inner(options.inner)))
        return
    needs("benchmarks/control_plane.py")
    if options.quick:
        options.leases, options.backend, options.rounds = "100,1000", "vxlan", 1
        options.rest, options.churn, options.store_span = 3, 200, 0
    wincey = f"{sys.executable} -m wincey.cli.flanneld"
    daemons = {"wincey": wincey, **dict(peer.split("=", 1) for peer in options.peer)}
    backends = options.backend.split(",")
    results: Results = {}
    for number in range(options.rounds):
        for backend in backends:
            for count in map(int, options.leases.split(",")):
                for name, command in daemons.items():
                    print(f"round {number + 1}: {name}, {backend}, {count} leases …", file=sys.stderr, flush=True)
                    figures = in_namespace(command, str(count), backend, str(options.rest), str(options.churn))
                    results.setdefault(f"{name} {backend}", {}).setdefault(count, []).append(figures)
    show(results)
    store = {}
    if options.store_span:
        print(f"etcd, twice {options.store_span:.0f} s at once …", file=sys.stderr, flush=True)
        store = ask_store(backends[0], options.store_span)
        show_store(store, options.store_span)
    if options.json:
        Path(options.json).write_text(json.dumps({"figures": results, "store": store}, indent=1))
    if options.plot:
        Path(options.plot).write_text(draw(results))


if __name__ == "__main__":
    main()
