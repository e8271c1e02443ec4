"""Baked files: programs and map layouts as scripts/bake.py cut them out of what clang made of one C source.

JSON, as it lies in the repository: `source` (SHA-256 over the C file and the headers beside it), `compiler`, `license`, `maps` (name to
layout) and `programs` (name to instructions, and which of these name a map). An instruction is 8 bytes; the one that loads a map's
address (ld_imm64, two slots) gets the number of the map's descriptor before the program is loaded.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Mapping
from importlib import resources

import msgspec

from wincey.bpf import syscall
from wincey.bpf.maps import Map, MapLayout
from wincey.kernel.release import kernel_release

_LD_IMM64 = 0x18
_PSEUDO_MAP_FD = 1
_CALL = struct.pack("=BBhi", 0x85, 0, 0, 160)
"""bpf_ktime_get_coarse_ns, of Linux 5.11: the clock as of its last tick."""
_FORMER_CALL = struct.pack("=BBhi", 0x85, 0, 0, 5)
"""bpf_ktime_get_ns, which costs more and tells the same but finer."""


class BakedProgram(msgspec.Struct, frozen=True):
    """One program. kind: BPF_PROG_TYPE_*. maps: (index of the instruction, name of the map) for each use of a map."""

    kind: int
    code: bytes
    maps: list[tuple[int, str]]


class Baked(msgspec.Struct, frozen=True):
    """One baked file; see above."""

    source: str
    compiler: str
    license: str
    maps: dict[str, MapLayout]
    programs: dict[str, BakedProgram]

    @property
    def digest(self) -> str:
        """What tells this byte code and these layouts from any other."""
        return hashlib.sha256(msgspec.json.encode([self.maps, self.programs])).hexdigest()[:16]


def read_baked(name: str) -> Baked:
    """The programs of c/`name`.c."""
    return msgspec.json.decode(resources.files("wincey.bpf").joinpath("baked", f"{name}.json").read_bytes(), type=Baked)


def load(baked: Baked, maps: Mapping[str, Map], names: Iterable[str] | None = None) -> dict[str, int]:
    """Load programs (all of them by default) with these maps and return their descriptors by name; raises BpfError."""
    loaded: dict[str, int] = {}
    try:
        for name in names if names is not None else baked.programs:
            program = baked.programs[name]
            code = bytearray(program.code)
            for index, used in program.maps:
                at = index * 8
                assert code[at] == _LD_IMM64
                code[at + 1] = code[at + 1] & 0x0F | _PSEUDO_MAP_FD << 4
                struct.pack_into("=i", code, at + 4, maps[used].fd)
            loaded[name] = syscall.prog_load(program.kind, suited(bytes(code), kernel_release()), name, baked.license)
    except BaseException:
        close(loaded)
        raise
    return loaded


def suited(code: bytes, release: tuple[int, int]) -> bytes:
    """Instructions for a kernel: helpers that it has not yet by older ones that mean the same."""
    if release >= (5, 11):
        return code
    instructions = (code[at : at + 8] for at in range(0, len(code), 8))
    return b"".join(_FORMER_CALL if each == _CALL else each for each in instructions)


def close(loaded: Mapping[str, int]) -> None:
    """Release the descriptors of programs."""
    for fd in loaded.values():
        os.close(fd)
