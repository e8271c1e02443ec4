"""What the CNI plugin costs: ADD and DEL through `flannel` against the same `bridge` and `host-local` called directly.

Pair by pair, in turn, in a fresh network namespace, so that a busy machine is busy for both. The config that `bridge` gets
is the same, byte for byte: the one that the plugin makes. Medians in milliseconds, their ratio, and the median difference.

    sudo .venv/bin/python benchmarks/cni.py [--pairs 100] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from wincey.cli.install_cni import install, plugin_script

STANDARD = Path("/usr/lib/cni")
ENV = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"


class Chain:
    """One way to attach a container: a plugin and its config, in a host's namespace."""

    def __init__(self, plugin: Path, config: bytes, host: str, pod: str) -> None:
        self.argv = ["nsenter", f"--net=/run/netns/{host}", "--", str(plugin)]
        self.config = config
        self.environment = {
            **os.environ,
            "CNI_NETNS": f"/run/netns/{pod}",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": f"{plugin.parent}:{STANDARD}",
        }

    def call(self, command: str, container: str) -> float:
        """Milliseconds of a call."""
        environment = self.environment | {"CNI_COMMAND": command, "CNI_CONTAINERID": container}
        start = time.perf_counter()
        done = subprocess.run(
            self.argv, input=self.config, env=environment, capture_output=True, timeout=60, check=False
        )
        took = 1000 * (time.perf_counter() - start)
        if done.returncode:
            sys.exit(f"{command}: {done.stdout.decode()}{done.stderr.decode()}")
        return took


def measure(directory: Path, host: str, pod: str, pairs: int) -> dict[str, dict[str, float]]:
    """Time both chains."""
    plugin = directory / "bin" / "flannel"
    install(plugin, plugin_script(), mode=0o755)
    (directory / "subnet.env").write_text(ENV)
    netconf = {
        "cniVersion": "1.0.0",
        "name": "bench",
        "type": "flannel",
        "subnetFile": str(directory / "subnet.env"),
        "dataDir": str(directory / "state"),
        "ipam": {"dataDir": str(directory / "ipam")},
    }
    ours = Chain(plugin, json.dumps(netconf).encode(), host, pod)
    ours.call("ADD", "first")
    same = (directory / "state" / "first").read_bytes()  # what bridge was given
    ours.call("DEL", "first")
    direct = Chain(STANDARD / "bridge", same, host, pod)
    took: dict[str, dict[str, list[float]]] = {command: {"flannel": [], "direct": []} for command in ("ADD", "DEL")}
    for number in range(pairs):
        for name, chain in (("flannel", ours), ("direct", direct))[:: 1 if number % 2 else -1]:
            for command in ("ADD", "DEL"):
                took[command][name].append(chain.call(command, f"c{number}"))
    return {command: summary(times["flannel"], times["direct"]) for command, times in took.items()}


def summary(flannel: list[float], direct: list[float]) -> dict[str, float]:
    """Medians in milliseconds; the difference is that of pairs."""
    through, without = statistics.median(flannel), statistics.median(direct)
    difference = statistics.median(a - b for a, b in zip(flannel, direct, strict=True))
    return {"flannel_ms": through, "direct_ms": without, "ratio": through / without, "difference_ms": difference}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100, help="pairs of ADD and DEL (default 100)")
    parser.add_argument("--json", type=Path, help="write the figures to a file as well")
    options = parser.parse_args()
    if os.geteuid() != 0 or not (STANDARD / "bridge").exists():
        sys.exit("needs root and the standard CNI plugins in /usr/lib/cni (containernetworking-plugins)")
    tag = secrets.token_hex(3)
    host, pod = f"bench-{tag}-host", f"bench-{tag}-pod"
    made = []
    try:
        for name in (host, pod):
            subprocess.run(["ip", "netns", "add", name], check=True)
            made.append(name)
        with tempfile.TemporaryDirectory() as directory:
            results = measure(Path(directory), host, pod, options.pairs)
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=True)
    print(f"{'':4} {'flannel':>10} {'direct':>10} {'ratio':>7} {'difference':>11}")
    for command, each in results.items():
        print(
            f"{command:4} {each['flannel_ms']:7.1f} ms {each['direct_ms']:7.1f} ms {each['ratio']:6.2f}×"
            f" {each['difference_ms']:8.1f} ms"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
