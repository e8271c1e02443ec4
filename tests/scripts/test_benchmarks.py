"""The benchmarks' own judgement, and that they run: a short form of each."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from scale import growth, plot, steady, targets  # noqa: E402  # they are beside the package, on no path

SIZES = (100, 1_000, 5_000, 10_000)


@pytest.mark.parametrize("shape", ["n", "n log n", "n²"])
def test_growth_is_recognised(shape):
    points = [(n, 0.2 + 0.003 * growth.SHAPES[shape](n)) for n in SIZES]
    best = growth.fits(points)[0]
    assert (best.shape, round(best.error, 6)) == (shape, 0)
    assert (round(best.base, 6), round(best.slope, 6)) == (0.2, 0.003)
    assert growth.say(points).startswith(shape)


def test_what_does_not_grow_fits_with_a_slope_of_nothing():
    assert all(fit.slope == 0 for fit in growth.fits([(n, 5.0 - n / 10**5) for n in SIZES]))


def samples(values):
    flat = {"fds": 12, "threads": 2, "tasks": 8, "blocks": 200_000}
    return [{"seconds": 5.0 * at, "rss_mb": value, **flat} for at, value in enumerate(values)]


def test_a_leak_is_found_and_spikes_are_none():
    noise = [50 + 0.3 * math.sin(at) for at in range(300)]
    spikes = [value + (20 if at % 9 == 0 else 0) for at, value in enumerate(noise)]
    leak = [value + at * 0.02 for at, value in enumerate(noise)]
    verdicts = {name: steady.judge(samples(values), 300)[0] for name, values in (("spikes", spikes), ("leak", leak))}
    assert verdicts["spikes"].flat
    assert not verdicts["leak"].flat
    assert verdicts["leak"].growth == pytest.approx(0.02 * 239, rel=0.2)


def test_a_warm_up_does_not_count():
    warming = [min(60.0, 40 + at) for at in range(100)]
    assert steady.judge(samples(warming), 100)[0].growth == 0


def test_targets_are_met_or_missed():
    judged = {text: met for text, _, met in targets.judge({5_000: {"ready_s": 0.9, "resident_mb": 41.0}})}
    assert sorted(judged.values()) == [False, True]


def test_the_picture_is_well_formed_and_has_every_point():
    lines = {"vxlan": [(n, n / 10) for n in SIZES], "host-gw": [(n, n / 20) for n in SIZES]}
    drawn = ET.fromstring(plot.svg({"one": lines, "two": lines, "three": lines}))
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}circle"))) == 3 * 2 * len(SIZES)


def run(program, *arguments):
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / program), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.root
@pytest.mark.etcd
def test_the_control_plane_is_measured(tmp_path):
    target = tmp_path / "figures.json"
    done = run(
        *("control_plane.py", "--leases", "50", "--backend", "vxlan", "--rest", "1", "--churn", "20"),
        *("--store-span", "0", "--json", str(target)),
    )
    assert done.returncode == 0, done.stderr
    [figures] = json.loads(target.read_text())["figures"]["wincey vxlan"]["50"]
    assert all(figures[name] > 0 for name in ("ready_s", "diff_cpu_ms", "resident_mb", "event_bytes", "start_bytes"))


@pytest.mark.root
@pytest.mark.etcd
def test_a_soak_compares_the_kernel_with_the_store(tmp_path):
    """Whether a few seconds are flat is not asked: nothing has settled."""
    target = tmp_path / "soak.json"
    run("soak.py", "--minutes", "0.1", "--leases", "60", "--warm-up", "0", "--json", str(target))
    result = json.loads(target.read_text())
    assert result["troubles"] == []
    assert result["counts"]["replaced"] > 20
    assert {"rss_mb", "fds", "tasks", "blocks"} <= result["samples"][0].keys()
