"""`make sim`: run seeds, and tell of each that fails the shortest story that fails in the same way.

make sim                                        200 runs with fresh seeds
make sim ARGS="--runs 100000 --processes 2"     a night's worth
make sim ARGS="--seed 4711"                     one seed, with its history
make sim ARGS="--replay FILE"                   a scenario that was kept
make sim ARGS="--hosts 1000 --runs 1"           many hosts in one network
make sim ARGS="--mutants"                       deliberately broken variants: which invariant catches each
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from simulator.mutants import MUTANTS, hunt
from simulator.order import Order, run
from simulator.scenario import Scenario
from simulator.shrink import broken, shrink
from simulator.world import Result, World


def tell(scenario: Scenario, *, mermaid: bool) -> Result:
    """Run it with its history, and print that."""
    world = World(scenario, record=True)
    result = world.run()
    assert world.recorder
    print(world.recorder.plain())
    if mermaid:
        print()
        print(world.recorder.mermaid())
    print()
    print(scenario.encode().decode())
    for violation in result.violations:
        print(f"VIOLATION {violation}")
    print(f"history {world.recorder.digest()}")
    return result


def report(scenario: Scenario, command: str, keep: Path | None) -> None:
    """Tell of a failure: the smallest scenario that fails alike, its history, and how to see it again."""
    invariants = broken(scenario)
    small = shrink(scenario, lambda candidate: bool(broken(candidate) & invariants))
    tell(small, mermaid=True)
    print(f"\nreplay: {command}")
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        path = keep / f"seed-{scenario.seed}.json"
        path.write_bytes(small.encode() + b"\n")
        print(f'replay the short one: make sim ARGS="--replay {path}"')


def results(orders: list[Order], processes: int) -> Iterator[tuple[Order, Result]]:
    """Run them, in several processes if wanted, in whatever order they end."""
    if processes == 1:
        yield from map(run, orders)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap_unordered(run, orders, chunksize=20)


def many(arguments: argparse.Namespace) -> int:
    """Run many seeds; returns how many failed."""
    start = arguments.start if arguments.start is not None else int.from_bytes(os.urandom(5), "big")
    orders = [Order(start + place, arguments.hosts, arguments.faults) for place in range(arguments.runs)]
    last = start + arguments.runs - 1
    print(f"{arguments.runs} runs, seeds {start} to {last}; again: --start {start} --runs {arguments.runs}", flush=True)
    begin, told = time.monotonic(), time.monotonic()
    failed: list[Order] = []
    done = requests = virtual = 0.0
    for order, result in results(orders, arguments.processes):
        done += 1
        requests += result.requests
        virtual += result.virtual
        if result.violations:
            failed.append(order)
            print(f"seed {order.seed}: {result.violations[0]}", flush=True)
        if time.monotonic() - told > arguments.every:
            told = time.monotonic()
            took = told - begin
            rest = took / done * (len(orders) - done)
            print(
                f"{done:.0f} of {len(orders)} runs, {len(failed)} failed, {took:.0f} s, {rest:.0f} s to go", flush=True
            )
    took = time.monotonic() - begin
    print(
        f"{done:.0f} runs, seeds {start} to {last}: {len(failed)} failed; {took:.0f} s, {took / max(done, 1):.3f} s a run;"
        f" {virtual / 86400:.1f} days of virtual time, {requests:.0f} requests to stores"
    )
    for order in failed[: arguments.tell]:
        report(order.scenario(), order.command, arguments.keep)
    if len(failed) > arguments.tell:
        print("others that failed: " + " ".join(str(order.seed) for order in failed[arguments.tell :]))
    return len(failed)


def mutants(arguments: argparse.Namespace) -> int:
    """Hunt each mutant; returns how many got away."""
    start = arguments.start if arguments.start is not None else 1
    chosen = [name for name in MUTANTS if not arguments.only or arguments.only in name]
    print("| mutant | caught by | seeds needed |\n|---|---|---|", flush=True)
    away = 0
    for name in chosen:
        caught = hunt(name, start, arguments.runs)
        away += caught is None
        invariant, seeds = (caught.invariant, caught.took) if caught else ("**not caught**", f"> {arguments.runs}")
        print(f"| {MUTANTS[name].what} | {invariant} | {seeds} |", flush=True)
    return away


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make sim", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=200, help="how many seeds")
    parser.add_argument("--start", type=int, help="the first seed; a fresh one if not given")
    parser.add_argument("--seed", type=int, help="one seed, told with its history")
    parser.add_argument("--replay", type=Path, help="a scenario file, told with its history")
    parser.add_argument("--hosts", type=int, help="as many hosts, whatever the seed says")
    parser.add_argument("--faults", type=int, help="as many faults, whatever the seed says")
    parser.add_argument("--processes", type=int, default=1, help="processes to use")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two lines of progress")
    parser.add_argument("--tell", type=int, default=1, help="of how many failures the shortest story is told")
    parser.add_argument("--keep", type=Path, help="a directory for the shortest stories")
    parser.add_argument("--mermaid", action="store_true", help="with --seed and --replay: the sequence diagram too")
    parser.add_argument(
        "--mutants", action="store_true", help="hunt deliberately broken variants; --runs seeds at most"
    )
    parser.add_argument("--only", help="with --mutants: those whose name contains it")
    arguments = parser.parse_args()
    if arguments.mutants:
        return min(1, mutants(arguments))
    if arguments.replay:
        return bool(tell(Scenario.decode(arguments.replay.read_bytes()), mermaid=arguments.mermaid).violations)
    if arguments.seed is not None:
        order = Order(arguments.seed, arguments.hosts, arguments.faults)
        return bool(tell(order.scenario(), mermaid=arguments.mermaid).violations)
    return min(1, many(arguments))


if __name__ == "__main__":
    sys.exit(main())
