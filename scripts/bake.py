#!/usr/bin/env python3
"""Compile src/wincey/bpf/c/*.c with clang and bake the result into src/wincey/bpf/baked/*.json (see wincey.bpf.program).

    scripts/bake.py            bake what is not of its sources
    scripts/bake.py NAME...    bake these

For developers who change a program; the results are committed, and neither a source install nor a host needs clang. It is the standard
library's own: an object file of clang is simple enough, as the programs do without what would need a linker. There is no function
call between programs (all helpers are inlined) and there are no global variables: the only relocations are uses of maps, which
lie in the section `maps` as wincey.h declares them, five numbers each.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

BPF = Path(__file__).resolve().parent.parent / "src" / "wincey" / "bpf"
SOURCES, BAKED = BPF / "c", BPF / "baked"
KINDS = {"tc": 3, "xdp": 6}  # section name to BPF_PROG_TYPE_*
MAP = struct.Struct("<5I")
SYMTAB, NOBITS, REL = 2, 8, 9  # section types
FUNC = 2  # symbol type
R_BPF_64_64 = 1
FIELDS = ("kind", "key", "value", "entries", "flags")


class Section(NamedTuple):
    """One section of an object file."""

    name: str
    type: int
    link: int
    info: int
    data: bytes


class Symbol(NamedTuple):
    """One symbol; section: the number of the section it lies in."""

    name: str
    type: int
    section: int
    value: int
    size: int


def source_digest(source: Path) -> str:
    """Over the C file and every header beside it."""
    digest = hashlib.sha256()
    for path in (source, *sorted(source.parent.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def compiler() -> str:
    """The first line of `clang --version`."""
    return subprocess.run(["clang", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def compile_object(source: Path) -> bytes:
    """The object file of one source. Little-endian whatever the machine; version 3 of the instructions (Linux 5.1)."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "object.o"
        command = ["clang", "-target", "bpfel", "-mcpu=v3", "-O2", "-Wall", "-Wextra", "-Wno-sign-compare", "-Werror"]
        command += ["-I", f"/usr/include/{platform.machine()}-linux-gnu"]  # asm/types.h, where Debian keeps it
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return target.read_bytes()


def bake(source: Path) -> str:
    """The baked file's text."""
    sections, symbols = read_elf(compile_object(source))
    places = {section.name: number for number, section in enumerate(sections)}
    maps_at = places.get("maps", -1)
    maps = {
        symbol.name: dict(zip(FIELDS, MAP.unpack_from(sections[maps_at].data, symbol.value), strict=True))
        for symbol in symbols
        if symbol.section == maps_at and symbol.name
    }
    programs = {}
    for number, section in enumerate(sections):
        if section.name not in KINDS:
            continue
        uses = relocations(sections, symbols, number, maps_at)
        for symbol in symbols:
            if symbol.section != number or symbol.type != FUNC:
                continue
            start, end = symbol.value, symbol.value + symbol.size
            programs[symbol.name] = {
                "kind": KINDS[section.name],
                "code": base64.b64encode(section.data[start:end]).decode(),
                "maps": [[(at - start) // 8, name] for at, name in sorted(uses.items()) if start <= at < end],
            }
    text = next(section for section in sections if section.name == ".text")
    if text.data:
        raise SystemExit(f"{source}: a function is not inlined; mark it with INLINE")
    baked = {
        "source": source_digest(source),
        "compiler": compiler(),
        "license": sections[places["license"]].data.rstrip(b"\0").decode(),
        "maps": dict(sorted(maps.items())),
        "programs": dict(sorted(programs.items())),
    }
    return json.dumps(baked, indent=1) + "\n"


def read_elf(data: bytes) -> tuple[list[Section], list[Symbol]]:
    """Sections and symbols of a 64-bit little-endian object file (elf(5))."""
    assert data[:6] == b"\x7fELF\x02\x01"
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names_at = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + number * size) for number in range(count)]
    names = data[headers[names_at][4] :]
    sections = [
        Section(text(names, name), kind, link, info, b"" if kind == NOBITS else data[offset : offset + length])
        for name, kind, _, _, offset, length, link, info, _, _ in headers
    ]
    table_section = next(section for section in sections if section.type == SYMTAB)
    strings = sections[table_section.link].data
    symbols = [
        Symbol(text(strings, name), info & 15, section, value, length)
        for name, info, _, section, value, length in struct.iter_unpack("<IBBHQQ", table_section.data)
    ]
    return sections, symbols


def relocations(sections: list[Section], symbols: list[Symbol], number: int, maps_at: int) -> dict[int, str]:
    """Which map is used at which offset of a section."""
    uses: dict[int, str] = {}
    for section in sections:
        if section.type != REL or section.info != number:
            continue
        for offset, info in struct.iter_unpack("<QQ", section.data):
            symbol = symbols[info >> 32]
            if info & 0xFFFFFFFF != R_BPF_64_64 or symbol.section != maps_at:
                raise SystemExit(f"{symbol.name or sections[symbol.section].name}: neither a map nor inlined")
            uses[offset] = symbol.name
    return uses


def text(data: bytes, offset: int) -> str:
    """The zero-ended text there."""
    return data[offset : data.index(b"\0", offset)].decode()


def main() -> None:
    """Bake."""
    names = sys.argv[1:]
    for source in [SOURCES / f"{name}.c" for name in names] or sorted(SOURCES.glob("*.c")):
        target = BAKED / f"{source.stem}.json"
        if not names and target.exists() and json.loads(target.read_text())["source"] == source_digest(source):
            continue
        target.write_text(bake(source))
        sys.stdout.write(f"baked {target.relative_to(BPF)}\n")


if __name__ == "__main__":
    main()
