"""Run a command on another kernel: in a QEMU virtual machine that sees this machine's files and keeps nothing.

For what this machine's kernel lacks. The guest boots Debian's stock kernel (see vm_kernel) in software emulation, so no
virtualization support is needed. Its root is this machine's, read-only over 9p, under a layer of memory that takes all
writes: programs, the tree and its virtual environment are simply there, and what the command changes is gone afterwards.
/run starts empty. There is no network but what the command makes inside.

Everything is ten times as slow as outside or worse: fit to see that something works, not how fast. The command's output
comes by two virtio ports, byte for byte, its exit code in a file of a small directory that both sides can write to.
"""

from __future__ import annotations

import os
import platform
import selectors
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from wincey.lab.errors import LabError
from wincey.lab.report import Report, silent
from wincey.lab.vm_kernel import Kernel, cache_directory, prepare_kernel, write_initramfs

MEMORY = 1024
"""MiB of a guest; what the command writes comes out of it."""

TIMEOUT = 600.0
"""Seconds a command may take, the boot included."""

_QEMU = "qemu-system-x86_64"
_PACKAGES = {_QEMU: "qemu-system-x86", "cpio": "cpio", "modprobe": "kmod"}

_INIT = """#!/bin/sh
export PATH={programs}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t cgroup2 cgroup /sys/fs/cgroup
mount --bind {modules} /lib/modules
ip link set lo up
out=$(echo /dev/vport*p1) err=$(echo /dev/vport*p2)
(exec </dev/null >$out 2>$err; cd {directory} && exec env {environment} {command})
echo $? >/run/vm/exit
sync
echo o >/proc/sysrq-trigger
sleep 60
"""

# What guards against attackers only, and costs a third of all time in emulation: the same addresses in every process let their
# translation be used again; pages are not cleared when they are handed out inside the kernel, and copies not checked twice.
_KERNEL_OPTIONS = (
    "mitigations=off nokaslr norandmaps randomize_kstack_offset=off init_on_alloc=0 hardened_usercopy=off lsm="
)

Sink = Callable[[bytes, bool], None]
"""Given a piece of output and whether it is of standard error."""


def check_machine() -> None:
    """Raise LabError when no guest can run here: another processor than x86-64, or a program missing."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise LabError(
            "the virtual machine runs this machine's own programs on a kernel for x86-64, and those here are for"
            f" {platform.machine()}: use a machine with an x86-64 processor"
        )
    missing = [program for program in _PACKAGES if not shutil.which(program)]
    if missing:
        packages = " ".join(_PACKAGES[program] for program in missing)
        raise LabError(
            f"the virtual machine needs {', '.join(missing)}: install it, on Debian with apt-get install {packages}"
        )


def run_in_vm(
    argv: Sequence[str],
    sink: Sink,
    *,
    directory: str = "",
    environment: Mapping[str, str] | None = None,
    memory: int = MEMORY,
    timeout: float = TIMEOUT,
    cache: Path | None = None,
    report: Report = silent,
) -> int:
    """Run a command as the guest's root, hand on its output as it comes, and return its exit code.

    directory: where it starts, default the present one. environment: variables besides PATH, HOME and LANG. memory: MiB. timeout:
    seconds, the boot included. cache: where the kernel is kept, default vm_kernel.cache_directory(). Standard input is empty.
    Raises LabError when the guest can't be started, dies or takes too long.
    """
    check_machine()
    kernel = prepare_kernel(cache or cache_directory(), report)
    with tempfile.TemporaryDirectory(prefix="wincey-vm-") as scratch:
        work = Path(scratch)
        exchange = work / "exchange"
        exchange.mkdir()
        write_initramfs(kernel, work / "initramfs")
        (exchange / "init").write_text(
            _INIT.format(
                programs=shlex.quote(os.path.dirname(sys.executable)),
                modules=shlex.quote(str(kernel.modules)),
                directory=shlex.quote(directory or os.getcwd()),
                environment=" ".join(shlex.quote(f"{name}={value}") for name, value in (environment or {}).items()),
                command=shlex.join(argv),
            )
        )
        report("starting the virtual machine")
        argv = _qemu(kernel, work, memory)
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe) as guest:
            try:
                in_time = _pump(guest, sink, time.monotonic() + timeout)
            finally:
                guest.kill()
        code = _exit_code(exchange / "exit")
        if code is not None:
            return code
        if not in_time:
            raise LabError(f"the command in the virtual machine did not end within {timeout:.0f} s")
        raise LabError(
            "\n  ".join(["the virtual machine ended before its command; its console said:", *_console(work)])
        )


def _qemu(kernel: Kernel, work: Path, memory: int) -> list[str]:
    share = "local,security_model=none,multidevs=remap"
    return [
        _QEMU,
        # One processor: where others want the machine's too, a second one mostly waits for the first's locks. An old model of
        # it: newer ones have the C library copy and compare with AVX, which costs a quarter more in emulation.
        *("-accel", "tcg", "-cpu", "Nehalem", "-smp", "1", "-m", str(memory)),
        *("-M", "pc", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-serial", f"file:{work / 'console'}"),
        *("-kernel", str(kernel.image), "-initrd", str(work / "initramfs")),
        *("-append", f"console=ttyS0 quiet panic=-1 {_KERNEL_OPTIONS}"),
        *("-fsdev", f"{share},id=host,path=/,readonly=on", "-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
        *("-fsdev", f"{share},id=exchange,path={work / 'exchange'}"),
        *("-device", "virtio-9p-pci,fsdev=exchange,mount_tag=exchange", "-device", "virtio-serial-pci"),
        # Pipes of ours; QEMU's own complaints come by the second one too.
        *("-chardev", "file,id=out,path=/dev/stdout", "-device", "virtserialport,chardev=out,nr=1"),
        *("-chardev", "file,id=err,path=/dev/stderr", "-device", "virtserialport,chardev=err,nr=2"),
    ]


def _pump(guest: subprocess.Popen[bytes], sink: Sink, deadline: float) -> bool:
    """Hand on the output until QEMU ends; False when that was not before `deadline` (monotonic, seconds)."""
    assert guest.stdout
    assert guest.stderr
    with selectors.DefaultSelector() as selector:
        selector.register(guest.stdout, selectors.EVENT_READ, False)
        selector.register(guest.stderr, selectors.EVENT_READ, True)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for key, _ in selector.select(left):
                if piece := os.read(key.fd, 1 << 16):
                    sink(piece, key.data)
                else:
                    selector.unregister(key.fileobj)
    return True


def _exit_code(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _console(work: Path) -> list[str]:
    try:
        return (work / "console").read_text(errors="replace").splitlines()[-12:]
    except OSError:
        return []
