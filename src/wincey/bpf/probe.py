"""Whether this host can run our programs, and if not, why, in one line. Everything is tried, nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import msgspec

from wincey.bpf import bpffs, program, syscall
from wincey.bpf.maps import Map
from wincey.bpf.program import Baked
from wincey.bpf.syscall import BpfError

_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}


class Answer(msgspec.Struct, frozen=True):
    """reason: why not, "" if it can. notes: what is worth knowing all the same."""

    reason: str = ""
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.reason


def ask(baked: Baked, kernel: tuple[int, int], needs: tuple[int, int] = (5, 10), mount: Path = bpffs.MOUNT) -> Answer:
    """Machine, release (`needs`: the oldest that has every helper of the programs), capabilities, bpffs, JIT, verifier."""
    if reason := syscall.unsupported():
        return Answer(reason)
    if kernel < needs:
        return Answer(f"Linux {kernel[0]}.{kernel[1]} is too old: the programs need {needs[0]}.{needs[1]}")
    if reason := missing_capabilities(kernel):
        return Answer(reason)
    try:
        bpffs.ensure_mounted(mount)
        try_load(baked)
    except BpfError as error:
        return Answer(str(error))
    return Answer(notes=(*_jit(),))


def missing_capabilities(kernel: tuple[int, int]) -> str:
    """Which capabilities this process lacks to load and attach programs, "" for none.

    Without CAP_PERFMON the verifier takes precautions against speculative execution, which refuse what a compiler makes of ordinary code.
    """
    held = effective_capabilities()
    wanted = ["CAP_NET_ADMIN"]
    if not held >> _CAPABILITIES["CAP_SYS_ADMIN"] & 1:
        wanted += ["CAP_BPF", "CAP_PERFMON"] if kernel >= (5, 8) else ["CAP_SYS_ADMIN"]
    lacking = [name for name in wanted if not held >> _CAPABILITIES[name] & 1]
    noun = "capabilities" if len(lacking) > 1 else "capability"
    return f"this process lacks the {noun} {' and '.join(lacking)}" if lacking else ""


def effective_capabilities() -> int:
    """The calling thread's, as a bit mask (capabilities(7))."""
    with open("/proc/thread-self/status") as status:
        for line in status:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def try_load(baked: Baked) -> None:
    """Have the kernel check every program, with maps of one entry's room; raises BpfError."""
    maps: dict[str, Map] = {}
    loaded: dict[str, int] = {}
    try:
        for name, layout in baked.maps.items():
            maps[name] = Map.create(name, msgspec.structs.replace(layout, entries=min(layout.entries, 64)))
        loaded = program.load(baked, maps)
    finally:
        program.close(loaded)
        for opened in maps.values():
            opened.close()


def _jit() -> list[str]:
    try:
        off = Path("/proc/sys/net/core/bpf_jit_enable").read_text().strip() == "0"
    except OSError:
        return []
    return ["the BPF JIT is off (sysctl net.core.bpf_jit_enable=0): programs run several times slower"] if off else []
