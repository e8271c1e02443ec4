"""A real etcd in the namespace, spoken to through its JSON gateway; what it counts, and what passes on the wire.

It listens twice: at CLIENT for the daemon alone, whose bytes the packet filter counts there, and at OURS for the benchmark.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scale.arena import run
from scale.leases import PREFIX, Peer

CLIENT_PORT, OUR_PORT = 2379, 2381
CLIENT = f"http://127.0.0.1:{CLIENT_PORT}"
OURS = f"http://127.0.0.1:{OUR_PORT}"
_COUNT = re.compile(r'^grpc_server_handled_total\{.*grpc_method="(\w+)".*\} (\S+)$', re.MULTILINE)
_SENT = re.compile(r"^etcd_mvcc_events_total (\S+)$", re.MULTILINE)
_FILTER = f"""table inet bench {{
  counter in {{ }}
  counter out {{ }}
  chain count {{
    type filter hook output priority 0; policy accept;
    tcp sport {CLIENT_PORT} counter name in
    tcp dport {CLIENT_PORT} counter name out
  }}
}}
"""


class Etcd:
    """One member, with its data in a directory of ours."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def start(self) -> None:
        """Start, and wait until it answers, 30 s at most."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD")}
        argv = [
            "etcd",
            "--data-dir",
            str(self._directory),
            "--unsafe-no-fsync",
            "--log-level",
            "error",
            "--logger",
            "zap",
        ]
        argv += ["--listen-client-urls", f"{CLIENT},{OURS}", "--advertise-client-urls", CLIENT]
        self._process = subprocess.Popen(argv, env=environment, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                self.call("/v3/kv/range", {"key": _b64("x")})
                return
            except OSError:
                time.sleep(0.05)
        raise SystemExit("etcd does not answer")

    def stop(self, *, kill: bool = True) -> None:
        """End it, at once or in order."""
        if self._process:
            self._process.kill() if kill else self._process.terminate()
            self._process.wait(30)
            self._process = None

    def call(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        """One call of the JSON gateway. Raises OSError."""
        request = urllib.request.Request(OURS + path, json.dumps(body).encode())
        with self._opener.open(request, timeout=30) as answer:
            return json.loads(answer.read())  # type: ignore[no-any-return]  # etcd's JSON is an object

    def put(self, key: str, value: str) -> None:
        """One key."""
        self.call("/v3/kv/put", {"key": _b64(key), "value": _b64(value)})

    def change(self, put: Iterable[Peer] = (), delete: Iterable[Peer] = (), *, backend: str) -> int:
        """Put and delete leases, in transactions of 100; the store's revision after the last one."""
        steps: list[dict[str, object]] = [{"requestDeleteRange": {"key": _b64(peer.key)}} for peer in delete]
        steps += [{"requestPut": {"key": _b64(peer.key), "value": _b64(peer.value(backend))}} for peer in put]
        revision = 0
        for start in range(0, len(steps), 100):
            answer = self.call("/v3/kv/txn", {"success": steps[start : start + 100]})
            revision = int(answer["header"]["revision"])
        return revision

    def compact(self, revision: int) -> None:
        """Forget what was before a revision."""
        self.call("/v3/kv/compaction", {"revision": str(revision), "physical": True})

    def leases(self) -> int:
        """How many lease keys there are."""
        body = {"key": _b64(f"{PREFIX}/subnets/"), "range_end": _b64(f"{PREFIX}/subnets0"), "count_only": True}
        return int(self.call("/v3/kv/range", body).get("count", 0))

    def operations(self) -> dict[str, int]:
        """How many gRPC calls it has handled so far, by method. Watches count when they end."""
        with self._opener.open(f"{OURS}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found: dict[str, int] = {}
        for method, count in _COUNT.findall(text):
            found[method] = found.get(method, 0) + int(float(count))
        return {method: count for method, count in found.items() if count}


def count_the_wire() -> None:
    """Have the packet filter count what passes between the daemon and etcd."""
    run("nft", "-f", "-", stdin=_FILTER)


def wire() -> tuple[int, int]:
    """Bytes to the daemon and from it so far, TCP and IP headers included."""
    listed = json.loads(run("nft", "-j", "list", "counters", "table", "inet", "bench"))["nftables"]
    counters = {each["counter"]["name"]: int(each["counter"]["bytes"]) for each in listed if "counter" in each}
    return counters["in"], counters["out"]


def fill(etcd: Etcd, peers: Sequence[Peer], backend: str, config: str) -> None:
    """The config and the leases."""
    etcd.put(f"{PREFIX}/config", config)
    etcd.change(peers, backend=backend)


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
