"""How fast a daemon takes in leases, how soon a new lease is a route, and what it costs to run.

For each number of leases: a fresh network namespace with a real etcd in it that already holds the leases, then flanneld is
started. Measured are the seconds from its start to READY=1 with everything in the kernel, milliseconds from a lease put to
its route in the kernel (median), resident memory, and the share of a processor at rest. The same objects put in place by
`ip -batch` and `bridge -batch` in the same namespace are the yardstick: a ratio in one run holds where seconds don't.
Another daemon is measured in turn with `--peer NAME=COMMAND` (the command gets flannel's flags appended).

    sudo .venv/bin/python benchmarks/control_plane.py [--leases 0,100,1000,5000] [--backend vxlan] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PREFIX = "/coreos.com/network"
NETWORK = "10.0.0.0/8"
ETCD = "http://127.0.0.1:2379"
RTMGRP_IPV4_ROUTE, RTM_NEWROUTE = 0x40, 24


def subnet(number: int) -> str:
    """The number-th /24 of the network, from 10.1.0.0 on."""
    return f"10.{1 + number // 256}.{number % 256}.0"


def public_ip(number: int) -> str:
    """An address on the namespace's underlay (172.16.0.0/12) for the number-th peer."""
    number += 10
    return f"172.{16 + number // 65536}.{number // 256 % 256}.{number % 256}"


def mac(number: int) -> str:
    """The VTEP MAC of the number-th peer."""
    return "0e:2a:" + ":".join(f"{byte:02x}" for byte in (0x42000000 + number).to_bytes(4, "big"))


def lease(number: int, backend: str) -> str:
    """The lease value of the number-th peer, as flannel writes it."""
    value: dict[str, object] = {"PublicIP": public_ip(number), "PublicIPv6": None, "BackendType": backend}
    if backend == "vxlan":
        value["BackendData"] = {"VNI": 1, "VtepMAC": mac(number)}
    return json.dumps(value, separators=(",", ":"))


def run(*argv: str, stdin: str | None = None) -> None:
    """Run a program that must succeed."""
    subprocess.run(argv, check=True, input=stdin, text=True, timeout=120, stdout=subprocess.DEVNULL)


def etcd(path: str, body: dict[str, object]) -> None:
    """One call of etcd's JSON gateway."""
    request = urllib.request.Request(ETCD + path, json.dumps(body).encode())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as answer:
        answer.read()


def b64(text: str) -> str:
    """As etcd's JSON gateway wants keys and values."""
    return base64.b64encode(text.encode()).decode()


def put_leases(count: int, backend: str) -> None:
    """Put leases in transactions of 100."""
    for start in range(0, count, 100):
        puts = [
            {"requestPut": {"key": b64(f"{PREFIX}/subnets/{subnet(n)}-24"), "value": b64(lease(n, backend))}}
            for n in range(start, min(count, start + 100))
        ]
        etcd("/v3/kv/txn", {"success": puts})


def yardstick(count: int, backend: str) -> float:
    """Seconds that `ip -batch` and `bridge -batch` take for the same objects, device included."""
    routes = []
    neighbors = []
    entries = []
    for n in range(count):
        if backend == "vxlan":
            routes.append(f"route replace {subnet(n)}/24 via {subnet(n)} dev flannel.1 onlink")
            neighbors.append(f"neigh replace {subnet(n)} lladdr {mac(n)} dev flannel.1 nud permanent")
            entries.append(f"fdb replace {mac(n)} dst {public_ip(n)} dev flannel.1 self permanent")
        else:
            routes.append(f"route replace {subnet(n)}/24 via {public_ip(n)} dev eth0")
    started = time.perf_counter()
    if backend == "vxlan":
        run(
            "ip", "link", "add", "flannel.1", "type", "vxlan", "id", "1", "dev", "eth0", "dstport", "8472", "nolearning"
        )
        run("ip", "link", "set", "flannel.1", "up")
        run("bridge", "-batch", "-", stdin="\n".join(entries))
    run("ip", "-batch", "-", stdin="\n".join(neighbors + routes))
    took = time.perf_counter() - started
    if backend == "vxlan":
        run("ip", "link", "del", "flannel.1")
    else:
        run("ip", "-batch", "-", stdin="\n".join(f"route del {subnet(n)}/24" for n in range(count)))
    return took


class Daemon:
    """A flanneld under measurement."""

    def __init__(self, command: list[str], scratch: Path, backend: str) -> None:
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = scratch / "notify"
        address.unlink(missing_ok=True)
        self.notify.bind(str(address))
        self.notify.settimeout(1)
        self.log = (scratch / "log").open("wb")
        self.backend = backend
        argv = [*command, f"--etcd-endpoints={ETCD}", f"--etcd-prefix={PREFIX}", "--iface=eth0"]
        argv += [f"--subnet-file={scratch / 'subnet.env'}"]
        self.started = time.perf_counter()
        self.process = subprocess.Popen(argv, env={**os.environ, "NOTIFY_SOCKET": str(address)}, stderr=self.log)

    def ready(self, count: int) -> float:
        """Seconds until READY=1 and every route is there."""
        while True:
            try:
                if b"READY=1" in self.notify.recv(4096):
                    break
            except TimeoutError:
                if self.process.poll() is not None:
                    raise SystemExit(f"the daemon ended with {self.process.returncode}: {self.log.name}") from None
        deadline = self.started + 180
        while routes() < count:
            if time.perf_counter() > deadline:
                raise SystemExit(f"only {routes()} of {count} routes after 180 s")
            time.sleep(0.01)
        return time.perf_counter() - self.started

    def memory(self) -> float:
        """Resident MB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise SystemExit("the daemon is gone")

    def cpu(self) -> float:
        """Processor seconds used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def lease_to_route(self, first: int, times: int = 15) -> float:
        """Median milliseconds from before a lease is put to its route's notification."""
        samples = []
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as monitor:
            monitor.bind((0, RTMGRP_IPV4_ROUTE))
            monitor.settimeout(10)
            for n in range(first, first + times):
                wanted = socket.inet_aton(subnet(n))
                started = time.perf_counter()
                etcd(
                    "/v3/kv/put", {"key": b64(f"{PREFIX}/subnets/{subnet(n)}-24"), "value": b64(lease(n, self.backend))}
                )
                while wanted not in monitor.recv(65536):
                    pass
                samples.append((time.perf_counter() - started) * 1e3)
                time.sleep(0.1)
        return statistics.median(samples)

    def stop(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.notify.close()
        self.log.close()


def routes() -> int:
    """Routes into the network in the main table, as /proc tells without a fork."""
    lines = Path("/proc/net/route").read_text().splitlines()[1:]
    return sum(1 for line in lines if line.split()[1].endswith("0A") and line.split()[7] == "00FFFFFF")


def measure(command: list[str], count: int, backend: str, rest: float) -> dict[str, float]:
    """One daemon with one number of leases, in the namespace that we are in."""
    with tempfile.TemporaryDirectory() as scratch:
        store = subprocess.Popen(
            ["etcd", "--data-dir", f"{scratch}/etcd", "--unsafe-no-fsync", "--log-level", "error", "--logger", "zap"],
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for_etcd()
            config = {"Network": NETWORK, "SubnetLen": 24, "SubnetMin": "10.200.0.0", "Backend": {"Type": backend}}
            etcd("/v3/kv/put", {"key": b64(f"{PREFIX}/config"), "value": b64(json.dumps(config))})
            put_leases(count, backend)
            figures = {"yardstick_s": yardstick(count, backend) if count else 0.0}
            daemon = Daemon(command, Path(scratch), backend)
            try:
                figures["ready_s"] = daemon.ready(count)
                figures["cpu_to_ready_s"] = daemon.cpu()
                figures["lease_to_route_ms"] = daemon.lease_to_route(count)
                time.sleep(1)
                before = daemon.cpu()
                time.sleep(rest)
                figures["cpu_at_rest_percent"] = (daemon.cpu() - before) / rest * 100
                figures["resident_mb"] = daemon.memory()
            finally:
                daemon.stop()
            return figures
        finally:
            store.kill()
            store.wait()


def wait_for_etcd() -> None:
    """Until it answers, 10 s at most."""
    for _ in range(200):
        try:
            etcd("/v3/kv/range", {"key": b64("x")})
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("etcd does not answer")


def in_namespace(arguments: list[str]) -> dict[str, float]:
    """Run this program's inner part in a namespace of its own, with an underlay, and clean up."""
    name = f"wincey-bench-{os.getpid()}"
    run("ip", "netns", "add", name)
    try:
        for command in (
            "link set lo up",
            "link add eth0 type veth peer name wire",
            "link set wire up",
            "link set eth0 up",
            "addr add 172.16.0.1/12 dev eth0",
        ):
            run("ip", "-n", name, *command.split())
        inner = ["ip", "netns", "exec", name, sys.executable, __file__, "--inner", *arguments]
        done = subprocess.run(inner, check=False, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:] or done.stdout[-2000:])
        return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]  # our own output, just below
    finally:
        run("ip", "netns", "del", name)


def main() -> None:
    """Parse, measure in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leases", default="0,100,1000,5000", help="numbers of leases, comma separated")
    parser.add_argument("--backend", default="vxlan", choices=["vxlan", "host-gw"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rest", type=float, default=10, help="seconds of rest to measure")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="another flanneld")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--inner", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        command, count, backend, rest = options.inner
        print(json.dumps(measure(shlex.split(command), int(count), backend, float(rest))))
        return
    if os.geteuid() != 0 or not shutil.which("etcd"):
        raise SystemExit("benchmarks/control_plane.py needs root (network namespaces) and etcd (package etcd-server)")
    wincey = f"{sys.executable} -m wincey.cli.flanneld"
    daemons = {"wincey": wincey, **dict(peer.split("=", 1) for peer in options.peer)}
    results: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in daemons}
    for number in range(options.rounds):
        for count in options.leases.split(","):
            for name, command in daemons.items():
                print(f"round {number + 1}: {name}, {count} leases …", file=sys.stderr, flush=True)
                figures = in_namespace([command, count, options.backend, str(options.rest)])
                results[name].setdefault(count, []).append(figures)
    show(results, options.backend)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1))


def show(results: dict[str, dict[str, list[dict[str, float]]]], backend: str) -> None:
    """Medians over the rounds, and the ratio of start to yardstick round by round."""
    print(f"\n{backend}: medians of {len(next(iter(next(iter(results.values())).values())))} rounds\n")
    header = ("daemon", "leases", "ready s", "of it CPU s", "× ip -batch", "lease→route ms", "at rest %", "resident MB")
    print("  ".join(f"{column:>14}" for column in header))
    for name, by_count in results.items():
        for count, rounds in by_count.items():

            def median(key: str, rounds: list[dict[str, float]] = rounds) -> float:
                return statistics.median(figures[key] for figures in rounds)

            ratio = statistics.median(f["ready_s"] / f["yardstick_s"] if f["yardstick_s"] else 0 for f in rounds)
            row = (
                name,
                count,
                f"{median('ready_s'):.2f}",
                f"{median('cpu_to_ready_s'):.2f}",
                f"{ratio:.1f}" if ratio else "-",
                f"{median('lease_to_route_ms'):.1f}",
                f"{median('cpu_at_rest_percent'):.2f}",
                f"{median('resident_mb'):.1f}",
            )
            print("  ".join(f"{cell:>14}" for cell in row))


if __name__ == "__main__":
    main()
