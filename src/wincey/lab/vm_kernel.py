"""What a virtual machine boots: Debian's stock kernel, unpacked but not installed, and an initramfs made from it.

The kernel (470 MB with its modules) is fetched once and kept below the cache directory, in a directory of its version. The
initramfs takes a moment to make and so is made for every run: a busybox, the few modules it takes to reach the machine's
root over 9p, and a script that puts a writable layer of memory over it.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from wincey.lab.errors import LabError
from wincey.lab.report import Report, silent

_META = "linux-image-amd64"
_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console")
_FETCH_TIMEOUT = 600.0  # seconds for the download, 70 MB

_INIT = """#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t devtmpfs dev /dev
for m in /modules/*.ko; do $B insmod $m; done
$B mount -t 9p -o trans=virtio,version=9p2000.L,cache=loose,msize=512000,ro host /host
$B mount -t tmpfs -o size=60% scratch /scratch
$B mkdir /scratch/upper /scratch/work
$B mount -t overlay -o lowerdir=/host,upperdir=/scratch/upper,workdir=/scratch/work root /root
$B mount -t tmpfs -o size=60% run /root/run
$B mkdir -p /root/run/lock /root/run/vm /root/lib/modules
$B mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 exchange /root/run/vm
$B mount --move /dev /root/dev
$B umount /proc
exec $B switch_root /root /bin/sh /run/vm/init
"""


class Kernel(msgspec.Struct, frozen=True):
    """An unpacked kernel. version: as `uname -r` will say. root: the directory that its package was unpacked in."""

    version: str
    root: Path

    @property
    def image(self) -> Path:
        """What the machine boots: the kernel unpacked where it could be, as in emulation that takes it two seconds."""
        return self.unpacked if self.unpacked.exists() else self.packed

    @property
    def packed(self) -> Path:
        """The kernel as its package has it."""
        return self.root / "boot" / f"vmlinuz-{self.version}"

    @property
    def unpacked(self) -> Path:
        """The same as an ELF file, made beside it."""
        return self.root / "boot" / f"vmlinux-{self.version}"

    @property
    def modules(self) -> Path:
        """The directory to be seen as /lib/modules."""
        return self.base / "lib" / "modules"

    @property
    def base(self) -> Path:
        """The directory that depmod and modprobe find lib/modules in."""
        return _modules(self.root).parents[2]


def cache_directory() -> Path:
    """Where kernels are kept: $WINCEY_VM_DIRECTORY, else ~/.cache/wincey/vm."""
    given = os.environ.get("WINCEY_VM_DIRECTORY")
    if given:
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wincey" / "vm"


def prepare_kernel(cache: Path, report: Report = silent) -> Kernel:
    """The newest kernel in the cache; the first time it is fetched there, by one process at a time.

    Raises LabError when it can't be had.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = [_kernel(path) for path in cache.iterdir() if (path / "boot").is_dir()]
        if not found:
            report("fetching Debian's kernel")
            found = [_fetch(cache)]
        newest = max(found, key=lambda kernel: [int(number) for number in re.findall(r"\d+", kernel.version)])
        if not (newest.modules / newest.version / "modules.dep").exists():
            _run(["depmod", "-b", str(newest.base), newest.version], cache)
        if not newest.unpacked.exists():
            _unpack(newest)
        return newest


def write_initramfs(kernel: Kernel, target: Path) -> None:
    """Write the initramfs, a cpio archive; raises LabError."""
    busybox = _static_busybox()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        tree = Path(scratch)
        for name in ("bin", "modules", "proc", "dev", "host", "scratch", "root"):
            (tree / name).mkdir()
        shutil.copy(busybox, tree / "bin" / "busybox")
        for number, module in enumerate(_with_dependencies(kernel)):
            data = module.read_bytes()
            # Later Debians compress their modules, and busybox hands them to the kernel as they are.
            (tree / "modules" / f"{number:02}.ko").write_bytes(
                lzma.decompress(data) if module.suffix == ".xz" else data
            )
        (tree / "init").write_text(_INIT)
        (tree / "init").chmod(0o755)
        names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
        with target.open("wb") as output:
            packed = subprocess.run(
                ["cpio", "-o", "-H", "newc", "--quiet"],
                cwd=tree,
                input=names.encode(),
                stdout=output,
                stderr=subprocess.PIPE,
                check=False,
            )
    if packed.returncode:
        raise LabError(f"the initramfs can't be made: cpio: {packed.stderr.decode(errors='replace').strip()}")


def _kernel(root: Path) -> Kernel:
    return Kernel(_modules(root).name, root)


def _unpack(kernel: Kernel) -> None:
    """Unpack the kernel if it is packed with xz and has the entry (PVH) by which QEMU starts an unpacked one; else leave it.

    Where the packed part is, the header of the setup code says: Linux, Documentation/arch/x86/boot.rst, payload_offset.
    """
    image = kernel.packed.read_bytes()
    start = (image[0x1F1] + 1) * 512 + int.from_bytes(image[0x248:0x24C], "little")
    config = kernel.root / "boot" / f"config-{kernel.version}"
    if image[start : start + 6] != b"\xfd7zXZ\0" or not config.exists() or "\nCONFIG_PVH=y\n" not in config.read_text():
        return
    target = kernel.unpacked.with_name("vmlinux.new")
    target.write_bytes(
        lzma.LZMADecompressor().decompress(image[start:])
    )  # the size of it follows, and is not of the stream
    target.rename(kernel.unpacked)


def _modules(root: Path) -> Path:
    """The modules of an unpacked package; since Debian 13 they are below /usr."""
    found = [*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")]
    if len(found) != 1:
        raise LabError(f"{root} holds no unpacked kernel package: remove that directory, and it is fetched anew")
    return found[0]


def _fetch(cache: Path) -> Kernel:
    missing = [program for program in ("apt-get", "apt-cache", "dpkg-deb") if not shutil.which(program)]
    if missing:
        raise LabError(
            f"the virtual machine needs Debian's kernel, and {missing[0]}, which fetches it, is not here: on a Debian, run"
            f" `apt-get download` for the package that {_META} depends on, and unpack it with `dpkg-deb -x PACKAGE"
            f" {cache}/debian`"
        )
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
        directory = Path(scratch)
        depends = _run(["apt-cache", "depends", _META], directory)
        names = re.findall(r"Depends: (linux-image-\S+)", depends)
        if not names:
            raise LabError(f"apt knows no package {_META}: run apt-get update, as root, and try again")
        _run(["apt-get", "download", "-q", names[0]], directory)
        [package] = directory.glob("*.deb")
        _run(["dpkg-deb", "-x", str(package), "root"], directory)
        target = cache / _kernel(directory / "root").version
        (directory / "root").rename(target)
        return _kernel(target)


def _with_dependencies(kernel: Kernel) -> list[Path]:
    """The files of the modules, in the order to load them in."""
    lines = "".join(
        _run(["modprobe", "-d", str(kernel.base), "-S", kernel.version, "--show-depends", module], Path("/"))
        for module in _MODULES
    )
    # One that is built in says so instead.
    return [Path(path) for path in dict.fromkeys(re.findall(r"^insmod (\S+)", lines, re.MULTILINE))]


def _static_busybox() -> Path:
    found = shutil.which("busybox")
    if not found or b"/ld-linux" in Path(found).read_bytes():
        raise LabError(
            "the virtual machine needs a busybox without shared libraries: on Debian apt-get install busybox-static"
        )
    return Path(found)


def _run(argv: Sequence[str], directory: Path) -> str:
    done = subprocess.run(argv, cwd=directory, capture_output=True, text=True, timeout=_FETCH_TIMEOUT, check=False)
    if done.returncode:
        # apt's own complaint is its last line; a warning about its sandbox may come before.
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise LabError(f"the virtual machine's kernel can't be prepared: {argv[0]}: {reason}")
    return done.stdout
