"""Moves the wall clock of one running process, and of no other.

A time namespace does not cover CLOCK_REALTIME, settimeofday moves the whole machine, and a preloaded library does not reach a
Go program, which never calls libc. But all of them, Python through libc, read the clock by the vDSO, a page of code that the
kernel maps into each process. Debuggers may write there (it is mapped with VM_MAYWRITE), and the process then has a copy of
its own: the functions that tell the wall clock become a system call and an addition. The monotonic clock stays, as with a real
step. So do the times of files, which the kernel writes.

Works on x86-64. See vdso(7), proc_pid_mem(5), and the ELF-64 specification for the table of symbols.
"""

from __future__ import annotations

import os
import platform
import signal
import struct
import time
from pathlib import Path

from wincey.lab.chaos.scenario import NotHere
from wincey.lab.errors import LabError
from wincey.lab.process import Process

_PT_DYNAMIC, _DT_STRTAB, _DT_SYMTAB = 2, 5, 6
_SYMBOL = struct.Struct("<IBBHQQ")  # name, info, other, section, value, size
_TRIES = 100


def _tell(call: int, pointer: bytes, clock: bytes) -> tuple[bytes, bytes]:
    """The code before and after the number of seconds: ask the kernel, then add to what `pointer` shows."""
    ask = b"\xb8" + struct.pack("<I", call) + b"\x0f\x05"  # mov eax, call; syscall
    add = b"\x48\x01" + pointer + b"\xc3"  # add [pointer], rcx; ret
    # test eax, eax; jnz ret; (test the clock; jnz ret, or the pointer; jz ret); mov rcx, seconds
    return ask + b"\x85\xc0\x75\x11" + clock + b"\x0d\x48\xb9", add


_CODE = {
    # Only of clock 0, CLOCK_REALTIME: test edi, edi; jnz.
    "__vdso_clock_gettime": _tell(228, b"\x0e", b"\x85\xff\x75"),
    # test edi, edi; jz: there may be no place for the answer.
    "__vdso_gettimeofday": _tell(96, b"\x0f", b"\x85\xff\x74"),
    # mov eax, 201; syscall; mov rcx, seconds; add rax, rcx; test edi, edi; jz ret; mov [rdi], rax; ret
    "__vdso_time": (
        b"\xb8\xc9\x00\x00\x00\x0f\x05\x48\xb9",
        b"\x48\x01\xc8\x85\xff\x74\x03\x48\x89\x07\xc3",
    ),
}


def check_clock() -> None:
    """Raise NotHere where clocks can't be moved."""
    if platform.machine() != "x86_64":
        raise NotHere(f"the clock of a process is moved on x86_64 only, and this is {platform.machine()}")


def move_clock(process: Process, seconds: int) -> None:
    """Let a process see the wall clock that many seconds ahead of the machine's, negative: behind. Raises LabError."""
    try:
        process.send(signal.SIGSTOP)
        first, last = _place(process.pid)
        _wait_outside(process.pid, first, last)
        memory = os.open(f"/proc/{process.pid}/mem", os.O_RDWR)
        try:
            image = os.pread(memory, last - first, first)
            for name, offset in _functions(image).items():
                before, after = _CODE[name]
                os.pwrite(memory, before + struct.pack("<q", seconds) + after, first + offset)
        finally:
            os.close(memory)
    except (OSError, struct.error, ValueError) as error:
        raise LabError(f"the clock of process {process.pid} can't be moved: {error}") from error
    finally:
        process.send(signal.SIGCONT)


def _place(pid: int) -> tuple[int, int]:
    """Where the vDSO is in a process: its first address, and the one after its last."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith("[vdso]"):
            first, last = line.split()[0].split("-")
            return int(first, 16), int(last, 16)
    raise ValueError("it has no vDSO")


def _wait_outside(pid: int, first: int, last: int) -> None:
    """Until all threads of a process that was told to stop have, outside of code that is about to be changed."""
    for _ in range(_TRIES):
        states = [(task, (task / "syscall").read_text().split()) for task in Path(f"/proc/{pid}/task").iterdir()]
        inside = [task for task, words in states if words[0] == "running" or first <= int(words[-1], 16) < last]
        if not inside:
            return
        # One that stopped inside goes on for a moment.
        if all(words[0] != "running" for _, words in states):
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGSTOP)
        time.sleep(0.001)
    raise ValueError("a thread of it does not leave the vDSO")


def _functions(image: bytes) -> dict[str, int]:
    """Where the functions to be changed are in a vDSO."""
    headers, size, number = struct.unpack_from("<Q", image, 32)[0], *struct.unpack_from("<HH", image, 54)
    kinds = {struct.unpack_from("<I", image, headers + at * size)[0]: headers + at * size for at in range(number)}
    place = struct.unpack_from("<Q", image, kinds[_PT_DYNAMIC] + 8)[0]
    tags: dict[int, int] = {}
    while (entry := struct.unpack_from("<qQ", image, place))[0]:
        tags[entry[0]] = entry[1]
        place += 16
    found: dict[str, int] = {}
    # The names follow the symbols, in every vDSO of Linux.
    for at in range(tags[_DT_SYMTAB], tags[_DT_STRTAB], _SYMBOL.size):
        name, _, _, _, value, length = _SYMBOL.unpack_from(image, at)
        start = tags[_DT_STRTAB] + name
        text = image[start : image.index(b"\0", start)].decode()
        if text in _CODE:
            before, after = _CODE[text]
            if length < len(before) + 8 + len(after):
                raise ValueError(f"{text} has no room for more code")
            found[text] = value
    if not found.keys() >= {"__vdso_clock_gettime"}:
        raise ValueError("its vDSO does not tell the time")
    return found
