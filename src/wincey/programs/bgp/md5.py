"""How many packets the kernel has dropped for their TCP MD5 signature (RFC 2385): it says so nowhere else."""

from __future__ import annotations

from pathlib import Path

_COUNTERS = ("TCPMD5NotFound", "TCPMD5Unexpected", "TCPMD5Failure")


def rejected(path: Path = Path("/proc/self/net/netstat")) -> int:
    """Packets dropped so far in this network namespace; 0 where the kernel does not count them."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    names, values = ([word for line in lines[start::2] for word in line.split()] for start in (0, 1))
    counters = dict(zip(names, values, strict=False))
    return sum(int(counters.get(name, 0)) for name in _COUNTERS)
