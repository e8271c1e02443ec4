"""`python -m fuzz [--seconds N] [--jobs N] [--list] [--keep] [TARGET...]`: fuzz targets, one process for each at a time.

With atheris the runs are guided by coverage; without it (it does not exist for every Python) hypothesis draws mutations of
the seeds and the corpus. What fails is written to fuzz/crashes/TARGET/ and shown; it is run again by every test run from
then on. --keep adds to fuzz/corpus/TARGET/ the few small inputs that reach more than those there are.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import random
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from fuzz.target import LONGEST, TARGETS, Target

ROOT = Path(__file__).parents[1]
CORPUS, CRASHES, WORK = ROOT / "fuzz" / "corpus", ROOT / "fuzz" / "crashes", ROOT / ".fuzz"
_KEPT = 25  # files of a corpus
_SMALL = 500  # bytes of each
_SLOW = 20  # seconds for one input
_MEMORY = 1500  # MiB for one process


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Fuzz what comes from outside.")
    parser.add_argument("--seconds", type=float, default=60, help="for each target (default 60)")
    parser.add_argument("--jobs", type=int, default=1, help="targets at once (default 1)")
    parser.add_argument("--list", action="store_true", help="say which targets there are")
    parser.add_argument("--keep", action="store_true", help="keep small new inputs that reach more in fuzz/corpus")
    parser.add_argument("--engine", choices=("auto", "atheris", "hypothesis"), default="auto")
    parser.add_argument("--one", metavar="FILE", help="run one input through one target and show what happens")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--choose", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    options = parser.parse_args()
    engine = options.engine
    if engine == "auto":
        engine = "atheris" if importlib.util.find_spec("atheris") else "hypothesis"
    if options.choose:
        _load()
        return _keep(TARGETS[options.targets[0]])
    if options.inside and engine == "atheris":
        _fuzz_by_atheris(options.targets[0], options.seconds)
    _load()
    if unknown := [name for name in options.targets if name not in TARGETS]:
        print(f"fuzz: there is no target {', '.join(unknown)}; there are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(TARGETS))
        return 0
    if options.one:
        TARGETS[options.targets[0]].check(Path(options.one).read_bytes())
        return 0
    if options.inside:
        return _fuzz_by_hypothesis(TARGETS[options.targets[0]], options.seconds)
    return _run_all([TARGETS[name] for name in options.targets or TARGETS], engine, options)


def inputs(target: Target) -> list[tuple[str, bytes]]:
    """Everything that is known to be worth a try: seeds, corpus, and what once failed; with names to tell them by."""
    found = [(f"seed {number}", seed) for number, seed in enumerate(target.seeds)]
    for directory in (CORPUS / target.name, CRASHES / target.name):
        if directory.is_dir():
            found += [
                (f"{directory.parent.name}/{path.name}", path.read_bytes()) for path in sorted(directory.iterdir())
            ]
    return found


def _load() -> None:
    import fuzz.targets  # noqa: F401, PLC0415  # registers them; under atheris it is imported after the hooks are in place


def _run_all(targets: list[Target], engine: str, options: argparse.Namespace) -> int:
    print(f"{len(targets)} targets, {options.seconds:g} s each, by {engine}", flush=True)
    waiting, running, finds = list(targets), dict[subprocess.Popen[str], tuple[Target, Path]](), 0
    try:
        while waiting or running:
            while waiting and len(running) < max(1, options.jobs):
                target = waiting.pop(0)
                _lay_out(target)
                log = WORK / f"{target.name}.log"
                with log.open("w") as out:
                    command = [sys.executable, "-m", "fuzz", "--inside", f"--engine={engine}"]
                    command += [f"--seconds={options.seconds}", target.name]
                    process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, text=True)
                running[process] = (target, log)
            ended = next((process for process in running if process.poll() is not None), None)
            if ended is None:
                time.sleep(0.2)
                continue
            target, log = running.pop(ended)
            finds += _tell(target, ended.returncode, log.read_text(errors="replace"))
            if options.keep:
                command = [sys.executable, "-m", "fuzz", "--inside", "--choose", target.name]
                subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    finally:
        for process in running:
            process.kill()
    print(f"{finds} finds" if finds else "nothing found")
    return 1 if finds else 0


def _lay_out(target: Target) -> None:
    work = WORK / target.name
    work.mkdir(parents=True, exist_ok=True)
    (CRASHES / target.name).mkdir(parents=True, exist_ok=True)
    for _, data in inputs(target):
        (work / hashlib.sha1(data, usedforsecurity=False).hexdigest()).write_bytes(data)


def _tell(target: Target, code: int, said: str) -> int:
    runs = re.findall(r"(?:^#|stat::number_of_executed_units:\s*)(\d+)", said, re.MULTILINE)
    print(f"  {target.name:24} {int(runs[-1]) if runs else 0:>10,} runs  {'' if code == 0 else 'FIND'}", flush=True)
    directory = CRASHES / target.name
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
    if code:
        print("\n".join(f"    {line}" for line in said.splitlines()[-40:]))
    return int(code != 0)


def _keep(target: Target) -> int:
    """Choose the corpus: of the small inputs those that reach a line of ours that none before did, the smallest first."""
    paths = [path for path in (WORK / target.name).iterdir() if path.stat().st_size <= _SMALL]
    seen, chosen = set[tuple[str, int]](), list[Path]()
    for data in target.seeds:
        seen |= _lines(target, data)
    for path in sorted(paths, key=lambda each: (each.stat().st_size, each.name)):
        new = _lines(target, path.read_bytes()) - seen
        if new and len(chosen) < _KEPT:
            seen |= new
            chosen.append(path)
    kept = CORPUS / target.name
    shutil.rmtree(kept, ignore_errors=True)
    for path in chosen:
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept / path.name[:16])
    return 0


def _lines(target: Target, data: bytes) -> set[tuple[str, int]]:
    """The lines of the product that an input reaches."""
    found: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        name = frame.f_code.co_filename
        if "/wincey/" not in name:
            return None
        if event == "line":
            found.add((name, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        target.check(data)
    except BaseException:  # a find: it is told when it is fuzzed
        return set()
    finally:
        sys.settrace(None)
    return found


def _fuzz_by_atheris(name: str, seconds: float) -> None:
    """Ends the process."""
    import atheris  # noqa: PLC0415  # not there for every Python

    with atheris.instrument_imports(include=["wincey", "h11", "fuzz.targets"]):
        _load()
    target = TARGETS[name]
    arguments = [
        f"fuzz-{name}",
        f"-max_len={LONGEST}",
        f"-rss_limit_mb={_MEMORY}",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    arguments += [f"-timeout={_SLOW}", f"-max_total_time={seconds:.0f}", "-use_value_profile=1"]
    arguments += [f"-artifact_prefix={CRASHES / name}/", str(WORK / name)]
    atheris.Setup(arguments, target.check)
    atheris.Fuzz()
    raise SystemExit(0)


def _fuzz_by_hypothesis(target: Target, seconds: float) -> int:
    from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: PLC0415  # only where atheris is not
    from hypothesis import strategies as st  # noqa: PLC0415  # likewise

    known = [data for _, data in inputs(target)]
    end, runs, failed = time.monotonic() + seconds, 0, list[bytes]()

    def changed(drawn: tuple[bytes, list[tuple[int, int, bytes]]]) -> bytes:
        data = bytearray(drawn[0])
        for at, gone, more in drawn[1]:
            begin = at % (len(data) + 1)
            data[begin : begin + gone] = more
        return bytes(data[:LONGEST])

    edits = st.lists(st.tuples(st.integers(0, LONGEST), st.integers(0, 8), st.binary(max_size=12)), max_size=6)
    drawn = st.one_of(st.binary(max_size=300), st.tuples(st.sampled_from(known), edits).map(changed))

    while time.monotonic() < end and not failed:

        @seed(random.SystemRandom().getrandbits(64))
        @settings(max_examples=1000, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(drawn)
        def attempt(data: bytes) -> None:
            nonlocal runs
            runs += 1
            if time.monotonic() < end:
                try:
                    target.check(data)
                except BaseException:
                    failed.append(data)
                    raise

        try:
            attempt()
        except Exception:
            traceback.print_exc()
    print(f"#{runs}")
    if failed:
        name = hashlib.sha1(failed[-1], usedforsecurity=False).hexdigest()
        (CRASHES / target.name / f"crash-{name}").write_bytes(failed[-1])
        print(f"written: fuzz/crashes/{target.name}/crash-{name}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
